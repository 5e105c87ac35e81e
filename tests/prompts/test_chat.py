"""Chats: what is shortened, what never is, the budget over all of it, and the way back."""

import copy
import json
import re
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewer
from fewer import BudgetError, FewerError, compress_messages, restore_messages
from fewer.prompts.counting import Counter
from fewer.prompts.front import KEPT
from fewer.prompts.source import Ranking
from fewer.prompts.turns import ANSWER, OVERHEAD, ChatCounter, Place, read_turns
from tests.front.tiny_files import save

LONG = "The report says that the pump ran for 40 hours and that nobody looked at it. " * 6
QUESTION = "How long did the pump run?"

OPENAI: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a careful engineer. " * 5},
    {"role": "user", "content": f"First turn. {LONG}", "name": "ada"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}]},
    {"role": "tool", "tool_call_id": "c1", "content": LONG},
    {"role": "assistant", "content": LONG},
    {"role": "user", "content": [
        {"type": "text", "text": LONG},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": QUESTION},
    ]},
]  # fmt: skip

ANTHROPIC: list[dict[str, Any]] = [
    {"role": "user", "content": f"{LONG}\n\n{LONG}\n\n{QUESTION}"},
    {"role": "assistant", "content": [
        {"type": "text", "text": LONG}, {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": LONG}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t1", "content": [
            {"type": "text", "text": LONG}, {"type": "image", "source": {"type": "base64", "data": "AAAA"}}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": LONG, "is_error": False},
    ]},
]  # fmt: skip


def short(messages: list[Any], **options: Any) -> Any:
    options.setdefault("keep", 0.5)
    return compress_messages(messages, options.pop("method", "truncation"), tokenizer="characters", **options)


def test_openai_by_hand() -> None:
    done = short(OPENAI, method="random")
    assert list(done.compressions) == [Place(1, ("content",)), Place(3, ("content",)), Place(5, ("content", 0, "text"))]
    for i in (0, 2, 4):
        assert done.messages[i] is OPENAI[i]
    first, tool, last = (done.messages[i] for i in (1, 3, 5))
    assert first["name"] == "ada" and tool["tool_call_id"] == "c1" and list(last) == ["role", "content"]
    assert last["content"][1:] == OPENAI[5]["content"][1:] and last["content"][1] is OPENAI[5]["content"][1]
    assert done.question == QUESTION
    texts = [f"First turn. {LONG}", LONG, LONG]
    left = [first["content"], tool["content"], last["content"][0]["text"]]
    assert sum(map(len, left)) <= 0.5 * sum(map(len, texts)) + 1 and all(text.strip() for text in left)
    assert sum(map(len, left)) > 0.4 * sum(map(len, texts))


def test_anthropic_by_hand() -> None:
    done = short(ANTHROPIC, method="random")
    assert list(done.compressions) == [
        Place(0, ("content",)), Place(2, ("content", 0, "content", 0, "text")), Place(2, ("content", 1, "content")),
    ]  # fmt: skip
    assert done.messages[1] is ANTHROPIC[1] and done.messages[0]["content"].endswith(QUESTION)
    result, plain = done.messages[2]["content"]
    assert result["tool_use_id"] == "t1" and result["content"][1] is ANTHROPIC[2]["content"][0]["content"][1]
    assert {key: value for key, value in plain.items() if key != "content"} == {
        "type": "tool_result", "tool_use_id": "t2", "is_error": False,
    }  # fmt: skip
    for place, part in done.compressions.items():
        assert part.verify(part.source.documents[0]) and part.tokens_after < part.tokens_before
        assert part.text in json.dumps(done.messages[place.message], ensure_ascii=False).replace("\\n", "\n")


@pytest.mark.parametrize("chat", [OPENAI, ANTHROPIC])
def test_nothing_given_is_changed_and_all_comes_back(chat: list[Any]) -> None:
    before = copy.deepcopy(chat)
    done = short(chat, method="random", keep=0.3)
    assert chat == before and done.messages != chat and done.verify(chat)
    assert restore_messages(done.messages, done.patch()) == chat
    longer = [*done.messages, {"role": "assistant", "content": "40 hours"}]
    assert restore_messages(longer, done.patch()) == [*chat, longer[-1]]
    changed = copy.deepcopy(chat)
    changed[0]["content"] = "other"
    assert not done.verify(changed)


def test_the_cached_prefix_is_the_very_same_objects() -> None:
    for frozen in range(len(OPENAI) + 1):
        done = short(OPENAI, frozen=frozen)
        assert all(new is old for new, old in zip(done.messages[:frozen], OPENAI[:frozen], strict=True))
        assert all(place.message >= frozen for place in done.compressions)
    assert done.messages == OPENAI and done.tokens_after == done.tokens_before
    assert "nothing in these messages may be shortened" in done.notes


def test_system_only_where_asked() -> None:
    done = short(OPENAI, method="random", system=True)
    assert Place(0, ("content",)) in done.compressions and done.messages[0]["content"] != OPENAI[0]["content"]


def test_what_counts_as_the_question() -> None:
    def found(text: Any, **options: Any) -> tuple[str, list[Any]]:
        done = short([{"role": "user", "content": text}], **options)
        return done.question, done.messages

    assert found(QUESTION) == (QUESTION, [{"role": "user", "content": QUESTION}])
    question, (message,) = found(f"{LONG}\n\n{QUESTION}")
    assert (
        question == QUESTION and message["content"].endswith(f"\n\n{QUESTION}") and len(message["content"]) < len(LONG)
    )
    question, (message,) = found(f"Sum this up:\n\n{LONG}")
    assert question == "Sum this up:" and message["content"].startswith("Sum this up:")
    question, (message,) = found(f"Use this.\n\n{LONG}\n\n{QUESTION}", keep=0.2)
    assert question == f"Use this.\n\n{QUESTION}" and message["content"].startswith("Use this.")
    assert message["content"].endswith(QUESTION) and len(message["content"]) < 0.5 * len(LONG)
    for blank in (" ", "\n", ""):
        assert found(f"{QUESTION} {LONG}"[:390], question=blank)[0] == f"{QUESTION} {LONG}"[:390]
    middle = f"{LONG}\n\n{QUESTION} It matters. {LONG}"
    question, (message,) = found(middle, question=QUESTION, keep=0.2)
    assert question == QUESTION and QUESTION in message["content"] and len(message["content"]) < 0.5 * len(middle)


def test_tokens_are_those_of_the_whole_chat() -> None:
    chat = [{"role": "user", "content": QUESTION}, {"role": "tool", "content": LONG}]
    done = short(chat, keep=None, tokens=300)
    counted = [sum(len(m["content"]) for m in m_) + OVERHEAD * 2 + ANSWER for m_ in (chat, done.messages)]
    assert [done.tokens_before, done.tokens_after] == counted and 290 < done.tokens_after <= 300
    assert "characters has no chat template: 4 tokens are counted for each message" in done.notes[0]
    assert short(chat, keep=None, tokens=10_000).messages[1] is chat[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(save(tmp_path_factory.mktemp("model")))
    made.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    return made


def test_the_chat_template_is_counted(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": QUESTION}, {"role": "tool", "content": LONG}]
    for tokens in (150, 200, 333):
        done = compress_messages(chat, "truncation", tokens=tokens, tokenizer=tokenizer)
        for messages, said in ((chat, done.tokens_before), (done.messages, done.tokens_after)):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert said == len(tokenizer(text, add_special_tokens=False).input_ids)
        assert tokens - 10 < done.tokens_after <= tokens and done.notes == ()


@pytest.mark.slow
def test_the_default_models_template(default_model_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    chat = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Wait."},
        {"role": "tool", "content": LONG},
    ]
    done = compress_messages(chat, "truncation", tokens=100)
    for messages, said in ((chat, done.tokens_before), (done.messages, done.tokens_after)):
        assert said == len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    assert 90 < done.tokens_after <= 100 and done.notes == ()


def test_a_template_that_refuses_is_said(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    done = compress_messages(OPENAI, "truncation", keep=0.5, tokenizer=tokenizer)
    assert "no tools here" in done.notes[0] and f"{OVERHEAD} tokens are counted for each message" in done.notes[0]


def test_one_budget_goes_where_the_worth_is() -> None:
    class Wanted:
        """Words with a digit first."""

        def rank(self, source: Any, budget: Any) -> Any:
            worth = [float(any(c.isdigit() for c in source.of(unit))) for unit in source.words]
            return Ranking(source.words, np.array(worth))

    full, bare = "11 22 33 44 55 66 77 88", "aa bb cc dd ee ff gg hh"
    chat = [{"role": "tool", "content": bare}, {"role": "tool", "content": full}]
    done = short(chat, method=Wanted(), keep=0.55)
    assert done.messages[1] is chat[1] and done.messages[0] == {"role": "tool", "content": "aa"}  # never empty
    assert list(done.compressions) == [Place(0, ("content",))]


def test_reordering_methods_do_not_reorder_messages() -> None:
    class Backwards:
        def rank(self, source: Any, budget: Any) -> Any:
            return Ranking(source.words, -np.arange(len(source.words), dtype=float), order=(1, 0))

    chat = [{"role": "tool", "content": "one two three"}, {"role": "tool", "content": "four five six"}]
    assert [m["content"] for m in short(chat, method=Backwards(), keep=0.8).messages] == ["one two three", "four six"]


def test_protect() -> None:
    done = short(OPENAI, method="random", keep=0.4, protect=["40 hours"])
    for i, left in ((1, "40 hours"), (3, "40 hours")):
        assert done.messages[i]["content"].count(left) == 6
    assert {u.rule for p in done.compressions.values() for u in p.units if u.rule} == {"literal '40 hours'"}


@pytest.mark.parametrize("rules", [re.compile(r"\d+ hours"), fewer.protect.NUMBERS, "40 hours", None])
def test_protect_takes_one_rule_or_none(rules: Any) -> None:
    done = short(OPENAI, method="random", keep=0.4, protect=rules)
    assert (done.messages[1]["content"].count("40 hours") == 6) is (rules is not None)


@pytest.mark.parametrize("keep", [0.5, 1])
def test_rules_are_read_whatever_the_budget(keep: float) -> None:
    chat = [{"role": "user", "content": QUESTION}, {"role": "tool", "content": LONG}]
    assert "protect='no such' is nowhere in the text" in short(chat, keep=keep, protect=["no such"]).notes
    with pytest.raises(FewerError, match="protect=5 is neither"):
        short(chat, keep=keep, protect=5)


def test_something_that_can_be_read_stays_of_each_text() -> None:
    chat = [{"role": "tool", "content": "aa bb cc dd ee"}, {"role": "tool", "content": "alpha beta\n\ngamma delta"}]
    assert [message["content"] for message in short(chat, protect=["\n\n"]).messages] == ["aa bb cc dd", "alpha \n\n"]


class Block:
    """A part as providers' packages give it."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def model_dump(self) -> dict[str, Any]:
        return self.said


PARTS = [
    {"type": "text", "text": LONG}, {"type": "output_text", "text": LONG}, {"type": "refusal", "refusal": LONG},
    {"type": "thinking", "thinking": LONG, "signature": "s"}, {"type": "tool_use", "id": "t", "input": {"x": LONG}},
    {"type": "tool_result", "content": [{"type": "text", "text": LONG}]},
]  # fmt: skip


@pytest.mark.parametrize("part", [*PARTS, *(Block(**part) for part in PARTS), LONG,
                                  {"type": "tool_result", "content": [Block(type="text", text=LONG)]}])  # fmt: skip
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_text_of_every_kind_of_part_counts(part: Any, role: str) -> None:
    chat = [{"role": role, "content": [part]}, {"role": "tool", "content": LONG}, {"role": "user", "content": "Go."}]
    done = short(chat, keep=None, tokens=800)
    assert done.tokens_before >= 2 * len(LONG) and done.tokens_after <= 800
    assert done.messages[0] is chat[0] or isinstance(part, dict)
    said = "parts of messages [0] are objects, not mappings, and stay as they are"
    held = not isinstance(part, str) and (isinstance(part, Block) or isinstance(part.get("content", [0])[0], Block))
    assert (said in done.notes) is (role == "user" and held)
    assert restore_messages(done.messages, done.patch()) == chat and done.verify(chat)


def test_tool_calls_count_in_a_tuple_and_as_objects() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "x" * 3000}}
    turn, tool = {"role": "assistant", "content": None}, {"role": "tool", "content": LONG}
    many = ([call], (call,), [Block(**call)])
    counts = [short([{**turn, "tool_calls": calls}, tool]).tokens_before for calls in many]
    assert counts[0] == counts[1] == counts[2] > 3000


@pytest.mark.parametrize("part", [5, None, object()])
def test_a_part_that_cannot_be_counted_is_refused(part: Any) -> None:
    for content in ([part], [{"type": "tool_result", "content": [part]}]):
        with pytest.raises(FewerError, match=r"compress_messages\(\): a part of message 0 is .*cannot be counted"):
            short([{"role": "user", "content": content}])


def test_messages_that_cannot_be_written_to_become_plain_mappings() -> None:
    chat = [{"role": "user", "content": QUESTION}, {"role": "tool", "content": LONG}]
    done = short([MappingProxyType(message) for message in chat])
    assert done.messages == short(chat).messages and type(done.messages[1]) is dict
    assert restore_messages(done.messages, done.patch()) == chat


def test_what_full_is_asked_is_said() -> None:
    done = short(OPENAI, method="full", keep=0.4)
    assert done.messages == OPENAI and KEPT in done.notes
    assert KEPT not in short(OPENAI, method="full", keep=1.0).notes


@pytest.mark.parametrize("calls", [5, "x", {"a": 1}])
def test_tool_calls_of_any_shape_are_no_fault_of_ours(calls: Any) -> None:
    chat = [{"role": "assistant", "content": "Yes.", "tool_calls": calls}, {"role": "tool", "content": LONG}]
    assert short(chat).tokens_after < short(chat).tokens_before


@pytest.mark.parametrize(
    "turn", [{"role": "assistant", "content": "\ud800"}, {"role": "user", "content": "x", "name": "\ud800"}]
)
def test_half_a_surrogate_pair_anywhere_is_no_chat(turn: dict[str, Any]) -> None:
    with pytest.raises(FewerError, match=r"compress_messages\(\): message 0 holds half of a surrogate pair"):
        short([turn, {"role": "tool", "content": LONG}])


def test_objects_that_say_themselves_stay() -> None:
    class Answer:
        def model_dump(self) -> dict[str, Any]:
            return {"role": "assistant", "content": "Yes.", "tool_calls": None}

    answer = Answer()
    done = short([{"role": "tool", "content": LONG}, answer])
    assert done.messages[1] is answer and done.tokens_after < done.tokens_before


@pytest.mark.parametrize(
    "chat", ["hello", {"role": "user", "content": "x"}, [1], [{"content": "x"}], [{"role": "user", "content": 3}]]
)
def test_what_is_no_chat(chat: Any) -> None:
    with pytest.raises(FewerError, match=r"compress_messages\(\): "):
        read_turns(chat, "compress_messages")


def test_bad_arguments() -> None:
    chat = [{"role": "user", "content": QUESTION}, {"role": "tool", "content": LONG}]
    for options, message in (
        ({"frozen": 3}, "frozen=3; there are 2 messages"),
        ({"frozen": -1}, "frozen=-1"),
        ({"frozen": True}, "frozen=True"),
        ({"tokens": 5, "keep": None}, "5 tokens may stay"),
        ({"tokens": 5}, "give one of them"),
        ({"keep": None}, "has no threshold of its own"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"protect": [(0, 3)]}, "ranges belong to no document"),
        ({"protect": [LONG[:-1]], "keep": 0.1}, "of what may be shortened, what is protected takes"),
        ({"question": "\ud800"}, "half of a surrogate pair"),
        ({"question": "\ud800"}, "compress_messages(): question"),
    ):
        with pytest.raises(FewerError) as caught:
            short(chat, **options)
        assert message in str(caught.value)
    with pytest.raises(BudgetError, match="nothing in it may be shortened"):
        short(chat[:1], keep=None, tokens=5)


def test_a_changed_message_or_patch_is_refused() -> None:
    done = short(OPENAI)
    patch = done.patch()
    for messages, text, said in (
        (done.messages, patch.replace("pump", "bulb"), "changed since it was made"),
        (done.messages, patch[:-5], "none that fewer made"),
        (done.messages, "[]", "none that fewer made"),
        (done.messages[:3], patch, "there is no text at"),
        ([*done.messages[:3], {**done.messages[3], "content": "x"}, *done.messages[4:]], patch, "another text"),
    ):
        with pytest.raises(FewerError, match=said):
            restore_messages(messages, text)


def test_plain_counting_by_hand() -> None:
    turns = read_turns(
        [{"role": "user", "content": [{"type": "text", "text": "abc"}, {"type": "image"}], "name": "al"}], ""
    )
    chat = ChatCounter.of(Counter("characters", len), turns)
    assert chat.count(turns) == len("abc\nal") + 4 + 3 and chat.count(turns, answer=False) == len("abc\nal") + 4


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
parts = st.one_of(
    texts.map(lambda t: {"type": "text", "text": t}),
    st.just({"type": "image", "source": {}}),
    texts.map(lambda t: {"type": "tool_result", "tool_use_id": "x", "content": t}),
    st.lists(texts, max_size=2).map(
        lambda ts: {"type": "tool_result", "content": [{"type": "text", "text": t} for t in ts]}
    ),
)
chats = st.lists(
    st.fixed_dictionaries({
        "role": st.sampled_from(["user", "assistant", "tool", "system"]),
        "content": st.one_of(st.none(), texts, st.lists(parts, max_size=3)),
    }), max_size=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(chats, st.sampled_from([0.3, 0.6, 0.9]), st.integers(0, 2))
def test_any_chat(chat: list[Any], keep: float, frozen: int) -> None:
    before, frozen = copy.deepcopy(chat), min(frozen, len(chat))
    try:
        done = short(chat, method="random", keep=keep, frozen=frozen)
    except BudgetError:
        return  # every text keeps a word, which may be more than was asked for
    assert chat == before and done.tokens_after <= done.tokens_before
    assert restore_messages(done.messages, done.patch()) == before and done.verify(before)
    for i, (new, old) in enumerate(zip(done.messages, chat, strict=True)):
        if i < frozen or old["role"] in ("assistant", "system"):
            assert new is old
    json.dumps(done.to_dict())
