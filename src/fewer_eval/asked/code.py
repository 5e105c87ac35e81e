"""Functions of Python's standard library, and which of them does what its documentation says."""

import ast
import bisect
import colorsys
import functools
import heapq
import inspect
import random
import shlex
import statistics
import textwrap
from types import ModuleType

from fewer_eval.asked.base import Asked, Setting

_MODULES: tuple[ModuleType, ...] = (bisect, colorsys, heapq, inspect, shlex, statistics, textwrap)


@functools.cache
def functions() -> tuple[tuple[str, str, str], ...]:
    """Name, first sentence of its documentation, and code without it, of functions of moderate length."""
    found = []
    for module in _MODULES:
        for node in ast.parse(inspect.getsource(module)).body:
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or not said:
                continue
            node.body = node.body[1:]
            if not node.body:
                continue
            code = ast.unparse(node)
            first = " ".join(said.split("\n\n")[0].split())
            if 150 < len(code) < 900 and len(first) > 20 and node.name not in first:
                found.append((node.name, first, code))
    return tuple(found)


def code(rng: random.Random, place: float) -> Asked:
    chosen = rng.sample(functions(), 7)
    name, said, _ = chosen[round(place * 6)]
    module = "\n\n\n".join(code for _, _, code in chosen) + "\n"
    question = f"Which of these functions does this: {said} Answer with its name."
    return Asked((module,), question, name, (f"def {name}(",))


CODE = Setting("code", "seven functions of the standard library, one of which is described", code, False)
