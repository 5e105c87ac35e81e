"""How well the reference model answers held-out samples, and how well without seeing them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewer.reference_vlm import IMAGE, VISUAL, prompt
from fewer_eval.looking import TASKS, Task, dialogue
from fewer_eval.looking.lessons import visual_tokens
from fewer_eval.looking.pool import seen

Asked = tuple[tuple[Image.Image, ...], str]
"""Images, and the text with a mark for each."""
CLEARLY = 0.2
"""A task is used where the model beats its blind self and the most frequent answer by this much."""


@dataclass(frozen=True)
class Grade:
    """Shares of `n` samples answered exactly: with every visual token, blind (each token is the mean of all, so only
    the question tells), and by always giving the most frequent answer."""

    task: str
    split: str
    n: int
    full: float
    blind: float
    majority: float
    frequent: str
    used: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Grader:
    """Answers many samples; each picture is seen by the tower once, whatever is asked of it.

    `quick` is in half precision, as it was trained.
    """

    def __init__(
        self, model: Any, processor: Any, mean: Float[Tensor, "d"], quick: bool = True, side_by_side: int = 20
    ) -> None:
        self.model, self.processor, self.mean = model, processor, mean
        self.quick, self.side_by_side = quick, side_by_side
        self.known: dict[bytes, Float[Tensor, "p d"]] = {}

    def task(self, task: Task, seeds: Sequence[int]) -> Grade:
        samples = [task(seed) for seed in seeds]
        asked = [(one.images, prompt(one.question, len(one.images))) for one in samples]
        return self.grade(task.name, task.split, asked, [one.answer for one in samples])

    def second_turns(self, seeds: Sequence[int]) -> Grade:
        """The second question of a dialogue, behind the first and its right answer."""
        asked, right = [], []
        for seed in seeds:
            images, (first, (question, answer)) = dialogue(seed)
            asked.append((images, prompt(question, before=[first])))
            right.append(answer)
        return self.grade("second turn", TASKS["cell"].split, asked, right)

    def grade(self, name: str, split: str, asked: Sequence[Asked], right: Sequence[str]) -> Grade:
        full, blind = (
            sum(a == b for a, b in zip(self.answers(asked, blind), right, strict=True)) / len(right)
            for blind in (False, True)
        )
        frequent, times = Counter(right).most_common(1)[0]
        used = full - max(blind, times / len(right)) >= CLEARLY
        return Grade(name, split, len(right), full, blind, times / len(right), frequent, used)

    @torch.inference_mode()
    def answers(self, asked: Sequence[Asked], blind: bool = False) -> list[str]:
        """What the model says, greedily; one question is never the context of another."""
        said = []
        tokenizer = self.processor.tokenizer
        for start in range(0, len(asked), self.side_by_side):
            some = asked[start : start + self.side_by_side]
            texts = [text.replace(IMAGE, IMAGE * VISUAL) for _, text in some]
            read = tokenizer(texts, return_tensors="pt", padding=True).to(self.model.device)
            features = torch.cat([self.features(picture) for images, _ in some for picture in images])
            if blind:
                features = self.mean.expand_as(features)
            projected = self.model.model.multi_modal_projector(features.to(self.model.device))
            visual = read.input_ids == self.model.config.image_token_id
            embedded = visual_tokens(self.model.get_input_embeddings()(read.input_ids), visual, projected)
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.quick):
                written = self.model.generate(
                    inputs_embeds=embedded, attention_mask=read.attention_mask, max_new_tokens=5, do_sample=False
                )
            said += [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        return said

    def features(self, picture: Image.Image) -> Float[Tensor, "p d"]:
        key = picture.tobytes()
        if key not in self.known:
            self.known[key] = seen(self.model.model.vision_tower, [picture], self.quick)[0].half()
        return self.known[key].float()
