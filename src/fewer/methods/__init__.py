"""METHODS: a plain dict, name -> class. Names are for the command line; objects work everywhere."""

from difflib import get_close_matches
from typing import Any

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
    """The method of that name with its published defaults, or the object itself.

    >>> resolve("snapkv")
    SnapKV(window=64, kernel=5, pooling='mean')
    """
    if isinstance(method, str):
        if method not in METHODS:
            near = get_close_matches(method.lower(), METHODS, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UnknownName(f"there is no method {method!r}; {hint}Known are {', '.join(METHODS)}")
        made: Method = METHODS[method]()
        return made
    if isinstance(method, type) or not isinstance(method, Method):
        raise UnknownName(f"method={method!r} is neither a name nor an object with needs, score, allocate and reduce")
    return method


def name_of(method: Method) -> str:
    """The registered name of a method's class, or the class's own name."""
    return next((name for name, known in METHODS.items() if type(method) is known), type(method).__name__)
