"""Speed and bytes of compressed caches, beside kvpress, on the default model.

What is measured, in words. A prefill of n tokens costs about 2 n FLOPs a weight, so compressing may add little to it;
a decoding step reads every weight and the whole cache, so a smaller cache can save at most the cache's share of those
bytes: that share is the floor printed beside each ratio. Held bytes are the tensors the cache really holds.

Everything is a ratio of two things timed in turn, A B A B, in one process: shared machines drift. kvpress needs an
older transformers and runs in an environment of its own, on the same token ids, scorer and keep, with its own plain
model as its denominator. Correctness comes first: kept positions must be those of kvpress where the rules are the
same, and keeping everything must not change a logit; otherwise nothing is timed.

    python benchmarks/kv.py --peer .venv-kvpress/bin/python [--tokens 4096] [--repeats 3] [--json results/x.json]
    python benchmarks/kv.py --part storage      kivi in 4 bits beside the full cache, transformers' own quantised cache
                                                (quanto), and unpacking everything before attention
    python benchmarks/kv.py --part prefill      fastkv at rate 0.25 beside the plain prefill
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fewer
from fewer import models
from fewer.codec import Coded
from fewer.cost import Decoder
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.expected_attention import ExpectedAttention
from fewer.methods.kv.fastkv import FastKV
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.snapkv import SnapKV
from fewer.ragged import extent
from fewer_eval import environment, text

KEEP = 0.25
METHODS = {
    "knorm": KNorm(),
    "snapkv": SnapKV(),
    "adakv": AdaKV(SnapKV()),  # around the scorer that kvpress wraps too
    "expected-attention": ExpectedAttention(),
}
STEPS = 16


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    sync()
    start = time.perf_counter()
    out = run()
    sync()
    return time.perf_counter() - start, out


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, cache: Any) -> float:
    """Median seconds of a decoding step on this cache, after two that do not count."""
    times = []
    for step in range(STEPS + 2):
        took, _ = seconds(lambda step=step: model(ids[:, step : step + 1], past_key_values=cache, logits_to_keep=1))
        times.append(took)
    return statistics.median(times[2:])


def held(cache: Any) -> int:
    """Bytes of the storages that a cache's tensors keep alive, found by walking it, not by asking it."""
    storages: dict[int, int] = {}
    ours = ("fewer.", "transformers.cache_utils", "optimum.quanto", "__main__")

    def walk(thing: Any) -> None:
        if isinstance(thing, torch.Tensor) and not type(thing).__module__.startswith("optimum"):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                walk(value)
        elif type(thing).__module__.startswith(ours):
            walk([value for name, value in vars(thing).items() if name not in ("shared", "method", "need")])

    walk(cache.layers)
    return sum(storages.values())


@torch.inference_mode()
def correct(model: Any, ids: torch.Tensor) -> None:
    """Keeping everything changes no logit; otherwise nothing may be timed."""
    short = ids[:, :257]
    plain = model(short).logits
    with fewer.compress(model, "full", keep=1.0):
        if not torch.equal(model(short).logits, plain):
            raise SystemExit("keeping everything changed the logits: nothing is timed")


@torch.inference_mode()
def ours(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    """Ratios of each method to the plain model, timed in turn."""
    results: dict[str, dict[str, Any]] = {}
    model(ids[:, :512])
    for name, method in METHODS.items():
        prefill, step, bytes_ratio = [], [], 0.0
        for _ in range(repeats):
            plain, out = seconds(lambda: model(ids, logits_to_keep=1))
            full_bytes = held(out.past_key_values)
            full_step = decode(model, ids, out.past_key_values)
            del out
            with fewer.compress(model, method, keep=KEEP):
                took, out = seconds(lambda: model(ids, logits_to_keep=1))
                bytes_ratio = held(out.past_key_values) / full_bytes
                step.append((decode(model, ids, out.past_key_values), full_step))
            del out
            prefill.append((took, plain))
        results[name] = {
            "prefill_ratio": statistics.median(a / b for a, b in prefill),
            "prefill_s": statistics.median(b for _, b in prefill),
            "decode_ratio": statistics.median(a / b for a, b in step),
            "decode_ms": statistics.median(a for a, _ in step) * 1000,
            "decode_full_ms": statistics.median(b for _, b in step) * 1000,
            "held_ratio": bytes_ratio,
        }
    return results


@torch.inference_mode()
def held_ratios(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Bytes held after a compressed prefill over those of the full cache."""
    full, ratios = Decoder.of(model).cache_bytes(ids.shape[1]), {}
    for name, method in METHODS.items():
        with fewer.compress(model, method, keep=KEEP):
            ratios[name] = held(model(ids, logits_to_keep=1).past_key_values) / full
    return ratios


def kept_positions(model: Any, ids: torch.Tensor, names: list[str]) -> dict[str, list[list[int]]]:
    """Sorted kept positions of every head of a few layers, to be compared with the peer's."""
    found = {}
    with torch.inference_mode():
        for name in names:
            with fewer.compress(model, METHODS[name], keep=KEEP) as run:
                model(ids, logits_to_keep=1)
            layer = run.cache.layers[0]
            found[name] = [layer.kept.positions[a:b].tolist() for a, b in layer.kept.bounds[0]]
    return found


class Unpacked:
    """A packed part that is unpacked whole before attention: the plain alternative to multiplying by what is packed."""

    def __init__(self, part: Coded) -> None:
        self.part, self.counts = part, part.counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def logits(self, query: Any, at: Any) -> Any:
        start, end, *lead = extent(self.part, at)
        keys = self.part.keys(0, len(self.part.positions))[start:end]
        return query @ keys.view(*lead, -1, keys.shape[-1]).transpose(-1, -2)

    def mix(self, weights: Any, at: Any) -> Any:
        start, end, *lead = extent(self.part, at)
        values = self.part.values(0, len(self.part.positions))[start:end]
        return weights @ values.view(*lead, -1, values.shape[-1])


@torch.inference_mode()
def storage(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    """Decoding steps and held bytes of packed caches over the full cache's."""
    from transformers import QuantizedCache

    def plain() -> Any:
        return model(ids, logits_to_keep=1).past_key_values

    def kivi() -> Any:
        with fewer.compress(model, KIVI(bits=4)) as run:
            model(ids, logits_to_keep=1)
        return run.cache

    def unpacked() -> Any:
        cache = kivi()
        for layer in cache.layers:
            layer.coded = tuple(Unpacked(part) for part in layer.coded)
        return cache

    def quanto() -> Any:
        cache = QuantizedCache("quanto", model.config, nbits=4, q_group_size=32, residual_length=128)
        model(ids, logits_to_keep=1, past_key_values=cache)
        return cache

    exact = plain()
    with fewer.compress(model, KIVI(bits=8)) as run:
        model(ids, logits_to_keep=1)
    token = ids[:, :1]
    with fewer.Cache(model, "full"):
        near = model(token, past_key_values=run.cache).logits
        off = float((near - model(token, past_key_values=exact).logits).abs().max())
    if not off < 0.5:
        raise SystemExit(f"kivi in 8 bits is {off:.2f} off the full cache's logits: nothing is timed")
    print(f"largest difference of a logit in 8 bits: {off:.3f}")
    del exact
    full = plain()
    caches = {"kivi-4bit": kivi(), "kivi-4bit, unpacked first": unpacked(), "quanto 4 bit": quanto()}
    sizes, full_size = {name: held(cache) for name, cache in caches.items()}, held(full)
    rounds = []
    for _ in range(repeats):  # all in turn, so that a clock that drifts is no one's advantage
        full_step = decode(model, ids, full)
        with fewer.Cache(model, "full"):  # the attention function of packed caches; others pass it by
            rounds.append((full_step, {name: decode(model, ids, cache) for name, cache in caches.items()}))
    return {
        name: {
            "decode_ratio": statistics.median(steps[name] / full_step for full_step, steps in rounds),
            "decode_ms": statistics.median(steps[name] for _, steps in rounds) * 1000,
            "decode_full_ms": statistics.median(full_step for full_step, _ in rounds) * 1000,
            "held_ratio": sizes[name] / full_size,
        }
        for name in caches
    }


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """The prefill of fastkv over the plain one, timed in turn, and the FLOPs it cannot do without."""
    method = FastKV(rate=0.25)
    short = ids[:, :257]
    plain = model(short, logits_to_keep=1).logits
    with fewer.compress(model, FastKV(rate=1.0), keep=1.0):
        if not torch.allclose(model(short, logits_to_keep=1).logits, plain, atol=1e-4):
            raise SystemExit("passing everything on changed the logits: nothing is timed")
    pairs = []
    for _ in range(repeats):
        took, _ = seconds(lambda: model(ids, logits_to_keep=1))
        with fewer.compress(model, method, keep=KEEP):
            cut, _ = seconds(lambda: model(ids, logits_to_keep=1))
        pairs.append((cut, took))
    decoder = Decoder.of(model)
    floor = decoder.shortened_prefill_flops(ids.shape[1], layer=method.shortens(decoder.layers), rate=0.25)
    return {
        "prefill_ratio": statistics.median(a / b for a, b in pairs),
        "prefill_s": statistics.median(a for a, _ in pairs),
        "prefill_full_s": statistics.median(b for _, b in pairs),
        "floor": floor / decoder.prefill_flops(ids.shape[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the python of an environment with kvpress 0.5.5")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("methods", "storage", "prefill"), default="methods", help="what to measure")
    parser.add_argument("--bytes-only", action="store_true", help="only measure held bytes, once")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()

    path = models.default_model_path(say=print)
    model, tokenizer = models.load("default")
    ids = tokenizer(text.prose()[: options.tokens * 8], return_tensors="pt").input_ids[:, : options.tokens]
    decoder = Decoder.of(model)
    full = decoder.cache_bytes(options.tokens)
    floor = decoder.decode_bytes(int(full * KEEP)) / decoder.decode_bytes(full)

    correct(model, ids)
    if options.bytes_only:
        print(json.dumps(held_ratios(model, ids)))
        return
    if options.part != "methods":
        part(options, model, ids, decoder)
        return
    peer: dict[str, Any] = {}
    if options.peer:
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder, "in.json")
            given.write_text(json.dumps({
                "model": str(path), "ids": ids[0].tolist(), "keep": KEEP, "repeats": options.repeats, "steps": STEPS,
                "check": 600, "threads": torch.get_num_threads(),
            }))  # fmt: skip
            done = subprocess.run(
                [options.peer, str(Path(__file__).parent / "kvpress_side.py"), str(given)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
        peer = json.loads(done.stdout.splitlines()[-1])
        mine = kept_positions(model, ids[:, :600], ["knorm", "snapkv", "expected-attention"])
        for name, heads in mine.items():
            agree = [len(set(a) & set(b)) / len(a) for a, b in zip(heads, peer["kept"][name], strict=True)]
            print(f"kept positions shared with kvpress, first layer, {name}: {min(agree):.1%} of the worst head")
            if min(agree) < 0.97:
                raise SystemExit(f"{name} does not keep what kvpress keeps: nothing is timed")
    results = ours(model, ids, options.repeats)

    table = Table("", "prefill / plain", "kvpress", "decode / full", "kvpress", "floor", "held / full", "kvpress")
    for name, row in results.items():
        other = peer.get("results", {}).get(name, {})
        shown = [f"{other[key]:.3f}" if other else "–" for key in ("prefill_ratio", "decode_ratio", "held_ratio")]
        table.add_row(
            name, f"{row['prefill_ratio']:.3f}", shown[0], f"{row['decode_ratio']:.3f}", shown[1], f"{floor:.3f}",
            f"{row['held_ratio']:.4f}", shown[2],
        )  # fmt: skip
    Console(width=120).print(table)
    finish(options, {
        "benchmark": "kv", "keep": KEEP, "floor_decode": floor,
        "fewer": results, "kvpress": peer.get("results"), "kvpress_versions": peer.get("versions"),
    })  # fmt: skip


def part(options: argparse.Namespace, model: Any, ids: torch.Tensor, decoder: Decoder) -> None:
    """One of the smaller measurements, with its floor."""
    if options.part == "storage":
        results = storage(model, ids, options.repeats)
        table = Table(f"{options.tokens:,} tokens", "decode / full", "floor", "held / full")
        full = decoder.cache_bytes(options.tokens)
        for name, row in results.items():
            row["floor"] = decoder.decode_bytes(int(full * row["held_ratio"])) / decoder.decode_bytes(full)
            table.add_row(name, f"{row['decode_ratio']:.3f}", f"{row['floor']:.3f}", f"{row['held_ratio']:.4f}")
        Console(width=120).print(table)
    else:
        results = {"fastkv, rate 0.25": prefill(model, ids, options.repeats)}
        for name, row in results.items():
            print(f"{name}: prefill / plain {row['prefill_ratio']:.3f}, of the FLOPs {row['floor']:.3f}")
    finish(options, {"benchmark": f"kv, {options.part}", "fewer": results})


def finish(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    """One line of JSON, and the file that was asked for, with the circumstances."""
    record = {
        "date": date.today().isoformat(), "tokens": options.tokens, "repeats": options.repeats,
        "model": "SmolLM2-135M-Instruct, float32", "threads": torch.get_num_threads(),
        "hardware": environment.hardware(), "versions": environment.versions(), **measured,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
