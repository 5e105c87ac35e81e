"""Caches in closed form: bytes and FLOPs of every method are those that a run on a tiny model really takes."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fewer
from fewer import cost
from fewer.cost import Cost, Decoder, layers
from fewer.cost.caches import PAIRED
from fewer.cost.layers import CEILING, MIXED, UNEVEN
from fewer.fit import Fit, fingerprint, wants
from fewer.methods import METHODS, of_family
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.fastkv import FastKV
from fewer.methods.kv.gear import GEAR
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.tidaldecode import TidalDecode
from fewer.methods.kv.zipvl import ZipVL
from fewer.tiers import ChannelSeparable
from fewer.tuning.planfile import TunedPlan
from fewer.tuning.setting import Held, Setting
from fewer.types import BudgetError, FewerError, UnknownName
from tests.laws.scene import BY_HAND
from tests.tiny import prompt, tiny

N, ROWS = 150, 2
STORES: dict[str, Any] = {
    "full precision": None,
    "kivi": KIVI(group=16, residual=32),
    "gear": GEAR(group=16, rank=2, block=32),
    "by channel": ChannelSeparable(4),
}
EVERY_KIND = ("snapkv", "adakv", "streaming-llm", "razorattention", "fastkv", "pyramidkv")
"""Methods that differ in what a store sees: even and uneven heads, layers, moved keys, masses, fewer tokens."""
SPREAD: dict[str, Any] = {
    "kivi": KIVI(group=16, residual=32),
    "gear": GEAR(group=16, rank=2, block=32),
    "tidaldecode": TidalDecode(start=0, correction=1),
}
"""Methods whose own settings do not fit tiny heads, or few layers."""


@cache
def model(family: str = "llama") -> Any:
    more = {"hidden_size": 128} if family == "llama" else {}
    return tiny(family, attn="eager", tie_word_embeddings=True, **more)


@cache
def method(name: str, family: str = "llama") -> Any:
    """The method of that name, fitted to the tiny model where it wants that."""
    made = SPREAD.get(name) or METHODS[name]()
    if not wants(made):
        return made
    if name in BY_HAND:
        depth = sum(_host(family).plain_layers())
        tensors = BY_HAND[name] | {"errors": torch.tensor([0.4, 0.1, 0.5][:depth])}
        return replace(made, fit=Fit(name, fingerprint(model(family)), tensors))
    known: Any = METHODS[name]
    quick = {"period": 64} if name == "razorattention" else {}
    return replace(made, fit=known.fit_to(model(family), [prompt(64), prompt(64, seed=1)], seed=0, **quick))


def _host(family: str) -> Any:
    from fewer.adapters.hf_bind import Host

    return Host.of(model(family))


def read(family: str, chosen: Any, keep: Any, ids: Tensor, **how: Any) -> Any:
    with torch.no_grad(), fewer.compress(model(family), chosen, keep, **how) as run:
        model(family)(ids)
    return run.report


def compare(found: Cost, measured: int) -> None:
    """Bytes in closed form against those held; where the data decide, on the side that the notes say, and near."""
    kinds = {CEILING, MIXED, UNEVEN, PAIRED} & set(found.notes)
    if not kinds:
        assert found.bytes == measured
    if kinds & {CEILING, MIXED, UNEVEN}:
        assert measured <= found.bytes
    if PAIRED in kinds:
        assert 0.9 * measured <= found.bytes <= measured
    assert found.exact or found.notes


@pytest.mark.filterwarnings("ignore::fewer.types.FewerWarning")
@pytest.mark.parametrize(
    ("name", "store"),
    [(name, store) for name in of_family("kv") for store in ("full precision", "kivi")]
    + [(name, store) for name in EVERY_KIND for store in ("gear", "by channel")],
)
def test_bytes_of_every_method_and_store(name: str, store: str) -> None:
    ids, chosen, how, ran = prompt(N, ROWS), method(name), {"store": STORES[store]}, 0
    if STORES[store] is not None and not getattr(chosen, "whole", False):
        how["when"] = "prefill"  # what is packed cannot be held at a fixed size
    for keep in (1.0, 0.4, "160KB") if STORES[store] else (1.0, 0.5, 70, "200KB"):
        try:
            report = read("llama", chosen, keep, ids, **how)
        except FewerError as refused:
            with pytest.raises(type(refused)):
                cost.of(model(), chosen, keep, tokens=N, rows=ROWS, **how)
            continue
        ran += 1
        found = cost.of(model(), chosen, keep, tokens=N, rows=ROWS, **how)
        compare(found, report.bytes_kept)
        weights = Decoder.of(model())
        if name != "tidaldecode":
            assert found.decode_bytes == weights.parameters * weights.itemsize + found.bytes
    own = getattr(chosen, "store", (None,)) != (None,) or getattr(chosen, "pairs", None) or hasattr(chosen, "reads")
    assert ran == (0 if own and STORES[store] else 1 if getattr(chosen, "whole", False) else ran)
    assert ran or own


@pytest.mark.filterwarnings("ignore::fewer.types.FewerWarning")
@pytest.mark.parametrize("name", [*EVERY_KIND, "h2o", "kvzip", "expected-attention", "zipcache", "minicache"])
def test_bytes_beside_sliding_windows(name: str) -> None:
    chosen = SPREAD.get(name) or method(name, "gemma3_text")
    keep = 1.0 if getattr(chosen, "whole", False) else 0.6
    report = read("gemma3_text", chosen, keep, prompt(90))
    compare(cost.of(model("gemma3_text"), chosen, keep, tokens=90), report.bytes_kept)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("keep", [[0.2, 0.5, 0.9], [[0.2, 0.6], [1.0, 0.3], [0.5, 0.5]], [40, 70, 100]])
def test_bytes_with_budgets_for_layers_and_heads(keep: list[Any], store: str) -> None:
    for chosen in (KNorm(), METHODS["kvzip"](), METHODS["ems"]()):
        report = read("llama", chosen, keep, prompt(N, ROWS), store=STORES[store])
        found = cost.of(model(), chosen, keep, tokens=N, rows=ROWS, store=STORES[store])
        assert found.exact and found.bytes == report.bytes_kept
        assert found.modelled is (chosen != METHODS["ems"]())
    with pytest.raises(BudgetError, match="3 layers"):
        cost.of(model(), KNorm(), [0.5, 0.5], tokens=N)


@pytest.mark.parametrize("when", ["decode", "both"])
def test_bytes_where_decoding_is_compressed(when: str) -> None:
    for chosen in (SnapKV(window=8), METHODS["h2o"](), METHODS["expected-attention"](), METHODS["treekv"]()):
        report = read("llama", chosen, 50, prompt(N, ROWS), when=when)
        compare(cost.of(model(), chosen, 50, tokens=N, rows=ROWS, when=when), report.bytes_kept)


@pytest.mark.filterwarnings("ignore::fewer.types.FewerWarning")
def test_a_short_prompt_is_kept_whole() -> None:
    report = read("llama", "snapkv", 0.5, prompt(40))
    assert cost.of(model(), "snapkv", 0.5, tokens=40).bytes == report.bytes_kept == report.bytes_full


def test_a_count_of_bytes_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    held = read("llama", KNorm(), 0.5, prompt(N, ROWS)).bytes_kept
    compare(cost.of(model(), KNorm(), 0.5, tokens=N, rows=ROWS), held)
    monkeypatch.setattr(layers, "POSITION_BYTES", 8)
    with pytest.raises(AssertionError):
        compare(cost.of(model(), KNorm(), 0.5, tokens=N, rows=ROWS), held)
    with pytest.raises(AssertionError):
        compare(Cost("kv", 0, 0, held - 1, 0, exact=False, notes=(CEILING,)), held)
    with pytest.raises(AssertionError):
        compare(Cost("kv", 0, 0, held + 1, 0, exact=False, notes=(PAIRED,)), held)


def test_by_hand() -> None:
    """3 layers, 2 rows, 2 heads; 16 numbers of 4 bytes for a key and as many for its value."""
    small = tiny("llama")
    found = cost.of(small, KNorm(), 0.1, tokens=101, rows=2)
    assert found.bytes == 3 * 2 * 2 * 11 * (2 * 16 * 4 + 4)
    assert found.read == (101,) * 3 and found.tokens == 202 and found.exact and found.modelled
    assert found.flops == found.whole == 2 * Decoder.of(small).prefill_flops(101) and found.share == 1
    long = cost.of(small, KNorm(), 0.1, tokens=101, rows=2, new_tokens=20)
    assert long.decode_bytes - found.decode_bytes == 10 * 3 * 2 * 2 * 2 * 16 * 4, "the tenth of 20 tokens is behind"
    held = cost.of(small, KNorm(), 0.1, tokens=101, rows=2, new_tokens=20, when="both")
    assert held.decode_bytes == found.decode_bytes, "a cache of a fixed size does not grow"


def test_layers_that_read_what_others_chose() -> None:
    chosen = TidalDecode(top_k=10, start=0, correction=1)
    found, full = (cost.of(model(), one, tokens=N) for one in (chosen, "full"))
    assert full.decode_bytes - found.decode_bytes == (N - 10) * 2 * 2 * 32 * 4, "one layer of three reads chosen ones"


# --- FLOPs ---


def counted(run: Callable[[], Any]) -> int:
    """All products, but those of the host's rotary tables, which old releases of transformers make by one."""
    with FlopCounterMode(display=False) as counter:
        run()
    tables = ("rotary_emb", "LlamaRotaryEmbedding")
    made = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.split(".")[-1] in tables]
    return int(counter.get_total_flops() - sum(made))


@cache
def full() -> int:
    return counted(lambda: read("llama", "full", 1.0, prompt(N, ROWS)))


def squares(behind: int, tokens: int) -> int:
    """What eager attention of a layer computes and a causal one does not need, of one row."""
    every = tokens * (behind + tokens)
    return 4 * 4 * 32 * (every - tokens * behind - tokens * (tokens + 1) // 2)


def test_flops_of_a_prefill() -> None:
    found = cost.of(model(), "full", tokens=N, rows=ROWS)
    assert found.flops + ROWS * 3 * squares(0, N) == pytest.approx(full(), rel=0.01), "norms are no products"


ELSEWHERE = ("fastkv", "dapq", "kvzip", "zipvl", "ems")
"""Methods that change the forward, read more, or ask as the data say."""


@pytest.mark.filterwarnings("ignore::fewer.types.FewerWarning")
@pytest.mark.parametrize("name", sorted(of_family("kv").keys() - set(ELSEWHERE)))
def test_flops_of_choosing(name: str) -> None:
    chosen = method(name)
    for keep in (1.0,) if getattr(chosen, "whole", False) else (0.4,) if name != "expected-attention" else (1.0, 0.4):
        found = cost.of(model(), chosen, keep, tokens=N, rows=ROWS)
        assert found.modelled
        assert counted(lambda keep=keep: read("llama", chosen, keep, prompt(N, ROWS))) - full() == found.choosing  # type: ignore[misc]


@pytest.mark.parametrize("name", ["dapq", "kvzip"])
def test_flops_of_reading_more(name: str) -> None:
    found = cost.of(model(), method(name), 0.4, tokens=N, rows=ROWS)
    more = {"dapq": 32, "kvzip": N}[name]
    measured = counted(lambda: read("llama", method(name), 0.4, prompt(N, ROWS))) - full()
    assert found.choosing + ROWS * 3 * squares(N, more) == pytest.approx(measured, rel=0.01)


def test_flops_of_a_shortened_prefill() -> None:
    chosen = FastKV(layer=0, rate=0.3)
    found = cost.of(model(), chosen, 0.2, tokens=N, rows=ROWS)
    assert found.read == (150, 45, 45) and found.tokens == 90 and found.share < 0.6
    sizes = Decoder.of(model())
    assert found.flops == ROWS * sizes.shortened_prefill_flops(N, layer=0, rate=0.3)
    measured = counted(lambda: read("llama", chosen, 0.2, prompt(N, ROWS)))
    expected = found.flops + found.choosing + ROWS * (squares(0, N) + 2 * squares(0, 45))
    assert expected == pytest.approx(measured, rel=0.01)


@pytest.mark.filterwarnings("ignore::fewer.types.FewerWarning")
def test_flops_that_the_data_decide_are_a_ceiling() -> None:
    for chosen, keep in ((METHODS["ems"](), 0.4), (METHODS["zipvl"](), 1.0), (ZipVL(variant="drop"), 0.4)):
        found = cost.of(model(), chosen, keep, tokens=N, rows=ROWS)
        measured = counted(lambda: read("llama", chosen, keep, prompt(N, ROWS)))  # noqa: B023
        assert not (found.exact and found.modelled)
        assert measured <= found.flops + found.choosing + ROWS * 3 * squares(0, N)


def test_uneven_heads_in_blocks_are_an_estimate() -> None:
    ada = AdaKV(SnapKV(window=8))
    plain, blocks = (cost.of(model(), ada, 0.5, tokens=N, store=store) for store in (None, STORES["kivi"]))
    assert plain.exact and not blocks.exact and UNEVEN in blocks.notes
    drops = cost.of(model(), ZipVL(variant="drop"), 0.5, tokens=N)
    assert not drops.exact and CEILING in drops.notes
    assert drops.bytes == cost.of(model(), KNorm(), 0.5, tokens=N).bytes


# --- what is refused ---


def test_bad_input() -> None:
    for name, value in (("tokens", 0), ("rows", 0), ("rows", True), ("new_tokens", -1)):
        with pytest.raises(FewerError, match=f"{name}={value}"):
            cost.of(model(), KNorm(), 0.5, **{"tokens": 10, name: value})
    for keep in (0, 1.5, "10B", "many"):
        with pytest.raises(BudgetError, match="keep="):
            cost.of(model(), KNorm(), keep, tokens=10)
    with pytest.raises(UnknownName, match="did you mean"):
        cost.of(model(), "snapkw", 0.5, tokens=10)
    with pytest.raises(FewerError, match="fitted"):
        cost.of(model(), "razorattention", 0.5, tokens=10)
    with pytest.raises(FewerError, match="keeps every token"):
        cost.of(model(), "kivi", 0.5, tokens=10)
    with pytest.raises(FewerError, match="family='kv'"):
        cost.of(model(), "random", 0.5, tokens=10, family="kv")


FOREIGN: dict[str, Any] = {
    "visual": (4,), "separators": 2, "per": "prompt", "counted": "mean", "schedule": "linear", "beside": 0, "scorer": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_options_of_others_mean_nothing_for_a_cache(name: str) -> None:
    with pytest.raises(FewerError, match=rf"cost\.of\({name}=\.\.\.\) means nothing for a decoder's cache"):
        cost.of(model(), KNorm(), 0.5, tokens=10, **{name: FOREIGN[name]})


@pytest.mark.parametrize("name", ["tome", "fastv", ["knorm", "snapkv"]])
def test_methods_of_others_are_refused_as_compress_refuses_them(name: Any) -> None:
    said = []
    for ask in (lambda: cost.of(model(), name, 0.5, tokens=10), lambda: read("llama", name, 0.5, prompt(10))):
        with pytest.raises(FewerError) as why:
            ask()
        said.append((type(why.value), str(why.value)[-30:] if name == "tome" else ""))
    assert said[0] == said[1]


def test_a_plan_is_not_costed() -> None:
    plan = TunedPlan(Setting(held=Held("knorm", 0.5)))
    for given in ("plan.toml", Path("plan.toml"), plan):
        with pytest.raises(FewerError, match=r"a plan is not costed whole; .* fewer\.TunedPlan\.load"):
            cost.of(model(), given, tokens=10)


def test_it_is_there_when_it_is_asked_for() -> None:
    code = (
        "import sys, fewer\n"
        "assert 'fewer.cost.caches' not in sys.modules\n"
        "assert callable(fewer.cost.of)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
