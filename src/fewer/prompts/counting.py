"""Count tokens as a named tokenizer does: budgets are met in it, and reports name it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewer.types import FewerError, UnknownName


@dataclass(frozen=True)
class Counter:
    """A tokenizer, as far as budgets go.

    `count` gives a text's tokens, without special ones. `where` gives each token's first and last-but-one character,
    `(n, 2)`, or is None where a tokenizer cannot tell. `chat` counts messages, each of a role
    and a text, in the tokenizer's own chat template, with True the opening of an answer as well; it is None where there
    is no such template.
    """

    name: str
    count: Callable[[str], int]
    where: Callable[[str], NDArray[np.int64]] | None = None
    chat: Callable[[list[dict[str, str]], bool], int] | None = None

    def ends(self, text: str) -> NDArray[np.int64]:
        """Where each of the text's tokens ends; where the tokenizer cannot tell, as if all were equally long."""
        if self.where is not None:
            return self.where(text)[:, 1]
        n = self.count(text)
        return np.asarray(np.ceil(np.arange(1, n + 1) * (len(text) / max(n, 1))), dtype=np.int64)


def counter(tokenizer: Any = None) -> Counter:
    """The counter of that tokenizer.

    Args:
        tokenizer: None or "default" for the default language model's, "minilm" for the sentence encoder's,
            "characters", the name of a tiktoken encoding such as "cl100k_base", a folder or hub name that transformers
            reads, a transformers tokenizer, a tiktoken encoding, or any function from text to a count.

    Raises:
        UnknownName: there is no such tokenizer.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        return _named("default" if tokenizer is None else tokenizer)
    if isinstance(tokenizer, Counter):
        return tokenizer
    if hasattr(tokenizer, "encode_ordinary"):
        return _tiktoken(tokenizer)
    if hasattr(tokenizer, "encode_plus") or hasattr(tokenizer, "convert_ids_to_tokens"):
        return _transformers(tokenizer)
    if callable(tokenizer):
        return _function(getattr(tokenizer, "__name__", type(tokenizer).__name__), tokenizer)
    raise UnknownName(
        f"tokenizer={tokenizer!r} is neither a name, a tokenizer of transformers or tiktoken, nor a counting function"
    )


def _function(name: str, function: Callable[[str], Any]) -> Counter:
    def count(text: str) -> int:
        found = function(text)
        if isinstance(found, bool) or not isinstance(found, (int, np.integer)) or found < 0:
            raise FewerError(f"tokenizer {name} gave {found!r} for a text; a counting function gives how many tokens")
        return int(found)

    return Counter(name, count)


@lru_cache(maxsize=8)
def _named(name: str) -> Counter:
    if name == "characters":
        return Counter(name, len)
    if name == "default":
        from transformers import AutoTokenizer

        from fewer.models import default_model_path

        return _transformers(AutoTokenizer.from_pretrained(default_model_path()), name)
    if name == "minilm":
        from transformers import AutoTokenizer

        from fewer.sentences import default_sentence_encoder_path

        encoder = AutoTokenizer.from_pretrained(default_sentence_encoder_path())
        encoder.backend_tokenizer.no_truncation()  # its file switches both on
        encoder.backend_tokenizer.no_padding()
        return _transformers(encoder, name)
    try:
        import tiktoken

        known = tiktoken.list_encoding_names()
    except ImportError:
        known = []
    if name in known:
        try:
            return _tiktoken(tiktoken.get_encoding(name))
        except Exception as why:  # noqa: BLE001  # whatever its download raises
            raise UnknownName(f"tokenizer={name!r}: tiktoken could not load it ({why})") from None
    from transformers import AutoTokenizer

    try:
        return _transformers(AutoTokenizer.from_pretrained(name), name)
    except Exception as why:  # noqa: BLE001  # readers of broken files raise what they like
        said = str(why).splitlines()[0] if str(why) else type(why).__name__
        raise UnknownName(
            f"there is no tokenizer {name!r} ({said}); known are default, minilm, characters, tiktoken's encodings "
            f"where tiktoken is installed ({', '.join(known) or 'it is not'}), and names that transformers can load"
        ) from None


def _tiktoken(encoding: Any) -> Counter:
    def where(text: str) -> NDArray[np.int64]:
        ids = encoding.encode_ordinary(text)
        lengths = np.array([len(piece) for piece in encoding.decode_tokens_bytes(ids)], dtype=np.int64)
        return _characters(text, lengths)

    return Counter(encoding.name, lambda text: len(encoding.encode_ordinary(text)), where)


def _characters(text: str, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets in characters of pieces whose lengths are in bytes of UTF-8."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if text.isascii():
        return np.stack([starts, ends], 1)
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    before = np.concatenate([[0], np.cumsum((data & 0xC0) != 0x80)])  # characters begun before each byte
    return np.stack([before[starts], before[ends]], 1)


def _transformers(tokenizer: Any, name: str | None = None) -> Counter:
    name = name or str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return _chatting(
            Counter(name, lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])),
            tokenizer,
        )

    def where(text: str) -> NDArray[np.int64]:
        offsets = inner.encode(text, add_special_tokens=False).offsets
        return np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)

    def count(text: str) -> int:
        return len(inner.encode_batch_fast([text], add_special_tokens=False)[0])  # fast: without offsets

    if inner.truncation is not None or inner.padding is not None:
        raise FewerError(
            f"tokenizer {name}: truncation or padding is switched on in it, so it cannot count; switch it off"
        )
    return _chatting(Counter(name, count, where), tokenizer)


def _chatting(made: Counter, tokenizer: Any) -> Counter:
    """The counter, with the tokenizer's chat template if it has one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return made

    def chat(messages: list[dict[str, str]], answer: bool) -> int:
        return made.count(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))

    return replace(made, chat=chat)
