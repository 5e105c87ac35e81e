"""What is computed once for a model and then read by a method: its fit, kept in one file.

    METHODS[name].fit_to(model, contexts) -> Fit        `fewer fit NAME --out FILE` calls it and saves
    save(fit, path)    load(path, name) -> Fit           safetensors, with a checksum over all of it
    Name.load(path)                                      the method with that fit: a field `fit: Fit | None`

A method, one inside it, or a need of either, that has such a field is refused by its host where the field is None or
the fit is of another model (`check`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewer import files
from fewer.adapters.peft import adding, bare
from fewer.inner import inside
from fewer.types import FewerError

FORMAT = "fewer-fit"
VERSION = "1"
"""Of the file; a fit with another one is refused."""

SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
"""What a fingerprint reads of a config."""

USES = (
    "rope_parameters", "sliding_window", "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "attention_multiplier", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "residual_multiplier", "layer_types",
)  # fmt: skip
"""What states and answers depend on, beside the weights."""

SAMPLE = 64
"""Most numbers of each weight that a fingerprint reads."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Tensors that belong to one method and one model. Two fits are equal if all they hold is.

    `method` is the registered name, `model` the fingerprint of the model, `notes` what a reader should know, such as
    the text it was fitted on and how well.
    """

    method: str
    model: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    notes: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def head(self) -> dict[str, str]:
        """All but the tensors, as a file holds it."""
        notes = json.dumps(dict(self.notes))
        return {"format": FORMAT, "version": VERSION, "method": self.method, "model": self.model, "notes": notes}

    @cached_property
    def digest(self) -> str:
        """sha256 over everything the fit holds."""
        return files.digest(self.tensors, self.head)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fit) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def save(fit: Fit, path: str | Path) -> None:
    """Write the fit as one safetensors file; what was there is replaced whole, or not at all.

    Raises:
        FewerError: the file cannot be written.
    """
    files.write(path, fit.tensors, fit.head)


def load(path: str | Path, method: str | None = None) -> Fit:
    """Read a fit of `method`, or of any if None is named.

    Raises:
        FewerError: the file cannot be read, is no fit, has another format version, was cut short or changed since it
            was written, or is a fit of another method.
    """
    head, tensors = files.read(path, FORMAT, VERSION, "fit")
    if method is not None and head["method"] != method:
        raise FewerError(f"{path} is a fit of {head['method']}, not of {method}")
    return Fit(head["method"], head["model"], tensors, json.loads(head["notes"]))


@torch.no_grad()
def fingerprint(model: nn.Module, of: Literal["weights", "states", "answers"] = "weights") -> str:
    """A name for a model: sha256 over its sizes, a sample of every weight, and which adapters are on.

    The sample is rounded to bfloat16, so that a model loaded in half precision still is the same.

    Args:
        of: how much of the model is in it: its "weights" below the head, which is what a fit is for; what its "states"
            depend on, which is also what its config says of how they are used; or what its "answers" do: the head too.
    """
    model = bare(model)
    config: Any = getattr(model, "config", None)  # timm's models have none: their weights' names and shapes tell them
    if config is not None:
        config = config.get_text_config(decoder=True)
    sizes = [f"{name}={getattr(config, name, None)}" for name in (*SIZES, *(() if of == "weights" else USES))]
    inner: nn.Module = model if of == "answers" else getattr(model, "base_model", model)
    names, samples = [], []
    for name, weight in sorted(inner.named_parameters()):
        names.append(f"{name} {tuple(weight.shape)}")
        flat = weight.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to(torch.bfloat16))
    drawn = {"weights": torch.cat([sample.cpu() for sample in samples])}
    return files.digest(drawn, {"sizes": " ".join(sizes), "names": " ".join(names + adding(inner))})


def wants(thing: object) -> bool:
    """Whether a method, or a need, has a place for a fit that it cannot do without."""
    return "fit" in getattr(thing, "__dataclass_fields__", {}) and not getattr(thing, "fit_optional", False)


def check(method: Any, model: nn.Module) -> None:
    """Raise `FewerError` if the method, one inside it, or one of their needs, has no fit where it wants one, or another
    model's."""
    ours = None
    wanting = [(type(each).__name__, thing) for each in inside(method) for thing in (each, *each.needs)]
    for name, thing in wanting:
        fit = getattr(thing, "fit", None)
        if not isinstance(fit, Fit):
            if not wants(thing):
                continue
            raise FewerError(
                f"{name} has to be fitted to the model first: `fewer fit METHOD --model MODEL --out FILE`, then "
                f"{name}.load(FILE), or --fit FILE on the command line"
            )
        ours = fingerprint(model) if ours is None else ours
        if fit.model != ours:
            raise FewerError(
                f"{name} was fitted to another model ({fit.model[:12]}) than this {type(model).__name__} "
                f"({ours[:12]}); fit it to this one with `fewer fit`"
            )
