"""The front door: `compress` a model, and `step`, the four stages in order.

score  ->  allocate  ->  reduce  ->  (the host applies the plan)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewer.adapters import encoder_blocks, vlm_layout
from fewer.adapters.peft import bare
from fewer.allocate.levels import levelled
from fewer.methods import family_of, resolve, resolve_store
from fewer.methods.any.full import Full
from fewer.types import Budget, BudgetError, FewerError, Keep, Matching, Method, Reduction, Tokens, UnsupportedModel

if TYPE_CHECKING:
    from fewer.codec import Codec
    from fewer.tuning.planfile import TunedPlan


def step(method: Method, budget: Budget, tokens: Tokens, *, check: bool = True) -> Any:
    """Decide, at one place, who stays: a `Plan`, or a `Transform`. This is the whole of every method; hosts only carry
    the decision out. `check` holds the plan to what was promised; a host may do that once for inputs of one shape."""
    return settle(method, budget, tokens, rate(method, tokens), check=check)


def rate(method: Method, tokens: Tokens) -> Any:
    """The first half: scores, with what must stay at +inf and what is not there at -inf."""
    scores = method.score(tokens)  # 1 what is each token worth?
    value = scores.value if isinstance(scores, Matching) else scores
    value = torch.where(tokens.protected, torch.inf, value)
    value = torch.where(tokens.padding, -torch.inf, value)
    return scores._replace(value=value) if isinstance(scores, Matching) else value


def settle(method: Method, budget: Budget, tokens: Tokens, scores: Any, *, check: bool = True) -> Any:
    """The second half. A host that must know the scores of every layer first calls the halves one by one."""
    allocation = method.allocate(tokens, scores, budget)  # 2 how many may stay, and where?
    plan: Reduction = method.reduce(tokens, scores, allocation)  # 3 who stays, who joins whom?
    if check:
        _promised(method, tokens, allocation.counts, plan)
    note = allocation.note or plan.note
    return replace(plan, note=note) if note else plan  # 4 the host applies it; restore() undoes it


def _promised(method: Method, tokens: Tokens, counts: torch.Tensor, plan: Reduction) -> None:
    """Every plan keeps what it was told to, whoever wrote the method."""
    name = type(method).__name__
    plan.check(tokens.padding)
    if not torch.equal(plan.counts, counts):
        raise FewerError(f"{name} was to keep {counts.tolist()} tokens and kept {plan.counts.tolist()}")
    if bool((tokens.protected & ~tokens.padding & (plan.assign < 0)).any()):
        most = int((tokens.protected & ~tokens.padding).sum(-1).max())
        raise BudgetError(
            f"{name}: {most} tokens are protected, or packed already, at one place, which is more than keep lets stay "
            f"there; ask for more, or for a share where more is to come"
        )
    if plan.mass is not None:
        had = tokens.available if tokens.mass is None else tokens.mass.masked_fill(tokens.padding, 0).sum(-1)
        if bool((plan.mass.clamp(min=0).sum(-1) > had * (1 + 1e-5)).any()):
            raise FewerError(f"{name} gives its slots more mass than the tokens had")


def _of_cache(method: Any) -> bool:
    """Whether a method's class shortens caches alone."""
    return family_of(type(resolve(method))) == "kv" or isinstance(resolve(method), Full)


@contextmanager
def compress(
    model: Any,
    method: "str | Path | TunedPlan | Method | Sequence[str | Method]",
    keep: Keep | Sequence[Any] = 1.0,
    *,
    when: str | None = None,
    every: int | None = None,
    store: "str | Codec | None" = None,
    schedule: str | None = None,
    masses: str | None = None,
    positions: str | None = None,
    restore: str | None = None,
    tape: bool = False,
    per: str | None = None,
    counted: str | None = None,
    only: str | None = None,
) -> Iterator[Any]:
    """Shorten what a model keeps, or what its blocks pass on, for as long as the context lasts; leaving it restores the
    model bit for bit.

    Args:
        model: a transformers decoder, whose key-value cache is shortened, used inside through `generate` or plain
            calls; an encoder, a vision transformer of timm or transformers or a BERT, whose tokens are; or a
            vision-language model, whose visual tokens are. PEFT's wrappers of one are as good.
        method: a name from `fewer.METHODS`, or an object with the four members of `fewer.Method`; or a plan that
            `fewer tune` made, "plan.toml", which says all that follows. Of a vision-language
            model also a list of them, one stage after the other, of which the last may be a cache's method; there
            "random" and "uniform" are about visual tokens.
        keep: what stays. Of a cache: a fraction in (0, 1], a token count a head, bytes for all compressed layers
            ("64MB"), or a list with a fraction or count for each layer, or with a list for each of its heads. Of an
            encoder's tokens, beside its class and register tokens: the fraction that is left at the end, a list of
            fractions or counts with one for each block, or a share of the FLOPs ("0.6 flops"). Of visual tokens: the
            fraction, or the count, of each picture's that is left after the last cut; or a list with what each stage
            leaves.
        when: "prefill" compresses after every forward of more than one token, "decode" after every `every` generated
            tokens (the cache then stays at a fixed size plus at most `every`), "both" does both. Left out, it is what
            the method was published with, and "prefill" for most. Caches only, as the next two.
        every: decoding steps between two compressions; 64 unless the method was published with another number.
        store: how what is kept is held: a name such as "kivi-4bit", or a `Codec`. Left out, in full precision, or as
            the method itself says.
        schedule: the way to `keep` over the blocks, "constant", "linear" or "geometric"; see
            `fewer.allocate.schedule`. Left out, the method's own, and "constant" for most. Encoders only, as the rest.
        masses: how a merged token counts as all it stands for in attention: as an additive "mask" (the default), as
            one more "channel" of queries and keys, or not ("off", for models that were trained without).
        positions: where a merged token is, for rotary positions: at its "survivor" (the default), or at the
            "centroid" of its members. Biases between positions are always the survivors'. For visual tokens: they
            "keep" the positions they had (the default), move to their "centroid", or all are renumbered without gaps
            ("compact"), which costs models their sense of place.
        restore: bring the output back to its original length, by a way named in `fewer.restorers`; then heads that
            pool or need a grid work as before. Left out, the output is as short as `keep` says.
        tape: keep the features that were merged or dropped, for ways to restore that need them.
        per: whether `keep` is for every "picture" (the default) or for all of a "prompt". Visual tokens only, as what
            follows.
        counted: whether `keep` counts what is left after the "last" cut (the default) or for the "mean" layer, by which
            methods that cut early and late can be compared.
        only: "visual" for a cache's method that is to leave text alone.

    Yields:
        For a cache, a `Run` whose `report` tells what the latest cache saved and cost. For an encoder, a `Run` with
        `plan`, `assign`, `mass`, `trace`, `flops` and `restore(features)`. For visual tokens, a `Run` with `report`,
        `plan` and `kept`.

    Raises:
        BudgetError, UnknownName, MissingSignal, UnsupportedModel: see `fewer.types`. Nothing is changed then.

    >>> model = tiny_llama()
    >>> prompt = torch.arange(40).unsqueeze(0)
    >>> with compress(model, "knorm", keep=0.25) as run:
    ...     answer = model.generate(prompt, max_new_tokens=4, do_sample=False)
    >>> run.report.layers[0].kept  # 10 of 40, and the 3 generated tokens that were read
    ((13, 13),)
    """
    of_caches = {"when": when, "every": every, "store": store}
    of_encoders = {
        "schedule": schedule,
        "masses": masses,
        "positions": positions,
        "restore": restore,
        "tape": tape or None,
    }
    of_pictures = {"per": per, "counted": counted, "only": only}

    def refuse(kind: str, *foreign: dict[str, Any]) -> None:
        names = [name for group in foreign for name, value in group.items() if value is not None]
        if names:
            raise FewerError(f"compress({', '.join(f'{name}=...' for name in names)}) means nothing for {kind}")

    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".toml")) or hasattr(method, "setting"):
        from fewer.tuning.planfile import TunedPlan  # it compresses by this very function

        if (plan := TunedPlan.of(method)) is not None:
            all_of_it = {"keep": None if keep == 1.0 else keep}
            refuse("a plan, which says all of it", all_of_it, of_caches, of_encoders, of_pictures)
            with plan.under(model) as planned:
                yield planned
            return
    several, model = isinstance(method, (list, tuple)), bare(model)
    if vlm_layout.is_vlm(model) and (several or only or not _of_cache(method)):
        refuse("visual tokens", {name: value for name, value in of_encoders.items() if name != "positions"})
        from fewer.adapters import vlm_run

        stages = list(method) if isinstance(method, (list, tuple)) else [method]
        asked = vlm_run.Asked(keep, per, counted, positions, only, when, every, resolve_store(store))
        with vlm_run.session(model, stages, asked) as pictured:
            yield pictured
        return
    refuse(
        "a cache's method by itself (add only='visual')" if vlm_layout.is_vlm(model) else "a model without pictures",
        of_pictures,
    )
    if several:
        raise FewerError(f"method={method!r}: several stages are for vision-language models; name one method")
    found = None if vlm_layout.is_vlm(model) else encoder_blocks.find(model)
    if found is None:
        refuse("a decoder's cache", of_encoders)
    else:
        refuse("an encoder", of_caches)
    chosen = resolve(method)  # type: ignore[arg-type]
    if family_of(type(chosen)) == "vlm":
        raise UnsupportedModel(
            f"{method!r} shortens the visual tokens of vision-language models, and {type(model).__name__} is none of "
            f"those that fewer knows: {', '.join(vlm_layout.FAMILIES)}"
        )
    if family_of(type(chosen)) == ("kv" if found is not None else "vit"):
        name = type(model).__name__
        raise UnsupportedModel(
            f"{name} is an encoder, and {method!r} shortens a decoder's cache; see `fewer methods --family vit`"
            if found is not None
            else f"{method!r} shortens the tokens of encoders, and {name} is none that fewer knows: it knows blocks "
            f"like those of {encoder_blocks.HOSTS}; for a decoder's cache see `fewer methods --family kv`"
        )
    if found is not None:
        from fewer.adapters import encoder_run, encoder_setting

        setting = encoder_setting.Setting.of(chosen, keep, schedule, masses, positions, restore, tape)
        with encoder_run.session(model, found, setting) as shortened:
            yield shortened
        return
    from fewer.adapters import hf_session  # hosts are imported on use: `import fewer` needs no transformers

    policy = hf_session.Policy.of(*levelled(chosen, keep), when, every, resolve_store(store))
    with hf_session.session(model, policy) as run:
        yield run
