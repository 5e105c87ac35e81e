"""The machine and the software behind a run, as plain text for its report."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def hardware() -> dict[str, str]:
    """What the run can use: processor, cores this process may run on, memory, accelerator and platform."""
    return {
        "cpu": _cpu(),
        "cores": str(_cores()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "accelerator": _accelerator(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """The versions that the numbers depend on; a package that runs from a source tree is "not installed"."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("torch", "transformers", "fewer")}


def _cpu() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - fixed words
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    # Linux on ARM lists no model name, so the architecture is all there is to say.
    return platform.machine()


def _cores() -> int:
    # The scheduler's set is what a container or taskset leaves to this process; macOS has no such set.
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerator() -> str:
    import torch  # slow to import, and the versions are wanted without it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
