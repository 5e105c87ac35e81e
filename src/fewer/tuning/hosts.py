"""Who answers: a model, asked one example under many settings. `Texts` and `Pictures` are the two there are."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from fewer.report import Report
from fewer.tuning.examples import Example
from fewer.tuning.setting import Setting


class Answer(NamedTuple):
    """What was said, and what it took.

    `bytes` is what the cache held after the prompt, `held` the entries of a head there, on average, `tokens` how many
    of the prompt the model read (visual tokens as the mean over its layers), `new` how many it said, `choosing` the
    seconds that deciding took, and shortening the text; `shares` is what each head of each layer kept, of what it had.
    `refused` says why a setting cannot be met here.
    """

    text: str
    bytes: float = 0.0
    held: float = 0.0
    tokens: float = 0.0
    new: int = 0
    choosing: float = 0.0
    shares: tuple[tuple[float, ...], ...] = ()
    refused: str = ""


@runtime_checkable
class Host(Protocol):
    """A model that can be asked; `settings` may hold `Setting()`, which is the model as it is."""

    model: Any

    def check(self, examples: Sequence[Example]) -> None: ...

    def ask(self, example: Example, settings: Sequence[Setting]) -> list[Answer]: ...


def shortened(
    setting: Setting, context: str, question: str | None, tokenizer: Any, loaded: set[str]
) -> tuple[str, float]:
    """The shortened context, and the seconds that took; a method that is not among the loaded ones is run before."""
    if setting.text is not None and setting.text.method not in loaded:
        setting.shorten(context, question, tokenizer)
        loaded.add(setting.text.method)
    start = time.perf_counter()
    return setting.shorten(context, question, tokenizer), time.perf_counter() - start


def shares_of(report: Report) -> tuple[tuple[float, ...], ...]:
    """What each head of each layer kept of what its first row had."""
    mine = [layer for layer in report.layers if layer.state != "left alone"]
    return tuple(tuple(count / max(layer.seen[0], 1) for count in layer.kept[0]) for layer in mine)
