"""A task from a user's own file: one JSON object a line, with context, question and answer."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fewer.tuning.examples import read, says
from fewer.types import FewerError
from fewer_eval.tasks.base import Example, Task


def from_jsonl(path: str | Path, *, max_new_tokens: int = 64) -> Task:
    """Read a task named after the file. `answer` is one string, or a list of strings that are all expected.

    `make` gives the first n examples in the file's order, all of them where the file has fewer, with their contexts as
    they are: it ignores the wanted number of tokens and the seed. Other fields and empty lines are ignored. Answers
    count as whole words, as in `fewer tune`.
    """
    path = Path(path)
    examples = []
    for one in read(path):
        if lacking := "context" * (not one.context) or "answer" * (not one.answers):
            raise FewerError(f"{path}, line {one.line} lacks {lacking}")
        examples.append(Example(one.context, one.question, one.answers, {"line": one.line}))

    def make(tokenizer: PreTrainedTokenizerBase, tokens: int, n: int, seed: int) -> list[Example]:
        if n < 1:
            raise FewerError(f"{path.name} was asked for {n} examples, at least 1 is needed")
        return examples[:n]

    return Task(path.stem, f"the examples of {path.name}", max_new_tokens, make, found=says)
