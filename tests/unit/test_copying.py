"""Scores of heads that copy: by hand, against attention written out, and on models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.score import copying
from fewer.score.copying import Copying, best_heads, copied, head_scores
from fewer.signals import Step
from tests.methods.kv import naive
from tests.methods.kv.build import HalfRotary, random_row
from tests.tiny import CONFIGS, tiny


def test_worked_example() -> None:
    """A start token and then a b a b a b: columns 0 | 1 2 | 3 4 | 5 6, period 2.

    The query at 5, an a, has copies at 3 and 1, and what followed them stands at 4 and 2. Its row 1, 2, 3, 4, 5, 6 (in
    21ths) gives echo 4 + 2 and induction 5 + 3. The query at 3 has one copy, at 1: of the row 1, 2, 3, 4 (in tenths)
    echo is 2 and induction 3. The query at 2 has no copy: what would be one is the start token's column.
    """
    rows = torch.zeros(1, 3, 7)
    rows[0, 0, :6] = torch.arange(1.0, 7) / 21
    rows[0, 1, :4] = torch.arange(1.0, 5) / 10
    rows[0, 2, :3] = torch.arange(1.0, 4) / 6
    found = copied(rows, torch.tensor([5, 3, 2]), period=2, first=1)
    torch.testing.assert_close(found.echo, torch.tensor([[6 / 21, 0.2, 0]]))
    torch.testing.assert_close(found.induction, torch.tensor([[8 / 21, 0.3, 0]]))


def test_heads_that_only_copy_score_one() -> None:
    n, period = 12, 3
    echoes, inducts = torch.zeros(n, n), torch.zeros(n, n)
    for i in range(period, n):
        echoes[i, i - period] = inducts[i, i - period + 1] = 1
    found = copied(torch.stack([echoes, inducts])[:, period:], torch.arange(period, n), period)
    assert found.echo.tolist() == [[1] * 9, [0] * 9] and found.induction.tolist() == [[0] * 9, [1] * 9]


def reference(weights: Tensor, period: int, first: int) -> list[list[float]]:
    """Mean echo and induction of each head, from whole attention matrices `(heads, n, n)`."""
    out = []
    for head in weights.double():
        sums, n = [0.0, 0.0], len(head)
        for i in range(first + period, n):
            for j in range(first, n):
                if j < i and (i - j) % period == 0:
                    sums[0] += float(head[i, j])
                    sums[1] += float(head[i, j + 1])
        out.append([x / (n - first - period) for x in sums])
    return out


@pytest.mark.parametrize("cells", [1, 1 << 23])
@pytest.mark.parametrize("first", [0, 1])
def test_the_observer_sees_what_is_written_out(first: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two key-value heads with two query heads each: the better one of each pair counts."""
    monkeypatch.setattr(copying, "BLOCK_CELLS", cells)
    n, period = 20 + first, 5
    row, need = random_row(n), Copying(period, first)
    places, none = torch.arange(n).unsqueeze(0), torch.zeros(1, n, dtype=torch.bool)
    keys = row.keys[None], places.expand(1, 2, n), none.expand(1, 2, n)
    need.start().observe(Step(row.query[None], places, none, lambda: keys, 8**-0.5, None, HalfRotary(8), place=3))
    want = torch.tensor(reference(naive.attention(row.query, row.keys), period, first)).view(2, 2, 2).amax(1)
    torch.testing.assert_close(need.found[3].echo, want[:, 0])
    torch.testing.assert_close(need.found[3].induction, want[:, 1])


@torch.no_grad()
@pytest.mark.parametrize("start", [True, False])
def test_a_models_heads_are_scored_by_the_attention_it_pays(start: bool) -> None:
    model = tiny("llama", attn="eager", bos_token_id=1 if start else None)
    seen: list[Tensor] = []
    read = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = head_scores(model, period=7, seed=5)
    read.remove()
    (ids,) = seen
    text = ids[0, int(start) :]
    assert len(text) == 28 and text.view(4, 7).unique(dim=0).shape == (1, 7) and (not start or int(ids[0, 0]) == 1)
    weights = model(ids, output_attentions=True).attentions
    for layer, rows in enumerate(weights):
        want = torch.tensor(reference(rows[0], 7, int(start))).view(2, 2, 2).amax(1)
        torch.testing.assert_close(found.echo[layer], want[:, 0].float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.induction[layer], want[:, 1].float(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_scored_and_left_as_it_was(family: str) -> None:
    """Sliding-window layers keep what they keep; the others are scored."""
    model: Any = tiny(family)
    found = head_scores(model, period=10)
    layers, heads = (2, 2) if family == "gemma3_text" else (3, 4 if family == "gpt_neox" else 2)
    assert found.echo.shape == found.induction.shape == (layers, heads)
    assert float(found.echo.min()) >= 0 and float((found.echo + found.induction).max()) <= 1
    assert not model.config._attn_implementation.startswith("fewer")


@torch.no_grad()
def test_a_text_is_no_longer_than_the_models_positions() -> None:
    model = tiny("llama", max_position_embeddings=50)
    assert head_scores(model).echo.shape == (3, 2)


def test_the_best_share_of_all_heads() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.2, 0.0]])
    assert best_heads(scores, 0.5).tolist() == [[False, True], [True, True], [False, False]]
    assert best_heads(scores, 0.34).tolist() == [[False, True], [True, False], [False, False]]
    assert int(best_heads(scores, 0.0).sum()) == 0 and int(best_heads(scores, 1.0).sum()) == 6
