"""What a user asked of an encoder, read and checked before anything is changed."""

from dataclasses import dataclass
from typing import Any

from fewer.adapters.encoder_seam import MASSES
from fewer.adapters.encoder_state import POSITIONS
from fewer.allocate.schedule import Schedule
from fewer.restorers import NEEDS_BASE, RESTORERS
from fewer.signals.heads import Heads
from fewer.types import Method, MissingSignal, UnknownName


@dataclass(frozen=True)
class Setting:
    """What a user asked of an encoder; see `fewer.compress`."""

    method: Method
    schedule: Schedule
    masses: str = "mask"
    positions: str = "survivor"
    restore: str | None = None
    tape: bool = False

    def __post_init__(self) -> None:
        if self.masses not in MASSES:
            raise UnknownName(f"masses={self.masses!r}: known are {', '.join(MASSES)}")
        if self.positions not in POSITIONS:
            raise UnknownName(f"positions={self.positions!r}: known are {', '.join(POSITIONS)}")
        if self.restore is not None and self.restore not in RESTORERS:
            raise UnknownName(f"restore={self.restore!r}: known ways are {', '.join(RESTORERS)}")
        foreign = [need for need in self.method.needs if not isinstance(need, Heads)]
        if foreign:
            raise MissingSignal(
                f"{type(self.method).__name__} reads {', '.join(type(need).__name__ for need in foreign)}, which an "
                "encoder does not give; `fewer methods --family vit` lists the methods for encoders"
            )

    @classmethod
    def of(
        cls,
        method: Method,
        keep: Any,
        schedule: str | None,
        masses: str | None,
        positions: str | None,
        restore: str | None,
        tape: bool,
    ) -> "Setting":
        """What `compress` was given, with what the method was published with where it says nothing."""
        own: Any = method
        shape = schedule or str(getattr(own, "schedule", "constant"))
        weigh = masses or str(getattr(own, "masses", "mask"))
        return cls(method, Schedule(keep, shape), weigh, positions or "survivor", restore, tape)

    @property
    def taped(self) -> bool:
        """Whether the features that plans were made on are kept, for restoring."""
        return self.tape or self.restore in NEEDS_BASE
