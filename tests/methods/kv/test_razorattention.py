"""RazorAttention: retrieval heads whole, the others with a window and a token that stands for all that was dropped."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fewer
from fewer import fit as fits
from fewer.adapters.hf_decide import cost_of
from fewer.attention import attend
from fewer.fit import Fit, fingerprint
from fewer.methods.kv.razorattention import RazorAttention
from fewer.ragged import Dense, Ragged
from fewer.types import Budget, BudgetError, FewerError, Site, Tokens
from tests.methods.kv.build import SIZES, Row, decide, kept, place, random_row, same_alone_and_padded
from tests.tiny import prompt, tiny

NONE = ((False, False),)
PATTERN = ((True, False), (False, False), (False, True))


def razor(heads: Any = NONE, model: Any = None, sinks: int = 4) -> RazorAttention:
    found = {"heads": torch.tensor(heads)}
    return RazorAttention(Fit("razorattention", "any" if model is None else fingerprint(model), found), sinks)


def test_worked_example() -> None:
    """Six tokens at two heads, three a head on average; head 1 retrieves and keeps 6, so nothing would be left: 6 of 6
    in all. With 5 on average head 0 has 4: token 0, the sink, 4 and 5, and one token for the other three.

    Keys 0, 1, .., 5 and values 0, 10, .., 50: its key is (1 + 2 + 3) / 3 = 2, its value 20, and it counts as 3.
    """
    keys = torch.arange(6.0).view(1, 6, 1).repeat(2, 1, 1)
    method = razor(((False, True),), sinks=1)
    tokens = place(method, Row(keys, keys, keys * 10))
    plan = decide(method, 5, tokens)
    assert plan.survivors.tolist() == [[[0, 3, 4, 5, -1, -1], [0, 1, 2, 3, 4, 5]]]
    assert plan.slot.tolist() == [[[0, 1, 1, 1, 2, 3], [0, 1, 2, 3, 4, 5]]]
    assert plan.mass is not None and plan.mass.tolist() == [[[1, 3, 1, 1, 0, 0], [1] * 6]]
    assert plan.apply(tokens.features)[0, 0, :4, 0].tolist() == pytest.approx([0, 2, 4, 5])
    assert plan.apply(tokens.values)[0, 0, :4, 0].tolist() == pytest.approx([0, 20, 40, 50])
    assert plan.apply(tokens.features)[0, 1, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert decide(method, 3, tokens).counts.tolist() == [[0, 6]]


def reference(n: int, count: int, sinks: int) -> tuple[list[int], list[int]]:
    """Which of n tokens stay as they are, and which become one."""
    if count >= n:
        return list(range(n)), []
    order = [*range(min(sinks, n)), *range(n - 1, min(sinks, n) - 1, -1)]  # what stays first
    stay = sorted(order[: count - 1])
    return stay, [j for j in range(n) if j not in stay]


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, sinks: int) -> None:
    row, method = random_row(n), razor(NONE, sinks=sinks)
    for keep in (0.1, 0.3, 0.9, 1.0):
        tokens = place(method, row)
        plan = decide(method, keep, tokens)
        plan.check()
        stay, gone = reference(n, Budget.parse(keep).count(n), sinks)
        assert kept(tokens, plan) == [sorted([*stay, *gone[-1:]])] * 2
        for head in range(2):
            for part, got in ((row.keys[head], tokens.features), (row.values[head], tokens.values)):
                slots = {j: part[j] for j in stay}
                if gone:
                    slots[gone[-1]] = part[gone].mean(0)
                want = torch.stack([slots[j] for j in sorted(slots)])
                torch.testing.assert_close(plan.apply(got)[0, head], want, rtol=1e-4, atol=1e-5)
        if gone:
            assert plan.mass is not None and plan.mass[0].sum(-1).tolist() == [n, n]
            assert plan.mass[0].max(-1).values.tolist() == [len(gone)] * 2
        else:
            assert plan.mass is None


@pytest.mark.parametrize("keep", [0.4, 0.5, 0.83, 40, 57])
def test_totals_are_exact_over_all_layers(keep: float | int) -> None:
    """Every layer is asked by itself and knows its own part of one total, in which whole heads count like any other."""
    rows = [random_row(n, seed=n) for n in (63, 100)]
    method, total = razor(PATTERN), torch.zeros(2, dtype=torch.long)
    for layer, pattern in enumerate(PATTERN):
        plan = decide(method, keep, place(method, rows, site=Site(layer, 3)))
        total += plan.counts.sum(-1)
        for row, source in enumerate(rows):
            assert [count == len(source) for count in plan.counts[row].tolist()] == list(pattern)
    assert total.tolist() == [6 * Budget.parse(keep).count(len(row)) for row in rows]


def test_a_budget_below_the_retrieval_heads_names_both_numbers() -> None:
    """Two heads of six, 63 tokens each, are 126; a quarter of everything is 6 times 16."""
    method = razor(PATTERN)
    tokens = place(method, random_row(63), site=Site(1, 3))
    with pytest.raises(BudgetError, match=r"2 of 6 heads are kept whole, 126 tokens .* keep=0.25 lets 96 stay.* 0.334"):
        decide(method, 0.25, tokens)
    decide(method, 0.334, tokens)
    assert decide(method, 1.0, tokens).counts.tolist() == [[63, 63]]


@pytest.mark.parametrize("heads", [((True, True),), ((False, False),)])
def test_all_heads_alike(heads: Any) -> None:
    method = razor(heads)
    tokens = place(method, random_row(30))
    if heads[0][0]:
        with pytest.raises(BudgetError):
            decide(method, 0.9, tokens)
    else:
        assert decide(method, 0.5, tokens).counts.tolist() == [[15, 15]]


def test_padding_changes_nothing() -> None:
    same_alone_and_padded(razor(), 0.3)
    same_alone_and_padded(razor(((True, False),)), 0.7, filler=torch.nan)
    rows = [random_row(n, seed=n) for n in SIZES]
    batch = place(razor(), rows, filler=torch.nan)
    together = decide(razor(), 0.3, batch)
    for index, row in enumerate(rows):
        alone = decide(razor(), 0.3, place(razor(), row))
        k = alone.survivors.shape[-1]
        torch.testing.assert_close(together.apply(batch.features)[index, :, :k], alone.apply(row.keys[None])[0])
        if alone.mass is not None:
            assert together.mass is not None and torch.equal(together.mass[index, :, :k], alone.mass[0])


def test_protected_tokens_stay_themselves() -> None:
    tokens = place(razor(), random_row(30), protect=[7, 9])
    plan = decide(razor(), 10, tokens)
    assert kept(tokens, plan) == [[0, 1, 2, 3, 7, 9, 26, 27, 28, 29]] * 2
    assert plan.mass is not None and plan.mass[0, 0].tolist() == [1, 1, 1, 1, 1, 1, 21, 1, 1, 1]
    with pytest.raises(BudgetError, match="no place for the compensation token"):
        decide(razor(), 2, tokens)


def test_a_fit_that_does_not_fit_is_refused() -> None:
    tokens = place(razor(), random_row(30))
    with pytest.raises(FewerError, match="fewer fit razorattention"):
        decide(RazorAttention(), 0.5, tokens)
    with pytest.raises(FewerError, match="layer 0 of 2 heads"):
        decide(razor(((True,),)), 0.5, tokens)
    with pytest.raises(FewerError, match="layer 1 of 2 heads"):
        decide(razor(NONE), 0.5, replace(tokens, site=Site(1, 2)))
    model = tiny("llama")
    with pytest.raises(FewerError, match="fitted to the model first"):
        fewer.Cache(model, "razorattention", 0.5)
    with pytest.raises(FewerError, match="fitted to another model"):
        fewer.Cache(model, razor(PATTERN), 0.5)


# --- the identity: if all that was dropped is the same, nothing was lost ---


def held(tokens: Tokens, plan: Any) -> Ragged:
    """What a host would hold."""
    assert tokens.values is not None
    there = plan.survivors >= 0
    positions = tokens.positions.gather(-1, plan.survivors.clamp(min=0))
    keys, values = plan.apply(tokens.features), plan.apply(tokens.values)
    return Ragged.pack(Dense(keys, values, positions, positions, ~there, plan.mass), moved=False)


def same_past(n: int, sinks: int, recent: int, seed: int = 0) -> Row:
    """Everything between the sinks and the recent tokens is one token over and over."""
    row = random_row(n, seed)
    same = (torch.arange(n) >= sinks) & (torch.arange(n) < n - recent)
    keys, values = (torch.where(same[:, None], part[:, sinks : sinks + 1], part) for part in (row.keys, row.values))
    return Row(row.query, keys, values)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("heads", [NONE, ((False, True),)])
def test_attention_to_equal_tokens_is_full_attention(heads: Any, softcap: float | None) -> None:
    row, method = same_past(40, 4, 8), razor(heads)
    tokens = place(method, row)
    part = held(tokens, decide(method, 13 if heads is NONE else 27, tokens))
    query, keys, values = (torch.randn(1, count, 3, 8) for count in (4, 2, 2))
    got = attend(query, [part], keys, values, None, 8**-0.5, softcap)
    whole = Ragged.pack(
        Dense(row.keys[None], row.values[None], tokens.positions, tokens.positions, tokens.padding), moved=False
    )
    want = attend(query, [whole], keys, values, None, 8**-0.5, softcap)
    torch.testing.assert_close(got, want)
    assert part.counts == ((13, 13),) if heads is NONE else ((14, 40),)


def unrotated(**changes: Any) -> Any:
    """One layer in which equal tokens have equal keys wherever they stand."""
    model = tiny("llama", num_hidden_layers=1, **changes)
    model.model.rotary_emb.inv_freq.zero_()
    return model


PAST = torch.cat([prompt(4), torch.full((1, 30), 7), prompt(6, seed=1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("heads", [((False, False),), ((True, False),)])
def test_a_model_whose_dropped_tokens_were_equal_answers_as_before(heads: Any) -> None:
    model = unrotated()
    plain, cache = DynamicCache(config=model.config), fewer.Cache(model, razor(heads, model), 0.75)
    for ids in (PAST, prompt(5, seed=2), prompt(1, seed=3), torch.full((1, 3), 7)):
        want = model(ids, past_key_values=plain).logits
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, want, rtol=1e-4, atol=1e-4)
    total = 2 * Budget.parse(0.75).count(49)
    assert sum(cache.report.layers[0].kept[0]) == total < 2 * 49


@torch.no_grad()
def test_without_the_mass_it_would_not() -> None:
    """The identity is no accident: the same cache that counts the compensation token once answers otherwise."""
    model = unrotated()
    plain, cache = DynamicCache(config=model.config), fewer.Cache(model, razor(NONE, model), 12)
    for one in (plain, cache):
        model(PAST, past_key_values=one)
    layer = cache.layers[0]
    layer.kept = replace(layer.kept, mass=None)
    cache.freeze()
    want, got = (model(prompt(1, seed=3), past_key_values=one).logits for one in (plain, cache))
    assert float((want - got).abs().max()) > 0.01


# --- masses live on ---


def masses(cache: Any, layer: int = 0) -> list[list[list[float]]]:
    part = cache.layers[layer].kept
    mass = torch.ones(len(part.positions)) if part.mass is None else part.mass
    return [[mass[start:end].tolist() for start, end in row] for row in part.bounds]


def compensation(cache: Any, head: int, row: int = 0) -> Tensor:
    """The key that counts as more than one."""
    part = cache.layers[0].kept
    start, end = part.bounds[row][head]
    (found,) = (part.mass[start:end] > 1).nonzero().flatten().tolist()
    return part.keys[start + found]


def turns() -> list[Tensor]:
    return [prompt(40), prompt(9, seed=1), *(prompt(1, seed=s) for s in range(2, 8)), prompt(30, seed=9)]


@torch.no_grad()
@pytest.mark.parametrize("keep", [12, 0.3])
@pytest.mark.parametrize("when", ["prefill", "both"])
def test_recompression_combines_masses(when: Any, keep: Any) -> None:
    """However often it is compressed, a head's masses add up to all it has seen, and its compensation key is the mean
    of all that it does not hold: a plain cache has the same keys at layer 0."""
    model = tiny("llama")
    method = razor(((False, False),) * 3, model)
    plain, cache = DynamicCache(config=model.config), fewer.Cache(model, method, keep, when=when, every=3)
    for ids in turns():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=plain)
        layer = cache.layers[0]
        keys = plain.layers[0].keys[0]
        for head in range(2):
            start, end = layer.kept.bounds[0][head]
            positions, mass = layer.kept.positions[start:end].tolist(), masses(cache)[0][head]
            assert sum(mass) + layer.keys.shape[2] == keys.shape[1]
            last = max(p for p, m in zip(positions, mass, strict=True) if m > 1)
            rest = [j for j in range(last + 1) if j not in positions or j == last]
            torch.testing.assert_close(compensation(cache, head), keys[head, rest].mean(0), rtol=1e-4, atol=1e-4)
            assert positions[:4] == [0, 1, 2, 3] and max(mass) == len(rest)


@torch.no_grad()
def test_rows_of_a_padded_batch_have_their_own_masses() -> None:
    model = tiny("llama")
    method = razor(PATTERN, model)
    real = torch.ones(3, 40, dtype=torch.long)
    real[0, :9], real[1, :25] = 0, 0
    batch = fewer.Cache(model, method, 0.5)
    ids = prompt(40, rows=3)
    model(ids, attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(min=0), past_key_values=batch)
    for row in range(3):
        alone = fewer.Cache(model, method, 0.5)
        model(ids[row : row + 1, real[row].bool()], past_key_values=alone)
        for layer in range(3):
            assert masses(batch, layer)[row] == masses(alone, layer)[0]
            assert [sum(head) for head in masses(batch, layer)[row]] == [int(real[row].sum())] * 2


def compressed(model: Any, method: RazorAttention, rows: int = 1) -> Any:
    cache = fewer.Cache(model, method, 0.5)
    model(prompt(40, rows=rows), past_key_values=cache)
    return cache


@torch.no_grad()
def test_masses_go_with_their_rows() -> None:
    model = tiny("llama")
    method = razor(PATTERN, model)
    cache = compressed(model, method, rows=2)
    one = compressed(model, razor(((False, True),) * 3, model))
    stacked = fewer.Cache.stack([one, one])
    mine = compressed(model, method)
    mixed = fewer.Cache.stack([mine, one])
    assert masses(mixed) == [masses(mine)[0], masses(one)[0]] and masses(stacked) == masses(one) * 2
    plain = fewer.Cache(model, "full", 1.0)
    model(prompt(40), past_key_values=plain)
    beside = fewer.Cache.stack([plain, mine])
    assert masses(beside) == [[[1.0] * 40] * 2, masses(mine)[0]]
    before = masses(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert masses(cache) == [before[1]] * 2
    cache.batch_repeat_interleave(2)
    assert masses(cache) == [before[1]] * 4
    following = prompt(3, seed=5)
    want = model(following, past_key_values=mine).logits
    torch.testing.assert_close(
        model(following.repeat(2, 1), past_key_values=mixed).logits[:1], want, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_masses_survive_cropping() -> None:
    """Of 46 tokens six come after the compression; then four of the recent ones at the short heads are cropped."""
    model = tiny("llama")
    cache = compressed(model, razor(PATTERN, model))
    before = masses(cache, 1)
    cache.freeze()
    model(prompt(6, seed=1), past_key_values=cache)
    cache.crop(40)
    assert masses(cache, 1) == before
    cache.crop(36)
    assert masses(cache, 1) == [[head[:-4] for head in before[0]]]
    assert [sum(head) for head in masses(cache, 1)[0]] == [36, 36]
    assert bool(model(prompt(2, seed=2), past_key_values=cache).logits.isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("keep", ["60KB", 0.5])
def test_bytes_are_counted_with_their_masses(keep: Any) -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, razor(PATTERN, model), keep)
    model(prompt(120), past_key_values=cache)
    report = cache.report
    if keep == "60KB":
        assert 59_000 <= report.bytes_kept <= 60_000
    entries = sum(sum(layer.kept[0]) for layer in report.layers)
    assert entries == 6 * Budget.parse(keep).within(cost_of(cache.layers[0], cache.shared.policy, beside=0)).count(120)
    assert sum(layer.metadata for layer in report.layers) == 8 * entries


# --- the fit ---


@torch.no_grad()
def test_fitting_saving_and_using(tmp_path: Any) -> None:
    model = tiny("llama")
    made = RazorAttention.fit_to(model, period=40, echo=0.2, induction=0.34, seed=3)
    echo, induction, heads = (made.tensors[name] for name in ("echo", "induction", "heads"))
    best = {int(echo.argmax()), *induction.flatten().argsort(descending=True)[:2].tolist()}
    assert set(heads.flatten().nonzero().flatten().tolist()) == best
    assert made.notes["retrieval heads"] == f"{len(best)} of 6"
    assert made == RazorAttention.fit_to(model, period=40, echo=0.2, induction=0.34, seed=3)
    fits.save(made, tmp_path / "razor.safetensors")
    method = RazorAttention.load(tmp_path / "razor.safetensors")
    assert method.fit == made
    cache = fewer.Cache(model, method, 0.8)
    model(prompt(40), past_key_values=cache)
    whole = torch.tensor([layer.kept[0] for layer in cache.report.layers]) == 40
    assert torch.equal(whole, heads)
