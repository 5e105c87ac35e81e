"""Encoders of transformers: bound by role, shortened, and left as they were."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewer
from fewer.adapters.encoder_blocks import find
from fewer.allocate.uniform import uniform
from fewer.methods.vit.tome import ToMe
from fewer.reduce.select import top_k
from fewer.score.heads import attention
from fewer.signals import Queries
from fewer.signals.heads import Attended, Heads
from fewer.types import (
    Allocation,
    Budget,
    BudgetError,
    FewerError,
    FewerWarning,
    MissingSignal,
    Plan,
    Tokens,
    UnknownName,
    UnsupportedModel,
)
from tests.adapters.encoders import FAMILIES, IMAGES, PREFIX, Plain, encoder, inputs, output

SHORTENING = ("random", "uniform", "tome", "topk")
LITTLE = pytest.mark.filterwarnings("ignore:this cannot make the encoder faster")


class FirstFew:
    """Keeps the first tokens, so that a test knows which ones they are."""

    needs: frozenset[Any] = frozenset()

    def __init__(self, *places: int) -> None:
        if places:
            self.places = lambda layers: list(places)

    def score(self, tokens: Tokens) -> Tensor:
        return -tokens.positions.float()

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bit_equal(family: str) -> None:
    model, given = encoder(family), inputs(family)
    plain = output(model, given)
    for method in SHORTENING:
        with fewer.compress(model, method, keep=1.0) as run:
            assert torch.equal(output(model, given), plain)
        assert run.plan == [None] * 4 and run.flops == 1.0


@pytest.mark.parametrize("method", [*SHORTENING, "zero-tprune"])
def test_keeping_everything_keeps_padding_too(method: str) -> None:
    """Where all rows are padded, as to a fixed length: what comes out is as long as the host's."""
    model, given = encoder("bert"), inputs("bert")
    given["attention_mask"] = (torch.arange(24) < torch.tensor([[20], [11]])).long()
    plain = output(model, given)
    with fewer.compress(model, method, keep=1.0) as run:
        assert torch.equal(output(model, given), plain)
    assert run.plan == [None] * 4 and run.flops == 1.0 and (run.kept >= 0).sum(-1).tolist() == [20, 11]


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_bit_for_bit(family: str) -> None:
    model, given = encoder(family), inputs(family)
    plain = output(model, given)
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def interrupted() -> None:
        with fewer.compress(model, "tome", keep=0.5):
            output(model, given)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(output(model, given), plain)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("method", SHORTENING)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_exact_and_the_prefix_survives(family: str, method: str) -> None:
    model, given = encoder(family), inputs(family)
    with fewer.compress(model, method, keep=0.5) as run:
        out = output(model, given)
    prefix = PREFIX.get(family, 1)
    n = run.assign.shape[1]
    asked = prefix + -(-(n - prefix) // 2)
    assert out.shape[1] == asked and run.trace[-1].went == asked
    assert run.assign[:, :prefix].tolist() == [list(range(prefix))] * 2
    for row in range(2):
        assert all((run.assign[row] == i).sum() == 1 for i in range(prefix)), "nobody joins a class or register token"


@pytest.mark.parametrize("family", IMAGES)
def test_the_grid_and_the_prefix_come_from_the_host(family: str) -> None:
    with fewer.compress(encoder(family), "tome", keep=0.5) as run:
        output(encoder(family), inputs(family))
    assert run.grid == (6, 6)
    assert run.state.prefix == PREFIX[family]


def blockwise(model: Any, given: dict[str, Tensor], plans: list[Any]) -> Tensor:
    """The encoder as a plain loop over its blocks, attention written out, with plans and masses applied by hand."""
    found = find(model)
    assert found is not None
    seen: list[Tensor] = []
    hook = found[1][0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    output(model, given)
    hook.remove()
    x, mass = seen[0], torch.ones(seen[0].shape[:2])
    for block, plan in zip(found[1], plans, strict=True):
        *parts, back = (one for one in block.attention.modules() if isinstance(one, nn.Linear))  # names change
        y = block.norm1(x)
        q, k, v = (part(y).unflatten(-1, (4, 8)).transpose(1, 2) for part in parts)  # four heads of eight
        logits = q @ k.transpose(-1, -2) * 8**-0.5 + mass.log()[:, None, None]
        y = back((logits.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        x = x + y * block.layer_scale1.lambda1
        if plan is not None:
            weights = torch.stack([plan.weight * (plan.slot == i) for i in range(plan.survivors.shape[-1])], 1)
            held = torch.stack([(mass * (plan.slot == i)).sum(-1) for i in range(plan.survivors.shape[-1])], 1)
            x, mass = weights @ x, held if plan.mass is not None else mass.gather(1, plan.survivors)
        x = x + block.mlp(block.norm2(x)) * block.layer_scale2.lambda1
    result: Tensor = model.layernorm(x)
    return result


@pytest.mark.parametrize("method", ["tome", "topk"])
@torch.no_grad()
def test_the_whole_encoder_is_what_a_plain_loop_gives(method: str) -> None:
    model, given = encoder("dinov2"), inputs("dinov2")
    with fewer.compress(model, method, keep=0.4) as run:
        out = output(model, given)
    torch.testing.assert_close(out, blockwise(model, given, run.plan), atol=1e-4, rtol=1e-4)
    if method == "tome":
        flawed = list(run.plan)
        flawed[1] = Plan(flawed[1].slot, flawed[1].weight, flawed[1].survivors)
        assert not torch.allclose(out, blockwise(model, given, flawed), atol=1e-4), "masses matter, and are compared"


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_by_mask_and_by_channel_are_one(family: str) -> None:
    model, given = encoder(family), inputs(family)
    found = {}
    for form in ("mask", "channel", "off"):
        with fewer.compress(model, "tome", keep=0.4, masses=form):
            found[form] = output(model, given)
    torch.testing.assert_close(found["mask"], found["channel"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found["mask"], found["off"], atol=1e-4)


def test_masses_by_channel_hold_in_half_precision() -> None:
    """The key's channel is a rounded value and what rounding left over: large masses are no worse than small ones."""
    model = encoder("dinov2").to(torch.bfloat16)
    given = {"pixel_values": inputs("dinov2")["pixel_values"].to(torch.bfloat16)}
    found = {}
    for form in ("mask", "channel"):
        with fewer.compress(model, "tome", keep=0.1, masses=form):
            found[form] = output(model, given).float()
    encoder("dinov2").to(torch.float32)
    encoder.cache_clear()
    assert float((found["mask"] - found["channel"]).abs().mean()) < 0.05


@pytest.mark.parametrize("family", [name for name in IMAGES if name != "siglip_vision_model"])
@torch.no_grad()
def test_merging_duplicates_loses_nothing(family: str) -> None:
    """Neighbours that are exact duplicates are merged with masses: what is left has the features it had."""
    model = encoder(family)
    found = find(model)
    assert found is not None
    block, prefix = found[1][0], PREFIX[family]
    x = torch.randn(2, prefix + 36, 32)
    first = prefix + prefix % 2  # pairs begin at an odd index, since odd tokens take in even ones
    start = first if first % 2 else first + 1
    pairs = torch.arange(start, prefix + 35, 2)
    x[:, pairs + 1] = x[:, pairs]
    masked = "attention_mask" in inspect.signature(block.forward).parameters  # not in the oldest transformers
    plain = block(x, None) if masked else block(x)
    plain = plain[0] if isinstance(plain, tuple) else plain
    with fewer.compress(model, "tome", keep=[prefix + 36 - len(pairs) - prefix] * 4) as run:
        run.grid = (6, 6)
        short = run.forward(0, x, {})
    assert short.shape[1] == prefix + 36 - len(pairs)
    same = plain.gather(1, run.plan[0].survivors.unsqueeze(-1).expand(-1, -1, 32))
    torch.testing.assert_close(short, same, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SHORTENING)
def test_a_row_is_alone_what_it_is_in_a_batch(family: str, method: str) -> None:
    model, given = encoder(family), inputs(family, rows=3)
    with fewer.compress(model, method, keep=0.5) as run:
        together = output(model, given)
        assigned = run.assign
        for row in range(3):
            alone = output(model, {name: value[row : row + 1] for name, value in given.items()})
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
            assert torch.equal(run.assign[0], assigned[row])


@pytest.mark.parametrize("method", SHORTENING)
def test_padding_changes_nothing(method: str) -> None:
    model = encoder("bert")
    ids = inputs("bert")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with fewer.compress(model, method, keep=0.5) as run:
        together = output(model, {"input_ids": ids, "attention_mask": mask})
        padded, counts = run.mass[1], (run.mass > 0).sum(-1).tolist()
        alone = output(model, {"input_ids": ids[1:, :15]})
    assert counts == [1 + 12, 1 + 7]
    torch.testing.assert_close(together[1, : counts[1]], alone[0], atol=1e-5, rtol=1e-5)
    assert bool((padded[counts[1] :] == 0).all())


@LITTLE
@pytest.mark.parametrize(("keep", "lengths"), [(0.9, (20, 15)), (0.9, (24, 30, 2)), (0.8, (15, 12))])
@pytest.mark.parametrize("method", ["random", "uniform", "topk", "ats", "zero-tprune", "evit", "diffrate"])
@torch.no_grad()
def test_a_shorter_row_may_lose_tokens_where_the_longest_loses_none(
    method: str, keep: float, lengths: tuple[int, ...]
) -> None:
    """At a share near one a place may take a token from some rows alone."""
    model, longest = encoder("bert"), max(lengths)
    ids = torch.randint(5, 99, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).long()
    with fewer.compress(model, method, keep) as run:
        together = output(model, {"input_ids": ids, "attention_mask": mask})
        kept, left = run.kept, (run.kept >= 0).sum(-1).tolist()
        for row, length in enumerate(lengths):
            alone = output(model, {"input_ids": ids[row : row + 1, :length]})
            torch.testing.assert_close(alone[0], together[row, : left[row]], atol=1e-5, rtol=1e-5)
            assert run.kept[0].tolist() == kept[row, : left[row]].tolist()


@LITTLE
@torch.no_grad()
def test_pictures_that_keep_unlike_numbers_are_alone_what_they_are_in_a_batch() -> None:
    """In the second and third place the fullest picture keeps all that is left of it, and the others do not."""
    model = copy.deepcopy(encoder("vit"))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("q_proj" in name or "k_proj" in name or "query" in name or "key" in name):
            parameter.mul_(15)  # heads that look at few patches, and so few samples
    pixels = inputs("vit", rows=4, seed=9)["pixel_values"]
    with fewer.compress(model, "ats", keep=0.9) as run:
        output(model, {"pixel_values": pixels})
        assert any(plan is not None and len(plan.counts.unique()) > 1 for plan in run.plan[2:])
        together = [[i for i in row if i >= 0] for row in run.kept.tolist()]
        for row in range(4):
            output(model, {"pixel_values": pixels[row : row + 1]})
            assert run.kept[0].tolist() == together[row]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("prefix", "has", "classed"),
    [
        (1, "one", True), (5, "one", True), (1, "nothing", True),
        (4, "None", False), (1, "None", False), (4, "nothing", False),
    ],
)  # fmt: skip
def test_a_register_is_no_class_token(prefix: int, has: str, classed: bool, relative: bool) -> None:
    """Top-K keeps what the class token attends to, or all where there is none, by the attention the block computed."""
    model, pixels = Plain(prefix, has, relative), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    model(pixels)
    block = model.blocks[1].attn
    logits = block.query @ block.key.mT * 8**-0.5
    weights = (logits if block.relative is None else logits + block.relative).softmax(-1).mean(1)
    rated = (weights[:, 0] if classed else weights.mean(1))[:, prefix:]
    with fewer.compress(model, "topk", keep=[18] * 3) as run:
        model(pixels)
    assert run.classed is classed
    for row in range(2):
        best = rated[row].topk(18).indices.sort().values + prefix
        assert run.plan[1].survivors[row, prefix:].tolist() == best.tolist()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "siglip_vision_model"])
def test_a_class_token_is_known_by_its_name_and_a_text_has_its_first(family: str) -> None:
    with fewer.compress(encoder(family), "topk", keep=0.5) as run:
        assert run.classed


@pytest.mark.parametrize("masses", ["mask", "channel"])
@pytest.mark.parametrize("relative", [False, True])
def test_methods_see_the_attention_that_a_block_computes(
    masses: str, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a host's own bias and with masses, before and after tokens have left."""
    model, apart, plain = Plain(1, relative=relative), [], ToMe.score

    def watched(self: ToMe, tokens: Tokens) -> Any:
        seen = tokens.signal(Heads, Attended)
        apart.append(attention(seen) @ seen.value - model.blocks[tokens.site.layer].attn.out)
        return plain(self, tokens)

    monkeypatch.setattr(ToMe, "score", watched)
    with fewer.compress(model, "tome", keep=0.5, masses=masses):
        model(torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    assert len(apart) == 4 and apart[-1].shape[2] < apart[0].shape[2]
    assert max(float(one.abs().max()) for one in apart) < 1e-4


def test_padding_on_the_left_is_refused() -> None:
    ids = inputs("bert")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(UnsupportedModel, match="padding_side"), fewer.compress(encoder("bert"), "tome", keep=0.5):
        output(encoder("bert"), {"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("family", ["dinov2", "vit"])
@torch.no_grad()
def test_pruning_is_masking(family: str) -> None:
    """Dropping tokens after a block's attention equals hiding their keys from then on."""
    model, given = encoder(family), inputs(family)
    found = find(model)
    assert found is not None
    if "attention_mask" not in inspect.signature(found[1][0].forward).parameters:
        pytest.skip("blocks of this transformers take no mask, by which keys could be hidden")
    with fewer.compress(model, FirstFew(1), keep=0.5):
        short = output(model, given)
    hidden = torch.zeros(1, 1, 1, 37)
    hidden[..., short.shape[1] :] = -torch.inf

    def mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args[0], hidden), {}

    hooks = [block.register_forward_pre_hook(mask, with_kwargs=True) for block in found[1][2:]]
    masked = output(model, given)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(short, masked[:, : short.shape[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["copy", "zero", "pinv", "delta", "stale", "kernel"])
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_every_way_back_gives_the_full_length(method: str, how: str) -> None:
    model, given = encoder("dinov2"), inputs("dinov2")
    with fewer.compress(model, method, keep=0.5, tape=True) as run:
        short = output(model, given)
    back = run.restore(short, how)
    assert back.shape == (2, 37, 32) and bool(back.isfinite().all())
    if how != "kernel":  # what survived has its own features
        kept = back.gather(1, run.kept.unsqueeze(-1).expand_as(short))
        if method == "topk":
            torch.testing.assert_close(kept, short, atol=1e-5, rtol=1e-5)


def test_copying_back_inside_equals_copying_back_outside() -> None:
    model, given = encoder("dinov2"), inputs("dinov2")
    with fewer.compress(model, "tome", keep=0.5) as run:
        outside = run.restore(output(model, given))
    with fewer.compress(model, "tome", keep=0.5, restore="copy"):
        inside = output(model, given)
    torch.testing.assert_close(inside, outside)
    assert inside.shape[1] == 37


def test_ways_back_that_need_the_tape_say_so() -> None:
    model = encoder("dinov2")
    with fewer.compress(model, "tome", keep=0.5) as run:
        short = output(model, inputs("dinov2"))
    with pytest.raises(FewerError, match="tape=True"):
        run.restore(short, "delta")
    with pytest.raises(UnknownName, match="copy"):
        run.restore(short, "magic")


@pytest.mark.parametrize(
    ("keep", "went"),
    [
        (0.5, [33, 28, 24, 19]),
        ([0.75, 0.75, 0.5, 0.25], [28, 28, 19, 10]),
        ([30, 20, 20, 9], [31, 21, 21, 10]),
        (0.25, [31, 24, 17, 10]),
    ],
)
def test_keep_may_be_a_share_or_a_list(keep: Any, went: list[int]) -> None:
    with fewer.compress(encoder("dinov2"), "random", keep=keep) as run:
        output(encoder("dinov2"), inputs("dinov2"))
    assert [one.went for one in run.trace] == went


@pytest.mark.parametrize(("method", "acts"), [("pooling", [1]), ("tome", [0, 1, 2, 3]), ("topk", [1, 2, 3])])
def test_there_is_a_plan_for_every_block(method: str, acts: list[int]) -> None:
    """None where nobody left, for methods that act before attention too."""
    with fewer.compress(encoder("dinov2"), method, keep=0.5) as run:
        output(encoder("dinov2"), inputs("dinov2"))
    assert [layer for layer, plan in enumerate(run.plan) if plan is not None] == acts and len(run.plan) == 4


def test_a_list_overrules_the_places_that_a_method_was_published_with() -> None:
    with fewer.compress(encoder("dinov2"), "topk", keep=[30, 20, 20, 9]) as run:
        output(encoder("dinov2"), inputs("dinov2"))
    assert [one.went for one in run.trace] == [31, 21, 21, 10]


@pytest.mark.parametrize("method", SHORTENING)
@pytest.mark.parametrize("schedule", ["constant", "linear", "geometric"])
def test_a_share_of_the_flops_is_met(method: str, schedule: str) -> None:
    model, given = encoder("dinov2"), inputs("dinov2")
    with fewer.compress(model, method, keep="0.8 flops", schedule=schedule) as run:
        output(model, given)
    assert 0.7 < run.flops <= 0.8


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (0.0, "not in"),
        (1.5, "not in"),
        (float("nan"), "not in"),
        (True, "cannot be read"),
        ("much", "cannot be read"),
        ("0 flops", "not in|cannot be read"),
        ([0.5, 0.5], "2 entries"),
        ([0.5, 0.6, 0.4, 0.4], "rises"),
        ([0.5, 0, 0.4, 0.4], "neither a share nor a count"),
        ([30, 20, 10, 1], "1 means everything"),
        ([1, 30, 20, 10], "write 1.0 for everything"),
        ("0.05 flops", "cannot be met"),
    ],
)
def test_a_keep_that_cannot_be_is_one_clear_error(keep: Any, says: str) -> None:
    model, given = encoder("dinov2"), inputs("dinov2")
    plain = output(model, given)
    with pytest.raises(BudgetError, match=says), fewer.compress(model, "tome", keep=keep):
        output(model, given)
    assert torch.equal(output(model, given), plain)


def test_merging_in_pairs_cannot_leave_next_to_nothing() -> None:
    with pytest.raises(BudgetError, match="prunes"), fewer.compress(encoder("dinov2"), "tome", keep=0.03):
        output(encoder("dinov2"), inputs("dinov2"))
    with fewer.compress(encoder("dinov2"), "random", keep=0.03) as run:
        assert output(encoder("dinov2"), inputs("dinov2")).shape[1] == 1 + 2
    assert run.trace[-1].went == 3


def test_full_is_held_to_its_budget_too() -> None:
    with pytest.raises(BudgetError, match="full keeps all 37: ask"), fewer.compress(encoder("dinov2"), "full", 0.5):
        output(encoder("dinov2"), inputs("dinov2"))


@LITTLE
@pytest.mark.parametrize("method", ["random", "tome", "topk", "dpc-knn"])
def test_a_text_of_one_token_passes_whole(method: str) -> None:
    model, given = encoder("bert"), {"input_ids": torch.tensor([[7]])}
    plain = output(model, given)
    with fewer.compress(model, method, keep=0.5) as run:
        assert torch.equal(output(model, given), plain)
    assert run.kept.tolist() == [[0]] and run.flops == 1


def test_a_setting_that_cannot_gain_is_said() -> None:
    with pytest.warns(FewerWarning, match="cannot make"), fewer.compress(encoder("dinov2"), "random", keep=0.99):
        output(encoder("dinov2"), inputs("dinov2"))


def test_bad_settings_are_refused_before_anything_is_changed() -> None:
    model = encoder("dinov2")
    for given, error, says in (
        ({"masses": "twice"}, UnknownName, "mask"),
        ({"positions": "here"}, UnknownName, "survivor"),
        ({"restore": "magic"}, UnknownName, "copy"),
        ({"schedule": "steep"}, BudgetError, "constant"),
        ({"store": "kivi-4bit"}, FewerError, "store"),
        ({"when": "decode"}, FewerError, "when"),
    ):
        with pytest.raises(error, match=says), fewer.compress(model, "tome", keep=0.5, **given):
            pass
    with pytest.raises(UnsupportedModel, match="family vit"), fewer.compress(model, "snapkv", keep=0.5):
        pass
    own = FirstFew()
    own.needs = frozenset({Queries(last=4)})
    with pytest.raises(MissingSignal, match="Queries"), fewer.compress(model, own, keep=0.5):
        pass
    assert not any("forward" in vars(m) for m in model.modules())


def test_an_encoder_in_two_contexts_is_refused() -> None:
    model = encoder("dinov2")
    with fewer.compress(model, "tome", keep=0.5):
        again = fewer.compress(model, "tome", keep=0.5)
        with pytest.raises(FewerError, match="already"):
            again.__enter__()


def test_reading_a_run_before_anything_ran_says_so() -> None:
    with fewer.compress(encoder("dinov2"), "tome", keep=0.5) as run, pytest.raises(FewerError, match="nothing was run"):
        run.assign  # noqa: B018


def test_several_towers_are_named() -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = CLIPTextConfig(vocab_size=99, bos_token_id=0, eos_token_id=1, **small).to_dict()
    image = CLIPVisionConfig(image_size=32, patch_size=16, **small).to_dict()
    both = CLIPModel(CLIPConfig(text_config=text, vision_config=image))
    with pytest.raises(UnsupportedModel, match=r"vision_model.*"), fewer.compress(both, "tome", keep=0.5):
        pass


def test_a_text_tower_that_looks_back_is_refused() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=99, bos_token_id=0, eos_token_id=1, **small)).eval()
    with pytest.raises(UnsupportedModel), fewer.compress(model, "random", keep=0.5):
        model(input_ids=torch.arange(12).unsqueeze(0))


def test_attention_that_is_written_out_is_refused() -> None:
    model = encoder("vit", attn_implementation="eager")
    with pytest.raises(UnsupportedModel, match="sdpa"), fewer.compress(model, "tome", keep=0.5):
        output(model, inputs("vit"))


def test_half_precision_on_a_cpu_is_refused() -> None:
    model = encoder("vit", hidden_dropout_prob=0.0).to(torch.float16)
    given = {"pixel_values": inputs("vit")["pixel_values"].half()}
    with pytest.raises(UnsupportedModel, match="bfloat16"), fewer.compress(model, "tome", keep=0.5):
        output(model, given)


def test_a_block_that_does_more_than_its_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's next version may put another part between; it must be refused, not computed wrongly."""
    model = encoder("dinov2", attention_probs_dropout_prob=0.0)
    kind = type(model.encoder.layer[0])
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: plain(self, *args, **kwargs) * 1.01)
    with pytest.raises(UnsupportedModel, match="do not add up"), fewer.compress(model, "tome", keep=0.5):
        pass


def test_gradients_flow_through_merged_tokens() -> None:
    model = encoder("dinov2")
    pixels = inputs("dinov2")["pixel_values"].requires_grad_()
    with torch.enable_grad(), fewer.compress(model, "tome", keep=0.5):
        model(pixel_values=pixels).last_hidden_state.square().sum().backward()
    assert pixels.grad is not None and bool((pixels.grad != 0).any())
