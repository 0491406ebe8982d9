"""What a run ran on: processor, versions, threads, peak memory. Part of every record."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from minilib import __version__


def cpu_model() -> str:
    """Name of the processor and the number of cores this process may use."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def cpu_flags() -> frozenset[str]:
    """The instruction sets of the first processor, as Linux names them; empty where that is not known."""
    return frozenset((_cpuinfo("flags") or "").split())


def _cpuinfo(field: str) -> str | None:
    """What Linux says of the first processor under a name; None where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)


def gpu_model() -> str | None:
    """Name of the first CUDA device, or None. Looks only if torch is loaded already."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def versions() -> dict[str, str | None]:
    """Versions of Python, torch, numpy and minilib, without importing them."""
    found: dict[str, str | None] = {"python": platform.python_version(), "minilib": __version__}
    for name in ("torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def threads() -> int:
    """Threads of one process."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else int(os.environ.get("OMP_NUM_THREADS") or 1)


def peak_mb() -> float | None:
    """Largest resident memory, in MB, of this process or of any child that has ended; None where it is not known."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(max(peaks) * unit / 1e6, 1)
