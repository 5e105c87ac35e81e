"""LongCodeZip: whole functions first, then blocks of lines inside them, by how much each helps to foresee the question.

    help(c)  =  PPL(q) - PPL(q | c)                                           perplexities of the question
    functions, the most helpful first, until they hold the budget / `fine` + 100 tokens
    r_i      =  r (1 + beta (2 help_i - 1)), help_i scaled to [0, 1], then all scaled so that they meet the budget
    blocks   =  cuts after a line whose log2 PPL given the lines before is a peak, by mean + 0.2 std over a neighbour
    chosen   =  knapsack over the blocks' help, r_i of the function's tokens; signatures, and blocks that begin with a
                comment or a return, always

Needs a causal language model, tree-sitter's grammars, and a question: without one `instead` says what is asked.

Differs from the paper: functions and statements are found by a grammar, not by regular expressions and lines, and what
is dropped is whole statements, so that the rest still parses (a block brings the frames around it, and Python's suites
keep a statement); nothing is written where something was dropped; a document that no grammar reads goes by lines. All
lines' surprises come from one pass over a function, where the authors read every prefix again; blank lines and
indentation have none. Perplexities are the default model's, at token limits of `Reader`, in place of Qwen2.5-Coder 7B
and 0.5B. The budget is tokens, not lines, and met exactly: what is left goes to the blocks that are worth most a token.
Functions are short by their lines, never by their blocks. Blocks that help less than nothing are not chosen.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import regex

from fewer import checks
from fewer.allocate.knapsack import knapsack
from fewer.prompts.code import Code, code
from fewer.prompts.needs import closed, pulling
from fewer.prompts.source import Bools, Floats, Ints, Ranking, Source
from fewer.score.perplexity import by_line, peaks, perplexities
from fewer.score.surprise import Reader, reader
from fewer.types import Budget, Card, MissingSignal

SPARE, SHORT, TAIL = 100, 5, 10
"""Tokens more for the choice of functions; lines below which one stays whole; lines that are asked for at the end."""
K = 0.2
_ALWAYS = regex.compile(r"\s*(?:#|//|/\*|.*\breturn\b)")


@dataclass(frozen=True)
class LongCodeZip:
    """Functions by conditional perplexity, blocks by knapsack; the code still parses.

    Args:
        fine: the share of the chosen functions' tokens that stays; the authors use 0.5 and 0.8.
        beta: how far a function's share follows its help.
        language: one that `fewer.prompts.code` knows, or "auto" for the first that reads a document.
        instead: what is asked without a question: the "end" of the last document, as in completion, or "instruction".
        model: the language model: a name, a pair of model and tokenizer, or a `Reader`.
    """

    fine: float = 0.5
    beta: float = 0.5
    language: str = "auto"
    instead: Literal["end", "instruction"] = "end"
    model: Any = "default"

    card: ClassVar[Card] = Card(
        source="arXiv:2510.00446; YerbaPage/LongCodeZip @ 71248b7", faithfulness="paper", mechanism="extract",
        differs="statements by a grammar, so that it parses; lines' surprise in one pass; SmolLM2; an exact budget",
        slugs=("longcodezip",),
    )  # fmt: skip
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        checks.shares(some=True, fine=self.fine)
        checks.shares(beta=self.beta)
        checks.words(("end", "instruction"), instead=self.instead)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        read, found = reader(self.model), code(source, self.language)
        question, notes = self._asked(source)
        alone = float(perplexities(read, question, [""])[0])

        def helps(pieces: list[Ints]) -> Floats:
            return np.subtract(alone, perplexities(read, question, [found.text(source, units) for units in pieces]))

        functions = [np.flatnonzero(found.part == part) for part in range(found.part.max(initial=-1) + 1)]
        sizes, help_ = source.sizes(found.units), helps(functions)
        tokens = np.array([sizes[units].sum() for units in functions])
        long = np.array([found.lines(source, units).sum() >= SHORT for units in functions])
        room = None if budget is None else float(budget.count(int(sizes.sum())))
        share = np.ones(len(functions)) if room is None else shares(help_, tokens, long, room, self.fine, self.beta)
        value, chosen = np.zeros(len(sizes)), np.zeros(len(sizes), dtype=bool)
        for function, units in enumerate(functions):
            value[units] = help_[function] / max(tokens[function], 1)
            chosen[units] = share[function] >= 1
            if long[function] and share[function] > 0 and (share[function] < 1 or room is None):
                block = _blocks(read, source, found, units)
                worth = helps([units[block == i] for i in range(block[-1] + 1)])
                value[units] = (worth / np.maximum(np.bincount(block, sizes[units]), 1))[block]
                chosen |= _packed(source, found, units, block, worth, sizes, share[function] * tokens[function])
        unread = [str(i) for i, language in enumerate(found.languages) if not language and source.documents[i].strip()]
        if unread:
            notes += (f"no grammar reads document {', '.join(unread)} without an error: by lines; it may not parse",)
        needs = found.needs if len(found.needs) else None
        return Ranking(found.units, value, None if room is None else chosen, notes=notes, needs=needs)

    def _asked(self, source: Source) -> tuple[str, tuple[str, ...]]:
        """What is asked, and a note where that is no question."""
        if source.question.strip():
            return source.question, ()
        if self.instead == "instruction":
            if not source.instruction.strip():
                raise MissingSignal("longcodezip: no question and no instruction: give one, or use instead='end'")
            return source.instruction, ("no question was given: the instruction stands for it",)
        last = next(text for text in reversed(source.documents) if text.strip())
        tail = [line for line in last.split("\n") if line.strip()][-TAIL:]
        return "\n".join(tail), (f"no question was given: the last {len(tail)} lines stand for it, as in completion",)


def shares(help_: Floats, tokens: Floats, long: Bools, room: float, fine: float, beta: float) -> Floats:
    """How much of each function's tokens may stay: nothing of those that are not taken, all of short ones."""
    order = np.argsort(-help_, kind="stable")
    taken = np.zeros(len(tokens), dtype=bool)
    taken[order[np.concatenate([[0.0], np.cumsum(tokens[order])[:-1]]) <= room / fine + SPARE]] = True
    out = taken.astype(np.float64)
    cut = np.flatnonzero(taken & long)
    left = max(room - tokens[taken & ~long].sum(), 0.0)
    if len(cut) and left < tokens[cut].sum():
        spread = np.ptp(help_[cut])
        scaled = (help_[cut] - help_[cut].min()) / spread if spread > 0 else np.full(len(cut), 0.5)
        first = np.clip(left / tokens[cut].sum() * (1 + beta * (2 * scaled - 1)), 0, 1)
        out[cut] = np.clip(first * (left / max((first * tokens[cut]).sum(), 1e-9)), 0, 1)
    return out


def _blocks(read: Reader, source: Source, found: Code, units: Ints) -> Ints:
    """The block of each unit: a cut inside a unit falls behind it."""
    surprise = by_line(read, found.text(source, units))
    block = np.zeros(len(surprise), dtype=np.int64)
    block[peaks(surprise, K) + 1] = 1
    first = np.concatenate([[0], np.cumsum(found.lines(source, units))[:-1]])
    return np.unique(np.cumsum(block)[first], return_inverse=True)[1]


def _packed(source: Source, found: Code, units: Ints, block: Ints, worth: Floats, sizes: Floats, room: float) -> Bools:
    """The units of a function that stay: the frame, blocks that begin with a comment or a return, and of the others
    those that a knapsack takes, each as heavy as it is with the frames that it brings."""
    pull, always = pulling(found.needs, len(sizes)), np.zeros(len(sizes), dtype=bool)
    masks = np.zeros((block[-1] + 1, len(sizes)), dtype=bool)
    masks[block, units] = True
    begins = [_ALWAYS.match(found.text(source, units[block == i][:1])) is not None for i in range(len(masks))]
    always[units] = found.frame[units] | np.array(begins)[block]
    always = closed(always, pull)
    masks = np.array([closed(mask, pull) & ~always for mask in masks])
    taken = knapsack(np.where(masks.any(1), worth, 0.0), masks @ sizes, int(room - sizes[always].sum()))
    return np.asarray(always | masks[taken].any(0))
