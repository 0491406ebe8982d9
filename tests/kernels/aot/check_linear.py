import pytest
import torch

from minilib.kernels._triton import linear
from minilib.kernels.compiling import TARGETS, TRITON_NAMES, compile_kernel

STRIDES = "x_b x_h x_n".split()
SIZES = "n d e heads".split()
Y, OUT = "y_b y_h y_n".split(), "out_b out_h out_n".split()


def build(which, capability, width, dtype, normalise=True, feature=1):
    """As the wrappers launch it: the blocks of ``config``, statistics in float32."""
    pointer = "*" + TRITON_NAMES[str(dtype).removeprefix("torch.")]
    x = {"x_ptr": pointer}
    weighted = {"weight_ptr": "*fp32", "sums_ptr": "*fp32"}
    if which == "reduce":
        kernel, integers = linear.reduce_kernel, (*SIZES, "splits", "turns", *STRIDES, *Y)
        arguments = x | weighted | {"y_ptr": pointer, "state_ptr": "*fp32"}
        flags = {"WEIGHTED": normalise}
    elif which == "apply":
        kernel, integers = linear.apply_kernel, (*SIZES, *STRIDES, *OUT)
        arguments = x | {"state_ptr": pointer, "sums_ptr": "*fp32", "out_ptr": pointer, "z_ptr": "*fp32"}
        arguments |= {"eps": "fp32", "scale": "fp32"}
        flags = {"NORMALISE": normalise}
    else:
        kernel, integers = linear.input_gradient_kernel, (*SIZES, *STRIDES, *Y, *OUT)
        arguments = (
            x | weighted | {"y_ptr": pointer, "state_ptr": pointer, "out_ptr": pointer, "scale": "fp32"}
        )
        flags = {"SUMS": normalise, "WEIGHTED": normalise}
    block = linear.config(width, width, dtype)
    launch = {key: block.pop(key) for key in ("num_warps", "num_stages")}
    constants = block | flags | {"FEATURE": feature}
    arguments |= dict.fromkeys(integers, "i32")
    unaligned = ("n", "heads", "splits", "turns")
    return compile_kernel(kernel, capability, arguments, constants, unaligned=unaligned, **launch)


@pytest.mark.parametrize("which", ["reduce", "apply", "input_gradient"])
@pytest.mark.parametrize("capability", [c for c in TARGETS if c >= 80])
@pytest.mark.parametrize("width", [64, 72])
def test_half_precision_uses_the_tensor_cores_and_does_not_spill(which, capability, width):
    built = build(which, capability, width, torch.bfloat16 if capability == 90 else torch.float16)
    assert (built.mma > 0) if capability < 90 else (built.mma + built.wgmma > 0)
    assert built.spill_bytes == 0
    assert built.shared_bytes <= 99 * 1024
    assert "atom" not in built.ptx


@pytest.mark.parametrize("which", ["reduce", "apply", "input_gradient"])
def test_the_other_shipped_blocks(which):
    for width, dtype, normalise in (
        (16, torch.bfloat16, True),
        (32, torch.float16, False),
        (64, torch.float32, True),
    ):
        built = build(which, 80, width, dtype, normalise, feature=0)
        assert built.spill_bytes == 0 and built.shared_bytes <= 48 * 1024
        assert (built.mma > 0) == (dtype != torch.float32)
