"""What a search for a setting found, as plain data: what the report shows and `results/tune.json` holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fewer.tuning.planfile import ONCE, Promise, TunedPlan, again
from fewer.tuning.setting import Setting
from fewer.types import FewerError


@dataclass(frozen=True)
class Measured:
    """One setting on one part of the examples.

    `loss` is the mean over `n` different contexts, in [0, 1], each with the mean of the questions about it; the costs
    are means of the same kind: `bytes` that the cache held after the prompt, `tokens` of the prompt that the model
    read, `seconds` until the answer is there, by the table of this machine (None where that was not made). `tasks`
    splits the loss by the field `task` of the examples.
    `p` is the p-value of "the true loss is above what was asked", on calibration data only.
    """

    setting: Setting
    n: int
    loss: float
    bytes: float
    tokens: float
    seconds: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    p: float | None = None

    def cost(self, aim: str) -> float:
        """What `aim`, "memory", "latency" or "tokens", makes small."""
        return float({"memory": self.bytes, "latency": self.seconds or 0.0, "tokens": self.tokens}[aim])


@dataclass(frozen=True)
class Worst:
    """One example on which a setting lost, with both answers."""

    question: str
    full: str
    said: str
    loss: float
    line: int
    task: str = ""


@dataclass(frozen=True)
class Tuned:
    """What `fewer.tune` found.

    `chosen` is the setting that may be used, or None where none passed: then `why` says what was in the way. `searched`
    was measured on the search part of the examples, `sequence` on the calibration part, in the order it was tested in
    (those without a p-value were given up), of which `contexts` are different; it was the record's `test`-th test on
    them. `stake` is what an answer of nothing
    would lose. `held` is the chosen setting on examples that no choice has seen, `full` the model as it is. `budgets`
    holds, for each layer, the mean share that its heads kept, for the chosen setting, and where a search for levels was
    made, its `history` of the best fitness (bits a token between the full model's predictions and the compressed
    one's).
    """

    model: str
    aim: str
    loss: float
    confidence: float
    measure: str
    chosen: Setting | None
    why: str
    fingerprint: str
    unseen: bool
    max_new_tokens: int
    stake: float
    full: Measured
    searched: tuple[Measured, ...]
    sequence: tuple[Measured, ...]
    held: Measured | None = None
    budgets: tuple[tuple[float, ...], ...] = ()
    history: tuple[float, ...] = ()
    worst: tuple[Worst, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    contexts: int = 0
    test: int = 1
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    date: str = ""
    command: str = ""
    hardware: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def promise(self) -> str:
        """The bound in one sentence, or why there is none."""
        if self.chosen is None:
            return f"Do not compress: {self.why}"
        n, lost = next((one.n, one.loss) for one in self.sequence if one.setting == self.chosen)
        said = "contexts" if self.grouped else "examples"
        return (
            f"With confidence {self.confidence:g}, on data like these examples, the expected loss ({self.measure}) of "
            f"{self.chosen} is at most {self.loss:g}: it was {lost:.4f} on {n} calibration {said}, which had no "
            f"part in choosing the candidates. An answer of nothing at all would lose {self.stake:.4f}."
            + (f" {ONCE[0].upper()}{ONCE[1:]}." if self.grouped else "")
            + (f" But {again(self.test)}." if self.test > 1 else "")
        )

    @property
    def grouped(self) -> bool:
        """Whether some calibration examples share a context."""
        return self.contexts < self.parts.get("calibration", 0)

    def plan(self) -> TunedPlan:
        """What to write as plan.toml.

        Raises:
            FewerError: there is no setting that may be used.
        """
        if self.chosen is None or self.held is None:
            raise FewerError(f"there is no plan to write: do not compress, {self.why}")
        tested = next(one for one in self.sequence if one.setting == self.chosen)
        promise = Promise(
            self.loss, self.confidence, self.measure, tested.n, tested.loss, float(tested.p or 0.0), self.held.n,
            self.held.loss, self.unseen, self.max_new_tokens, self.stake, self.grouped, self.test,
        )  # fmt: skip
        made = {"date": self.date, "command": self.command, **self.versions}
        return TunedPlan(self.chosen, self.model, self.fingerprint, promise, made)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""

        def plain(found: Measured) -> dict[str, Any]:
            return {**asdict(found), "setting": found.setting.to_dict(), "name": str(found.setting)}

        said = asdict(self)
        said.update(
            chosen=None if self.chosen is None else self.chosen.to_dict(),
            full=plain(self.full),
            searched=[plain(one) for one in self.searched],
            sequence=[plain(one) for one in self.sequence],
            held=None if self.held is None else plain(self.held),
            promise=self.promise,
        )
        return said
