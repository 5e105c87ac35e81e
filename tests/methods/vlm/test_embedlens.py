from typing import Any

import pytest
import torch

import fewer
from fewer.methods.vlm.embedlens import EmbedLens
from fewer.score.vocabulary import CHUNK, nearest_words
from fewer.signals.visual import Vocabulary
from fewer.types import FewerError, Tokens
from tests.methods.vlm.build import place
from tests.methods.vlm.waves import kept, through, waves
from tests.vlms import FAMILIES


def shown(features: torch.Tensor, words: torch.Tensor) -> Tokens:
    tokens = place(len(features), features=features)
    return Tokens(
        tokens.features, tokens.positions, tokens.padding, tokens.protected, tokens.seen, None, {Vocabulary: words}
    )


def test_what_all_say_is_not_worth_saying() -> None:
    # four words along the axes; three tokens say the first one, the others a word of their own
    x = torch.tensor([[2.0, 0.1, 0, 0], [0, 1, 0, 0.1], [1, 0, 0.2, 0], [0, 0, 1, 0], [3, 0, 0, 0.1]])
    method, tokens = EmbedLens(nearest=1, crowd=0.5), shown(x, torch.eye(4))
    assert method.words(tokens).ids.flatten().tolist() == [0, 1, 0, 2, 0]
    assert method.alive(tokens).tolist() == [False, True, False, True, False]
    assert method.score(tokens)[0].tolist() == pytest.approx([-0.6, 0.8, -0.6, 0.8, -0.6])
    assert kept(method, tokens, 2) == [1, 3]
    assert EmbedLens(nearest=1, crowd=0.6).alive(tokens).all()
    assert EmbedLens(ids=(2,), nearest=1).alive(tokens).tolist() == [True, True, True, False, True]


def naive(x: torch.Tensor, words: torch.Tensor, k: int) -> list[list[int]]:
    out = []
    for token in x:
        near = [float(token @ word / token.norm() / word.norm()) for word in words]
        out.append(sorted(range(len(words)), key=lambda i: -near[i])[:k])
    return out


def test_as_in_plain_python() -> None:
    x, words = waves(20, 8), waves(70, 8)[20:]
    ids = naive(x, words, 3)
    assert EmbedLens().words(shown(x, words)).ids.tolist() == ids
    share = [max(sum(i in other for other in ids) / 20 for i in mine) for mine in ids]
    alive = [float(one <= 0.1) for one in share]
    expected = [a - s for a, s in zip(alive, share, strict=True)]
    assert EmbedLens().score(shown(x, words))[0].tolist() == pytest.approx(expected)


def test_as_the_authors() -> None:
    # find_useless_tokens (llava_llama_token_pruning.py of EIT-NLP/EmbedLens) with target ids 7 and 20
    words, x = waves(50, 8), waves(70, 8)[50:]
    x[:6] = words[7] + 0.3 * x[:6]
    alive = EmbedLens(ids=(7, 20)).alive(shown(x, words))
    assert (~alive).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_long_vocabularies_are_read_in_pieces() -> None:
    words = torch.randn(2 * CHUNK + 5, 4, generator=torch.Generator().manual_seed(0))
    x = words[[3, CHUNK + 1, 2 * CHUNK + 4]] * 2
    found = nearest_words(x, words, 2)
    assert found.ids[:, 0].tolist() == [3, CHUNK + 1, 2 * CHUNK + 4]
    unit = torch.nn.functional.normalize(words, dim=-1)
    near = (torch.nn.functional.normalize(x, dim=-1) @ unit.T).topk(2)
    assert found.ids.tolist() == near.indices.tolist()
    assert nearest_words(x, words[:2], 3).ids.shape == (3, 2)


def test_copies_and_counts() -> None:
    tokens = shown(torch.ones(6, 3), torch.eye(3))
    assert [len(kept(EmbedLens(), tokens, count)) for count in (1, 5)] == [1, 5]
    assert not EmbedLens().alive(tokens).any()


@pytest.mark.parametrize("given", [{"crowd": 0.0}, {"crowd": 1.5}, {"nearest": 0}])
def test_bad_arguments(given: dict[str, Any]) -> None:
    with pytest.raises(FewerError, match=next(iter(given))):
        EmbedLens(**given)


def test_in_a_model() -> None:
    for family in ("llava", "qwen2_vl", "idefics3"):
        through("embedlens", family)


def test_the_model_s_own_words() -> None:
    case = FAMILIES["llava"]()
    seen = []

    class Watching(EmbedLens):
        def score(self, tokens: Tokens) -> torch.Tensor:
            seen.append(tokens.signal(Vocabulary, torch.Tensor))
            return EmbedLens.score(self, tokens)

    with torch.no_grad(), fewer.compress(case.model, Watching(), keep=0.5):
        case.model(**case.inputs([1]))
    assert torch.equal(seen[0], case.model.get_input_embeddings().weight)


def test_a_decoder_says_what_is_missing() -> None:
    with pytest.raises(FewerError, match="Vocabulary, which only a vision-language model has"):
        Vocabulary().start()
