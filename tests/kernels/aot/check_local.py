import pytest

from minilib.kernels._triton import local
from minilib.kernels.compiling import compile_kernel

TARGETS = (80, 89, 90)  # none for 7.5, which has no tensor-core dot: there the tiles of torch run
INTEGERS = "rows columns m d limit heads".split() + [f"{x}_{axis}" for x in "qkv" for axis in "bhn"]
KERNELS = {
    "forward": (local.forward_kernel, {}),
    "queries": (local.queries_kernel, {}),
    "keys": (local.keys_kernel, {"EXTRA": False}),
    "extra keys": (local.keys_kernel, {"EXTRA": True}),
}


def build(name, capability, d, dtype, reach=3):
    kernel, constants = KERNELS[name]
    options = local.config(d, backward=name != "forward")
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    pointers = {arg: f"*{dtype}" for arg in kernel.arg_names if arg.endswith("_ptr")}
    pointers |= dict.fromkeys(pointers.keys() & {"lse_ptr", "delta_ptr"}, "*fp32")
    arguments = pointers | dict.fromkeys(INTEGERS, "i32") | {"scale": "fp32"}
    options |= {"REACH": reach} | constants
    small = ("rows", "columns", "m", "limit", "heads")
    return compile_kernel(kernel, capability, arguments, options, **launch, unaligned=small)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", TARGETS)
def test_it_uses_the_tensor_cores_and_spills_nothing(capability, name):
    # Heads of 64 are the models', of 128 the largest; the others have the same tile or a smaller one.
    for d, dtype in ((64, "fp16"), (128, "bf16")) if capability != 89 else ((64, "bf16"),):
        built = build(name, capability, d, dtype)
        assert built.mma + built.wgmma > 0
        assert (built.wgmma > 0) == (capability == 90)
        assert built.spill_bytes == 0
        assert built.shared_bytes <= (48 if d == 64 and capability < 90 else 99) * 1024
        assert "atom" not in built.ptx


@pytest.mark.parametrize("name", KERNELS)
def test_a_wide_reach_and_small_heads(name):
    for d, reach in ((32, 15), (16, 0)):
        built = build(name, 80, d, "bf16", reach)
        assert built.mma > 0 and built.spill_bytes == 0 and built.shared_bytes <= 48 * 1024
