"""A table of measured latency per length on this machine, and the closed form turned into time by it.

    table = Staircase.measure(model, lengths=(256, 512, 1024, 2048))        one prompt; the median of some runs
    table.prefill(700), table.decode(700)                                   seconds: a prompt, a step on such a cache
    table.seconds(fewer.cost.of(model, "snapkv", 0.25, tokens=2000), 100)   a method's prompt and 100 tokens after it

Latency is a staircase in the number of tokens, with steps where tiles and kernels change, so FLOPs alone do not tell
it. A table knows the steps as far as it was measured:

    between two lengths     the straight line between their times: where both are on one step, it is flat
    below the shortest      its time: what a call costs whatever it reads
    beyond the longest      its time, times the ratio of FLOPs (a prompt) or of bytes (a step), with a warning
    a longer length that was measured as faster counts as slow as the shorter one: that is noise

Methods are not timed here. A cost stands for the prompt with the same FLOPs, and for the cache with the same bytes.
What a method spends apart from products (sorting, unpacking fewer bits) is not in it, so it is what can be hoped for.
"""

import inspect
import json
import math
import os
import platform
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fewer.cost import Cost, Decoder
from fewer.fit import fingerprint
from fewer.types import FewerError, FewerWarning

FORMAT, VERSION = "fewer-latency", 1
LENGTHS = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Staircase:
    """Seconds of a prompt, and of one decoding step, at each of these lengths: one row, no method.

    `model` is the fingerprint of the weights and `sizes` what costs follow from; `hardware` and `versions` say where it
    was measured.

    >>> sizes = Decoder(layers=1, heads=1, kv_heads=1, head_dim=1, parameters=10, itemsize=4)
    >>> table = Staircase((10, 20, 30), (1.0, 1.0, 3.0), (0.1, 0.1, 0.2), sizes)
    >>> table.prefill(5), table.prefill(15), table.prefill(25), table.decode(25)
    (1.0, 1.0, 2.0, 0.15000000000000002)
    """

    lengths: tuple[int, ...]
    prefills: tuple[float, ...]
    decodes: tuple[float, ...]
    sizes: Decoder
    model: str = ""
    hardware: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check_lengths(self.lengths)
        for name, times in (("prefills", self.prefills), ("decodes", self.decodes)):
            if len(times) != len(self.lengths) or not all(0 < t < math.inf for t in times):
                raise FewerError(f"{name}={times!r}: one time for each of {len(self.lengths)} lengths, all above 0")

    @classmethod
    def measure(
        cls,
        model: Any,
        lengths: Sequence[int] = LENGTHS,
        repeats: int = 3,
        *,
        seed: int = 0,
        tick: Callable[[str, float], None] = lambda what, share: None,
        clock: Callable[[], float] = perf_counter,
    ) -> "Staircase":
        """Time a transformers decoder on random tokens, one row, where it is and as it is; nothing is compressed.

        Args:
            lengths: tokens of a prompt, and then of the cache that a step reads.
            repeats: runs at each length, of which the median counts; one more before them does not.
            tick: told what is being timed, and the share that is done.
            clock: seconds, monotonic.

        Raises:
            FewerError: lengths that cannot be, or that the model has no positions for; a model that is training.
            UnsupportedModel: no transformers decoder.
        """
        from fewer.adapters.hf_bind import Host  # hosts are imported on use

        _check_lengths(lengths)
        host, lengths = Host.of(model), tuple(lengths)
        model, config = host.model, host.config
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise FewerError(f"Staircase.measure(repeats={repeats!r}): a whole number, at least 1")
        if model.training:
            raise FewerError("Staircase.measure: the model is training; call model.eval() first")
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and lengths[-1] + repeats + 1 > most:
            raise FewerError(
                f"Staircase.measure(lengths={lengths}): this {type(model).__name__} has positions for {most} tokens; "
                f"the longest length may be {most - repeats - 1}"
            )
        draw, found = torch.Generator().manual_seed(seed), []
        for done, length in enumerate(lengths):
            tick(f"{length} tokens", done / len(lengths))
            ids = torch.randint(config.vocab_size, (1, length + 1), generator=draw).to(model.device)
            found.append(_times(model, ids, repeats, clock))
        tick("done", 1.0)
        prefills, decodes = zip(*found, strict=True)
        sizes = Decoder.of(model)
        return cls(lengths, prefills, decodes, sizes, fingerprint(model), hardware(model), _versions())

    def prefill(self, tokens: float | int) -> float:
        """Seconds to read a prompt of so many tokens."""
        flops = self.sizes.prefill_flops
        return self._at(tokens, self.prefills, lambda n: flops(math.ceil(n)))

    def decode(self, cache_tokens: float | int) -> float:
        """Seconds of one decoding step that reads a cache of so many tokens."""
        entry = self.sizes.cache_bytes(1)
        return self._at(cache_tokens, self.decodes, lambda n: self.sizes.decode_bytes(math.ceil(n * entry)))

    def seconds(self, cost: Cost, new_tokens: int = 0) -> float:
        """Seconds of a prompt under a method, and of as many tokens after it; rows are read one after the other, and
        decoded together.

        The cost should have been asked for with the same `new_tokens`: its `decode_bytes` are those of the step in
        their middle.

        Raises:
            FewerError: the cost is of an encoder, or of a model of other sizes.
        """
        sizes = self.sizes
        layers = round(sizes.layers * sizes.layer_flops(cost.length))
        known = layers if cost.family == "vlm" else sizes.prefill_flops(cost.length)
        if cost.family == "vit" or cost.whole != cost.rows * known:
            raise FewerError(
                f"Staircase.seconds: this cost ({cost.family}, {cost.length} tokens) is not of the decoder that was "
                "timed; ask fewer.cost.of about the same model"
            )
        if new_tokens < 0:
            raise FewerError(f"Staircase.seconds(new_tokens={new_tokens}): 0 or more")
        asked = cost.share * sizes.prefill_flops(cost.length)
        took = cost.rows * self.prefill(_inverse(sizes.prefill_flops, asked))
        if new_tokens:
            held = (cost.decode_bytes - sizes.decode_bytes(0)) / sizes.cache_bytes(1)
            took += new_tokens * self.decode(max(0.0, held))
        return took

    def _at(self, tokens: float | int, times: Sequence[float], grows: Callable[[float | int], int]) -> float:
        if not 0 <= tokens < math.inf:
            raise FewerError(f"Staircase: {tokens!r} is no number of tokens")
        lengths, risen = self.lengths, list(accumulate(times, max))
        if tokens <= lengths[0]:
            return risen[0]
        if tokens > lengths[-1]:
            warnings.warn(
                f"{tokens:.0f} tokens are beyond the {lengths[-1]} that were measured: their time is worked out, not "
                "known; measure longer lengths",
                FewerWarning,
                stacklevel=3,
            )
            return risen[-1] * grows(tokens) / grows(lengths[-1])
        after = bisect_left(lengths, tokens)
        share = (tokens - lengths[after - 1]) / (lengths[after] - lengths[after - 1])
        return risen[after - 1] + share * (risen[after] - risen[after - 1])

    # --- files ---

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, with a checksum; what was there is replaced whole, or not at all.

        Raises:
            FewerError: the file cannot be written.
        """
        body = asdict(self) | {"hardware": dict(self.hardware), "versions": dict(self.versions)}
        data = {"format": FORMAT, "version": VERSION, "sha256": _digest(body), "table": body}
        partial = (path := Path(path)).with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise FewerError(f"{path} cannot be written ({error.strerror})") from None

    @classmethod
    def load(cls, path: str | Path, model: Any = None, *, anywhere: bool = False) -> "Staircase":
        """Read a table of this model (any, if none is given), measured on a machine like this one (`anywhere`: on any).

        Raises:
            FewerError: the file cannot be read, is no such table, was changed since, or is of another model or machine.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FewerError(f"{path}: the latency table cannot be read ({error.strerror})") from None
        except ValueError:
            data = None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FewerError(f"{path} is no latency table that fewer wrote; make one with Staircase.measure")
        if data.get("version") != VERSION:
            raise FewerError(f"{path} is a table of format version {data.get('version')}; this fewer reads {VERSION}")
        body = data.get("table")
        if not isinstance(body, dict) or data.get("sha256") != _digest(body):
            raise FewerError(f"{path} is damaged: it was changed since it was written; measure anew")
        pairs = {name: tuple(body[name].items()) for name in ("hardware", "versions")}
        times = {name: tuple(body[name]) for name in ("lengths", "prefills", "decodes")}
        table = cls(**times, **pairs, sizes=Decoder(**body["sizes"]), model=body["model"])
        if model is not None:
            if (ours := fingerprint(model)) != table.model:
                raise FewerError(
                    f"{path} was measured with another model ({table.model[:12]}) than this {type(model).__name__} "
                    f"({ours[:12]}); measure anew"
                )
            here, there = dict(hardware(model)), dict(table.hardware)
            other = [f"{name}: {there.get(name)}, here {here[name]}" for name in here if here[name] != there.get(name)]
            if other and not anywhere:
                raise FewerError(f"{path} was measured elsewhere ({'; '.join(other)}); measure anew, or anywhere=True")
        return table


def hardware(model: Any) -> tuple[tuple[str, str], ...]:
    """What a latency depends on: processor, cores and threads, accelerator, and how the model is held."""
    weight, cpuinfo = next(model.parameters()), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cuda = weight.device.type == "cuda"
    return (
        ("processor", named or platform.processor() or platform.machine()),
        ("cores", str(os.cpu_count())),
        ("threads", str(torch.get_num_threads())),
        ("accelerator", torch.cuda.get_device_name(weight.device) if cuda else weight.device.type),
        ("dtype", str(weight.dtype).removeprefix("torch.")),
        ("attention", str(model.config._attn_implementation)),
    )


def _versions() -> tuple[tuple[str, str], ...]:
    own = [(name, version(name)) for name in ("torch", "transformers")]
    return (("python", platform.python_version()), *own)


@torch.inference_mode()
def _times(model: Any, ids: torch.Tensor, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Medians of reading all but the last token, and of reading that on top."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def timed(**call: Any) -> tuple[float, Any]:
        finish(model.device)
        start = clock()
        out = model(use_cache=True, **call, **last)
        finish(model.device)
        return clock() - start, out.past_key_values

    prefills, decodes, cache = [], [], None
    for _ in range(repeats + 1):
        cache = None  # one at a time is held
        took, cache = timed(input_ids=ids[:, :-1])
        prefills.append(took)
    for _ in range(repeats + 1):
        took, cache = timed(input_ids=ids[:, -1:], past_key_values=cache)
        decodes.append(took)
    return median(prefills[1:]), median(decodes[1:])


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _check_lengths(lengths: Sequence[int]) -> None:
    listed = list(lengths) if isinstance(lengths, Sequence) else []
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in listed)
    if not listed or not whole or listed != sorted(set(listed)):
        raise FewerError(f"lengths={lengths!r}: numbers of tokens, at least one, each larger than the last")


def _inverse(flops: Callable[[int], int], asked: float) -> int:
    """The fewest tokens that take as many FLOPs."""
    most = 1
    while flops(most) < asked:
        most *= 2
    return bisect_left(range(most + 1), asked, key=flops)


def _digest(body: Any) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
