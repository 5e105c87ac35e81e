"""The package's call shape: what it gives, what its arguments do, and what is refused by name."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fewer
from fewer import BudgetError, FewerError
from fewer.adapters.llmlingua import PromptCompressor
from fewer.methods.prompt.llmlingua import LLMLingua
from fewer.methods.prompt.llmlingua2 import LLMLingua2
from fewer.methods.prompt.longllmlingua import LongLLMLingua
from fewer.score.keepers import Keeper
from tests.readers import bytes_reader, bytes_tokenizer

CONTEXT = ["The RED fox ran 12 miles.\n\nIt SLEPT then.", "A blue bird SANG in 1999, and sang."]
INSTRUCTION, QUESTION = "Answer briefly.", "Who slept?"

# Every argument of `compress_prompt` in llmlingua 0.2.2, in its order, read off the package.
PARAMETERS = [
    "context", "instruction", "question", "rate", "target_token", "iterative_size", "force_context_ids",
    "force_context_number", "use_sentence_level_filter", "use_context_level_filter", "use_token_level_filter",
    "keep_split", "keep_first_sentence", "keep_last_sentence", "keep_sentence_number", "high_priority_bonus",
    "context_budget", "token_budget_ratio", "condition_in_question", "reorder_context",
    "dynamic_context_compression_ratio", "condition_compare", "add_instruction", "rank_method", "concate_question",
    "context_segs", "context_segs_rate", "context_segs_compress", "target_context", "context_level_rate",
    "context_level_target_token", "return_word_label", "word_sep", "label_sep", "token_to_word", "force_tokens",
    "force_reserve_digit", "drop_consecutive", "chunk_end_tokens", "strict_preserve_uncompressed",
]  # fmt: skip


class Capitals(torch.nn.Module):
    """A classifier of bytes that keeps capitals."""

    config = SimpleNamespace(num_labels=2, model_type="bert", max_position_embeddings=512, pad_token_id=0)
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        names = bytes_tokenizer().convert_ids_to_tokens(list(range(256)))
        self.table = torch.tensor([[0.0, 3.0 if name.isascii() and name.isupper() else -3.0] for name in [*names, "a"]])

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture(scope="module")
def reader() -> Any:
    return bytes_reader()


@pytest.fixture(scope="module")
def one(reader: Any) -> PromptCompressor:
    return PromptCompressor(reader, tokenizer="characters")


@pytest.fixture(scope="module")
def two() -> PromptCompressor:
    return PromptCompressor(Keeper(Capitals(), bytes_tokenizer()), use_llmlingua2=True, tokenizer="characters")


def test_the_arguments_are_the_packages() -> None:
    assert list(inspect.signature(PromptCompressor.compress_prompt).parameters)[1:] == PARAMETERS
    mine = list(inspect.signature(PromptCompressor).parameters)
    assert mine[:6] == [
        "model_name",
        "device_map",
        "model_config",
        "open_api_config",
        "use_llmlingua2",
        "llmlingua2_config",
    ]


def test_llmlingua_is_the_method_with_the_prompt_around_it(one: PromptCompressor, reader: Any) -> None:
    said = one.compress_prompt(CONTEXT, INSTRUCTION, QUESTION, rate=0.7)
    before = len("\n\n".join([INSTRUCTION, *CONTEXT, QUESTION]))
    budget = int(0.7 * before) - len(f"{INSTRUCTION}\n\n\n\n{QUESTION}")
    done = fewer.compress_prompt(CONTEXT, LLMLingua(reader), tokens=budget, tokenizer="characters")
    assert said["compression"].text == done.text and len(done.text) <= budget
    assert said["compressed_prompt"] == f"{INSTRUCTION}\n\n{done.text}\n\n{QUESTION}"
    assert said["compressed_prompt_list"] == list(done.documents)
    after = len(said["compressed_prompt"])
    assert after <= 0.7 * before
    assert (said["origin_tokens"], said["compressed_tokens"]) == (before, after)
    assert (said["ratio"], said["rate"]) == (f"{before / after:.1f}x", f"{after / before * 100:.1f}%")
    assert "saving" not in said
    assert fewer.restore(said["compression"].text, said["compression"].patch()) == CONTEXT
    assert one.compress_prompt(CONTEXT, INSTRUCTION, QUESTION, rate=0.7, concate_question=False)[
        "compressed_prompt"
    ].startswith(INSTRUCTION)
    assert one(CONTEXT, target_token=30)["compressed_tokens"] <= 30
    assert one(CONTEXT[0], rate=1.0)["compressed_prompt"] == CONTEXT[0]


@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("question", ["", QUESTION])
@pytest.mark.parametrize("count", [len, lambda text: len(text) + 9 * ("Who" in text and "miles." not in text)])
def test_the_rate_is_a_ceiling_of_the_whole_prompt(reader: Any, instruction: str, question: str, count: Any) -> None:
    """Where two texts may have more tokens together than alone as well."""
    made = PromptCompressor(reader, tokenizer=count)
    context = [f"  \n{CONTEXT[0]}\n\n", CONTEXT[1] + "  "]
    for rate in (0.6, 0.8, 0.95, 1):
        said = made.compress_prompt(context, instruction, question, rate=rate)
        whole = "\n\n".join(part for part in (instruction, *context, question) if part)
        assert said["origin_tokens"] == count(whole) and count(said["compressed_prompt"]) == said["compressed_tokens"]
        assert said["compressed_tokens"] <= rate * count(whole)


def test_settings_reach_the_method(one: PromptCompressor, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("fewer.adapters.llmlingua.compress_prompt", lambda documents, method, **options: made.append(
        (method, options)) or fewer.compress_prompt(documents, method, **options))  # fmt: skip
    one.compress_prompt(CONTEXT, rate=0.8, iterative_size=50, use_context_level_filter=False)
    one.compress_prompt(CONTEXT, rate=0.8, context_budget="*1.5")
    one.compress_prompt(
        CONTEXT, question=QUESTION, rate=0.8, rank_method="longllmlingua", reorder_context="sort",
        dynamic_context_compression_ratio=0.3, condition_compare=True, condition_in_question="after_condition",
    )  # fmt: skip
    assert made[0][0] == LLMLingua(reader, window=50, coarse=float("inf"))
    assert made[1][0] == LLMLingua(reader, coarse=1.5)
    assert made[2][0] == LongLLMLingua(reader, reorder="sort", slope=0.3) and made[2][1]["question"] == QUESTION


def test_llmlingua2(two: PromptCompressor) -> None:
    said = two.compress_prompt(CONTEXT, rate=0.4)
    whole = len("\n\n".join(CONTEXT))
    assert all(word in said["compressed_prompt"] for word in ("RED", "SLEPT", "SANG"))
    assert said["origin_tokens"] == whole and said["compressed_tokens"] <= 0.4 * whole + 1
    assert two.compress_prompt_llmlingua2(CONTEXT, rate=0.4)["compressed_prompt"] == said["compressed_prompt"]
    forced = two.compress_prompt(CONTEXT, rate=0.5, force_tokens=["\n\n", "bird"], force_reserve_digit=True)
    assert all(word in forced["compressed_prompt"] for word in ("bird", "12", "1999"))
    assert {unit.rule for unit in forced["compression"].units if unit.rule} >= {"literal 'bird'", "digits"}
    assert "bird" not in said["compressed_prompt"] and "1999" not in said["compressed_prompt"]


@pytest.mark.parametrize("compat", [False, True])
def test_settings_of_llmlingua2(monkeypatch: pytest.MonkeyPatch, compat: bool) -> None:
    """Whatever the model, the method is asked for; compat itself wants a model that the package would take."""
    made: list[Any] = []
    monkeypatch.setattr("fewer.adapters.llmlingua.compress_prompt", lambda documents, method, **options: made.append(
        (method, options)) or fewer.compress_prompt(documents, "random", **options))  # fmt: skip
    model = Keeper(Capitals(), bytes_tokenizer())
    adapter = PromptCompressor(model, use_llmlingua2=True, tokenizer="characters", compat=compat)
    adapter.compress_prompt(CONTEXT, rate=0.5, token_to_word="first")  # noqa: S106
    adapter.compress_prompt(CONTEXT, rate=0.5, force_tokens=["fox"], force_reserve_digit=True, drop_consecutive=True)
    adapter.compress_prompt(CONTEXT, target_token=30, force_tokens=["fox"])
    first, second, third = made
    assert first[0] == LLMLingua2(model=model, pool="first", compat=compat) and first[1]["keep"] == 0.5
    settings = {"force_tokens": ("fox",), "force_reserve_digit": True, "drop_consecutive": True}
    assert second[0] == LLMLingua2(model=model, compat=compat, **settings) and second[1]["protect"] == []
    assert third[1]["tokens"] == 30 and third[1]["protect"] == ([] if compat else ["fox"])
    assert third[0] == LLMLingua2(model=model, compat=compat, **({"force_tokens": ("fox",)} if compat else {}))


def test_word_labels(two: PromptCompressor) -> None:
    said = two.compress_prompt("one RED two", rate=0.4, return_word_label=True, word_sep="|", label_sep=" ")
    assert said["compressed_prompt"] == "RED" and said["fn_labeled_original_prompt"] == "one 0|RED 1|two 0"


REFUSED: dict[str, Any] = {
    "force_context_ids": [0], "force_context_number": 1, "use_sentence_level_filter": True,
    "use_token_level_filter": False, "keep_first_sentence": 1, "keep_last_sentence": 1, "keep_sentence_number": 1,
    "high_priority_bonus": 5, "token_budget_ratio": 2.0, "add_instruction": True, "context_segs": [["a"]],
    "context_segs_rate": [[0.5]], "context_segs_compress": [[True]], "strict_preserve_uncompressed": False,
    "target_context": 1, "context_level_rate": 0.5, "context_level_target_token": 5,
}  # fmt: skip
OF_ONE = {
    "condition_in_question": "before", "condition_compare": True, "reorder_context": "sort", "rank_method": "bm25",
    "dynamic_context_compression_ratio": 0.3, "context_budget": "+5", "drop_consecutive": True,
    "token_to_word": "first", "chunk_end_tokens": ["."],
}  # fmt: skip
OF_TWO = {
    "instruction": "x", "question": "x", "iterative_size": 100, "context_budget": "*2", "rank_method": "longllmlingua",
    "condition_in_question": "after", "condition_compare": False, "reorder_context": "sort",
    "dynamic_context_compression_ratio": 0.3, "use_context_level_filter": True, "chunk_end_tokens": ["."],
    "token_to_word": "max",
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_argument_is_honoured_or_refused(one: PromptCompressor, two: PromptCompressor, name: str) -> None:
    for made, values in ((one, REFUSED | OF_ONE), (two, REFUSED | OF_TWO)):
        if name in values:
            with pytest.raises(FewerError, match=rf"compress_prompt\({name}="):
                made.compress_prompt(CONTEXT, **{name: values[name]})
    honoured = {
        "context", "instruction", "question", "rate", "target_token", "iterative_size", "use_context_level_filter",
        "keep_split", "concate_question", "return_word_label", "word_sep", "label_sep", "force_tokens",
        "force_reserve_digit",
    }  # fmt: skip
    assert name in honoured | set(REFUSED) | set(OF_ONE) | set(OF_TWO)


def test_keep_split(one: PromptCompressor) -> None:
    assert "\n\n" in one.compress_prompt(CONTEXT[0], rate=0.4, keep_split=True)["compressed_prompt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": 1.5}, "rate=1.5"),
        ({"target_token": 0}, "target_token=0"),
        ({"target_token": 3.5}, "target_token=3.5"),
        ({"rate": 0.2, "question": "long " * 30}, "instruction and question take"),
        ({"rank_method": "longllmlingua"}, "wants a question"),
        ({"force_tokens": ["a"] * 101}, "max_force_token is 100"),
        ({"target_token": 3, "force_tokens": ["SLEPT"]}, "allow at least 5"),
    ],
)
def test_bad_values(one: PromptCompressor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewerError, match=message):
        one.compress_prompt(CONTEXT, **options)


WRONG = {
    "context": [None, 5, [None]], "instruction": [None, "\ud800"], "question": [None, 5], "rate": ["0.5", None, True],
    "target_token": ["5", None, float("inf"), float("nan"), True, [5]], "force_tokens": [None, "ten", [5], 5],
    "context_budget": [100, None], "chunk_end_tokens": [None, 5, "."], "word_sep": [None], "label_sep": [None],
    "use_token_level_filter": [None, []], "strict_preserve_uncompressed": [None], "keep_first_sentence": [None],
    "iterative_size": [0, "x", None], "dynamic_context_compression_ratio": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_kind_is_refused_in_one_line(
    one: PromptCompressor, two: PromptCompressor, name: str
) -> None:
    for value in WRONG[name]:
        for made in (one, two):
            with pytest.raises(FewerError, match=rf"{name}=|{name} holds|the prompt is|document 0 is"):
                unchecked(made, **{"context": CONTEXT, name: value})


def unchecked(made: PromptCompressor, **options: Any) -> Any:
    """The call as users make it: in tests, annotations are checked before fewer can."""
    return inspect.unwrap(type(made).compress_prompt)(made, **options)


def test_no_unknown_argument_is_taken(one: PromptCompressor) -> None:
    with pytest.raises(TypeError, match="ratio"):
        one.compress_prompt(CONTEXT, ratio=0.5)


def test_the_constructor_refuses_what_it_cannot_do() -> None:
    for options, message in (
        ({"model_config": {"revision": "main"}}, "model_config="),
        ({"open_api_config": {"api_key": "x"}}, "open_api_config="),
        ({"llmlingua2_config": {"max_batch_size": 5}}, "only max_force_token is taken"),
        ({"llmlingua2_config": {"max_force_token": "many"}}, "max_force_token='many' must be a whole number"),
        ({"llmlingua2_config": {"max_force_token": True}}, "max_force_token=True must be a whole number"),
        ({"compat": True}, "goes with use_llmlingua2"),
        ({"device_map": "no-such-device"}, "device_map='no-such-device'"),
        ({"device_map": "meta", "model_name": (1, 2)}, "a loaded model stays where it is"),
    ):
        with pytest.raises(FewerError, match=message):
            PromptCompressor(**options, tokenizer="characters")
    made = PromptCompressor(use_llmlingua2=True, llmlingua2_config={"max_force_token": 1}, tokenizer="characters")
    with pytest.raises(FewerError, match="2 of them, and max_force_token is 1"):
        made.compress_prompt("abc", force_tokens=["a", "b"])


def test_empty(one: PromptCompressor) -> None:
    for context in ("", [], ["", " "]):
        with pytest.raises((FewerError, BudgetError)):
            one.compress_prompt(context)
