"""Counting as the reader of a text will: encodings of bytes, tokenizers of transformers, functions, and none."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fewer
from fewer.prompts.counting import Counter, _named, counter
from fewer.types import FewerError, UnknownName
from tests.prompts.texts import texts
from tests.readers import bytes_tokenizer


class Encoding:
    """As tiktoken's: pieces of bytes, which may end in the middle of a character."""

    name = "two-bytes"

    def __init__(self, size: int = 2) -> None:
        self.size = size

    def encode_ordinary(self, text: str) -> list[int]:
        data = text.encode()
        return list(range(0, len(data), self.size)) and [
            int.from_bytes(b"\x01" + data[i : i + self.size], "big") for i in range(0, len(data), self.size)
        ]

    def decode_tokens_bytes(self, ids: list[int]) -> list[bytes]:
        return [i.to_bytes((i.bit_length() + 7) // 8, "big")[1:] for i in ids]


@given(texts)
def test_an_encoding_of_bytes(text: str) -> None:
    for size in (1, 2, 3, 5):
        made = counter(Encoding(size))
        assert made.name == "two-bytes" and made.count(text) == -(-len(text.encode()) // size)
        assert made.where is not None
        where = made.where(text)
        assert where.shape == (made.count(text), 2)
        assert (where[:, 0] <= where[:, 1]).all() and (np.diff(where, axis=0) >= 0).all()
        if text:
            assert where[0, 0] == 0 and where[-1, 1] == len(text) == made.ends(text)[-1]


def test_where_the_pieces_of_a_character_are() -> None:
    made = counter(Encoding(1))
    assert made.where is not None
    assert made.where("aé€").tolist() == [[0, 1], [1, 2], [2, 2], [2, 3], [3, 3], [3, 3]]


@given(texts)
def test_a_tokenizer_of_transformers(text: str) -> None:
    made = counter(bytes_tokenizer())
    assert made.count(text) == len(text.encode()) == len(made.ends(text))


def test_one_without_offsets_is_asked_for_ids() -> None:
    class Slow:
        name_or_path = "slow"

        def convert_ids_to_tokens(self) -> None: ...

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert options == {"add_special_tokens": False, "verbose": False}
            return {"input_ids": [0] * len(text.split())}

    made = counter(Slow())
    assert (made.name, made.count("a b c"), made.ends("a b c").tolist()) == ("slow", 3, [2, 4, 5])


def test_special_tokens_are_not_counted() -> None:
    inner = Tokenizer(models.WordLevel({"[CLS]": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    made = counter(PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="[CLS]"))  # noqa: S106
    assert made.count("a a b") == 3 and made.ends("a a b").tolist() == [1, 3, 5]


def test_a_tokenizer_that_cuts_or_pads_cannot_count() -> None:
    for switch in ("enable_truncation", "enable_padding"):
        tokenizer = bytes_tokenizer()
        getattr(tokenizer.backend_tokenizer, switch)(*([4] if "trunc" in switch else []))
        with pytest.raises(FewerError, match="truncation or padding"):
            counter(tokenizer)


def test_a_function_counts() -> None:
    def words(text: str) -> int:
        return len(text.split())

    made = counter(words)
    assert (made.name, made.count("a b"), made.ends("a b c d").tolist()) == ("words", 2, [2, 4, 6, 7])
    assert counter(made) is made and counter("characters").count("e\u0301") == 2
    done = fewer.compress_prompt("a b c d", "truncation", tokens=2, tokenizer=words)
    assert (done.text, done.tokenizer) == ("a b", "words")


@pytest.mark.parametrize("bad", [2.5, None, "3", -1, True])
def test_a_function_that_gives_no_count_is_refused(bad: object) -> None:
    with pytest.raises(FewerError, match="gave"):
        fewer.compress_prompt("a b c d", "truncation", tokens=2, tokenizer=lambda text: bad)


@pytest.mark.parametrize("name", ["no/such-tokenizer-here", "cl100k_bas", "/nowhere/at/all", "", "gpt 4"])
def test_an_unknown_name_says_what_is_known(name: str) -> None:
    with pytest.raises(UnknownName, match=r"there is no tokenizer .* known are default, minilm, characters"):
        counter(name)


@pytest.mark.parametrize("content", ["not json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Nope"}}'])
def test_a_broken_file_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownName, match="there is no tokenizer"):
        counter(str(tmp_path))


def test_no_tokenizer_at_all() -> None:
    for bad in (3, 2.5, ["characters"], object()):
        with pytest.raises(UnknownName, match="neither a name"):
            counter(bad)


def test_a_table_that_tiktoken_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError("no network")

    fake = SimpleNamespace(list_encoding_names=lambda: ["cl999k"], get_encoding=refuse)
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    with pytest.raises(UnknownName, match=re.escape("tiktoken could not load it (no network)")):
        counter("cl999k")
    fake.get_encoding = lambda name: Encoding()
    assert counter("cl999k").count("abcd") == 2
    _named.cache_clear()


def test_counting_is_exact_for_texts_that_were_shortened() -> None:
    text = "Nine 漢字 and e\u0301 👩\u200d👧 came — “so”.\r\n" * 20
    for tokenizer in (Encoding(3), bytes_tokenizer(), Counter("letters", len)):
        done = fewer.compress_prompt(text, "random", keep=0.4, tokenizer=tokenizer)
        assert counter(tokenizer).count(done.text) == done.tokens_after <= (done.limit or 0)
