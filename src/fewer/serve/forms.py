"""What the routes take: every field with its type; fields that are none of these are refused."""

import json
from typing import Annotated, Any

import regex
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewer import protect
from fewer.errors import FewerError, UnknownName
from fewer.prompts.compression import restore
from fewer.prompts.front import compress_prompt
from fewer.serve.lanes import check
from fewer.serve.settings import Settings

ENCODINGS = ("default", "minilm", "characters")


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)


class Protect(_Form):
    """What stays: one of a string, a regular expression, a class, a range."""

    literal: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=1_000)] | None = None
    class_: str | None = Field(default=None, alias="class")
    range: Annotated[list[int], Field(min_length=2, max_length=3)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Protect":
        if len(self.model_fields_set) != 1 or None in self.model_dump(exclude_unset=True).values():
            raise ValueError("give one of literal, regex, class, range")
        return self

    def rule(self) -> Any:
        """What `compress_prompt` takes for it."""
        if self.range is not None:
            return tuple(self.range)
        if self.class_ is not None:
            return protect.named(self.class_)
        if self.literal is not None:
            return self.literal
        try:
            made = protect.pattern(regex.compile(self.regex or ""))
        except regex.error as why:
            raise FewerError(f"protect: {self.regex!r} cannot be read as a regular expression: {why}") from None

        def find(document: str) -> Any:
            check()  # each pattern has two seconds for each document, and there may be many
            return made.find(document)

        return protect.Rule(made.name, find, made.given)


class Compress(_Form):
    """A text, or documents, to shorten; the fields are those of `fewer.compress_prompt`."""

    text: str | None = None
    documents: Annotated[list[str], Field(min_length=1, max_length=10_000)] | None = None
    method: str | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    question: str | None = None
    instruction: str | None = None
    protect: Annotated[list[Protect], Field(max_length=100)] = []
    tokenizer: str | None = None

    @model_validator(mode="after")
    def _one(self) -> "Compress":
        if (self.text is None) == (self.documents is None):
            raise ValueError("give text, or documents, and not both")
        if self.keep is not None and self.tokens is not None:
            raise ValueError("give keep, or tokens, and not both")
        return self

    def answer(self, settings: Settings) -> bytes:
        """The compression, its patch, and the prompt with instruction and question, as JSON."""
        done = compress_prompt(
            self.text if self.text is not None else self.documents or [],
            self.method or settings.method,
            keep=self.keep,
            tokens=self.tokens,
            question=self.question,
            instruction=self.instruction,
            protect=[rule.rule() for rule in self.protect],
            tokenizer=known(self.tokenizer, settings),
        )
        return json.dumps({**done.to_dict(), "prompt": done.prompt, "patch": done.patch()}).encode()


class Restore(_Form):
    """A compressed text and its patch, as `/v1/compress` gave them."""

    text: str
    patch: str

    def answer(self) -> bytes:
        """The source: `text` if a text was given, `documents` if documents were."""
        source = restore(self.text, self.patch)
        return json.dumps({"text": source} if isinstance(source, str) else {"documents": source}).encode()


def known(tokenizer: str | None, settings: Settings) -> str | None:
    """A tokenizer that clients may name. Not any folder or hub name: a request is no reason to load a stranger's."""
    if tokenizer is None or tokenizer == settings.tokenizer:
        return settings.tokenizer
    able = [*ENCODINGS, *([settings.tokenizer] if settings.tokenizer else [])]
    try:
        import tiktoken

        able += tiktoken.list_encoding_names()
    except ImportError:
        pass
    if tokenizer not in able:
        raise UnknownName(f"tokenizer={tokenizer!r} is none that this server has; known are {', '.join(able)}")
    return tokenizer
