import pytest
import triton

from minilib.kernels._triton import adaln
from minilib.kernels.compiling import TARGETS, compile_kernel

POINTERS = "x_ptr branch_ptr gate_ptr scale_ptr".split()
FORWARD = (*POINTERS, "shift_ptr", "residual_ptr", "y_ptr")
BACKWARD = (*POINTERS, "dy_ptr", "dresidual_ptr", "dx_ptr", "dbranch_ptr")
STRIDES = "n d x_b x_n branch_b branch_n gate_b scale_b".split()


def build(which, capability, width, dtype, gated):
    tile = adaln.config(width)
    warps = tile.pop("num_warps")
    if which == "forward":
        kernel, pointers, integers, turns = adaln.forward_kernel, FORWARD, (*STRIDES, "shift_b"), adaln.TILES
        partial = {}
    else:
        kernel, pointers = adaln.backward_kernel, BACKWARD
        integers = (*STRIDES, "splits", "dy_b", "dy_n", "dr_b", "dr_n")
        turns = triton.cdiv(adaln.BACKWARD_ROWS, tile["ROWS"])
        partial = {"partial_ptr": "*fp32"}
    arguments = (
        dict.fromkeys(pointers, f"*{dtype}") | partial | dict.fromkeys(integers, "i32") | {"eps": "fp32"}
    )
    constants = tile | {"GATED": gated, "TILES": turns}
    return compile_kernel(
        kernel, capability, arguments, constants, num_warps=warps, unaligned=("n", "splits")
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("capability", TARGETS)
def test_it_builds_without_spilling_on_every_target(capability, which, gated):
    for width in (1152, 4096) if capability == 75 else (1152,):
        dtype = "fp16" if capability == 75 else "bf16"
        built = build(which, capability, width, dtype, gated)
        assert built.spill_bytes == 0
        assert built.shared_bytes <= 48 * 1024
        assert built.registers <= 255 and ".visible .entry" in built.ptx
        assert ".global.v4" in built.ptx or ".global.v2" in built.ptx  # several values a memory instruction
        assert "atom" not in built.ptx


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_float32_and_every_smaller_tile(which):
    for width in (1, 96, 384):
        assert build(which, 80, width, "fp32", True).spill_bytes == 0
