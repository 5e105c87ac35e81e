"""Train Provence's joint head (arXiv 2501.16214) on an encoder's upper layers: which sentences of a passage answer.

    loss = mean cross-entropy over the passages' tokens + 0.05 (rerank score - 1 if the passage answers, else 0)^2

A fit holds the two heads and the layers that were trained; what lies below stays as it was.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewer.fit import Fit, fingerprint
from fewer.score.embed import Embedder, embedder
from fewer.score.joint import Cited, Judged, Row, judge
from fewer.score.yes_no import plain
from fewer.types import FewerError

RERANK = 0.05
"""The rerank score's part in the loss."""

HELD = 0.1
"""The share of the examples that is held out."""


def row_of(embed: Embedder, example: Cited) -> Row:
    """An example as the encoder reads it, cut at what it can read."""
    question = plain(embed.tokenizer, example.question)[: embed.longest // 2]
    ids: list[int] = []
    useful: list[int] = []
    for sentence, use in zip(example.sentences, example.useful, strict=True):
        mine = plain(embed.tokenizer, sentence)
        ids += mine
        useful += [int(use)] * len(mine)
    room = embed.longest - 3 - len(question)
    return Row(question, ids[:room], useful[:room])


def loss_of(judged: Judged) -> Tensor:
    """The loss of a batch."""
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        judged.logits[judged.inside], judged.useful[judged.inside]
    )
    return each + RERANK * ((judged.rerank - judged.useful.amax(-1)) ** 2).mean()


def train(
    model: Any,
    examples: Sequence[Cited],
    *,
    layers: int = 2,
    epochs: int = 4,
    rate: float = 4e-4,
    batch: int = 8,
    seed: int = 0,
    tick: Callable[[str, float], None] = lambda what, share: None,
) -> Fit:
    """The fit of a joint head to this encoder, see `fewer.score.embed.embedder`.

    Args:
        examples: at least ten, a tenth of which is held out.
        layers: how many of the encoder's top layers are trained beside the heads.
        rate: of learning, for the layers; the heads learn ten times as fast. Both are warmed up and then fall.

    Raises:
        FewerError: there are too few examples, or the encoder has fewer layers, or ones with other names than BERT's.
    """
    if len(examples) < 10:
        raise FewerError(f"a joint head cannot be fitted to {len(examples)} examples; give at least 10")
    embed = embedder(model)
    depth, wide = embed.model.config.num_hidden_layers, embed.model.config.hidden_size
    tops = tuple(f"encoder.layer.{index}." for index in range(depth - layers, depth))
    own = {name: weight for name, weight in embed.model.named_parameters() if tops and name.startswith(tops)}
    if not 0 <= layers <= depth or (layers and not own):
        raise FewerError(f"layers={layers!r}: this {type(embed.model).__name__} has {depth} layers, named as BERT's")
    draw = random.Random(f"joint/{seed}")
    start = torch.Generator().manual_seed(seed)
    heads = {f"{name}.weight": 0.02 * torch.randn(wide, generator=start) for name in ("rerank", "keep")}
    heads |= {"rerank.bias": torch.zeros(()), "keep.bias": torch.tensor(-1.5)}
    tensors = {name: weight.detach().float().clone().requires_grad_() for name, weight in {**own, **heads}.items()}
    rows = [row_of(embed, example) for example in draw.sample(list(examples), len(examples))]
    held = max(1, round(HELD * len(rows)))
    apart, seen = rows[:held], rows[held:]
    steps = epochs * -(-len(seen) // batch)
    optimiser = torch.optim.AdamW(
        [{"params": [tensors[n] for n in own], "lr": rate}, {"params": [tensors[n] for n in heads], "lr": 10 * rate}]
    )
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)
    )
    for epoch in range(epochs):
        shuffled = draw.sample(seen, len(seen))
        for at in range(0, len(shuffled), batch):
            tick(f"epoch {epoch + 1} of {epochs}", (epoch + at / len(shuffled)) / epochs)
            loss = loss_of(judge(embed, tensors, shuffled[at : at + batch]))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
            optimiser.step()
            plan.step()
    with torch.no_grad():
        sums = [float(loss_of(judge(embed, tensors, [row]))) for row in apart]
    notes = {
        "fitted on": f"{len(seen)} passages of {sum(len(row.passage) for row in seen):,} tokens, {held} held out",
        "recipe": f"{layers} layers and the heads, {epochs} epochs, rate {rate}, batch {batch}, seed {seed}",
        "loss": f"{sum(sums) / len(sums):.4f} nats a token on held-out passages, 0.05 of the rerank error among it",
    }
    return Fit("provence", fingerprint(embed.model), {n: w.detach().clone() for n, w in tensors.items()}, notes)
