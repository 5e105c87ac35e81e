"""Which heads look at what they answer with, and what compressing a layer loses: measured while a model answers.

    head_scores(model, needles)                 attention to the needle while its tokens are said, for each query head
    layer_errors(model, needles, method, ...)   how far a layer's output is off if it were compressed

The model always reads and answers from its whole cache.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.reduce.select import top_k
from fewer.score.attention import attention_rows
from fewer.signals import OutputWeight, Projection, Queries, QueryWindow
from fewer.types import Allocation, Budget, FewerError, Method, Plan, Tokens

STEPS = 50
"""Most tokens of an answer that are looked at."""

EVERYTHING = 1 << 40
"""A budget that no prompt exceeds, but that is looked at every time."""

Tick = Callable[[str, float], None]


@dataclass(frozen=True)
class Needle:
    """A prompt that asks for what its tokens `start` to `end` say, and the tokens of the right answer."""

    prompt: Int[Tensor, "1 n"]
    start: int
    end: int
    answer: Int[Tensor, " m"]

    def found(self, said: Sequence[int]) -> bool:
        """Whether more than half of the answer's tokens are in what was said, each as often (ROUGE-1 recall)."""
        asked = Counter(self.answer.tolist())
        return 2 * sum((asked & Counter(said)).values()) > sum(asked.values())


@dataclass(frozen=True)
class _Looking:
    """Keeps everything, and shows `look` each place at every forward."""

    look: Callable[[Tokens], None]
    needs: frozenset[Any]

    def score(self, tokens: Tokens) -> Tensor:
        self.look(tokens)
        return torch.zeros_like(tokens.positions, dtype=torch.float32)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return Plan.keep(~tokens.padding)


@torch.no_grad()
def _answer(model: Any, needle: Needle, watch: _Looking) -> list[int]:
    """What the model says, greedily. The prompt's last token is read as the first decoding step, so that every token
    that is said has a step of its own."""
    from fewer import Cache  # which loads transformers

    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    prompt = needle.prompt.to(model.device)
    said: list[int] = []
    with Cache(model, watch, EVERYTHING, when="both", every=1) as cache:
        model(prompt[:, :-1], past_key_values=cache)
        following = prompt[:, -1:]
        while len(said) < STEPS:
            following = model(following, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            said.append(int(following))
            if said[-1] in ends:
                break
    return said


def _attention(tokens: Tokens) -> Float[Tensor, "heads n"]:
    """What the last query looks at."""
    window = tokens.signal(Queries, QueryWindow)
    return attention_rows(
        window.query[:, :, -1:], window.positions[:, -1:], tokens.features, tokens.positions, tokens.padding,
        window.scaling, window.softcap,
    )[0, :, 0]  # fmt: skip


def head_scores(
    model: Any, needles: Sequence[Needle], tick: Tick = lambda what, share: None
) -> tuple[Float[Tensor, "layers heads"], int]:
    """Attention mass on the whole needle, summed over the steps that say one of its tokens, as a mean over the answers
    that are right, and how many those are.

    Raises:
        FewerError: the model finds none of the needles.
    """
    scores = []
    for index, needle in enumerate(needles):
        tick(f"finding needle {index + 1}", index / len(needles))
        seen: list[Tensor] = []  # layer after layer, step after step

        def look(tokens: Tokens, needle: Needle = needle, seen: list[Tensor] = seen) -> None:
            if tokens.site.phase == "decode":
                inside = (tokens.positions[0, 0] >= needle.start) & (tokens.positions[0, 0] < needle.end)
                seen.append(_attention(tokens)[:, inside].sum(-1))

        said = _answer(model, needle, _Looking(look, frozenset({Queries(last=1)})))
        if needle.found(said):
            there = torch.isin(torch.tensor(said), needle.prompt[0, needle.start : needle.end].cpu())
            steps = torch.stack(seen).view(len(said), -1, seen[0].shape[0]).cpu()  # (steps, layers, heads)
            scores.append(steps[there].sum(0))
    if not scores:
        raise FewerError(f"the model finds none of {len(needles)} needles, so no head can be told to retrieve")
    return torch.stack(scores).mean(0), len(scores)


def layer_errors(
    model: Any, needles: Sequence[Needle], method: Method, count: int, tick: Tick = lambda what, share: None
) -> Float[Tensor, " layers"]:
    """Relative error of each layer's output (after its projection, Frobenius norm) when it attends to the `count`
    tokens a head that `method` keeps of the prompt and to what came since, summed over all steps; the sum is 1.

    Raises:
        FewerError: no prompt is longer than that, so that nothing is lost.
    """
    if all(needle.prompt.shape[1] <= count + 1 for needle in needles):
        raise FewerError(f"errors are measured where {count} tokens are kept; take prompts that are longer")
    errors: dict[int, float] = {}
    for index, needle in enumerate(needles):
        tick(f"errors of needle {index + 1}", index / len(needles))
        kept: dict[int, Tensor] = {}

        def look(tokens: Tokens, kept: dict[int, Tensor] = kept) -> None:
            layer, n = tokens.site.layer, tokens.positions.shape[-1]
            if tokens.site.phase == "prefill":
                few = Allocation(tokens.available.clamp(max=count))
                kept[layer] = top_k(method.score(tokens), few).slot[0] >= 0
                return
            weights, since = _attention(tokens), n - kept[layer].shape[-1]
            groups = len(weights) // len(kept[layer])
            stays = torch.nn.functional.pad(kept[layer], (0, since), value=True).repeat_interleave(groups, 0)
            left = weights * stays
            assert tokens.values is not None, "hosts give values"
            values = tokens.values[0].float().repeat_interleave(groups, 0)
            project = tokens.signal(Projection, OutputWeight).weight.float()
            full, cut = (
                torch.einsum("hn,hne,heo->o", share, values, project)
                for share in (weights, left / left.sum(-1, keepdim=True))
            )
            errors[layer] = errors.get(layer, 0.0) + float((cut - full).norm() / (full.norm() + 1e-5))

        _answer(model, needle, _Looking(look, frozenset({*method.needs, Projection()})))
    total = sum(errors.values())
    return torch.tensor([errors[layer] / total for layer in range(len(errors))])
