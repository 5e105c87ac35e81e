"""How surprised a causal language model is by each token of a text: -log p(x_i | x_<i), in nats."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

CHUNK = 512
"""Tokens a forward: what bounds the memory that logits take."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A causal language model in evaluation mode, and its tokenizer, which must be a fast one (it gives offsets).

    `window` is how many tokens the model sees at once. Of a longer text it reads on with the last half of the window
    before its eyes, so memory does not grow with the text.
    """

    model: Any
    tokenizer: Any
    window: int = 2048

    def tokens(self, text: str) -> tuple[list[int], NDArray[np.int64]]:
        """The text's token ids, and where each stands in it, `(n, 2)`; without special tokens."""
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return read["input_ids"], np.array(read["offset_mapping"], dtype=np.int64).reshape(-1, 2)

    @property
    def start(self) -> list[int]:
        """What a text begins with, so that its first token can be predicted: the model's own token for that."""
        found = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        return [] if found is None else [found]

    def surprise(self, text: str, before: str = "") -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Where each token of `text` stands `(n, 2)`, and the surprise at it `(n,)`, read after `before`.

        `before` is read but not reported; of one longer than half the window, the end.
        """
        ids, offsets = self.tokens(text)
        first = [*self.start, *(self.tokens(before)[0] if before else [])]
        return offsets, self.of_ids(ids, first[-(self.window // 2) :])

    @torch.inference_mode()
    def of_ids(self, ids: list[int], before: list[int]) -> NDArray[np.float64]:
        """Surprise at each of these tokens `(n,)`; with nothing before, the first counts as no surprise."""
        out: list[NDArray[np.float64]] = []
        at, head = 0, list(before)
        while at < len(ids):
            part = ids[at : at + self.window - len(head)]
            out.append(self._read(head + part)[max(len(head) - 1, 0) :])
            if not head:
                out[-1] = np.concatenate([[0.0], out[-1]])
            at += len(part)
            head = (head + part)[-(self.window // 2) :]
        return np.concatenate(out) if out else np.zeros(0)

    def _read(self, ids: list[int]) -> NDArray[np.float64]:
        """Surprise at all but the first of these tokens, which fit in the window."""
        whole = torch.tensor([ids], device=self.model.device)
        cache, out = DynamicCache(config=self.model.config), []
        for at in range(0, len(ids) - 1, CHUNK):
            said = whole[:, at + 1 : at + CHUNK + 1]
            logits = self.model(whole[:, at : at + said.shape[1]], past_key_values=cache).logits[0].float()
            out.append(torch.nn.functional.cross_entropy(logits, said[0], reduction="none").double().cpu().numpy())
        return np.concatenate(out) if out else np.zeros(0)


@lru_cache(maxsize=2)
def _loaded(name: str) -> Reader:
    from fewer.models import load

    model, tokenizer = load(name)
    return Reader(model, tokenizer)


def reader(model: Any = "default") -> Reader:
    """The reader of that name, loaded once; a `Reader`, or a pair of model and tokenizer, as it is."""
    if isinstance(model, Reader):
        return model
    return _loaded(model) if isinstance(model, str) else Reader(*model)
