"""A vision-language model inside `fewer.compress`: what is encoded is watched, visual tokens are cut on their way.

Taps           the model's feature functions: layouts, and what the tower attends to     (vlm_scene)
text pre-hook  a forward starts: pictures are matched to their placeholders
Cutter         before the first layer, or after any: who goes on                          (vlm_cut)
Cache          what layers hold of those that went on; any cache method on top            (hf_cache)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fewer.adapters import hf_cache, hf_session, hf_shorten
from fewer.adapters.hf_bind import Host
from fewer.adapters.hf_policy import Policy
from fewer.adapters.vlm_cache import FinalSet, OnlyVisual
from fewer.adapters.vlm_cut import Cutter
from fewer.adapters.vlm_encoder import Early
from fewer.adapters.vlm_scene import Picture, Taps
from fewer.adapters.vlm_stages import Stages, early
from fewer.cost import Decoder
from fewer.cost.sizes import TEXT
from fewer.methods import family_of, name_of, resolve
from fewer.report import VisualReport
from fewer.signals.visual import Tower
from fewer.types import Budget, BudgetError, FewerError, Keep, Method, UnsupportedModel

POSITIONS = ("keep", "compact", "centroid")


@dataclass(frozen=True)
class Asked:
    """What `compress` was asked for."""

    keep: Keep | Sequence[Keep] = 1.0
    per: str | None = None
    counted: str | None = None
    positions: str | None = None
    only: str | None = None
    when: str | None = None
    every: int | None = None
    store: Any = None


class Run:
    """The handle of one `fewer.compress` context on a vision-language model."""

    def __init__(
        self,
        model: Any,
        named: Sequence[str],
        stages: Stages,
        taps: Taps,
        inner: hf_session.Run,
        made: Callable[[], Cutter],
    ) -> None:
        self.named, self.stages, self.taps, self.inner, self.made = named, stages, taps, inner, made
        self.started, self.first_token = 0.0, 0.0
        self.cost = Decoder.of(model)
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None

    @property
    def cutter(self) -> Cutter:
        cache = self.inner.cache
        if cache is None:
            raise FewerError("nothing was compressed yet: run the model inside the context first")
        cutter = cache.shared.cutter
        assert isinstance(cutter, Cutter)
        return cutter

    @property
    def plan(self) -> list[tuple[int, int, int, Any]]:
        """Every decision about the latest pictures: after which layer (-1: before the first), in which row, for which
        picture (-1: all of the row), and the plan."""
        return list(self.cutter.plans)

    @property
    def kept(self) -> list[list[Tensor]]:
        """For each row and each of its pictures, which of its tokens the last layer read."""
        return [[one.alive for one in row] for row in self.pictures]

    @property
    def pictures(self) -> list[list[Picture]]:
        """For each row its pictures: their layout, their columns in the prompt, and which of their tokens are left."""
        return self.cutter.pictures

    def drawn(self, row: int = 0, picture: int = 0) -> tuple[tuple[int, int], list[int]]:
        """For a drawing: rows and columns of the crop that shows the whole picture (the first, if none does), and for
        each of its cells the number of the token that it ended in, -1 where it was dropped."""
        one = self.pictures[row][picture]
        crop = one.layout.whole[0] if one.layout.whole else 0
        n = len(one.columns)
        plans = [plan for _, at, number, plan in self.plan if (at, number) == (row, picture)]
        if plans and len(plans[0].assign[0]) == n:
            slots = torch.arange(n)
            for plan in plans:
                slots = torch.where(slots < 0, -1, plan.assign[0][slots.clamp(min=0)])
        else:  # decided together with other pictures, or in the tower before: who is left
            slots = torch.full((n,), -1)
            slots[one.alive] = torch.arange(len(one.alive))
        (rows, columns), here = one.layout.grids[crop], one.layout.crop == crop
        cells = torch.full((rows * columns,), -1)
        cells[(one.layout.y * columns + one.layout.x)[here]] = slots[here]
        return (rows, columns), cells.tolist()

    @property
    def report(self) -> VisualReport:
        """What the latest prompt with pictures saved and cost."""
        cutter, cache = self.cutter, self.inner.report
        b, text = max(1, len(cutter.pictures)), cutter.tokens - cutter.had
        whole = b * len(cutter.counts) * self.cost.layer_flops(cutter.tokens / b)
        left = b * sum(self.cost.layer_flops((text + count) / b) for count in cutter.counts)
        return VisualReport(
            tuple(self.named), self.stages.budget.keep, cutter.had, tuple(cutter.counts),
            cutter.seconds, self.first_token, (left + cutter.choosing) / whole, cutter.choosing / whole, cache,
        )  # fmt: skip

    # --- hooks ---

    def before_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The whole model is called: remember the prompt."""
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        self.mask = kwargs.get("attention_mask")

    def before_text(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The language model is called: its pictures are known by now."""
        cache = next((one for one in kwargs.values() if isinstance(one, hf_cache.Cache)), None)
        if cache is None or cache.shared.probing:
            return None
        self.started = perf_counter()
        if cache.shared.cutter is None:  # it was loaded, or made by the user
            _not_probing(self.stages, cache.shared.policy.method)
            cache.shared.policy = replace(cache.shared.policy, cutter=self.made)
            cache.shared.cutter = self.made()
        cutter, states = cache.shared.cutter, kwargs["inputs_embeds"]
        assert isinstance(cutter, Cutter)
        cache.shared.passed = None  # of a forward that failed
        seen, (b, q, _) = cache.get_seq_length(), states.shape
        cutter.end()
        if cutter.shift is not None and seen:
            places = _positions(kwargs, cache, b, q, states.device)
            kwargs["position_ids"] = places - cutter.shift.view(-1, 1)
        padding = torch.zeros(b, q, dtype=torch.bool, device=states.device)
        if self.mask is not None and self.mask.ndim == 2:
            padding = self.mask[:, -q:] == 0
        before = list(cache.shared.members[0].real) if seen else [0] * b
        if q == 1 and seen:
            cutter.mark(~padding, before)
            return args, kwargs
        if self.ids is None:
            raise FewerError(
                "inputs_embeds were passed without input_ids, and only these say where pictures are: pass input_ids "
                "inside fewer.compress"
            )
        ids = self.ids[:, -q:]
        rows = self.taps.scene(ids)
        if not any(rows):
            if not seen:
                raise FewerError(
                    "this prompt has no pictures, so there are no visual tokens to shorten; leave fewer.compress, or "
                    "use a method of `fewer methods --family kv` alone"
                )
            cutter.mark(~padding, before)
            return args, kwargs
        cutter.begin(ids, rows, padding, _positions(kwargs, cache, b, q, states.device))
        cutter.mark(~padding, before)
        if (deep := kwargs.get("deepstack_visual_embeds")) is not None and not self.stages.whole:
            shown = kwargs["visual_pos_masks"]
            for one in deep:
                wide = torch.zeros_like(states)
                wide[shown] = one.to(wide)
                cutter.deep.append(wide)
            kwargs["deepstack_visual_embeds"] = kwargs["visual_pos_masks"] = None
        return args, kwargs

    def after_block(self, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Deep-stack: what the first layers add to their outputs, for the tokens that are there."""
        cache = next((one for one in kwargs.values() if isinstance(one, hf_cache.Cache)), None)
        cutter = None if cache is None else cache.shared.cutter
        if not isinstance(cutter, Cutter) or index >= len(cutter.deep) or not cutter.rows:
            return None
        assert isinstance(output, Tensor)
        return output + cutter.deep[index].to(output)

    def after_text(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = next((one for one in kwargs.values() if isinstance(one, hf_cache.Cache)), None)
        if cache is not None and isinstance(cache.shared.cutter, Cutter) and cache.shared.cutter.rows:
            self.first_token = perf_counter() - self.started
            cache.shared.cutter.finish()


def _positions(kwargs: dict[str, Any], cache: Any, b: int, q: int, device: Any) -> Tensor:
    """The position ids of a forward, as the text model would count them where it is given none."""
    given: Tensor | None = kwargs.get("position_ids")
    if given is None:
        given = torch.arange(q, device=device) + int(cache.get_seq_length())
    return given.expand(*given.shape[:-2], b, q)


def text_of(base: nn.Module) -> Any:
    """The language model inside a vision-language model."""
    found = [getattr(base, name) for name in TEXT if isinstance(getattr(base, name, None), nn.Module)]
    if not found:
        raise UnsupportedModel(f"{type(base).__name__} has no language model under the names {', '.join(TEXT)}")
    return found[0]


def _kinds(methods: Sequence[Any], only: str | None) -> tuple[list[Method], Method | None]:
    """The stages that cut, and the one that cuts the cache, which comes last."""
    chosen = [resolve(one) for one in methods]
    if not chosen:
        raise FewerError("compress(method=[]): name at least one stage")
    if only not in (None, "visual"):
        raise FewerError(f"only={only!r}: a cache's method may be kept to 'visual' entries")
    families = [family_of(type(one)) for one in chosen]
    caching = [i for i, family in enumerate(families) if family == "kv"]
    if caching and caching != [len(chosen) - 1]:
        raise FewerError(f"of the stages {[name_of(one) for one in chosen]} only the last one may cut the cache")
    return (chosen[:-1], chosen[-1]) if caching else (chosen, None)


def _not_probing(stages: Stages, caching: Method) -> None:
    """Raise if the cache's method has the model read a prompt again whose visual tokens are cut."""
    if stages.methods and not stages.whole and any(getattr(need, "probe", False) for need in caching.needs):
        raise FewerError(
            f"{name_of(caching)!r} has the model read on when a prompt was read, over all of its entries, and "
            f"{' + '.join(map(name_of, stages.methods))} leaves some layers without them: name one of the two, or a "
            "cache's method that does not, such as 'snapkv'"
        )


@contextmanager
def session(model: Any, methods: Sequence[Any], asked: Asked) -> Iterator[Run]:
    """Shorten this model's visual tokens until the context is left."""
    positions = asked.positions or "keep"
    if positions not in POSITIONS:
        raise FewerError(f"positions={positions!r}: known ways are {', '.join(POSITIONS)}")
    cutting, caching = _kinds(methods, asked.only)
    host = Host.of(model)
    stages = Stages(
        cutting, asked.keep, len(host.attentions), asked.per or "picture", asked.counted or "last", caching is not None
    )
    if positions == "compact" and any(after != -1 for after in stages.at):
        raise FewerError(
            "positions='compact' renumbers a prompt before its first layer, and these methods cut inside: leave it out"
        )
    if caching is None and (asked.when or asked.every):
        raise FewerError("compress(when=..., every=...) are for a cache's method, and none is among the stages")
    if asked.when not in (None, "prefill"):
        raise FewerError(
            f"when={asked.when!r}: visual entries of a cache are cut once, when they were read; leave it out"
        )
    text = text_of(model.base_model)
    needs = frozenset(need for one in cutting for need in one.needs if isinstance(need, Tower))
    first = None
    if cutting and early(cutting[0]) and not stages.whole:
        if needs:
            raise FewerError(
                f"{name_of(cutting[0])!r} leaves fewer patches in the vision tower, whose attention another stage "
                "reads: name one of the two"
            )
        first = Early(model, cutting[0], lambda patches: stages.counts(patches)[0])
        alone = len(cutting) == 1 and caching is None
        if alone and stages.budget.fraction is None and model.config.model_type != "llava":
            raise BudgetError(
                f"keep={asked.keep!r}: {name_of(cutting[0])!r} shortens every crop of a picture by itself, in the "
                f"tower of {type(model).__name__}; give a share, or name a stage after it, which counts exactly"
            )
    taps = Taps(model, needs, first)

    def made() -> Cutter:
        return Cutter(stages, host, positions, text.rotary_emb, lambda: text.get_input_embeddings().weight)

    inside: Method = resolve("full")
    if caching is not None and not stages.whole:
        _not_probing(stages, caching)
        inside = OnlyVisual(caching)
    elif not stages.whole and any(getattr(one, "final", False) for one in cutting):
        inside = FinalSet()
    policy = Policy.of(inside, Budget.parse(1.0), asked.when, asked.every, asked.store)
    policy = replace(policy, cutter=made)
    named = [name_of(one) for one in (*cutting, *([caching] if caching is not None else []))]
    if stages.at:
        hf_shorten.check_later(host, f"{' + '.join(named)} shortens a prompt", min(stages.at))
    with ExitStack() as leaving:
        inner = leaving.enter_context(hf_session.session(model, policy))
        leaving.enter_context(taps.attached())
        run = Run(model, named, stages, taps, inner, made)
        for hook in (
            model.register_forward_pre_hook(run.before_model, with_kwargs=True),
            text.register_forward_pre_hook(run.before_text, with_kwargs=True),
            text.register_forward_hook(run.after_text, with_kwargs=True),
            *(
                block.register_forward_hook(partial(run.after_block, index), with_kwargs=True)
                for index, block in enumerate(hf_shorten.blocks(host))
            ),
        ):
            leaving.callback(hook.remove)
        yield run
