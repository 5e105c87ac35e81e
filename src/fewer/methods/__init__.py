"""METHODS: a plain dict, name -> class. Names are for the command line; objects work everywhere."""

import re
from difflib import get_close_matches
from typing import Any

from fewer.codec import Codec
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.expected_attention import ExpectedAttention
from fewer.methods.kv.full import Full
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.keydiff import KeyDiff
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.pyramidkv import PyramidKV
from fewer.methods.kv.random import Random
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.methods.kv.tova import TOVA
from fewer.types import Method, UnknownName

METHODS: dict[str, type[Any]] = {
    "full": Full,
    "random": Random,
    "streaming-llm": StreamingLLM,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "tova": TOVA,
    "h2o": H2O,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "expected-attention": ExpectedAttention,
}


def resolve(method: str | Method) -> Method:
    """The method of that name with its published defaults, or the object itself. Methods that store in fewer bits also
    go by their name with the bits, as in "kivi-2bit".

    >>> resolve("snapkv")
    SnapKV(window=64, kernel=5, pooling='mean')
    """
    if isinstance(method, str):
        found = None if method in METHODS else re.fullmatch(r"(.+)-(\d+)bit", method)
        known = METHODS.get(found.group(1) if found else method)
        settings = {"bits": int(found.group(2))} if found else {}
        if known is None or (settings and "bits" not in getattr(known, "__dataclass_fields__", {})):
            near = get_close_matches(method.lower(), METHODS, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UnknownName(f"there is no method {method!r}; {hint}Known are {', '.join(METHODS)}")
        made: Method = known(**settings)
        return made
    if isinstance(method, type) or not isinstance(method, Method):
        raise UnknownName(f"method={method!r} is neither a name nor an object with needs, score, allocate and reduce")
    return method


def resolve_store(store: "str | Codec | None") -> "Codec | None":
    """The storage that a method of that name keeps its tokens in, the object itself, or None for full precision."""
    if store is None or (isinstance(store, Codec) and not isinstance(store, type)):
        return store
    if not isinstance(store, str):
        raise UnknownName(f"store={store!r} is neither a name such as 'kivi-4bit' nor a Codec")
    stores = list(getattr(resolve(store), "store", ()))
    if len(stores) != 1 or stores[0] is None:
        able = [name for name, known in METHODS.items() if getattr(known, "storage", False)]
        raise UnknownName(f"store={store!r} names no form of storage for all tokens; known are {', '.join(able)}")
    codec: Codec = stores[0]
    return codec


def name_of(method: Method) -> str:
    """The registered name of a method's class, with its bits where it has any, or the class's own name."""
    name = next((name for name, known in METHODS.items() if type(method) is known), type(method).__name__)
    bits = getattr(method, "bits", None)
    return name if bits is None else f"{name}-{bits}bit"
