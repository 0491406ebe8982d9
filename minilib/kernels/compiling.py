"""Compile a Triton kernel for a GPU that is not there, and read what came out.

It shows that the kernel builds, whether it uses the tensor cores, and whether its values fit into registers and shared
memory. It shows neither its speed nor its results. It needs triton, which brings its own compiler and assembler, and no
driver: ``pip install "minilib[kernels]"``, on Linux.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = (75, 80, 89, 90)
"""Compute capabilities, times ten, of T4, A100, L4 and H100."""
TRITON_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel.

    ``mma`` and ``wgmma`` count the tensor-core instructions in ``ptx``; ``spill_bytes`` what left the registers, stores and
    loads; ``registers`` is by thread, ``shared_bytes`` by program.
    """

    ptx: str
    mma: int
    wgmma: int
    spill_bytes: int
    shared_bytes: int
    registers: int


def compile_kernel(
    kernel: Any,
    capability: int,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    unaligned: tuple[str, ...] = (),
) -> Compiled:
    """Compile ``kernel`` (decorated by ``triton.jit``) as a launch would.

    Args:
        kernel: the function.
        capability: 75, 80, 89 or 90.
        arguments: its run-time arguments by name, in Triton's types: "*fp16" for a pointer, "i32", "fp32".
        constants: its ``tl.constexpr`` arguments.
        num_warps: of a program.
        num_stages: of the software pipeline.
        unaligned: arguments that are not multiples of 16. A launch finds that out from their values; here pointers and
            integers are taken as multiples of 16, the usual case, unless they are named.

    Raises:
        ValueError: an argument is missing or not known.
        ImportError: triton is not installed.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    if set(names) != set(arguments) | set(constants):
        wrong = sorted(set(names) ^ (set(arguments) | set(constants)))
        raise ValueError(f"arguments and constants of {kernel.__name__} do not match: {wrong}")
    signature = {name: arguments.get(name, "constexpr") for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith(("*", "i")) and name not in unaligned
    }
    source = ASTSource(kernel, signature, dict(constants), attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(built.asm["ptx"], built.metadata.shared)


def _triton() -> Any:
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            'compile_kernel needs triton, which is not installed: pip install "minilib[kernels]" (Linux)'
        ) from None
    return triton


def _read(ptx: str, shared_bytes: int) -> Compiled:
    from triton.backends.nvidia import compiler as nvidia

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    backend = Path(nvidia.__file__)
    ptxas = backend.parent / "bin" / "ptxas"
    # Newer versions of Triton call ptxas with this option, which changes what is spilt.
    extra = [option for option in ("--regAllocOptLevel=2",) if option in backend.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [str(ptxas), "-v", "-lineinfo", *extra, f"--gpu-name={target}", str(file)]
        command += ["-o", str(file.with_suffix(".o"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(
        ptx=ptx,
        mma=len(re.findall(r"^\s*mma\.sync", ptx, re.MULTILINE)),
        wgmma=len(re.findall(r"^\s*wgmma\.mma_async", ptx, re.MULTILINE)),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        shared_bytes=shared_bytes,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
    )
