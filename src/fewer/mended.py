"""Numbers in few bits with two corrections, as GEAR has them: what errors share, and what fits no grid.

    x'  =  packed + left @ right,   and at a few places just what x was

`left` has a row for each token, `right` a matrix for each run, which is what one call packs of one head. Both are
float16, as are the exact numbers; these are found, counted and held for each group of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.bits import Packed
from fewer.tiers import Runs

LOOPS = 3
"""Of the power iteration."""


def low_rank(x: Float[Tensor, "n d"], rank: int) -> tuple[Float[Tensor, "n rank"], Float[Tensor, "rank d"]]:
    """Two factors whose product is close to `x`, by power iteration; its start is random, and the same every time."""
    right = torch.rand(x.shape[-1], rank, generator=torch.Generator().manual_seed(0)).to(x.device)
    for _ in range(LOOPS - 1):
        right = x.T @ (x @ right)
        right = right / right.norm(dim=0).clamp(min=1e-30)  # or it leaves the range of numbers
    left = torch.linalg.qr(x @ torch.linalg.qr(right).Q).Q
    return left, left.T @ x


@dataclass(frozen=True)
class Mended:
    """A matrix of tokens `(n, d)`, quantised by channel or by token, with both corrections."""

    packed: Packed
    left: Float[Tensor, "n rank"]
    right: Float[Tensor, "runs rank d"]
    exact: Float[Tensor, "groups some"]
    places: Int[Tensor, "groups some"]  # in the group's tokens, one after the other
    runs: Runs
    group: int

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "n d"],
        lengths: Sequence[int],
        bits: int,
        group: int,
        sparsity: float,
        rank: int,
        *,
        by_token: bool,
    ) -> "Mended":
        """`lengths` are of the runs, multiples of `group`; a share of `sparsity` is exact, half of it at each end.

        By token, a scale and a zero are for `group` channels of a token; else they are for `group` tokens of a channel.
        """
        x = x.float()
        tiles = x.view(-1, group, x.shape[-1])
        mean = tiles.mean(2 if by_token else 1, keepdim=True)
        from_mean, flat = (tiles - mean).flatten(1), tiles.flatten(1)
        some = _some(sparsity, group * x.shape[-1]) // 2
        places = torch.cat([from_mean.topk(some, largest=up).indices for up in (True, False)], -1)
        without = flat.scatter(1, places, mean.expand_as(tiles).flatten(1).gather(1, places)).view_as(x)
        grid = {"channels": group} if by_token else {"tokens": group}
        packed = Packed.of(without, bits, **grid)
        error = (without - packed.tensor()).view_as(flat).scatter(1, places, 0.0).view_as(x)
        factors = [low_rank(part, rank) for part in torch.split(error, list(lengths))]
        left, right = torch.cat([left for left, _ in factors]), torch.stack([right for _, right in factors])
        kept = places.to(_index_type(group * x.shape[-1]))
        return cls(packed, _half(left), _half(right), _half(flat.gather(1, places)), kept, Runs.of(lengths), group)

    def tensor(self, start: int, end: int, dtype: torch.dtype) -> Float[Tensor, "m d"]:
        """The numbers of these entries; bounds lie between groups."""
        x, (at, lengths) = self.packed[start:end].tensor(), self.runs.between(start, end)
        left, right = self.left[start:end].float(), self.right[at].float()
        if len(set(lengths)) == 1:
            x.view(len(lengths), lengths[0], -1).baddbmm_(left.view(len(lengths), lengths[0], -1), right)
        else:
            for y, a, b in zip(*(torch.split(z, lengths) for z in (x, left)), right, strict=True):
                y.addmm_(a, b)
        groups = slice(start // self.group, end // self.group)
        x.view(-1, self.group * x.shape[-1]).scatter_(1, self.places[groups].long(), self.exact[groups].float())
        return x.to(dtype)

    def take(self, spans: Sequence[tuple[int, int]]) -> "Mended":
        """These entries, one after the other."""
        at, runs = self.runs.take(spans)
        groups = [slice(start // self.group, end // self.group) for start, end in spans]
        return Mended(
            Packed.join([self.packed[start:end] for start, end in spans]),
            torch.cat([self.left[start:end] for start, end in spans]),
            self.right[at],
            torch.cat([self.exact[some] for some in groups]),
            torch.cat([self.places[some] for some in groups]),
            runs,
            self.group,
        )

    def fits(self, other: "Mended") -> bool:
        """Whether both can be one."""
        same = [(x.left.shape[-1], x.exact.shape[-1], x.group) for x in (self, other)]
        return same[0] == same[1] and self.packed.fits(other.packed)

    def join(self, other: "Mended") -> "Mended":
        """The entries of both, one after the other."""
        return Mended(
            Packed.join([self.packed, other.packed]),
            torch.cat([self.left, other.left]),
            torch.cat([self.right, other.right]),
            torch.cat([self.exact, other.exact]),
            torch.cat([self.places, other.places]),
            self.runs.stack(other.runs),
            self.group,
        )

    @property
    def payload(self) -> tuple[int, int]:
        """Bytes of numbers, and of scales and places."""
        numbers = self.packed.codes.nbytes + self.left.nbytes + self.right.nbytes + self.exact.nbytes
        return numbers, self.packed.metadata + self.places.nbytes

    @staticmethod
    def bytes_for(n: int, d: int, bits: int, group: int, sparsity: float, rank: int, *, by_token: bool) -> int:
        """What `of` would take for one run of n tokens."""
        if not n:
            return 0
        packed = Packed.bytes_for(n, d, bits, **({"channels": group} if by_token else {"tokens": group}))
        exact = n // group * _some(sparsity, group * d) * (2 + _index_type(group * d).itemsize)
        return packed + exact + 2 * rank * (n + d)


def _some(sparsity: float, numbers: int) -> int:
    """How many of so many numbers are exact: as many at one end as at the other."""
    return 2 * int(sparsity / 2 * numbers)


def _index_type(numbers: int) -> torch.dtype:
    """What holds a place among so many numbers."""
    return torch.int16 if numbers <= 1 << 15 else torch.int32


def _half(x: Tensor) -> Tensor:
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).half()
