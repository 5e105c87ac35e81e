"""EMS: evict the worst, merge the middle into the nearest kept, drop what is like nothing that is kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from fewer.methods.kv.ems import EMS, Seers, seen_by
from fewer.reduce.select import top_k
from fewer.types import Tokens
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Cache,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)
from tests.tiny import prompt, tiny

SMALL = EMS(window=4, evict=0.1, threshold=0.2)


def test_worked_example() -> None:
    """One channel of logits: every query is (1, 0), keys are (ln 1, ..), (ln 4, ..), (ln 2, ..), (ln 1, ..).

    Attention is in proportion to 1, 4, 2, 1: rows (1), (1, 4) / 5, (1, 4, 2) / 7, (1, 4, 2, 1) / 8. With a window of 1
    the local score is the last row's, 1/8, 1/2, 1/4 before the window. Column sums are 1 + 1/5 + 1/7 + 1/8 = 411/280,
    4/5 + 4/7 + 1/2 = 131/70, 2/7 + 1/4 = 15/28; over the 4, 3 and 2 queries that could see them 0.36696, 0.62381,
    0.26786, in all 1.25863. So s is 0.29156 + 1/7, 0.49563 + 4/7, 0.21282 + 2/7 = 0.434, 1.067, 0.498.

    Two stay: token 3, the window, and token 1. Of s, 2 in all, token 0 holds 0.217 and tokens 0 and 2 hold 0.466: with
    evict = 0.22 (0.44) token 0 goes and 2 is merged, with 0.21 neither goes, with 0.5 both.
    """
    second = torch.tensor([1.0, 1, 1, -1])
    keys = torch.stack([torch.tensor([1.0, 4, 2, 1]).log(), second], -1)[None]
    row = Row(torch.tensor([1.0, 0]).expand(1, 4, 2), keys, keys)
    slots = {0.21: [0, 0, 0, 1], 0.22: [-1, 0, 0, 1], 0.5: [-1, 0, -1, 1]}
    for evict, want in slots.items():
        method = EMS(window=1, evict=evict, threshold=0.5)
        tokens = place(method, row, scaling=1.0)
        scores = method.score(tokens)[0, 0]
        torch.testing.assert_close(scores[:3], torch.tensor([0.434415, 1.067056, 0.498529]), rtol=0, atol=1e-4)
        assert decide(method, 2, tokens).slot.tolist() == [[want]]


def test_the_threshold_by_hand() -> None:
    """As above: key 0 is (0, 1), key 1 (1.386, 1), key 2 (0.693, 1). Cosines with key 1: 0.585 and 0.942; with the
    window's (0, -1) they are below zero. Above the cosine the tokens count for nothing; what merges is averaged."""
    second = torch.tensor([1.0, 1, 1, -1])
    keys = torch.stack([torch.tensor([1.0, 4, 2, 1]).log(), second], -1)[None]
    row = Row(torch.tensor([1.0, 0]).expand(1, 4, 2), keys, torch.tensor([[[1.0], [2], [6], [9]]]))
    for threshold, slot, value in ((0.58, [0, 0, 0, 1], 3.0), (0.6, [-1, 0, 0, 1], 4.0), (0.95, [-1, 0, -1, 1], 2.0)):
        method = EMS(window=1, evict=0.0, threshold=threshold)
        tokens = place(method, row, scaling=1.0)
        plan = decide(method, 2, tokens)
        assert plan.slot.tolist() == [[slot]]
        assert plan.apply(tokens.values).flatten().tolist() == pytest.approx([value, 9.0])


def scores_of(row: Row, window: int, unseen: range = range(0)) -> Tensor:
    weights, (h, n, _) = naive.attention(row.query, row.keys), row.keys.shape
    groups, before = row.query.shape[0] // h, max(n - window, 0)
    out = torch.full((h, n), torch.inf, dtype=torch.float64)
    for g in range(h):
        mine = weights[g * groups : (g + 1) * groups].mean(0)
        asked = [q for q in range(n) if q not in unseen]
        seen = torch.tensor(
            [float(mine[asked, j].sum()) / sum(q >= j for q in asked) for j in range(before)], dtype=torch.float64
        )
        local = torch.tensor([float(mine[before:, j].mean()) for j in range(before)], dtype=torch.float64)
        out[g, :before] = seen / seen.sum() + local / local.sum()
    return out


def plan_of(method: EMS, scores: Tensor, keys: Tensor, count: int) -> list[int]:
    """The slot of every token of one head."""
    centres = naive.best(scores, count)
    others = sorted((j for j in range(len(scores)) if j not in centres), key=lambda j: float(scores[j]))
    slots, held = [-1] * len(scores), 0.0
    for slot, j in enumerate(centres):
        slots[j] = slot
    for j in others:
        held += float(scores[j])
        if held > 2 * method.evict:
            cosines = [float(torch.cosine_similarity(keys[j].double(), keys[c].double(), 0)) for c in centres]
            if max(cosines) >= method.threshold:
                slots[j] = cosines.index(max(cosines))
    return slots


@pytest.mark.parametrize("evict", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, evict: float) -> None:
    row = random_row(n)
    method = EMS(window=4, evict=evict, threshold=0.4)
    tokens, expected = place(method, row), scores_of(row, 4)
    agree(method.score(tokens)[0], expected)
    plan, count = decide(method, 0.3, tokens), n if n <= 4 else -(-n * 3 // 10)
    plan.check()
    for head in range(2):
        slots = plan_of(method, expected[head], row.keys[head], count)
        assert plan.slot[0, head].tolist() == slots
        for slot in range(count):
            members = row.keys[head, [j for j, s in enumerate(slots) if s == slot]]
            torch.testing.assert_close(plan.apply(tokens.features)[0, head, slot], members.mean(0))


@pytest.mark.parametrize("chunks", [(20, 50), (1, 56), (20, 21)])
def test_attention_is_shared_by_the_queries_that_were_observed(chunks: tuple[int, int]) -> None:
    """A prompt, decoding steps that are not observed, and a second turn; a short row begins among the steps."""
    rows, method = [random_row(60), random_row(25, seed=1)], EMS(window=4)
    tokens = place(method, rows, chunks=chunks, unseen=(1,))
    for index, row in enumerate(rows):
        missing = 60 - len(row)
        expected = scores_of(row, 4, range(chunks[0] - missing, chunks[1] - missing))
        agree(method.score(tokens)[index, :, missing:], expected)


@torch.no_grad()
def test_who_could_see_a_key_is_counted_as_it_was_observed() -> None:
    """12 tokens in a row and 7 in a padded one, 5 of decoding that nobody counts, of which 2 are cropped, and 4 more.

    The first token was seen by 12 (7) and by 4, the third of decoding by the 4 alone, the last token by itself.
    """
    found: list[Tensor] = []

    class Spy(EMS):
        def score(self, tokens: Tokens) -> Tensor:
            found.append(seen_by(tokens.signal(Seers, list), tokens.positions).float())
            return super().score(tokens)

    model, mask = tiny("llama", num_hidden_layers=1), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    more = torch.ones(2, 1, dtype=torch.long)
    with fewer.Cache(model, Spy(window=2), 1000) as cache:
        model(prompt(12, rows=2), attention_mask=mask, past_key_values=cache)
        for _ in range(5):
            mask = torch.cat([mask, more], 1)
            model(prompt(1, rows=2), attention_mask=mask, past_key_values=cache)
        cache.crop(-2)
        mask = torch.cat([mask[:, :-2], more, more, more, more], 1)
        model(prompt(4, rows=2), attention_mask=mask, past_key_values=cache)
    late = [4.0, 4, 4, 4, 3, 2, 1]
    assert found[-1][0].tolist() == [[*range(16, 4, -1), *late]] * 2
    assert found[-1][1, :, 5:].tolist() == [[*range(11, 4, -1), *late]] * 2


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(SMALL, 0.4)
    same_alone_and_padded(SMALL, 0.4, lengths=(10, 20), filler=torch.nan)
    same_in_chunks(SMALL, 0.4)


def test_padding_is_merged_into_nothing() -> None:
    rows = [random_row(n, seed=n) for n in SIZES]
    batch = place(SMALL, rows, filler=torch.nan)
    together = decide(SMALL, 0.3, batch)
    for index, row in enumerate(rows):
        alone = decide(SMALL, 0.3, place(SMALL, row))
        assert torch.equal(together.slot[index, :, -len(row) :], alone.slot[0])
        mine = together.apply(batch.features)[index, :, : alone.survivors.shape[-1]]
        torch.testing.assert_close(mine, alone.apply(row.keys[None])[0])


def test_nothing_is_merged_where_nothing_is_alike_or_all_is_evicted() -> None:
    row = random_row(63)
    for method in (EMS(window=4, threshold=1.1), EMS(window=4, evict=1.01)):
        tokens = place(method, row)
        plan = decide(method, 0.3, tokens)
        assert not plan.folds and bool(((plan.weight == 0) | (plan.weight == 1)).all())
        assert kept(tokens, plan) == kept(tokens, decide(EMS(window=4), 0.3, tokens))


def test_sparse_heads_evict_more_and_redundant_heads_merge_more() -> None:
    """Head 0 attends sharply and its keys point anywhere; head 1 attends alike everywhere, and its keys are alike."""
    row, method = random_row(130, heads=2), EMS(window=8, threshold=0.0)
    alike = row.keys[1] * 0.02 + torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 5])
    row = Row(torch.stack([row.query[0] * 8, row.query[1] * 0.1]), torch.stack([row.keys[0], alike]), row.values)
    tokens = place(method, row)
    dropped = (decide(method, 0.2, tokens).slot < 0).sum(-1)[0].tolist()
    assert dropped[0] > 2 * dropped[1]
    strict = EMS(window=8, evict=0.0, threshold=0.9)
    dropped = (decide(strict, 0.2, tokens).slot < 0).sum(-1)[0].tolist()
    assert dropped[0] > 50 and dropped[1] == 0


def test_short_prompts_and_budgets_below_the_window() -> None:
    method = EMS(window=8)
    plan = decide(method, 0.5, place(method, random_row(7)))
    assert plan.counts.tolist() == [[7, 7]] and "no longer than the window of 8" in plan.note
    tokens = place(method, random_row(30))
    assert kept(tokens, decide(method, 4, tokens)) == [[26, 27, 28, 29]] * 2
    decide(method, 4, tokens).check()


def test_what_was_compressed_is_compressed_again() -> None:
    """Sums go on with the centres, over the queries that could see them; here by hand for the second forward."""
    row, method = random_row(40, heads=2), EMS(window=4)
    cache: Any = Cache(method, 12)
    for start, end in ((0, 30), (30, 36), (36, 40)):
        plan = cache.forward(row.part(start, end))
        plan.check()
        assert plan.counts.tolist() == [[12, 12]]
    assert cache.positions[:, -4:].tolist() == [[36, 37, 38, 39]] * 2


def test_the_centres_are_the_best() -> None:
    row = random_row(63)
    tokens = place(SMALL, row)
    plan = decide(SMALL, 20, tokens)
    best = top_k(SMALL.score(tokens), SMALL.allocate(tokens, SMALL.score(tokens), fewer.Budget.parse(20)))
    assert torch.equal(plan.survivors, best.survivors)


@torch.no_grad()
def test_a_cache_holds_what_the_report_says() -> None:
    model = tiny("llama")
    with fewer.Cache(model, EMS(window=8), 0.5) as cache:
        for n in (40, 5, 1, 30):
            out = model(prompt(n, rows=2), past_key_values=cache)
            assert bool(out.logits.isfinite().all())
        assert cache.report.layers[0].kept == ((38, 38),) * 2
