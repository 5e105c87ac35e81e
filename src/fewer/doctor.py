"""What this machine has, and what can gain on it: `fewer doctor`.

    examine() -> Examined      versions, extras, devices, attention, compiling, default models, gains

Nothing is downloaded, nothing is measured. What is missing or broken is a finding, never an error: a broken package is
one that is installed and cannot be imported, whatever it raises.
"""

import importlib
import importlib.metadata
import io
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewer.gains import Facts, Gain, gains
from fewer.machine import Finding, attention, compiling, devices, tried, version_of

EXTRAS = {
    "eval": "measuring, reports, the default models, pictures",
    "code": "longcodezip: code by its syntax",
    "serve": "fewer serve",
    "timm": "encoders of timm",
    "tiktoken": "counting in OpenAI's encodings",
    "ray": "fewer prompt --engine ray",
    "langchain": "the component for LangChain",
    "llamaindex": "the component for LlamaIndex",
    "haystack": "the component for Haystack",
}
"""Extras of fewer that add something, and what."""

_MODULES = {"pillow": "PIL", "haystack-ai": "haystack", "llama-index-core": "llama_index.core"}
"""What is imported, where it is not called what is installed."""


@dataclass(frozen=True)
class Examined:
    """All findings."""

    versions: tuple[Finding, ...]
    extras: tuple[Finding, ...]
    devices: tuple[Finding, ...]
    attention: tuple[Finding, ...]
    compiling: tuple[Finding, ...]
    models: tuple[Finding, ...]
    gains: tuple[Gain, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def examine() -> Examined:
    """Look at this machine; takes seconds, most of them to import what is installed.

    >>> "prompts" in examine().gains[0].way
    True
    """
    with _quiet():
        about = devices()
        return Examined(_versions(), _extras(), about, attention(), compiling(), _models(), gains(_facts(about)))


@contextmanager
def _quiet() -> Iterator[None]:
    """What packages print and warn of on import is no finding."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _versions() -> tuple[Finding, ...]:
    python = Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    names = ("fewer", "torch", "transformers", "tokenizers", "numpy")
    return (python, *(tried(name, lambda name=name: version_of(name), f"pip install {name}") for name in names))  # type: ignore[misc]


def _extras() -> tuple[Finding, ...]:
    try:
        wanted = importlib.metadata.requires("fewer") or []
    except importlib.metadata.PackageNotFoundError:
        why = "fewer is not installed as a package, so what its extras want is not known"
        return (Finding("extras", "missing", why, "pip install fewer"),)
    return tuple(_extra(name, use, wanted) for name, use in EXTRAS.items())


def _extra(name: str, use: str, wanted: list[str]) -> Finding:
    """An extra is there if all that it wants can be imported."""
    fix = f"pip install 'fewer[{name}]'"
    mine = [line for line in wanted if re.search(rf"extra == ['\"]{re.escape(name)}['\"]", line)]
    if not mine:
        return Finding(
            name, "missing", f"{use}; the installed fewer was built without this extra", "pip install -U fewer"
        )
    packages = [re.split(r"[^\w.\-]", line, maxsplit=1)[0] for line in mine]
    if absent := [package for package in packages if _absent(package)]:
        return Finding(name, "missing", f"{use}; {', '.join(absent)} not installed", fix)
    for package in packages:
        found = tried(name, lambda package=package: _imported(package), f"{fix} --force-reinstall")  # type: ignore[misc]
        if found.state != "ok":
            return Finding(name, "broken", f"{use}; {package} cannot be imported: {found.detail}", found.fix)
    return Finding(name, "ok", use)


def _absent(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def _imported(package: str) -> str:
    return importlib.import_module(_MODULES.get(package, package.replace("-", "_"))).__name__


def _models() -> tuple[Finding, ...]:
    """The default models: ready, or what they are made of is here, or pip brings it on the first use."""
    return (
        tried("language model", _language),
        tried("vision model", _vision, "pip install 'fewer[eval]'"),
        tried("sentence encoder", _sentences),
        tried("reference vision-language model", _reference),
    )


def _language() -> str:
    import transformers

    from fewer.models import SMOLLM2

    return _held("SmolLM2-135M", f"smollm2-135m-instruct-transformers-{transformers.__version__}", SMOLLM2)


def _vision() -> str:
    from fewer.vision import DINOV2

    return _held("DINOv2 ViT-S/14", f"dinov2-vit-s14-{DINOV2.name}-{DINOV2.version}", DINOV2)


def _sentences() -> str:
    from fewer.sentences import MINILM

    return _held("MiniLM-L6", f"minilm-l6-v2-unpacked-{MINILM.version}", MINILM)


def _held(name: str, ready: str, package: Any) -> str:
    from fewer.models import cache_dir

    if (cache_dir() / ready).is_dir():
        return f"{name} is ready in {cache_dir()}"
    if (cache_dir() / f"{package.name}-{package.version}").is_dir() or not _absent(package.name):
        return f"{name} is here as {package}, and made ready on first use"
    return f"{name} is not here; pip brings {package} on first use"


def _reference() -> str:
    size = (Path(__file__).parent / "data" / "reference-vlm.safetensors").stat().st_size
    return f"comes along, {size / 2**20:.1f} MB"


def _facts(devices: tuple[Finding, ...]) -> Facts:
    state = {found.name: found for found in devices}
    types = state["cpu types"].detail.partition("in hardware:")[2]
    return Facts("ok" in (state["cuda"].state, state["mps"].state), "bfloat16" in types)
