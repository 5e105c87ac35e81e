"""What a task is, and what the makers of its examples share."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fewer.types import FewerError


@dataclass(frozen=True)
class Example:
    """One sample: a long context, a question about it (empty for running text) and every string a right answer has."""

    context: str
    question: str
    answers: tuple[str, ...]
    details: Mapping[str, str | int | float] = field(default_factory=dict)


def occurs(text: str, answer: str) -> bool:
    """Whether an answer stands anywhere in a text, in any case: RULER's rule."""
    return answer.casefold() in text.casefold()


@dataclass(frozen=True)
class Task:
    """A family of examples and how an answer to them is graded.

    `make(tokenizer, tokens, n, seed)` gives `n` examples whose contexts have at most `tokens` tokens and at least 97 %
    of them; the same arguments always give the same examples. `kind` is "text" where a continuation is measured and no
    question is asked. `found` says whether a text holds an answer.
    """

    name: str
    description: str
    max_new_tokens: int
    make: Callable[[PreTrainedTokenizerBase, int, int, int], list[Example]]
    kind: Literal["answer", "text"] = "answer"
    found: Callable[[str, str], bool] = occurs

    def grade(self, prediction: str, example: Example) -> float:
        """The share of the reference strings that are found in the prediction."""
        return sum(self.found(prediction, answer) for answer in example.answers) / len(example.answers)


@dataclass(frozen=True)
class Draw:
    """What one example is made from: its own random stream, and the depth in [0, 1] that samples sweep evenly."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    seed: int
    index: int
    depth: float
    rng: random.Random

    def count(self, text: str) -> int:
        return count_tokens(self.tokenizer, text)

    def longest(self, build: Callable[[int], str], most: int) -> str:
        """The longest of build(0), ..., build(most) that still has at most `tokens` tokens.

        `build` has to grow with its argument.
        """
        fits, too_long = -1, most + 1
        # Every unit has at least one token, so the first guess bounds the search before a long text is ever built.
        guess = min(most, self.tokens)
        while too_long - fits > 1:
            if self.count(build(guess)) <= self.tokens:
                fits = guess
            else:
                too_long = guess
            guess = (fits + too_long) // 2
        return build(max(fits, 0))


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def maker(
    name: str, draw: Callable[[Draw], Example]
) -> Callable[[PreTrainedTokenizerBase, int, int, int], list[Example]]:
    """Turn the making of one example into a task's `make`, with the checks that all generated tasks share."""

    def make(tokenizer: PreTrainedTokenizerBase, tokens: int, n: int, seed: int) -> list[Example]:
        if n < 1:
            raise FewerError(f"{name} was asked for {n} examples, at least 1 is needed")
        if tokens < 1:
            raise FewerError(f"{name} does not fit into {tokens} tokens")
        examples = []
        for index in range(n):
            depth = index / (n - 1) if n > 1 else 0.5
            rng = random.Random(f"{name}/{tokens}/{seed}/{index}")
            example = draw(Draw(tokenizer, tokens, seed, index, depth, rng))
            got = count_tokens(tokenizer, example.context)
            if got > tokens:
                raise FewerError(f"{name} does not fit into {tokens} tokens, its shortest context has {got}")
            if got < 0.97 * tokens:
                raise FewerError(f"{name} cannot fill {tokens} tokens to 97 %: it gets {got}; ask for another length")
            examples.append(example)
        return examples

    return make
