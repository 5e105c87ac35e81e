"""Who the tests of the search ask: a tiny real model, and one that loses as much as it is told to."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fewer.tuning.examples import Example
from fewer.tuning.hosts import Answer
from fewer.tuning.setting import Held, Setting
from fewer.tuning.texts import Texts
from tests.front.tiny_files import save
from tests.tiny import tiny


def talker(folder: Path, most: int = 6, unseen: bool = False, layers: int = 3) -> Texts:
    """A random model that reads bytes."""
    model = tiny("llama", vocab_size=257, eos_token_id=256, pad_token_id=256, num_hidden_layers=layers)
    return Texts(model, AutoTokenizer.from_pretrained(save(folder)), most=most, unseen=unseen)


def examples(n: int, length: int = 120) -> list[Example]:
    """Contexts of random letters, each with a question of its own."""
    chance = random.Random(7)
    made = []
    for i in range(n):
        letters = "".join(chance.choices("abcdefgh ", k=length)).strip()
        made.append(Example(letters, f"what is {i}?", (str(i),), task="odd" * (i % 2), line=i + 1))
    return made


def half(full: str, said: str, example: Example) -> float:
    """Another answer is half lost, none at all is lost: a random model's answers change with the least touch."""
    return 0.5 * (full != said) if said else 1.0


class Told:
    """A host whose settings lose with a chance that their keep says, and hold as much of 1000 bytes.

    `risks` maps keep to that chance; `asked` counts the answers that were made.
    """

    model: Any = None

    def __init__(self, risks: dict[float, float], seed: int = 0) -> None:
        self.risks, self.seed, self.asked = risks, seed, 0

    def check(self, examples: Sequence[Example]) -> None:
        pass

    def ask(self, example: Example, settings: Sequence[Setting]) -> list[Answer]:
        out = []
        for setting in settings:
            self.asked += 1
            keep = float(setting.held.keep) if setting.held else 1.0  # type: ignore[arg-type]
            chance = random.Random(f"{self.seed}/{example.key}/{setting.key}").random()
            wrong = chance < self.risks.get(keep, 0.0)
            out.append(Answer("none" if wrong else example.answers[0], 1000 * keep, 10 * keep, 10, 1))
        return out


def told(keep: float) -> Setting:
    """A setting that `Told` knows by its keep."""
    return Setting(held=Held("snapkv", keep))
