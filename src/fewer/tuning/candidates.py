"""What a search tries: settings for an aim, from the methods that are known or those that were asked for."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from fewer import fit
from fewer.fit import wants
from fewer.methods import METHODS, family_of, of_family, resolve, resolve_prompt, resolve_store
from fewer.tuning.setting import Held, Setting, Text
from fewer.types import FewerError, UnknownName

AIMS = ("memory", "latency", "tokens")
KEEPS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)
TEXT_KEEPS = (0.85, 0.7, 0.5, 0.35, 0.25)
VISUAL_KEEPS = (0.75, 0.5, 0.35, 0.25, 0.125, 0.0625)

_CACHES = ("kvzip", "keydiff", "lagkv", "adakv", "tova", "snapkv")
_STORES = ("kivi-8bit", "kivi-4bit", "kivi-2bit")
_FAST = ("fastkv", "keydiff", "adakv", "tova")
_TEXTS = ("llmlingua2", "bm25", "statistical")
_VISUAL = ("divprune", "cdpruner", "vispruner", "visionzip", "visual-pooling", "fastv", "pyramiddrop", "divprune>fastv")
DEFAULTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("texts", "memory"): (*_CACHES, *(f"{name}+kivi-4bit" for name in _CACHES), *_STORES, "llmlingua2"),
    ("texts", "latency"): (*_FAST, *_TEXTS),
    ("texts", "tokens"): _TEXTS,
    ("pictures", "memory"): (*_VISUAL, *(f"{name}+kivi-4bit" for name in ("divprune", "visual-pooling")), "kivi-4bit"),
    ("pictures", "latency"): _VISUAL,
    ("pictures", "tokens"): _VISUAL,
}
"""The methods that a search tries, by what the model reads and what is to become small."""


def candidates(
    reads: str, aim: str, methods: Sequence[str] | None = None, fits: Sequence[tuple[fit.Fit, str]] = ()
) -> list[Setting]:
    """Settings to try, every method at every keep.

    Args:
        reads: "texts" or "pictures".
        aim: "memory", "latency" or "tokens".
        methods: names, left out the defaults: a cache's ("snapkv"), with a store ("snapkv+kivi-4bit"), a form of
            storage by itself ("kivi-4bit"), a prompt's ("llmlingua2"), visual tokens' ("divprune"), several stages
            ("divprune>fastv"). Methods of prompts and of caches are also tried together later.
        fits: what was fitted for methods that need it, with the files; those are tried too.

    Raises:
        UnknownName, FewerError: a name is none of these, or means nothing for the model or the aim.
    """
    if aim not in AIMS:
        raise UnknownName(f"aim={aim!r}: make small one of {', '.join(AIMS)}")
    given = {made.method: (made.digest, path) for made, path in fits}
    if len(given) < len(fits):
        raise FewerError(f"fit: two files are for one method; give one of {', '.join(path for _, path in fits)}")
    names = [*(DEFAULTS[reads, aim] if methods is None else methods)]
    if methods is not None and (spare := [name for name in given if not any(name in one for one in names)]):
        raise FewerError(f"fit: a file is for {spare[0]}, which is not among the methods asked for")
    if methods is None:
        names += [f"{name}{store}" for name in given for store in ("", "+kivi-4bit") if name not in names]
    found: dict[Setting, None] = {}
    for name in names:
        found.update(dict.fromkeys(_settings(reads, aim, name, given)))
    return list(found)


def joined(texts: Sequence[Setting], helds: Sequence[Setting]) -> list[Setting]:
    """Each of the first behind each of the second: a shorter prompt, and then a smaller cache."""
    return [Setting(one.text, two.held) for one, two in product(texts, helds)]


def _settings(reads: str, aim: str, name: str, fits: dict[str, tuple[str, str]]) -> list[Setting]:
    stages, _, store = name.partition("+")
    parts = tuple(stages.split(">"))
    known = METHODS.get(parts[0])
    if known is not None and family_of(known) == "prompt":
        if store or len(parts) > 1:
            raise FewerError(f"methods: {name!r}: a prompt's method has no store and no stages")
        if reads == "pictures":
            raise FewerError(f"methods: {name!r} shortens texts, and this model is asked about pictures")
        resolve_prompt(name)
        return [Setting(text=Text(name, keep)) for keep in TEXT_KEEPS]
    made = [resolve(part) for part in parts]  # raises for names that are none
    if aim == "tokens" and reads == "texts":
        raise FewerError(f"methods: {name!r} leaves the prompt as long as it is; for tokens give prompts' methods")
    resolve_store(store or None)
    visual = reads == "pictures"
    allowed = of_family("vlm").keys() | of_family("kv").keys() if visual else of_family("kv").keys()
    for part in parts:
        base = part if part in METHODS else part.rpartition("-")[0]
        if base not in allowed and part not in ("turbo", "tome"):
            raise FewerError(f"methods: {name!r} means nothing for a model that reads {reads}; see `fewer methods`")
    if wants(made[0]) and parts[0] not in fits:
        raise FewerError(f"methods: {name!r} has to be fitted first: `fewer fit {parts[0]}`, and give the file")
    method = parts if len(parts) > 1 else parts[0]
    only = "visual" if visual and len(parts) == 1 and parts[0] in of_family("kv") else None
    digest, path = fits.get(parts[0], (None, None))
    held = Held(method, store=store or None, fit=path, fit_digest=digest, only=only)
    if getattr(made[0], "whole", False) or parts[0] == "full":
        return [Setting(held=held)]
    return [Setting(held=replace(held, keep=keep)) for keep in (VISUAL_KEEPS if visual else KEEPS)]
