"""Speed as a ratio: ours and a peer, measured interleaved in one run, on one thread, by CPU time.

Absolute milliseconds on a shared machine say little: the clock of a busy core wanders by half. A ratio of two functions
measured in turn, each by the minimum of many short samples of *CPU* time, holds to about 10 %. Times are never asserted in
tests; they are recorded with the machine's name, and the book shows the record.

``make bench`` runs every case of ``tests/benchmarks`` and writes ``tests/benchmarks/record.json``. A case whose peer is not
here is a row too, with the reason (``Missing``); how time grows with size is a fitted exponent (``Scaling``).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilib.resources import atomic_write, repo_root


@dataclass(frozen=True)
class Case:
    """Two functions of no argument that do the same work, and the ratio aimed at (our time over the peer's).

    ``same``: both return tensors (one, or several) that agree within this, relative to the largest value; the tests look.
    None: what they compute is not the same, or is compared elsewhere. ``slow``: the first call takes minutes (it
    compiles), so that the tests leave the case out.
    """

    name: str
    peer: str
    goal: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    same: float | None = None
    slow: bool = False


@dataclass(frozen=True)
class Missing:
    """A case that cannot be measured on this machine, and why: the peer is not installed, say."""

    name: str
    peer: str
    goal: float
    reason: str


@dataclass(frozen=True)
class Scaling:
    """How the time of ``make(size)()`` grows with ``size``: the exponent is aimed to lie in ``goal``."""

    name: str
    goal: tuple[float, float]
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], Any]]
    peer: str = "itself"


#: A module and how it is called, a function of the inputs.
Model = tuple[nn.Module, Callable[..., Tensor]]


@dataclass(frozen=True)
class Ratio:
    """The minimum CPU time a call of each side, in milliseconds, and their ratio; ``noise`` is ours against itself."""

    ratio: float
    ours_ms: float
    peer_ms: float
    noise: float


def ratio(
    ours: Callable[[], Any], peer: Callable[[], Any], *, repeats: int = 11, min_seconds: float = 0.05
) -> Ratio:
    """Time two functions in turn, in alternating order, and compare their minima.

    Args:
        repeats: samples a side.
        min_seconds: least CPU time of a sample; calls are repeated within it until it is reached.

    ``noise`` is the ratio of the minima of ours over even and over odd repeats: how far from 1 the same function lands.
    """
    if repeats < 2 or min_seconds <= 0:
        raise ValueError(f"need repeats >= 2 and min_seconds > 0; got {repeats} and {min_seconds}")
    samples, others = _interleaved((ours, peer), repeats, min_seconds)
    mine, theirs = min(samples), min(others)
    return Ratio(mine / theirs, 1e3 * mine, 1e3 * theirs, min(samples[::2]) / min(samples[1::2]))


def times(
    functions: Sequence[Callable[[], Any]], *, repeats: int = 7, min_seconds: float = 0.05
) -> list[float]:
    """The minimum CPU time of a call of each function, in seconds, measured in turns."""
    return [min(samples) for samples in _interleaved(functions, repeats, min_seconds)]


def package_problem(name: str) -> str | None:
    """Why the package ``name`` cannot be a peer here; None if it can be imported."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{name} is not installed" if error.name == name else f"{name} needs {error.name}"
    except (ImportError, RuntimeError, AttributeError) as error:  # torchvision against another torch, for one
        return f"{name} could not be imported: {str(error).splitlines()[0]}"
    return None


def _interleaved(
    functions: Sequence[Callable[[], Any]], repeats: int, min_seconds: float
) -> list[list[float]]:
    """Seconds a call of each function, one sample a turn; the order is turned round every time."""
    counts = [_calls_for(f, min_seconds) for f in functions]
    samples: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats):
        order = range(len(functions))
        for i in order if turn % 2 == 0 else reversed(order):
            samples[i].append(_sample(functions[i], counts[i]))
    return samples


def _sample(function: Callable[[], Any], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def _calls_for(function: Callable[[], Any], seconds: float) -> int:
    function()  # warm-up: allocations, lazy imports
    return max(1, int(seconds / max(_sample(function, 2), 1e-7)))


def model_cases(
    name: str,
    ours: Model,
    theirs: Model,
    inputs: Callable[[int], tuple[Tensor, ...]],
    *,
    goals: tuple[float, float, float] = (0.75, 0.95, 1.0),
) -> Iterator[Case]:
    """Forward passes of 1 and of 64 images and a training step of 64, of two models that compute the same, beside diffusers.

    Args:
        ours: minilib's model and how it is called: ``call(*inputs(batch))``.
        theirs: the same of diffusers' model.
        inputs: the arguments of a call for a batch of so many images.
        goals: aimed at by the three.
    """
    sides = [(model, call) for model, call in (ours, theirs)]
    for size, goal in zip((1, 64), goals[:2], strict=True):
        batch = inputs(size)
        mine, peer = (partial(_forward, *side, batch) for side in sides)
        yield Case(f"{name}, forward, batch {size}", "diffusers", goal, mine, peer)
    batch = inputs(64)
    # Both sides get the fused optimiser: the models are compared, not the optimisers.
    steps = [
        partial(_step, *side, torch.optim.AdamW(side[0].parameters(), lr=1e-6, fused=True), batch)
        for side in sides
    ]
    yield Case(f"{name}, training step, batch 64", "diffusers", goals[2], *steps)


@torch.no_grad()
def _forward(model: nn.Module, call: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> None:
    model.eval()
    call(*batch)


def _step(
    model: nn.Module,
    call: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
) -> None:
    model.train()
    call(*batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def run_cases(cases: Iterator[Case | Missing | Scaling], only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure every case; returns one row a case, ready for JSON."""
    from minilib.machine import cpu_flags, cpu_model

    rows = []
    context = {
        "machine": cpu_model(),
        "cpu_flags": sorted(cpu_flags() & FLAGS),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
    }
    for case in cases:
        if only and not any(word in case.name for word in only):
            continue
        print(f"{case.name:58s}", end=" ", flush=True)
        result, said = _measure(case)
        print(said, flush=True)
        row = {"name": case.name, "peer": case.peer, "goal": case.goal, **result}
        rows.append(row | context | {"peer_version": _version(case.peer.split()[0])})
    return rows


#: The instruction sets that decide how fast matrix products are.
FLAGS = frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"})


def _measure(case: Case | Missing | Scaling) -> tuple[dict[str, Any], str]:
    """What a case adds to its row, and what is printed."""
    if isinstance(case, Missing):
        return {"not_measured": case.reason}, f"not measured: {case.reason}"
    if isinstance(case, Scaling):
        from minilib.costs import fit_exponent

        seconds = times([case.make(size) for size in case.sizes])
        fit = fit_exponent(case.sizes, seconds)
        row = {
            "exponent": round(fit.value, 3),
            "interval": [round(fit.low, 3), round(fit.high, 3)],
            "sizes": list(case.sizes),
            "ms": [round(1e3 * s, 4) for s in seconds],
        }
        return row, f"time ~ size^{fit.value:.2f} (goal {case.goal[0]:g} to {case.goal[1]:g})"
    result = ratio(case.ours, case.theirs)
    row = {key: round(value, 4) for key, value in asdict(result).items()}
    return row, f"{result.ratio:6.2f}x of {case.peer} (goal {case.goal:g}x)"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks of the checkout and write their record.

    Words given select cases by name; then nothing is written, or, with ``--update``, these rows of the record alone. Each
    row names its machine and its date.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    update, only = "--update" in words, [w for w in words if w != "--update"]
    root = repo_root()
    if root is None:
        print(
            "error: benchmarks live in the repository (tests/benchmarks); run this in a checkout",
            file=sys.stderr,
        )
        return 1
    torch.set_num_threads(1)
    folder = root / "tests" / "benchmarks"
    cases = [case for path in sorted(folder.glob("bench_*.py")) for case in _load(path).cases()]
    rows = run_cases(iter(cases), only)
    if update or not only:
        record = folder / "record.json"
        kept = json.loads(record.read_text()) if update and record.is_file() else []
        by_name = {row["name"]: row for row in kept} | {row["name"]: row for row in rows}
        ordered = [by_name[case.name] for case in cases if case.name in by_name]
        atomic_write(record, json.dumps(ordered, indent=1) + "\n")
        print(f"wrote {len(rows)} of {len(ordered)} rows of {record}")
    return 0


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # Under the name that the benchmarks import: run as a script, this module's classes would be other classes.
    sys.exit(importlib.import_module("minilib.bench").main())
