"""Which words package llmlingua 0.2.2 keeps with LLMLingua-2: its way step by step, with its quirks, on our offsets.

    text -> forced strings that are not one piece each become [NEW0], [NEW1] ... -> pieces
    -> chunks of up to 511 pieces that end in one of `ends` -> each back to a string, and to pieces again, 512 at most
    -> softmax(logits)_1 -> words by the tokenizer's marks, a word's p the mean of its pieces'; forced ones 1.0
    -> in each chunk by itself: each p as often as its word has cl100k tokens, numpy's percentile
       int(100 (1 - rate) + 1) of that; who is above it stays

With several documents, those of low mean p are left out whole first; there a word's p is always its first piece's.
Where a piece comes back from the round trip as another one, or not at all, its place in the text is found by aligning
the two rows of pieces.
The embeddings of [NEW..] are the mean of all others, as transformers 4.48 makes them but for noise of 1e-9 of their
covariance: what the package does with such strings hangs on the version of transformers. A text that says [PAD] is
read with it, where the package masks it. At a rate of 1 the package splits words in another way; here it is the same.
"""

import copy
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, models
from torch import nn

from fewer.prompts.counting import counter
from fewer.score.keepers import Ints, Keeper
from fewer.types import BudgetError, FewerError, UnsupportedModel

LONGEST = 512
NEW = [f"[NEW{i}]" for i in range(100)]


class Word(NamedTuple):
    """A word as the package sees it, whether it stays, its probability, and where it stands: at -1 if nowhere."""

    text: str
    kept: bool
    p: float
    start: int
    end: int


class Shortened(NamedTuple):
    """What the package makes of a document, the document's words, and whether it was left out whole."""

    text: str
    words: list[Word]
    left_out: bool = False


@dataclass(frozen=True)
class Options:
    """What the package is told, by its names for it; `ends` are the pieces that a chunk may end with.

    Args:
        pool: "mean", or "first" for the probability of a word's first piece: the package's `token_to_word`.
        force_tokens: strings that stay.
        force_reserve_digit: pieces with a digit in them count as 1.0.
        drop_consecutive: forced words that stand again with nothing between them go.
        coarse: of several documents, leave out some whole: those below the percentile of a share half-way from the
            rate to one, or of twice the target.
        weigh: how many cl100k tokens a text has; None asks tiktoken.
    """

    pool: str = "mean"
    force_tokens: tuple[str, ...] = ()
    force_reserve_digit: bool = False
    drop_consecutive: bool = False
    ends: tuple[str, ...] = (".", "\n")
    coarse: bool = True
    weigh: Callable[[str], int] | None = None


@dataclass(eq=False)
class Chunk:
    """A stretch of a text: the string that its pieces make, and the pieces with their places; then what was read of it,
    pieces and p, with the places of those that were found again."""

    text: str
    pieces: list[str]
    offsets: Ints
    read: list[str]
    p: list[Any]
    places: Ints


def shorten(
    keeper: Keeper, documents: Sequence[str], rate: float, options: Options | None = None, *, tokens: int | None = None
) -> list[Shortened]:
    """What the package makes of these documents at this rate; or, with `tokens`, at this target in cl100k tokens.

    Raises:
        BudgetError: the rate is none that the package works with.
        UnsupportedModel: the tokenizer is neither a WordPiece one nor SentencePiece's unigram one.
    """
    options = options or Options()
    package = _Package(keeper, options)
    chunked = [package.chunks(text) for text in documents]
    if tokens is not None:
        rate = min(tokens / max(sum(map(package.weigh, documents)), 1), 1.0)
    if not rate > 0:
        raise BudgetError(f"rate={rate!r}: package llmlingua works with rates above 0 alone")
    package.read([chunk for chunks in chunked for chunk in chunks])
    stays = [True] * len(documents)
    if options.coarse and len(documents) > 1:
        share = min((rate + 1.0) / 2 if tokens is None else 2 * rate, 1.0)
        means = [package.mean(chunks) for chunks in chunked]
        least = np.percentile(means, int(100 * (1 - share)))
        stays = [p >= least for p in means]
        if tokens is not None:
            left = [chunk.text for chunks, stay in zip(chunked, stays, strict=True) if stay for chunk in chunks]
            rate = min(tokens / max(sum(map(package.weigh, left)), 1), 1.0)
    out = []
    for chunks, stay in zip(chunked, stays, strict=True):
        done = [package.cut(chunk, 1 - rate) for chunk in chunks]
        words = [word if stay else word._replace(kept=False) for _, words in done for word in words]
        out.append(Shortened("".join(text for text, _ in done) if stay else "", words, not stay))
    return out


class _Package:
    def __init__(self, keeper: Keeper, options: Options) -> None:
        self.options, self.inner = options, _with_new(keeper.tokenizer)
        if not isinstance(self.inner.model, (models.WordPiece, models.Unigram)):
            raise UnsupportedModel(
                f"package llmlingua takes WordPiece and unigram tokenizers, not {type(self.inner.model).__name__}"
            )
        self.marks = "##" if isinstance(self.inner.model, models.WordPiece) else "▁"
        names = ("unk", "sep", "pad", "cls", "mask", "bos", "eos")
        self.special = {getattr(keeper.tokenizer, f"{name}_token", None) for name in names}
        if len(options.force_tokens) > len(NEW) or "" in options.force_tokens:
            raise FewerError(f"force_tokens={options.force_tokens!r}: package llmlingua takes up to 100, none empty")
        self.new = {
            forced: new
            for forced, new in zip(options.force_tokens, NEW, strict=False)
            if len(self.pieces(forced)[0]) != 1
        }
        self.ends = {*options.ends, *(self.new[end] for end in options.ends if end in self.new)}
        size = self.inner.get_vocab_size()
        self.keeper = replace(keeper, model=_with_rows(keeper.model, size)) if self.new else keeper
        self.weigh = options.weigh or counter("cl100k_base").count

    def pieces(self, text: str) -> tuple[list[str], Ints, list[int]]:
        read = self.inner.encode(text, add_special_tokens=False)
        return read.tokens, np.array(read.offsets, dtype=np.int64).reshape(-1, 2), read.ids

    def back(self, text: str) -> str:
        for forced, new in self.new.items():
            text = text.replace(new, forced)
        return text

    def chunks(self, text: str) -> list[Chunk]:
        text, start, end = self._renamed(text)
        pieces, offsets, _ = self.pieces(text)
        offsets = np.stack([start[offsets[:, 0]], end[np.maximum(offsets[:, 1] - 1, 0)]], 1) if len(pieces) else offsets
        out, at, most = [], 0, LONGEST - 2
        while at < len(pieces):
            last = at + most  # the last piece of the chunk: one more than there is room for
            if last > len(pieces) - 1:
                last = len(pieces) - 1
            else:
                last = next((i for i in range(last, at, -1) if pieces[i] in self.ends), last)
            mine = pieces[at : last + 1]
            none = np.zeros((0, 2), dtype=np.int64)
            out.append(Chunk(self.inner.decoder.decode(mine), mine, offsets[at : last + 1], [], [], none))
            at = last + 1
        return out

    def _renamed(self, text: str) -> tuple[str, Ints, Ints]:
        """The text with the [NEW..], and for each of its characters where what it stands for starts and ends."""
        start, end = np.arange(len(text) + 1), np.arange(1, len(text) + 2)
        for forced, new in self.new.items():
            found, at = [], text.find(forced)
            while at >= 0:
                found.append(at)
                at = text.find(forced, at + len(forced))
            for i in reversed(found):
                after = i + len(forced)
                start = np.concatenate([start[:i], np.full(len(new), start[i]), start[after:]])
                end = np.concatenate([end[:i], np.full(len(new), end[after - 1]), end[after:]])
            text = text.replace(forced, new)
        return text, start, end

    def read(self, chunks: list[Chunk]) -> None:
        """Read the strings of the chunks."""
        unknown = self.inner.token_to_id("[CLS]"), self.inner.token_to_id("[SEP]")
        first, last = (self._unknown if i is None else i for i in unknown)  # a unigram tokenizer knows neither
        rows = []
        for chunk in chunks:
            pieces, _, ids = self.pieces(chunk.text)
            pieces = pieces[: LONGEST - 1]
            chunk.read = [self.inner.id_to_token(i) for i in ids[: LONGEST - 1]]  # what is unknown says so
            rows.append(np.array([first, *ids, last][:LONGEST]))
            pure = [[piece.lstrip(self.marks) for piece in part] for part in (chunk.pieces, pieces)]
            chunk.places = np.full((len(chunk.read), 2), -1)
            matcher = SequenceMatcher(None, pure[0], pure[1], autojunk=False)
            same = pure[0] == pure[1]
            for a, b, n in [(0, 0, len(pure[1]))] if same else matcher.get_matching_blocks():
                chunk.places[b : b + n] = chunk.offsets[a : a + n]
        for chunk, p in zip(chunks, self.keeper.of_rows(rows), strict=True):
            chunk.p = list(p[1 : 1 + len(chunk.read)])

    @property
    def _unknown(self) -> int:
        return int(self.inner.token_to_id(self.keeper.tokenizer.unk_token))

    def words(self, chunk: Chunk, force: bool = True) -> tuple[list[str], list[list[Any]], list[list[int]]]:
        """Words, for each the p of its pieces, and the index of these."""
        words: list[str] = []
        values: list[list[Any]] = []
        members: list[list[int]] = []
        forced = {*self.options.force_tokens, *self.new.values()}
        for index, (piece, p) in enumerate(zip(chunk.read, chunk.p, strict=True)):
            if piece in self.special:
                continue
            pure = piece.lstrip(self.marks)
            if self._begins(piece, pure, forced) or not words:
                said = self.back(piece)
                words.append(said)
                values.append([])
                members.append([])
                p = 1.0 if force and pure in forced else p
            else:
                said = piece
                words[-1] += pure
            if not force:  # the package means to use p, and takes what it had for the word's first piece
                p = values[-1][0] if values[-1] else p
            digit = force and self.options.force_reserve_digit and re.search(r"\d", said)
            values[-1].append(1.0 if digit else p)
            members[-1].append(index)
        return words, values, members

    def _begins(self, piece: str, pure: str, forced: set[str]) -> bool:
        if self.marks == "##":
            return pure in forced or not piece.startswith("##")
        return piece in string.punctuation or piece in forced or piece.startswith("▁")

    def _joined(self, values: list[list[Any]]) -> list[Any]:
        """A p for each word; in single precision where all are, and then numpy's percentile is too."""
        return [p[0] if self.options.pool == "first" else sum(p) / len(p) for p in values]

    def mean(self, chunks: list[Chunk]) -> Any:
        """The mean p of a document's words, nothing forced."""
        each = [p for chunk in chunks for p in self._joined(self.words(chunk, force=False)[1])]
        return sum(each) / len(each) if each else 0.0

    def cut(self, chunk: Chunk, reduce: float) -> tuple[str, list[Word]]:
        """What stays of a chunk."""
        words, values, members = self.words(chunk)
        if not words:
            return "", []
        p, force = self._joined(values), self.options.force_tokens
        drop = self.options.drop_consecutive and reduce > 0
        if drop:
            above, between, before = np.percentile(p, int(100 * reduce)), False, None
            for i, word in enumerate(words):
                if word not in force:
                    between = between or p[i] > above
                    continue
                if not between and word == before:
                    p[i] = 0.0
                between, before = False, word
        weighed = [value for word, value in zip(words, p, strict=True) for _ in range(self.weigh(word))]
        threshold = np.percentile(weighed, int(100 * reduce + 1)) if reduce > 0 else -1.0
        kept: list[str] = []
        out = []
        for word, value, mine in zip(words, p, members, strict=True):
            stays = bool(value > threshold or (threshold == 1.0 and value == threshold))
            if drop and stays and word in force and kept[-1:] == [word]:
                stays = False
            if stays:
                kept.append(word)
            places = chunk.places[mine]
            places = places[places[:, 0] >= 0]
            start, end = (int(places.min()), int(places.max())) if len(places) else (-1, -1)
            out.append(Word(word.lstrip("▁") if self.marks == "▁" else word, stays, float(value), start, end))
        return self.inner.decoder.decode(kept) if reduce > 0 else self.back(chunk.text), out


@lru_cache(maxsize=4)
def _with_new(tokenizer: Any) -> Any:
    """A copy of what is inside a fast tokenizer that knows the [NEW..]; "[SEP]" in a text is a special token to it."""
    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    inner.no_truncation()
    inner.no_padding()
    inner.add_special_tokens([AddedToken(new, normalized=False) for new in NEW])
    return inner


@lru_cache(maxsize=1)
def _with_rows(model: Any, size: int) -> Any:
    """A copy of the model that shares all weights but the embedding of pieces, which has `size` rows."""
    made = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    rows = made.get_input_embeddings().weight.detach()
    more = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(max(size - len(rows), 0), -1)
    table: Any = nn.Embedding
    made.set_input_embeddings(table.from_pretrained(torch.cat([rows, more])[:size]))
    return made.eval()
