"""Decoding steps that leave visual entries unread: the same as hiding them, and nothing leaves the cache."""

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from fewer.adapters import vlm_read
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.vlm.dycoke import DyCoke
from fewer.ragged import Ragged
from fewer.signals.aside import Aside, Dynamic
from fewer.types import FewerError, UnsupportedModel
from tests import vlms

CLOSE, NEW, KEEP = 1e-4, 6, 0.7
MARKS = [vlms.IMAGE, vlms.VIDEO, vlms.START, vlms.END, vlms.GLOBAL]
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "suppress_tokens": MARKS}
ALWAYS, SOMETIMES, CODE = DyCoke(alike=1.0), DyCoke(layer=2, alike=0.95), DyCoke(alike=0.955, official=True)


def sharp(family: str) -> vlms.Case:
    """A model whose attention is no blur."""
    case = vlms.FAMILIES[family]()
    for name, weight in case.model.named_parameters():
        if "q_proj.weight" in name and "vision" not in name and "visual" not in name:
            weight.data *= 40
    return case


@pytest.fixture(scope="module", params=vlms.WITH_VIDEO)
def case(request: pytest.FixtureRequest) -> vlms.Case:
    return sharp(request.param)


@torch.no_grad()
def answered(case: vlms.Case, method: Any, inputs: dict[str, Tensor], keep: Any = KEEP, **more: Any) -> tuple[Any, Any]:
    """A greedy answer with the logits of every step, and the run."""
    with fewer.compress(case.model, method, keep=keep) as run:
        out = case.model.generate(**inputs, **GREEDY | more, output_logits=True, return_dict_in_generate=True)
    return out, run


class Hidden:
    """The model, whole, over the prompt and the answer so far, where masks hide what is dropped and what is set aside:
    the rule in plain Python. `more` entries are read beside those that should be, to plant a fault."""

    def __init__(self, case: vlms.Case, inputs: dict[str, Tensor], run: Any, method: DyCoke, more: int = 0) -> None:
        self.model, self.inputs, self.method, self.more = copy.deepcopy(case.model), inputs, method, more
        self.model.set_attn_implementation("eager")
        self.blocks = self.model.base_model.language_model.layers
        b, self.q = inputs["input_ids"].shape
        left = [
            [one.columns[one.alive], one.separators[: one.left - len(one.alive)]] for row in run.pictures for one in row
        ]
        self.left = [torch.cat(one).sort().values for one in left]  # rows of one video each
        self.dropped = torch.zeros(b, self.q, dtype=torch.bool)
        for row, pictures in enumerate(run.pictures):
            for one in pictures:
                self.dropped[row, one.columns] = self.dropped[row, one.separators] = True
            self.dropped[row, self.left[row]] = False
        self.unread: list[list[set[int]]] = []  # of every step and row
        self.before: list[Tensor | None] = [None] * b
        self.weights = torch.zeros(0)

    def logits(self, ids: Tensor) -> Tensor:
        """Of the last token; every token after the prompt was a step of its own."""
        if ids.shape[1] > self.q:
            self.unread.append([set() for _ in ids])
            self._forward(ids)
            self.unread[-1] = [self._choose(row) for row in range(len(ids))]
        return self._forward(ids)[:, -1]

    def _choose(self, row: int) -> set[int]:
        a = self.weights[row, :, -1, self.left[row]].mean(0)
        before, self.before[row] = self.before[row], a
        if before is not None and float(a @ before / a.norm() / before.norm()) >= self.method.alike:
            return set() if self.method.official else self.unread[-2][row]
        count = math.ceil(self.method.read * len(a) - 1e-9) + self.more
        order = sorted(range(len(a)), key=lambda i: (-float(a[i]), i))
        return {int(self.left[row][i]) for i in order[count:]}

    def _forward(self, ids: Tensor) -> Tensor:
        b, n = ids.shape
        more = torch.ones(b, n - self.q, dtype=torch.long)
        mask = torch.cat([self.inputs["attention_mask"], more], 1)
        told = self.inputs | {"input_ids": ids, "attention_mask": mask}
        if "mm_token_type_ids" in self.inputs:
            told["mm_token_type_ids"] = torch.cat([self.inputs["mm_token_type_ids"], 0 * more], 1)
        gone = torch.cat([self.dropped, more < 1], 1) | (mask == 0)
        hidden = ~torch.ones(n, n, dtype=torch.bool).tril() | gone[:, None]
        deep = hidden.clone()
        for step, rows in enumerate(self.unread):
            for row, columns in enumerate(rows):
                deep[row, self.q + step, sorted(columns)] = True

        def before(index: int) -> Any:
            own = (deep if index >= self.method.layer else hidden) & ~torch.eye(n, dtype=torch.bool)
            full = torch.zeros(b, 1, n, n).masked_fill(own[:, None], torch.finfo(torch.float32).min)
            return lambda module, args, kwargs: (args, kwargs | {"attention_mask": full})

        def look(module: Any, args: Any, output: Any) -> None:
            self.weights = output[1]

        hooks = [one.register_forward_pre_hook(before(i), with_kwargs=True) for i, one in enumerate(self.blocks)]
        hooks.append(self.blocks[self.method.layer - 1].self_attn.register_forward_hook(look))
        try:
            found: Tensor = self.model(**told).logits
        finally:
            for hook in hooks:
                hook.remove()
        return found


def differences(
    case: vlms.Case, method: DyCoke, inputs: dict[str, Tensor], more: int = 0, keep: Any = KEEP
) -> tuple[list[float], Hidden]:
    """At every step, by how much the logits are not those of the masked model."""
    out, run = answered(case, method, inputs, keep)
    masked, q = Hidden(case, inputs, run, method, more), inputs["input_ids"].shape[1]
    with torch.no_grad():
        found = [masked.logits(out.sequences[:, : q + step]) for step in range(NEW)]
    return [float((a - b).abs().max()) for a, b in zip(out.logits, found, strict=True)], masked


@pytest.mark.parametrize("method", [ALWAYS, SOMETIMES, CODE], ids=["always", "sometimes", "code"])
def test_leaving_unread_is_hiding(case: vlms.Case, method: DyCoke) -> None:
    worst, masked = differences(case, method, case.inputs([1, 1], frames=4))  # the first row is padded
    assert max(worst) < CLOSE, worst
    assert any(masked.unread[0])
    if method is ALWAYS:  # an entry that was set aside came back
        pairs = pairwise(masked.unread)
        assert any(a - b for one, two in pairs for a, b in zip(one, two, strict=True))


def test_a_cache_that_was_not_packed(case: vlms.Case) -> None:
    """A video with fewer tokens than are asked for is not cut, and stays as the host has it."""
    worst, masked = differences(case, ALWAYS, case.inputs([1, 1], frames=4), keep=64)
    assert max(worst) < CLOSE and not masked.dropped.any() and any(masked.unread[0])


def test_eager_hosts_and_half_precision() -> None:
    case = sharp("qwen2_vl")
    case.model.set_attn_implementation("eager")
    inputs = case.inputs([1, 1], frames=4)
    assert max(differences(case, ALWAYS, inputs)[0]) < CLOSE
    case.model.bfloat16()
    out, run = answered(case, ALWAYS, inputs)
    assert run.report.cache.read < 1 and bool(torch.stack(out.logits).isfinite().all())


def test_choices_stay_while_steps_are_alike() -> None:
    """Both kinds of steps are met above: those that keep the choice (in the code: read everything), and others."""
    case = sharp("qwen2_vl")
    inputs = case.inputs([1, 1], frames=4)
    for method in (SOMETIMES, CODE):
        unread = [step[row] for row in range(2) for step in differences(case, method, inputs)[1].unread]
        assert len(set(map(frozenset, unread))) > 2
        if method.official:
            assert set() in unread
        else:
            assert any(a == b for a, b in pairwise(unread))


def test_one_entry_more_is_noticed(case: vlms.Case) -> None:
    """The comparison's own test."""
    first, *others = differences(case, ALWAYS, case.inputs([1], frames=4), more=1)[0]
    assert first < CLOSE < max(others)


def test_it_matters_at_all(case: vlms.Case) -> None:
    inputs = case.inputs([1], frames=4)
    (less, _), (all_of_them, _) = (answered(case, DyCoke(read=read), inputs) for read in (0.3, 1.0))
    assert torch.equal(less.logits[0], all_of_them.logits[0]), "the prompt is read as ever"
    assert float((less.logits[1] - all_of_them.logits[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_reading_all_is_without_it_bit_for_bit(case: vlms.Case) -> None:
    inputs = case.inputs([1, 1], frames=4)
    plain = case.model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    whole, run = answered(case, "dycoke", inputs, keep=1.0)
    assert run.report.cache.read == 1.0
    one, run = answered(case, DyCoke(read=0.9999), inputs)  # rounded up, that is all
    two, _ = answered(case, DyCoke(read=1.0), inputs)
    assert run.report.cache.read == 1.0
    for a, b in ((plain, whole), (one, two)):
        assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    again = case.model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert all(torch.equal(x, y) for x, y in zip(plain.logits, again.logits, strict=True)), "leaving restores the model"


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(side: str) -> None:
    case = sharp("llava_onevision")
    both = case.inputs([1, 1], frames=4, side=side)
    steps = torch.tensor([[5], [6]]), torch.tensor([[7], [8]]), torch.tensor([[9], [3]])

    def run(inputs: dict[str, Tensor], rows: list[int]) -> list[Tensor]:
        found, mask = [], inputs["attention_mask"]
        with fewer.compress(case.model, ALWAYS, keep=KEEP):
            cache = case.model(**inputs).past_key_values
            for step in steps:
                mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
                columns = mask.cumsum(1) if side == "right" else torch.ones_like(mask).cumsum(1)
                places = columns[:, -1:] - 1  # the prompt's columns, as this model counts them
                told = {"input_ids": step[rows], "attention_mask": mask, "position_ids": places}
                found.append(case.model(**told, past_key_values=cache).logits)
        assert cache.report.read < 1
        return found

    together = run(both, [0, 1])
    for row in (0, 1):
        there = both["attention_mask"][row].bool()
        videos = both["pixel_values_videos"][row : row + 1]
        alone = {name: both[name][row : row + 1, there] for name in ("input_ids", "attention_mask")}
        for got, want in zip(together, run(alone | {"pixel_values_videos": videos}, [row]), strict=True):
            torch.testing.assert_close(got[row], want[0], atol=CLOSE, rtol=0)


# --- what is read, and what the report says ---


def test_what_is_set_aside_by_hand() -> None:
    need, first = Dynamic(layer=3, read=0.5, alike=0.9), torch.tensor([0.1, 0.4, 0.2, 0.1, 0.0])
    none = torch.zeros(5, dtype=torch.bool)
    aside = need.aside(first, None, none)
    assert aside.tolist() == [False, False, False, True, True]  # three of five; of two alike the earlier
    assert need.aside(first + 0.01, first, aside) is aside  # cosine 0.999
    other = torch.tensor([0.0, 0.1, 0.05, 0.3, 0.4])  # cosine 0.33: those that were set aside come back
    assert need.aside(other, first, aside).tolist() == [True, False, True, False, False]
    code = Dynamic(layer=3, read=0.5, alike=0.9, official=True)
    assert not code.aside(first + 0.01, first, aside).any()


def test_reads_are_saved_and_bytes_are_not() -> None:
    """26 of 36 visual tokens stay; in three steps layers 3 and 4 read 8 of them, and all text."""
    case = sharp("llava_onevision")
    inputs = case.inputs([1], frames=4)
    text = int((inputs["input_ids"] != vlms.VIDEO).sum())
    (_, less), (_, whole) = (answered(case, DyCoke(read=r), inputs, max_new_tokens=4) for r in (0.3, 1.0))
    left = len(less.kept[0][0])
    assert (left, math.ceil(0.3 * left)) == (26, 8)
    held = [text + left + step for step in (1, 2, 3)]
    read = [text + math.ceil(0.3 * left) + step for step in (1, 2, 3)]
    report = less.report.cache
    assert [layer.read for layer in report.layers] == [1.0] * 3 + [pytest.approx(sum(read) / sum(held))] * 2
    assert whole.report.cache.read == 1.0 and "decoding steps read" in str(report)
    assert [layer.kept for layer in report.layers] == [layer.kept for layer in whole.report.cache.layers]
    more = report.bytes_kept - whole.report.cache.bytes_kept
    assert more == report.metadata - whole.report.cache.metadata == 4 * left + int(inputs["input_ids"].shape[1]), (
        "the latest attention, and a mark for each token of the prompt"
    )


def test_what_is_set_aside_is_not_touched() -> None:
    """Two rows, two heads; position 2 of row 0 and positions 0 and 3 of row 1 are set aside."""
    table = torch.tensor([[False, False, True, False], [True, False, False, True]])
    positions = torch.tensor([0, 2, 1, 2, 5, 0, 3, 4, 3, 6])
    keys = torch.arange(10.0).view(10, 1)
    left = vlm_read._without(Ragged(keys, keys + 100, positions, ((2, 3), (3, 2))), table)
    assert isinstance(left, Ragged)
    assert left.counts == ((1, 2), (1, 1))
    assert left.keys.flatten().tolist() == [0, 2, 4, 7, 9] and left.positions.tolist() == [0, 1, 5, 4, 6]


@torch.no_grad()
def test_a_turn_reads_everything_and_is_followed_by_a_new_choice() -> None:
    case = sharp("llava_onevision")
    inputs = case.inputs([1], frames=4)
    size = inputs["input_ids"].shape[1]
    turns = torch.tensor([[5]]), torch.tensor([[7, 8, 9]]), torch.tensor([[4]])

    def steps(method: Any, *turns: Tensor) -> tuple[list[Tensor], Any]:
        with fewer.compress(case.model, method, keep=KEEP):
            cache, found, n = case.model(**inputs).past_key_values, [], size
            for ids in turns:
                n += ids.shape[1]
                mask = torch.ones(1, n, dtype=torch.long)
                found.append(case.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
        return found, cache

    found, cache = steps(DyCoke(alike=0.0), *turns)  # which would keep the choice for ever
    (state,) = (one for one in cache.shared.members[0].observers.values() if isinstance(one, Aside))
    assert state.table() is not None
    anew, _ = steps(ALWAYS, *turns)
    assert all(torch.equal(a, b) for a, b in zip(found, anew, strict=True))
    more = steps(DyCoke(alike=0.0), *turns, torch.tensor([[11]]))[0][-1]
    assert not torch.equal(more, steps(ALWAYS, *turns, torch.tensor([[11]]))[0][-1])
    with fewer.compress(case.model, ALWAYS, keep=KEEP) as run:  # a second video, in a cache that has one
        cache = case.model(**inputs).past_key_values
        mask = torch.ones(1, 2 * size, dtype=torch.long)
        case.model(**inputs | {"attention_mask": mask}, past_key_values=cache)
        mask = torch.ones(1, 2 * size + 1, dtype=torch.long)
        case.model(input_ids=turns[0], attention_mask=mask, past_key_values=cache)
        left = 2 * len(run.kept[0][0])
    text = cache.report.layers[4].kept[0][0] - left
    assert cache.report.layers[4].read == pytest.approx((text + math.ceil(0.3 * left)) / (text + left))


@pytest.mark.parametrize("more", ["fastv", "knorm", SnapKV(window=4)], ids=["fastv", "knorm", "snapkv"])
def test_with_another_stage(more: Any) -> None:
    """Later layers, or heads, hold fewer of the entries: they leave unread what is set aside of theirs."""
    case = sharp("qwen2_vl")
    inputs = case.inputs([1, 1], frames=4)
    out, run = answered(case, [DyCoke(layer=2, alike=1.0), more], inputs, keep=[0.8, 0.4])
    assert all(bool(one.isfinite().all()) for one in out.logits)
    assert run.report.cache.read < 1
    plain, _ = answered(case, [DyCoke(read=1.0), more], inputs, keep=[0.8, 0.4])
    assert torch.equal(out.logits[0], plain.logits[0]) and not torch.equal(out.logits[1], plain.logits[1])


# --- beams, copies, files, and what is refused ---


def _stepped(case: vlms.Case, cache: Any, size: int, *steps: list[int]) -> list[Tensor]:
    found = []
    for n, ids in enumerate(steps, cache.get_seq_length() - size + 1):
        told = {"input_ids": torch.tensor(ids).unsqueeze(1), "attention_mask": torch.ones(len(ids), size + n).long()}
        found.append(case.model(**told, past_key_values=cache).logits)
    return found


@torch.no_grad()
def test_beams() -> None:
    """A beam takes the choice of its past along."""
    case = sharp("llava_onevision")
    one = case.inputs([1], frames=4)
    two = {name: torch.cat([part, part]) for name, part in one.items()}
    size, method = one["input_ids"].shape[1], DyCoke(alike=0.0)  # the first step's choice stays
    with fewer.compress(case.model, method, keep=KEEP):
        cache, same = (case.model(**two).past_key_values for _ in range(2))
        first = _stepped(case, cache, size, [5, 60])
        cache.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(first[0][1], _stepped(case, same, size, [60, 60])[0][0])
        got, want = (_stepped(case, each, size, [7, 7])[0] for each in (cache, same))
        torch.testing.assert_close(got, want, atol=CLOSE, rtol=0)
        other = case.model(**two).past_key_values
        _stepped(case, other, size, [60, 5])  # the choice of the other beam is another
        choices = [next(iter(each.shared.members[0].observers.values())).aside for each in (cache, other)]
        assert torch.equal(choices[0][0], choices[1][0]) and not torch.equal(choices[1][0], choices[1][1])
    rows, _ = answered(case, ALWAYS, two, num_beams=3)
    alone, _ = answered(case, ALWAYS, one, num_beams=3)
    assert torch.equal(rows.sequences[0], alone.sequences[0]) and torch.equal(rows.sequences[1], alone.sequences[0])


@torch.no_grad()
def test_copies_and_files_go_on_as_they_would(tmp_path: Path) -> None:
    case = sharp("llava_onevision")
    inputs = case.inputs([1], frames=4)
    size, path = inputs["input_ids"].shape[1], tmp_path / "cache.safetensors"
    for before in ([], [[5]]):  # right after the prompt, and between steps
        with fewer.compress(case.model, DyCoke(alike=0.0), keep=KEEP):
            cache = case.model(**inputs).past_key_values
            _stepped(case, cache, size, *before)
            cache.save(path)
            other = copy.deepcopy(cache)
            want = _stepped(case, cache, size, [6], [7])
            inside = [other, fewer.Cache.load(case.model, path)]
            for one in inside:
                got = _stepped(case, one, size, [6], [7])
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with fewer.Cache.load(case.model, path) as loaded:
            got = _stepped(case, loaded, size, [6], [7])
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and loaded.report.read < 1
        for one in inside:
            one.release()


@torch.no_grad()
def test_a_cache_that_is_cropped_chooses_anew() -> None:
    case = sharp("llava_onevision")
    inputs = case.inputs([1], frames=4)
    size = inputs["input_ids"].shape[1]
    with fewer.compress(case.model, DyCoke(alike=0.0), keep=KEEP):
        cache, fresh = (case.model(**inputs).past_key_values for _ in range(2))
        _stepped(case, cache, size, [5], [50])
        cache.crop(-2)
        got, want = (_stepped(case, one, size, [6])[0] for one in (cache, fresh))
    torch.testing.assert_close(got, want, atol=CLOSE, rtol=0)


@torch.no_grad()
def test_refusals() -> None:
    case = vlms.qwen2_vl()
    inputs = case.inputs([1], frames=4)
    with (
        pytest.raises(UnsupportedModel, match=r"store=\.\.\. packs them.*DyCoke\(read=1\.0\)"),
        fewer.compress(case.model, "dycoke", keep=0.5, store=KIVI(group=8, residual=16)),
    ):
        case.model(**inputs)
    with (
        pytest.raises(FewerError, match="for layers from 5 on, and this language model has 5"),
        fewer.compress(case.model, DyCoke(layer=5), keep=0.5),
    ):
        case.model(**inputs)
    with fewer.compress(case.model, "dycoke", keep=0.5):
        fork = case.model(**inputs).past_key_values.fork()
        with pytest.raises(FewerError, match="stack: a cache that knows which of its tokens are visual"):
            fewer.Cache.stack([fork, fork])
        with pytest.raises(FewerError, match="which entries of this cache are visual is not known"):
            case.model(input_ids=torch.tensor([[5]]), past_key_values=fork)
