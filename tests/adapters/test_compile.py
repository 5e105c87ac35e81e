"""torch.compile: a model compiled by its user decodes on a compressed cache; fewer's part stays outside the graph."""

from typing import Any

import pytest
import torch

import fewer
from tests.adapters.common import ADA, SNAP
from tests.tiny import prompt, tiny


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", [SNAP, ADA, "full"], ids=["snapkv", "adakv", "full"])
@torch.no_grad()
def test_a_compiled_model_decodes_as_the_plain_one(family: str, method: Any) -> None:
    model, graphs = tiny(family), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    with fewer.Cache(model, method, 0.5) as plain, fewer.Cache(model, method, 0.5) as ours:
        for cache in (plain, ours):
            model(prompt(40), past_key_values=cache)
        for seed in range(6):
            token, before = prompt(1, seed=seed), len(graphs)
            assert torch.equal(model(token, past_key_values=plain).logits, compiled(token, past_key_values=ours).logits)
        assert graphs and len(graphs) == before, "it compiles anew at every step"
        assert plain.report.layers[0].kept == ours.report.layers[0].kept
