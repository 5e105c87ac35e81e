"""Encoders, visual tokens and prompts in closed form: what runs on tiny models really read, held and cost."""

from functools import cache
from typing import Any

import pytest
import torch

import fewer
from fewer import cost
from fewer.cost import Cost, Decoder
from fewer.cost.encoders import CEILING
from fewer.methods import METHODS, of_family
from fewer.methods.kv.kivi import KIVI
from fewer.types import BudgetError, FewerError, UnsupportedModel
from tests import vlms
from tests.adapters.encoders import PREFIX, encoder, inputs
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore::fewer.types.FewerWarning")


# --- encoders ---


def compare_blocks(found: Cost, run: Any) -> None:
    """The trace and the FLOPs of a run, against the closed form; a ceiling where that says so."""
    came, went = tuple(one.came for one in run.trace), run.trace[-1].went
    if found.exact:
        assert found.read == came and found.tokens == found.rows * went
        assert found.share == pytest.approx(run.flops)
    else:
        assert CEILING in found.notes
        assert all(a <= b for a, b in zip(came, found.read, strict=True)) and run.flops <= found.share + 1e-9


def blocks(family: str, method: Any, keep: Any, **how: Any) -> tuple[Any, int]:
    with torch.no_grad(), fewer.compress(encoder(family), method, keep, **how) as run:
        encoder(family)(**inputs(family))
    return run, run.state.originals


@pytest.mark.parametrize("name", of_family("vit"))
def test_flops_of_every_method_for_encoders(name: str) -> None:
    ran = 0
    for keep in (1.0, 0.5, "0.8 flops", [36, 30, 20, 10]):
        try:
            run, tokens = blocks("dinov2", name, keep)
        except FewerError as refused:
            with pytest.raises(type(refused)):
                cost.of(encoder("dinov2"), name, keep, tokens=37, rows=2)
            continue
        ran += 1
        compare_blocks(cost.of(encoder("dinov2"), name, keep, tokens=tokens, rows=2), run)
    assert ran >= (1 if name == "full" else 2)


@pytest.mark.parametrize("family", [*PREFIX, "bert"])
def test_tokens_that_are_no_patches_are_known(family: str) -> None:
    run, tokens = blocks(family, "random", 0.5)
    compare_blocks(cost.of(encoder(family), "random", 0.5, tokens=tokens, rows=2), run)
    run, _ = blocks(family, "evit", 0.4, schedule="linear")
    compare_blocks(cost.of(encoder(family), "evit", 0.4, tokens=tokens, rows=2, schedule="linear"), run)


def test_a_trace_that_is_off_is_seen() -> None:
    run, tokens = blocks("dinov2", "topk", 0.5)
    with pytest.raises(AssertionError):
        compare_blocks(cost.of(encoder("dinov2"), "topk", 0.5, tokens=tokens, rows=2, beside=3), run)


def test_encoders_refuse() -> None:
    with pytest.raises(FewerError, match="beside=40"):
        cost.of(encoder("dinov2"), "tome", 0.5, tokens=37, beside=40)
    with pytest.raises(FewerError, match="makes 36 patches"):
        cost.of(encoder("dinov2"), "tome", 0.5, tokens=10)
    with pytest.raises(UnsupportedModel, match="is an encoder, and 'knorm' shortens a decoder's cache"):
        cost.of(encoder("dinov2"), "knorm", 0.5, tokens=37)
    for more in ({"store": "kivi-4bit"}, {"when": "both"}, {"every": 3}, {"new_tokens": 9}, {"visual": (36,)}):
        with pytest.raises(FewerError, match=rf"\({next(iter(more))}=\.\.\.\) means nothing for an encoder"):
            cost.of(encoder("dinov2"), "tome", 0.5, tokens=37, **more)  # type: ignore[arg-type]
    assert cost.of(encoder("dinov2"), "random", 0.5, tokens=10, beside=1).tokens == 6, "nine patches, of which 5 stay"


# --- visual tokens ---


@cache
def case(family: str) -> vlms.Case:
    return vlms.FAMILIES[family]()


@torch.no_grad()
def seen(family: str, method: Any, keep: Any, counts: list[int], **how: Any) -> tuple[Any, dict[str, int]]:
    """A run on rows of as many pictures, and its numbers of tokens."""
    given = case(family).inputs(counts)
    with fewer.compress(case(family).model, method, keep, **how) as run:
        case(family).model(**given)
    ids = given["input_ids"]
    assert len(ids) == 1
    columns = [[len(one.columns) for one in row] for row in run.pictures]
    between = sum(len(one.separators) for row in run.pictures for one in row)
    return run, {"tokens": ids.shape[1], "visual": columns[0], "separators": between}  # type: ignore[dict-item]


def compare_layers(found: Cost, run: Any, numbers: dict[str, Any]) -> None:
    """What every layer read and held, and the FLOPs, against the closed form; a ceiling where that says so."""
    report = run.report
    text = numbers["tokens"] - sum(numbers["visual"]) - numbers["separators"]
    ours = tuple(count - text for count in found.read)
    share = report.flops - report.choosing
    if found.exact:
        assert ours == report.read
        assert found.flops / found.whole == pytest.approx(share, rel=1e-6)
        assert found.bytes == report.cache.bytes_kept
    else:
        assert all(a <= b for a, b in zip(report.read, ours, strict=True))
        assert share <= found.flops / found.whole + 1e-6
        assert report.cache.bytes_kept <= found.bytes


REFUSES = ("evs", "dycoke", "globalcom2")
"""Methods that compare frames, or crops with a whole: they refuse a single picture."""


@pytest.mark.parametrize("name", [*(name for name in of_family("vlm") if name not in REFUSES), "tome", "topk"])
def test_layers_of_every_method_for_visual_tokens(name: str) -> None:
    for keep in (1.0, 0.6) if name == "tome" else (1.0, 9, 0.6):
        try:
            run, numbers = seen("llava", [name], keep, [1])
        except FewerError as refused:
            with pytest.raises(type(refused)):
                cost.of(case("llava").model, [name], keep, **numbers)
            continue
        compare_layers(cost.of(case("llava").model, [name], keep, **numbers), run, numbers)


@torch.no_grad()
@pytest.mark.parametrize("name", ["evs", "dycoke"])
def test_layers_of_methods_for_videos(name: str) -> None:
    given = case("qwen2_vl").inputs([1], frames=4)
    with fewer.compress(case("qwen2_vl").model, name, keep=0.5) as run:
        case("qwen2_vl").model(**given)
    numbers: dict[str, Any] = {"tokens": given["input_ids"].shape[1], "visual": [32], "separators": 0}
    compare_layers(cost.of(case("qwen2_vl").model, name, 0.5, **numbers), run, numbers)


@pytest.mark.parametrize(
    ("family", "method", "keep", "how"),
    [
        ("llava_next", "globalcom2", 0.5, {}),
        ("llava_next", ["divprune"], 0.5, {}),
        ("llava", ["random", "fastv"], [0.5, 0.25], {}),
        ("llava", ["turbo", "random", "fastv", "knorm"], 9, {}),
        ("llava", ["fastv", "snapkv"], 0.25, {}),
        ("llava", ["random"], 0.5, {"counted": "mean"}),
        ("llava", ["pyramiddrop"], 0.5, {"counted": "mean"}),
        ("llava", ["random"], 20, {"per": "prompt"}),
        ("llava", ["random"], 20, {"store": KIVI(group=8, residual=16)}),
        ("qwen2_vl", ["fastv", "adakv"], 0.3, {}),
        ("qwen3_vl", "pyramiddrop", 0.3, {}),
    ],
)
def test_stages_budgets_and_families(family: str, method: Any, keep: Any, how: dict[str, Any]) -> None:
    run, numbers = seen(family, method, keep, [2], **how)
    compare_layers(cost.of(case(family).model, method, keep, **numbers, **how), run, numbers)


def test_layers_that_are_off_are_seen() -> None:
    run, numbers = seen("llava", ["random"], 9, [1])
    with pytest.raises(AssertionError):
        compare_layers(cost.of(case("llava").model, ["random"], 10, **numbers), run, numbers)


def test_pictures_refuse() -> None:
    model = case("llava").model
    for visual, tokens in (((36,), 30), ((0,), 30), ((), 30)):
        with pytest.raises(FewerError, match="visual"):
            cost.of(model, ["random"], 0.5, tokens=tokens, visual=visual)
    with pytest.raises(BudgetError, match="names 2 budgets for 1 stages"):
        cost.of(model, ["random"], [0.5, 0.2], tokens=50, visual=(36,))
    for name in ("fastv", "tome"):
        with pytest.raises(FewerError, match="pass visual="):
            cost.of(model, name, 0.5, tokens=50)
    for more in ({"when": "both"}, {"schedule": "linear"}, {"beside": 1}):
        with pytest.raises(FewerError, match=rf"\({next(iter(more))}=\.\.\.\) means nothing for visual tokens"):
            cost.of(model, ["random"], 0.5, tokens=50, visual=(36,), **more)  # type: ignore[arg-type]


# --- prompts ---


def test_prompts() -> None:
    model = tiny("llama")
    sizes = Decoder.of(model)
    for name in of_family("prompt"):
        found = cost.of(model, name, 0.3, tokens=101, rows=2, family="prompt")
        left = 101 if name == "full" else 31
        assert found.family == "prompt" and found.tokens == 2 * left and found.exact is (name == "full")
        assert found.flops == 2 * sizes.prefill_flops(left) and found.bytes == sizes.cache_bytes(left, rows=2)
        assert found.modelled is ("model" not in getattr(METHODS[name], "__dataclass_fields__", {}))
    small = tiny("llama", num_hidden_layers=1)
    read = cost.of(model, "llmlingua", 0.3, tokens=101, scorer=small)
    assert read.modelled and read.choosing == Decoder.of(small).prefill_flops(101)
    assert read.share == pytest.approx((read.flops + read.choosing) / sizes.prefill_flops(101))
    for keep in ("1MB", 0, 2.0):
        with pytest.raises(BudgetError, match="keep="):
            cost.of(model, "bm25", keep, tokens=100)
    for more in ({"store": "kivi-4bit"}, {"when": "decode"}, {"visual": (36,)}):
        with pytest.raises(FewerError, match=rf"\({next(iter(more))}=\.\.\.\) means nothing for a prompt"):
            cost.of(model, "bm25", 0.5, tokens=100, **more)  # type: ignore[arg-type]
    assert read.modelled
    more = cost.of(model, "longllmlingua", 0.3, tokens=101, scorer=small)
    assert not more.modelled and any("one reading of it is counted" in note for note in more.notes)
    with pytest.raises(FewerError, match=r"scorer=.* means nothing for 'bm25'"):
        cost.of(model, "bm25", 0.5, tokens=100, scorer=small)


def test_what_a_text_comes_to_is_no_more_than_said() -> None:
    text = " ".join(f"Sentence number {i} says that the answer is {i * i}." for i in range(40))
    short = fewer.compress_prompt(text, "statistical", keep=0.3, tokenizer="characters")
    assert len(short.text) <= cost.of(tiny("llama"), "statistical", 0.3, tokens=len(text)).tokens
