import pytest

from minilib.kernels._triton import scan
from minilib.kernels.compiling import TARGETS, compile_kernel

GIVEN = ("u_ptr", "dt_ptr", "a_ptr", "b_ptr", "c_ptr")
KERNELS = {"forward": scan.forward_kernel, "backward": scan.backward_kernel}


def build(name, capability, n, dtype):
    kernel, options = KERNELS[name], scan.config(n)
    warps = options.pop("num_warps")
    arguments = {arg: "*fp32" for arg in kernel.arg_names if arg.endswith("_ptr")}
    arguments |= dict.fromkeys(GIVEN, f"*{dtype}") | dict.fromkeys(("length", "groups", "width"), "i32")
    return compile_kernel(
        kernel, capability, arguments, options, num_warps=warps, unaligned=("length", "groups")
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", TARGETS)
def test_the_states_stay_in_registers_on_every_target(capability, name):
    # 16 states are Mamba's, 1 is LaMamba-Diff's, 64 the most that is taken.
    for n in (1, 16, scan.MAX_STATES):
        built = build(name, capability, n, "fp16" if capability == 75 else "bf16")
        assert built.spill_bytes == 0 and built.shared_bytes <= 48 * 1024
        assert "atom" not in built.ptx and "mma" not in built.ptx


@pytest.mark.parametrize("name", KERNELS)
def test_float32_and_a_number_of_states_that_is_no_power_of_two(name):
    assert build(name, 80, 12, "fp32").spill_bytes == 0
