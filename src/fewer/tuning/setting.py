"""A setting: one way to shorten, as plain data that a file can hold.

text     what is done to the prompt before the model reads it      fewer.compress_prompt
held     what is asked of the model                                fewer.compress
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from fewer import fit as fits
from fewer.allocate.schedule import SHAPES, Schedule
from fewer.compress import compress
from fewer.methods import resolve, resolve_prompt, resolve_store
from fewer.prompts.front import compress_prompt
from fewer.prompts.protect import named
from fewer.types import Budget, BudgetError, FewerError

Levels = tuple[float | int | tuple[float | int, ...], ...]
WORDS = {
    "when": ("prefill", "decode", "both"), "schedule": SHAPES, "per": ("picture", "prompt"),
    "counted": ("last", "mean"),
    "positions": ("survivor", "centroid", "keep", "compact"), "only": ("visual",),
}  # fmt: skip
"""What options of `fewer.compress` may be, on one model or another."""


@dataclass(frozen=True)
class Text:
    """A prompt method, the share of tokens that may stay, and classes of things that stay, such as "numbers"."""

    method: str
    keep: float
    protect: tuple[str, ...] = ()

    def check(self) -> None:
        resolve_prompt(self.method)
        if Budget.parse(self.keep).fraction is None:
            raise BudgetError(f"keep={self.keep!r}: prompts take the share that stays, in (0, 1]")
        for name in self.protect:
            named(name)


@dataclass(frozen=True)
class Held:
    """What `fewer.compress` is asked; `method` a name, or the names of stages; the rest as there, None where left out.
    Where `keep` is left out everything stays, as with methods that only store in fewer bits.

    `fit` is the file of a method that has to be fitted to its model, `fit_digest` what is in it: another fit at that
    place is refused.
    """

    method: str | tuple[str, ...]
    keep: float | int | str | Levels = 1.0
    store: str | None = None
    when: str | None = None
    every: int | None = None
    fit: str | None = None
    fit_digest: str | None = None
    schedule: str | None = None
    per: str | None = None
    counted: str | None = None
    positions: str | None = None
    only: str | None = None

    def made(self) -> Any:
        """The method as an object, with its fit; or the stages."""
        if isinstance(self.method, tuple):
            return list(self.method)
        made: Any = resolve(self.method)
        if self.fit is not None:
            if not fits.wants(made):
                raise FewerError(f"fit={self.fit!r}: {self.method} is not fitted to anything; leave it out")
            fit = fits.load(self.fit, self.method)
            if self.fit_digest not in (None, fit.digest):
                raise FewerError(f"fit={self.fit!r} holds another fit than the setting was made with; tune again")
            made = replace(made, fit=fit)
        return made

    def options(self) -> dict[str, Any]:
        """What is passed on to `fewer.compress` beside the method and keep."""
        names = [f.name for f in fields(self) if f.name not in ("method", "keep", "fit", "fit_digest")]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Raise what `fewer.compress` would raise for names and budgets; the rest depends on the model."""
        if self.method == ():
            raise FewerError("method=[]: name at least one stage")
        for name in _several(self.method):
            resolve(name)
        levels = [_several(level) for level in _several(self.keep)]
        if not levels or not all(levels):
            raise BudgetError(f"keep={_plain(self.keep)!r}: a list of budgets has at least one in it")
        for one in chain(*levels):
            Schedule(one) if isinstance(one, str) and "flops" in one else Budget.parse(one)
        resolve_store(self.store)
        for name, words in WORDS.items():
            if (said := getattr(self, name)) is not None and said not in words:
                raise FewerError(f"{name}={said!r}: it is {' or '.join(map(repr, words))}")
        if self.every is not None and self.every < 1:
            raise FewerError(f"every={self.every!r}: a number of decoding steps, at least 1")


@dataclass(frozen=True)
class Setting:
    """What to do to the text, and what to the model; neither is nothing at all.

    >>> Setting(Text("llmlingua2", 0.5), Held("snapkv", 0.25, store="kivi-4bit"))
    llmlingua2 @ 0.5, then snapkv @ 0.25 in kivi-4bit
    >>> Setting()
    do not compress
    """

    text: Text | None = None
    held: Held | None = None

    @contextmanager
    def under(self, model: Any) -> Iterator[Any]:
        """The model with this setting's part for it, as `fewer.compress`; None is yielded where there is none."""
        if self.held is None:
            yield None
            return
        keep: Any = list(self.held.keep) if isinstance(self.held.keep, tuple) else self.held.keep
        with compress(model, self.held.made(), keep, **self.held.options()) as run:
            yield run

    def shorten(self, prompt: str | Sequence[str], question: str | None = None, tokenizer: Any = None) -> str:
        """A prompt, or documents, with this setting's part for texts; the text as it is where there is none."""
        if self.text is None:
            return prompt if isinstance(prompt, str) else "\n\n".join(prompt)
        rules = [named(name) for name in self.text.protect]
        return compress_prompt(
            prompt, self.text.method, keep=self.text.keep, question=question or None, protect=rules, tokenizer=tokenizer
        ).text

    def check(self) -> None:
        """Raise what is wrong with it, as far as that can be said without a model."""
        for part in (self.text, self.held):
            if part is not None:
                part.check()

    @cached_property
    def key(self) -> str:
        """The same for settings that are the same, in one line."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what was left out."""
        return {
            name: {f.name: _plain(value) for f in fields(part) if (value := getattr(part, f.name)) not in (None, ())}
            for name, part in (("text", self.text), ("held", self.held))
            if part is not None
        }

    @classmethod
    def from_dict(cls, said: Mapping[str, Any], where: str = "setting") -> "Setting":
        """Read back; whatever is not as `to_dict` writes it is a `FewerError` that starts with `where`."""
        if wrong := [name for name in said if name not in ("text", "held")]:
            raise FewerError(f"{where}: there is no part {wrong[0]!r}; the parts are text and held")
        parts = {name: _read(kind, said[name], f"{where}.{name}") for name, kind in _PARTS.items() if name in said}
        made = cls(**parts)
        try:
            made.check()
        except FewerError as why:
            raise type(why)(f"{where}: {why}") from None
        return made

    def beside(self, folder: Path) -> "Setting":
        """With a fit's file looked for beside the setting's own."""
        if self.held is None or self.held.fit is None or Path(self.held.fit).is_absolute():
            return self
        return replace(self, held=replace(self.held, fit=str(folder / self.held.fit)))

    def __str__(self) -> str:
        parts = []
        if self.text is not None:
            kept = f" with {', '.join(self.text.protect)}" if self.text.protect else ""
            parts.append(f"{self.text.method} @ {self.text.keep}{kept}")
        if self.held is not None:
            name = self.held.method if isinstance(self.held.method, str) else " + ".join(self.held.method)
            keep = self.held.keep
            if isinstance(keep, tuple):
                rows = [level if isinstance(level, tuple) else (level,) for level in keep]
                keep = f"{fmean(fmean(row) for row in rows):.4g} on average, in budgets of its own"
            said = "" if keep == 1.0 else f" @ {keep}"
            parts.append(f"{name}{said}" + (f" in {self.held.store}" if self.held.store else ""))
        return ", then ".join(parts) or "do not compress"

    __repr__ = __str__


_PARTS: dict[str, Any] = {"text": Text, "held": Held}
_KINDS: dict[str, tuple[type, ...]] = {
    "keep": (float, int, str, list), "every": (int,), "protect": (list,), "method": (str, list),
}  # fmt: skip


def _read(kind: Any, said: Any, where: str) -> Any:
    known = [f.name for f in fields(kind)]
    if not isinstance(said, Mapping):
        raise FewerError(f"{where} is {said!r}; it is a table of {', '.join(known)}")
    for name, value in said.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            raise FewerError(f"{where}.{name} means nothing{f'; did you mean {near[0]}?' if near else ''}")
        if isinstance(value, bool) or not isinstance(value, _KINDS.get(name, (str,))):
            raise FewerError(f"{where}.{name} = {value!r} cannot be read: it is {type(value).__name__}")
    if not all(isinstance(one, str) for one in said.get("protect", ())):
        raise FewerError(f"{where}.protect = {said['protect']!r} cannot be read: it lists names, such as numbers")
    if lacking := [name for name in ("method", *(["keep"] if kind is Text else [])) if name not in said]:
        raise FewerError(f"{where} lacks {lacking[0]}")
    return kind(**{name: _frozen(value) for name, value in said.items()})


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value
