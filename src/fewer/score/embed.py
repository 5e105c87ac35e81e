"""Vectors of sentences, from a small encoder: the mean of its last layer's tokens, at length one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BATCH = 8192
"""Cells, padding included, of a forward."""


@dataclass(frozen=True, eq=False)
class Embedder:
    """An encoder in evaluation mode, and its tokenizer. Texts are cut after `longest` tokens."""

    model: Any
    tokenizer: Any
    longest: int = 256

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """A vector of length one for each text, `(n, d)` in float32; a text without tokens has a vector of zeros."""
        read = (
            self.tokenizer(list(texts), truncation=True, max_length=self.longest, verbose=False)["input_ids"]
            if texts
            else []
        )
        out = torch.zeros(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda i: len(read[i]))  # texts of like length pad little
        while order:
            take = max(1, BATCH // max(len(read[order[0]]), 1))
            while take > 1 and take * len(read[order[min(take, len(order)) - 1]]) > BATCH:
                take -= 1
            rows, order = order[:take], order[take:]
            batch = self.tokenizer.pad({"input_ids": [read[i] for i in rows]}, return_tensors="pt").to(
                self.model.device
            )
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            out[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu()
        return out


@lru_cache(maxsize=1)
def _default() -> Embedder:
    from fewer.sentences import load_sentence_encoder

    return Embedder(*load_sentence_encoder())


def embedder(model: Any = "minilm") -> Embedder:
    """The default sentence encoder, loaded once; an `Embedder`, or a pair of model and tokenizer, as it is."""
    if isinstance(model, Embedder):
        return model
    if isinstance(model, str):
        from transformers import AutoModel, AutoTokenizer

        if model == "minilm":
            return _default()
        return Embedder(AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model))
    return Embedder(*model)
