"""KVzap: small heads that predict what KVzip would find, and how they are fitted."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fewer
from fewer.fit import Fit, fingerprint, save
from fewer.methods.any.full import Full
from fewer.methods.kv.kvzap import FLOOR, KVzap, _pairs
from fewer.score.reconstruction import UNASKED
from fewer.score.surrogate import CEILING, Predicted, explained, fit_heads, predict, ridge, train
from fewer.signals import Step
from fewer.types import FewerError
from tests.adapters.common import FAMILIES, held
from tests.methods.kv.test_kvzip import reference, scores
from tests.tiny import prompt, tiny


def line(model: PreTrainedModel, seed: int = 0) -> Fit:
    """A fit of random linear heads."""
    layers = model.config.num_hidden_layers
    h = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(layers, h, model.config.hidden_size, generator=draw) * 0.2
    return Fit("kvzap", fingerprint(model), {"weight": weight, "bias": torch.full((layers, h), -3.0)})


def step(hidden: Tensor, start: int = 0, total: int | None = None) -> Step:
    """One forward of one row at the first of the layers; two key-value heads of one channel."""
    q = hidden.shape[1]
    total = start + q if total is None else total
    parts = torch.zeros(1, 2, total, 1), torch.zeros(1, 2, total, dtype=torch.long), torch.zeros(1, 2, total) > 0
    places = torch.arange(start, start + q)[None]
    return Step(torch.zeros(1, 2, q, 1), places, places < 0, lambda: parts, 1.0, None, None, hidden=hidden)


def test_worked_example() -> None:
    """Two hidden features, two key-value heads: head 0 predicts x - y - 1 and head 1 predicts 2y - 6.

    For (1, 3), (2, 0), (0, 1): -3, 1, -2 and 0, -6, -4. Logarithms of shares are below 0: 1 and 0 become the ceiling.
    """
    tensors = {"weight": torch.tensor([[[1.0, -1], [0, 2]]]), "bias": torch.tensor([[-1.0, -6]])}
    observer: Any = Predicted(Fit("kvzap", "", tensors)).start()
    hidden = torch.tensor([[[1.0, 3], [2, 0], [0, 1]]])
    observer.observe(step(hidden[:, :2]))
    torch.testing.assert_close(observer.value(), torch.tensor([[[-3.0, CEILING], [CEILING, -6]]]))
    observer.observe(step(hidden[:, 2:], 2))
    torch.testing.assert_close(observer.value(), torch.tensor([[[-3.0, CEILING, -2], [CEILING, -6, -4]]]))
    observer.observe(step(hidden[:, :1], 5, 6))  # two tokens came in between that nobody was shown
    assert observer.value()[0, 0].tolist() == [-3, pytest.approx(CEILING), -2, 0, 0, -3]


def test_a_head_with_a_hidden_layer() -> None:
    """gelu(x) = x * Phi(x): at 1 it is 0.841345, at 0 it is 0; one feature times 2, and two features of it added."""
    head = {
        "inner": torch.tensor([[1.0], [0.0]]), "inner_bias": torch.zeros(2),
        "weight": torch.tensor([[2.0, 5.0]]), "bias": torch.tensor([-4.0]),
    }  # fmt: skip
    torch.testing.assert_close(predict(head, torch.tensor([[1.0]])), torch.tensor([[2 * 0.8413447 - 4]]))


# --- fitting ---


def test_explained_variance() -> None:
    """Of 1, 2, 3, 6 with mean 3 the spread is 4 + 1 + 0 + 9 = 14; predictions off by 1 each miss 4 of it."""
    true = torch.tensor([[[1.0], [2], [3], [6]]])
    assert explained(true + 1, true).tolist() == [pytest.approx(1 - 4 / 14)]
    assert explained(true, true).tolist() == [1]


def data(n: int = 300, layers: int = 2, size: int = 6, heads: int = 3) -> tuple[Tensor, Tensor]:
    """Features of very different sizes and means, and targets that are a line of them with noise."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(layers, n, size, generator=draw) * torch.tensor([1e-2, 1, 5, 30, 1, 2]) + 3
    weight = torch.randn(layers, heads, size, generator=draw) / torch.tensor([1e-2, 1, 5, 30, 1, 2])
    return x, x @ weight.mT - 7 + 0.1 * torch.randn(layers, n, heads, generator=draw)


def test_ridge_is_the_textbooks() -> None:
    """Least squares on the standardised features with sqrt(strength * n) appended as further samples of zero."""
    x, y = data()
    head = ridge(x, y, strength=0.5)
    for layer in range(2):
        z = (x[layer] - x[layer].mean(0)) / x[layer].std(0)
        more = torch.cat([z, (0.5 * len(z)) ** 0.5 * torch.eye(6)])
        target = torch.cat([y[layer] - y[layer].mean(0), torch.zeros(6, 3)])
        expected = z @ torch.linalg.lstsq(more, target).solution + y[layer].mean(0)
        torch.testing.assert_close(predict(head, x)[layer], expected, atol=1e-3, rtol=1e-3)
    assert bool((explained(predict(ridge(x, y, strength=0.01), x), y) > 0.99).all())


def test_the_better_heads_are_taken() -> None:
    x, y = data(400)
    heads, r2 = fit_heads(x, y, 60, seed=0, width=8, epochs=2)
    assert "inner" not in heads and r2["linear"].mean() > r2["mlp"].mean()
    bent = (y - y.mean(1, keepdim=True)).abs()
    heads, r2 = fit_heads(x, bent, 60, seed=0, width=32, epochs=60)
    assert "inner" in heads and r2["mlp"].mean() > r2["linear"].mean() + 0.2
    torch.testing.assert_close(r2["mlp"], explained(predict(heads, x[:, 340:]), bent[:, 340:]))


def test_training_is_the_same_for_the_same_seed() -> None:
    x, y = data(100)
    one, same, other = (train(x, y, seed=seed, width=8, epochs=3) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["weight"], other["weight"])
    assert not any(tensor.requires_grad for tensor in one.values())


def test_pairs_are_the_models_hidden_states_and_kvzips_scores() -> None:
    model, ids = tiny("llama"), prompt(20)
    hidden, logs = _pairs(model, ids)
    expected = model.model(ids, output_hidden_states=True).hidden_states
    shares = reference(tiny("llama", attn="eager"), ids[0].tolist(), 0, 2048, 8, UNASKED)
    for layer in range(3):
        states = model.model.layers[layer].input_layernorm(expected[layer])[0, 4:]
        torch.testing.assert_close(hidden[layer], states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logs[layer].T, shares[layer][:, 4:].clamp(min=FLOOR).log(), atol=1e-3, rtol=1e-3)


def test_a_fit_says_how_good_it_is_and_is_the_same_twice(tmp_path: Path) -> None:
    model, said = tiny("llama"), []
    contexts = [prompt(n, seed=n) for n in (40, 50, 30)]
    fit = KVzap.fit_to(model, contexts, tick=lambda what, share: said.append(share))
    assert fit == KVzap.fit_to(model, contexts) and fit.method == "kvzap" and fit.model == fingerprint(model)
    assert fit.notes["fitted on"] == "108 tokens of 3 contexts, 18 of them held out"
    assert "linear" in fit.notes["heads"] and "mlp" in fit.notes["heads"] and "R2 of layer 2" in fit.notes
    assert said == sorted(said) and said[-1] == 1.0
    save(fit, tmp_path / "fit")
    assert KVzap.load(tmp_path / "fit", window=5) == KVzap(fit, 5)
    with pytest.raises(FewerError, match="a context of 4 tokens is nothing to learn from"):
        KVzap.fit_to(model, [prompt(4)])


def test_heads_learn_what_the_model_looks_at() -> None:
    """Random tokens in a random model say little, yet more than nothing: held-out scores are predicted above chance."""
    model = tiny("gpt_neox")
    r2 = KVzap.fit_to(model, [prompt(60, seed=i) for i in range(12)]).notes["heads"]
    assert max(float(part.split()[-1]) for part in r2.split(", ")) > 0.1


# --- at work ---


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma3_text", "gpt_neox")])
def test_scores_are_predicted_from_what_each_layer_is_given(family: str) -> None:
    model, ids = tiny(family), prompt(30)
    fit = line(model)
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: seen.__setitem__(m.layer_idx, kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with fewer.Cache(model, KVzap(fit), 1.0) as cache:
        model(ids, past_key_values=cache)
        for layer, ours in enumerate(scores(cache, Predicted)):
            expected = (seen[layer] @ fit.tensors["weight"][layer].T + fit.tensors["bias"][layer]).clamp(max=CEILING)
            torch.testing.assert_close(ours, expected.mT, atol=1e-4, rtol=1e-4)
        assert not cache.shared.host.hidden, "nothing of the hidden states is held on to"
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("keep", [0.5, 0.25, 2])
def test_the_best_stay_exactly_as_many_as_asked(keep: float | int, across: bool) -> None:
    model, ids = tiny("llama"), prompt(40)
    method = KVzap(line(model), window=3, across=across)
    with fewer.Cache(model, method, 1.0) as cache:
        model(ids, past_key_values=cache)
        rated = scores(cache, Predicted)
    share = keep if isinstance(keep, int) else int(40 * keep)
    with fewer.Cache(model, method, keep) as cache:
        model(ids, past_key_values=cache)
        assert cache.report.kept == share / 40
        counts = [count for layer in cache.report.layers for count in layer.kept[0]]
        assert (across and keep != 2) or set(counts) == {share}
        for layer, before in zip(cache.shared.members, rated, strict=True):
            for head in range(2):
                start, end = layer.kept.bounds[0][head]
                positions = layer.kept.positions[start:end].tolist()
                others = before[0, head, 4:37].topk(max(0, end - start - 7)).indices.sort().values + 4
                expected = [0, 1, 2, 3, *others.tolist(), 37, 38, 39] if share > 2 else [0, 1]  # the first go last
                assert positions == expected
        assert held(cache) <= cache.report.bytes_kept + sum(t.nbytes for t in method.fit.tensors.values()) + 200


def test_generating_at_a_fixed_size() -> None:
    """Prompt 40 to 20 of it; then every 4 steps what is there goes back to a half of all that was read."""
    model = tiny("llama")
    with fewer.compress(model, KVzap(line(model), window=3), 20, when="both", every=4) as run:
        model.generate(prompt(40), max_new_tokens=14, do_sample=False)
    assert run.cache.get_seq_length() == 53
    assert sum(sum(layer.kept[0]) for layer in run.report.layers) == 6 * 21
    for layer in run.cache.shared.members:
        dense = layer._dense()
        for head in range(2):
            there = dense.positions[0, head][~dense.padding[0, head]].tolist()
            assert there[:4] == [0, 1, 2, 3] and there[-4:] == [49, 50, 51, 52]  # sinks, window and the last step


def test_what_was_read_unobserved_stays_at_the_next_turn() -> None:
    model = tiny("llama")
    with fewer.Cache(model, KVzap(line(model)), 20) as cache:
        model(prompt(40), past_key_values=cache)
        for token in (3, 4, 5):
            model(torch.tensor([[token]]), past_key_values=cache)
        model(prompt(10, seed=1), past_key_values=cache)
        for layer in cache.shared.members:
            assert bool((layer.kept.positions.unsqueeze(1) == torch.tensor([40, 41, 42])).sum(0).eq(2).all())


def test_rows_of_a_padded_batch_are_rated_as_if_alone() -> None:
    model = tiny("llama")
    method = KVzap(line(model))
    rows = [prompt(n, seed=n) for n in (40, 17, 5)]
    ids = torch.cat([torch.nn.functional.pad(row, (40 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (40 - row.shape[1], 0)) for row in rows])
    batch = method_kept(model, method, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for index, row in enumerate(rows):
        assert method_kept(model, method, row)[0] == batch[index]


def method_kept(model: Any, method: KVzap, ids: Tensor, **call: Any) -> list[list[list[int]]]:
    """The positions that every head of every layer keeps, row by row, over two turns and some steps."""
    with fewer.Cache(model, method, 0.5, when="both", every=2) as cache:
        model(ids, past_key_values=cache, **call)
        mask = call.get("attention_mask", torch.ones_like(ids))
        for n, seed in ((6, 7), (1, 8), (1, 9), (1, 10)):
            more = prompt(n, seed=seed).expand(len(ids), n)
            places = mask.sum(1, keepdim=True) + torch.arange(n)
            mask = torch.cat([mask, torch.ones_like(more)], 1)
            model(more, attention_mask=mask, position_ids=places, past_key_values=cache)
        found: list[list[list[int]]] = [[] for _ in ids]
        for layer in cache.shared.members:
            dense = layer._dense()
            for row in range(len(ids)):
                for head in range(2):
                    found[row].append(dense.positions[row, head][~dense.padding[row, head]].tolist())
    return found


def test_a_copy_goes_on_as_the_cache_does() -> None:
    model = tiny("llama")
    with fewer.Cache(model, KVzap(line(model)), 0.5, when="both", every=2) as cache:
        model(prompt(40), past_key_values=cache)
        with deepcopy(cache) as other:
            for more in (prompt(1, seed=1), prompt(1, seed=2), prompt(5, seed=3)):
                assert torch.equal(model(more, past_key_values=cache).logits, model(more, past_key_values=other).logits)
        for index in (torch.tensor([0, 0]), torch.tensor([1])):
            cache.reorder_cache(index)
        model(prompt(5, seed=4), past_key_values=cache)


class Watch(Full):
    needs: Any = frozenset()


def test_under_and_in_line_agree() -> None:
    model, ids = tiny("llama"), prompt(40)
    method, watch = KVzap(line(model)), Watch()
    object.__setattr__(watch, "needs", method.needs)
    with fewer.Cache(model, watch, 1.0) as full:
        model(ids, past_key_values=full)
        one = full.under(method, 0.25)
        with fewer.Cache(model, method, 0.25) as other:
            model(ids, past_key_values=other)
            for a, b in zip(one.shared.members, other.shared.members, strict=True):
                assert a.kept.counts == b.kept.counts and torch.equal(a.kept.positions, b.kept.positions)


def test_a_saved_cache_goes_on_and_brings_its_fit(tmp_path: Path) -> None:
    model = tiny("llama")
    with fewer.Cache(model, KVzap(line(model)), 0.5) as cache:
        model(prompt(40), past_key_values=cache)
        cache.save(tmp_path / "cache")
        with fewer.Cache.load(model, tmp_path / "cache") as other:
            assert other.shared.policy.method == KVzap(line(model))
            for more in (prompt(1, seed=2), prompt(18, seed=1)):
                assert torch.equal(model(more, past_key_values=other).logits, model(more, past_key_values=cache).logits)
            assert [layer.kept for layer in other.report.layers] == [layer.kept for layer in cache.report.layers]


def test_what_cannot_be_done_is_said() -> None:
    model = tiny("llama")
    for method, message in (
        (KVzap(), "KVzap has to be fitted to the model first"),
        (KVzap(line(tiny("qwen2"))), "was fitted to another model"),
    ):
        with pytest.raises(FewerError, match=message), fewer.compress(model, method, 0.5):
            pass
    with (
        fewer.compress(model, KVzap(line(model)), 0.5, when="decode", every=2),
        pytest.raises(FewerError, match="use when='both'"),
    ):
        model.generate(prompt(40), max_new_tokens=5, do_sample=False)
