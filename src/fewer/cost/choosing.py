"""What a cache's method spends on its decision: FLOPs of its matrix products, and bytes of signals that live on.

Counted need by need, as the observers and scores work them out; elementwise work, sorting and sums are not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fewer.allocate.levels import Levels
from fewer.cost.sizes import Decoder
from fewer.methods.kv.compresskv import CompressKV
from fewer.methods.kv.dapq import Pseudo
from fewer.methods.kv.ems import EMS
from fewer.methods.kv.merge_evict import MergeEvict
from fewer.methods.kv.scissorhands import Scissorhands
from fewer.score.reconstruction import Reconstruction
from fewer.score.surrogate import Predicted
from fewer.signals import ChannelMaxima, Moments, Probes, Projection, Queries, Received

POWER = 12
"""Multiply-adds for each number and rank of GEAR's power iteration: two rounds of two products, and two more."""
GUESSED = "choosing: who asks whom depends on the data, so its likeness products are a ceiling"


def _window(sizes: Decoder, queries: int, keys: int, heads: int | None = None) -> int:
    """Logits of these queries, and their sum over queries."""
    return 2 * (sizes.heads if heads is None else heads) * queries * keys * (sizes.head_dim + 1)


def _probes(need: Probes, n: int) -> int:
    return math.ceil(need.share * n - 1e-9) + int(need.share * n + 1e-9)


def _read_again(sizes: Decoder, more: int, behind: int) -> int:
    """The model reads so many tokens behind others, with logits of the last alone."""
    seen = more * behind + more * (more + 1) // 2
    products = 2 * (sizes.parameters - sizes.embedding) * more + 2 * sizes.embedding
    return products + 4 * sizes.layers * sizes.heads * sizes.head_dim * seen


def _predicted(need: Any, layer: int, n: int) -> int:
    matrices = [tensor[layer] for name, tensor in need.fit.tensors.items() if tensor.ndim == 3]
    return sum(2 * n * matrix.numel() for matrix in matrices)


def _watching(need: Any, sizes: Decoder, layer: int, n: int) -> int:
    """FLOPs of gathering a need of one row, in a layer that reads n tokens; what the model reads again is apart."""
    d = sizes.head_dim
    if isinstance(need, Received):
        return _window(sizes, n, n)
    if isinstance(need, Moments):
        return 2 * sizes.heads * d * d * n
    if isinstance(need, Predicted):
        return _predicted(need, layer, n)
    if isinstance(need, Reconstruction):
        return sum(2 * sizes.heads * d * q * (c + q + s) for q, c, s in _chunks(need, n))
    return 0


def _rating(need: Any, sizes: Decoder, n: int) -> int:
    """FLOPs of the scores that are made of it."""
    d, heads = sizes.head_dim, sizes.heads
    if isinstance(need, Queries):
        return _window(sizes, min(need.last, n), n)
    if isinstance(need, Probes):
        return _window(sizes, _probes(need, n), n)
    if isinstance(need, Moments):  # mean and covariance turned to the coming positions, and both with every key
        return 2 * heads * (2 * d**3 + d * d + d * n + d * d * n)
    if isinstance(need, Projection):
        return 2 * heads * n * d * sizes.hidden
    if isinstance(need, Pseudo):
        return _window(sizes, need.count, n + need.count)
    return 0


def _chunks(need: Any, n: int) -> list[tuple[int, int, int]]:
    """Of each chunk that is repeated: tokens read, tokens repeated, and sinks before them."""
    out = []
    for start in range(0, n, need.chunk):
        again = min(need.chunk, n - start)
        ask = len(need.prompt.later) + min(start, need.previous) if start else len(need.prompt.first)
        out.append((ask + len(need.prompt.answer) + again, again, min(need.sinks, n)))
    return out


def _again(need: Any, sizes: Decoder, n: int) -> int:
    """FLOPs of what the whole model reads again for a need."""
    if not getattr(need, "probe", False):
        return 0
    read = [need.count] if isinstance(need, Pseudo) else [q for q, _, _ in _chunks(need, n)]
    return sum(_read_again(sizes, more, n) for more in read)


def _more(method: Any, sizes: Decoder, n: int, kept: float) -> int:
    """What some methods do beside, or without, what their needs say."""
    dropped = math.ceil((n - kept) * kept) * sizes.kv_heads * sizes.head_dim * 2
    extra: dict[type, Callable[[], int]] = {
        Scissorhands: lambda: -2 * sizes.heads * min(method.history, n) * n,  # counts, where others sum
        CompressKV: lambda: (
            _window(sizes, min(method.window, n), n, method.voters) - _window(sizes, min(method.window, n), n)
        ),
        MergeEvict: lambda: dropped,
        EMS: lambda: dropped,
    }
    inner = getattr(method, "scorer", None) if not isinstance(method, Levels) else method.method
    own = extra.get(type(method), lambda: 0)()
    return own if inner is None else own + _more(inner, sizes, n, kept)


def choosing(
    method: Any,
    stores: Sequence[Any],
    sizes: Decoder,
    read: Sequence[int],
    held: Sequence[float],
    *,
    rows: int,
    decides: bool,
) -> tuple[int, str]:
    """FLOPs for `rows` rows, where each layer that is shortened reads, and its heads then hold, so many tokens; and a
    remark where that is not quite it. Where nothing is to be decided, signals are gathered all the same."""
    total = sum(_again(need, sizes, max(read)) for need in method.needs)
    shortens = getattr(method, "shortens", None)
    for layer, (n, kept) in enumerate(zip(read, held, strict=True)):
        total += sum(_watching(need, sizes, layer, n) for need in method.needs)
        if not decides:
            continue
        # who goes on, and who attends, is decided by scores of their own
        twice = getattr(method, "among", None) is not None or (shortens is not None and layer == shortens(len(read)))
        total += (1 + twice) * sum(_rating(need, sizes, n) for need in method.needs) + _more(method, sizes, n, kept)
        for store in stores:
            whole = 0 if store is None else int(kept) // store.block * store.block
            total += POWER * sizes.kv_heads * 2 * whole * sizes.head_dim * getattr(store, "rank", 0)
    return rows * total, GUESSED if decides and _asks(method) else ""


def _asks(method: Any) -> bool:
    """Whether who asks for a likeness depends on the data."""
    return isinstance(method.method if isinstance(method, Levels) else method, EMS)


def fixed_bytes(method: Any, sizes: Decoder, rows: int, n: int, *, lives: bool, dense: bool) -> int:
    """Bytes of signals in one layer that live on and are no number for each key; `lives`: those that are gathered anew
    for every compression as well."""
    query = sizes.heads * sizes.head_dim * sizes.itemsize + 9  # and its position, and whether it is padding
    d, total = sizes.head_dim, 0
    for need in method.needs:
        if isinstance(need, ChannelMaxima):
            total += sizes.kv_heads * d * 8
        elif not lives:
            continue
        elif isinstance(need, Queries):
            total += min(need.last, n) * query
        elif isinstance(need, Probes):
            total += (_probes(need, n) * query + 8) * dense  # forgotten once they served
        elif isinstance(need, Moments):
            total += 4 + 4 * sizes.heads * d * (d + 1) + 8
        elif isinstance(need, Pseudo):
            total += need.count * (query + sizes.kv_heads * d * sizes.itemsize)
    return rows * total
