"""Which models are taken and which are refused: decoders of any kind of positions, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import fewer
from fewer.types import MissingSignal, UnsupportedModel
from tests.adapters.common import METHODS, SNAP, refused, untouched
from tests.tiny import prompt, tiny

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "BertModel": (
        lambda: AutoModel.from_config(AutoConfig.for_model("bert", **SMALL)),
        "BertModel (is an encoder|has 0 causal)",
    ),
    "BertForMaskedLM": (
        lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL)),
        "BertForMaskedLM (is an encoder|has 0 causal)",
    ),
    "T5": (
        lambda: AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model("t5", vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
        ),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "ViT": (
        lambda: AutoModel.from_config(
            AutoConfig.for_model(
                "vit",
                **{k: v for k, v in SMALL.items() if k != "vocab_size"},
                image_size=32,
                patch_size=8,
            )
        ),
        "ViTModel (is an encoder|has 0 causal)",
    ),
    "ResNet": (
        lambda: AutoModel.from_config(
            AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
        ),
        "ResNetModel has 0 causal",
    ),
    "Mamba": (
        lambda: AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
        "MambaForCausalLM has 0 causal",
    ),
    "module": (lambda: nn.Linear(3, 3), "Linear is neither a transformers"),
    "name": (lambda: "llama", "str is neither a transformers"),
    "nothing": (lambda: None, "NoneType is neither a transformers"),
}


@pytest.mark.filterwarnings("ignore")  # what building those models says is theirs
@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_are_no_decoders(kind: str) -> None:
    make, message = OTHERS[kind]
    refused(make(), UnsupportedModel, f"{message}.*decoder|{message}.*only decoders")


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama").config)
    refused(model, UnsupportedModel, "LlamaForCausalLM is on the meta device and holds no weights; load them first")


@pytest.mark.parametrize("attn", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_attention_that_is_not_ours_to_run(attn: str) -> None:
    model = tiny("llama")
    model.config._attn_implementation = attn
    with pytest.raises(UnsupportedModel, match="attn_implementation='sdpa'"), fewer.compress(model, "knorm", keep=0.5):
        pass
    assert model.config._attn_implementation == attn


ROTARY = ["expected-attention", "streaming-llm"]


@pytest.mark.parametrize("method", ROTARY)
def test_a_rotary_embedding_that_depends_on_length(method: str) -> None:
    refused(tiny("llama", rope_parameters=DYNAMIC), MissingSignal, "no rotary position embedding that can be", method)


def test_other_methods_run_on_it() -> None:
    model = tiny("llama", rope_parameters=DYNAMIC)
    with untouched(model, prompt(30)), fewer.compress(model, SNAP, keep=0.5) as run:
        model.generate(prompt(40), max_new_tokens=3, do_sample=False)
        assert run.report.layers[0].kept == ((22, 22),)


def gpt2() -> Any:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=97, n_embd=64, n_head=4, n_layer=3, n_positions=256, bos_token_id=1, eos_token_id=None
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("method", ROTARY)
def test_a_model_without_rotary_positions(method: str) -> None:
    refused(gpt2(), MissingSignal, r"needs (Moments|Rotation), and GPT2LMHeadModel has no rotary", method)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "expected-attention"])
def test_other_methods_run_without_rotary(method: str) -> None:
    """GPT-2 is taken: its attention goes through the same functions. Keeping everything is its own answer."""
    model = gpt2()
    with untouched(model, prompt(30)):
        want = model.generate(prompt(40), max_new_tokens=5, do_sample=False, pad_token_id=0)
        with fewer.compress(model, METHODS[method], keep=1.0):
            got = model.generate(prompt(40), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(got, want)
        with fewer.compress(model, METHODS[method], keep=0.5) as run:
            model.generate(prompt(40), max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert all(sum(layer.kept[0]) == 4 * (20 + 4) for layer in run.report.layers)


def test_attention_with_learned_sinks_says_so() -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        **SMALL,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    no_sinks = pytest.raises(UnsupportedModel, match="learned sinks")
    with untouched(model), no_sinks, fewer.compress(model, "knorm", keep=0.5):
        model(prompt(30))
