"""Have a causal language model write a text anew in fewer tokens."""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch

from fewer.prompts.source import Source
from fewer.score.surprise import Reader, reader
from fewer.score.yes_no import turn

Writer = Callable[[str, int], str]
"""From a text and how many tokens may be left of it to a shorter text; what is longer is cut by `within`."""


def summariser(model: Any = "default") -> Writer:
    """A writer that asks this language model, greedily, see `fewer.score.surprise.reader`."""

    def write(text: str, tokens: int) -> str:
        read = reader(model)
        words = max(1, round(0.7 * tokens))  # English has about 1.4 tokens a word
        asked = f"\n\nSummarise the text above in at most {words} words. Keep names and numbers. Give the summary only."
        return written(read, ["Text:\n", text, asked], tokens)

    return write


@torch.inference_mode()
def written(read: Reader, said: list[str], tokens: int) -> str:
    """What the model answers to a turn, greedily, in at most so many tokens; see `turn` for the pieces.

    Of data that is longer than the model's window, the end is not read.
    """
    pieces = turn(read, said)
    over = sum(map(len, pieces)) + tokens - read.window
    if over > 0:
        pieces[1] = pieces[1][: max(0, len(pieces[1]) - over)]
    ids = torch.tensor([[token for piece in pieces for token in piece]], device=read.model.device)
    ends = read.tokenizer.eos_token_id
    out = read.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=ends or 0
    )
    text: str = read.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


def within(text: str, tokens: int, count: Callable[[str], int]) -> str:
    """The text up to the last sentence, or else word, with which it has at most so many tokens.

    >>> within("One two. Three four five. Six.", 25, len), within("One two three", 9, len)
    ('One two. Three four five.', 'One two')
    """
    if count(text) <= tokens:
        return text
    source = Source((text,))
    for units in (source.sentences, source.words):
        ends = units.end.tolist()
        fits = bisect_right(ends, tokens, key=lambda end: count(text[:end]))
        if fits:
            return text[: ends[fits - 1]]
    return ""
