"""What a machine has: devices, kernels of attention, a compiler. Each is tried, and what it says is a finding."""

import importlib
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "missing", "broken", "no"]
"""A finding: it is there and works; is not there; is there and fails; cannot be had on this machine."""

_NATIVE = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
"""Flags of processors that multiply a type themselves; without, it is worked out in float32."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` is what to type where something can be done."""

    name: str
    state: State
    detail: str
    fix: str = ""


def tried(name: str, look: Callable[[], str], fix: str = "", broken: State = "broken") -> Finding:
    """What `look` says; where the package is not there, or something fails, that.

    >>> tried("no such", lambda: importlib.import_module("no_such").__name__, fix="pip install no-such")
    Finding(name='no such', state='missing', detail='no_such is not installed', fix='pip install no-such')
    """
    try:
        return Finding(name, "ok", look())
    except ModuleNotFoundError as why:
        return Finding(name, "missing", f"{why.name or name} is not installed", fix)
    except Exception as why:  # noqa: BLE001  # packages raise what they like
        first = (str(why).strip() or "no reason given").splitlines()[0]
        said = first if broken == "no" else f"{type(why).__name__}: {first}"
        return Finding(name, broken, said[:200], fix)


def version_of(module: str) -> str:
    return str(importlib.import_module(module).__version__)


def devices() -> tuple[Finding, ...]:
    found = [Finding("cpu", "ok", f"{_cpu()}, {_cores()} cores usable, memory {_memory()}")]
    found += [tried("cpu types", lambda: _types("cpu"))]
    found += [tried("cuda", _cuda, broken="no"), tried("mps", _mps, broken="no")]
    if found[2].state == "ok":
        found.append(tried("cuda types", lambda: _types("cuda")))
    return tuple(found)


def _cpu() -> str:
    return " ".join(_cpuinfo("model name")) or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> list[str]:
    """The words that Linux has under that name for the first processor; none elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return next((line.partition(":")[2].split() for line in lines if line.startswith(name)), [])


def _cores() -> int:
    # what a container or taskset leaves to this process; not every system can say
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory() -> str:
    """Of the machine, or what a container may use of it."""
    if sys.platform == "win32":
        return "unknown"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return f"{min(whole, int(told)) / 2**30 if told.isdecimal() else whole / 2**30:.1f} GiB"


def _types(device: str) -> str:
    """Which types of numbers a product of matrices takes there, and which the processor has instructions for."""
    import torch

    works = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            a = torch.ones(8, 8, dtype=dtype, device=device)
            a @ a
            works.append(str(dtype).removeprefix("torch."))
        except RuntimeError:
            continue
    said = ", ".join(works)
    if device != "cpu":
        return said
    flags = set(_cpuinfo("flags") + _cpuinfo("Features"))
    native = [name for name, known in _NATIVE.items() if flags & known]
    return f"{said}; in hardware: {', '.join(['float32', *native])}"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    names = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        names.append(f"{about.name}, {about.total_memory / 2**30:.1f} GiB")
    return "; ".join(names)


def _mps() -> str:
    import torch

    if not torch.backends.mps.is_available():
        raise RuntimeError("torch sees no Metal device")
    return f"{torch.mps.recommended_max_memory() / 2**30:.1f} GiB recommended at most"


def attention() -> tuple[Finding, ...]:
    found = [tried("flash-attn", lambda: version_of("flash_attn"))]
    try:
        import torch
        from torch.nn.attention import SDPBackend
    except Exception as why:  # noqa: BLE001  # without torch there is nothing to try
        return (Finding("sdpa", "broken", f"{type(why).__name__}: {why}"),)
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, kernel in kernels.items():
            found.append(tried(f"sdpa {name}, {device}", lambda k=kernel, d=device: _sdpa(k, d), broken="no"))  # type: ignore[misc]
    return (*found, tried("flex, not compiled", _flex, broken="no"))


def _sdpa(kernel: Any, device: str) -> str:
    """One step of attention by this kernel alone; raises where it cannot."""
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    dtype = torch.float32 if device == "cpu" else torch.float16
    q = torch.ones(1, 2, 8, 64, dtype=dtype, device=device)
    try:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError:  # its message, that no backend is left, is about our having asked for one
        raise RuntimeError("not on this device") from None
    return f"works, {str(dtype).removeprefix('torch.')}"


def _flex() -> str:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.ones(1, 1, 8, 16)
    flex_attention(q, q, q)
    return "works"


def compiling() -> tuple[Finding, ...]:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        return (Finding("torch.compile", "missing", "no C++ compiler is found", "install g++ or clang++, or set CXX"),)
    if not header.exists():
        return (Finding("torch.compile", "missing", f"{compiler}, but no {header}", "install Python's headers"),)
    return (Finding("torch.compile", "ok", f"{compiler} and Python's headers are there (nothing was compiled)"),)
