"""Seconds until an answer is there, from costs in closed form and a table of latencies measured on this machine."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fewer import cost
from fewer.latency import Staircase
from fewer.tuning.examples import Example
from fewer.tuning.hosts import Answer
from fewer.tuning.setting import Setting
from fewer.tuning.texts import Texts

Seconds = Callable[[Setting, Answer, Answer], float]
"""Of a setting, the full model's answer, which says how many tokens are to be said, and the setting's own."""
STEP = 32
"""Prompts are counted in steps of so many tokens: a cost takes milliseconds to work out."""


def clock(host: Any, examples: Sequence[Example], kept: Path | None = None, tick: Any = None) -> Seconds:
    """Time the host's model, and count with it; `kept` is where the table is taken up again from.

    Methods that shorten a prompt as it is read are counted by their FLOPs; what deciding took is added as measured.
    """
    full = [answer.tokens for answer in (host.ask(one, [Setting()])[0] for one in _spread(examples))]
    longest = int(max(full)) + host.most + STEP
    most = getattr(host.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = longest if most is None else min(longest, most - 8)
    lengths = sorted({max(16, longest * i // 6) for i in range(1, 7)})
    if kept is not None and kept.exists():
        table = Staircase.load(kept, host.model)
    else:
        table = Staircase.measure(host.model, lengths, tick=tick or (lambda what, share: None))
        if kept is not None:
            table.save(kept)

    @cache
    def closed(setting: Setting, tokens: int, new: int) -> float:
        held = setting.held
        if held is None:
            return table.seconds(cost.of(host.model, "full", tokens=tokens, new_tokens=new), new)
        keep: Any = list(held.keep) if isinstance(held.keep, tuple) else held.keep
        found = cost.of(host.model, held.made(), keep, tokens=tokens, new_tokens=new, **held.options())
        return table.seconds(found, new)

    def seconds(setting: Setting, whole: Answer, said: Answer) -> float:
        if isinstance(host, Texts):
            tokens = max(STEP, min(longest, round(said.tokens / STEP) * STEP))
            return closed(setting, tokens, whole.new) + said.choosing
        return table.prefill(said.tokens) + said.choosing + whole.new * table.decode(said.held)

    return seconds


def _spread(examples: Sequence[Example]) -> list[Example]:
    """The examples with the longest contexts, and a few others."""
    return sorted(examples, key=lambda one: -len(one.context))[:2] + list(examples[:2])
