"""One line of a comparison, and what is taken down for it sample by sample."""

import statistics
from dataclasses import dataclass, field

from fewer.codec import Codec
from fewer.inner import changes_forward
from fewer.methods import name_of, resolve, resolve_store
from fewer.types import Keep, Method
from fewer_eval.schema import Question, Row
from fewer_eval.tasks import Task


@dataclass(frozen=True)
class Case:
    """One line of the comparison."""

    method: Method
    name: str
    keep: Keep
    store: Codec | None = None

    @classmethod
    def of(cls, method: str | Method, keep: Keep) -> "Case":
        named, _, store = method.partition("+") if isinstance(method, str) else (method, "", "")
        found = resolve(named)
        name = name_of(found) + (f"+{store}" if store else "")
        return cls(found, name, 1.0 if getattr(found, "whole", False) else keep, resolve_store(store or None))

    @property
    def alone(self) -> bool:
        """Whether it does something while it prefills or decodes, so that no other method's caches can stand in."""
        return changes_forward(self.method)


@dataclass
class Tally:
    """What was measured for one case on one task and question."""

    keep_got: list[float] = field(default_factory=list)
    bytes_full: list[int] = field(default_factory=list)
    bytes_kept: list[int] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    loyalty: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    bpb: list[float] = field(default_factory=list)

    def row(
        self, case: Case, question: Question, task: Task, *, decode_ms: float, seed: int, tokens: int, model: str
    ) -> Row:
        mean = statistics.fmean
        return Row(
            method=case.name, task=task.name, question=question, keep_asked=case.keep, keep_got=mean(self.keep_got),
            bytes_full=mean(self.bytes_full), bytes_kept=mean(self.bytes_kept), quality=mean(self.quality),
            loyalty=mean(self.loyalty), n=len(self.quality), prefill_s=mean(self.prefill),
            compress_s=mean(self.compress), decode_ms=decode_ms, seed=seed, tokens=tokens, model=model,
            kl_bits=mean(self.kl) if self.kl else None, bpb_diff=mean(self.bpb) if self.bpb else None,
        )  # fmt: skip
