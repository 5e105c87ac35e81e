"""What a method keeps of a model's answers about pictures (reference model trained for this, not a general one).

right      share of samples answered exactly
loyal      share answered as with all visual tokens, right or wrong
seen       share of the tokens under what the answer depends on that the last layer read
mean       visual tokens that a layer read, on average, of each picture
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fewer
from fewer.reference_vlm import SIDE, prompt
from fewer.types import BudgetError, FewerError, MissingSignal
from fewer.vision import PATCH
from fewer_eval.looking import Sample, dialogue, sample
from fewer_eval.looking.remembered import Remembered

TURN = "second turn"
"""The task of asking again, about another region, after the pictures were cut for the first question."""
BATCH = 20


@dataclass(frozen=True)
class Line:
    """One method at one keep on one task; `keep` visual tokens of each picture, as `counted` says. `error` is there
    where the method refuses that budget. `positions` is the way of `fewer.compress`."""

    task: str
    method: str
    keep: int
    counted: str
    n: int
    right: float = 0.0
    loyal: float = 0.0
    seen: float | None = None
    mean: float = 0.0
    error: str = ""
    positions: str = "keep"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Answerer:
    """A model and its processor, that answer the same questions with any method."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tower = Remembered(model.base_model.vision_tower)
        self.full: dict[tuple[str, int], list[str]] = {}

    def measure(self, task: str, method: str, keep: int, counted: str, n: int, positions: str = "keep") -> Line:
        """Ask the first n held-out samples of a task."""
        whole = self.full.get((task, n))
        if whole is None:
            whole = self.full[task, n] = self._ask(task, None, {}, n)[0]
        asked = {"keep": keep, "counted": counted, "positions": positions}
        try:
            said, seen, mean = (whole, 1.0, 256.0) if method == "full" else self._ask(task, method, asked, n)
        except (BudgetError, MissingSignal, FewerError) as why:
            return Line(task, method, keep, counted, 0, error=str(why), positions=positions)
        right = [answer for answer, _ in self._right(task, n)]
        return Line(
            task, method, keep, counted, n,
            sum(a == b for a, b in zip(said, right, strict=True)) / n,
            sum(a == b for a, b in zip(said, whole, strict=True)) / n,
            None if seen is None else round(seen, 4),
            round(mean, 2),
            positions=positions,
        )  # fmt: skip

    def _right(self, task: str, n: int) -> list[tuple[str, Any]]:
        if task == TURN:
            return [(dialogue(seed)[1][1][1], None) for seed in range(n)]
        return [(one.answer, one) for one in (sample(task, seed) for seed in range(n))]

    @torch.inference_mode()
    def _ask(self, task: str, method: Any, asked: Any, n: int) -> tuple[list[str], float | None, float]:
        if task == TURN:
            turns = [self._turns(seed, method, asked) for seed in range(n)]
            return [said for said, _ in turns], None, sum(mean for _, mean in turns) / n
        samples: list[Sample] = [one for _, one in self._right(task, n)]
        said: list[str] = []
        seen, means = [0, 0], 0.0
        for start in range(0, n, BATCH):
            some = samples[start : start + BATCH]
            inputs = self.processor(
                images=[list(one.images) for one in some],
                text=[prompt(one.question, len(one.images)) for one in some],
                return_tensors="pt",
                padding=True,
            )
            written, run = self._generate(inputs, method, asked)
            said += self._read(written[:, inputs["input_ids"].shape[1] :])
            if run is not None:
                means += run.report.mean / sum(len(one.images) for one in some) * len(some)
                for one, pictures in zip(some, run.pictures, strict=True):
                    for boxes, picture in zip(one.boxes, pictures, strict=True):
                        under = _under(boxes)
                        seen[0] += int(under[picture.alive].sum())
                        seen[1] += int(under.sum())
        return said, seen[0] / seen[1] if seen[1] else None, means / n

    def _generate(self, inputs: Any, method: Any, asked: Any) -> tuple[Tensor, Any]:
        if method is None:
            with self.tower.attached():
                return self.model.generate(**inputs, max_new_tokens=5, do_sample=False), None
        if _early(method):  # the tower itself changes
            with fewer.compress(self.model, method, **asked) as run:
                return self.model.generate(**inputs, max_new_tokens=5, do_sample=False), run
        with self.tower.attached(), fewer.compress(self.model, method, **asked) as run:
            return self.model.generate(**inputs, max_new_tokens=5, do_sample=False), run

    def _turns(self, seed: int, method: Any, asked: Any) -> tuple[str, float]:
        """The answer to a second question about a picture that was cut when the first one was asked."""
        images, ((opening, answer), (again, _)) = dialogue(seed)
        first = self.processor(images=list(images), text=prompt(opening), return_tensors="pt")
        text = prompt(again, before=[(opening, answer)])
        both = self.processor(images=list(images), text=text, return_tensors="pt")
        if method is None:
            with self.tower.attached():
                written = self.model.generate(**both, max_new_tokens=5, do_sample=False)
            return self._read(written[:, both["input_ids"].shape[1] :])[0], 256.0
        begun = first["input_ids"].shape[1]
        if not torch.equal(both["input_ids"][:, :begun], first["input_ids"]):
            raise FewerError("the first question is not the beginning of both, so the second is no later turn")
        with self.tower.attached(), fewer.compress(self.model, method, **asked) as run:
            cache = self.model(**first).past_key_values
            written = self.model.generate(
                input_ids=both["input_ids"],
                attention_mask=both["attention_mask"],
                past_key_values=cache,
                max_new_tokens=5,
                do_sample=False,
            )
        return self._read(written[:, both["input_ids"].shape[1] :])[0], run.report.mean

    def _read(self, ids: Tensor) -> list[str]:
        said: list[str] = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in said]


def _early(method: Any) -> bool:
    from fewer.adapters.vlm_stages import early
    from fewer.methods import resolve

    return early(resolve(method))


def _under(boxes: Sequence[Any]) -> Tensor:
    """Which patches a picture's boxes (left, top, right, bottom) lie over."""
    side = SIDE // PATCH
    grid = torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        grid[int(top) // PATCH : -(-int(bottom) // PATCH), int(left) // PATCH : -(-int(right) // PATCH)] = True
    return grid.flatten()
