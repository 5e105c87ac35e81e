"""The reference model while it learns: the projector and the language model, or additions to it, never the tower."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewer.reference_vlm import VISUAL, trained
from fewer_eval.looking.hints import ASKED, LABELS, MARKS
from fewer_eval.looking.lessons import Batch, visual_tokens

POINTERS = 2
"""Heads of the layer above the middle that are told where to look while the course lasts that long."""


class Additions(nn.Module):
    """A low-rank addition to a weight (LoRA), zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class Learner(nn.Module):
    """The model with features as its input, made even, and heads that are asked for marks and thrown away later."""

    def __init__(self, model: LlavaForConditionalGeneration, features: Float[Tensor, "s p d"], rank: int = 0) -> None:
        super().__init__()
        self.projector: Any = model.model.multi_modal_projector
        self.language: Any = model.model.language_model
        self.head: Any = model.lm_head
        self.model = [model]  # in a list, so that the tower is no part of this module
        some = features[:: max(1, len(features) // 200)].float().flatten(0, 1)
        self.mean, self.deviation = nn.Buffer(some.mean(0)), nn.Buffer(some.std(0))
        self.asides = nn.Linear(self.language.config.hidden_size, len(MARKS) * len(LABELS))
        self.asked = nn.Linear(self.language.config.hidden_size, len(ASKED) * len(LABELS))
        self.middle: list[Tensor] = []
        self.language.layers[self.language.config.num_hidden_layers // 2 - 1].register_forward_hook(self._remember)
        self.images, self.pointing = 0, self.language.config.num_hidden_layers // 2
        self.pointed = torch.zeros(0)
        if not rank:
            ALL_ATTENTION_FUNCTIONS.register("lessons", self._attend)
            self.language.config._attn_implementation = "lessons"
        if rank:
            self.language.requires_grad_(False)
            self.head.requires_grad_(False)
            for layer in self.language.layers:
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
                             layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj,
                             layer.mlp.down_proj):  # fmt: skip
                    parametrize.register_parametrization(part, "weight", Additions(part.weight, rank))

    def _remember(self, module: nn.Module, given: Any, out: Any) -> None:
        self.middle = [out[0] if isinstance(out, tuple) else out]

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        """Attention in two parts, since the images look at none of the questions: a third of the fused kernel's time
        on a processor without an accelerator."""
        at, (query, key) = self.images, (one.to(value.dtype) for one in (query * scaling, key))
        parts = []
        for part, length in ((slice(0, at), at), (slice(at, None), key.shape[2])):
            scores = query[:, :, part] @ key[:, :, :length].transpose(2, 3)
            scores = scores.masked_fill_(~mask[:, :, part, :length], -1e4)
            weights = torch.softmax(scores, -1, dtype=value.dtype)
            parts.append(weights @ value[:, :, :length])
        if module.layer_idx == self.pointing:
            self.pointed = weights[:, :POINTERS]
        return torch.cat(parts, 2).transpose(1, 2), None

    def looking(self, batch: Batch) -> Tensor:
        """How far the pointing heads are from looking at what the next word depends on: minus their share's log."""
        weights = self.pointed.transpose(1, 2)[batch.looks[:, batch.head :]]  # (g, h, n)
        share = (weights[..., batch.visual[0].nonzero()[:, 0]].float() * batch.regions[:, None]).sum(-1)
        return -share.clamp_min(1e-6).log().mean()

    def forward(self, batch: Batch, features: Float[Tensor, "s p d"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses on answers and on marks; for each graded token whether it was right, and its task."""
        even = (features.float().flatten(0, 1) - self.mean) / self.deviation
        embedded = self.language.get_input_embeddings()(batch.ids)
        embedded = visual_tokens(embedded, batch.visual, self.projector(even))
        self.images = batch.head
        hidden = self.language(
            inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        before = batch.graded.roll(-1, 1)  # the token before a graded one says it
        logits, target = self.head(hidden[before]).float(), batch.ids[batch.graded]
        asides = self.asides(self.middle[0][batch.visual]).float().view(-1, len(LABELS))
        aside = functional.cross_entropy(asides, batch.marks.flatten(), ignore_index=-1)
        if (batch.asked >= 0).any():
            named = self.asked(self.middle[0][batch.looks]).float().view(-1, len(LABELS))
            aside = aside + 2 * functional.cross_entropy(named, batch.asked.flatten(), ignore_index=-1)
        if len(visible := self.asked(self.middle[0][batch.visual])) > VISUAL * len(batch.ids):  # which image it is of
            image = visible.float().view(len(batch.ids), -1, VISUAL, len(ASKED), len(LABELS))[
                :, :, :, ASKED.index("image")
            ]
            which = torch.arange(1, 1 + image.shape[1], device=image.device)[None, :, None].expand(image.shape[:3])
            aside = aside + functional.cross_entropy(image.flatten(0, 2), LABELS.index("0") + which.flatten())
        return functional.cross_entropy(logits, target), aside, logits.argmax(-1) == target, batch.task[batch.graded]

    def weights(self) -> dict[str, Tensor]:
        """What to ship: float16, with the evening of the features folded into the projector's first layer."""
        made: dict[str, Tensor] = {}
        if parametrize.is_parametrized(self.language.layers[0].self_attn.q_proj):
            for name, module in self.language.named_modules():
                if isinstance(module, Additions):
                    weight = "model.language_model." + name.replace("parametrizations.weight.0", "weight")
                    made |= {f"{weight}.down": module.down, f"{weight}.up": module.up}
            parts = self.projector.state_dict()
            made |= {f"model.multi_modal_projector.{name}": value for name, value in parts.items()}
        else:
            made |= trained(self.model[0])
        first = "model.multi_modal_projector.linear_1"
        scaled = made[f"{first}.weight"] / self.deviation
        made |= {f"{first}.weight": scaled, f"{first}.bias": made[f"{first}.bias"] - scaled @ self.mean}
        return {name: value.detach().half().cpu() for name, value in made.items()}
