"""Two- to four-layer random models of every family fewer is tested on, built from their configs: no download."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "phi3": {"num_key_value_heads": 2},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "gpt_neox": {},
}


def tiny(family: str, *, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of the family, in eval mode. Weights are spread out so that attention is far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6)
            elif "embed" in name:
                parameter.mul_(30)
    return model


def prompt(n: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, n), none of them special."""
    return torch.randint(2, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))
