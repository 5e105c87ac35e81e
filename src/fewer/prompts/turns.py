"""Chats as providers take them, OpenAI's and Anthropic's: where text stands in a message, and what a chat counts."""

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from fewer.prompts.counting import Counter
from fewer.prompts.front import read_text
from fewer.types import FewerError

OVERHEAD, ANSWER = 4, 3
"""Tokens that each message, and the opening of the answer, take beside their text where no chat template says it:
OpenAI's rule for its own models."""

Path = tuple[str | int, ...]

_FIELDS = {
    "text": "text", "input_text": "text", "output_text": "text", "thinking": "thinking", "refusal": "refusal",
}  # fmt: skip
"""Where parts of each type have their text."""


class Place(NamedTuple):
    """Where a text stands in a chat: the message's index, and the keys that lead to it in the message."""

    message: int
    path: Path


def read_turns(messages: Any, call: str) -> list[Mapping[str, Any]]:
    """The messages as mappings; objects that can say themselves as one, as OpenAI's answers do, may be among them."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise FewerError(
            f"{call}(): messages is {type(messages).__name__}; give a list of messages with role and content"
        )
    turns: list[Mapping[str, Any]] = []
    for index, message in enumerate(messages):
        said = _dumped(message)
        if not isinstance(said, Mapping) or not isinstance(said.get("role"), str):
            raise FewerError(f"{call}(): message {index} is no mapping with a role: {str(message)[:80]!r}")
        if not isinstance(said.get("content"), (str, list, type(None))):
            raise FewerError(
                f"{call}(): the content of message {index} is {type(said['content']).__name__}; it may be text, a list "
                f"of parts, or None"
            )
        for part, dumped in parts_of(said):
            if not isinstance(dumped, (str, Mapping)):
                raise FewerError(
                    f"{call}(): a part of message {index} is {type(part).__name__}, which cannot be counted; give "
                    f"mappings, or objects with model_dump()"
                )
        for text in [*_said(said), said.get("name")]:
            if isinstance(text, str):
                read_text(text, f"message {index}", call)
        turns.append(said)
    return turns


def texts_of(turn: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """The texts in a message's content, its tool results among them; images, tool calls and all else are not text."""
    yield from _texts(turn.get("content"), ("content",))


def _texts(content: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(content, str):
        yield path, content
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, Mapping):
            continue
        if part.get("type") in ("text", "input_text") and isinstance(part.get("text"), str):
            yield (*path, index, "text"), part["text"]
        elif part.get("type") == "tool_result":
            yield from _texts(part.get("content"), (*path, index, "content"))


def parts_of(turn: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each part of a message's content, those of tool results among them, as it is and as mapping or text."""
    yield from _parts(turn.get("content"))


def _parts(content: Any) -> Iterator[tuple[Any, Any]]:
    for part in (content,) if isinstance(content, str) else content if isinstance(content, (list, tuple)) else ():
        said = _dumped(part)
        yield part, said
        if isinstance(said, Mapping) and said.get("type") == "tool_result":
            yield from _parts(said.get("content"))


def _dumped(given: Any) -> Any:
    """What an object says of itself as plain data; providers' packages give such objects."""
    return given.model_dump() if hasattr(given, "model_dump") else given


def _said(turn: Mapping[str, Any]) -> Iterator[str]:
    """All text of a message's content that is counted, whether or not it may be shortened."""
    for _, part in parts_of(turn):
        text = part if isinstance(part, str) else part.get(_FIELDS.get(str(part.get("type")), ""))
        if isinstance(text, str):
            yield text


def at(message: Any, path: Path) -> Any:
    """What stands at a place in a message, None where there is no such place."""
    for key in path:
        try:
            message = message[key]
        except (KeyError, IndexError, TypeError):
            return None
    return message


def put(message: Any, path: Path, text: str) -> Any:
    """The message with another text at a place: copied along the way there, and the same object everywhere else."""
    if not path:
        return text
    fixed = isinstance(message, Mapping) and not isinstance(message, MutableMapping)
    new = dict(message) if fixed else copy(message)
    new[path[0]] = put(message[path[0]], path[1:], text)
    return new


@dataclass(frozen=True)
class ChatCounter:
    """Counts chats in a tokenizer: in its chat template, or with `OVERHEAD` for each message where `note` says why.

    Text, thinking and refusals among it, tool calls (as JSON) and names are counted; images and other data are not.
    """

    counter: Counter
    note: str = ""

    @classmethod
    def of(cls, counter: Counter, turns: Sequence[Mapping[str, Any]]) -> "ChatCounter":
        """The counter that works for this chat: templates refuse roles that they do not know."""
        stated = (
            f"{OVERHEAD} tokens are counted for each message beside its text, and {ANSWER} for the answer's opening"
        )
        if counter.chat is None:
            return cls(counter, f"{counter.name} has no chat template: {stated}")
        try:
            counter.chat([_plain(turn) for turn in turns], True)
        except Exception as why:  # noqa: BLE001  # templates are programs of their own, and raise what they like
            return cls(counter, f"the chat template of {counter.name} cannot be used ({why}): {stated}")
        return cls(counter)

    def count(self, turns: Sequence[Mapping[str, Any]], answer: bool = True) -> int:
        """Tokens of a chat, by default with the opening of the answer."""
        plain = [_plain(turn) for turn in turns]
        if not self.note:
            assert self.counter.chat is not None
            return self.counter.chat(plain, answer)
        return sum(self.counter.count(turn["content"]) + OVERHEAD for turn in plain) + ANSWER * answer


def _plain(turn: Mapping[str, Any]) -> dict[str, str]:
    """A message as role and text, which every template reads."""
    said = list(_said(turn))
    calls = [part for _, part in parts_of(turn) if isinstance(part, Mapping) and part.get("type") == "tool_use"]
    listed = turn.get("tool_calls")
    for call in [*(listed if isinstance(listed, (list, tuple)) else ()), turn.get("function_call"), *calls]:
        said += [json.dumps(_dumped(call), default=str)] if call else []
    said += [turn["name"]] if isinstance(turn.get("name"), str) else []
    return {"role": turn["role"], "content": "\n".join(said)}
