"""What nobody uses any more is freed at once, not when Python next looks for cycles, which on a device can be never."""

import gc
from collections.abc import Callable
from copy import deepcopy

import pytest
from torch import Tensor

import fewer
from fewer.methods import METHODS, of_family
from fewer.types import FewerWarning
from tests import vlms
from tests.adapters.common import decoder
from tests.adapters.encoders import encoder, inputs, output
from tests.tiny import prompt, tiny

pytestmark = pytest.mark.filterwarnings(f"ignore::{FewerWarning.__module__}.{FewerWarning.__name__}")


def left(use: Callable[[], object]) -> int:
    """Bytes of tensors that are still there when `use` has returned and nothing of it is held."""
    use()  # what is made once, such as tables, is there now
    gc.collect()
    gc.disable()
    try:
        before = _alive()
        use()
        return sum(size for at, size in _alive().items() if at not in before)
    finally:
        gc.enable()


def _alive() -> dict[int, int]:
    storages = [one.untyped_storage() for one in gc.get_objects() if issubclass(type(one), Tensor)]
    # a compiler that was here before leaves tensors that hold nothing
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type != "meta"}


@pytest.mark.parametrize("name", of_family("kv"))
def test_a_cache(name: str) -> None:
    model, method, keep = decoder(name)

    def generated() -> None:
        with fewer.compress(model, method, keep) as run:
            model.generate(prompt(80, rows=2), max_new_tokens=6, do_sample=False)
        assert run.report.bytes_kept > 0

    assert left(generated) == 0


@pytest.mark.parametrize("name", ["h2o", "snapkv", "expected-attention", "criticalkv", "adakv", "kvzap"])
def test_a_cache_that_goes_on_watching(name: str) -> None:
    """With its copies, and what it would have been under another method."""
    model, method, keep = decoder(name)

    def copied() -> None:
        with fewer.Cache(model, method, keep, when="both", every=2) as cache:
            for ids in (prompt(80), prompt(1), prompt(1)):
                model(ids, past_key_values=cache)
            others = [cache.fork(), deepcopy(cache), cache.under("knorm", 0.2)]
            model(prompt(1), past_key_values=others[1])
        assert cache.report.kept < 1 and len(others) == 3

    assert left(copied) == 0


@pytest.mark.parametrize("name", [name for name in of_family("vit") if name != "full"])
def test_what_an_encoder_left(name: str) -> None:
    model, given = encoder("vit"), inputs("vit")

    def shortened() -> None:
        with fewer.compress(model, METHODS[name](), keep=0.6) as run:
            output(model, given)
        assert len(run.trace) == 4

    assert left(shortened) == 0


@pytest.mark.parametrize("name", [*(name for name in of_family("vlm") if name != "full"), "tome", "snapkv"])
def test_what_a_vision_language_model_left(name: str) -> None:
    case = vlms.FAMILIES["llava_onevision" if name in ("evs", "dycoke") else "llava"]()
    given = case.inputs([1], frames=4) if name in ("evs", "dycoke") else case.inputs([1])

    def answered() -> None:
        with fewer.compress(case.model, METHODS[name](), keep=0.5) as run:
            case.model.generate(**given, max_new_tokens=3, do_sample=False)
        assert run.report is not None

    assert left(answered) == 0


def test_the_measure_sees_a_cycle() -> None:
    model = tiny("llama")

    def circular() -> None:
        with fewer.Cache(model, "knorm", 0.5) as cache:
            model(prompt(40), past_key_values=cache)
            cache.itself = cache

    assert left(circular) > 1000
