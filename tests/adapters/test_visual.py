"""Visual tokens of every family: what is really removed is what a mask would hide, and leaving changes nothing."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fewer
from fewer.types import BudgetError, FewerError, MissingSignal, UnsupportedModel
from tests import vlms

CLOSE = 1e-4
FAMILIES = list(vlms.FAMILIES)
encoded_before = pytest.mark.skipif(
    not vlms.takes(transformers.LlavaForConditionalGeneration, "mm_encoder_outputs"),
    reason="this release takes no features that were made before",
)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> vlms.Case:
    return vlms.FAMILIES[request.param]()


@torch.no_grad()
def emulated(model: Any, inputs: dict[str, Tensor], run: Any) -> Tensor:
    """Logits of the model, whole, where later layers are kept from seeing what the run dropped, and folded states are
    put in place of those they replace. Nothing here cuts anything."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    b, q = ids.shape
    blocks = model.base_model.get_submodule(_text(model)).layers
    gone = torch.zeros(len(blocks), b, q, dtype=torch.bool)
    folds: dict[int, list[tuple[int, Tensor, Any]]] = {}
    alive = {
        (row, n): torch.arange(len(one.columns)) for row, each in enumerate(run.pictures) for n, one in enumerate(each)
    }
    for after, row, number, plan in run.plan:
        mine = [number] if number >= 0 else list(range(len(run.pictures[row])))
        columns = torch.cat([run.pictures[row][n].columns[alive[row, n]] for n in mine])
        survivors = plan.survivors[0][plan.survivors[0] >= 0]
        folds.setdefault(after + 1, []).append((row, columns, plan))
        dropped = torch.ones(len(columns), dtype=torch.bool)
        dropped[survivors] = False
        gone[after + 1 :, row, columns[dropped]] = True
        first = 0
        for n in mine:
            stays = ~dropped[first : first + len(alive[row, n])]
            first += len(alive[row, n])
            alive[row, n] = alive[row, n][stays]
        for n in mine:
            if len(alive[row, n]) < len(run.pictures[row][n].columns):
                gone[after + 1 :, row, run.pictures[row][n].separators] = True

    def before(index: int, block: Any, args: Any, kwargs: Any) -> Any:
        states = kwargs.pop("hidden_states", args[0] if args else None).clone()
        for row, columns, plan in folds.get(index, ()):
            survivors = plan.survivors[0][plan.survivors[0] >= 0]
            states[row, columns[survivors]] = plan.apply(states[row, columns].unsqueeze(0))[0, : len(survivors)]
        hidden = ~torch.ones(q, q, dtype=torch.bool).tril() | (gone[index] | ~mask)[:, None]
        hidden &= ~torch.eye(q, dtype=torch.bool)
        full = torch.zeros(b, 1, q, q).masked_fill(hidden[:, None], torch.finfo(torch.float32).min)
        return (states,), kwargs | {"attention_mask": full}

    def deep(text: Any, args: Any, kwargs: Any) -> Any:
        """What the first layers add to visual tokens folds as their states do."""
        shown, each = kwargs.get("visual_pos_masks"), list(kwargs.get("deepstack_visual_embeds") or ())
        for index, embeds in enumerate(each):
            wide = torch.zeros(b, q, embeds.shape[-1])
            wide[shown] = embeds
            for row, columns, plan in [one for at, some in folds.items() if at <= index for one in some]:
                survivors = plan.survivors[0][plan.survivors[0] >= 0]
                wide[row, columns[survivors]] = plan.apply(wide[row, columns].unsqueeze(0))[0, : len(survivors)]
            each[index] = wide[shown]
        return args, kwargs | ({"deepstack_visual_embeds": each} if each else {})

    text = model.base_model.get_submodule(_text(model))
    hooks = [text.register_forward_pre_hook(deep, with_kwargs=True)] + [
        block.register_forward_pre_hook(lambda m, a, k, i=i: before(i, m, a, k), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        return model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def _text(model: Any) -> str:
    return "language_model" if hasattr(model.base_model, "language_model") else "text_model"


def _close(run: Any, got: Tensor, model: Any, inputs: dict[str, Tensor]) -> None:
    expected = emulated(model, inputs, run)
    there = inputs["attention_mask"].bool() & (inputs["input_ids"] != vlms.IMAGE) & (inputs["input_ids"] != vlms.VIDEO)
    assert there.any()
    worst = float((got[there] - expected[there]).abs().max())
    assert worst < CLOSE, f"real removal differs from the mask by {worst}"


class Merging:
    """Folds pairs of neighbours: a method that a user might write."""

    needs: frozenset[Any] = frozenset()

    def after(self, layers: int) -> tuple[int, ...]:
        return (-1, 1)

    def score(self, tokens: fewer.Tokens) -> Tensor:
        return tokens.features.norm(dim=-1)

    def allocate(self, tokens: fewer.Tokens, scores: Tensor, budget: fewer.Budget) -> fewer.Allocation:
        return fewer.Allocation(torch.tensor([budget.count(int(tokens.seen[0]))]))

    def reduce(self, tokens: fewer.Tokens, scores: Tensor, allocation: fewer.Allocation) -> fewer.Plan:
        n, k = scores.shape[-1], int(allocation.counts)
        slot = (torch.arange(n) * k // n).unsqueeze(0)
        survivors = torch.searchsorted(slot[0], torch.arange(k)).unsqueeze(0)
        share = 1 / torch.bincount(slot[0]).float()
        return fewer.Plan(slot, share[slot[0]].unsqueeze(0), survivors)


@pytest.mark.parametrize("method", ["random", "fastv", Merging()], ids=["random", "fastv", "merging"])
@pytest.mark.parametrize("counts", [[1], [2, 1]], ids=["one", "batch"])
@torch.no_grad()
def test_real_removal_is_the_mask(case: vlms.Case, method: Any, counts: list[int]) -> None:
    inputs = case.inputs(counts)
    with fewer.compress(case.model, method, keep=0.4) as run:
        got = case.model(**inputs).logits
    assert len(run.plan) >= sum(counts)
    _close(run, got, case.model, inputs)


@torch.no_grad()
def test_generating_goes_on_as_under_the_mask(case: vlms.Case) -> None:
    inputs = case.inputs([2, 1])
    marks = [
        vlms.IMAGE,
        vlms.VIDEO,
        vlms.START,
        vlms.END,
        vlms.GLOBAL,
    ]  # a picture's marks, with no picture behind them
    never: dict[str, Any] = {"eos_token_id": -1, "suppress_tokens": marks}
    with fewer.compress(case.model, "fastv", keep=0.4) as run:
        answer = case.model.generate(**inputs, max_new_tokens=4, do_sample=False, **never)
    told = dict(inputs)
    for step in range(4):
        logits = emulated(case.model, told, run)[:, -1]
        logits[:, marks] = -torch.inf
        assert logits.argmax(-1).tolist() == answer[:, inputs["input_ids"].shape[1] + step].tolist()
        new = answer[:, : inputs["input_ids"].shape[1] + step + 1]
        more = torch.ones(len(new), step + 1, dtype=torch.long)
        told = told | {"input_ids": new, "attention_mask": torch.cat([inputs["attention_mask"], more], 1)}
        if "mm_token_type_ids" in inputs:
            told["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)


@torch.no_grad()
def test_keeping_all_and_leaving_are_bit_exact(case: vlms.Case) -> None:
    inputs = case.inputs([1, 2])
    there = inputs["attention_mask"].bool()
    before = case.model(**inputs).logits
    with fewer.compress(case.model, "fastv", keep=1.0):
        assert torch.equal(case.model(**inputs).logits[there], before[there])
    with fewer.compress(case.model, "visionzip" if case.classes else "random", keep=3):
        case.model(**inputs)
    assert torch.equal(case.model(**inputs).logits, before)
    names = [name for name in vars(case.model.base_model) if name.startswith("get_")]
    assert not names, "the model's own functions are back"


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(case: vlms.Case) -> None:
    for side in ("left", "right"):
        both = case.inputs([1, 1], side=side)
        with fewer.compress(case.model, "fastv", keep=0.3) as run:
            got = case.model(**both).logits
        kept = run.kept
        for row in (0, 1):
            there = both["attention_mask"][row].bool()
            alone = case.row(both, row)
            with fewer.compress(case.model, "fastv", keep=0.3) as run:
                own = case.model(**alone).logits
            assert torch.equal(run.kept[0][0], kept[row][0])
            torch.testing.assert_close(own[0], got[row][there], atol=CLOSE, rtol=0, equal_nan=True)


@torch.no_grad()
def test_budgets() -> None:
    case = vlms.llava()
    inputs = case.inputs([2, 1])
    for keep, per, expected in ((5, "picture", [[5, 5], [5]]), (10, "prompt", None), (0.25, "picture", [[9, 9], [9]])):
        with fewer.compress(case.model, "random", keep=keep, per=per) as run:
            case.model(**inputs)
        counts = [[len(kept) for kept in row] for row in run.kept]
        assert counts == expected or (per == "prompt" and [sum(row) for row in counts] == [10, 10])
        assert run.report.mean == sum(map(sum, counts)), "before the first layer, so every layer read as many"
    with fewer.compress(case.model, ["random", "fastv"], keep=[0.5, 4]) as run:
        case.model(**inputs)
    assert run.report.read == (54, 54, 12, 12, 12) and run.report.had == 108
    with fewer.compress(case.model, ["random", "fastv"], keep=0.25) as run:  # a half at each
        case.model(**inputs)
    assert run.report.read == (54, 54, 27, 27, 27)


@torch.no_grad()
def test_mean_layer() -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    for keep in (20, 0.5):
        with fewer.compress(case.model, "fastv", keep=keep, counted="mean") as run:
            case.model(**inputs)
        asked = keep if isinstance(keep, int) else 18
        assert run.report.read[:2] == (36, 36) and asked - 1 < run.report.mean <= asked
    few = pytest.raises(BudgetError, match=r"before its last cut this reads 15\.0 of 36")
    with few, fewer.compress(case.model, "fastv", keep=10, counted="mean"):
        case.model(**inputs)


@torch.no_grad()
def test_a_second_turn_and_a_second_picture() -> None:
    """A cache goes on: its pictures stay cut, text is read whole, a new picture is cut by itself."""
    case = vlms.llava()
    first, again = case.inputs([1]), case.inputs([1], seed=3)
    with fewer.compress(case.model, "fastv", keep=6) as run:
        out = case.model(**first)
        cache, read = out.past_key_values, first["input_ids"].shape[1]
        assert [layer.kept[0][0] for layer in run.report.cache.layers] == [read, read, *[read - 30] * 3]
        asks = torch.tensor([[7, 8, 9]])
        mask = torch.ones(1, read + 3, dtype=torch.long)
        case.model(input_ids=asks, attention_mask=mask, past_key_values=cache)
        assert [layer.kept[0][0] for layer in run.report.cache.layers] == [read + 3] * 2 + [read - 27] * 3
        more = again["input_ids"].shape[1]
        mask = torch.ones(1, read + 3 + more, dtype=torch.long)
        case.model(
            input_ids=again["input_ids"], pixel_values=again["pixel_values"], attention_mask=mask, past_key_values=cache
        )
        assert len(run.kept[0][0]) == 6
        held = [layer.kept[0][0] for layer in run.report.cache.layers]
        assert held == [read + 3 + more] * 2 + [read + 3 + more - 60] * 3


@torch.no_grad()
def test_generate_in_two_turns_is_generate_with_its_cache() -> None:
    case = vlms.qwen2_vl()
    inputs = case.inputs([1])
    with fewer.compress(case.model, "random", keep=0.5):
        out = case.model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, eos_token_id=-1
        )
        asks = torch.cat([out.sequences, torch.tensor([[5, 6]])], 1)
        more = torch.zeros(1, 5, dtype=torch.long)
        told = {"attention_mask": torch.ones_like(asks)}
        if "mm_token_type_ids" in inputs:
            told["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], 1)
        second = case.model.generate(
            input_ids=asks,
            past_key_values=out.past_key_values,
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=-1,
            **told,
        )
    assert second.shape[1] == asks.shape[1] + 2


@torch.no_grad()
def test_beams(case: vlms.Case) -> None:
    """Beams share the pictures of their prompt: one beam of several is the greedy answer's own cut."""
    new = vlms.takes(case.model, "mm_encoder_outputs")  # before, transformers mixed up a row's several pictures
    inputs = case.inputs([1, 2] if new else [1, 1])
    with fewer.compress(case.model, "random", keep=0.5) as run:
        case.model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        beams = run.kept
        case.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert len(beams) == 4 and len(run.kept) == 2
    for row in range(4):
        assert all(torch.equal(a, b) for a, b in zip(beams[row], run.kept[row // 2], strict=True))


@torch.no_grad()
def test_chunks_of_a_prompt() -> None:
    """A chunk that holds the picture is cut as the whole prompt is; one that ends inside it is refused."""
    case = vlms.llava()
    inputs = case.inputs([1])
    assert (inputs["input_ids"][0] == vlms.IMAGE).nonzero().flatten().tolist() == list(range(3, 39))
    never: dict[str, Any] = {"eos_token_id": -1, "do_sample": False, "max_new_tokens": 3}
    plain = [case.model.generate(**inputs, **never, **how) for how in ({}, {"prefill_chunk_size": 41})]
    if not torch.equal(*plain):
        pytest.skip("this transformers reads pictures in chunks otherwise than whole, by itself")
    with fewer.compress(case.model, "uniform", keep=9) as run:
        whole = case.model.generate(**inputs, **never)
        case.model.get_image_features(inputs["pixel_values"])  # for nothing
        chunks = case.model.generate(**inputs, **never, prefill_chunk_size=41)
        assert torch.equal(whole, chunks)
        assert len(run.kept[0][0]) == 9
        with pytest.raises(FewerError, match="chunks inside a picture"):
            case.model.generate(**inputs, **never, prefill_chunk_size=20)
        assert torch.equal(whole, case.model.generate(**inputs, **never)), "and goes on as before"
    with fewer.compress(case.model, "fastv", keep=9) as run:
        with pytest.raises(MissingSignal, match="chunk of it that is read, ends with its picture"):
            case.model.generate(**inputs, **never, prefill_chunk_size=39)
        case.model.generate(**inputs, **never, prefill_chunk_size=40)
        assert len(run.kept[0][0]) == 9


ASKING = ("fastv", "pyramiddrop", "cmai", "mini-monkey", "sparsevlm", "mustdrop", "feather")


@pytest.mark.parametrize("method", ASKING)
@pytest.mark.parametrize("per", ["picture", "prompt"])
@torch.no_grad()
def test_nothing_asks_about_a_picture_that_ends_its_prompt(method: str, per: str) -> None:
    """No token of the text sees it: of one row of a batch, too, or of the last of two pictures."""
    case = vlms.llava()
    picture, pixels = [vlms.IMAGE] * 36, case.inputs([2])["pixel_values"]
    good = vlms.padded([[1, 5, *picture, 6], [1, *picture, 7, 8]]) | {"pixel_values": pixels}
    own, name = case.model.config.text_config._attn_implementation, fewer.METHODS[method].__name__
    before = case.model(**good).logits
    with fewer.compress(case.model, method, keep=9, per=per) as run:
        cut, kept = case.model(**good).logits[:, -1], run.kept
    assert [len(one) for row in kept for one in row] == [9, 9], "one token after a picture is enough"
    late = [[1, 5, *picture, 6, 7], [1, 8, *picture]], [[1, 5, 6, *picture], [1, *picture, 7]]
    both = [[1, 5, *picture, 6, 7, 8, *picture]]
    for rows in (*late, both):
        for side in ("left", "right"):
            bad = vlms.padded(rows, side) | {"pixel_values": pixels}
            with fewer.compress(case.model, method, keep=9, per=per) as run:
                with pytest.raises(MissingSignal, match=f"^{name} .* ends with its picture"):
                    case.model(**bad)
                assert torch.equal(case.model(**good).logits[:, -1], cut), "and goes on as before"
                assert all(torch.equal(a[0], b[0]) for a, b in zip(run.kept, kept, strict=True))
            assert torch.equal(case.model(**good).logits, before), "nothing is left changed"
            assert case.model.config.text_config._attn_implementation == own


@pytest.mark.parametrize("method", ["divprune", "uniform"])
@torch.no_grad()
def test_methods_that_ask_nothing_take_a_prompt_that_ends_with_its_picture(method: str) -> None:
    case = vlms.llava()
    rows = vlms.padded([[1, 5, *[vlms.IMAGE] * 36, 6, 7], [1, 8, *[vlms.IMAGE] * 36]])
    with fewer.compress(case.model, method, keep=9) as run:
        case.model(**rows, pixel_values=case.inputs([2])["pixel_values"])
    assert [len(one) for row in run.kept for one in row] == [9, 9]


@torch.no_grad()
def test_only_visual_entries_leave_the_cache() -> None:
    case = vlms.llava()
    inputs = case.inputs([2, 1])
    text = [int((row != vlms.IMAGE).sum() - (row == vlms.PAD).sum()) for row in inputs["input_ids"]]
    snapkv = fewer.METHODS["snapkv"](window=4)
    for method in ("knorm", snapkv, fewer.METHODS["adakv"](snapkv)):
        with fewer.compress(case.model, method, keep=4, only="visual") as run:
            case.model(**inputs)
        for layer in run.report.cache.layers:
            for row, pictures in enumerate((2, 1)):
                heads = layer.kept[row]
                assert sum(heads) == len(heads) * (text[row] + 4 * pictures), method
    with fewer.compress(case.model, ["random", "fastv", "knorm"], keep=0.125) as run:
        case.model(**inputs)
    assert run.report.read == (57, 57, 30, 30, 30), "5 of 36 by three equal steps, each rounded up"
    for layer in run.report.cache.layers:
        assert layer.kept == tuple((text[row] + 5 * n,) * 2 for row, n in enumerate((2, 1))), "36 / 8, rounded up"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_a_total_over_layers_is_of_a_row_s_own_scores(family: str) -> None:
    """A row of a batch keeps, in every layer and head, what it keeps by itself."""
    case = vlms.FAMILIES[family]()
    inputs = case.inputs([1, 1])
    with fewer.compress(case.model, "kvzip", keep=4, only="visual") as run:
        case.model(**inputs)
        both = [layer.kept for layer in run.report.cache.layers]
        for row in range(2):
            case.model(**case.row(inputs, row))
            assert [layer.kept[0] for layer in run.report.cache.layers] == [kept[row] for kept in both]
    assert len({heads for kept in both for heads in kept}) > 2, "uneven, or this shows nothing"


@torch.no_grad()
def test_compact_positions_where_a_row_has_no_picture() -> None:
    case = vlms.llava()
    inputs = case.inputs([0, 1])
    alone = {name: inputs[name][:1, inputs["attention_mask"][0].bool()] for name in ("input_ids", "attention_mask")}
    with fewer.compress(case.model, "uniform", keep=9, positions="compact") as run:
        got = case.model(**inputs).logits[0, -1]
    assert [len(row) for row in run.kept] == [0, 1]
    torch.testing.assert_close(got, case.model(**alone).logits[0, -1], atol=CLOSE, rtol=0)


@torch.no_grad()
def test_hidden_states_are_of_the_tokens_that_each_layer_read() -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    text = int((inputs["input_ids"] != vlms.IMAGE).sum())
    with fewer.compress(case.model, ["uniform", "pyramiddrop"], keep=0.25) as run:
        states = case.model(**inputs, output_hidden_states=True).hidden_states
    read = run.report.read
    assert read[0] < 36 and read[-1] < read[0]
    assert [one.shape[1] - text for one in states] == [read[0], *read[:-1], 36], "the last is spread out again"


@torch.no_grad()
def test_a_cache_that_waits_for_decoding_takes_in_what_went_on() -> None:
    """It is not cut when the prompt was read: what follows goes on from tokens that have gaps between them."""
    case = vlms.llava()
    inputs, after = case.inputs([2, 1]), {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    with fewer.compress(case.model, "fastv", keep=0.25) as run:
        whole = case.model.generate(**inputs, **after)
        want = [layer.kept for layer in run.report.cache.layers]
    for every in (64, 2):
        with fewer.Cache(case.model, "h2o", 30, when="decode", every=every) as mine:
            with fewer.compress(case.model, "fastv", keep=0.25):
                got = case.model.generate(**inputs, **after, past_key_values=mine)
            kept = [layer.kept for layer in mine.report.layers]
        if every == 64:
            assert torch.equal(got, whole) and kept == want, "nothing was due yet"
        else:
            assert max(count for layer in kept for row in layer for count in row) == 31


@torch.no_grad()
def test_only_visual_keeps_text_bit_by_bit() -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    with fewer.compress(case.model, "knorm", keep=6, only="visual") as run:
        cache = case.model(**inputs).past_key_values
    text = (inputs["input_ids"][0] != vlms.IMAGE).nonzero().flatten().tolist()
    for layer in cache.layers:
        kept = layer._dense().positions[0]
        for head in kept:
            assert set(text) <= set(head.tolist())
    assert run.report.cache.kept < 1


@encoded_before
@torch.no_grad()
def test_compact_positions_are_those_of_a_shorter_prompt() -> None:
    """Renumbered without gaps, a prompt with a shorter run of placeholders reads the same."""
    case = vlms.llava()
    inputs = case.inputs([1])
    with fewer.compress(case.model, "uniform", keep=9, positions="compact") as run:
        answer = case.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    features = case.model.model.get_image_features(inputs["pixel_values"])
    features.pooler_output = [features.pooler_output[0][run.kept[0][0]]]
    at = (inputs["input_ids"][0] == vlms.IMAGE).nonzero().flatten()
    ids = torch.cat([inputs["input_ids"][0, : at[9]], inputs["input_ids"][0, at[-1] + 1 :]]).unsqueeze(0)
    expected = case.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_encoder_outputs={"image": features},
        max_new_tokens=4, do_sample=False, eos_token_id=-1,
    )  # fmt: skip
    assert answer[0, -4:].tolist() == expected[0, -4:].tolist()


@encoded_before
@torch.no_grad()
def test_kept_positions_are_those_of_the_public_door() -> None:
    """The same through transformers' own arguments: shorter placeholders, features made before, explicit positions."""
    case = vlms.llava()
    inputs = case.inputs([1])
    with fewer.compress(case.model, "uniform", keep=9) as run:
        got = case.model(**inputs).logits
    features = case.model.model.get_image_features(inputs["pixel_values"])
    features.pooler_output = [features.pooler_output[0][run.kept[0][0]]]
    at = (inputs["input_ids"][0] == vlms.IMAGE).nonzero().flatten()
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stays[at] = False
    stays[at[run.kept[0][0]]] = True
    places = torch.arange(len(stays))[stays].unsqueeze(0)
    ids = inputs["input_ids"][:, stays]
    expected = case.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places, mm_encoder_outputs={"image": features}
    ).logits
    torch.testing.assert_close(got[0, stays], expected[0], atol=CLOSE, rtol=0)


@torch.no_grad()
def test_centroids_of_multimodal_positions() -> None:
    case = vlms.qwen2_vl()
    inputs = case.inputs([1])
    with fewer.compress(case.model, Merging(), keep=0.5, positions="centroid") as run:
        merged = case.model(**inputs).logits
    with fewer.compress(case.model, Merging(), keep=0.5) as run:
        kept = case.model(**inputs).logits
    assert run.plan[0][3].folds and not torch.equal(merged[:, -1], kept[:, -1])


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"keep": 0.0}, BudgetError, "not a fraction"),
    ({"keep": "64MB"}, BudgetError, "not by bytes"),
    ({"keep": [0.5, 0.2]}, BudgetError, "names 2 budgets for 1 stages"),
    ({"per": "batch"}, FewerError, "per='batch'"),
    ({"counted": "median"}, BudgetError, "counted='median'"),
    ({"positions": "old"}, FewerError, "positions='old'"),
    ({"positions": "compact"}, FewerError, "cut inside"),
    ({"only": "text"}, FewerError, "only='text'"),
    ({"method": []}, FewerError, "at least one stage"),
    ({"method": ["knorm", "fastv"]}, FewerError, "only the last one"),
    ({"method": ["fastv", "random"]}, FewerError, "in the order in which they act"),
    ({"method": "snapkv", "per": "picture"}, FewerError, "add only='visual'"),
    ({"schedule": "linear"}, FewerError, "means nothing for visual tokens"),
    ({"when": "decode"}, FewerError, "cache's method"),
    ({"method": ["fastv", "kvzip"]}, FewerError, "'kvzip' has the model read on .* and fastv leaves some layers"),
    ({"method": ["random", "fastv", "dapq"]}, FewerError, "'dapq' has the model read on .* and random . fastv"),
    (
        {"method": ["fastv", "h2o"], "when": "decode"},
        FewerError,
        "when='decode': visual entries of a cache are cut once",
    ),
    (
        {"method": "h2o", "only": "visual", "when": "both"},
        FewerError,
        "when='both': visual entries of a cache are cut once",
    ),
]


@pytest.mark.parametrize(("asked", "kind", "words"), BAD, ids=[str(one[0]) for one in BAD])
def test_bad_arguments(asked: dict[str, Any], kind: type[Exception], words: str) -> None:
    case = vlms.llava()
    given: dict[str, Any] = {"method": "fastv", "keep": 0.5} | asked
    with pytest.raises(kind, match=words), fewer.compress(case.model, given.pop("method"), **given):
        pass


def test_a_method_for_pictures_on_a_model_without_any() -> None:
    from tests.tiny import tiny

    with pytest.raises(UnsupportedModel, match="vision-language"), fewer.compress(tiny("llama"), "fastv", keep=0.5):
        pass


@torch.no_grad()
def test_bad_prompts() -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    before = case.model(**inputs).logits

    def run(message: str, kind: type[Exception] = FewerError, **changes: Any) -> None:
        given = {name: value for name, value in (inputs | changes).items() if value is not None}
        with pytest.raises(kind, match=message), fewer.compress(case.model, "random", keep=4):
            case.model(**given)
        assert torch.equal(case.model(**inputs).logits, before), "nothing is left changed"

    run("no pictures", pixel_values=None, **case.inputs([0]))
    run("no image was encoded", pixel_values=None)
    if vlms.takes(case.model, "mm_encoder_outputs"):
        features = case.model.model.get_image_features(inputs["pixel_values"])
        run("features that were made before", pixel_values=None, mm_encoder_outputs={"image": features})
    embeds = case.model.get_input_embeddings()(inputs["input_ids"])
    run("input_ids", input_ids=None, inputs_embeds=embeds)
    run("labels", labels=inputs["input_ids"])
    run("use_cache", use_cache=False)
    from transformers import DynamicCache, StaticCache

    full = DynamicCache()
    case.model(**inputs, past_key_values=full)
    run("that fewer did not make", past_key_values=full)
    run("that fewer did not make", past_key_values=StaticCache(case.model.config.text_config, max_cache_len=64))
    wrong = inputs["input_ids"].clone()
    wrong[0, (wrong[0] == vlms.IMAGE).nonzero()[0]] = 5
    run("do not match", kind=Exception, input_ids=wrong)


@torch.no_grad()
def test_more_than_there_is_keeps_all() -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    before = case.model(**inputs).logits
    with fewer.compress(case.model, "random", keep=1000) as run:
        assert torch.equal(case.model(**inputs).logits, before)
    assert run.report.mean == 36
    case = vlms.llava_next()  # with separators, which leave with the first token of their picture
    inputs = case.inputs([2])
    before = case.model(**inputs).logits
    with fewer.compress(case.model, "random", keep=1000) as run:
        assert torch.equal(case.model(**inputs).logits, before)
    assert run.report.read == (run.report.had,) * 5
    with fewer.compress(case.model, "random", keep=80) as run:
        case.model(**inputs)
    assert [len(kept) for kept in run.kept[0]] == [80, 72], "the second has no more"
    assert run.report.read == (80 + 72 + len(run.pictures[0][1].separators),) * 5


@torch.no_grad()
def test_a_list_of_keeps_is_no_silent_nothing() -> None:
    case = vlms.llava()
    more = pytest.raises(BudgetError, match="leave more than it gets")
    with more, fewer.compress(case.model, ["random", "fastv"], keep=[0.5, 1.0]):
        case.model(**case.inputs([1]))


@torch.no_grad()
def test_books_of_copies_and_of_loaded_caches(tmp_path: Any) -> None:
    """A copy, or a loaded cache, knows which entries are visual as its original does."""
    case = vlms.llava()
    inputs, more = case.inputs([1]), case.inputs([1], seed=3)
    text = int((inputs["input_ids"] != vlms.IMAGE).sum())
    ones = torch.ones(1, inputs["input_ids"].shape[1] + more["input_ids"].shape[1], dtype=torch.long)
    with fewer.compress(case.model, "knorm", keep=4, only="visual"):
        cache = case.model(**inputs).past_key_values
        other = copy.deepcopy(cache)
        for one in (cache, other):
            case.model(**more | {"attention_mask": ones}, past_key_values=one)
    assert cache.report.layers[0].kept == other.report.layers[0].kept == ((2 * text + 8,) * 2,)
    with fewer.compress(case.model, "uniform", keep=9, positions="compact"):
        cache = case.model(**inputs).past_key_values
        with pytest.raises(FewerError, match="made compact"):
            cache.save(tmp_path / "compact.safetensors")


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("method", ["tome", "turbo", "topk"])
@torch.no_grad()
def test_a_stage_inside_the_tower(family: str, method: str) -> None:
    """What the language model reads are the features that the shortened tower gives by itself."""
    if family == "llava_onevision" and method == "topk":
        return  # its tower has no class token to rate by
    case = vlms.FAMILIES[family]()
    inputs = case.inputs([1])
    plain = case.model(**inputs).logits
    with fewer.compress(case.model, method, keep=0.75) as run:
        got = case.model(**inputs).logits
    (picture,) = run.pictures[0]
    left = len(picture.alive)
    assert 0 < left <= (27 if family == "llava" else 0.8 * len(picture.columns))
    assert run.report.read == (left,) * 5
    if family == "llava":
        assert left == 27
    if family == "llava" and method != "topk":  # which has a schedule of its own
        tower = case.model.base_model.vision_tower
        with fewer.compress(tower, method, keep=[*_even(0.75, 2), 0.75]) as inner:  # of 3 layers the second gives them
            states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(inner.kept[0, 1:] - 1, picture.alive)
        features = case.model.base_model.multi_modal_projector(states)
        embeds = case.model.get_input_embeddings()(inputs["input_ids"])
        stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        stays[picture.columns] = False
        stays[picture.columns[picture.alive]] = True
        embeds[0, picture.columns[picture.alive]] = features[0]
        places = torch.arange(len(stays))[stays].unsqueeze(0)
        mask = torch.ones_like(places)
        short = case.model(inputs_embeds=embeds[:, stays], position_ids=places, attention_mask=mask).logits
        torch.testing.assert_close(got[0, stays], short[0], atol=CLOSE, rtol=0)
    assert torch.equal(case.model(**inputs).logits, plain), "the tower is as it was"


def _even(share: float, places: int) -> list[float]:
    return [1 - (1 - share) * (i + 1) / places for i in range(places)]


@torch.no_grad()
def test_smaller_pictures() -> None:
    case = vlms.llava()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, "downsampled-image", keep=9) as run:
        got = case.model(**inputs).logits
    assert run.report.read == (27,) * 5
    small = torch.nn.functional.interpolate(
        inputs["pixel_values"], (12, 12), mode="bilinear", antialias=True, align_corners=False
    )
    features = case.model.model.get_image_features(small, interpolate_pos_encoding=True).pooler_output
    ids = inputs["input_ids"]
    embeds, stays = case.model.get_input_embeddings()(ids), inputs["attention_mask"].bool().clone()
    for row, pictures in enumerate(run.pictures):
        for number, one in enumerate(pictures):
            stays[row, one.columns] = False
            stays[row, one.columns[one.alive]] = True
            embeds[row, one.columns[one.alive]] = features[row + number]
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for row in (0, 1):
        mine = stays[row]
        short = case.model(
            inputs_embeds=embeds[row : row + 1, mine],
            position_ids=places[row : row + 1, mine],
            attention_mask=torch.ones(1, int(mine.sum()), dtype=torch.long),
        ).logits
        torch.testing.assert_close(got[row, mine], short[0], atol=CLOSE, rtol=0)


@torch.no_grad()
def test_stages_from_the_tower_to_the_cache() -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    text = int((inputs["input_ids"] != vlms.IMAGE).sum())
    with fewer.compress(case.model, ["turbo", "random", "fastv", "knorm"], keep=9) as run:
        case.model(**inputs)
    assert run.report.read == (18, 18, 13, 13, 13), "36, then 26 by the tower, 18, 13 and 9: a quarter in four steps"
    assert all(layer.kept == ((text + 9,) * 2,) for layer in run.report.cache.layers)
    for methods, words in (
        (["random", "turbo"], "comes first"),
        (["turbo", "visionzip"], "name one of the two"),
    ):
        with pytest.raises(FewerError, match=words), fewer.compress(case.model, methods, keep=9):
            pass
    folded = pytest.raises(UnsupportedModel, match="one token out of several")
    with folded, fewer.compress(vlms.qwen2_vl().model, "tome", keep=0.5):
        pass


@torch.no_grad()
def test_what_deciding_costs_is_in_the_flops() -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    with fewer.compress(case.model, "random", keep=9) as run:
        case.model(**inputs)
    text = 9
    expected = run.cost.layer_flops(text + 9) / run.cost.layer_flops(text + 36)
    assert inputs["input_ids"].shape[1] == text + 36
    assert run.report.choosing == 0 and abs(run.report.flops - expected) < 1e-9
    with fewer.compress(case.model, "divprune", keep=9) as run:
        case.model(**inputs)
        once = run.report
        case.model(**inputs)
    products = 2 * (2 * 36 * 36 * 32)  # every token's cosine with every other: to score, and again to choose
    share = products / (5 * run.cost.layer_flops(text + 36))
    assert abs(once.choosing - share) < 1e-9 and abs(once.flops - expected - share) < 1e-9
    assert run.report.choosing == once.choosing, "counted once, and known from then on"


@torch.no_grad()
def test_the_final_set_is_held_in_every_layer(case: vlms.Case) -> None:
    """Read once, a prompt leaves no layer with visual tokens that the last one went without; text is whole."""
    inputs = case.inputs([2, 1])
    method = fewer.METHODS["mustdrop"](by="class" if case.classes else "received")
    before = case.model(**inputs).logits
    with fewer.compress(case.model, method, keep=3):
        out = case.model(**inputs)
        answer = case.model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=-1)
    there = inputs["attention_mask"].bool()
    visual = (inputs["input_ids"] == vlms.IMAGE) | (inputs["input_ids"] == vlms.VIDEO)
    text = [int((row & ~seen).sum()) for row, seen in zip(there, visual, strict=True)]
    cache = out.past_key_values
    for layer in cache.report.layers:
        assert layer.kept == tuple((count + 3 * n,) * 2 for count, n in zip(text, (2, 1), strict=True))
    held = [layer._dense().positions for layer in cache.layers]
    assert all(torch.equal(one, held[0]) for one in held), "the same tokens everywhere"
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2
    assert torch.equal(case.model(**inputs).logits, before)


@torch.no_grad()
def test_a_saved_cache_goes_on_without_its_pictures(tmp_path: Any) -> None:
    case = vlms.llava()
    inputs = case.inputs([1])
    told = {
        "input_ids": torch.tensor([[5]]),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long),
    }
    with fewer.compress(case.model, "fastv", keep=6) as run:
        cache = case.model(**inputs).past_key_values
        cache.save(tmp_path / "cache.safetensors")
        with fewer.Cache.load(case.model, tmp_path / "cache.safetensors") as loaded:
            again = case.model(**told, past_key_values=loaded).logits
            more = case.inputs([1], seed=3)
            ones = torch.ones(1, told["attention_mask"].shape[1] + more["input_ids"].shape[1], dtype=torch.long)
            case.model(**more | {"attention_mask": ones}, past_key_values=loaded)
            assert len(run.kept[0][0]) == 6, "a new picture is cut in a loaded cache too"
        assert torch.equal(case.model(**told, past_key_values=cache).logits, again)


@torch.no_grad()
def test_methods_that_count_positions_along_a_row_refuse_multimodal_ones() -> None:
    case = vlms.qwen2_vl()
    for method, kind in (("expected-attention", MissingSignal), ("kvzip", UnsupportedModel)):
        with pytest.raises(kind), fewer.compress(case.model, method, keep=0.5):
            pass
    with fewer.compress(case.model, "knorm", keep=0.5) as run:  # and others serve it
        case.model(**case.inputs([1]))
    assert run.report.kept < 0.55


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "more"), [("knorm", {"only": "visual"}), ("uniform", {"positions": "compact"}), ("mustdrop", {})]
)
@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 0, 1, 1]], ids=["reordered", "one left", "repeated"])
def test_what_is_known_of_rows_goes_with_them(method: str, more: dict[str, Any], rows: list[int]) -> None:
    case, index = vlms.llava(), torch.tensor(rows)
    inputs = case.inputs([1, 2])
    ids = torch.randint(3, 80, (2, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    with fewer.compress(case.model, method, keep=9, **more):
        cache = case.model(**inputs).past_key_values
        plain, fork = copy.deepcopy(cache), cache.fork()
        want = case.model(input_ids=ids, attention_mask=mask, past_key_values=plain).logits
        again = case.model(input_ids=ids, attention_mask=mask, past_key_values=fork).logits
        torch.testing.assert_close(again, want, atol=CLOSE, rtol=0)
        if rows == [0, 0, 1, 1]:
            cache.batch_repeat_interleave(2)
        elif len(rows) == 1:
            cache.batch_select_indices(index)
        else:
            cache.reorder_cache(index)
        got = case.model(input_ids=ids[index], attention_mask=mask[index], past_key_values=cache).logits
    torch.testing.assert_close(got, want[index], atol=CLOSE, rtol=0)
    for mine, theirs in zip(cache.report.layers, plain.report.layers, strict=True):
        assert mine.kept == tuple(theirs.kept[row] for row in rows)
