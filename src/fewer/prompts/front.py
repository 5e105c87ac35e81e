"""`fewer.compress_prompt`: from documents and a budget to a `Compression`."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fewer.methods import name_of, resolve_prompt
from fewer.methods.any.full import Full
from fewer.prompts.compression import Compression
from fewer.prompts.counting import counter
from fewer.prompts.protect import idle, listed, protected
from fewer.prompts.settle import Run, settle, text_of
from fewer.prompts.source import PromptMethod, Ranking, Source
from fewer.types import Budget, BudgetError, FewerError, Keep

GLUE = "\n\n"
KEPT = "full keeps everything, whatever the budget"


def compress_prompt(
    prompt: str | Sequence[str],
    method: str | PromptMethod = "llmlingua2",
    *,
    keep: Keep | None = None,
    tokens: int | None = None,
    question: str | None = None,
    instruction: str | None = None,
    protect: Any = (),
    tokenizer: Any = None,
) -> Compression:
    """Shorten a text, or documents, to at most so many tokens.

    The text that comes back is made of pieces of the source, in order, unless the method says that it rewrites.

    Args:
        prompt: a text, or documents, which are joined by blank lines.
        method: a name that `fewer methods --family prompt` lists, or an object with `rank`.
        keep: the share of tokens that may stay, in (0, 1].
        tokens: how many tokens may stay. Give `keep`, or this, or neither with a method that has a threshold of its
            own. Either is a ceiling, met on the text as it comes out, for the documents alone: question and
            instruction are not counted.
        question: what will be asked about the documents, for methods that look at it.
        instruction: what the reader is told to do, for methods that look at it.
        protect: what must stay: strings, compiled patterns, classes such as `fewer.protect.NUMBERS`, functions from
            text to `(start, end)`, ranges, or a list of these; see `fewer.prompts.protect.protected`.
        tokenizer: what counts tokens, see `fewer.prompts.counting.counter`; default the default language model's.

    Raises:
        BudgetError: the budget cannot be read, or what is protected does not fit.
        FewerError: a text is empty or none, or a range protects what is not there. A string or pattern that stands
            nowhere is said in `notes`.

    >>> compress_prompt("one two three four", "truncation", tokens=8, tokenizer="characters").text
    'one two'
    """
    documents = read_documents(prompt)
    question, instruction = read_text(question, "question"), read_text(instruction, "instruction")
    made, count = resolve_prompt(method), counter(tokenizer)
    start = time.perf_counter()
    rules = listed(protect)
    found = protected(documents, rules)
    nowhere = idle(rules, found)
    source = Source(documents, question, instruction, found, count)
    everything = tuple(Run(i, 0, len(text)) for i, text in enumerate(documents) if text)
    before = len(source.ends[0]) if len(documents) == 1 else count.count(text_of(documents, everything, GLUE))
    budget = read_budget(keep, tokens)
    limit = None if budget is None else budget.count(before) if budget.tokens is None else budget.tokens
    notes: tuple[str, ...] = ()
    if isinstance(made, Full) or (limit is not None and limit >= before):
        kept, runs, after = None, everything, before
        notes = (KEPT,) * (limit is not None and limit < before)
    else:
        asked = None if limit is None else Budget(budget.keep, tokens=limit)  # type: ignore[union-attr]
        ranking = checked(made, made.rank(source, asked), documents)
        if limit is None and ranking.chosen is None:
            raise BudgetError(f"{name_of(made)} has no threshold of its own: give keep=, or tokens=")
        kept = settle(source, ranking, limit, GLUE)
        runs, after, notes = kept.runs, kept.tokens, ranking.notes
        if not runs:
            notes = (
                *notes,
                "nothing stayed" + ("" if limit is None else f": every unit takes more than {limit} tokens"),
            )
    return Compression(
        text=text_of(documents, runs, GLUE), runs=runs, source=source, method=name_of(made), limit=limit,
        tokens_before=before, tokens_after=after, glue=GLUE, single=isinstance(prompt, str), kept_units=kept,
        seconds=time.perf_counter() - start, notes=(*notes, *nowhere),
    )  # fmt: skip


def read_budget(keep: Keep | None, tokens: int | None) -> Budget | None:
    """The budget as it was asked for, None where it was not."""
    if keep is not None and tokens is not None:
        raise BudgetError(f"keep={keep!r} and tokens={tokens!r}: give one of them")
    if tokens is not None:
        if isinstance(tokens, bool) or not isinstance(tokens, (int, np.integer)):
            raise BudgetError(f"tokens={tokens!r} is no whole number; give how many may stay, from 1 on")
        if tokens < 1:
            raise BudgetError(f"tokens={tokens!r} would leave nothing; give how many may stay, from 1 on")
        return Budget(int(tokens), tokens=int(tokens))
    if keep is None:
        return None
    budget = Budget.parse(keep)
    if budget.fraction is None:
        raise BudgetError(f"keep={keep!r}: prompts take the share that stays, in (0, 1], or tokens=")
    return budget


def read_documents(prompt: Any) -> tuple[str, ...]:
    """A text or documents, refused where they hold no text that can be shortened."""
    if isinstance(prompt, Mapping) or not isinstance(prompt, (str, bytes, bytearray, Iterable)):
        raise FewerError(f"compress_prompt(): the prompt is {type(prompt).__name__}; give a text, or a list of texts")
    documents = (prompt,) if isinstance(prompt, (str, bytes, bytearray)) else tuple(prompt)
    for index, text in enumerate(documents):
        if text is None:
            raise FewerError(f"compress_prompt(): document {index} is None, not text")
        read_text(text, f"document {index}")
    if not any(text.strip() for text in documents):
        raise FewerError("compress_prompt(): the prompt is empty; there is nothing to shorten")
    return documents


def read_text(text: Any, what: str, call: str = "compress_prompt") -> str:
    """A text that can be written as UTF-8; None is the empty one."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise FewerError(f"{call}(): {what} is {type(text).__name__}, not text; decode it first")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as why:
            raise FewerError(
                f"{call}(): {what} holds half of a surrogate pair at character {why.start} "
                f"({text[why.start]!r}), which is no text; decode it with errors='replace' first"
            ) from None
    return text


def checked(method: Any, ranking: Ranking, documents: tuple[str, ...]) -> Ranking:
    """What a method gave, refused if it cannot be worked with: methods may be anyone's."""
    name = name_of(method)
    if not isinstance(ranking, Ranking):
        raise FewerError(f"{name}: rank() gave {type(ranking).__name__}, not a Ranking")
    n, units = len(ranking.units), ranking.units
    for label, given, kinds in (
        ("units.document", units.document, "iu"), ("units.end", units.end, "iu"), ("units.start", units.start, "iu"),
        ("value", ranking.value, "fiu"), ("chosen", ranking.chosen, "b"),
    ):  # fmt: skip
        if given is not None and (np.shape(given) != (n,) or np.asarray(given).dtype.kind not in kinds):
            raise FewerError(
                f"{name}: rank() gave {np.asarray(given).dtype} {np.shape(given)} for {label}, for {n} units"
            )
    lengths = np.array([len(text) for text in documents])
    fit = (units.document >= 0) & (units.document < len(documents)) & (units.start >= 0) & (units.start < units.end)
    if not fit.all() or (units.end > lengths[units.document]).any():
        raise FewerError(f"{name}: rank() gave a unit that is empty, or outside its document")
    same = units.document[1:] == units.document[:-1]
    if (units.document[1:] < units.document[:-1]).any() or (same & (units.start[1:] < units.end[:-1])).any():
        raise FewerError(f"{name}: rank() gave units that overlap, or are not in the order of the documents")
    if not np.isfinite(ranking.value).all():
        raise FewerError(f"{name}: rank() gave a value that is no finite number")
    if not all(0 <= unit < n and isinstance(text, str) for unit, text in ranking.written.items()):
        raise FewerError(f"{name}: rank() wrote what is no text, or in place of no unit")
    for text in ranking.written.values():
        read_text(text, f"what {name} wrote")
    if ranking.needs is not None and not (
        ranking.needs.ndim == 2 and ranking.needs.shape[1] == 2 and ((ranking.needs >= 0) & (ranking.needs < n)).all()
    ):
        raise FewerError(f"{name}: rank() gave needs that are no pairs of its {n} units")
    if ranking.order is not None and sorted(ranking.order) != list(range(len(documents))):
        raise FewerError(f"{name}: rank() gave the order {ranking.order}, which is not each document once")
    return ranking
