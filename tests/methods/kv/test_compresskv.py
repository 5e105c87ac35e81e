"""CompressKV: the heads that retrieve vote, and layers that lose more keep more."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fewer
from fewer.fit import Fit, fingerprint, save
from fewer.methods.kv.compresskv import CompressKV, shares
from fewer.methods.kv.snapkv import SnapKV
from fewer.score.position import FORCED
from fewer.score.retrieval import STEPS, Needle, head_scores
from fewer.types import Budget, FewerError, Site
from tests.adapters.emulate import kept_positions
from tests.methods.kv import naive
from tests.methods.kv.build import SIZES, Row, agree, decide, kept, place, random_row, same_alone_and_padded
from tests.tiny import prompt, tiny


def fit(heads: list[list[float]], errors: list[float], model: str = "") -> Fit:
    return Fit("compresskv", model, {"heads": torch.tensor(heads), "errors": torch.tensor(errors)})


def one_layer(heads: int = 4, **settings: Any) -> CompressKV:
    """Heads rank from the last to the first."""
    return CompressKV(fit([[float(head) for head in range(heads)]], [1.0]), **settings)


def test_worked_example() -> None:
    """One channel, queries 1 and 2 heads on a key-value head each, keys ln 1, 3, 1, 1 for the first, ln 2, 1, 1, 1 for
    the second, which alone votes; a window of one and no pooling.

    The last query's attention in the second head is in proportion to 2, 1, 1, 1: 2/5 and two times 1/5 before the
    window. Both key-value heads get these scores, so with 2 kept both keep token 0, which the first would have dropped.
    """
    keys = torch.tensor([[[1.0], [3], [1], [1]], [[2], [1], [1], [1]]]).log()
    method = one_layer(2, window=1, kernel=1, voters=1)
    tokens = place(method, Row(torch.ones(2, 4, 1), keys, keys))
    torch.testing.assert_close(method.score(tokens), torch.tensor([[[0.4, 0.2, 0.2, FORCED]] * 2]))
    assert kept(tokens, decide(method, 2, tokens)) == [[0, 3]] * 2


def reference(row: Row, voters: list[int], window: int, kernel: int) -> Tensor:
    """Votes `(n,)`, token by token; +inf in the window."""
    n, weights = len(row), naive.attention(row.query, row.keys)
    before, out = max(n - window, 0), torch.full((n,), torch.inf, dtype=torch.float64)
    for j in range(before):
        votes = []
        for head in voters:
            seen = weights[head, before:].mean(0)
            votes.append(sum(float(seen[i]) for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < before))
        out[j] = sum(votes) / kernel / len(voters)
    return out


@pytest.mark.parametrize("voters", [1, 3, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, voters: int) -> None:
    row, method = random_row(n, heads=4), one_layer(voters=voters, window=6)
    tokens = place(method, row)
    expected = reference(row, [3, 2, 1, 0][:voters], 6, 5).expand(2, n)
    agree(method.score(tokens)[0], expected)
    assert kept(tokens, decide(method, 0.5, tokens)) == [
        naive.best(head, -(-n // 2) if n > 6 else n) for head in expected
    ]


def test_where_every_head_votes_it_is_snapkv_with_one_set_for_all() -> None:
    row = random_row(50)
    ours, theirs = (method.score(place(method, row)) for method in (one_layer(window=8), SnapKV(window=8)))
    agree(ours[0, 0], theirs[0].mean(0).double())
    assert torch.equal(ours[0, 0], ours[0, 1])


@pytest.mark.parametrize("filler", [50.0, torch.nan])
def test_padding_changes_nothing(filler: float) -> None:
    same_alone_and_padded(one_layer(), 0.3, filler=filler)


# --- budgets of layers ---


def test_shares_by_hand() -> None:
    """Of 5 * 64 tokens 5 * 32 are sure; the other 160 go by error: 8, 64, 24, 48, 16, exact at once.

    Of 4 * 100, 272 go by error: 34.72, 276.8, 40.16 and 48.32 are 35, 277, 40 and 48, which is 400. With at most 150 a
    layer, 127 are over; the others take 42 each, and that of the greatest error the one that is left.
    """
    assert shares([0.05, 0.4, 0.15, 0.3, 0.1], 5 * 64, 32, 192) == [40, 96, 56, 80, 48]
    assert shares([0.01, 0.9, 0.03, 0.06], 4 * 100, 32, 300) == [35, 277, 40, 48]
    assert shares([0.01, 0.9, 0.03, 0.06], 4 * 100, 32, 150) == [77, 150, 82, 91]


def test_the_authors_shares() -> None:
    """Golden: error_aware_layer_budget_allocation (TUDa-HWAI/CompressKV e8af510, longbench/pred_compresskv.py)."""
    errors = [0.31, 0.02, 0.11, 0.07, 0.23, 0.005, 0.155, 0.1]
    assert shares(errors, 8 * 50, 32, 150) == [77, 35, 48, 42, 65, 33, 54, 46]
    assert shares(errors, 8 * 333, 32, 999) == [778, 80, 297, 201, 586, 44, 405, 273]
    assert shares(errors, 8 * 33, 32, 40) == [34, 32, 33, 33, 34, 32, 33, 33]
    assert shares([0.01, 0.9, 0.03, 0.06], 4 * 100, 32, 150) == [77, 150, 82, 91]


@pytest.mark.parametrize("keep", [1, 5, 20, 33, 64, 100, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("n", [3, 9, 60, 130])
def test_layers_share_exactly_the_budget(keep: Any, n: int) -> None:
    """At least 32 or the even share; at most three even shares, or all there is; the same at every key-value head."""
    method = CompressKV(fit([[1.0, 2, 3, 4]] * 4, [0.7, 0.05, 0.2, 0.05]))
    counts = []
    for layer in range(4):
        tokens = place(method, random_row(n, seed=layer), site=Site(layer, 4))
        plan = decide(method, keep, tokens)
        assert len(set(plan.counts[0].tolist())) == 1
        counts.append(int(plan.counts[0, 0]))
    budget = Budget.parse(keep).count(n) if n > 8 else n
    assert sum(counts) == 4 * budget and all(min(32, budget) <= count <= min(3 * budget, n) for count in counts)
    if 32 < budget < n:
        assert counts[0] == max(counts) > budget


def test_the_authors_selection() -> None:
    """Golden: compresskvCluster.update_kv (TUDa-HWAI/CompressKV e8af510, methods/compresskv/snapkv_utils.py).

    On random_row(60, seed=5, heads=8) with queries times 2; window 8, kernel 5, first_k 4, for layers that keep 24, 14
    and 22 and whose heads rank 5 0 3 7, 2 6 1 4 and 7 6 5 4; every key-value head keeps these, before the window.
    """
    row = random_row(60, seed=5, heads=8)
    row = Row(row.query * 2, row.keys, row.values)
    expected = [
        [8, 11, 12, 13, 14, 15, 16, 17, 19, 22, 23, 24, 25, 26, 27, 28],
        [19, 22, 32, 34, 35, 43],
        [8, 9, 10, 11, 12, 15, 16, 17, 18, 19, 21, 34, 35, 36],
    ]
    for best, count, before in zip([[5, 0, 3, 7], [2, 6, 1, 4], [7, 6, 5, 4]], [24, 14, 22], expected, strict=True):
        method = CompressKV(fit([[float(head in best) for head in range(8)]], [1.0]))
        tokens = place(method, row)
        assert kept(tokens, decide(method, count, tokens)) == [[*before, *range(52, 60)]] * 2


# --- in a model, and its fit ---


def test_wants_a_fit_and_says_how_to_get_one(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(FewerError, match="fewer fit compresskv"):
        CompressKV().score(place(CompressKV(), random_row(20)))
    with pytest.raises(FewerError, match="has to be fitted to the model first"):
        fewer.Cache(model, "compresskv", keep=0.5)
    with pytest.raises(FewerError, match="fitted to another model"):
        fewer.Cache(model, one_layer(), keep=0.5)
    with pytest.raises(FewerError, match="layer 1 is not in a fit of 1 layers"):
        one_layer().score(place(one_layer(), random_row(20), site=Site(1, 3)))
    save(fit([[1.0]], [1.0]), tmp_path / "fit")
    assert CompressKV.load(tmp_path / "fit", window=4) == CompressKV(fit([[1.0]], [1.0]), window=4)


def test_in_a_model() -> None:
    """All heads of a layer keep the same tokens, layers as many as their errors say, and the total is the budget."""
    model, ids = tiny("llama"), prompt(120)
    made = fit([[4.0, 3, 2, 1], [1, 2, 3, 4], [1, 3, 2, 4]], [0.5, 0.2, 0.3], fingerprint(model))
    with torch.no_grad(), fewer.Cache(model, CompressKV(made, voters=2), keep=50) as cache:
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    found = [kept_positions(cache, layer)[0] for layer in range(3)]
    assert all(head == heads[0] for heads in found for head in heads)
    assert [len(heads[0]) for heads in found] == shares([0.5, 0.2, 0.3], 150, 32, 120)


@cache
def models() -> tuple[Any, Any]:
    """The same weights twice: as it comes, and with attention that can be looked at."""
    return tiny("llama", num_hidden_layers=2), tiny("llama", num_hidden_layers=2, attn="eager")


@torch.no_grad()
def plainly(ids: Tensor) -> tuple[list[int], list[list[Tensor]], DynamicCache]:
    """What a plain model says after this prompt, and what its heads look at in each step, layer by layer."""
    model, full = models()[1], DynamicCache(config=models()[1].config)
    model(ids[:, :-1], past_key_values=full)
    following, said, seen = ids[:, -1:], [], []
    for _ in range(STEPS):
        out = model(following, past_key_values=full, output_attentions=True)
        following = out.logits[:, -1].argmax(-1, keepdim=True)
        said.append(int(following))
        seen.append([weights[0, :, 0] for weights in out.attentions])
    return said, seen, full


@cache
def needles() -> list[Needle]:
    """Random prompts, whose right answer is what the model says after them; of the last one it is something else."""
    out = []
    for seed in range(3):
        ids = prompt(45, seed=seed)
        out.append(Needle(ids, 5, 40, torch.tensor(plainly(ids)[0][:6])))
    return [*out[:2], Needle(out[2].prompt, 5, 40, torch.tensor([1, 1, 1, 0]))]


def test_head_scores_are_attention_to_the_needle() -> None:
    """Against a plain model's attention weights, step by step; the answer that is wrong does not count."""
    expected = torch.zeros(2, 4)
    for needle in needles()[:2]:
        said, seen, _ = plainly(needle.prompt)
        inside = set(needle.prompt[0, 5:40].tolist())
        assert any(token in inside for token in said) and not all(token in inside for token in said)
        for token, layers in zip(said, seen, strict=True):
            for layer, weights in enumerate(layers):
                expected[layer] += weights[:, 5:40].sum(-1) / 2 * (token in inside)
    scores, found = head_scores(models()[0], needles())
    assert found == 2
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_an_answer_counts_from_more_than_half_of_its_tokens_on() -> None:
    needle = Needle(prompt(5), 1, 3, torch.tensor([3, 3, 4, 5]))
    assert needle.found([5, 9, 3, 3]) and needle.found([3, 4, 5])
    assert not needle.found([3, 9, 5]) and not needle.found([5, 5, 5, 5])


def test_fit_to_a_model() -> None:
    """Errors against a plain model's: its weights, without those of tokens that 32 of its own votes would drop."""
    model, said_so = models()[0], []
    made = CompressKV.fit_to(model, needles(), tick=lambda what, share: said_so.append(share))
    assert made.method == "compresskv" and made.model == fingerprint(model)
    assert made.notes == {"needles found": "2 of 3"} and said_so == sorted(said_so)
    heads, errors = made.tensors["heads"], torch.zeros(2)
    for needle in needles():
        _, seen, full = plainly(needle.prompt)
        watched = fewer.Cache(model, CompressKV(fit(heads.tolist(), [0.5, 0.5], made.model)), keep=32)
        with torch.no_grad():
            model(needle.prompt[:, :-1], past_key_values=watched)
        for layer in range(2):
            kept_here = kept_positions(watched, layer)[0][0]
            project = models()[1].model.layers[layer].self_attn.o_proj.weight
            for step in seen:
                weights, n = step[layer], step[layer].shape[-1]
                stays = torch.tensor([j in kept_here or j >= 44 for j in range(n)])
                values = full.layers[layer].values[0, :, :n].repeat_interleave(2, 0)
                outs = [
                    project @ (share.unsqueeze(1) @ values).flatten()
                    for share in (weights, weights * stays / (weights * stays).sum(-1, keepdim=True))
                ]
                errors[layer] += (outs[1] - outs[0]).norm() / (outs[0].norm() + 1e-5)
    torch.testing.assert_close(made.tensors["errors"], (errors / errors.sum()).detach(), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_fitted_to() -> None:
    with pytest.raises(FewerError, match="finds none of 1 needles"):
        CompressKV.fit_to(models()[0], needles()[2:])
    short = prompt(20)
    with pytest.raises(FewerError, match="take prompts that are longer"):
        CompressKV.fit_to(models()[0], [Needle(short, 3, 9, torch.tensor(plainly(short)[0][:6]))])
