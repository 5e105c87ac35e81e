"""What a search for a setting could have found, made up; and examples on which methods lost."""

import random

from fewer.tuning.result import Measured, Tuned, Worst
from fewer.tuning.setting import Held, Setting, Text
from fewer_eval.schema import Lost

FULL_BYTES = 46.1e6
SCRIPT = "<script>alert(1)</script>"
KEEPS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)


def measured(setting: Setting, keep: float, loss: float, n: int = 60, p: float | None = None) -> Measured:
    cut = setting.text.keep if setting.text else 1.0
    return Measured(
        setting=setting, n=n, loss=loss, bytes=FULL_BYTES * keep * cut, tokens=2000 * cut,
        seconds=0.5 + 1.5 * cut * (0.4 + 0.6 * keep), tasks={"needle": loss / 2, "prices": loss * 1.5}, p=p,
    )  # fmt: skip


CHOSEN = Setting(None, Held("adakv", 0.25))


def make_tuned(**change: object) -> Tuned:
    """A search over caches and prompts in which `adakv @ 0.25` was chosen."""
    noise = random.Random(7)
    searched = []
    for name, harm in (("adakv", 0.010), ("snapkv", 0.025), ("knorm", 0.08), ("random", 0.2), ("expected", 0.016)):
        for keep in KEEPS:
            loss = min(1.0, harm * (1 / keep - 1) * noise.uniform(0.6, 1.0)) if keep < 0.7 else 0.0
            searched.append(measured(Setting(None, Held(name, keep)), keep, loss))
    for keep in (0.75, 0.5):
        both = Setting(Text("llmlingua2", keep, ("numbers",)), Held("snapkv", 0.25, store="kivi-4bit"))
        searched.append(measured(both, 0.08, 0.3 - 0.3 * keep))
    sequence = tuple(
        measured(Setting(None, Held("adakv", keep)), keep, loss, n=400, p=p)
        for keep, loss, p in ((0.5, 0.0, 0.0003), (0.35, 0.002, 0.004), (0.25, 0.0061, 0.031), (0.15, 0.041, 1.0))
    )
    found: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct",
        "aim": "memory",
        "loss": 0.02,
        "confidence": 0.95,
        "measure": "changed",
        "chosen": CHOSEN,
        "why": "",
        "fingerprint": "0123456789abcdef",
        "unseen": True,
        "max_new_tokens": 64,
        "stake": 1.0,
        "full": measured(Setting(), 1.0, 0.0),
        "searched": tuple(searched),
        "sequence": sequence,
        "held": measured(CHOSEN, 0.25, 0.0105, n=200),
        "budgets": tuple(tuple(0.1 + 0.9 * noise.random() ** 2 for _ in range(3)) for _ in range(30)),
        "history": (0.31, 0.22, 0.19, 0.125),
        "worst": (
            Worst("How much is the lamp?", "The lamp is 13.50 euros.", "The lamp is 31 euros.", 1.0, 17, "prices"),
            Worst(f"What does {SCRIPT} do?", f"It shows 1: {SCRIPT}", "", 0.5, 203, "needle"),
        ),
        "parts": {"search": 60, "calibration": 400, "test": 200},
        "notes": ("knorm @ 0.1 was dropped early",),
        "seconds": 812.0,
        "seed": 7,
        "date": "2026-11-21",
        "command": "fewer tune --data examples.jsonl --loss 0.02 --confidence 0.95 --for memory --seed 7",
        "hardware": {"cpu": "Example CPU 9000", "cores": "2"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "fewer": "0.1.0"},
    }  # fmt: skip
    return Tuned(**{**found, **change})  # type: ignore[arg-type]


def make_worst() -> dict[str, list[Lost]]:
    """Examples on which two methods lost, and a method that lost on none."""
    one = Lost(
        "needle",
        "unseen",
        "What is the code of the red door?",
        "8413",
        "The code is 8413.",
        "The code is 8431.",
        0.0,
        1.0,
    )
    two = Lost("needle", "seen", f"What is {SCRIPT}?", SCRIPT, f"It is {SCRIPT}, twice.", "It is nothing.", 0.5, 0.5)
    return {"snapkv @ 0.25": [one, two], "random @ 0.25": [one], "adakv @ 0.5": []}
