"""The shared prefill of a comparison gives what compressing in line gives; rows come out whole and in range."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import fewer
from fewer.adapters.hf_surgery import packed
from fewer.fit import wants
from fewer.methods import METHODS, of_family
from fewer.methods.kv.kivi import KIVI
from fewer.tuning.asking import until
from fewer.tuning.texts import watching
from fewer_eval.case import Case
from fewer_eval.runner import _common, compare
from fewer_eval.tasks import Example, Task
from tests.front.tiny_files import save
from tests.tiny import prompt, tiny

TALK = Task(
    "talk",
    "finds a letter",
    6,
    lambda tokenizer, tokens, n, seed: [Example("abcdefg " * 20 + str(i), "Which?", ("a",)) for i in range(n)],
)
TEXT = Task(
    "text",
    "goes on",
    30,
    lambda tokenizer, tokens, n, seed: [Example("abcdefg " * 20, "", ("hijk lmno pqrs tuvw xyz",))] * n,
    kind="text",
)


SHARED = [
    name for name, cls in of_family("kv").items() if name != "full" and not wants(cls) and not Case.of(name, 0.6).alone
]
"""Without those that want a fit of the model; they differ from their relatives in what they read only."""


@pytest.mark.parametrize("name", [*SHARED, "snapkv+kivi-4bit"])
def test_under_a_shared_prefill_is_compressing_in_line(name: str) -> None:
    model, ids, more = tiny("llama", num_hidden_layers=4), prompt(150), prompt(7, seed=1)
    watch = watching([METHODS[shared]() for shared in SHARED])
    case = Case.of(name, 0.6)
    if case.store is not None or "bits" in vars(case.method):  # heads of 16 features
        case = replace(case, store=case.store and KIVI(group=16, residual=32))
        case = replace(case, method=replace(case.method, group=16)) if hasattr(case.method, "group") else case
    with torch.inference_mode(), fewer.Cache(model, watch, 1.0) as full:
        model(ids, past_key_values=full)
        shared = full.under(case.method, case.keep, store=case.store)
        got = model(more, past_key_values=shared).logits
        with fewer.Cache(model, case.method, case.keep, store=case.store) as own:
            model(ids, past_key_values=own)
            own.freeze()
            want = model(more, past_key_values=own).logits
    assert shared.report.bytes_full == own.report.bytes_full
    for a, b in zip(shared.layers, own.layers, strict=True):
        assert torch.equal(packed(a).positions, packed(b).positions)
        assert [part.nbytes for part in a.parts] == [part.nbytes for part in b.parts]
    assert torch.allclose(got, want, atol=1e-4)


def test_rows_of_a_comparison(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save(tmp_path))
    model = tiny("llama", vocab_size=257, eos_token_id=256, pad_token_id=256)
    ticks: list[str] = []
    done = compare(
        model, tokenizer, [TALK, TEXT], ["random", "knorm"], [0.5, 64], tokens=100, samples=4, tick=ticks.append
    )
    assert ticks == ["talk 1", "talk 2", "talk 3", "talk 4", "text 1", "text 2"]
    assert {(row.task, row.n) for row in done.rows} == {("talk", 4), ("text", 2)}  # of running text a third as many
    cases = {("full", 1.0), *((m, k) for m in ("random", "uniform", "knorm") for k in (0.5, 64))}
    assert {(r.method, r.keep_asked, r.question) for r in done.rows if r.task == "talk"} == {
        (m, k, q) for m, k in cases for q in ("seen", "unseen")
    }
    for row in done.rows:
        if row.method == "full":
            assert (row.loyalty, row.keep_got, row.bytes_kept) == (1.0, 1.0, row.bytes_full)
            if row.task == "text":
                assert (row.kl_bits, row.bpb_diff, row.quality) == (0.0, 0.0, 1.0)
        else:
            assert row.bytes_kept < row.bytes_full
    assert len(done.kept["knorm @ 64"]) == 3


def test_caches_answer_in_batches_of_any_size_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save(tmp_path))
    model = tiny("llama", vocab_size=257, eos_token_id=256, pad_token_id=256, num_hidden_layers=4)

    def rows() -> list[dict[str, object]]:
        done = compare(
            model, tokenizer, [TALK], ["knorm", "snapkv", "tidaldecode"], [0.5, 0.25], tokens=100, samples=2,
            timed=False,
        )  # fmt: skip
        return [row.to_dict() | {"prefill_s": 0, "compress_s": 0} for row in done.rows]

    at_once = rows()
    batches: list[int] = []
    stack = fewer.Cache.stack
    monkeypatch.setattr(fewer.Cache, "stack", lambda caches: (batches.append(len(caches)), stack(caches))[1])
    entry = 2 * 16 * 4 * 2 * 4  # bytes of a token: keys and values, 16 features of four bytes, two heads, four layers
    monkeypatch.setattr("fewer_eval.runner.SIDE_BY_SIDE", 400 * entry)
    assert rows() == at_once
    assert max(batches) > 1 and len(batches) > 4


def test_what_was_said_after_the_end_was_never_said() -> None:
    assert until([5, 6, 9, 7], {9}) == [5, 6, 9]
    assert until([5, 6], {9}) == [5, 6]
    assert _common([5, 6, 7], [5, 6, 8, 9]) == 0.5
    assert _common([5], [5, 6]) == 0.5


@pytest.mark.slow
def test_the_default_model_finds_the_needle_and_random_eviction_loses_it(default_model_path: Path) -> None:
    """The real model, a real text: the full cache answers, and a quarter kept at random does not."""
    from fewer.models import load
    from fewer_eval.tasks import TASKS

    model, tokenizer = load("default")
    done = compare(
        model, tokenizer, [TASKS["needle-single"]], ["random", "snapkv"], [0.25], tokens=600, samples=2,
        questions=("unseen",),
    )  # fmt: skip
    quality = {row.method: row.quality for row in done.rows}
    assert quality["full"] == 1.0
    assert quality["random"] == 0.0
    for row in done.rows:
        if row.method != "full":
            assert row.bytes_kept <= (0.25 + 0.02) * row.bytes_full
