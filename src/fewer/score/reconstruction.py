"""Scores from having the model repeat its context: what it looks at then is what it needs to answer anything.

after the prompt, for each chunk of it, the model reads:  instruction, last tokens of the chunk before, the chunk again
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.score.attention import attention_rows
from fewer.signals import BLOCK_CELLS, Observer, PerKey, Step, blank, marked_last


@dataclass(frozen=True)
class Instruction:
    """Token ids around a chunk: what asks for the first one, what asks for a later one, and what opens the answer."""

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()


UNASKED = Instruction()


@dataclass(frozen=True)
class Reconstruction:
    """The greatest attention each key gets while the model repeats its context chunk by chunk; 0 where it was never
    repeated."""

    chunk: int = 2048
    previous: int = 8
    sinks: int = 4
    prompt: Instruction = UNASKED

    key_bytes: ClassVar[int] = 4  # float32, for as long as the key is kept
    probe: ClassVar[bool] = True

    def start(self) -> Observer:
        return _Repeated(self)

    def inputs(self, ids: Int[Tensor, "b q"], real: Bool[Tensor, "b q"]) -> Iterator[tuple[Tensor, Tensor]]:
        rows = [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]
        for start in range(0, max(map(len, rows)), self.chunk):
            texts = []
            for row in rows:
                before = row[max(0, start - self.previous) : start]
                ask = [*self.prompt.later, *before] if start else [*self.prompt.first]
                again = row[start : start + self.chunk]
                texts.append([*ask, *self.prompt.answer, *again] if again else [])
            longest = max(map(len, texts))
            more = [[0] * (longest - len(text)) + text for text in texts]
            there = [[False] * (longest - len(text)) + [True] * len(text) for text in texts]
            yield torch.tensor(more, device=ids.device), torch.tensor(there, device=ids.device)


class _Repeated(PerKey):
    def __init__(self, need: Reconstruction) -> None:
        super().__init__()
        self.need = need
        self.width = self.chunk = 0  # columns of the forward that just ended, and which chunk of it comes next

    def observe(self, step: Step) -> None:
        self.width, self.chunk = step.query.shape[2], 0

    def observe_probe(self, step: Step) -> None:
        keys, positions, padding = step.dense()
        (b, h, n), q = positions.shape, step.query.shape[2]
        held = n - q
        new = padding[:, 0, held - self.width : held]  # (b, width); columns of a forward are the same for all heads
        place = (~new).cumsum(1) - 1
        inside = ~new & (place // self.need.chunk == self.chunk)
        c = int(inside.sum(1).max())
        columns = marked_last(inside)[:, self.width - c :]  # (b, c), empty ones first
        there = inside.gather(1, columns)
        columns = (columns + held - self.width).unsqueeze(1).expand(b, h, c)
        sink = (positions[..., :held] < self.need.sinks) & ~padding[..., :held]
        sink[..., held - self.width :] &= ~inside.unsqueeze(1)  # no key counts twice
        first = marked_last(sink)[..., max(held - self.need.sinks, 0) :]
        last = torch.arange(held, n, device=keys.device).expand(b, h, q)
        at = torch.cat([first, columns, last], -1)  # (b, h, sinks + c + q)
        hidden = torch.cat([~sink.gather(2, first), (~there).unsqueeze(1).expand(b, h, c), padding[..., held:]], -1)
        chosen = blank(keys.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])), hidden)
        got = _greatest(step, chosen, positions.gather(2, at), hidden, slice(first.shape[-1], first.shape[-1] + c))
        scores = got.new_zeros(b, h, held)
        if (old := self.value()) is not None:
            scores[..., : old.shape[-1]] = old
        # what underflowed was looked at all the same; empty columns point at others, which must keep what they have
        scores.scatter_reduce_(2, columns, got.clamp(min=torch.finfo(got.dtype).tiny) * there.unsqueeze(1), "amax")
        self.put(scores)
        self.chunk += 1


def _greatest(
    step: Step,
    keys: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "b h n"],
    padding: Bool[Tensor, "b h n"],
    wanted: slice,
) -> Float[Tensor, "b h c"]:
    """The greatest attention that the wanted keys get from any real query of the step, block by block."""
    query = blank(step.query, step.padding.unsqueeze(1))
    (b, heads, q, _), h = query.shape, keys.shape[1]
    size = max(1, BLOCK_CELLS // (b * heads * keys.shape[2]))
    best = []
    for start in range(0, q, size):
        at = slice(start, start + size)
        rows = attention_rows(
            query[:, :, at], step.positions[:, at], keys, positions, padding, step.scaling, step.softcap
        )[..., wanted]
        best.append(rows.masked_fill(step.padding[:, None, at, None], 0).amax(2))  # (b, heads, c)
    return torch.stack(best).amax(0).view(b, h, heads // h, -1).amax(2)
