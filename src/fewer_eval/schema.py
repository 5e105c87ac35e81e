"""What an evaluation writes down: one typed row per measured cell, and the circumstances of the run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Question = Literal["seen", "unseen", "none"]


@dataclass(frozen=True)
class Row:
    """One method on one task at one budget.

    `question` says whether the compressor saw the question ("seen"), did not ("unseen"), or the task asks none
    ("none": running text). `keep_asked` is what the caller wrote (a fraction, a token count or bytes such as "64MB");
    `keep_got` is the share of cache entries really kept. Bytes count one sample's whole cache, metadata included, and
    are means over the samples. `quality` and `loyalty` lie in [0, 1]: the task's own score, and the share of the
    uncompressed model's greedy continuation that is reproduced before the first different token. `prefill_s` is the
    plain prefill and `compress_s` what compressing added (scores included), both in seconds a sample; `decode_ms` is
    one decoding step on the kept cache, batch 1. `kl_bits` (bits a token, full model to compressed) and `bpb_diff`
    (bits per byte lost) exist for running text only.
    """

    method: str
    task: str
    question: Question
    keep_asked: float | int | str
    keep_got: float
    bytes_full: float
    bytes_kept: float
    quality: float
    loyalty: float
    n: int
    prefill_s: float
    compress_s: float
    decode_ms: float
    seed: int
    tokens: int
    model: str
    kl_bits: float | None = None
    bpb_diff: float | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a row needs at least one sample, {self.method} on {self.task} has {self.n}")
        for name in ("keep_got", "quality", "loyalty"):
            value = getattr(self, name)
            if not (math.isfinite(value) and -1e-9 <= value <= 1 + 1e-9):
                raise ValueError(f"{name}={value} of {self.method} on {self.task} is outside [0, 1]")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Lost:
    """One example on which a method lost quality against the full model, with both answers; long texts are cut.

    `asked` says whether the compressor saw the question, `expected` is a right answer, `quality` what the compressed
    model's answer scored, `lost` how much more the full model's did.
    """

    task: str
    asked: Question
    question: str
    expected: str
    full: str
    said: str
    quality: float
    lost: float


@dataclass(frozen=True)
class RunInfo:
    """The circumstances that every number of a run depends on.

    `kept` maps "method @ keep" to kept entries per layer and key-value head, from the first sample; `notes` are the
    remarks the compressors made (a prompt kept whole, layers left alone). `worst` maps "method @ keep" to the examples
    on which it lost most, the worst first, and to none where it lost nothing; files written before it was kept lack it.
    """

    model: str
    command: str
    date: str
    seed: int
    tokens: int
    samples: int
    hardware: Mapping[str, str]
    versions: Mapping[str, str]
    kept: Mapping[str, list[list[int]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    worst: Mapping[str, list[Lost]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
