"""A task from a user's own file: one JSON object a line, with context, question and answer."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fewer.types import FewerError
from fewer_eval.tasks.base import Example, Task


def from_jsonl(path: str | Path, *, max_new_tokens: int = 64) -> Task:
    """Read a task named after the file. `answer` is one string, or a list of strings that are all expected.

    `make` gives the first n examples in the file's order, all of them where the file has fewer, with their contexts as
    they are: it ignores the wanted number of tokens and the seed. Other fields and empty lines are ignored.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FewerError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise FewerError(f"{path} cannot be read: {error.strerror or error}") from error
    # Not splitlines(): JSON strings may hold the exotic line separators that it splits at.
    lines = content.split("\n")
    examples = [_example(f"{path}, line {i}", i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise FewerError(f"{path} has no lines; one JSON object a line is needed, with context, question and answer")

    def make(tokenizer: PreTrainedTokenizerBase, tokens: int, n: int, seed: int) -> list[Example]:
        if n < 1:
            raise FewerError(f"{path.name} was asked for {n} examples, at least 1 is needed")
        return examples[:n]

    return Task(path.stem, f"the examples of {path.name}", max_new_tokens, make)


def _example(where: str, number: int, line: str) -> Example:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise FewerError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(fields, dict):
        raise FewerError(f"{where} holds {_kind(fields)}, not a JSON object")
    if missing := [name for name in ("context", "question", "answer") if name not in fields]:
        raise FewerError(f"{where} lacks {', '.join(missing)}")
    for name in ("context", "question"):
        if not isinstance(fields[name], str):
            raise FewerError(f"{where}: {name} is {_kind(fields[name])}, not a string")
    if not fields["context"].strip():
        raise FewerError(f"{where}: context is empty")
    answer = fields["answer"]
    answers = answer if isinstance(answer, list) else [answer]
    for one in answers:
        if not isinstance(one, str):
            raise FewerError(f"{where}: answer is {_kind(answer)}, not a string or a list of strings")
    # An empty answer would be found in every prediction.
    if not answers or not all(one.strip() for one in answers):
        raise FewerError(f"{where}: answer is empty")
    return Example(fields["context"], fields["question"], tuple(answers), {"line": number})


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
