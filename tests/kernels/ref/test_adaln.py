import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import compare, relative_error, values_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from minilib.kernels import adaln, explain, gated_residual_modulate, modulate
from minilib.models.layers import modulate as modulate_only

SHAPES = [(2, 5, 8), (3, 1, 7), (1, 4, 1), (0, 3, 4), (2, 0, 4), (2, 16, 96)]


def inputs(shape, dtype=torch.float64, seed=0):
    """x, branch, gate, shift, scale; the last three are views, as DiT's ``chunk(6)`` makes them."""
    b, n, d = shape
    generator = torch.Generator().manual_seed(seed)
    x, branch = (torch.randn(b, n, d, generator=generator).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(b, 6 * d, generator=generator).to(dtype).chunk(6, dim=-1)[1:4]
    return x, branch, gate, shift, scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_the_definition_against_torch_layer_norm(shape, eps):
    x, branch, gate, shift, scale = inputs(shape)
    expected = F.layer_norm(x, shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(
        adaln.modulate_reference(x, shift, scale, eps), expected, rtol=1e-12, atol=1e-12
    )
    residual, modulated = adaln.gated_residual_modulate_reference(x, branch, gate, shift, scale, eps)
    torch.testing.assert_close(residual, x + gate[:, None] * branch, rtol=1e-14, atol=1e-14)
    expected = F.layer_norm(residual, shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_cpu_path_is_the_definition_forward_and_backward(shape, dtype):
    x, branch, gate, shift, scale = inputs(shape, dtype)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    for function, reference, arguments in (
        (modulate, adaln.modulate_reference, (x, shift, scale)),
        (
            gated_residual_modulate,
            adaln.gated_residual_modulate_reference,
            (x, branch, gate, shift, scale),
        ),
    ):
        out, grads, weights = values_and_gradients(function, arguments)
        doubles = [t.double() for t in arguments]
        expected, wanted, _ = values_and_gradients(reference, doubles, weights)
        for a, b in zip((*out, *grads), (*expected, *wanted), strict=True):
            # At width 1 every token is normalised to 0: nothing to be relative to.
            assert a.dtype == dtype and min(relative_error(a, b), float((a - b).detach().norm())) <= bound


def test_gradients_of_the_definition():
    x, branch, gate, shift, scale = (t.detach().requires_grad_() for t in inputs((2, 3, 5)))
    assert torch.autograd.gradcheck(adaln.modulate_reference, (x, shift, scale))
    assert torch.autograd.gradcheck(adaln.gated_residual_modulate_reference, (x, branch, gate, shift, scale))


def test_it_is_the_block_of_the_dit_to_the_bit():
    x, _, _, shift, scale = inputs((2, 16, 32), torch.float32)
    block = modulate_only(F.layer_norm(x, (32,), eps=1e-6), shift[:, None], scale[:, None])
    assert torch.equal(modulate(x, shift, scale), block)


def test_a_large_mean_does_not_cancel():
    x, _, _, shift, scale = inputs((2, 4, 64), torch.float32)
    x = x + 1000
    expected = adaln.modulate_reference(x.double(), shift.double(), scale.double())
    for path in ("reference", "cpu"):
        assert relative_error(adaln.MODULATE.paths[path](x, shift, scale), expected) < 1e-4


def test_half_precision_keeps_its_dtype_next_to_a_float32_condition():
    x, branch, gate, shift, scale = inputs((2, 4, 8), torch.float32)
    for path in ("reference", "cpu"):
        half = adaln.GATED_RESIDUAL_MODULATE.paths[path](x.bfloat16(), branch, gate, shift, scale)
        assert all(t.dtype == torch.bfloat16 for t in half)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_on_a_cpu():
    x, branch, gate, shift, scale = inputs((2, 4, 8), torch.float32)
    with Operations() as operations:
        gated_residual_modulate(x, branch, gate, shift, scale)
    assert [name for name in operations.names if name != "unsqueeze"] == [
        "addcmul",
        "native_layer_norm",
        "add",
        "addcmul",
    ]


COMPILED = """
import torch
from minilib.kernels import gated_residual_modulate as f
x, m = torch.randn(2, 4, 8), torch.randn(2, 8)
compiled = torch.compile(f, fullgraph=True, backend="eager")
print(all(map(torch.equal, compiled(x, x, m, m, m), f(x, x, m, m, m))))
"""


def test_the_choice_does_not_break_a_compiled_graph():
    # In a process of its own: the tests' type checker would break it.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-3000:]


def test_the_modes(monkeypatch):
    x, branch, gate, shift, scale = inputs((2, 4, 8), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert explain("modulate", x, shift, scale).path == "cpu"
    assert explain("gated_residual_modulate", x, branch, gate, shift, scale).path == "cpu"
    monkeypatch.setenv("MINILIB_KERNELS", "ref")
    assert explain("modulate", x, shift, scale, eps=1e-5).path == "reference"
    assert torch.equal(modulate(x, shift, scale), adaln.modulate_reference(x, shift, scale))
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="modulate cannot run in Triton: .*(on cpu|not installed)"):
        modulate(x, shift, scale)


def test_a_token_too_wide_for_a_program_is_said():
    wide = torch.zeros(1, 1, adaln.MAX_WIDTH + 1)
    assert "at most 4096" in adaln.MODULATE.available(wide, wide[0], wide[0])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"x": (4, 8)}, "batch, tokens, width"),
        ({"x": (2, 4, 0)}, "batch, tokens, width"),
        ({"shift": (2, 1, 8)}, r"shift must be .*\(2, 8\), got \(2, 1, 8\)"),
        ({"scale": (1, 8)}, r"scale must be"),
        ({"gate": (2, 7)}, "gate must be"),
        ({"branch": (2, 3, 8)}, "branch is"),
    ],
)
def test_wrong_shapes_are_named(change, said):
    shapes = {"x": (2, 4, 8), "branch": (2, 4, 8)} | dict.fromkeys(("gate", "shift", "scale"), (2, 8))
    arguments = {name: torch.zeros(shape) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=said):
        # The tests' type checker would refuse some of these first: call what it wraps.
        inspect.unwrap(gated_residual_modulate)(**arguments)


def test_compare_refuses_a_wrong_gradient():
    x, _, _, shift, scale = inputs((2, 4, 8), torch.float32)
    with pytest.raises(AssertionError, match="gradient of input 1"):
        compare(
            lambda x, t, s: modulate(x, t.detach() + 0 * t, s), modulate, (x, shift, scale), torch.float32
        )
