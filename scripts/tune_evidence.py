"""The evidence for `fewer tune`: the plan that it finds on real models, beside fixed methods at the same bytes.

    python scripts/tune_evidence.py [--part texts|pictures|pictures-0.05]

Each part draws examples, tunes on them at loss 0.02, or as its name says, and confidence 0.95, and then asks 40 that
the search has never had, once under the plan and once under each fixed method with exactly the plan's bytes for that
prompt. Answers are kept under out/tune-evidence as they come; the same command goes on from them. What is found goes to
results/tune.json.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fewer import models, reference_vlm
from fewer.tuning.dial import tune
from fewer.tuning.examples import Example
from fewer.tuning.journal import Journal
from fewer.tuning.losses import wrong
from fewer.tuning.pictures import Pictures
from fewer.tuning.result import Tuned
from fewer.tuning.search import Bench
from fewer.tuning.setting import Held, Setting
from fewer.tuning.texts import Texts
from fewer_eval import environment, looking, report
from fewer_eval.asked import SETTINGS
from fewer_eval.looking.remembered import Remembered
from fewer_eval.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tune.md"
RESULTS, KEPT = ROOT / "results" / "tune.json", ROOT / "out" / "tune-evidence"
FRESH, TOKENS = 40, 500
CONFIDENCE = 0.95
CACHES = ("kvzip", "keydiff", "lagkv", "adakv", "tova")
METHODS = ("keydiff", *(f"{name}+kivi-4bit" for name in CACHES), "kivi-8bit", "kivi-4bit", "kivi-2bit")
FIXED = tuple((name, store) for name in ("random", "uniform", *CACHES) for store in (None, "kivi-4bit"))
VISUAL = ("divprune", "cdpruner", "vispruner", "visionzip", "visual-pooling", "fastv", "pyramiddrop", "divprune>fastv")
SEEN = ("beside", "cell", "colour", "count", "word", "kind")


@dataclass(frozen=True)
class Part:
    """A model, who asks it, and examples from a seed."""

    name: str
    methods: Sequence[str]
    host: Any
    processor: Any
    draw: Callable[[int, int], list[Example]]
    n: int
    """Examples to tune on: more where they cost less."""
    fixed: Callable[[float], list[Setting]]
    """Settings that hold so many bytes, or so large a share."""
    loss: float = 0.02
    seed: int = 0


def questions(tokenizer: Any) -> Callable[[int, int], list[Example]]:
    """Needles in 500 tokens, and years that one document of six tells: one half each, mixed."""

    def draw(n: int, seed: int) -> list[Example]:
        needles = TASKS["needle-single"].make(tokenizer, TOKENS, n // 2, seed)
        made = [Example(one.context, one.question, one.answers, task="needle-single") for one in needles]
        for asked in SETTINGS["multi-document"].make(n - n // 2, seed):
            text = "\n\n".join(asked.documents)
            made.append(Example(text, asked.question, (asked.answer,), task="multi-document"))
        random.Random(seed).shuffle(made)
        return [replace(one, line=number) for number, one in enumerate(made, 1)]

    return draw


def texts() -> Part:
    model, tokenizer = models.load("default", say=print)
    host = Texts(model, tokenizer, most=24)

    def fixed(size: float) -> list[Setting]:
        return [Setting(held=Held(name, f"{int(size)}B", store=store)) for name, store in FIXED]

    return Part("texts", METHODS, host, tokenizer, questions(tokenizer), 210, fixed)


class Remembering(Pictures):
    """Encodes each picture once: the tower does the same under every setting here."""

    def __init__(self, model: Any, processor: Any, pictures: dict[str, Any]) -> None:
        super().__init__(model, processor, most=5, write=reference_vlm.prompt)
        self.tower, self.drawn = Remembered(model.base_model.vision_tower), pictures

    def picture(self, name: str) -> Any:
        return self.drawn[name]

    def ask(self, example: Example, settings: Sequence[Setting]) -> Any:
        with self.tower.attached():
            return super().ask(example, settings)


def pictures(name: str = "pictures", loss: float = 0.02, seed: int = 0) -> Part:
    model, processor = reference_vlm.load(say=print)
    drawn: dict[str, Any] = {}

    def draw(n: int, seed: int) -> list[Example]:
        made = []
        for number in range(n):
            task = SEEN[number % len(SEEN)]
            one = looking.sample(task, 10_000 * (seed + 1) + number)
            names = tuple(f"{task} {seed} {number} {index}" for index in range(len(one.images)))
            drawn.update(zip(names, one.images, strict=True))
            made.append(Example("", one.question, (one.answer,), names, task, number + 1))
        return made

    def fixed(share: float) -> list[Setting]:
        """Of the same tokens a layer: what cuts late has read more before."""
        keep = max(0.01, min(1.0, share))
        names = ("random", "uniform", *VISUAL)
        held = [
            (tuple(n.split(">")) if ">" in n else n, "mean" if n in ("fastv", "pyramiddrop") else None) for n in names
        ]
        return [Setting(held=Held(method, round(keep, 4), counted=how)) for method, how in held]

    return Part(name, VISUAL, Remembering(model, processor, drawn), processor, draw, 800, fixed, loss, seed)


def beside(part: Part, found: Tuned, tick: Any) -> dict[str, Any]:
    """Fresh examples under the plan, and under fixed methods at its bytes, or for pictures at its tokens."""
    assert found.chosen is not None
    bench = Bench(part.host, wrong, Journal(KEPT / f"{part.name}-fresh.jsonl", {"part": part.name}), "memory")
    losses: dict[str, list[float]] = {}
    rows: dict[str, list[tuple[float, float]]] = {}
    fresh = part.draw(FRESH, 777)
    for done, example in enumerate(fresh):
        tick(f"{part.name}: fixed methods beside the plan", done, len(fresh))
        bench.one(example, [found.chosen])
        full, plan = (bench.answer(example, one) for one in (Setting(), found.chosen))
        size = plan.bytes if part.name == "texts" else 1 - (full.tokens - plan.tokens) / 256 / len(example.images)
        fixed = part.fixed(size)
        bench.one(example, fixed)
        for setting in (Setting(), found.chosen, *fixed):
            name = "full" if setting == Setting() else "plan" if setting == found.chosen else named(setting)
            answer = bench.answer(example, setting)
            if not answer.refused:
                losses.setdefault(name, []).append(bench.lost(example, setting))
                rows.setdefault(name, []).append((answer.bytes, answer.tokens))
    right = fmean(example.score(bench.answer(example, Setting()).text) for example in fresh)
    return {
        "examples": len(fresh),
        "full model right": right,
        "lines": [
            {"setting": name, "n": len(values), "loss": fmean(values), "bytes": fmean(a for a, _ in rows[name]),
             "tokens": fmean(b for _, b in rows[name])}
            for name, values in sorted(losses.items(), key=lambda item: fmean(item[1]))
        ],
    }  # fmt: skip


def page(state: dict[str, Any]) -> str:
    """What docs/tune.md says of the results."""
    told = []
    for name, what in (
        ("texts", f"**The default model**, needles in {TOKENS} tokens and questions about six documents, half each"),
        (
            "pictures",
            "**The reference vision-language model** (trained for this, not a general one), six kinds of questions",
        ),
    ):
        if name not in state:
            continue
        said = state[name]
        sizes = said["parts"]
        told += [
            f"{what}: {sizes['search']} examples to search with, {sizes['calibration']} to calibrate, "
            f"{sizes['held out']} held out; {said['wall_seconds'] / 60:.0f} minutes, "
            f"{said['cpu_seconds'] / 60:.0f} of them on the processor, beside other work.\n",
            f"> {said['promise']}\n",
        ]
        if said["fresh"] is None:
            continue
        fresh = said["fresh"]
        told += [
            f"On {fresh['examples']} fresh examples, the full model gets {fresh['full model right']:.2f}, beside "
            + (
                "fixed methods with the plan's bytes for each prompt"
                if name == "texts"
                else "fixed methods at as many tokens"
            )
            + ":\n",
            "| setting | loss | MB | tokens read | n |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {one['setting']} | {one['loss']:.3f} | {one['bytes'] / 1e6:.2f} | {one['tokens']:.0f} | {one['n']} |"  # noqa: E501
                for one in fresh["lines"]
            ),
            "",
        ]
    return "\n".join(told)


def named(setting: Setting) -> str:
    assert setting.held is not None
    method = setting.held.method if isinstance(setting.held.method, str) else " > ".join(setting.held.method)
    return method + (f" in {setting.held.store}" if setting.held.store else "")


@contextmanager
def timed(path: Path) -> Iterator[None]:
    """Add what passes inside to the seconds in a file: a search that is broken off and taken up again took both."""
    before = json.loads(path.read_text()) if path.exists() else {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        path.parent.mkdir(parents=True, exist_ok=True)
        spent = {"wall_seconds": before["wall_seconds"] + wall, "cpu_seconds": before["cpu_seconds"] + cpu}
        path.write_text(json.dumps({**before, **spent}))


PARTS: dict[str, Callable[[], Part]] = {
    "texts": texts,
    "pictures": pictures,
    "pictures-0.05": lambda: pictures("pictures-0.05", 0.05, 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), action="append")
    options = parser.parse_args()
    columns = (TextColumn("{task.description:48s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for name in options.part or PARTS:
        part = PARTS[name]()
        with Progress(*columns) as progress:
            bars: dict[str, Any] = {}

            def tick(what: str, done: int, total: int, bars: Any = bars, progress: Any = progress) -> None:
                bars.setdefault(what, progress.add_task(what, total=total) if what not in bars else None)
                progress.update(bars[what], completed=done)

            with timed(KEPT / f"{name}-seconds.json"):
                found = tune(
                    part.host.model, part.draw(part.n, part.seed), loss=part.loss, confidence=CONFIDENCE,
                    methods=part.methods, host=part.host, record=KEPT / f"{name}.jsonl", name="default", tick=tick,
                )  # fmt: skip
            fresh = beside(part, found, tick) if found.chosen is not None else None
        found = replace(found, hardware=environment.hardware(), versions={**environment.versions(), **found.versions})
        said = {**found.to_dict(), "fresh": fresh, **json.loads((KEPT / f"{name}-seconds.json").read_text())}
        state = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        state.update({"date": date.today().isoformat(), name: said})
        RESULTS.write_text(json.dumps(state, indent=1) + "\n")
        before, _, rest = PAGE.read_text().partition("<!-- evidence -->")
        PAGE.write_text(
            f"{before}<!-- evidence -->\n{page(state)}\n<!-- /evidence -->{rest.partition('<!-- /evidence -->')[2]}"
        )
        report.write_tuned(KEPT / f"{name}.html", found)
        print(found.promise)
        for line in (fresh or {}).get("lines", []):
            print(f"{line['setting']:32s} loss {line['loss']:.3f}  {line['bytes'] / 1e6:.2f} MB  n={line['n']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
