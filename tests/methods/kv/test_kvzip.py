"""KVzip: what the model looks at when it repeats its context, checked against a model that shows its attention."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import fewer
from fewer.methods.any.full import Full
from fewer.methods.kv.kvzip import KVzip
from fewer.score import reconstruction
from fewer.score.reconstruction import Instruction, Reconstruction
from fewer.signals import Step
from fewer.types import BudgetError, FewerError, MissingSignal
from tests.adapters.common import FAMILIES, held
from tests.methods.kv.build import HalfRotary, decide, kept, place, random_row, same_alone_and_padded
from tests.tiny import prompt, tiny

ASKED = Instruction((5, 6, 7), (8, 9), (10,))
SMALL = KVzip(chunk=16, previous=3, prompt=ASKED)


def shown(query: Tensor, keys: Tensor, start: int, scaling: float = 1.0) -> Step:
    """Queries (heads, q, d) of one row from position `start` on; keys (h, n, d) of everything up to there."""
    h, n, d = keys.shape
    positions = torch.arange(n).expand(1, h, n)
    q = query.shape[1]
    new = torch.arange(start, start + q)[None]
    parts = keys[None], positions, torch.zeros(1, h, n, dtype=torch.bool)
    return Step(query[None], new, torch.zeros(1, q, dtype=torch.bool), lambda: parts, scaling, None, HalfRotary(d))


def test_worked_example() -> None:
    """One channel, every query 1, no sinks. Two keys ln 1 and ln 3 are repeated as two keys ln 2.

    The first query sees 1, 3, 2 and the second 1, 3, 2, 2: shares 1/6, 3/6 and 1/8, 3/8. The greatest are 1/6 and 1/2.
    Two more keys that are repeated later get shares of their own, 4 and 4 of 4 + 4 + 2 = 10, so 0.4 each; the first two
    are not looked at then.
    """
    observer: Any = Reconstruction(chunk=2, sinks=0).start()
    keys = torch.tensor([[[1.0], [3], [4], [4]]]).log()
    observer.observe(shown(torch.ones(1, 4, 1), keys, 0))
    read = torch.tensor([[[2.0], [2]]]).log()
    observer.observe_probe(shown(torch.ones(1, 2, 1), torch.cat([keys, read], 1), 4))
    torch.testing.assert_close(observer.value(), torch.tensor([[[1 / 6, 1 / 2, 0, 0]]]))
    observer.observe_probe(shown(torch.ones(1, 1, 1), torch.cat([keys, read[:, :1]], 1), 4))
    torch.testing.assert_close(observer.value(), torch.tensor([[[1 / 6, 1 / 2, 0.4, 0.4]]]))


def test_the_authors_scores() -> None:
    """Golden: KVScore._get_score (snu-mllab/KVzip 5d84729, attention/score.py), sink 4, start_idx 4, end_idx 20.

    On random_row(20, seed=5) and, as what is read after it, random_row(18, seed=6) with queries times 3. Its threshold
    at ratio 0.5 keeps 15 of 32, since it drops the last one it counted; ours are its 15 and the next best.
    """
    theirs = [
        [
            0.99029, 0.78904, 0.09552, 0.32097, 0.29604, 0.48834, 0.91843, 0.08034,
            0.03371, 0.08019, 0.08758, 0.70589, 0.85375, 0.47407, 0.49207, 0.21973,
        ],
        [
            0.27317, 0.23891, 0.89427, 0.36174, 0.17481, 0.96744, 0.58183, 0.50705,
            0.33410, 0.24591, 0.06686, 0.36768, 0.81262, 0.03477, 0.08913, 0.03374,
        ],
    ]  # fmt: skip
    row, again = random_row(20, seed=5), random_row(18, seed=6)
    observer: Any = Reconstruction().start()
    observer.observe(shown(row.query[:, :4], row.keys[:, :4], 0))
    observer.observe(shown(row.query[:, 4:], row.keys, 4))
    observer.observe_probe(shown(3 * again.query, torch.cat([row.keys, again.keys], 1), 20, 8**-0.5))
    scores = observer.value()[0]
    torch.testing.assert_close(scores[:, 4:], torch.tensor(theirs), atol=1e-5, rtol=0)
    best = scores[:, 4:].flatten().topk(16).indices
    mine = [sorted((best[best // 16 == head] % 16).tolist()) for head in range(2)]
    others = [[0, 1, 5, 6, 11, 12, 13, 14], [2, 3, 5, 6, 7, 11, 12]]
    spare = [set(head) - set(other) for head, other in zip(mine, others, strict=True)]
    assert sum(map(len, spare)) == 1 and all(set(o) <= set(m) for m, o in zip(mine, others, strict=True))


# --- what is read ---


def texts(need: Reconstruction, lengths: list[int]) -> list[list[list[int]]]:
    """What each row is given to read; row r has tokens 100r, 100r + 1, ..., and padding of -1 in front."""
    longest = max(lengths)
    ids = torch.tensor([[-1] * (longest - n) + [100 * r + i for i in range(n)] for r, n in enumerate(lengths)])
    return [
        [row[mask].tolist() for row, mask in zip(more, real, strict=True)] for more, real in need.inputs(ids, ids >= 0)
    ]


def test_what_the_model_reads() -> None:
    need = Reconstruction(chunk=3, previous=2, prompt=ASKED)
    assert texts(need, [5, 3]) == [
        [[5, 6, 7, 10, 0, 1, 2], [5, 6, 7, 10, 100, 101, 102]],
        [[8, 9, 1, 2, 10, 3, 4], []],
    ]
    assert texts(Reconstruction(chunk=3, previous=2), [7]) == [[[0, 1, 2]], [[1, 2, 3, 4, 5]], [[4, 5, 6]]]


class Words:
    """A tokenizer of words, with a chat template."""

    chat_template: str | None = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<user>{messages[0]['content']}<end><assistant>"

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]


def test_the_published_instruction() -> None:
    method = KVzip.with_prompt(Words(), chunk=100)
    said = ["".join(map(chr, part)) for part in astuple(method.prompt)]
    assert said == [
        "\n\nRepeat the previous context exactly.",
        "\n\nRepeat the part of the previous context exactly, starting with",
        "<end><assistant>",
    ]
    assert method.chunk == 100
    plain = Words()
    plain.chat_template = None
    assert KVzip.with_prompt(plain).prompt.answer == (10,)


# --- against a model that reads on and shows its attention ---


def reference(
    model: PreTrainedModel,
    context: list[int],
    start: int,
    chunk: int,
    previous: int,
    asked: Instruction,
    sinks: int = 4,
) -> list[Tensor]:
    """The scores of context[start:], layer by layer (h, n - start), from the attentions the model itself gives.

    They are over everything it has read, so the shares of the keys that count are scaled up to one.
    """
    found: list[list[Tensor]] = []
    for at in range(start, len(context), chunk):
        piece = context[at : at + chunk]
        lead = [*asked.later, *context[max(start, at - previous) : at]] if at > start else [*asked.first]
        read = [*lead, *asked.answer, *piece]
        past = DynamicCache(config=model.config)
        model(torch.tensor([context]), past_key_values=past)
        out = model(torch.tensor([read]), past_key_values=past, output_attentions=True)
        n = len(context)
        wanted = sorted({*range(min(sinks, n)), *range(at, at + len(piece)), *range(n, n + len(read))})
        first = wanted.index(at)
        layers = []
        for weights in out.attentions:
            share = weights[0, :, :, wanted]
            best = (share / share.sum(-1, keepdim=True)).amax(1)[:, first : first + len(piece)]
            layers.append(best.view(past.layers[0].keys.shape[1], -1, len(piece)).amax(1))
        found.append(layers)
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


class Watch(Full):
    """Keeps everything and gathers what KVzip needs."""

    needs = SMALL.needs  # type: ignore[assignment]


def scores(cache: Any, need: type = Reconstruction) -> list[Tensor]:
    return [
        next(o for n, o in layer.observers.items() if isinstance(n, need)).value() for layer in cache.shared.members
    ]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3_text"])
@pytest.mark.parametrize("n", [1, 3, 16, 40])
def test_scores_are_the_models_own_attention(family: str, n: int) -> None:
    ids = prompt(n)
    expected = reference(tiny(family, attn="eager"), ids[0].tolist(), 0, 16, 3, ASKED)
    for attn in ("sdpa", "eager"):
        model = tiny(family, attn=attn)
        with fewer.Cache(model, Watch(), 1.0) as cache:
            model(ids, past_key_values=cache)
            for ours, theirs in zip(scores(cache), expected, strict=True):
                torch.testing.assert_close(ours[0], theirs, atol=2e-5, rtol=1e-3)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are rated a few at a time; a T x T matrix never is."""
    model, ids = tiny("llama"), prompt(40)
    found = []
    for cells in (1 << 20, 1):
        monkeypatch.setattr(reconstruction, "BLOCK_CELLS", cells)
        with fewer.Cache(model, Watch(), 1.0) as cache:
            model(ids, past_key_values=cache)
            found.append(torch.stack(scores(cache)))
    torch.testing.assert_close(*found)


def test_a_later_turn_is_repeated_by_itself() -> None:
    """Twenty tokens, then eighteen: the old ones keep their scores, and what the model wrote between has none."""
    first, second, eager = prompt(20)[0].tolist(), prompt(18, seed=1)[0].tolist(), tiny("llama", attn="eager")
    model = tiny("llama")
    with fewer.Cache(model, Watch(), 1.0) as cache:
        model(torch.tensor([first]), past_key_values=cache)
        before = scores(cache)
        for token in (3, 4):
            model(torch.tensor([[token]]), past_key_values=cache)
        model(torch.tensor([second]), past_key_values=cache)
        after = scores(cache)
    expected = reference(eager, [*first, 3, 4, *second], 22, 16, 3, ASKED)
    for old, new, theirs in zip(before, after, expected, strict=True):
        assert torch.equal(new[..., :20], old) and not bool(new[..., 20:22].any())
        torch.testing.assert_close(new[0, :, 22:], theirs, atol=2e-5, rtol=1e-3)


def test_scores_stay_with_their_keys_when_the_others_go() -> None:
    """Compressed to a half, then another turn: the survivors' scores are those they had, and only they are held."""
    model, ids = tiny("llama"), prompt(40)
    with fewer.Cache(model, Watch(), 1.0) as cache:
        model(ids, past_key_values=cache)
        everything = scores(cache)
    with fewer.Cache(model, SMALL, 0.5) as cache:
        model(ids, past_key_values=cache)
        for layer, now, then in zip(cache.shared.members, scores(cache), everything, strict=True):
            dense = layer.kept.dense()
            expected = then.gather(-1, dense.positions.clamp(min=0)).masked_fill(dense.padding, 0)
            assert torch.equal(now, expected)
        model(prompt(18, seed=1), past_key_values=cache)
        assert cache.report.kept == 29 / 58
        for layer, now in zip(cache.shared.members, scores(cache), strict=True):
            dense = layer.kept.dense()
            assert bool(((now > 0) == ~dense.padding).all())


# --- the cache it leaves ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [0.5, 0.25, 7])
def test_the_best_of_all_layers_stay_exactly_as_many_as_asked(family: str, keep: float | int) -> None:
    model, ids = tiny(family), prompt(40)
    with fewer.Cache(model, Watch(), 1.0) as cache:
        model(ids, past_key_values=cache)
        rated = scores(cache)
    share = keep if isinstance(keep, int) else int(40 * keep)
    with fewer.Cache(model, SMALL, keep) as cache:
        model(ids, past_key_values=cache)
        places = len(rated) * rated[0].shape[1]
        left = []
        for layer, before in zip(cache.shared.members, rated, strict=True):
            for head, count in enumerate(layer.kept.counts[0]):
                start, end = layer.kept.bounds[0][head]
                positions = layer.kept.positions[start:end].tolist()
                assert positions[:4] == [0, 1, 2, 3] and len(positions) == count
                left += before[0, head, positions[4:]].tolist()
        assert len(left) == (share - 4) * places
        others = sorted(torch.cat([layer[0, :, 4:].flatten() for layer in rated]).tolist(), reverse=True)
        assert sorted(left, reverse=True) == others[: len(left)]
        # what is held is what is reported, and nothing of what was read again
        assert held(cache) <= cache.report.bytes_kept + 200


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_again_leaves_no_trace(family: str) -> None:
    """Keeping everything, every later logit is the plain model's, sliding windows included."""
    model = tiny(family)
    past = DynamicCache(config=model.config)
    plain = [model(ids, past_key_values=past).logits for ids in (prompt(40), prompt(5, seed=1), prompt(1, seed=2))]
    with fewer.Cache(model, SMALL, 1.0) as cache:
        for ids, logits in zip((prompt(40), prompt(5, seed=1), prompt(1, seed=2)), plain, strict=True):
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, logits)
        assert cache.get_seq_length() == 46


def test_rows_of_a_padded_batch_are_rated_as_if_alone() -> None:
    model = tiny("llama")
    rows = [prompt(n, seed=n) for n in (40, 17, 5, 1)]
    ids = torch.cat([torch.nn.functional.pad(row, (40 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (40 - row.shape[1], 0)) for row in rows])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = prompt(6, rows=4, seed=9)
    with fewer.Cache(model, SMALL, 0.5) as batch:
        model(ids, attention_mask=mask, position_ids=places, past_key_values=batch)
        counts = [layer.kept for layer in batch.report.layers]
        after = model(
            more,
            attention_mask=torch.cat([mask, torch.ones_like(more)], 1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(6),
            past_key_values=batch,
        ).logits
    for index, row in enumerate(rows):
        with fewer.Cache(model, SMALL, 0.5) as alone:
            model(row, past_key_values=alone)
            assert [layer.kept[0] for layer in alone.report.layers] == [c[index] for c in counts]
            torch.testing.assert_close(
                model(more[index : index + 1], past_key_values=alone).logits[0], after[index], atol=2e-3, rtol=1e-3
            )


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(KVzip(chunk=50), 0.4, filler=torch.nan)
    same_alone_and_padded(KVzip(chunk=7), 0.2)


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5])
def test_a_budget_below_the_sinks_is_shared_evenly(keep: int) -> None:
    tokens = place(KVzip(), random_row(30))
    plan = decide(KVzip(), keep if keep > 1 else 0.01, tokens)
    if keep <= 4:
        assert plan.counts.tolist() == [[keep, keep]]
        assert all(set(head) <= {0, 1, 2, 3} for head in kept(tokens, plan))
    else:
        assert int(plan.counts.sum()) == 10


def test_under_and_in_line_agree() -> None:
    """One prefill that gathers for several methods gives what compressing in line gives."""
    model, ids = tiny("llama"), prompt(40)
    with fewer.Cache(model, Watch(), 1.0) as full:
        model(ids, past_key_values=full)
        tried = {keep: full.under(SMALL, keep) for keep in (0.5, 0.25)}
        for keep, one in tried.items():
            with fewer.Cache(model, SMALL, keep) as other:
                model(ids, past_key_values=other)
                for a, b in zip(one.shared.members, other.shared.members, strict=True):
                    assert a.kept.counts == b.kept.counts and torch.equal(a.kept.positions, b.kept.positions)
                    torch.testing.assert_close(a.kept.keys, b.kept.keys)
            assert one.report.seconds > 0


def test_generate_goes_on_from_it() -> None:
    model = tiny("llama")
    with fewer.compress(model, SMALL, 0.5) as run:
        model.generate(prompt(40), max_new_tokens=4, do_sample=False)
    assert sum(sum(layer.kept[0]) for layer in run.report.layers) == 6 * 23  # 20 of 40, and 3 that were generated


def test_a_saved_cache_goes_on(tmp_path: Path) -> None:
    model, more = tiny("llama"), prompt(18, seed=1)
    with fewer.Cache(model, SMALL, 0.5) as cache:
        model(prompt(40), past_key_values=cache)
        cache.save(tmp_path / "cache")
        with fewer.Cache.load(model, tmp_path / "cache") as other:
            assert torch.equal(model(more, past_key_values=other).logits, model(more, past_key_values=cache).logits)
            assert [layer.kept for layer in other.report.layers] == [layer.kept for layer in cache.report.layers]


def test_what_cannot_be_done_is_said() -> None:
    model = tiny("llama")
    with (
        pytest.raises(FewerError, match="asks the model about its prompt"),
        fewer.compress(model, KVzip(), 0.5, when="decode"),
    ):
        pass
    embedded = model.get_input_embeddings()(prompt(8))
    with fewer.compress(model, KVzip(), 0.5), pytest.raises(MissingSignal, match="passed inputs_embeds"):
        model(inputs_embeds=embedded)
    tokens = place(KVzip(), random_row(12), protect=range(8))
    with pytest.raises(BudgetError, match="protected"):
        decide(KVzip(), 4, tokens)
