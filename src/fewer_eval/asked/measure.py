"""Measure prompt methods on questions about documents: what is answered, what survives, what was asked and got."""

import ast
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fewer
from fewer import protect
from fewer.methods import name_of, resolve_prompt
from fewer.prompts.compression import Compression
from fewer.types import FewerError
from fewer_eval.asked.base import Asked, Setting

SURVIVAL = ("numbers", "negations", "identifiers", "keys")
"""Classes of `fewer.protect` whose survival is reported."""


@dataclass(frozen=True)
class Line:
    """One method at one keep in one setting; means over `n` examples, shares in [0, 1].

    `answered`: the model's answer holds the right one, over the `asked` examples that it was asked about; None where it
    is beyond the model. `needed`: all that an answer needs is in the text. `survived`: of each class, the share of what
    the source has that stayed whole. `parses`: Python code that is still Python, None where there is none.
    `tokens_after` over `limit` is how near the budget was met, `over` the number of times it was exceeded. `refused`
    are examples that the method would not shorten: they count with the whole text, which a caller would send then.
    """

    setting: str
    method: str
    keep: float
    n: int
    asked: int
    answered: float | None
    needed: float
    survived: dict[str, float]
    parses: float | None
    tokens_before: float
    tokens_after: float
    limit: float
    over: int
    extractive: bool
    seconds: float
    refused: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ASK = "Read the text and answer the question after it in one short sentence, in the words of the text."


class Answerer:
    """The default language model as the reader of what is left."""

    def __init__(self, model: Any, tokenizer: Any, longest: int = 24) -> None:
        self.model, self.tokenizer, self.longest = model, tokenizer, longest

    @torch.inference_mode()
    def __call__(self, text: str, question: str) -> str:
        message = [{"role": "user", "content": f"{ASK}\n\n{text}\n\nQuestion: {question}"}]
        prompt = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        said = self.model.generate(**ids, max_new_tokens=self.longest, do_sample=False)
        return str(self.tokenizer.decode(said[0, ids.input_ids.shape[1] :], skip_special_tokens=True))


def right(said: str, answer: str) -> bool:
    """Whether an answer holds the right one, commas and case aside; anywhere, also in a longer word or number.

    >>> right("They granted $1250.", "1,250"), right("In 1849.", "1848")
    (True, False)
    """
    return answer.casefold().replace(",", "") in said.casefold().replace(",", "")


def survival(done: Compression) -> dict[str, tuple[int, int]]:
    """Of each class: how many of the source's stayed whole in one place, and how many there are."""
    counted = {}
    for name in SURVIVAL:
        kept = there = 0
        for index, text in enumerate(done.source.documents):
            runs = [(run.start, run.end) for run in done.runs if run.document == index and run.written is None]
            for start, end in protect.named(name).find(text):
                there += 1
                kept += any(left <= start and end <= right for left, right in runs)
        counted[name] = (kept, there)
    return counted


def measure(
    setting: Setting,
    method: Any,
    keep: float,
    examples: Sequence[Asked],
    answerer: Answerer | None = None,
    *,
    most: int | None = None,
    seen: bool = True,
) -> Line:
    """One method at one keep on these examples.

    Args:
        answerer: who answers, where the setting can be answered; None measures survival alone.
        most: how many of the examples it is asked about, evenly spaced; default all.
        seen: whether the method is shown the question.
    """
    method, answerer = resolve_prompt(method), answerer if setting.answerable else None
    dones: list[Compression] = []
    answered, needed, parses, took = [], [], [], []
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    refused, most = 0, len(examples) if most is None else min(most, len(examples))
    to_ask = {round(i * (len(examples) - 1) / max(most - 1, 1)) for i in range(most)}
    for index, example in enumerate(examples):
        start = time.perf_counter()
        try:
            done = fewer.compress_prompt(
                example.documents, method, keep=keep, question=example.question if seen else None
            )
        except FewerError:
            refused += 1
            done = fewer.compress_prompt(example.documents, "full", keep=1.0)  # what a caller would send instead
        took.append(time.perf_counter() - start)
        dones.append(done)
        needed.append(all(part in done.text for part in example.needed))
        for name, (kept, there) in survival(done).items():
            counts[name][0] += kept
            counts[name][1] += there
        if setting.name == "code":
            parses.append(_parses(done.text))
        if answerer is not None and index in to_ask:
            answered.append(right(answerer(done.text, example.question), example.answer))
    mean = statistics.fmean
    limits = [done.limit if done.limit is not None else done.tokens_before for done in dones]
    return Line(
        setting.name, name_of(method), keep, len(examples), len(answered),
        mean(answered) if answered else None, mean(needed),
        {name: kept / there for name, (kept, there) in counts.items() if there}, mean(parses) if parses else None,
        mean(done.tokens_before for done in dones), mean(done.tokens_after for done in dones), mean(limits),
        sum(done.tokens_after > limit for done, limit in zip(dones, limits, strict=True)),
        all(done.extractive for done in dones), mean(took), refused,
    )  # fmt: skip


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
