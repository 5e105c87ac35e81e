"""DapQ: what queries at the coming positions would read."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fewer
from fewer.methods.kv.dapq import DapQ, Pseudo, PseudoWindow
from fewer.methods.kv.snapkv import SnapKV
from fewer.signals import Queries, QueryWindow, Step
from fewer.types import FewerError, Tokens
from tests.adapters.emulate import columns, kept_positions
from tests.methods.kv import naive
from tests.methods.kv.build import SIZES, Row, agree, decide, kept, place, random_row, same_alone_and_padded
from tests.tiny import prompt, tiny


def asked(method: DapQ, row: Row, pseudo: Row) -> Tokens:
    """The place after the prompt `row`, where the model has read `pseudo` on top of it."""
    n, p = len(row), len(pseudo)
    both = Row(*(torch.cat([one, two], 1) for one, two in zip(vars(row).values(), vars(pseudo).values(), strict=True)))
    places, none = torch.arange(n + p)[None], torch.zeros(1, n + p, dtype=torch.bool)
    wide = places.expand(1, both.keys.shape[0], -1)
    held = both.keys[None], wide, none.unsqueeze(1).expand_as(wide)
    observer = Pseudo(p).start()
    dim = both.keys.shape[-1]
    observer.observe_probe(Step(pseudo.query[None], places[:, n:], none[:, n:], lambda: held, dim**-0.5, None, None))
    tokens = place(method, row)
    return replace(tokens, signals={Pseudo: observer.value()})


def test_worked_example() -> None:
    """One channel, keys ln 1, 3, 1, two pseudo tokens with queries 1 and keys ln 1 and ln 4, no pooling.

    The first one divides its attention as 1, 3, 1, and 1 for itself: 1/6, 1/2, 1/6. The second sees 4 more: 1/10, 3/10,
    1/10. The means are 8/60, 24/60, 8/60. Of 2 kept, token 1 is one; of the equal others the later one stays.
    """
    keys, new = torch.tensor([[[1.0], [3], [1]]]).log(), torch.tensor([[[1.0], [4]]]).log()
    method = DapQ(count=2, kernel=1)
    tokens = asked(method, Row(torch.ones(1, 3, 1), keys, keys), Row(torch.ones(1, 2, 1), new, new))
    torch.testing.assert_close(method.score(tokens), torch.tensor([[[8.0, 24, 8]]]) / 60)
    assert kept(tokens, decide(method, 2, tokens)) == [[1, 2]]


def reference(row: Row, pseudo: Row, kernel: int, pooling: str) -> torch.Tensor:
    """Loops over heads and tokens, over the whole attention matrix of the prompt and the pseudo tokens."""
    n, (h, groups) = len(row), (row.keys.shape[0], row.query.shape[0] // row.keys.shape[0])
    weights = naive.attention(torch.cat([row.query, pseudo.query], 1), torch.cat([row.keys, pseudo.keys], 1))
    out = torch.zeros(h, n, dtype=torch.float64)
    for head in range(h):
        for j in range(n):
            rated = []
            for g in range(head * groups, (head + 1) * groups):
                seen = weights[g, n:].mean(0)
                near = [float(seen[i]) if 0 <= i < n else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
                rated.append(max(near) if pooling == "max" else sum(near) / kernel)
            out[head, j] = sum(rated) / groups
    return out


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, pooling: Any) -> None:
    row, pseudo, method = random_row(n), random_row(6, seed=9), DapQ(count=6, pooling=pooling)
    tokens, expected = asked(method, row, pseudo), reference(row, pseudo, 5, pooling)
    agree(method.score(tokens)[0], expected)
    assert kept(tokens, decide(method, 0.3, tokens)) == [naive.best(head, -(-3 * n // 10)) for head in expected]


def test_is_snapkv_without_a_window_to_keep() -> None:
    """Where SnapKV's window comes after everything else, both rate everything else alike."""
    row, pseudo = random_row(50), random_row(8, seed=5)
    both = Row(*(torch.cat([one, two], 1) for one, two in zip(vars(row).values(), vars(pseudo).values(), strict=True)))
    snap = SnapKV(window=8)
    agree(DapQ(count=8).score(asked(DapQ(count=8), row, pseudo))[0], snap.score(place(snap, both))[0, :, :50].double())


@pytest.mark.parametrize("filler", [50.0, torch.nan])
def test_padding_changes_nothing(filler: float) -> None:
    same_alone_and_padded(DapQ(count=5), 0.3, filler=filler)


def test_pseudo_tokens_say_the_last_ones_again() -> None:
    """Left padding, right padding, a row shorter than what is asked for (round again), and an empty one."""
    ids = torch.tensor([[9, 9, 1, 2, 3, 4], [5, 6, 7, 8, 9, 9], [9, 9, 9, 9, 1, 2], [9] * 6])
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0] * 6]).bool()
    ((said, there),) = Pseudo(3).inputs(ids, real)
    assert said[:3].tolist() == [[2, 3, 4], [6, 7, 8], [2, 1, 2]]
    assert there.tolist() == [[True] * 3] * 3 + [[False] * 3]
    ((said, there),) = Pseudo(2, content=7).inputs(ids, real)
    assert said.tolist() == [[7, 7]] * 4 and there.any(1).tolist() == [True, True, True, False]


def weights(model: Any, ids: torch.Tensor, content: torch.Tensor) -> list[torch.Tensor]:
    """Attention (heads, p, n + p) of pseudo tokens that a plain model reads after a prompt, for each layer."""
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)
    return [w[0] for w in model(content, past_key_values=full, output_attentions=True).attentions]


@pytest.mark.parametrize("content", ["last", 11])
def test_in_a_model_the_pseudo_tokens_decide(content: Any) -> None:
    """What is kept is the top of the attention that the model pays when it reads on, and nothing of that stays."""
    ids, plain, model = prompt(40), tiny("llama", attn="eager"), tiny("llama")
    said = ids[:, -6:] if content == "last" else torch.full((1, 6), content)
    with torch.no_grad():
        cache = fewer.Cache(model, DapQ(count=6, content=content), keep=10)
        first = model(ids, past_key_values=cache).logits
        assert torch.equal(first, model(ids).logits)
        for layer, rows in enumerate(weights(plain, ids, said)):
            mean = torch.nn.functional.avg_pool1d(rows[..., :40].mean(1), 5, 1, 2).view(2, 2, 40).mean(1)
            assert kept_positions(cache, layer)[0] == [naive.best(head, 10) for head in mean]
        assert cache.get_seq_length() == 40
        assert all(not layer.observers for layer in cache.layers), "the pseudo tokens are forgotten"


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_batch_each_row_reads_its_own(side: str) -> None:
    model, lengths = tiny("llama"), (30, 4, 17)
    ids, real = prompt(30, rows=3), torch.ones(3, 30, dtype=torch.long)
    for row, length in enumerate(lengths):
        gone = slice(0, 30 - length) if side == "left" else slice(length, 30)
        real[row, gone], ids[row, gone] = 0, 0
    together = fewer.Cache(model, DapQ(count=6), keep=0.4)
    with torch.no_grad():
        model(ids, attention_mask=real, position_ids=columns(real).clamp(min=0), past_key_values=together)
        for row in range(3):
            alone = fewer.Cache(model, DapQ(count=6), keep=0.4)
            model(ids[row, real[row].bool()][None], past_key_values=alone)
            for layer in range(3):
                assert kept_positions(together, layer)[row] == kept_positions(alone, layer)[0]


def test_needs_a_prompt() -> None:
    with pytest.raises(FewerError, match="only 'prefill' has"):
        fewer.Cache(tiny("llama"), DapQ(), keep=0.5, when="both")


def test_its_window_is_a_window_of_queries() -> None:
    """The need gives what `Queries` gives of the same tokens, and the keys that go with them."""
    pseudo = random_row(4, seed=2)
    found = asked(DapQ(count=4), random_row(20), pseudo).signal(Pseudo, PseudoWindow)
    last = place(SnapKV(window=4), pseudo).signal(Queries, QueryWindow)
    assert torch.equal(found.window.query, last.query) and torch.equal(found.keys[0], pseudo.keys)
    assert found.window.positions.tolist() == [[20, 21, 22, 23]]
