"""Train a token classifier that says of each piece of a text whether it should stay (LLMLingua-2's, arXiv 2403.12968).

    texts -> labels, a number in [0, 1] for each word (`score.labels`)
          -> an encoder with a head of two labels, its top layers and the head trained by cross-entropy
          -> a Fit whose tensors, named as in a BertForTokenClassification, take the place of the encoder's own

A label stands at every piece of its word, of the text as it is. Texts longer than the encoder reads are cut between
words. What is trained on, how well, and when it stopped stands in the notes of the fit.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewer.fit import Fit, fingerprint
from fewer.prompts.source import Floats
from fewer.score.embed import embedder
from fewer.score.labels import Contrastive, Labeller, words
from fewer.score.surprise import reader
from fewer.types import FewerError

Tick = Callable[[str, float], None]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        layers: how many of the encoder's top layers are trained beside the head; a fit holds these alone.
        epochs: at most; it ends before if the loss on held-out texts has not fallen for `patience` of them.
        rate: the learning rate, warmed up over a tenth of the steps, then falling to zero along a line.
        batch: texts a step.
        held: the share of the texts that is held out.
        longest: pieces that the encoder reads at once, [CLS] and [SEP] among them.
    """

    layers: int = 1
    epochs: int = 6
    rate: float = 3e-4
    batch: int = 4
    held: float = 0.1
    longest: int = 512
    patience: int = 2


@dataclass(frozen=True, eq=False)
class Row:
    """Pieces of a text as the encoder reads them, and for each the label of its word; -1 where there is none."""

    ids: list[int]
    labels: Floats


def fit_keeper(
    labeller: Labeller,
    texts: Sequence[str],
    *,
    base: Any = "minilm",
    method: str = "llmlingua2",
    recipe: Recipe | None = None,
    seed: int = 0,
    tick: Tick | None = None,
) -> Fit:
    """Label the texts, train on them, and return what was trained, in half precision.

    Args:
        labeller: gives each of `words(text)` a number in [0, 1]; see `score.labels`.
        texts: at least two; some are held out.
        base: the encoder, see `score.embed.embedder`.
        method: the registered name that the fit is for.
        tick: is told what is done, and the share of all that is done.

    Raises:
        FewerError: there are too few texts, or a labeller gave what no label is.
    """
    say = tick or (lambda what, share: None)
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        raise FewerError(f"fit_keeper(): {len(texts)} texts; at least 2 are needed, since some are held out")
    labelled = []
    for index, text in enumerate(texts):
        say(f"labelling text {index + 1} of {len(texts)}", 0.7 * index / len(texts))
        labelled.append((text, labels_of(labeller, text)))
    return train(labelled, base=base, method=method, recipe=recipe, seed=seed,
                 tick=lambda what, share: say(what, 0.7 + 0.3 * share))  # fmt: skip


def fit_from_reader(model: Any, texts: Sequence[str], *, seed: int = 0, tick: Tick | None = None) -> Fit:
    """What `fewer fit llmlingua2` does: labels from a causal language model (`score.surprise.reader`), the rest as by
    default."""
    labeller = Contrastive(reader(model))
    fit = fit_keeper(labeller, texts, seed=seed, tick=tick)
    said = f"contrastive surprise: keep={labeller.keep}, tie={labeller.tie}, soft={labeller.soft}"
    return replace(fit, notes={**fit.notes, "labels": said})


def train(
    labelled: Sequence[tuple[str, Floats]],
    *,
    base: Any = "minilm",
    method: str = "llmlingua2",
    recipe: Recipe | None = None,
    seed: int = 0,
    tick: Tick | None = None,
) -> Fit:
    """Train on texts whose words have labels already; see `fit_keeper`."""
    recipe, say = recipe or Recipe(), tick or (lambda what, share: None)
    encoder = embedder(base)
    order = random.Random(f"keeper/{seed}").sample(range(len(labelled)), len(labelled))
    held = max(1, round(recipe.held * len(labelled)))
    model = fresh(encoder.model, seed)
    trained = _open(model, recipe.layers)
    parts = [[row for i in part for row in rows(encoder.tokenizer, *labelled[i], recipe.longest)]
             for part in (order[:held], order[held:])]  # fmt: skip
    (apart, seen), top = _below(model, parts, recipe.layers)
    steps = recipe.epochs * -(-len(seen) // recipe.batch)
    optimiser = torch.optim.AdamW(trained.values(), lr=recipe.rate, weight_decay=0.01)
    warm = max(1, steps // 10)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    best, kept, since, losses = float("inf"), {}, 0, []
    for epoch in range(recipe.epochs):
        top.train()
        shuffled = random.Random(f"keeper/{seed}/{epoch}").sample(seen, len(seen))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + epoch)  # dropout's
            for at in range(0, len(shuffled), recipe.batch):
                rows_now = shuffled[at : at + recipe.batch]
                count = sum(_count(labels) for _, labels in rows_now)
                optimiser.zero_grad()
                for row in rows_now:  # one by one: no padding, and less memory
                    (_loss(top, *row) / max(count, 1)).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimiser.step()
                plan.step()
                say(f"epoch {epoch + 1} of at most {recipe.epochs}", (epoch + at / len(shuffled)) / recipe.epochs)
        top.eval()
        with torch.no_grad():
            total = sum(float(_loss(top, *row)) for row in apart)
        losses.append(total / max(sum(_count(labels) for _, labels in apart), 1))
        if losses[-1] < best:
            best, since = losses[-1], 0
            kept = {name: weight.detach().half().clone() for name, weight in trained.items()}
        elif (since := since + 1) >= recipe.patience:
            break
    pieces = sum(len(labels) for _, labels in seen)
    notes = {
        "trained on": f"{len(order) - held} texts of {pieces:,} pieces, {held} texts held out, seed {seed}",
        "recipe": str(recipe),
        "loss": f"{best:.4f} nats a piece on held-out texts, after {losses.index(best) + 1} of {len(losses)} epochs",
        "losses": " ".join(f"{loss:.4f}" for loss in losses),
    }
    return Fit(method, fingerprint(encoder.model), kept, notes)


def labels_of(labeller: Labeller, text: str) -> Floats:
    """The labels of a text's words, refused if they are none."""
    labels, count = np.asarray(labeller(text), dtype=np.float64), len(words(text))
    if labels.shape != (count,) or not ((labels >= 0) & (labels <= 1)).all():
        raise FewerError(
            f"fit_keeper(): the labeller gave {labels.shape} for a text of {count} words "
            f"({text[:30]!r}...); it has to give each of score.labels.words(text) a number in [0, 1]"
        )
    return labels


def rows(tokenizer: Any, text: str, labels: Floats, longest: int = 512) -> list[Row]:
    """A text with its words' labels as an encoder reads it; cut, where it is too long, between words."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, starts = read["input_ids"], np.array([a for a, _ in read["offset_mapping"]], dtype=np.int64)
    units = words(text)
    of = np.searchsorted(units.start, starts, side="right") - 1
    inside = (of >= 0) & (starts < units.end[of]) if len(units) else np.zeros(len(ids), dtype=bool)
    given = np.where(inside, labels[of] if len(units) else 0.0, -1.0)
    out, at, room = [], 0, longest - 2
    while at < len(ids):
        end = min(at + room, len(ids))
        while at + 1 < end < len(ids) and of[end] == of[end - 1]:
            end -= 1
        if end == at + 1 and end < len(ids):
            end = min(at + room, len(ids))  # one word is longer than all that can be read
        whole = [tokenizer.cls_token_id, *ids[at:end], tokenizer.sep_token_id]
        out.append(Row(whole, np.concatenate([[-1.0], given[at:end], [-1.0]])))
        at = end
    return out


def fresh(encoder: Any, seed: int = 0) -> Any:
    """A classifier of two labels on a copy of a BERT's weights, its head not yet trained."""
    from transformers import BertForTokenClassification

    config = copy.deepcopy(encoder.config)
    config.num_labels = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = BertForTokenClassification(config)
    missing, _ = model.bert.load_state_dict(encoder.state_dict(), strict=False)  # the pooler is left over
    if missing:
        raise FewerError(f"fit_keeper(): {type(encoder).__name__} lacks {missing[0]}; the base has to be a BERT")
    return model.to(torch.float32)


def _open(model: Any, layers: int) -> dict[str, Tensor]:
    """Let the top layers and the head be trained, and nothing else; what is trained, by name."""
    depth = model.config.num_hidden_layers
    tops = tuple(f"bert.encoder.layer.{index}." for index in range(depth - layers, depth))
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith((*tops, "classifier.")))
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def _below(model: Any, parts: Sequence[Sequence[Row]], layers: int) -> tuple[list[list[tuple[Tensor, Tensor]]], Any]:
    """For each row the hidden states `(n, d)` below the layers that are trained, which never change, and its labels;
    and the model without the layers that gave them."""
    model.eval()
    whole = model.bert.encoder.layer
    model.bert.encoder.layer = whole[: len(whole) - layers]
    out = [
        [
            (model.bert(input_ids=torch.tensor([row.ids])).last_hidden_state[0], torch.tensor(row.labels).float())
            for row in part
        ]
        for part in parts
    ]
    model.bert.encoder.layer = whole[len(whole) - layers :]
    return out, model


def _count(labels: Tensor) -> int:
    return int((labels >= 0).sum())


def _loss(top: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the pieces of a row that have a label."""
    wanted = labels[labels >= 0]
    logits = top.classifier(top.dropout(top.bert.encoder(hidden[None]).last_hidden_state))[0][labels >= 0]
    return torch.nn.functional.cross_entropy(logits, torch.stack([1 - wanted, wanted], 1), reduction="sum")
