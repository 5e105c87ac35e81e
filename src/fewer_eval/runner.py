"""Compare methods on tasks: one prefill serves them all, and their caches decode side by side as rows of a batch.

    prefill the context once, gathering what any method needs        -> a cache that kept everything
    under(method, keep) for each                                     -> question unseen
    read the question into the full cache, then under() again        -> question seen
    stack the caches as batches: read the question (unseen), answer greedily, grade

For a method that acts after its prefill this is what compressing in line does; a test holds it to that. The others,
which shorten the prefill itself or choose what decoding reads, are run alone, in line.

A method is a name, a name and the form in which what it keeps is stored ("snapkv+kivi-4bit"), or an object. Methods
that keep every token stand in the comparison once, whatever the keeps: their settings decide their bytes.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fewer import Cache
from fewer import fit as fits
from fewer.inner import published
from fewer.latency import finish
from fewer.methods.any.full import Full
from fewer.tuning.asking import Asker
from fewer.tuning.texts import watching
from fewer.types import Budget, BudgetError, Keep, Method
from fewer_eval.case import Case, Tally
from fewer_eval.lines import YARDSTICKS
from fewer_eval.schema import Lost, Question, Row
from fewer_eval.sides import cut, worst_of
from fewer_eval.tasks import Example, Task

GREEDY = 32
"""Tokens of the full model's greedy continuation that loyalty is measured on, on running text."""
SIDE_BY_SIDE = 1 << 30
"""Most bytes of caches that answer as one batch: fifty cases at 1,000 tokens, a dozen at 4,000."""


@dataclass
class Comparison:
    """What `compare` gives: the rows, entries kept per layer and head ("method @ keep"), the caches' remarks, and the
    examples on which each method lost most ("method @ keep")."""

    rows: list[Row]
    kept: dict[str, list[list[int]]]
    notes: tuple[str, ...]
    worst: dict[str, list[Lost]] = field(default_factory=dict)


def samples_of(task: Task, samples: int) -> int:
    """A third of them on running text, rounded up: each holds over a hundred predictions, read method by method."""
    return -(-samples // 3) if task.kind == "text" else samples


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    methods: Sequence[str | Method],
    keeps: Sequence[Keep],
    *,
    tokens: int,
    samples: int,
    seed: int = 0,
    questions: Sequence[Question] = ("unseen", "seen"),
    model_name: str = "",
    timed: bool = True,
    tick: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Measure every method at every keep on every task, and always the yardsticks beside them: full, random, uniform.

    Args:
        tokens: length of a context.
        samples: samples of each task, see `samples_of`.
        questions: whether the compressors see the question ("seen"), do not ("unseen"), or both.
        timed: measure a decoding step of each case too; else `decode_ms` is 0.
        tick: called with a word on each sample before it runs, for a progress bar.
    """
    cases = [Case(Full(), "full", 1.0)]
    for keep in keeps:
        Budget.parse(keep)
        asked = [Case.of(method, keep) for method in methods]
        named = {case.name for case in asked}
        for case in [*asked, *(Case.of(name, keep) for name in YARDSTICKS if name not in named)]:
            if not isinstance(case.method, Full) and case not in cases:
                cases.append(case)
    cases.sort(key=lambda case: case.alone)
    bench = _Bench(model, tokenizer, cases, tuple(questions), timed, tick)
    rows: list[Row] = []
    for task in tasks:
        tallies = bench.run(task, task.make(tokenizer, tokens, samples_of(task, samples), seed))
        for (case, question), tally in tallies.items():
            ms = bench.decode_ms[f"{case.name} @ {case.keep}"]
            rows.append(tally.row(case, question, task, decode_ms=ms, seed=seed, tokens=tokens, model=model_name))
    return Comparison(rows, bench.kept, tuple(bench.notes), bench.worst)


class _Bench:
    """One comparison under way."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: Sequence[Case],
        questions: tuple[Question, ...],
        timed: bool,
        tick: Callable[[str], None],
    ) -> None:
        self.model, self.tokenizer, self.cases, self.questions, self.tick = (
            model,
            tokenizer,
            list(cases),
            questions,
            tick,
        )
        self.asker = Asker(model, tokenizer)
        self.timed = timed
        self.together, self.alone = ([c for c in cases if c.alone is alone] for alone in (False, True))
        for case in cases:
            fits.check(case.method, model)
        self.watch = watching([case.method for case in self.together])
        self.kept: dict[str, list[list[int]]] = {}
        going = sorted({case.name for case in cases if published(case.method)[0] != "prefill"})
        said = f"{', '.join(going)}: published to go on while decoding; here all compress once, after the prompt"
        self.notes: dict[str, None] = dict.fromkeys([said] * bool(going))
        self.decode_ms: dict[str, float] = {}
        self.reference: dict[Question, list[int]] = {}
        self.full: dict[Question, tuple[str, float]] = {}
        self.worst: dict[str, list[Lost]] = {}

    def run(self, task: Task, examples: Iterable[Example]) -> dict[tuple[Case, Question], Tally]:
        tallies: dict[tuple[Case, Question], Tally] = defaultdict(Tally)
        for index, example in enumerate(examples):
            self.tick(f"{task.name} {index + 1}")
            if task.kind == "text":
                self._text(example, tallies)
            else:
                self._answer(task, example, tallies)
        return tallies

    def _answer(self, task: Task, example: Example, tallies: dict[tuple[Case, Question], Tally]) -> None:
        before, after = self.asker.prompt(example.context, example.question)
        with Cache(self.model, self.watch, 1.0) as full:
            _, took = self._read(full, before)
            if "unseen" in self.questions:
                for cases, batch in self._batches(full, "unseen", took, tallies):
                    ids = after.expand(len(cases), -1)
                    first = self.model(ids, past_key_values=batch, logits_to_keep=1).logits[:, -1].argmax(-1)
                    said = self.asker.greedy(batch, first, task.max_new_tokens)
                    self._grade(task, example, "unseen", said, tallies, cases)
            if "seen" in self.questions:
                logits, more = self._read(full, after)
                for cases, batch in self._batches(full, "seen", took + more, tallies):
                    first = logits.argmax(-1).expand(len(cases))
                    said = self.asker.greedy(batch, first, task.max_new_tokens)
                    self._grade(task, example, "seen", said, tallies, cases)
        for case in self.alone:
            for question in self.questions:
                with Cache(self.model, case.method, case.keep, store=case.store) as cache:
                    prompt = torch.cat([before, after], 1) if question == "seen" else before
                    logits, took = self._read(cache, prompt)
                    cache.freeze()
                    self._note(case, question, cache, took, tallies)
                    if question == "unseen":
                        logits = self.model(after, past_key_values=cache, logits_to_keep=1).logits[:, -1]
                    said = self.asker.greedy(cache, logits.argmax(-1), task.max_new_tokens)
                    self._grade(task, example, question, said, tallies, [case])

    def _text(self, example: Example, tallies: dict[tuple[Case, Question], Tally]) -> None:
        context, true = self.asker.ids(example.context), self.asker.ids(example.answers[0])
        text_bytes = len(str(self.tokenizer.decode(true[0, 1:])).encode())
        with Cache(self.model, self.watch, 1.0) as full:
            logits, took = self._read(full, context)
            greedy = self.asker.greedy(full.under("full", 1.0), logits.argmax(-1), GREEDY)
            reference: Tensor | None = None
            for case in list(self.cases):
                if case.alone:
                    cache = Cache(self.model, case.method, case.keep, store=case.store)
                    _, alone = self._read(cache, context)
                    cache.freeze()
                    cache.release()  # `full` keeps the model attached
                    self._note(case, "none", cache, alone, tallies)
                elif (tried := self._tried(case, full, "none", took, tallies)) is None:
                    continue
                else:
                    cache = tried
                again = cache.fork()
                # the first token was predicted before anything was dropped, so it says nothing and is left out
                predicted = self._follow(case, true[:, :-1], cache).float().log_softmax(-1)
                reference = predicted if reference is None else reference  # full comes first
                tally = tallies[case, "none"]
                kl = (reference.exp() * (reference - predicted)).sum(-1).mean() / _LN2
                loss = (reference - predicted).gather(-1, true[0, 1:, None]).sum() / _LN2 / text_bytes
                tally.kl.append(max(float(kl), 0.0))
                tally.bpb.append(float(loss))
                tally.quality.append(float((predicted.argmax(-1) == reference.argmax(-1)).float().mean()))
                followed = self._follow(case, greedy[:, :-1], again).argmax(-1)
                tally.loyalty.append(_common(followed.tolist(), greedy[0, 1:].tolist()))

    def _follow(self, case: Case, ids: Tensor, cache: Cache) -> Tensor:
        """Logits `(n, vocabulary)` along these tokens: in one forward, or in single steps where decoding reads less."""
        steps = torch.split(ids, 1, dim=1) if getattr(case.method, "reads", None) is not None else (ids,)
        return torch.cat([self.model(step, past_key_values=cache).logits[0] for step in steps])

    def _read(self, cache: Cache, ids: Tensor) -> tuple[Tensor, float]:
        """Forward `ids` into a cache that gathers signals; the logits after them, and the seconds without gathering."""
        before = cache.report.seconds
        start = time.perf_counter()
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        finish(self.model.device)
        return logits, time.perf_counter() - start - (cache.report.seconds - before)

    def _batches(
        self, full: Cache, question: Question, prefill: float, tallies: dict[tuple[Case, Question], Tally]
    ) -> Iterator[tuple[list[Case], Cache]]:
        """The caches of all cases that can share a prefill, stacked as batches of at most SIDE_BY_SIDE bytes."""
        cases: list[Case] = []
        caches: list[Cache] = []
        held = 0.0
        for case in list(self.together):
            cache = self._tried(case, full, question, prefill, tallies)
            if cache is None:
                continue
            size = cache.report.kept * cache.report.bytes_full  # stacked, everything is in full precision
            if cases and held + size > SIDE_BY_SIDE:
                yield cases, self._stacked(caches)
                cases, held = [], 0.0
            cases, held = [*cases, case], held + size
            caches.append(cache)
        yield cases, self._stacked(caches)

    @staticmethod
    def _stacked(caches: list[Cache]) -> Cache:
        """All of them as one, and none of them by itself any more: what they hold stands in memory once."""
        batch = Cache.stack(caches)
        caches.clear()
        return batch

    def _tried(
        self,
        case: Case,
        full: Cache,
        question: Question,
        prefill: float,
        tallies: dict[tuple[Case, Question], Tally],
    ) -> Cache | None:
        """The cache that this case makes of the full one, its size and times taken down."""
        try:
            cache = full.under(case.method, case.keep, store=case.store)
        except BudgetError as why:  # what a method cannot keep to is no zero, it is left out, and said
            if any(key[0] == case for key in tallies):
                raise  # it could before
            self.together.remove(case)
            self.cases.remove(case)
            self.notes[f"{case.name} @ {case.keep} is left out: {why}"] = None
            return None
        self._note(case, question, cache, prefill, tallies)
        return cache

    def _note(
        self,
        case: Case,
        question: Question,
        cache: Cache,
        prefill: float,
        tallies: dict[tuple[Case, Question], Tally],
    ) -> None:
        """Take down what a cache holds and took."""
        report, tally = cache.report, tallies[case, question]
        tally.keep_got.append(report.kept)
        tally.bytes_full.append(report.bytes_full)
        tally.bytes_kept.append(report.bytes_kept)
        tally.prefill.append(prefill)
        tally.compress.append(report.seconds)
        label = f"{case.name} @ {case.keep}"
        layers = [list(layer.kept[0]) for layer in report.layers if layer.state != "left alone"]
        self.kept.setdefault(label, layers)
        self.notes.update(dict.fromkeys(report.notes))
        if label not in self.decode_ms:
            self.decode_ms[label] = self._decode_ms(cache.fork()) if self.timed else 0.0

    def _decode_ms(self, cache: Cache, steps: int = 5) -> float:
        """Median time of one decoding step on this cache, batch 1, after one step that does not count."""
        token, times = torch.zeros(1, 1, dtype=torch.long, device=self.model.device), []
        for _ in range(steps + 1):
            start = time.perf_counter()
            self.model(token, past_key_values=cache)
            finish(self.model.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:]) * 1000

    def _grade(
        self,
        task: Task,
        example: Example,
        question: Question,
        said: Tensor,
        tallies: dict[tuple[Case, Question], Tally],
        cases: Sequence[Case],
    ) -> None:
        """Grade a row for each case; loyalty is to the full model's answer, which is graded first."""
        answers = self.asker.answers(said)
        texts = list(map(self.asker.text, answers))
        grades = [task.grade(text, example) for text in texts]
        if cases[0].name == "full":
            self.reference[question], self.full[question] = answers[0], (texts[0], grades[0])
        for case, answer, text, grade in zip(cases, answers, texts, grades, strict=True):
            tally = tallies[case, question]
            tally.quality.append(grade)
            tally.loyalty.append(_common(answer, self.reference[question]))
            if case.name != "full":
                self._lost(task, example, question, case, text, grade)

    def _lost(self, task: Task, example: Example, question: Question, case: Case, said: str, grade: float) -> None:
        """Take an example down if it is among the worst of a case."""
        full, best = self.full[question]
        one = Lost(
            task=task.name, asked=question, question=cut(example.question), expected=cut(", ".join(example.answers)),
            full=cut(full), said=cut(said), quality=grade, lost=best - grade,
        )  # fmt: skip
        label = f"{case.name} @ {case.keep}"
        self.worst[label] = worst_of(self.worst.get(label, ()), one)


_LN2 = 0.6931471805599453


def _common(said: list[int], reference: list[int]) -> float:
    """Share of the reference before the first token that differs; all of an empty one."""
    same = next(
        (i for i, (a, b) in enumerate(zip(said, reference, strict=False)) if a != b), min(len(said), len(reference))
    )
    return same / len(reference) if reference else 1.0
