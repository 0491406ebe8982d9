import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilib.step_checkpoint import checkpointed_steps, run_steps, watch_saved_bytes

F64 = {"dtype": torch.float64}


def toy(width=6, seed=0):
    """A small network that reads the step's number, its parameters, and a first state."""
    g = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(width, width, generator=g, **F64).div(3).requires_grad_(),
        torch.randn(width, generator=g, **F64).requires_grad_(),
    )
    x = torch.randn(4, width, generator=g, **F64)
    return (lambda i, x: x + 0.3 * torch.tanh(x @ a + (i + 1) * b)), [a, b], x


class TestGradient:
    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_equals_backpropagation_through_the_loop(self, steps):
        step, params, x = toy()
        x.requires_grad_()
        plain, ours = run_steps(step, x, steps), checkpointed_steps(step, x, steps, params)
        assert torch.equal(plain, ours)
        weights = torch.linspace(-1, 2, x.numel(), **F64).view_as(x)
        want = torch.autograd.grad((weights * plain.sin()).sum(), [x, *params])
        got = torch.autograd.grad((weights * ours.sin()).sum(), [x, *params])
        for a, b in zip(want, got, strict=True):
            assert float((a - b).abs().max() / a.abs().max()) < 1e-13

    def test_by_finite_differences(self):
        step, params, x = toy(width=3)
        x.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, a, b: checkpointed_steps(
                lambda i, s: s + 0.3 * torch.tanh(s @ a + (i + 1) * b), x, 4, [a, b]
            ),
            (x, *params),
        )

    def test_closed_form(self):
        """x -> w x, n times: the derivative of w^n x is n w^(n-1) x."""
        w = torch.tensor(1.3, requires_grad=True, **F64)
        x = torch.tensor(0.7, requires_grad=True, **F64)
        checkpointed_steps(lambda i, s: w * s, x, 5, [w]).backward()
        assert w.grad.item() == pytest.approx(5 * 1.3**4 * 0.7, rel=1e-14)
        assert x.grad.item() == pytest.approx(1.3**5, rel=1e-14)

    def test_the_steps_come_in_order_and_know_their_number(self):
        seen = []

        def step(i, x):
            seen.append(i)
            return x * w

        w = torch.tensor(1.0, requires_grad=True)
        checkpointed_steps(step, torch.tensor(1.0), 4, [w]).backward()
        assert seen == [0, 1, 2, 3, 3, 2, 1, 0]

    def test_states_of_several_tensors(self):
        """A multistep solver remembers more than the sample."""
        w = torch.tensor([0.9, -0.4], requires_grad=True, **F64)

        def step(i, state):
            x, before = state
            new = torch.sin(w * x) + 0.5 * before
            return new, x - before * (i + 1)

        first = (torch.ones(2, requires_grad=True, **F64), torch.zeros(2, **F64))
        plain, ours = run_steps(step, first, 5), checkpointed_steps(step, first, 5, [w])
        assert isinstance(ours, tuple) and all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
        for pick in (0, 1):
            want = torch.autograd.grad(plain[pick].sum(), [w, first[0]], retain_graph=True)
            got = torch.autograd.grad(ours[pick].sum(), [w, first[0]], retain_graph=True)
            assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(want, got, strict=True))

    def test_parameters_that_are_computed(self):
        """Masks are made from logits: the gradient goes on to them, once."""
        logit = torch.tensor([0.2, -1.0], requires_grad=True, **F64)
        x = torch.tensor([1.0, 2.0], **F64)
        grads = []
        for ours in (False, True):
            mask = torch.sigmoid(logit)
            call = (lambda i, s, mask=mask: s * mask + 1, x, 3)
            out = checkpointed_steps(*call, [mask]) if ours else run_steps(*call)
            grads.append(torch.autograd.grad(out.square().sum() + mask.sum(), logit)[0])
        assert torch.allclose(*grads, rtol=1e-13, atol=0)

    def test_a_parameter_that_some_steps_do_not_read(self):
        a, b = (torch.tensor(v, requires_grad=True) for v in (2.0, 3.0))
        unused = torch.tensor(1.0, requires_grad=True)
        out = checkpointed_steps(lambda i, x: x * (a if i else b), torch.tensor(1.0), 3, [a, b, unused])
        got = torch.autograd.grad(out, [a, b, unused], allow_unused=True)
        assert got[0] == 12 and got[1] == 4 and got[2] is None

    def test_only_the_state_requires_a_gradient(self):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        checkpointed_steps(lambda i, x: x.square(), x, 2, []).sum().backward()
        assert torch.equal(x.grad, 4 * x.detach() ** 3)

    def test_a_step_that_hands_on_what_it_got(self):
        w = torch.tensor(3.0, requires_grad=True)
        x = torch.tensor(2.0, requires_grad=True)
        out = checkpointed_steps(lambda i, x: x, x, 2, [w])
        assert out.data_ptr() != x.data_ptr(), "writing into the result must not reach the first state"
        out.backward()
        assert out == 2 and x.grad == 1 and w.grad is None

    def test_one_inside_another(self):
        w = torch.tensor(1.1, requires_grad=True, **F64)

        def inner(x):
            return checkpointed_steps(lambda j, s: torch.sin(w * s) + j, x, 3, [w])

        x = torch.tensor(0.4, requires_grad=True, **F64)
        want = x
        for _ in range(2):
            want = run_steps(lambda j, s: torch.sin(w * s) + j, want, 3)
        got = checkpointed_steps(lambda i, s: inner(s), x, 2, [w])
        pair = [torch.autograd.grad(v, [w, x]) for v in (want, got)]
        assert all(torch.allclose(a, b, rtol=1e-13, atol=0) for a, b in zip(*pair, strict=True))

    def test_as_torchs_own_checkpoint_around_each_step(self):
        step, params, x = toy()
        theirs = x
        for i in range(5):
            theirs = checkpoint(step, i, theirs, use_reentrant=False)
        ours = checkpointed_steps(step, x, 5, params)
        pair = [torch.autograd.grad(v.square().sum(), params) for v in (theirs, ours)]
        assert all(torch.allclose(a, b, rtol=1e-13, atol=0) for a, b in zip(*pair, strict=True))

    def test_without_grad_it_is_the_loop(self):
        step, params, x = toy()
        with torch.no_grad():
            out = checkpointed_steps(step, x, 3, params)
        assert not out.requires_grad and torch.equal(out, run_steps(step, x, 3).detach())

    def test_autocast_is_the_same_in_both_passes(self):
        layer = nn.Linear(8, 8)
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = checkpointed_steps(lambda i, s: layer(s).float(), x, 3, list(layer.parameters()))
        out.sum().backward()  # outside autocast; a second run in float32 would not repeat the first
        assert layer.weight.grad.dtype == torch.float32


class TestMemory:
    @staticmethod
    def peak(run, steps):
        step, params, x = toy(width=16)
        with watch_saved_bytes(exclude=params) as saved:
            run(step, x, steps, params).sum().backward()
        assert saved.live == 0, "all of it is freed"
        return saved.peak

    def test_the_loop_grows_by_all_activations_ours_by_the_states(self):
        plain = [self.peak(lambda f, x, n, p: run_steps(f, x, n), n) for n in (4, 8, 16)]
        ours = [self.peak(checkpointed_steps, n) for n in (4, 8, 16)]
        assert plain[2] - plain[1] == 2 * (plain[1] - plain[0])
        state = 4 * 16 * 8
        assert ours[1] - ours[0] == 4 * state and ours[2] - ours[1] == 8 * state
        assert ours[2] - ours[1] < 0.6 * (plain[2] - plain[1])

    def test_what_is_counted(self):
        x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
        with watch_saved_bytes() as saved:
            y = x * w  # keeps both: 40 bytes each
            z = y * w  # keeps y, and w a second time
            assert (saved.live, saved.peak, saved.total) == (120, 120, 120)
            z.sum().backward()
            assert (saved.live, saved.peak) == (0, 120)
            del y, z
            saved.reset()
            (x * 2).exp().sum().backward()
            assert (saved.live, saved.peak, saved.total) == (0, 40, 40)

    def test_what_is_excluded(self):
        x, w = torch.ones(10, requires_grad=True), torch.ones(10)
        with watch_saved_bytes(exclude=[w]) as saved:
            kept = [x * w, x * w.view(2, 5).view(10)]
            assert saved.live == 0, "a view shares the memory"
        del kept

    def test_on_the_meta_device(self):
        x = torch.ones(1000, device="meta", requires_grad=True)
        with watch_saved_bytes(exclude=[x]) as saved:
            y = x.exp().exp()
            assert saved.live == 8000
        del y


class TestRefusals:
    @pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
    def test_steps(self, steps):
        w = torch.ones(1, requires_grad=True)
        for call in (
            lambda: run_steps(lambda i, x: x, w, steps),
            lambda: checkpointed_steps(lambda i, x: x, w, steps, []),
        ):
            with pytest.raises((ValueError, TypeError, Exception), match="steps"):
                call()

    @pytest.mark.parametrize(
        "state", [torch.ones(2, dtype=torch.long), (torch.ones(1), (torch.ones(1),)), ({"x": 1},), ()]
    )
    def test_states_that_are_nested_or_no_floats(self, state):
        w = torch.ones(1, requires_grad=True)
        with pytest.raises(TypeError, match="state|empty tuple"):
            checkpointed_steps(lambda i, x: x, state, 2, [w])

    def test_parameters(self):
        x, w = torch.ones(1), torch.ones(1, requires_grad=True)
        with pytest.raises(ValueError, match="parameter 1 requires no gradient"):
            checkpointed_steps(lambda i, s: s * w, x, 2, [w, torch.ones(1)])
        with pytest.raises(ValueError, match="parameter 1 is given twice"):
            checkpointed_steps(lambda i, s: s * w, x, 2, [w, w])
        with pytest.raises(ValueError, match="parameter 0 is given twice"):
            checkpointed_steps(lambda i, s: s * w, w, 2, [w])
        with pytest.raises(ValueError, match="use run_steps"):
            checkpointed_steps(lambda i, s: s, x, 2, [])

    def test_a_step_that_writes_into_its_state(self):
        w = torch.ones(1, requires_grad=True)
        with pytest.raises(RuntimeError, match="step 0 writes into its state"):
            checkpointed_steps(lambda i, s: s.mul_(2) * w, torch.ones(1), 2, [w])

    @pytest.mark.parametrize(
        "step", [lambda i, s: torch.cat([s, s]), lambda i, s: s.double(), lambda i, s: (s, s)]
    )
    def test_a_step_that_changes_the_form_of_its_state(self, step):
        w = torch.ones(1, requires_grad=True)
        with pytest.raises(RuntimeError, match="step 0 makes"):
            checkpointed_steps(step, torch.ones(1), 2, [w])

    def test_a_step_that_returns_nothing(self):
        w = torch.ones(1, requires_grad=True)
        with pytest.raises(TypeError, match="what step 0 returns"):
            checkpointed_steps(lambda i, s: None, torch.ones(1), 2, [w])

    def test_noise_drawn_anew(self):
        """The gradient would be that of other masks than the ones the forward pass had."""
        w, g = torch.ones(3, requires_grad=True), torch.Generator().manual_seed(0)

        def noisy(i, s):
            return s * w * torch.rand(3, generator=g)

        with pytest.raises(RuntimeError, match=re.escape("step 2 does not repeat itself")):
            checkpointed_steps(noisy, torch.ones(3), 3, [w]).sum().backward()
        checkpointed_steps(noisy, torch.ones(3), 3, [w], tolerance=None).sum().backward()

    def test_nan_does_not_pass_for_a_repetition(self):
        w = torch.ones(1, requires_grad=True)
        calls = []

        def step(i, s):
            calls.append(i)
            return s * w * (float("nan") if len(calls) > 1 else 1.0)

        with pytest.raises(RuntimeError, match="does not repeat itself"):
            checkpointed_steps(step, torch.ones(1), 1, [w]).sum().backward()

    def test_small_differences_pass(self):
        w, calls = torch.ones(1, requires_grad=True), []

        def step(i, s):
            calls.append(i)
            return s * w * (1 + 1e-5 * (len(calls) > 1))

        checkpointed_steps(step, torch.ones(1), 1, [w]).sum().backward()
        calls.clear()
        with pytest.raises(RuntimeError, match="does not repeat itself"):
            checkpointed_steps(step, torch.ones(1), 1, [w], tolerance=1e-6).sum().backward()

    def test_a_tensor_that_would_get_no_gradient(self):
        w, forgotten = torch.ones(1, requires_grad=True), torch.ones(5, requires_grad=True)
        out = checkpointed_steps(lambda i, s: s * w * forgotten.sum(), torch.ones(1), 2, [w])
        with pytest.raises(
            RuntimeError, match=re.escape("shape (5,) that requires a gradient and is not among")
        ):
            out.backward()

    def test_a_parameter_changed_before_the_backward_pass(self):
        w = torch.ones(1, requires_grad=True)
        out = checkpointed_steps(lambda i, s: s * w, torch.ones(1), 2, [w])
        with torch.no_grad():
            w.add_(1)
        with pytest.raises(RuntimeError, match="changed in place"):
            out.backward()

    def test_no_second_derivative(self):
        w = torch.ones(1, requires_grad=True)
        out = checkpointed_steps(lambda i, s: s * w, torch.ones(1), 2, [w])
        (grad,) = torch.autograd.grad(out, w, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|twice|does not require grad"):
            grad.backward()
