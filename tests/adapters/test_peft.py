"""Models in PEFT's wrappers are taken as what they wrap: adapters included, and by the wrapper's own calls."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import fewer
from fewer.adapters.peft import bare
from fewer.fit import fingerprint
from fewer.tuning.examples import Example
from fewer.types import UnsupportedModel
from tests import vlms
from tests.adapters.common import SNAP
from tests.adapters.encoders import encoder, inputs
from tests.tiny import prompt, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def adapted(model: Any, *targets: str) -> Any:
    """The model with LoRA layers that change what it says."""
    config = LoraConfig(target_modules=list(targets), r=4, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(model), config).eval()


def rescaled() -> Any:
    """The decoder with (IA)3's factors, far from 1, on keys, values and what feeds the last linear layer."""
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(tiny("llama")), config).eval()


@pytest.fixture(scope="module")
def decoder() -> Any:
    return adapted(tiny("llama"), "q_proj", "v_proj")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_wrapper_says_what_the_merged_model_does(kind: str, decoder: Any) -> None:
    model = decoder if kind == "lora" else rescaled()
    merged, ids = copy.deepcopy(model).merge_and_unload(), prompt(60)
    assert not torch.equal(merged(ids).logits, tiny("llama")(ids).logits), "the adapters do something"
    plain = model.generate(input_ids=ids, **GREEDY)
    with fewer.compress(merged, SNAP, 20) as run:
        want, held = merged.generate(ids, **GREEDY), run.report
    with fewer.compress(model, SNAP, 20) as run:
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), want)
        assert [layer.kept for layer in run.report.layers] == [layer.kept for layer in held.layers]
        assert run.report.bytes_kept == held.bytes_kept < held.bytes_full
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), plain), "as it was before"
    with model.disable_adapter():
        off = fingerprint(model, "states")
    assert fingerprint(model, "states") != off


@torch.no_grad()
def test_caches_are_saved_and_loaded_with_a_wrapper(decoder: Any, tmp_path: Path) -> None:
    ids, more = prompt(60), prompt(4, seed=2)
    with fewer.Cache(decoder, SNAP, 20) as cache:
        decoder(input_ids=ids, past_key_values=cache)
        cache.save(tmp_path / "cache")
        want = decoder(input_ids=more, past_key_values=cache).logits
    for model in (decoder, decoder.get_base_model()):
        with fewer.Cache.load(model, tmp_path / "cache") as loaded:
            assert torch.equal(model(input_ids=more, past_key_values=loaded).logits, want)
    with pytest.raises(fewer.FewerError, match="another model"):
        fewer.Cache.load(tiny("llama"), tmp_path / "cache")  # keys of the adapters are not its own
    with decoder.disable_adapter(), pytest.raises(fewer.FewerError, match="weights or adapters"):
        fewer.Cache.load(decoder, tmp_path / "cache")


def test_a_wrapper_is_the_model_it_wraps(decoder: Any) -> None:
    assert bare(decoder) is decoder.get_base_model() and bare(bare(decoder)) is bare(decoder)
    for of in ("weights", "states", "answers"):
        assert fingerprint(decoder, of) == fingerprint(bare(decoder), of) != fingerprint(tiny("llama"), of)  # type: ignore[arg-type]
    cost, without = (fewer.cost.of(model, SNAP, 20, tokens=60) for model in (decoder, tiny("llama")))
    assert cost == fewer.cost.of(bare(decoder), SNAP, 20, tokens=60)
    assert cost.bytes == without.bytes and cost.flops > without.flops, "adapters compute, too"


def test_adapters_that_are_switched_make_another_model(decoder: Any) -> None:
    """No weight changes when one is switched off, weighs more, or gives way to another."""
    model = copy.deepcopy(decoder)
    seen = [fingerprint(model, "states")]
    with model.disable_adapter():
        seen.append(fingerprint(model, "states"))
    assert fingerprint(model, "states") == seen[0]
    bare(model).model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    seen.append(fingerprint(model, "states"))
    model.add_adapter("other", model.peft_config["default"])
    for name in ("default", "other"):
        model.set_adapter(name)
        seen.append(fingerprint(model, "states"))
    assert len(set(seen)) == len(seen)


@torch.no_grad()
def test_encoders_and_models_with_pictures_too() -> None:
    vit = adapted(encoder("vit"), "q_proj", "query")  # by one name or the other, release by release
    given = inputs("vit")
    runs = []
    for model in (vit, vit.get_base_model()):
        with fewer.compress(model, "tome", 0.5) as run:
            runs.append((model(**given).last_hidden_state, run.assign))
    assert runs[0][0].shape[1] < 37 and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    case = vlms.llava()
    wrapped, asked = adapted(case.model, "q_proj"), case.inputs([1])
    runs = []
    for model in (wrapped, wrapped.get_base_model()):
        with fewer.compress(model, "fastv", 9) as run:
            runs.append((model.generate(**asked, **GREEDY), run.kept[0][0]))
    assert len(runs[0][1]) == 9 and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_prompts_that_were_tuned_as_a_cache_are_refused() -> None:
    """PEFT hands them to the model as a cache of its own, in which nothing could be dropped."""
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    with fewer.compress(model, SNAP, 20), pytest.raises(UnsupportedModel, match="that fewer did not make"):
        model.generate(input_ids=prompt(60), **GREEDY)
    model.generate(input_ids=prompt(60), **GREEDY)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT's own, without fewer as well
def test_a_tuned_prompt_is_read_by_the_wrapper_and_missed_where_there_is_none() -> None:
    """It goes before the text as embeddings: compressed with it, and refused where fewer would run the model alone."""
    model = get_peft_model(tiny("llama"), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    with fewer.compress(model, SNAP, 20) as run:
        model.generate(input_ids=prompt(60), **GREEDY)
    assert run.cache is not None and run.cache.get_seq_length() == 4 + 60 + 5
    examples = [Example("text", "question", ("answer",), line=n) for n in range(400)]
    with pytest.raises(UnsupportedModel, match=r"tuned prompt .*PromptTuningConfig"):
        fewer.tune(model, examples)
