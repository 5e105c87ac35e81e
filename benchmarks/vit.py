"""Images a second of an encoder that passes fewer tokens, beside the unreduced one and the floor.

What is measured, in words. A block costs FLOPs by the tokens that pass it, so the least that any method could take is
what the same counts cost when tokens are simply cut off, with no choosing, no masses and no merging: that is the floor
(*sliced*), run in turn with the rest. What a method takes above it is its own cost. ToMe is also run as it was first
published: attention written out, so that log(size) can be added, argsort and scatter_reduce.

Correctness comes first: keeping everything must not change a bit, merging exact duplicates must lose nothing, and ToMe
as first published, told to merge nothing, must give what the host gives; otherwise nothing is timed. All runs of a
case take turns, and what is shown are medians: shared machines drift.

    python benchmarks/vit.py [--cases 224x1,224x16,448x1,448x16,518x1,518x16] [--methods all] [--rounds 5] [--json F]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fewer
from fewer import vision
from fewer.adapters.encoder_blocks import find, unmasked
from fewer.adapters.encoder_run import Trace
from fewer.fit import wants
from fewer.methods import of_family
from fewer_eval import environment

KEEP = 0.5
Setting = Callable[[], AbstractContextManager[Any]]
CASES = "224x1,224x16,448x1,448x16,518x1,518x16"


@contextmanager
def replaced(model: Any, forward: Callable[[int, Any, Tensor], Tensor]) -> Iterator[None]:
    """Every block's forward replaced by one of ours, as bare as it can be."""
    found = find(model)
    assert found is not None
    with ExitStack() as leaving:
        for layer, block in enumerate(found[1]):
            block.forward = lambda x, *_, layer=layer, block=block, **__: forward(layer, block, x)
            leaving.callback(vars(block).pop, "forward")
        yield


@contextmanager
def sliced(model: Any, trace: Sequence[Trace]) -> Iterator[None]:
    """The floor: the counts of a trace, with tokens cut off."""
    found = find(model)
    assert found is not None
    shape, options = found[2], unmasked(getattr(found[1][0], found[2].attention))

    def forward(layer: int, block: Any, x: Tensor) -> Tensor:
        x = shape.mix(block, x[:, : trace[layer].came], options)
        return shape.feed(block, x[:, : trace[layer].went])

    with replaced(model, forward):
        yield


@contextmanager
def tome_as_published(model: Any, removed: Sequence[int]) -> Iterator[None]:
    """ToMe the way its paper's code goes about it, written for this host: the baseline, not our method."""
    size: list[Tensor] = []

    def forward(layer: int, block: Any, x: Tensor) -> Tensor:
        if layer == 0:
            size[:] = [torch.ones_like(x[..., :1])]
        att, y = block.attention, block.norm1(x)
        split = (*y.shape[:2], att.num_attention_heads, att.head_dim)
        q, k, v = (part(y).view(split).transpose(1, 2) for part in (att.q_proj, att.k_proj, att.v_proj))
        logits = q * att.scaling @ k.transpose(-2, -1) + size[0].log()[:, None, None, :, 0]
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + block.drop_path(block.layer_scale1(att.o_proj(y)))
        r = min(removed[layer], (x.shape[1] - 1) // 2)
        if r > 0:
            x, size[0] = merged(x, size[0], k.mean(1), r)
        return x + block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))

    with replaced(model, forward):
        yield


def merged(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One step of bipartite soft matching with a class token in front."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf
    best, to = scores.max(-1)
    order = best.argsort(-1, descending=True).unsqueeze(-1)
    source, left = order[:, :r], order[:, r:].sort(1).values
    into = to.unsqueeze(-1).gather(1, source)

    def carried(t: Tensor) -> Tensor:
        even, odd, wide = t[:, ::2], t[:, 1::2], t.shape[-1]
        stay = even.gather(1, left.expand(-1, -1, wide))
        move = even.gather(1, source.expand(-1, -1, wide))
        return torch.cat([stay, odd.scatter_reduce(1, into.expand(-1, -1, wide), move, "sum")], 1)

    summed, total = carried(x * size), carried(size)
    return summed / total, total


@torch.inference_mode()
def correct(model: Any) -> None:
    """Whether what is to be timed is right."""
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    plain = model(x).last_hidden_state
    with fewer.compress(model, "tome", keep=1.0):
        if not torch.equal(model(x).last_hidden_state, plain):
            raise SystemExit("keeping everything changed the output: nothing is timed")
    found = find(model)
    assert found is not None
    block, tokens = found[1][0], torch.randn(2, 17, 384, generator=torch.Generator().manual_seed(0))
    tokens[:, 2::2] = tokens[:, 1::2]  # each patch at an even place is its odd neighbour again
    whole = block(tokens)
    with fewer.compress(model, "tome", keep=[8] * 12) as run:
        run.grid = (4, 4)
        off = float(
            (run.forward(0, tokens, {}) - whole.gather(1, run.plan[0].survivors[..., None].expand(2, 9, 384)))
            .abs()
            .max()
        )
    if off > 1e-3:
        raise SystemExit(f"merging exact duplicates is off by {off}: nothing is timed")
    with tome_as_published(model, [0] * 12):
        off = float((model(x).last_hidden_state - plain).abs().max())
    if off > 1e-3:
        raise SystemExit(f"ToMe as published, merging nothing, is off by {off}: nothing is timed")


def median_turns(model: Any, x: Tensor, runs: dict[str, Setting], rounds: int) -> dict[str, float]:
    """Median seconds of a forward in each setting, taken in turns; one turn, and entering and leaving, do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, setting in runs.items():
            with setting():
                start = time.perf_counter()
                model(x)
                took = time.perf_counter() - start
            if turn:
                times[name].append(took)
    return {name: statistics.median(taken) for name, taken in times.items()}


@torch.inference_mode()
def case(model: Any, names: Sequence[str], size: int, batch: int, rounds: int, masses: str) -> dict[str, Any]:
    """One size and batch: seconds of the host, of each method, of its floor, and of ToMe as published."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))

    traces: dict[str, tuple[Trace, ...]] = {}
    flops: dict[str, float] = {}
    for name in names:
        with fewer.compress(model, name, keep=KEEP, masses=masses) as run:
            model(x)
        traces[name], flops[name] = tuple(run.trace), run.flops
    floors = {trace: f"floor {i}" for i, trace in enumerate(dict.fromkeys(traces.values()))}
    runs: dict[str, Setting] = {"host": nullcontext}
    runs |= {name: partial(fewer.compress, model, name, keep=KEEP, masses=masses) for name in names}
    runs |= {label: partial(sliced, model, trace) for trace, label in floors.items()}
    if "tome" in traces:
        runs["tome as published"] = partial(tome_as_published, model, [one.came - one.went for one in traces["tome"]])
    took = median_turns(model, x, runs, rounds)
    found = {}
    for name in [*names, *(["tome as published"] if "tome" in traces else [])]:
        trace = traces["tome" if name == "tome as published" else name]
        least = took[floors[trace]]
        found[name] = {
            "images_per_s": batch / took[name], "speedup": took["host"] / took[name],
            "floor_speedup": took["host"] / least, "of_floor": least / took[name],
            "flops": flops["tome" if name == "tome as published" else name],
        }  # fmt: skip
    return {"size": size, "batch": batch, "host_images_per_s": batch / took["host"], "methods": found}


def show(results: Sequence[dict[str, Any]]) -> None:
    for one in results:
        title = f"{one['size']} px, batch {one['batch']}: host {one['host_images_per_s']:.2f} images/s"
        table = Table("method", "images/s", "speed-up", "floor's", "share of it", "FLOPs", title=title)
        for name, row in sorted(one["methods"].items(), key=lambda item: -item[1]["speedup"]):
            table.add_row(
                name, f"{row['images_per_s']:.2f}", f"{row['speedup']:.2f}", f"{row['floor_speedup']:.2f}",
                f"{row['of_floor']:.3f}", f"{row['flops']:.3f}",
            )  # fmt: skip
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masses", default="mask", help="mask, channel or off")
    parser.add_argument("--json", type=Path, default=Path("results/vit-speed.json"))
    options = parser.parse_args()
    names = [
        name
        for name, known in of_family("vit").items()
        if name != "full" and not wants(known) and not getattr(known, "for_text", False)
    ]
    if options.methods != "all":
        names = options.methods.split(",")
    model, _ = vision.load_vision()
    correct(model)
    results = []
    for text in options.cases.split(","):
        size, _, batch = text.partition("x")
        results.append(case(model, names, int(size), int(batch), options.rounds, options.masses))
        show(results[-1:])
    record = {
        "benchmark": "vit", "date": date.today().isoformat(), "model": "DINOv2 ViT-S/14, float32, sdpa", "keep": KEEP,
        "threads": torch.get_num_threads(), "rounds": options.rounds, "masses": options.masses,
        "hardware": environment.hardware(), "versions": environment.versions(), "cases": results,
    }  # fmt: skip
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
