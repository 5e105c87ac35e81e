"""How probable it is that each token of a text should stay, from a token classifier (label 1 is "keep").

    text -> tokens with offsets -> chunks below the model's window, cut at the ends of sentences or lines
         -> chunks of like length in one batch -> softmax(logits)_1 for each token

The text is tokenised once, as it is; chunks are slices of its tokens. What is held at a time does not grow with the
text but for its tokens and their offsets.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewer.fit import Fit, fingerprint, load
from fewer.score.embed import embedder
from fewer.score.int8 import eight_bits
from fewer.types import FewerError, UnsupportedModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

CELLS, CELLS_GPU = 512, 65_536
"""Cells, padding included, of a forward. On a CPU few: what a layer makes of more is memory that the system hands over
anew, page by page, and takes back each time, which costs a tenth in float32 and a quarter in 8 bits."""

PIECE, PIECES = 16_384, 16
"""Characters that are tokenised together, and how many such at a time."""

_ENDS, _SPACES = (np.array([ord(mark) for mark in marks]) for marks in (".!?…。！？", " \t\r\n"))


@dataclass(frozen=True, eq=False)
class Keeper:
    """A token classifier of two labels in evaluation mode, and its tokenizer, a fast one.

    `window` is how many tokens a chunk may have, special ones included; None for what the model can see, 512 at most.
    """

    model: Any
    tokenizer: Any
    window: int | None = None

    def __post_init__(self) -> None:
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise UnsupportedModel(
                f"{type(self.tokenizer).__name__} gives no offsets; a fast tokenizer, of the tokenizers package, does"
            )
        if (labels := getattr(self.model.config, "num_labels", None)) != 2:
            raise UnsupportedModel(
                f"{type(self.model).__name__} has {labels} labels; a token classifier has two, drop and keep"
            )
        if self.room < 1:
            raise UnsupportedModel(f"window={self.window} leaves no room for tokens beside the special ones")

    @property
    def longest(self) -> int:
        """Tokens of a chunk, special ones included."""
        most = getattr(self.model.config, "max_position_embeddings", None) or 512
        first = getattr(self.model.config, "pad_token_id", None) or 0
        most -= first + 1 if "roberta" in self.model.config.model_type else 0  # they count positions from there on
        return min(512 if self.window is None else self.window, most)

    @property
    def room(self) -> int:
        """Tokens of a chunk, special ones not counted."""
        return self.longest - sum(map(len, _around(self.tokenizer)))

    def __call__(self, documents: Sequence[str]) -> list[tuple[Ints, Floats]]:
        """For each document where its tokens stand `(n, 2)`, and the probability that each should stay `(n,)`."""
        read = [self.tokens(text) for text in documents]
        parts = [
            (document, start, end)
            for document, (text, (_, offsets)) in enumerate(zip(documents, read, strict=True))
            for start, end in pairwise(cuts(text, offsets, self.room))
        ]
        before, after = (np.array(ids, dtype=np.int64) for ids in _around(self.tokenizer))
        rows = [np.concatenate([before, read[document][0][start:end], after]) for document, start, end in parts]
        out = [np.zeros(len(ids), dtype=np.float32) for ids, _ in read]
        for (document, start, end), p in zip(parts, self.of_rows(rows), strict=True):
            out[document][start:end] = p[len(before) : len(p) - len(after)]
        return [(offsets, p) for (_, offsets), p in zip(read, out, strict=True)]

    def tokens(self, text: str) -> tuple[Ints, Ints]:
        """The text's token ids `(n,)` and where each stands `(n, 2)`; no special tokens, whatever the text says."""
        backend, pieces = plain(self.tokenizer), list(_pieces(text))
        ids, offsets = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 2), dtype=np.int64)]
        for at in range(0, len(pieces), PIECES):
            group = pieces[at : at + PIECES]
            read = backend.encode_batch([text[start:end] for start, end in group], add_special_tokens=False)
            for (start, _), one in zip(group, read, strict=True):
                places = np.fromiter(chain.from_iterable(one.offsets), dtype=np.int64, count=2 * len(one))
                ids.append(np.array(one.ids, dtype=np.int64))
                offsets.append(places.reshape(-1, 2) + start)
        return np.concatenate(ids), np.concatenate(offsets)

    def of_rows(self, rows: Sequence[Ints]) -> list[Floats]:
        """The probability of label 1 at each id of each row. Rows of like length go together, so little is padded."""
        cells = CELLS if self.model.device.type == "cpu" else CELLS_GPU
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        batches: list[list[int]] = []
        while order:
            take = max(1, cells // max(len(rows[order[0]]), 1))
            batches.append(order[:take])
            order = order[take:]
        out: list[Any] = [None] * len(rows)
        for batch, found in zip(
            batches, self._side_by_side([[rows[i] for i in batch] for batch in batches]), strict=True
        ):
            for i, p in zip(batch, found, strict=True):
                out[i] = p[: len(rows[i])]
        return out

    def _side_by_side(self, batches: list[list[Ints]]) -> Iterable[Floats]:
        """Batches through the model, as many at a time as there are threads, each on one: threads that share a batch
        wait for each other at every step of it, and if one has no processor for a while, all do."""
        threads = torch.get_num_threads()
        if self.model.device.type != "cpu" or min(threads, len(batches)) < 2:
            return [self._forward(batch) for batch in batches]
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(self._forward, batches))
        finally:
            torch.set_num_threads(
                threads
            )  # what threads of others start with is what was set last, by whichever thread

    @torch.inference_mode()
    def _forward(self, rows: list[Ints]) -> Floats:
        """Rows, the longest first, padded to it: the probability of label 1 `(rows, longest)`."""
        ids = np.full((len(rows), len(rows[0])), self.tokenizer.pad_token_id or 0)
        mask = np.zeros(ids.shape, dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        device = self.model.device
        seen = {} if mask.all() else {"attention_mask": torch.from_numpy(mask).to(device)}
        logits = self.model(input_ids=torch.from_numpy(ids).to(device), **seen).logits
        found: Floats = logits.float().softmax(-1)[..., 1].cpu().numpy()
        return found


def cuts(text: str, offsets: Ints, room: int) -> list[int]:
    """Where to cut tokens into chunks of at most `room`, from 0 to their number: at the last end of a sentence or line
    in the second half of what there is room for, else at the last white space, else where it is full."""
    n = len(offsets)
    out = [0] if n else []
    if n > room:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        breaks = np.concatenate([[0], np.cumsum(codes == 10)])
        left, right = offsets[:-1, 1], offsets[1:, 0]  # what is between one token and the next
        spaces = (right > left) | np.isin(codes[offsets[1:, 0]], _SPACES)  # some tokens begin with their space
        ends = (breaks[np.maximum(right, left)] > breaks[left]) | (spaces & np.isin(codes[left - 1], _ENDS))
        places = [np.flatnonzero(ends) + 1, np.flatnonzero(spaces) + 1]
        while n - out[-1] > room:
            full = out[-1] + room
            last = [int(found[i - 1]) if (i := np.searchsorted(found, full, side="right")) else 0 for found in places]
            half = full - (room + 1) // 2
            out.append(last[0] if last[0] > half else last[1] if last[1] > out[-1] else full)
    return [*out, n]


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """The text in pieces that are tokenised alone as they are in it: cut before a space between two characters."""
    start = 0
    while start < len(text):
        end = start + PIECE
        while 0 <= (end := text.find(" ", end)) < len(text) - 1:
            if not (text[end - 1].isspace() or text[end + 1].isspace()):
                break
            end += 1
        end = end if 0 <= end < len(text) - 1 else len(text)
        yield start, end
        start = end


@lru_cache(maxsize=8)
def plain(tokenizer: Any) -> Any:
    """A copy of what is inside a fast tokenizer that does not truncate or pad, and takes "[SEP]" in a text for text."""
    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


@lru_cache(maxsize=8)
def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a model of this tokenizer wants before a text, and after it."""
    inner = plain(tokenizer)
    alone, whole = (inner.encode("a", add_special_tokens=added).ids for added in (False, True))
    at = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
    return whole[:at], whole[at + len(alone) :]


def classifier(fit: Fit, base: Any = "minilm") -> tuple[Any, Any]:
    """A token classifier on the encoder `base` (see `score.embed.embedder`) with the fit's tensors in place of its own,
    and the encoder's tokenizer.

    Raises:
        FewerError: the fit is of another method or encoder, or has tensors that a classifier on it has not.
    """
    from fewer.train_keeper import fresh

    encoder = embedder(base)
    if fit.method != "llmlingua2" or fit.model != fingerprint(encoder.model):
        raise FewerError(
            f"this fit of {fit.method} was made for another encoder ({fit.model[:12]}) than this one "
            f"({fingerprint(encoder.model)[:12]}); fit it to this one with `fewer fit llmlingua2`"
        )
    model = fresh(encoder.model)
    own = model.state_dict()
    wrong = [name for name, t in fit.tensors.items() if name not in own or own[name].shape != t.shape]
    if wrong or "classifier.weight" not in fit.tensors:
        raise FewerError(f"this fit does not suit a token classifier: {wrong[0] if wrong else 'it has no classifier'}")
    model.load_state_dict({**own, **{name: t.to(own[name].dtype) for name, t in fit.tensors.items()}})
    return model.eval(), encoder.tokenizer


def shipped() -> Path | None:
    """The file of the head that comes with fewer; None where it does not."""
    path = Path(str(files("fewer") / "data" / "llmlingua2.fit"))
    return path if path.is_file() else None


def keeper(model: Any = "minilm", fit: Fit | None = None, bits: int | None = None) -> Keeper:
    """The keeper of that name, loaded once; a `Keeper`, or a pair of model and tokenizer, as it is.

    Args:
        model: "minilm" for the default sentence encoder with the head that comes with fewer; a folder or hub name of a
            token classifier that transformers reads; a pair of model and tokenizer; a `Keeper`. With a fit, the
            encoder that it was made for.
        fit: from `fewer fit llmlingua2`.
        bits: 8 for linear layers in 8 bits; None for the model as it is.

    Raises:
        FewerError: there is no fit, or it is another encoder's.
        UnsupportedModel: what was given is no token classifier of two labels.
    """
    if bits not in (None, 8):
        raise FewerError(f"bits={bits!r}: a classifier is read in 8 bits, or as it is with None")
    made = model if isinstance(model, Keeper) else _made(tuple(model) if isinstance(model, list) else model, fit)
    return made if bits is None else replace(made, model=_eight_bits(made.model))


@lru_cache(maxsize=3)
def _made(model: Any, fit: Fit | None) -> Keeper:
    if fit is None and model == "minilm":
        if (path := shipped()) is None:
            raise FewerError(
                "LLMLingua2 has to be fitted first: `fewer fit llmlingua2 --out FILE`, then LLMLingua2.load(FILE), or "
                "--fit FILE on the command line; or give it a token classifier as model="
            )
        fit = load(path, "llmlingua2")
    if fit is not None:
        return Keeper(*classifier(fit, model))
    if not isinstance(model, str):
        return Keeper(*model)
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    try:
        return Keeper(
            AutoModelForTokenClassification.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
        )
    except (OSError, ValueError, KeyError) as why:
        said = str(why).splitlines()[0] if str(why) else type(why).__name__
        raise UnsupportedModel(f"model={model!r} is no token classifier that transformers can load: {said}") from None


_eight_bits = lru_cache(maxsize=2)(eight_bits)
