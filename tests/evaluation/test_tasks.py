"""The task generators: the same arguments give the same examples, of the asked length, with what is promised."""

import json
import random
import re
import uuid
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fewer.models import ModelUnavailable
from fewer.types import FewerError
from fewer_eval.tasks import TASKS, Example, Task, from_jsonl
from fewer_eval.text import prose

ASKING = [name for name, task in TASKS.items() if task.kind == "answer"]


@pytest.fixture(scope="session")
def tokenizer(default_model_path: Path) -> PreTrainedTokenizerBase:
    try:
        prose()
    except ModelUnavailable as error:
        pytest.skip(f"the text that tasks are made of cannot be had: {error}")
    return AutoTokenizer.from_pretrained(default_model_path)


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [500, 1000, 5000])
def test_contexts_have_the_asked_length(tokenizer: PreTrainedTokenizerBase, name: str, tokens: int) -> None:
    for seed in (0, 1):
        examples = TASKS[name].make(tokenizer, tokens, 3, seed)
        assert len(examples) == 3
        for example in examples:
            assert 0.97 * tokens <= count(tokenizer, example.context) <= tokens


@pytest.mark.parametrize("name", TASKS)
def test_the_same_arguments_give_the_same_examples(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    first = TASKS[name].make(tokenizer, 800, 3, 7)
    random.seed(123)
    TASKS["needle-multikey"].make(tokenizer, 600, 2, 7)
    state = random.getstate()
    assert TASKS[name].make(tokenizer, 800, 3, 7) == first
    assert random.getstate() == state, "the global random state is the caller's"
    assert TASKS[name].make(tokenizer, 800, 3, 8) != first
    assert len({example.context for example in first}) == 3


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_get_one_and_wrong_ones_nothing(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    task = TASKS[name]
    mine, other = task.make(tokenizer, 800, 2, 0)
    assert task.grade("well, " + " and ".join(mine.answers).upper() + ".", mine) == 1
    assert task.grade(" and ".join(other.answers), mine) == 0
    assert task.grade("I do not know.", mine) == 0
    assert task.grade("", mine) == 0


@pytest.mark.parametrize("name", ASKING)
def test_neither_question_nor_nearly_right_numbers_give_the_answer_away(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    for example in TASKS[name].make(tokenizer, 800, 3, 0):
        assert TASKS[name].grade(example.question, example) == 0
        for answer in example.answers:
            assert answer in example.context
            assert TASKS[name].grade(answer[:-1], example) == 0


def test_grade_is_the_share_of_answers_found() -> None:
    example = Example("", "", ("Apple", "plum", "pear", "fig"))
    assert TASKS["common-words"].grade("1. APPLE 2. Plum 3. grape", example) == 0.5


@pytest.mark.parametrize("name", ["needle-single", "needle-multikey", "needle-multivalue"])
def test_the_asked_needle_lies_at_its_depth(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    examples = TASKS[name].make(tokenizer, 2000, 5, 0)
    assert [example.details["depth"] for example in examples] == [0, 0.25, 0.5, 0.75, 1]
    for example in examples:
        text = example.context.partition("afterwards.\n\n")[2]
        needle = f"The special magic number for {example.details['key']} is: {example.answers[0]}."
        assert text.count(needle) == 1
        before, _, after = text.partition(needle)
        placed = len(before) / (len(before) + len(after))
        assert placed == pytest.approx(example.details["depth"], abs=0.06)
        if before and after:
            assert before.rstrip().endswith((".", "!", "?", '"', "'", ")")), "a needle splits no sentence"
    assert examples[0].context.partition("afterwards.\n\n")[2].startswith("The special magic number")
    assert examples[-1].context.endswith(".")


def test_a_single_sample_has_its_needle_in_the_middle(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = TASKS["needle-single"].make(tokenizer, 800, 1, 0)
    assert example.details["depth"] == 0.5


def test_needles_of_other_keys_have_other_numbers(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in TASKS["needle-multikey"].make(tokenizer, 1000, 4, 0):
        planted = re.findall(r"The special magic number for ([\w-]+) is: (\d{7})\.", example.context)
        assert len(planted) == len(dict(planted)) == len({number for _, number in planted}) == 4
        assert example.answers == (dict(planted)[example.details["key"]],)
        assert str(example.details["key"]) in example.question


def test_all_values_of_the_key_are_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in TASKS["needle-multivalue"].make(tokenizer, 1000, 4, 0):
        planted = re.findall(rf"magic number for {example.details['key']} is: (\d{{7}})\.", example.context)
        assert sorted(planted) == sorted(example.answers)
        assert len(set(planted)) == 4


def test_the_chain_of_variables_leads_to_the_value(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in TASKS["variable-tracking"].make(tokenizer, 1000, 4, 0):
        assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.context)
        assert [name for name, _ in assigned] == list(example.answers), "in the order of the text"
        assert [value for _, value in assigned] == [example.details["value"], *example.answers[:-1]]
        assert str(example.details["value"]) in example.question


@pytest.mark.parametrize("tokens", [1000, 5000])
def test_the_common_words_are_the_most_common(tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    (example,) = TASKS["common-words"].make(tokenizer, tokens, 1, 0)
    words = Counter(re.findall(r"\d+\. (\w+)", example.context))
    ranked = words.most_common()
    assert {word for word, _ in ranked[:10]} == set(example.answers)
    assert {times for _, times in ranked[:10]} == {example.details["often"]}
    assert {times for _, times in ranked[10:]} == {example.details["seldom"]}
    assert not [word for word in words for answer in example.answers if answer in word and answer != word]


def uuid_pairs(example: Example) -> dict[str, str]:
    pairs = json.loads(example.context[example.context.index("{") :])
    assert isinstance(pairs, dict)
    assert len(pairs) == example.details["pairs"]
    return pairs


@pytest.mark.parametrize("name", ["uuid-single", "uuid-chain"])
def test_seed_0_starts_with_the_published_pair(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    draws = random.Random(0)
    published = tuple(str(uuid.UUID(int=draws.getrandbits(128))) for _ in range(2))
    assert published == ("e3e70682-c209-4cac-629f-6fbed82c07cd", "f728b4fa-4248-5e3a-0a5d-2f346baa9455")
    for tokens in (500, 1000):
        first, second = TASKS[name].make(tokenizer, tokens, 2, 0)
        assert next(iter(uuid_pairs(first).items())) == published
        assert not set(uuid_pairs(first)) & set(uuid_pairs(second))


def test_a_single_uuid_lies_at_its_depth(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = TASKS["uuid-single"].make(tokenizer, 1000, 3, 0)
    for example, at in zip(examples, ("first", "middle", "last"), strict=True):
        pairs = uuid_pairs(example)
        index = {"first": 0, "middle": (len(pairs) - 1) // 2, "last": len(pairs) - 1}[at]
        key = list(pairs)[index]
        assert key in example.question
        assert example.answers == (pairs[key],)


def test_a_chain_of_uuids_takes_three_steps(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in TASKS["uuid-chain"].make(tokenizer, 1000, 5, 0):
        pairs = uuid_pairs(example)
        found = re.search(r'key "([0-9a-f-]{36})"', example.question)
        assert found is not None
        at = found[1]
        for _ in range(3):
            at = pairs[at]
        assert example.answers == (at,)
        assert at not in pairs


def test_the_text_truly_goes_on(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in TASKS["text"].make(tokenizer, 1000, 5, 0):
        assert example.context + example.answers[0] in prose()
        assert count(tokenizer, example.answers[0]) == 128
        assert example.question == ""


def test_the_real_text_is_clean_prose(tokenizer: PreTrainedTokenizerBase) -> None:
    text = prose()
    assert len(text) > 190_000
    assert text.startswith("Shakespeare, William (1564--1616), English poet")
    assert text.endswith("and whereof none can participate but greatest and wisest men.")
    assert "Few poems have been more variously designated than Comus." in text
    assert not set("*_#|\\\r\t{}") & set(text)
    assert "  " not in text
    assert "[^" not in text


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_cannot_be_is_refused(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for tokens in (0, -5, *([20] if name != "text" else [])):
        with pytest.raises(FewerError, match=f"{name} does not fit into {tokens} tokens|{name} cannot fill {tokens}"):
            TASKS[name].make(tokenizer, tokens, 2, 0)
    for none in (0, -1):
        with pytest.raises(FewerError, match=f"{name} was asked for {none} examples"):
            TASKS[name].make(tokenizer, 800, none, 0)


@pytest.mark.parametrize("name", ["needle-single", "text"])
def test_more_text_than_there_is_is_refused(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    with pytest.raises(FewerError, match=f"{name} cannot fill 60000 tokens"):
        TASKS[name].make(tokenizer, 60_000, 1, 0)


def test_names_are_those_of_the_tasks() -> None:
    assert list(TASKS) == [task.name for task in TASKS.values()]
    assert [name for name, task in TASKS.items() if task.kind == "text"] == ["text"]
    assert all(task.max_new_tokens > 0 and task.description for task in TASKS.values())


GOOD = {"context": "Ann has a cat.", "question": "What has Ann?", "answer": "a cat"}


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def made(task: Task, n: int) -> list[Example]:
    return task.make(None, 1000, n, 0)  # type: ignore[arg-type]  # the examples of a file need no tokenizer


def test_a_users_file_is_taken_as_it_is(tmp_path: Path) -> None:
    several = {**GOOD, "answer": ["one", "two"], "note": "ignored", "context": "line\u2028separator"}
    task = from_jsonl(written(tmp_path / "mine.jsonl", GOOD, "", several))
    assert (task.name, task.kind) == ("mine", "answer")
    first, second = made(task, 2)
    assert first == Example("Ann has a cat.", "What has Ann?", ("a cat",), {"line": 1})
    assert second == Example("line\u2028separator", "What has Ann?", ("one", "two"), {"line": 3})
    assert made(task, 1) == [first]
    assert made(task, 10) == [first, second]
    assert task.grade("It is A CAT!", first) == 1
    assert task.grade("a dog", first) == 0
    with pytest.raises(FewerError, match=r"mine\.jsonl was asked for 0 examples"):
        made(task, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops}", "is not JSON: .* at column 2"),
        ("[1, 2]", "holds a list, not a JSON object"),
        ("null", "holds null, not a JSON object"),
        ({"context": "x"}, "lacks question"),
        ({**GOOD, "context": 3}, "context is a number, not a string"),
        ({**GOOD, "question": None}, "question is null, not a string"),
        ({**GOOD, "context": "  "}, "context is empty"),
        ({**GOOD, "answer": True}, "answer is true or false, not a string or a list of strings"),
        ({**GOOD, "answer": ["a", 1]}, "answer is a list, not a string or a list of strings"),
        ({**GOOD, "answer": {"a": 1}}, "answer is an object, not a string or a list of strings"),
        ({**GOOD, "answer": ""}, "answer is empty"),
        ({**GOOD, "answer": []}, "answer is empty"),
        ({**GOOD, "answer": ["a", " "]}, "answer is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = written(tmp_path / "mine.jsonl", GOOD, line)
    with pytest.raises(FewerError, match=rf"mine\.jsonl, line 2:? {message}"):
        from_jsonl(path)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewerError, match=r"absent\.jsonl cannot be read: No such file"):
        from_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(FewerError, match="cannot be read: "):
        from_jsonl(tmp_path)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"context": "\xff"}')
    with pytest.raises(FewerError, match=r"bytes\.jsonl is not UTF-8 text \(byte 13\)"):
        from_jsonl(tmp_path / "bytes.jsonl")
    with pytest.raises(FewerError, match=r"empty\.jsonl has no lines"):
        from_jsonl(written(tmp_path / "empty.jsonl", "", "  ", ""))
