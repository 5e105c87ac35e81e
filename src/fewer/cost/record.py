"""What one setting costs, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What reading prompts, or images, costs under a method. Of all rows together, unless it says otherwise.

    Args:
        family: "kv", "vit", "vlm" or "prompt": what was shortened.
        tokens: tokens that go through the last layer.
        flops: of the layers, and of the output matrix for every token ("kv", "prompt"); a multiply-add counts two.
        bytes: of the cache when the prompt was read and cut, metadata included; 0 for encoders.
        decode_bytes: what one decoding step cannot avoid reading, weights and cache; 0 for encoders.
        choosing: FLOPs of the matrix products by which the method decides, on top of `flops`.
        whole: `flops` without a method.
        length: tokens of one row without a method.
        read: tokens of one row that each layer reads.
        rows: how many there are.
        exact: False where a number depends on the data; `notes` say which, and whether it is a bound or an estimate.
        modelled: False where the decision takes matrix products that `choosing` leaves out.
        notes: remarks on these two.
    """

    family: str
    tokens: int
    flops: int
    bytes: int
    decode_bytes: int
    choosing: int = 0
    whole: int = 0
    length: int = 0
    read: tuple[int, ...] = ()
    rows: int = 1
    exact: bool = True
    modelled: bool = True
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """FLOPs, deciding included, over those without a method.

        >>> Cost("kv", tokens=10, flops=70, bytes=0, decode_bytes=0, choosing=5, whole=100).share
        0.75
        """
        return (self.flops + self.choosing) / self.whole
