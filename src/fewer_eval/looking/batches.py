"""Whether a batch with padding is answered as its prompts are one by one.

same      share of prompts with the same answer
apart     the most that a logit of the answer's first token differs
chosen    share of pictures that kept the very same tokens
counts    whether every picture kept as many
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fewer
from fewer.reference_vlm import prompt
from fewer.types import FewerError
from fewer_eval.looking import Sample, sample

SIZE = 8
"""Prompts of a batch."""


@dataclass(frozen=True)
class Batched:
    """One method at one keep. `error` is there where the method refuses."""

    method: str
    keep: int
    n: int
    same: float = 0.0
    apart: float = 0.0
    chosen: float = 0.0
    counts: bool = True
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Said:
    """What some prompts gave, row by row: the answers, the logits `(b, words)` of their first tokens, and which tokens
    of each picture were left."""

    answers: Sequence[str]
    logits: Tensor
    kept: Sequence[Sequence[Tensor]]


Ask = Callable[[Sequence[Any]], Said]
"""Asks so many prompts at once."""


def mixed(tasks: Sequence[str], n: int) -> list[Sample]:
    """Held-out samples of all tasks in turn: of different lengths, and with one image or two."""
    return [sample(tasks[seed % len(tasks)], seed) for seed in range(n)]


def asking(model: Any, processor: Any, method: str, keep: int) -> Ask:
    """Ask a model with a method; "full" is the model without fewer."""

    @torch.inference_mode()
    def ask(some: Sequence[Sample]) -> Said:
        inputs = processor(
            images=[list(one.images) for one in some],
            text=[prompt(one.question, len(one.images)) for one in some],
            return_tensors="pt",
            padding=True,
        )
        how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        if method == "full":
            out, kept = model.generate(**inputs, **how), [[torch.arange(0) for _ in one.images] for one in some]
        else:
            with fewer.compress(model, method, keep=keep) as run:
                out = model.generate(**inputs, **how)
            kept = run.kept
        written = out.sequences[:, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return Said([text.strip() for text in said], out.logits[0], kept)

    return ask


def compare(ask: Ask, prompts: Sequence[Any], method: str, keep: int) -> Batched:
    """The same prompts in batches of `SIZE` and one by one."""
    same, chosen, apart, counts = [], [], 0.0, True
    try:
        for start in range(0, len(prompts), SIZE):
            some = prompts[start : start + SIZE]
            together = ask(some)
            for row, one in enumerate(some):
                alone = ask([one])
                pictures = list(zip(together.kept[row], alone.kept[0], strict=True))
                chosen += [torch.equal(a, b) for a, b in pictures]
                counts &= all(len(a) == len(b) for a, b in pictures)
                apart = max(apart, float((together.logits[row] - alone.logits[0]).abs().max()))
                same.append(together.answers[row] == alone.answers[0])
    except FewerError as why:
        return Batched(method, keep, 0, error=str(why))
    n = len(prompts)
    return Batched(method, keep, n, sum(same) / n, apart, sum(chosen) / len(chosen), counts)
