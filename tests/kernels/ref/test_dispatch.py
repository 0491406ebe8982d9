import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minilib.kernels import dispatch
from minilib.kernels.dispatch import (
    DOTS,
    POINTWISE,
    Choice,
    Kernel,
    choose_path,
    explain,
    kernels,
    why_not_triton,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("MINILIB_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def make_kernel(ran, *, problem=None, path="cpu", triton=True):
    """A kernel that notes which path ran."""

    def run(name):
        return lambda x: ran.append(name) or x

    paths = {"reference": run("reference"), "cpu": run("cpu")} | ({"triton": run("triton")} if triton else {})
    return Kernel("noted", paths, lambda x: Choice("noted", path, "because"), lambda x: problem)


@pytest.fixture
def gpus(monkeypatch):
    """Fake tensors know their capability; triton is installed."""
    monkeypatch.setattr(dispatch, "capability", lambda device: device.capability)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    # Their type is no Tensor: the rule itself is called, without the check of its signature.
    bare = {f: inspect.unwrap(getattr(dispatch, f)) for f in ("choose_path", "why_not_triton")}
    for name, function in bare.items():
        monkeypatch.setattr(dispatch, name, function)
    return SimpleNamespace(**bare)


def make(capability, dtype=torch.float32):
    return SimpleNamespace(device=SimpleNamespace(type="cuda", capability=capability), dtype=dtype)


@pytest.mark.parametrize(
    "mode, expected", [(None, "cpu"), ("auto", "cpu"), ("ref", "reference"), ("triton", "triton")]
)
def test_the_mode_chooses_the_path_and_is_read_at_each_call(monkeypatch, mode, expected):
    ran = []
    kernel = make_kernel(ran)
    kernel(torch.ones(1))
    if mode:
        monkeypatch.setenv("MINILIB_KERNELS", mode)
    assert kernel.choice(torch.ones(1)).path == expected
    kernel(torch.ones(1))
    assert ran == ["cpu", expected]


@pytest.mark.parametrize("value", ["", "Auto", "reference", "cuda"])
def test_an_unknown_mode_is_refused_by_name(monkeypatch, value):
    monkeypatch.setenv("MINILIB_KERNELS", value)
    with pytest.raises(ValueError, match=rf"MINILIB_KERNELS='{value}'.*auto.*ref.*triton"):
        make_kernel([])(torch.ones(1))


def test_forced_triton_names_the_operation_and_the_reason(monkeypatch):
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
    ran = []
    with pytest.raises(RuntimeError, match="noted cannot run in Triton: the moon is full"):
        make_kernel(ran, problem="the moon is full")(torch.ones(1))
    with pytest.raises(RuntimeError, match="noted .*no Triton path"):
        make_kernel(ran, triton=False)(torch.ones(1))
    assert ran == []


def test_an_error_inside_the_chosen_path_is_raised_and_nothing_else_runs():
    ran = []

    def broken(x):
        raise RuntimeError("no tensor cores today")

    paths = {"reference": lambda x: ran.append("reference"), "triton": broken}
    kernel = Kernel("broken", paths, lambda x: Choice("broken", "triton", "why not"), lambda x: None)
    with pytest.raises(RuntimeError, match="no tensor cores today"):
        kernel(torch.ones(1))
    assert ran == []


def test_a_kernel_is_checked_when_it_is_built():
    def rule(x):
        return Choice("k", "cpu", "")

    with pytest.raises(ValueError, match="'gpu'.*choose from"):
        Kernel("k", {"reference": abs, "gpu": abs}, rule)
    with pytest.raises(ValueError, match="no 'reference'"):
        Kernel("k", {"cpu": abs}, rule)
    with pytest.raises(ValueError, match="available"):
        Kernel("k", {"reference": abs, "triton": abs}, rule)
    with pytest.raises(ValueError, match="chose 'cpu', which is none of"):
        Kernel("k", {"reference": abs}, rule)(torch.ones(1))


def test_off_a_gpu_the_plain_path_runs():
    for device in ("cpu", "meta"):
        choice = choose_path("op", torch.ones(1, device=device))
        assert (choice.op, choice.path) == ("op", "cpu") and device in choice.reason


@pytest.mark.parametrize(
    "capability, dtype, needs, path, said",
    [
        ((7, 5), torch.float16, POINTWISE, "triton", "7.5"),
        ((7, 5), torch.bfloat16, POINTWISE, "torch", "no bfloat16"),
        ((7, 5), torch.float16, DOTS, "torch", "tensor cores"),
        ((7, 0), torch.float32, POINTWISE, "torch", "7.0"),
        ((8, 0), torch.bfloat16, DOTS, "triton", "8.0"),
        ((9, 0), torch.float64, DOTS, "torch", "float64"),
        ((10, 0), torch.float16, DOTS, "triton", "10.0"),
    ],
)
def test_the_rule_on_gpus(gpus, monkeypatch, capability, dtype, needs, path, said):
    monkeypatch.setattr(dispatch, "MEASURED", {"op": (7, 5)})
    choice = gpus.choose_path("op", make(capability, dtype), needs=needs)
    assert choice.path == path and said in choice.reason


def test_a_kernel_that_was_not_measured_on_such_a_gpu_is_not_chosen_but_can_be_forced(gpus, monkeypatch):
    for measured, path in (({}, "flex"), ({"op": (9, 0)}, "flex"), ({"op": (8, 0)}, "triton")):
        monkeypatch.setattr(dispatch, "MEASURED", measured)
        choice = gpus.choose_path("op", make((8, 9)), gpu="flex")
        assert choice.path == path and ("not measured" in choice.reason) == (path == "flex")
    assert gpus.why_not_triton(make((8, 9))) is None


def test_amd_mixed_devices_and_a_missing_package_are_said(gpus, monkeypatch):
    assert "different devices" in gpus.why_not_triton(make((9, 0)), make((8, 0)))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in gpus.why_not_triton(make((9, 0)))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert "not installed" in gpus.why_not_triton(make((9, 0)))


def test_triton_runs_on_a_cpu_only_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    x = torch.ones(1)
    assert "CUDA GPU" in why_not_triton(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_triton(x) is None
    assert "float64" in why_not_triton(x.double())


def test_explain_takes_a_name_or_a_kernel_and_refuses_unknown_names():
    kernel = make_kernel([])
    assert explain(kernel, torch.ones(1)) == Choice("noted", "cpu", "because")
    known = kernels()
    assert {"modulate", "gated_residual_modulate", "linear_attention"} <= set(known)
    with pytest.raises(ValueError, match="unknown operation 'modulates'.*modulate"):
        explain("modulates")


def test_importing_every_kernel_does_not_import_the_triton_ones():
    code = "import sys; from minilib.kernels import kernels; kernels(); print('minilib.kernels._triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_importing_the_dispatcher_does_not_import_triton():
    code = (
        "import sys; from minilib.kernels import modulate, linear_attention; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
