"""Code token merging: the subtokens of one identifier become one token."""

import inspect
import json.decoder
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from fewer import compress
from fewer.errors import FewerError, FewerWarning, UnknownName
from fewer.methods.vit.code_token_merging import CodeTokenMerging
from fewer.score.lexer import groups as groups_of
from fewer.score.lexer import identifiers
from tests.laws.encoder_battery import LAWS
from tests.methods.vit.build import decide, groups, place

CODE = textwrap.dedent(inspect.getsource(textwrap.TextWrapper._handle_long_word))
SPECIAL = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>", "bos": "<s>", "eos": "</s>"}
OTHER = textwrap.dedent(inspect.getsource(textwrap.shorten))


@cache
def tokenizer() -> Any:
    """Byte-level, like RoBERTa's, and of so few words that most identifiers take several."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(SPECIAL.values())[:5],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(inspect.getsource(json.decoder).splitlines(keepends=True), trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{role}_token": word for role, word in SPECIAL.items()})


def encoder(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 1200, "pad_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    made = BertModel(BertConfig(**sizes)) if kind == "bert" else RobertaModel(RobertaConfig(**sizes))
    return made.eval()


def naive(rows: list[list[int]], keep: int) -> list[list[list[int]]]:
    """Slots of each row, with loops: longest identifiers first, whole, while at least `keep` tokens stay."""
    out = []
    for row in rows:
        members: dict[int, list[int]] = {}
        for i, group in enumerate(row):
            members.setdefault(group if group >= 0 and i else -1 - i, []).append(i)
        slots = {i: [i] for i in range(len(row))}
        for one in sorted(members.values(), key=lambda one: (-len(one), one[0])):
            if len(one) > 1:
                if len(slots) - len(one) + 1 < keep:
                    break
                slots[one[0]] = one
                for i in one[1:]:
                    del slots[i]
        out.append([slots[i] for i in sorted(slots)])
    return out


def test_worked_example() -> None:
    """`wrap_chunks = x`: tokens are <s>, wrap, _, chunks, =, x, </s>, and 1, 2 and 3 spell one name. They become their
    mean, which counts as three, at the place of the first."""
    method = CodeTokenMerging(torch.tensor([[-1, 0, 0, 0, -1, 1, -1]]))
    tokens = place(7, rows=1)
    plan = decide(method, tokens, 2)
    assert groups(plan) == [[0], [1, 2, 3], [4], [5], [6]]
    assert plan.mass is not None and plan.mass.tolist() == [[1, 3, 1, 1, 1]]
    torch.testing.assert_close(plan.apply(tokens.features)[0, 1], tokens.features[0, 1:4].mean(0))


def test_the_longest_merge_first_and_only_whole() -> None:
    """Two identifiers of two and one of three. Beside the first token seven are at most to leave five: the three go
    first, which leaves none for another two; of six to stay only one could go, and no identifier is that short."""
    method = CodeTokenMerging(torch.tensor([[-1, 0, 0, 1, 1, 1, 2, 2]]))
    tokens = place(8, rows=1)
    assert groups(decide(method, tokens, 5)) == [[0], [1], [2], [3, 4, 5], [6], [7]]
    assert groups(decide(method, tokens, 4)) == [[0], [1, 2], [3, 4, 5], [6], [7]]
    assert groups(decide(method, tokens, 2)) == [[0], [1, 2], [3, 4, 5], [6, 7]]
    assert decide(method, tokens, 6).counts.tolist() == [8]


@pytest.mark.parametrize("keep", [2, 20, 33])
@pytest.mark.parametrize("n", [9, 40])
def test_agrees_with_the_reference(n: int, keep: int) -> None:
    """Groups need be neither dense nor next to one another; a protected token that is in one stays out of it."""
    ids = torch.randint(-1, 12, (3, n), generator=torch.Generator().manual_seed(n)) * 3
    ids = ids.masked_fill(ids < 0, -1)
    plan = decide(CodeTokenMerging(ids), place(n, rows=3), keep)
    assert [groups(plan, row) for row in range(3)] == naive(ids.tolist(), keep + 1)


@pytest.mark.parametrize("law", [law for law in LAWS if law in {
    "kept_count_is_exact", "protected_tokens_survive", "keeping_all_is_the_identity", "survivors_keep_their_order",
    "inputs_are_not_modified", "dtype_is_kept", "mass_is_conserved", "restoring_loses_nothing_more",
    "group_constant_input_comes_back", "same_seed_same_plan",
}])  # fmt: skip
def test_obeys_with_groups(law: str) -> None:
    """The laws whose places have as many tokens as the groups."""
    LAWS[law](CodeTokenMerging(torch.randint(-1, 9, (2, 37), generator=torch.Generator().manual_seed(0))))


def test_identifiers_of_python() -> None:
    code = "def get_it(α_β):  # not these words\n    return 'nor these' + α_β.x2\n"
    assert [code[a:b] for a, b in identifiers(code)] == ["def", "get_it", "α_β", "return", "α_β", "x2"]
    windows = code.replace("\n", "\r\n")
    assert [windows[a:b] for a, b in identifiers(windows)] == [code[a:b] for a, b in identifiers(code)]


def test_identifiers_of_other_languages() -> None:
    code = "int get_it(char *s) { return 2x + s->len; } // too"
    assert [code[a:b] for a, b in identifiers(code, "other")] == [
        "int", "get_it", "char", "s", "return", "s", "len", "too",
    ]  # fmt: skip


def test_half_a_statement_is_refused() -> None:
    with pytest.raises(FewerError, match="this is no whole Python"):
        identifiers("call(1, ")
    with pytest.raises(FewerError, match=r"this is no whole Python.*language='other'"):
        identifiers("if x:\n        a = 1\n    b = 2\n")
    with pytest.raises(UnknownName, match="language='java': known are python, other"):
        identifiers("x", "java")


def test_a_token_that_reaches_beyond_a_name_is_in_none() -> None:
    """`self._name` as self, ._, na, me: the second is a dot too. A space before a name is no part of either."""
    spans = identifiers("x = self._name")
    offsets = [(0, 0), (0, 1), (1, 3), (3, 8), (8, 10), (10, 12), (12, 14), (0, 0)]
    assert groups_of("x = self._name", offsets, spans) == [-1, 0, -1, 1, -1, 2, 2, -1]
    assert groups_of("x(name)", [(0, 2), (2, 4), (4, 7)], identifiers("x(name)")) == [-1, 1, -1]


def test_the_standard_library_s_identifiers() -> None:
    """Each group spells a name that stands in the code, and every name that is split, and no more, has a group."""
    words = tokenizer()(CODE, return_offsets_mapping=True)["offset_mapping"]
    found = CodeTokenMerging.for_code(CODE, tokenizer()).groups
    assert found is not None and found.shape == (1, len(words))
    spelled: dict[int, list[tuple[int, int]]] = {}
    for at, group in zip(words, found[0].tolist(), strict=True):
        spelled.setdefault(group, []).append(at)
    names = {CODE[at[0][0] : at[-1][1]].strip() for group, at in spelled.items() if group >= 0}
    assert names >= {"reversed_chunks", "cur_line", "space_left", "break_long_words"}
    assert all(name.isidentifier() for name in names)
    assert all(a[1] == b[0] for group, at in spelled.items() if group >= 0 for a, b in pairwise(at))
    assert max(len(at) for group, at in spelled.items() if group >= 0) > 3


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_on_an_encoder_of_code(kind: str) -> None:
    model, inputs = encoder(kind), tokenizer()([CODE, OTHER], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    method = CodeTokenMerging.for_code([CODE, OTHER], tokenizer(), padding=True)
    with torch.no_grad():
        whole = model(**inputs)
        with compress(model, method, keep=0.1) as run:
            short = model(**inputs)
    merged = method.groups
    assert merged is not None
    for row, (ids, mask) in enumerate(zip(merged.tolist(), inputs["attention_mask"].tolist(), strict=True)):
        names = {i for i in ids if i >= 0}
        assert int((run.mass[row] > 0).sum()) == sum(mask) - sum(i >= 0 for i in ids) + len(names)
        assert float(run.mass[row].sum()) == sum(mask)
    assert 0.3 < run.flops < 0.95
    assert (cosine(whole.pooler_output, short.pooler_output) > 0.8).all()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def test_a_row_is_merged_alike_in_a_batch_and_alone() -> None:
    model, both = encoder("roberta"), [CODE, OTHER]
    out = []
    for texts in (both, [OTHER]):
        inputs = tokenizer()(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        method = CodeTokenMerging.for_code(texts, tokenizer(), padding=True)
        with torch.no_grad(), compress(model, method, keep=0.1) as run:
            out.append(model(**inputs).last_hidden_state[-1])
        kept = int((run.mass[-1] > 0).sum())
        out[-1] = out[-1][:kept]
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)


def test_keep_is_the_least_that_stays() -> None:
    model, inputs = encoder("bert"), tokenizer()(CODE, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    n = inputs["input_ids"].shape[1]
    method = CodeTokenMerging.for_code(CODE, tokenizer())
    with torch.no_grad(), compress(model, method, keep=0.9) as run:
        model(**inputs)
    assert 0.9 * n <= run.mass.shape[1] < 0.95 * n


def test_without_groups_nothing_merges_and_the_host_says_so() -> None:
    model, inputs = encoder("bert"), tokenizer()("x = get_it", return_tensors="pt")
    says = pytest.warns(FewerWarning, match="cannot make the encoder faster")
    with torch.no_grad(), compress(model, "code-token-merging", keep=0.5) as run, says:
        model(input_ids=inputs["input_ids"])
    assert run.mass.shape[1] == inputs["input_ids"].shape[1]


def test_groups_of_another_text_are_refused() -> None:
    with pytest.raises(FewerError, match=r"groups are \(1, 3\) and the tokens \(1, 7\).*texts and options"):
        decide(CodeTokenMerging(torch.tensor([[-1, 0, 0]])), place(7, rows=1), 2)
    with pytest.raises(FewerError, match="pass padding=True"):
        CodeTokenMerging.for_code([CODE, OTHER], tokenizer())
    with pytest.raises(FewerError, match="object does not say where tokens stand"):
        CodeTokenMerging.for_code(CODE, object())
