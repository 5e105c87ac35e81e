"""`fewer.tune`: from a model, a user's own examples and what may be lost, to a setting with a promise.

examples -> parts: search, calibration, held out
candidates -> race -> joined, budgets of their own -> ladder       on the search part
ladder -> promise                                                  on the calibration part
chosen -> its loss                                                 on the part that was held out
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any

from fewer import fit as fits
from fewer.adapters import vlm_layout
from fewer.adapters.peft import bare
from fewer.tuning import risk
from fewer.tuning.candidates import candidates, joined
from fewer.tuning.clock import clock
from fewer.tuning.examples import Example, by_context, gather, parts
from fewer.tuning.hosts import Host
from fewer.tuning.journal import Journal
from fewer.tuning.losses import Loss, lost, name_of, resolve_loss
from fewer.tuning.pictures import Pictures
from fewer.tuning.planfile import again, versions
from fewer.tuning.profile import search
from fewer.tuning.result import Measured, Tuned, Worst
from fewer.tuning.search import Bench, Tick, best, ladder, plausible, promise, race
from fewer.tuning.setting import Setting
from fewer.tuning.texts import Texts
from fewer.types import FewerError

SCALES = (1.0, 0.75, 0.5)
"""Totals that a slope over layers and heads is tried at, as shares of the one it was searched at."""
WORST = 5
"""Examples shown on which most was lost."""


def tune(
    model: Any,
    data: str | Path | Iterable[Mapping[str, Any] | Example],
    *,
    loss: float = 0.02,
    confidence: float = 0.95,
    aim: str = "memory",
    methods: Sequence[str] | None = None,
    measure: str | Loss = "wrong",
    processor: Any = None,
    fit: Sequence[str | Path] = (),
    unseen: bool = False,
    levels: bool = True,
    max_new_tokens: int = 64,
    record: str | Path | None = None,
    seed: int = 0,
    name: str = "",
    host: Host | None = None,
    tick: Tick = lambda what, done, of: None,
) -> Tuned:
    """Search for the setting that makes `aim` smallest while the expected loss stays within `loss`.

    The promise is distribution-free (Learn then Test with Hoeffding-Bentkus p-values over a fixed sequence of settings,
    arXiv 2110.01052): with `confidence`, on data like the examples, the chosen setting's expected loss is at most
    `loss`. It says nothing about other data; `fewer.Monitor` watches for that.

    Args:
        model: a transformers decoder, or a vision-language model.
        data: a JSONL file, or objects, with context, question and answer; see `fewer.tuning.examples.read`. A
            quarter of them searches, a tenth is held out, the rest calibrates.
        loss: the expected loss that may be, in (0, 1).
        confidence: of the promise, in (0, 1).
        aim: what is to become small: "memory" (bytes of the cache after the prompt), "latency" (seconds until the
            answer is there, by a table measured here), or "tokens" (of the prompt, that the model reads).
        methods: what is tried, see `fewer.tuning.candidates.candidates`; left out, a choice for the aim.
        measure: "wrong" (needs answers), "changed", "numbers", or a function of the full model's answer, the compressed
            one's, and the example, with values in [0, 1]; see `fewer.tuning.losses`.
        processor: the model's tokenizer, or a vision-language model's processor.
        fit: files that `fewer fit` made, for methods that need one.
        unseen: compress contexts before their question is read, as where one context serves many; texts only.
        levels: also search budgets for single layers and heads.
        max_new_tokens: of an answer.
        record: a file that takes every answer as it comes; the same call goes on from it after an interruption.
        seed: of the parts and the searches.
        name: what the model is called in reports and plans, and loaded by.
        host: who answers, for a model that is neither; see `fewer.tuning.hosts.Host`.
        tick: told what is done, and how far it is.

    Returns:
        What was found; `.chosen` is None where no setting passed, and then `.why` says why.

    Raises:
        FewerError: an argument cannot be, the examples are too few or have no answers, or the record is another run's.
        UnsupportedModel: neither decoder nor vision-language model, or a PEFT wrapper with a tuned prompt.
    """
    start, model = time.perf_counter(), bare(model, to_run=True)
    counted, examples = resolve_loss(measure), gather(data)
    named = name_of(measure)
    _arguments(methods, fit, max_new_tokens, record)
    choosing, calibrating, held_out = parted(examples, loss, confidence, named, seed)
    if processor is None and host is None:
        raise FewerError("tune(processor=None): give the model's tokenizer, or a vision-language model's processor")
    reads = "pictures" if vlm_layout.is_vlm(model) else "texts"
    fitted = [(fits.load(path), str(Path(path).resolve())) for path in fit]
    tried = candidates(reads, aim, methods, fitted)
    made: Any = host
    if made is None and reads == "pictures":
        made = Pictures(model, processor, most=max_new_tokens)
    elif made is None:
        made = Texts(model, processor, most=max_new_tokens, unseen=unseen)
    if unseen != getattr(made, "unseen", False):
        raise FewerError(
            f"tune(unseen={unseen}): {type(made).__name__} compresses "
            + ("with the question; leave unseen out" if unseen else "before the question is read; say unseen=True")
        )
    made.check([*choosing, *calibrating, *held_out])
    if getattr(model, "training", False):
        raise FewerError(f"tune: this {type(model).__name__} is in training mode and answers at random: call .eval()")
    fingerprint = fits.fingerprint(model, "answers")
    about = {
        "model": fingerprint, "dtype": str(getattr(model, "dtype", None)), "host": type(made).__name__,
        "reads": _reads(processor), "unseen": unseen, "max_new_tokens": max_new_tokens, "seed": seed,
        "fits": sorted(one.digest for one, _ in fitted), "versions": versions(),
    }  # fmt: skip
    bench = Bench(made, counted, Journal(None if record is None else Path(record), about), aim, tick=tick)
    if aim == "latency":
        kept = None if record is None else Path(record).with_name("latency.json")
        bench.seconds = clock(
            made, examples, kept, lambda what, share: tick("timing this machine", int(100 * share), 100)
        )

    found, notes = race(bench, tried, choosing, loss)
    if twice := len(examples) - len({one.key for one in examples}):
        notes.append(f"{twice} examples stand there twice and count once: weigh that where live requests repeat too")
    found = _joined(bench, found, choosing, loss)
    history: tuple[float, ...] = ()
    if levels and isinstance(made, Texts) and aim != "tokens":
        found, history = _profiled(bench, made, found, choosing, loss, seed)
    full = bench.measured(Setting(), choosing)
    stake = fmean(lost(counted, bench.answer(one, Setting()).text, "", one) for one in choosing)
    rungs = ladder(bench, found, full, choosing) if stake > loss else []
    test = _test(bench, rungs, calibrating, [loss, confidence, named]) if rungs else 1
    if test > 1:
        notes.append(f"{again(test)}; for a promise of this one, calibrate with examples of its own")
    sequence, passed = promise(bench, rungs, calibrating, loss, confidence)
    chosen = sequence[passed - 1].setting if passed else None
    held: Measured | None = None
    budgets: tuple[tuple[float, ...], ...] = ()
    worst: tuple[Worst, ...] = ()
    shown = sequence[max(0, passed - 1)].setting if sequence else None
    if chosen is not None:
        bench.ask("held-out examples", held_out, [chosen])
        held, budgets = bench.measured(chosen, held_out), _shares(bench, chosen, choosing)
    if shown is not None:
        worst = _worst(bench, shown, [*choosing, *calibrating, *held_out])
    if chosen is not None:
        why = ""
    elif stake <= loss:
        why = (
            f"an answer of nothing at all would lose {stake:.4f} ({named}) on these examples, no more than was asked: "
            f"there is nothing to lose. Does the model answer them as it is?"
        )
    else:
        why = _why(found, sequence, tried, aim)
    called = name or getattr(model, "name_or_path", "") or type(model).__name__
    return Tuned(
        model=called, aim=aim, loss=loss, confidence=confidence, measure=named, chosen=chosen,
        why=why, fingerprint=fingerprint, unseen=unseen, max_new_tokens=max_new_tokens, stake=stake, full=full,
        searched=tuple(found), sequence=tuple(sequence), held=held, budgets=budgets, history=history, worst=worst,
        notes=tuple(notes), seed=seed, date=date.today().isoformat(),
        parts={"search": len(choosing), "calibration": len(calibrating), "held out": len(held_out)},
        contexts=len(by_context(calibrating)), test=test, seconds=time.perf_counter() - start, versions=versions(),
    )  # fmt: skip


def parted(
    examples: Sequence[Example], loss: float, confidence: float, measure: str, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """The examples' parts; what cannot be promised with them is said here, before a model is needed."""
    for name, value in (("loss", loss), ("confidence", confidence)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise FewerError(f"tune({name}={value!r}): it is a number in (0, 1)")
    if not 0 < loss < 1:
        raise FewerError(
            f"tune(loss={loss!r}): it is a mean loss in (0, 1), such as 0.02; 0 cannot be promised from examples"
        )
    if not 0 < confidence < 1:
        raise FewerError(f"tune(confidence={confidence!r}): it is in (0, 1), such as 0.95")
    if measure == "wrong" and (bare := [one.line for one in examples if not one.answers]):
        raise FewerError(
            f"{len(bare)} of {len(examples)} examples have no answer (the first is in line {bare[0]}), which measure="
            f"'wrong' needs; add them, or measure='changed', which needs none"
        )
    return parts(examples, risk.needed(loss, 1 - confidence), seed)


def _arguments(methods: Any, fit: Any, max_new_tokens: Any, record: Any) -> None:
    named = methods is None or (isinstance(methods, (list, tuple)) and all(isinstance(one, str) for one in methods))
    if not named or (methods is not None and not methods):
        raise FewerError(f"tune(methods={methods!r}): give a list of names")
    if isinstance(fit, (str, Path)):
        raise FewerError(f"tune(fit={fit!r}): give a list of files")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise FewerError(f"tune(max_new_tokens={max_new_tokens!r}): give a whole number from 1 on")
    if record is not None and not isinstance(record, (str, Path)):
        raise FewerError(f"tune(record={record!r}): give the path of a file")


def _reads(processor: Any) -> str:
    """A digest of how texts and pictures become tokens: templates, vocabulary, sizes."""
    parts = [processor, getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None)]
    said = [str(getattr(part, "chat_template", None)) for part in parts]
    said += [part.backend_tokenizer.to_str() for part in parts if hasattr(part, "backend_tokenizer")]
    said += [part.to_json_string() for part in parts[2:] if hasattr(part, "to_json_string")]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _test(bench: Bench, rungs: Sequence[Measured], examples: Sequence[Example], asked: list[Any]) -> int:
    """Which test this is of those on these calibration examples: they are no new evidence for a second. A loss of your
    own is told from another by its name."""
    told = sorted((example.key, *example.answers) for example in examples)
    test = json.dumps([asked, [one.setting.key for one in rungs], told])
    return bench.journal.test(hashlib.sha256(test.encode()).hexdigest())


def _joined(bench: Bench, found: list[Measured], examples: Sequence[Example], asked: float) -> list[Measured]:
    """With prompts' methods and caches' tried one behind the other: the two best of each."""
    texts = best([one for one in found if one.setting.held is None], bench.aim, 2)
    helds = best([one for one in found if one.setting.text is None], bench.aim, 2)
    both = joined([one.setting for one in texts], [one.setting for one in helds])
    return [*found, *_measured(bench, "prompt and cache together", both, examples, asked)]


def _profiled(
    bench: Bench, host: Texts, found: list[Measured], examples: Sequence[Example], asked: float, seed: int
) -> tuple[list[Measured], tuple[float, ...]]:
    """With budgets of their own for the layers and heads of the cheapest setting that drops entries of a cache."""
    able = [
        one for one in found
        if one.setting.text is None and one.setting.held is not None and not host.alone(one.setting.held)
        and isinstance(one.setting.held.keep, float) and one.setting.held.keep < 1
    ]  # fmt: skip
    if not able:
        return found, ()
    held = min(able, key=lambda one: one.cost(bench.aim)).setting.held
    assert held is not None
    profile = search(host, held, examples, bench.journal, seed=seed, tick=bench.tick)
    settings = [Setting(held=profile.scaled(share)) for share in SCALES]
    return [*found, *_measured(bench, "budgets of their own", settings, examples, asked)], profile.history


def _measured(
    bench: Bench, what: str, settings: Sequence[Setting], examples: Sequence[Example], asked: float
) -> list[Measured]:
    if not settings:
        return []
    bench.ask(what, examples, settings)
    found = [bench.measured(one, examples) for one in settings if not bench.refused(one, examples)]
    return [one for one in found if plausible(one.loss, one.n, asked)]


def _why(found: Sequence[Measured], sequence: Sequence[Measured], tried: Sequence[Setting], aim: str) -> str:
    """What was in the way of a promise."""
    if not found:
        return f"every one of {len(tried)} settings lost too much on the examples of the search."
    if not sequence:
        return f"none of the settings that lose little takes less than the model as it is ({aim})."
    first = sequence[0]
    if first.p is None:
        return f"the safest setting, {first.setting}, lost too much on the calibration examples to pass."
    return (
        f"the safest setting, {first.setting}, lost {first.loss:.4f} on {first.n} calibration examples, which is too "
        f"much to promise the loss that was asked (p = {first.p:.3f}); a new and larger set of examples may help."
    )


def _shares(bench: Bench, setting: Setting, examples: Sequence[Example]) -> tuple[tuple[float, ...], ...]:
    """What each head of each layer kept, on average."""
    said = [bench.answer(example, setting).shares for example in examples]
    return tuple(tuple(sum(one) / len(one) for one in zip(*heads, strict=True)) for heads in zip(*said, strict=True))


def _worst(bench: Bench, setting: Setting, examples: Sequence[Example]) -> tuple[Worst, ...]:
    """The examples on which a setting lost most, of those it was asked."""
    asked = [one for one in examples if bench.journal.get(one, setting) is not None]
    most = sorted(asked, key=lambda one: -bench.lost(one, setting))[:WORST]
    return tuple(
        Worst(
            one.question, bench.answer(one, Setting()).text, bench.answer(one, setting).text, bench.lost(one, setting),
            one.line, one.task,
        )
        for one in most
        if bench.lost(one, setting) > 0
    )  # fmt: skip
