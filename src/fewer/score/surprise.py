"""How surprised a causal language model is by each token of a text: -log p(x_i | x_<i), in nats."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK = 512
"""Tokens a forward, padding included: what bounds the memory that logits take."""


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
            out.append(self._read(head + part, max(len(head), 1)))
            if not head:
                out[-1] = np.concatenate([[0.0], out[-1]])
            at += len(part)
            head = (head + part)[-(self.window // 2) :]
        return np.concatenate(out) if out else np.zeros(0)

    @torch.inference_mode()
    def of_many(self, ids: Sequence[list[int]], before: Sequence[list[int]]) -> list[NDArray[np.float64]]:
        """What `of_ids` gives for each of these, for many at once: short ones share a forward.

        They are padded at the end, which no token of a causal model can see.
        """
        out: list[NDArray[np.float64]] = [np.zeros(0)] * len(ids)
        sizes = [len(head) + len(part) for head, part in zip(before, ids, strict=True)]
        batch: list[int] = []
        for row in sorted(range(len(ids)), key=sizes.__getitem__):
            if batch and ((len(batch) + 1) * sizes[row] > CHUNK or sizes[row] > self.window):
                self._padded(batch, ids, before, out)
                batch = []
            batch.append(row)
        self._padded(batch, ids, before, out)
        return out

    def prefix(self, before: str = "") -> "Prefix":
        """What a text begins with, and `before`, as a prefix after which tokens can be tried."""
        return Prefix(self, [*self.start, *(self.tokens(before)[0] if before else [])])

    def _padded(self, batch: list[int], ids: Any, before: Any, out: list[NDArray[np.float64]]) -> None:
        rows = [[*before[row], *ids[row]] for row in batch]
        longest = max((len(row) for row in rows), default=0)
        if len(batch) == 1 or longest < 2:
            for row in batch:
                out[row] = self.of_ids(ids[row], before[row])
            return
        whole = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        logits = self.model(whole[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), whole[:, 1:], reduction="none")
        loss = torch.nn.functional.pad(loss, (1, 0)).double().cpu()  # what nothing stands before is no surprise
        for values, line, row in zip(loss.numpy(), rows, batch, strict=True):
            out[row] = values[len(before[row]) : len(line)].copy()

    def _read(self, ids: list[int], first: int = 1, cache: Any = None) -> NDArray[np.float64]:
        """Surprise at these tokens from the `first` on, which is not the very first; with the cache they fit in the
        window. All but the last are added to the cache."""
        whole = torch.tensor([ids], device=self.model.device)
        cache, out = _empty(self.model.config) if cache is None else cache, []
        for at in range(0, len(ids) - 1, CHUNK):
            said = whole[0, at + 1 : at + CHUNK + 1]
            wanted = min(len(said), max(at + 1 + len(said) - first, 0))
            only = {"logits_to_keep": max(wanted, 1)} if self._spares and wanted < len(said) else {}
            logits = self.model(whole[:, at : at + len(said)], past_key_values=cache, **only).logits[0]
            if wanted:
                loss = torch.nn.functional.cross_entropy(logits[-wanted:].float(), said[-wanted:], reduction="none")
                out.append(loss.double().cpu().numpy())
        return np.concatenate(out) if out else np.zeros(0)

    @cached_property
    def _spares(self) -> bool:
        """Whether the model can leave out logits that nobody asked for: they are a fifth of a small model's work."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters


class Prefix:
    """Tokens that a reader has before it. Others are tried after them, and what stays of those joins them.

    The cache is cut back after a trial, so that each token is read once when it is tried and once more if it stays.
    When the window is full, what it was made with stays (its end, where that is longer than a quarter of the window),
    and of the others the last that fill a quarter: these are read again, and memory does not grow with the text.
    """

    def __init__(self, reader: Reader, ids: list[int]) -> None:
        self.reader, self.ids = reader, ids[-max(reader.window // 4, 1) :]
        self._first, self._held = len(self.ids), 0  # of the tokens: those that stay, those in the cache
        self._forget()

    @property
    def most(self) -> int:
        """How many tokens can be tried at once."""
        return self.reader.window // 2

    @torch.inference_mode()
    def tried(self, ids: list[int]) -> NDArray[np.float64]:
        """Surprise at each of these tokens `(n,)`; the prefix is afterwards what it was."""
        if len(ids) > self.most:
            raise ValueError(f"{len(ids)} tokens at once, and a window of {self.reader.window} takes {self.most}")
        if not ids:
            return np.zeros(0)
        if len(self.ids) + len(ids) > self.reader.window:
            last = max(len(self.ids) - self.reader.window // 4, self._first)
            self.ids = self.ids[: self._first] + self.ids[last:]
            self._forget()
        new = self.ids[self._held :] + ids
        out = self.reader._read(new, max(len(new) - len(ids), 1), self._cache)
        # The last token of the prefix is read again: its logits say what comes next.
        held = max(len(self.ids) - 1, 0)
        if surplus := self._held + len(new) - 1 - held:
            self._cache.crop(-surplus)
        self._held = held
        return out if self.ids else np.concatenate([[0.0], out])

    def keep(self, ids: list[int]) -> None:
        """Add these to the prefix."""
        self.ids = self.ids + ids

    def _forget(self) -> None:
        # Without the model's config: a cache that kept only what a sliding window sees could not be cut back.
        self._cache, self._held = _empty(), 0


def _empty(config: Any = None) -> Any:
    """A cache with nothing in it."""
    from transformers import DynamicCache  # hosts are imported on use: `import fewer` needs none

    return DynamicCache(config=config)


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
