"""KVzap (arXiv 2601.07891): KVzip's scores, predicted from the hidden states that a layer's attention is given.

    once, for a model:  (h_j, log s_j) with s_j from KVzip on some text; a small head for each layer, log s = head(h)
    then, at each layer, as tokens are read:  predict log s for every key-value head, at prefill and while decoding
    keep the sinks and the window, and the top of all layers and heads together

Reading the prompt again is what KVzip costs; this costs one small product a layer, and needs a fit (`fewer fit kvzap`).

Differs from the paper: predicts KVzip's scores, not those of KVzip+, and without an instruction to repeat; keeps to a
budget, where the paper evicts below a threshold; the last 32 tokens stay, in the paper 128, which at a tenth of a short
prompt would be all that stays. Heads are smaller, fitted on far less text, and linear where that predicts better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fewer import checks
from fewer.allocate.across_layers import across_layers
from fewer.allocate.uniform import uniform
from fewer.fit import Fit, fingerprint, load
from fewer.methods.any.full import Full
from fewer.reduce.select import top_k
from fewer.score.position import latest, must_stay, sinks_stay
from fewer.score.reconstruction import Reconstruction
from fewer.score.surrogate import Hidden, HiddenStates, Predicted, fit_heads
from fewer.signals import EveryLayer
from fewer.types import Allocation, Budget, Card, FewerError, Plan, Tokens

SAMPLE = 500
"""Most tokens of a context that are learned from."""
FLOOR = 1e-6
"""Shares of attention below this are all alike."""
SINKS = 4


@dataclass(frozen=True)
class KVzap:
    """A surrogate of KVzip.

    Args:
        fit: the heads, from `fit_to`; `load` reads them from a file.
        window: last tokens that stay: what is asked comes last, and what was repeated of it says little of its use.
        across: share the budget among all layers and heads; else each keeps the same number.
    """

    fit: Fit | None = None
    window: int = 32
    across: bool = True

    card: ClassVar[Card] = Card(
        source="arXiv 2601.07891",
        faithfulness="paper",
        training="fit",
        differs="predicts KVzip, not KVzip+; a budget, not a threshold; smaller heads, fitted on less text",
    )

    def __post_init__(self) -> None:
        checks.counts(0, window=self.window)

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> "KVzap":
        """With the fit in this file; see `fewer.fit.load` for what is refused."""
        return cls(load(path, "kvzap"), **settings)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Predicted(self.fit), *([EveryLayer()] if self.across else [])})

    def score(self, tokens: Tokens) -> Tensor:
        predicted = tokens.signal(Predicted, Tensor)
        never = (predicted == 0) & ~tokens.padding
        if tokens.site.phase == "decode" and bool(never.any()):
            raise FewerError("KVzap rates tokens as they are read, so it must see the prompt too: use when='both'")
        return sinks_stay(must_stay(predicted, never | latest(tokens, self.window)), tokens, SINKS)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return across_layers(tokens, budget) if self.across else uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    @staticmethod
    @torch.no_grad()
    def fit_to(
        model: nn.Module,
        contexts: Sequence[Int[Tensor, "1 _"]],
        *,
        seed: int = 0,
        tick: Callable[[str, float], None] = lambda what, share: None,
    ) -> Fit:
        """Have the model repeat each context, and learn from what it looked at.

        Args:
            model: a transformers decoder.
            contexts: token ids, about as long as what will be compressed: a share of attention depends on it. The last
                sixth of what they give is held out.
            seed: of the tokens that are drawn, and of the heads' first weights.
            tick: called with what is being done and the share of the work that is done.
        """
        draw, pairs, part = torch.Generator().manual_seed(seed), [], 0.7
        for index, ids in enumerate(contexts):
            tick(f"repeating context {index + 1} of {len(contexts)}", part * index / len(contexts))
            hidden, scores = _pairs(model, ids)
            chosen = torch.randperm(hidden.shape[1], generator=draw)[:SAMPLE].to(hidden.device)
            pairs.append((hidden[:, chosen], scores[:, chosen]))
        x, y = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
        heads, r2 = fit_heads(
            x, y, x.shape[1] // 6, seed=seed, tick=lambda share: tick("fitting heads", part + (1 - part) * share)
        )
        best = max(r2, key=lambda kind: float(r2[kind].mean()))
        notes = {
            "fitted on": f"{x.shape[1]} tokens of {len(contexts)} contexts, {x.shape[1] // 6} of them held out",
            "heads": f"{best}; R2 on held-out tokens "
            + ", ".join(f"{kind} {float(of.mean()):.3f}" for kind, of in r2.items()),
            **{f"R2 of layer {layer}": f"{float(of):.3f}" for layer, of in enumerate(r2[best])},
        }
        return Fit("kvzap", fingerprint(model), heads, notes)


@dataclass(frozen=True)
class _Gather(Full):
    """Keeps everything, and hands over the hidden states and KVzip's scores of every layer."""

    found: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    needs: ClassVar[frozenset[object]] = frozenset({Hidden(), Reconstruction()})

    def score(self, tokens: Tokens) -> Tensor:
        self.found.append((tokens.signal(Hidden, HiddenStates).states, tokens.signal(Reconstruction, Tensor)))
        return super().score(tokens)


def _pairs(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (layers, n, hidden) of a context's tokens, sinks left out, and the logarithms of their scores
    (layers, n, h)."""
    from fewer.compress import compress  # which knows every method

    if ids.shape[1] <= SINKS:
        raise FewerError(f"a context of {ids.shape[1]} tokens is nothing to learn from")
    with compress(model, gather := _Gather(), ids.shape[1]):
        model(ids)
    hidden, scores = (torch.stack([pair[i][0] for pair in gather.found]) for i in range(2))
    return hidden[:, SINKS:].float(), scores.mT[:, SINKS:].clamp(min=FLOOR).log()
