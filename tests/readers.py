"""Small readers: a random model of bytes, and one whose every prediction can be read off a table."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fewer.score.surprise import Reader
from tests.tiny import tiny


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte of UTF-8 is a token; 256 ends a text, and begins one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")  # noqa: S106


def bytes_reader(family: str = "llama", window: int = 2048, **changes: Any) -> Reader:
    """A random model of that family that reads bytes."""
    settings = {"vocab_size": 257, "eos_token_id": 256, **changes}
    return Reader(tiny(family, **settings), bytes_tokenizer(), window)


class _Pairs(torch.nn.Module):
    """log p(word | word before), from a table."""

    config = LlamaConfig(num_hidden_layers=1)
    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = logits

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def pairs_reader(nats: Mapping[str, float], after: Mapping[tuple[str, str], float] | None = None) -> Reader:
    """A model of words: the surprise at each, and at some after some other. Other words fill up the probabilities."""
    words = ["<start>", "<other>", *nats]
    table = torch.full((len(words), len(words)), -1e9, dtype=torch.float64)
    for before in range(len(words)):
        for word, value in nats.items():
            table[before, words.index(word)] = -(after or {}).get((words[before], word), value)
        table[before, 1] = torch.log((1 - table[before, 2:].exp().sum()).clamp(min=1e-30))
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<other>"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<start>", "unk_token": "<other>"}
    return Reader(_Pairs(table), PreTrainedTokenizerFast(tokenizer_object=inner, **names))
