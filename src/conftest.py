"""Doctests are looked for in every module but those whose packages are not installed here."""

from importlib.util import find_spec

WANTS = {"langchain": "langchain_core", "llamaindex": "llama_index", "haystack": "haystack"}

collect_ignore = [f"fewer/adapters/{name}.py" for name, package in WANTS.items() if find_spec(package) is None]
