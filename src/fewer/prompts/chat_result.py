"""What shortening a chat gives: the messages to send, what became of each text, and the way back."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewer.prompts.compression import Compression, restore
from fewer.prompts.turns import Path, Place, at, put
from fewer.types import FewerError


@dataclass(frozen=True, eq=False)
class ChatCompression:
    """A shortened chat.

    `messages` is what to send: those that did not change are the very objects that were given. Tokens are
    `tokenizer`'s, of the whole chat with what its template adds. `compressions` says for each text that may be
    shortened what became of it, one by one, with spans, `verify`, `patch` and `locate` of its own; their `limit` is the
    one for all of them together.
    """

    messages: list[Any]
    tokens_before: int
    tokens_after: int
    method: str
    tokenizer: str
    question: str
    compressions: Mapping[Place, Compression]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Tokens after, of those before."""
        return self.tokens_after / max(self.tokens_before, 1)

    def patch(self) -> str:
        """What `restore_messages` needs beside the messages to give those back that were given."""
        parts = [[*place, done.patch()] for place, done in self.compressions.items()]
        body = {"format": "fewer-chat-patch", "version": 1, "parts": parts}
        return json.dumps({**body, "sha256": _sha(body)})

    def verify(self, messages: Sequence[Any]) -> bool:
        """Whether this follows from these messages and the spans, and nothing else in them was touched."""
        changed = _listed(messages, "verify")
        for (index, path), done in self.compressions.items():
            if index >= len(changed) or not isinstance(text := at(changed[index], path), str) or not done.verify(text):
                return False
            changed[index] = put(changed[index], path, done.text)
        return changed == self.messages

    def to_dict(self) -> dict[str, Any]:
        """Everything but the source, as plain data; messages that are objects stay as they are."""
        return {
            "messages": self.messages, "method": self.method, "tokenizer": self.tokenizer,
            "tokens_before": self.tokens_before, "tokens_after": self.tokens_after,
            "parts": [
                {"message": index, "path": list(path), **done.to_dict()}
                for (index, path), done in self.compressions.items()
            ],
            "seconds": self.seconds, "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        changed = len({place.message for place in self.compressions})
        return "\n".join(
            [
                f"{self.method}: {self.tokens_before:,} tokens to {self.tokens_after:,} ({self.share:.1%}), {changed} "
                f"of {len(self.messages)} messages shortened; counted by {self.tokenizer}; {self.seconds:.2f} s",
                *self.notes,
            ]
        )


def restore_messages(messages: Sequence[Any], patch: str) -> list[Any]:
    """The messages that `compress_messages` was given, from those that it gave, in a new list; later ones may follow.

    Raises:
        FewerError: the patch is none of fewer's, or it or a message is not what it was.
    """
    try:
        read = json.loads(patch)
        digest = read.pop("sha256")
        known = read["format"] == "fewer-chat-patch" and read["version"] == 1
        parts: list[tuple[int, Path, str]] = [(index, tuple(path), text) for index, path, text in read["parts"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FewerError("restore_messages(): the patch is none that fewer made, or it was cut short") from None
    if not known or _sha(read) != digest:
        raise FewerError("restore_messages(): the patch was changed since it was made; nothing is restored from it")
    new = _listed(messages, "restore_messages")
    for index, path, text in parts:
        here = at(new[index], path) if index < len(new) else None
        if not isinstance(here, str):
            raise FewerError(
                f"restore_messages(): there is no text at {list(path)} of message {index}; give all of them"
            )
        whole = restore(here, text)
        assert isinstance(whole, str)
        new[index] = put(new[index], path, whole)
    return new


def _listed(messages: Any, call: str) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise FewerError(f"{call}(): messages is {type(messages).__name__}; give a list of messages")
    return list(messages)


def _sha(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
