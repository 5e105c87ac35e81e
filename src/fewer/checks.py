"""What a method's settings may be; anything else is one error that names the setting, its value, and what would do.

def __post_init__(self) -> None:
    checks.counts(window=self.window)
    checks.words(("mean", "max"), pooling=self.pooling)
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from fewer.errors import FewerError, UnknownName


def counts(least: int | None = 1, **settings: Any) -> None:
    """Whole numbers, from `least` on."""
    for name, value in settings.items():
        if not _whole(value) or (least is not None and value < least):
            raise FewerError(f"{name}={value!r} must be a whole number{'' if least is None else f', at least {least}'}")


def odd(**settings: Any) -> None:
    """Widths that have a middle."""
    for name, value in settings.items():
        if not _whole(value) or value < 1 or value % 2 == 0:
            raise FewerError(f"{name}={value!r} must be an odd number, such as 5, so that there is a middle")


def numbers(**settings: Any) -> None:
    """Numbers from 0 on."""
    for name, value in settings.items():
        if not _real(value) or not value >= 0:  # nan fails this too
            raise FewerError(f"{name}={value!r} must be a number, at least 0")


def shares(*, some: bool = False, **settings: Any) -> None:
    """Numbers from 0 to 1, without 0 where there must be `some`."""
    for name, value in settings.items():
        if not _real(value) or not 0 <= value <= 1 or (some and value == 0):
            raise FewerError(f"{name}={value!r} is not a share in {'(' if some else '['}0, 1]")


def words(known: Sequence[str], **settings: Any) -> None:
    """One of these."""
    for name, value in settings.items():
        if value not in known:
            raise UnknownName(f"{name}={value!r}: choose {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
