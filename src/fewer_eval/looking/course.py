"""The course that the reference model takes: which lessons, how fast, how long; it can be stopped and gone on with."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer_eval.looking import TASKS
from fewer_eval.looking.learner import Learner
from fewer_eval.looking.lessons import Batch, lesson, questions, together
from fewer_eval.looking.pool import Pool


@dataclass(frozen=True)
class Recipe:
    """What can be set. Every step has a batch of grids and one of another sort, in turn."""

    minutes: float
    rate: float = 3e-3
    grids: int = 4
    others: int = 3
    pairs: int = 2
    many: int = 24
    aside: float = 0.5
    """Weight of the loss on marks beside that on answers."""
    pointing: float = 0.5
    """Weight of the loss on where two heads look; it falls to zero, and from `alone` of the time on there is none."""
    alone: float = 0.9
    warm: int = 50
    fall: float = 0.4
    """Share of the time in which the rate falls to zero, at the end."""
    seed: int = 0


@dataclass
class Course:
    """A training run that can be stopped and gone on with."""

    learner: Learner
    tokenizer: Any
    pools: dict[str, Pool]
    recipe: Recipe
    device: str = "cpu"
    steps: int = 0
    spent: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"lessons/{self.recipe.seed}")
        mine = [one for one in self.learner.parameters() if one.requires_grad]
        inner = {id(one) for one in [*self.learner.language.layers.parameters(), *self.learner.projector.parameters()]}
        matrices = [one for one in mine if one.ndim == 2 and id(one) in inner]
        chosen = {id(one) for one in matrices}
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=self.recipe.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [one for one in mine if id(one) not in chosen], self.recipe.rate, (0.9, 0.98), weight_decay=0.0
            ),
        ]

    def batch(self, sort: str) -> tuple[Batch, Tensor]:
        """Lessons of one sort of scene, or of pairs of grids, and the features of their images."""
        pool, recipe = self.pools["grid" if sort == "pair" else sort], self.recipe
        many = {"grid": recipe.grids, "pair": recipe.pairs}.get(sort, recipe.others)
        chosen = [[pool.draw(self.rng) for _ in range(1 + (sort == "pair"))] for _ in range(many)]
        lessons = []
        for indices in chosen:
            asked = questions([pool.scenes[i] for i in indices], self.rng, recipe.many // len(indices))
            lessons.append(lesson(asked, [pool.marks[i] for i in indices], self.tokenizer))
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        features = pool.features[[i for indices in chosen for i in indices]]
        return together(lessons, self.tokenizer.pad_token_id, image).to(self.device), features.to(self.device)

    def rate(self) -> float:
        left = 1 - self.spent / (60 * self.recipe.minutes)
        return self.recipe.rate * min(1.0, (self.steps + 1) / self.recipe.warm, max(0.0, left) / self.recipe.fall)

    def step(self) -> Iterator[tuple[float, float, Tensor, Tensor]]:
        """One step on two batches; gives both losses of each, and what was right in which task."""
        for sort in ("grid", ("page", "pair", "portrait", "pair")[self.steps % 4]):
            batch, features = self.batch(sort)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                answers, aside, right, task = self.learner(batch, features)
            loss = answers + self.recipe.aside * aside
            if (weight := self.recipe.pointing * (1 - self.spent / (60 * self.recipe.minutes * self.recipe.alone))) > 0:
                loss = loss + weight * self.learner.looking(batch)
            loss.backward()
            yield answers.item(), aside.item(), right.cpu(), task.cpu()
        nn.utils.clip_grad_norm_([one for one in self.learner.parameters() if one.requires_grad], 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def run(self, checkpoint: Path, say: Callable[[str], None] = print, every: int = 50) -> None:
        """Train until the time is spent; a line of the curve every so many steps, a checkpoint every two lines."""
        if checkpoint.exists():
            self.load(checkpoint)
        losses: dict[str, list[float]] = defaultdict(list)
        right: dict[str, list[bool]] = defaultdict(list)
        while self.spent < 60 * self.recipe.minutes:
            start = time.perf_counter()
            for which, (answers, aside, good, task) in enumerate(self.step()):
                losses["grid" if which == 0 else "other"].append(answers)
                losses["marks"].append(aside)
                for name, index in zip(TASKS, range(len(TASKS)), strict=True):
                    right[name] += good[task == index].tolist()
            self.spent += time.perf_counter() - start
            if self.steps % every == 0:
                line: dict[str, Any] = {"step": self.steps, "minutes": round(self.spent / 60, 2)}
                line |= {f"loss {name}": round(sum(some) / len(some), 4) for name, some in losses.items()}
                line |= {name: round(sum(some) / len(some), 3) for name, some in right.items() if some}
                self.curve.append(line)
                say(str(line))
                losses, right = defaultdict(list), defaultdict(list)
                if self.steps % (2 * every) == 0:
                    self.save(checkpoint)
        self.save(checkpoint)

    def save(self, checkpoint: Path) -> None:
        state: dict[str, Any] = {
            "learner": self.learner.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
        }
        state |= {"steps": self.steps, "spent": self.spent, "curve": self.curve, "rng": self.rng.getstate()}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    def load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, map_location=self.device, weights_only=False)
        self.learner.load_state_dict(state["learner"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.steps, self.spent, self.curve = state["steps"], state["spent"], state["curve"]
        self.rng.setstate(state["rng"])
