"""What models and methods cost in closed form: tokens, FLOPs and bytes. No timing here, and nothing is run.

    Decoder, Encoder             the sizes of a model           cost/sizes.py
    of(model, method, keep)      what one setting costs: Cost   cost/caches.py, encoders.py, pictures.py, texts.py

`fewer.latency` turns FLOPs into time, by a table measured on this machine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewer.cost.record import Cost
from fewer.cost.sizes import Decoder, Encoder
from fewer.types import FewerError, Keep, UnsupportedModel

__all__ = ["Cost", "Decoder", "Encoder", "of"]


def of(
    model: Any,
    method: Any,
    keep: Keep | Sequence[Any] = 1.0,
    *,
    tokens: int,
    rows: int = 1,
    new_tokens: int = 0,
    store: Any = None,
    when: str | None = None,
    every: int | None = None,
    visual: Sequence[int] = (),
    separators: int = 0,
    per: str | None = None,
    counted: str | None = None,
    schedule: str | None = None,
    beside: int | None = None,
    family: str | None = None,
    scorer: Any = None,
) -> Cost:
    """What `fewer.compress(model, method, keep)`, or a prompt that was shortened, costs, before anything is run.

    Args:
        model, method, keep, store, when, every, per, counted, schedule: as in `fewer.compress`; a prompt's method by
            its name or its object, with the decoder that reads what is left.
        tokens: of one row: of a prompt, visual ones included, or of an image, class and register tokens included.
        rows: how many prompts, or images, of that length there are; without padding.
        new_tokens: tokens generated afterwards; `decode_bytes` is then about the step in their middle.
        visual: how many visual tokens each picture of a prompt has, for methods that shorten those.
        separators: tokens between rows of pictures, which leave with the first cut.
        beside: of an encoder's tokens, those that are no patches; left out, as the model itself says.
        family: "prompt" where a text is meant by a name that serves all families, such as "random".
        scorer: the model that a prompt's method reads the text with, where it has one.

    Raises:
        BudgetError, UnknownName, MissingSignal, UnsupportedModel: what `fewer.compress` would raise; only that bytes
            do not hold what a method always keeps, or that tokens cannot join so fast in a vision tower, is found when
            it runs.
        FewerError: numbers of tokens or rows that cannot be, or an option that means nothing here.

    >>> found = fewer.cost.of(tiny_llama(), "snapkv", 128, tokens=1000, rows=2)
    >>> found.bytes, found.exact  # 2 rows, 3 layers, 2 heads, and 32 numbers and a position for each of 128 tokens
    (202752, True)
    """
    # methods and hosts build on this file: they are imported on use
    from fewer.adapters import encoder_blocks, vlm_layout
    from fewer.adapters.peft import bare
    from fewer.cost import caches, encoders, pictures, texts
    from fewer.methods import METHODS, family_of, resolve, resolve_store
    from fewer.prompts.source import PromptMethod
    from fewer.tuning.planfile import TunedPlan, is_plan
    from fewer.types import Method

    for name, value, least in (("tokens", tokens, 1), ("rows", rows, 1), ("new_tokens", new_tokens, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FewerError(f"cost.of({name}={value!r}): a whole number, at least {least}")
    if isinstance(method, (Path, TunedPlan)) or is_plan(method):
        raise FewerError(
            f"cost.of({str(method)!r}): a plan is not costed whole; give the method and keep of its setting.held, see "
            "fewer.TunedPlan.load"
        )
    if family not in (None, "prompt"):
        raise FewerError(f"cost.of(family={family!r}): only 'prompt' is to be said, the model tells the others")
    several, model = isinstance(method, (list, tuple)), bare(model)
    options = {
        "new_tokens": new_tokens or None, "store": store, "when": when, "every": every, "visual": visual or None,
        "separators": separators or None, "per": per, "counted": counted, "schedule": schedule, "beside": beside,
        "scorer": scorer,
    }  # fmt: skip

    def only(kind: str, *names: str) -> None:
        given = [name for name, value in options.items() if value is not None and name not in names]
        if given:
            raise FewerError(f"cost.of({', '.join(f'{name}=...' for name in given)}) means nothing for {kind}")

    named = isinstance(method, str) and method in METHODS and family_of(METHODS[method]) == "prompt"
    if family or named or (isinstance(method, PromptMethod) and not isinstance(method, Method)):
        only("a prompt", "new_tokens", "scorer")
        return texts.of_text(model, method, keep, tokens=tokens, rows=rows, new_tokens=new_tokens, scorer=scorer)
    stored, pictured = resolve_store(store), vlm_layout.is_vlm(model)
    if pictured and (visual or several):
        only("visual tokens", "new_tokens", "store", "visual", "separators", "per", "counted")
        stages = list(method) if several else [method]
        return pictures.of_pictures(
            model, stages, keep, tokens=tokens, visual=visual, separators=separators, rows=rows, new_tokens=new_tokens,
            store=stored, per=per, counted=counted,
        )  # fmt: skip
    if several:
        raise FewerError(f"cost.of({method!r}): several stages are for vision-language models; name one method")
    found, chosen = None if pictured else encoder_blocks.find(model), resolve(method)
    kind, name = family_of(type(chosen)), type(model).__name__
    if pictured and kind in ("vlm", "vit"):
        raise FewerError(f"cost.of({method!r}): with a vision-language model pass visual=, the tokens of each picture")
    if kind == "vlm":
        raise UnsupportedModel(f"{method!r} shortens the visual tokens of vision-language models, and {name} is none")
    if found is not None:
        if kind == "kv":
            raise UnsupportedModel(f"{name} is an encoder, and {method!r} shortens a decoder's cache")
        only("an encoder", "schedule", "beside")
        return encoders.of_encoder(
            model, found, chosen, keep, tokens=tokens, rows=rows, schedule=schedule, beside=beside
        )
    if kind == "vit":
        raise UnsupportedModel(
            f"{method!r} shortens the tokens of encoders, and {name} is none that fewer knows: it knows blocks like "
            f"those of {encoder_blocks.HOSTS}; for a decoder's cache see `fewer methods --family kv`"
        )
    only("a decoder's cache", "new_tokens", "store", "when", "every")
    return caches.of_cache(
        model, chosen, keep, tokens=tokens, rows=rows, new_tokens=new_tokens, store=stored, when=when, every=every
    )
