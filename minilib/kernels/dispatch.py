"""Which path of an operation runs, and why.

An operation has up to five paths: ``reference`` (the definition, in float64 too), ``cpu`` (plain PyTorch, fast on a CPU),
``torch`` (what PyTorch has for a GPU), ``flex`` (FlexAttention) and ``triton``. ``MINILIB_KERNELS`` is read at each call:

- ``auto`` (the default): what the device, its compute capability and the dtype allow, see :func:`choose_path`;
- ``ref``: always the reference;
- ``triton``: Triton, or an error that says why not.

Nothing falls back in silence: :func:`explain` says what would run, and an error inside the chosen path is raised.
"""

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VARIABLE = "MINILIB_KERNELS"
MODES = ("auto", "ref", "triton")
PATHS = ("reference", "cpu", "torch", "flex", "triton")
POINTWISE = (7, 5)
"""Compute capability from which Triton is used for element-wise operations and reductions (T4 and later)."""
DOTS = (8, 0)
"""... and for matrix products: Triton 3.7 emits no tensor-core instruction for ``tl.dot`` on 7.5."""
MEASURED: Mapping[str, tuple[int, int]] = {}
"""Operations whose Triton kernel was measured to be at least as fast as what PyTorch has, and the least compute capability
on which it was. Empty: none has been measured on a GPU yet, so ``auto`` takes PyTorch everywhere."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the package is installed; it is not imported before a kernel of it is chosen."""
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """What runs: the operation, the path (one of ``PATHS``), and the reason in words."""

    op: str
    path: str
    reason: str


class Kernel:
    """An operation with several paths that compute the same.

    Args:
        name: of the operation; what ``explain`` calls it.
        paths: path -> function; all take the same arguments. ``reference`` must be there.
        choose: the rule of the mode ``auto``: ``choose(*args, **kwargs) -> Choice``.
        available: why Triton cannot take these arguments, ``available(*args, **kwargs) -> str``, or None where it can.
            Needed if there is a ``triton`` path.

    Raises:
        ValueError: a path's name is unknown, or ``reference`` is missing.

    >>> def rule(x):
    ...     return Choice("double", "reference", "it is the only path")
    >>> double = Kernel("double", {"reference": lambda x: 2 * x}, rule)
    >>> double(torch.tensor(3.0)), double.choice(torch.tensor(3.0)).path
    (tensor(6.), 'reference')
    """

    def __init__(
        self,
        name: str,
        paths: Mapping[str, Callable[..., Any]],
        choose: Callable[..., Choice],
        available: Callable[..., str | None] | None = None,
    ) -> None:
        unknown = sorted(set(paths) - set(PATHS))
        if unknown:
            raise ValueError(f"{name}: unknown paths {unknown}: choose from {list(PATHS)}")
        if "reference" not in paths:
            raise ValueError(f"{name}: no 'reference' among the paths {sorted(paths)}: add the definition")
        if "triton" in paths and available is None:
            raise ValueError(f"{name}: say in `available` when the 'triton' path can run")
        self.name, self.paths = name, dict(paths)
        self.choose, self.available = choose, available

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chosen path. Its errors are raised as they are."""
        return self.paths[self.choice(*args, **kwargs).path](*args, **kwargs)

    def choice(self, *args: Any, **kwargs: Any) -> Choice:
        """The path that would run for these arguments.

        Raises:
            ValueError: ``MINILIB_KERNELS`` has an unknown value.
            RuntimeError: ``MINILIB_KERNELS=triton``, and Triton cannot run this.
        """
        mode = os.environ.get(VARIABLE, "auto")
        if mode == "auto":
            choice = self.choose(*args, **kwargs)
            if choice.path not in self.paths:
                raise ValueError(
                    f"{self.name}: its rule chose {choice.path!r}, which is none of {list(self.paths)}"
                )
            return choice
        if mode == "ref":
            return Choice(self.name, "reference", f"{VARIABLE}=ref")
        if mode == "triton":
            problem = self._problem(*args, **kwargs)
            if problem:
                raise RuntimeError(
                    f"{VARIABLE}=triton, but {self.name} cannot run in Triton: {problem}. Set it to auto or ref"
                )
            return Choice(self.name, "triton", f"{VARIABLE}=triton")
        raise ValueError(f"{VARIABLE}={mode!r} is unknown: choose one of {list(MODES)}")

    def _problem(self, *args: Any, **kwargs: Any) -> str | None:
        if "triton" not in self.paths or self.available is None:
            return f"there is no Triton path for it, only {list(self.paths)}"
        return self.available(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, paths={list(self.paths)})"


def choose_path(op: str, *tensors: Tensor, needs: tuple[int, int] = POINTWISE, gpu: str = "torch") -> Choice:
    """The rule of most operations in the mode ``auto``.

    Off a GPU the ``cpu`` path; also on the meta device, so that operations can be counted there. On a GPU Triton if it
    can run (:func:`why_not_triton`) and was measured to be no slower (``MEASURED``), else the path ``gpu``, with the reason.

    Args:
        op: the operation's name, for the ``Choice``.
        tensors: its tensor arguments; the first one's device decides.
        needs: least compute capability for Triton: ``POINTWISE`` or ``DOTS``.
        gpu: the path on a GPU where Triton is not used.
    """
    kind = tensors[0].device.type
    if kind != "cuda":
        return Choice(op, "cpu", f"the tensors are on {kind}: plain PyTorch")
    problem = why_not_triton(*tensors, needs=needs)
    if problem:
        return Choice(op, gpu, f"not Triton: {problem}")
    have = capability(tensors[0].device)
    if op not in MEASURED or have < MEASURED[op]:
        why = f"not measured on a GPU of capability {_dotted(have)} yet; {VARIABLE}=triton runs it"
        return Choice(op, gpu, f"not Triton: its kernel is {why}")
    return Choice(op, "triton", f"a GPU of capability {_dotted(have)}, where it was measured")


def why_not_triton(*tensors: Tensor, needs: tuple[int, int] = POINTWISE) -> str | None:
    """Why Triton cannot run on these tensors; None if it can.

    Under ``TRITON_INTERPRET=1`` it runs on the CPU (for tests), in float32 and float16.
    """
    device = tensors[0].device
    if not HAS_TRITON:
        return 'triton is not installed (pip install "minilib[kernels]")'
    if any(t.device != device for t in tensors):
        return f"the tensors are on different devices, {sorted({str(t.device) for t in tensors})}"
    wrong = sorted({str(t.dtype) for t in tensors if t.dtype not in TRITON_DTYPES})
    if wrong:
        return f"its kernels do not take {', '.join(wrong)}"
    if os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "it has not been tried on an AMD GPU"
    have = capability(device)
    if have < needs:
        why = ", below which it does not use the tensor cores" if needs == DOTS else ""
        return f"this GPU's compute capability is {_dotted(have)}, and it needs {_dotted(needs)}{why}"
    if have < DOTS and any(t.dtype == torch.bfloat16 for t in tensors):
        return f"a GPU of compute capability {_dotted(have)} has no bfloat16"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (8, 0) for an A100."""
    return torch.cuda.get_device_capability(device)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def kernels() -> dict[str, Kernel]:
    """Every operation of ``minilib.kernels``, by name. Imports its modules, but not triton."""
    package = importlib.import_module(__package__)
    found: dict[str, Kernel] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__package__}.{info.name}")
        found |= {value.name: value for value in vars(module).values() if isinstance(value, Kernel)}
    return found


def explain(op: str | Kernel, *args: Any, **kwargs: Any) -> Choice:
    """What would run for these arguments, and why. Runs nothing.

    Raises:
        ValueError: no operation has this name.

    >>> x, m = torch.ones(1, 4, 8), torch.ones(1, 8)
    >>> explain("modulate", x, m, m)
    Choice(op='modulate', path='cpu', reason='the tensors are on cpu: plain PyTorch')
    """
    if isinstance(op, Kernel):
        return op.choice(*args, **kwargs)
    known = kernels()
    if op not in known:
        raise ValueError(f"unknown operation {op!r}: choose one of {sorted(known)}")
    return known[op].choice(*args, **kwargs)
