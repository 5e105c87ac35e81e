"""A decoder, asked about texts: one prefill serves every setting that acts after it, and their caches answer as one
batch."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewer import fit as fits
from fewer.adapters.hf_cache import Cache
from fewer.inner import changes_forward, published
from fewer.methods import resolve_store
from fewer.methods.any.full import Full
from fewer.report import Report
from fewer.tuning.asking import Asker
from fewer.tuning.examples import Example
from fewer.tuning.hosts import Answer, shares_of, shortened
from fewer.tuning.setting import Held, Setting
from fewer.types import FewerError, Keep

TOGETHER = 16
"""Caches that answer as one batch; more would hold their bytes at once."""


@dataclass(frozen=True)
class _Watch(Full):
    """Keeps everything and gathers what a list of methods needs."""

    needs: frozenset[Any] = frozenset()  # type: ignore[misc]  # a field here, where Full has a constant


class Texts:
    """A transformers decoder and its tokenizer, asked questions about contexts.

    Args:
        most: tokens of an answer, at most.
        unseen: compress the context before the question is read, as where one context serves many questions.
    """

    def __init__(self, model: Any, tokenizer: Any, *, most: int = 64, unseen: bool = False) -> None:
        self.model, self.tokenizer, self.most, self.unseen = model, tokenizer, most, unseen
        self.asker = Asker(model, tokenizer)
        self.made: dict[Held, Any] = {}
        self.loaded: set[str] = set()

    def check(self, examples: Sequence[Example]) -> None:
        """Raise for examples that cannot be asked, before hours are spent on others."""
        for example in examples:
            where = f"example {example.line}"
            if example.images:
                raise FewerError(f"{where} has an image, and {type(self.model).__name__} reads texts alone")
            if not example.question.strip():
                raise FewerError(f"{where} has an empty question")
            try:
                self.asker.prompt(example.context, example.question)
            except FewerError as why:
                raise FewerError(f"{where}: {why}") from None

    @torch.inference_mode()
    def ask(self, example: Example, settings: Sequence[Setting]) -> list[Answer]:
        """One answer a setting, in their order."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, setting in enumerate(settings):
            groups[setting.text].append(index)
        answers: dict[int, Answer] = {}
        for text, members in groups.items():
            try:
                context, took = self.shorten(Setting(text), example.context, example.question)
            except FewerError as why:
                answers.update(dict.fromkeys(members, Answer("", refused=str(why))))
                continue
            before, after = self.asker.prompt(context, example.question)
            alone = [index for index in members if self.alone(settings[index].held)]
            for index in alone:
                answers[index] = self._in_line(settings[index].held, before, after)
            rest = [index for index in members if index not in alone]
            answers.update(zip(rest, self._beside([settings[i].held for i in rest], before, after), strict=True))
            for index in members:
                answers[index] = answers[index]._replace(choosing=answers[index].choosing + took)
        return [answers[index] for index in range(len(settings))]

    def shorten(self, setting: Setting, context: str, question: str) -> tuple[str, float]:
        """A context with a setting's part for texts, which sees the question unless that comes later; and the seconds
        that took, without those of loading what it reads with."""
        return shortened(setting, context, None if self.unseen else question, self.tokenizer, self.loaded)

    def method(self, held: Held | None) -> Any:
        """The method of a setting, made once: a fit is read from its file then."""
        if held is None:
            return Full()
        if held not in self.made:
            self.made[held] = held.made()
            fits.check(self.made[held], self.model)  # here, where it has its name
        return self.made[held]

    def alone(self, held: Held | None) -> bool:
        """Whether it acts while the prompt is read or the answer is made, so that no prefill can be shared."""
        method = self.method(held)
        acts = changes_forward(method) or published(method)[0] != "prefill"
        return acts or (held is not None and bool(held.options().keys() - {"store"}))

    def _beside(self, held: Sequence[Held | None], before: Tensor, after: Tensor) -> list[Answer]:
        """Answers from one prefill."""
        if not held:
            return []
        watch = watching([self.method(one) for one in held])
        found: list[Answer] = []
        with Cache(self.model, watch, 1.0) as full:
            # in one forward, as `generate` reads it: some methods look at the latest forward alone
            logits = self.read(full, before if self.unseen else torch.cat([before, after], 1))
            for start in range(0, len(held), TOGETHER):
                found += self._together(full, held[start : start + TOGETHER], logits, after)
        return found

    def _together(self, full: Cache, held: Sequence[Held | None], logits: Tensor, after: Tensor) -> list[Answer]:
        caches: list[Cache] = []
        refused: dict[int, str] = {}
        for index, one in enumerate(held):
            try:
                caches.append(full.under(self.method(one), _keep(one), store=_store(one)))
            except FewerError as why:
                refused[index] = str(why)
        reports = [cache.report for cache in caches]
        said: list[list[int]] = []
        if caches:
            batch = Cache.stack(caches)
            if self.unseen:
                ids = after.expand(len(caches), -1)
                first = self.model(ids, past_key_values=batch, logits_to_keep=1).logits[:, -1].argmax(-1)
            else:
                first = logits.argmax(-1).expand(len(caches))
            said = self.asker.answers(self.asker.greedy(batch, first, self.most))
        there = iter(zip(said, reports, strict=True))
        tokens = full.get_seq_length() + (after.shape[1] if self.unseen else 0)
        return [
            Answer("", refused=refused[index]) if index in refused else self._answer(*next(there), tokens)
            for index in range(len(held))
        ]

    def _in_line(self, held: Held | None, before: Tensor, after: Tensor) -> Answer:
        try:
            return self.in_line(held, before, after)[0]
        except FewerError as why:
            return Answer("", refused=str(why))

    @torch.inference_mode()
    def in_line(self, held: Held | None, before: Tensor, after: Tensor) -> tuple[Answer, Report]:
        """The answer of a setting by itself, from a prompt in two parts, as `fewer.compress` gives it."""
        method = self.method(held)
        options = {} if held is None else {n: v for n, v in held.options().items() if n in ("when", "every")}
        with Cache(self.model, method, _keep(held), store=_store(held), **options) as cache:
            logits = self.read(cache, before if self.unseen else torch.cat([before, after], 1))
            if options.get("when", published(method)[0]) == "prefill":
                cache.freeze()
            report = cache.report
            if self.unseen:
                logits = self.read(cache, after)
            tokens = cache.get_seq_length()
            said = self.asker.answers(self.asker.greedy(cache, logits.argmax(-1), self.most))
            return self._answer(said[0], report, tokens), report

    def read(self, cache: Cache, ids: Tensor) -> Tensor:
        """Read tokens (1, n) into a cache; the logits (1, vocabulary) after them."""
        logits: Tensor = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return logits

    def _answer(self, said: list[int], report: Report, tokens: int) -> Answer:
        shares = shares_of(report)
        held = report.kept * tokens
        return Answer(self.asker.text(said), report.bytes_kept, held, tokens, len(said), report.seconds, shares)


def watching(methods: Sequence[Any]) -> Any:
    """A method that keeps everything, and gathers what these need."""
    return _Watch(frozenset(need for method in methods for need in method.needs))


def _keep(held: Held | None) -> Keep | list[Any]:
    if held is None:
        return 1.0
    return list(held.keep) if isinstance(held.keep, tuple) else held.keep


def _store(held: Held | None) -> Any:
    return resolve_store(held.store if held is not None else None)
