"""A vision-language model, asked about pictures, setting by setting."""

from collections.abc import Sequence
from typing import Any

import torch

from fewer.report import Report
from fewer.tuning.examples import Example
from fewer.tuning.hosts import Answer, shares_of, shortened
from fewer.tuning.setting import Held, Setting
from fewer.types import FewerError


class Pictures:
    """A vision-language model and its processor, asked about pictures.

    Args:
        write: the prompt for a question about so many pictures, as the model expects it; left out, the processor's
            chat template makes it.
        see: what is done to a picture file's picture before the processor has it.
    """

    def __init__(self, model: Any, processor: Any, *, most: int = 64, write: Any = None, see: Any = None) -> None:
        self.model, self.processor, self.most = model, processor, most
        self.loaded: set[str] = set()
        self.write, self.see = write or self._turn, see or (lambda picture: picture)

    def check(self, examples: Sequence[Example]) -> None:
        """Raise for examples that cannot be asked, before hours are spent on others."""
        for example in examples:
            if not example.images:
                raise FewerError(
                    f"example {example.line} has no image, and {type(self.model).__name__} is asked about them"
                )
            for name in example.images:
                try:
                    self.picture(name)
                except FewerError as why:
                    raise FewerError(f"example {example.line}: {why}") from None

    @torch.inference_mode()
    def ask(self, example: Example, settings: Sequence[Setting]) -> list[Answer]:
        """One answer a setting, in their order."""
        images = [self.see(self.picture(name)) for name in example.images]
        answers = []
        for setting in settings:
            question, took = example.question, 0.0
            if example.context:
                tokenizer = self.processor.tokenizer
                context, took = shortened(setting, example.context, question, tokenizer, self.loaded)
                question = f"{context}\n\n{question}"
            text = self.write(question, len(images))
            try:
                made = self.processor(images=images, text=[text], return_tensors="pt")
            except ValueError as why:
                sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
                raise FewerError(
                    f"example {example.line}: the processor makes no prompt of pictures of {sizes} pixels: {why}"
                ) from why
            inputs = made.to(self.model.device)
            try:
                answer = self._one(setting, inputs)
                answers.append(answer._replace(choosing=answer.choosing + took))
            except FewerError as why:
                answers.append(Answer("", refused=str(why)))
        return answers

    def picture(self, name: str) -> Any:
        """A picture by the name that an example has for it."""
        return _open(name)

    def _one(self, setting: Setting, inputs: Any) -> Answer:
        begun = inputs["input_ids"].shape[1]
        # the model as it is goes through a cache of ours too, for its bytes
        whole = setting if setting.held is not None else Setting(held=Held("full", only="visual"))
        with whole.under(self.model) as run:
            written = self.model.generate(**inputs, max_new_tokens=self.most, do_sample=False)
        said = self.processor.tokenizer.decode(written[0, begun:], skip_special_tokens=True).strip()
        report = run.report
        cache = report.cache
        had = report.had
        tokens = begun - had + report.mean
        new = written.shape[1] - begun
        return Answer(
            said, _prompt_bytes(cache, new), cache.kept * begun, tokens, new, report.seconds, shares_of(cache)
        )

    def _turn(self, question: str, images: int) -> str:
        pictures: list[dict[str, str]] = [{"type": "image"}] * images
        turn = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
        return str(self.processor.apply_chat_template(turn, add_generation_prompt=True))


def _prompt_bytes(report: Report, new: int) -> float:
    """Bytes of the cache without those of generated tokens, which every setting keeps alike."""
    mine = [layer for layer in report.layers if layer.seen]
    return sum(layer.bytes_kept - layer.bytes_full * new / max(layer.seen[0], 1) for layer in mine)


def _open(name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(name) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError) as why:
        raise FewerError(f"{name!r} is no picture that can be read: {why}") from why
