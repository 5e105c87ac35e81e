"""How likely a causal language model says yes: p = exp(Yes) / (exp(Yes) + exp(No)), over the logits of the first token.

Many endings of one beginning cost one pass over the beginning, whose keys and values are then shared by all.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewer.score.surprise import CHUNK, Reader
from fewer.types import UnsupportedModel

CELLS = 8192
"""Places, over all rows of a batch, whose keys and values are in memory at once; a longer beginning goes row by row."""


def plain(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, in which nothing counts as special: a document cannot close the turn that it stands in."""
    return plain_offsets(tokenizer, text)[0]


def plain_offsets(tokenizer: Any, text: str) -> tuple[list[int], NDArray[np.int64]]:
    """The same, and where each token stands in the text, `(n, 2)`."""
    read = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens  # which the call has changed
    return read["input_ids"], np.array(read["offset_mapping"], dtype=np.int64).reshape(-1, 2)


def answers(tokenizer: Any) -> tuple[int, int]:
    """The first tokens of Yes and No."""
    first = [plain(tokenizer, word)[:1] for word in ("Yes", "No")]
    if not all(first) or first[0] == first[1]:
        raise UnsupportedModel(f"this tokenizer starts Yes and No with {first[0]} and {first[1]}: it cannot tell them")
    return first[0][0], first[1][0]


def turn(reader: Reader, said: Sequence[str]) -> list[list[int]]:
    """Token ids of the pieces of a user's turn, with what the model's chat template puts before the first and after
    the last; a model without one reads them as they are, and starts a new line.

    The pieces at odd places are data, which cannot hold special tokens.
    """
    marks = [chr(0xE000 + i) for i in range(len(said) // 2)]
    text = "".join(marks[i // 2] if i % 2 else piece for i, piece in enumerate(said))
    if getattr(reader.tokenizer, "chat_template", None):
        text = reader.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        start = []
    else:
        text, start = f"{text}\n", reader.start
    out = []
    for i, piece in enumerate(said):
        if i % 2:
            out.append(plain(reader.tokenizer, piece))
            continue
        frame, text = text.split(marks[i // 2], 1) if i // 2 < len(marks) else (text, "")
        out.append(reader.tokenizer(frame, add_special_tokens=False, verbose=False)["input_ids"])
    return [start + out[0], *out[1:]]


@torch.inference_mode()
def yes(reader: Reader, before: Sequence[int], endings: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The probability of Yes, rather than No, after `before` and each of the endings, `(n,)`."""
    wanted = list(answers(reader.tokenizer))
    model, out, shared = reader.model, np.zeros(len(endings)), None
    whole = torch.tensor([list(before)], device=model.device)
    for at in range(0, len(before), CHUNK):
        part = whole[:, at : at + CHUNK]
        shared = model.base_model(part, past_key_values=shared, use_cache=True).past_key_values
    order = sorted(range(len(endings)), key=lambda i: len(endings[i]))
    while order:
        take = 1
        while take < len(order):
            length = len(endings[order[take]])
            if (take + 1) * length > CHUNK or (take + 1) * (len(before) + length) > CELLS:
                break
            take += 1
        rows, order = order[:take], order[take:]
        longest = len(endings[rows[-1]])
        # What follows an ending is padding that nothing before it can see, so no mask is needed.
        batch = torch.tensor([[*endings[i], *[0] * (longest - len(endings[i]))] for i in rows], device=model.device)
        cache = copy.deepcopy(shared)
        if cache is not None:
            cache.batch_repeat_interleave(take)
        logits = model(batch, past_key_values=cache, use_cache=True).logits
        last = torch.tensor([len(endings[i]) - 1 for i in rows], device=model.device)
        told = logits[torch.arange(take, device=model.device), last][:, wanted].double()
        out[rows] = told.softmax(-1)[:, 0].cpu().numpy()
    return out
