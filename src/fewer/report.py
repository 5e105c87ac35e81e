"""What compressing a cache, or shortening visual tokens, saved and cost, as plain data."""

from dataclasses import dataclass
from typing import Any, Literal

from fewer.types import Keep


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache. `kept` is tokens for each row and head; bytes are of tensors really held.

    `state` is "compressed", "whole" (everything kept) or "left alone" (sliding-window layers bound themselves). `seen`
    and `asked` are tokens for each row: those that came by, and those a head was to keep when last compressed.
    `bytes_full` is what transformers' own cache would hold; `metadata` is the part of `bytes_kept` that is neither
    keys nor values (positions, scales, indices, signals that live on), `residual` the part in full precision that waits
    to be stored in fewer bits. `read` is the share of the entries held that a query head read, on average over all
    decoding steps: less than 1 where a method reads sparsely.
    """

    layer: int
    state: Literal["compressed", "whole", "left alone"]
    seen: tuple[int, ...]
    asked: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    bytes_full: int
    bytes_kept: int
    metadata: int
    seconds: float
    residual: int = 0
    read: float = 1.0


@dataclass(frozen=True)
class Report:
    """What compressing one cache saved and cost. `print` it, or read `layers`.

    Four costs that are often taken for one: `bytes_kept` is what the cache holds between two forwards; `peak` the most
    bytes that all layers held at once, as when a prompt was read and not yet cut; `transient` the most bytes that a
    decoding step unpacks at once, on top of what is held; `step_seconds` the latest decoding step, from its first
    layer's attention to its last layer's. `seconds` is the time spent compressing, signals and probes included.
    """

    method: str
    keep: Keep
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    peak: int = 0
    transient: int = 0
    step_seconds: float = 0.0

    @property
    def bytes_full(self) -> int:
        return sum(layer.bytes_full for layer in self.layers)

    @property
    def bytes_kept(self) -> int:
        return sum(layer.bytes_kept for layer in self.layers)

    @property
    def metadata(self) -> int:
        return sum(layer.metadata for layer in self.layers)

    @property
    def residual(self) -> int:
        return sum(layer.residual for layer in self.layers)

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    @property
    def kept(self) -> float:
        """Share of cache entries kept, over the layers that can be shortened."""
        mine = [layer for layer in self.layers if layer.state != "left alone"]
        entries = sum(seen * len(row) for layer in mine for seen, row in zip(layer.seen, layer.kept, strict=True))
        return sum(sum(row) for layer in mine for row in layer.kept) / entries if entries else 1.0

    @property
    def read(self) -> float:
        """Share of the entries held that decoding steps read, over the layers that can be shortened."""
        mine = [(sum(map(sum, layer.kept)), layer.read) for layer in self.layers if layer.state != "left alone"]
        held = sum(entries for entries, _ in mine)
        return sum(entries * share for entries, share in mine) / held if held else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        from dataclasses import asdict

        totals = ("bytes_full", "bytes_kept", "metadata", "residual", "seconds", "read")
        return {**asdict(self), "kept": self.kept, **{name: getattr(self, name) for name in totals}}

    def __str__(self) -> str:
        lines = [
            f"{self.method} keep={self.keep}: kept {self.kept:.1%} of the entries, "
            f"{self.bytes_kept:,} of {self.bytes_full:,} bytes ({self.metadata:,} of them metadata), "
            f"{self.seconds * 1000:.0f} ms spent compressing",
            f"at most {self.peak:,} bytes held at once"
            + (f", {self.transient:,} more unpacked in a decoding step" if self.transient else "")
            + (f"; the last decoding step took {self.step_seconds * 1000:.1f} ms" if self.step_seconds else "")
            + (f"; decoding steps read {self.read:.1%} of the entries" if self.read < 1 else ""),
            "layer  state       asked   kept a head (least-most)        bytes kept / full",
        ]
        for layer in self.layers:
            heads = [count for row in layer.kept for count in row]
            span = f"{min(heads)}-{max(heads)}" if heads else "-"
            lines.append(
                f"{layer.layer:5d}  {layer.state:10s} {max(layer.asked, default=0):6d}   {span:>24s}   "
                f"{layer.bytes_kept:>12,} / {layer.bytes_full:,}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class VisualReport:
    """What shortening the visual tokens of the latest prompt saved and cost.

    `read` is how many visual tokens each layer of the language model read, separators counted, of `had` in the prompt;
    `flops` is the share that is left of the FLOPs of the language model's layers, rows taken to be alike, with those of
    the decisions' own matrix products, which `choosing` is the share of; `seconds` is what deciding took; `first_token`
    the time from the start of the language model's first forward to its end; `cache` the report of the key-value cache.
    """

    methods: tuple[str, ...]
    keep: Any
    had: int
    read: tuple[float, ...]
    seconds: float
    first_token: float
    flops: float
    choosing: float
    cache: Report

    @property
    def mean(self) -> float:
        """Visual tokens that a layer read, on average: the number to compare methods by."""
        return sum(self.read) / len(self.read)

    def __str__(self) -> str:
        return (
            f"{' + '.join(self.methods)} keep={self.keep}: layers read {self.mean:.1f} of {self.had} visual tokens on "
            f"average, the last one {self.read[-1]:.0f}; {self.flops:.1%} of the prefill's FLOPs "
            f"({self.choosing:.1%} for deciding); deciding took "
            f"{self.seconds * 1000:.1f} ms of {self.first_token * 1000:.1f} ms to the first token\n{self.cache}"
        )
