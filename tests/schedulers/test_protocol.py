"""The protocol: options, config, outputs, dtypes, generators, and errors that say what was wrong."""

import ast
import copy
import inspect
import pickle
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import minilib.schedulers as S

from .plain import S as plain

NAMES = list(S.SCHEDULERS)
WITH_BETAS = [n for n in NAMES if not n.startswith("Flow")]
SEQUENTIAL = [n for n in NAMES if n not in ("DDPMScheduler", "DDIMScheduler")]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ready(name: str, steps: int = 5, **options: object) -> S.Scheduler:
    s = S.SCHEDULERS[name](**options)
    s.set_timesteps(steps)
    return s


@pytest.mark.parametrize("name", NAMES)
class TestEveryScheduler:
    def test_constructor_names_are_those_of_diffusers(self, name: str) -> None:
        theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
        for option, value in S.SCHEDULERS[name].OPTIONS.items():
            assert option in theirs and theirs[option].default == value
        assert list(inspect.signature(S.SCHEDULERS[name]).parameters) == list(S.SCHEDULERS[name].OPTIONS)

    def test_step_takes_the_arguments_of_diffusers(self, name: str) -> None:
        ours = inspect.signature(S.SCHEDULERS[name].step).parameters
        theirs = inspect.signature(getattr(diffusers, name).step).parameters
        missing = {"variance_noise", "per_token_timesteps"} | (
            {"s_churn", "s_tmin", "s_tmax", "s_noise"} - set(ours)
        )
        assert set(theirs) - missing <= set(ours)
        assert list(ours)[:4] == ["self", "model_output", "timestep", "sample"] and "generator" in ours

    def test_unknown_option(self, name: str) -> None:
        with pytest.raises(TypeError, match="has no option.*beta_begin.*num_train_timesteps"):
            S.SCHEDULERS[name](beta_begin=0.1)

    def test_option_of_diffusers_that_is_not_here(self, name: str) -> None:
        S.SCHEDULERS[name](thresholding=False, dynamic_thresholding_ratio=0.9)
        with pytest.raises(NotImplementedError, match="thresholding=True"):
            S.SCHEDULERS[name](thresholding=True)

    def test_config(self, name: str) -> None:
        s = S.SCHEDULERS[name](num_train_timesteps=500)
        assert len(s) == s.config.num_train_timesteps == s.config["num_train_timesteps"] == 500
        assert type(s).from_config(s.config).config == s.config
        assert type(s).from_config(s.config, num_train_timesteps=100).config.num_train_timesteps == 100
        for change in (lambda: setattr(s.config, "a", 1), lambda: s.config.__setitem__("a", 1)):
            with pytest.raises(TypeError, match="read-only"):
                change()
        with pytest.raises(AttributeError, match="no option 'nothing'"):
            _ = s.config.nothing
        assert "num_train_timesteps=500" in repr(s)

    def test_config_crosses_to_diffusers_and_back(self, name: str) -> None:
        options = {"num_train_timesteps": 300}
        ours = S.SCHEDULERS[name](**options)
        theirs = getattr(diffusers, name).from_config(ours.config)
        for option, value in ours.config.items():
            assert theirs.config[option] == value
        assert S.SCHEDULERS[name].from_config(theirs.config).config == ours.config

    @pytest.mark.parametrize("other", NAMES)
    def test_config_crosses_to_another_kind(self, name: str, other: str) -> None:
        s = S.SCHEDULERS[name].from_config(S.SCHEDULERS[other](num_train_timesteps=77).config)
        assert len(s) == 77
        theirs = getattr(diffusers, other)(num_train_timesteps=77)
        assert len(S.SCHEDULERS[name].from_config(theirs.config)) == 77

    def test_step_before_set_timesteps(self, name: str) -> None:
        with pytest.raises(ValueError, match="call set_timesteps"):
            S.SCHEDULERS[name]().step(noise(1, 1, 2, 2), 999, noise(1, 1, 2, 2))

    def test_unknown_timestep(self, name: str) -> None:
        with pytest.raises(ValueError, match="t=3.5 is not in timesteps"):
            ready(name).step(noise(1, 1, 2, 2), 3.5, noise(1, 1, 2, 2))

    def test_a_timestep_for_each_sample(self, name: str) -> None:
        s = ready(name)
        with pytest.raises(ValueError, match="one timestep for the whole batch"):
            s.step(noise(2, 1, 2, 2), s.timesteps[:2], noise(2, 1, 2, 2))

    def test_wrong_shape(self, name: str) -> None:
        s = ready(name)
        with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 2, 4, 4\)"):
            s.step(noise(2, 3, 4, 4), s.timesteps[0], noise(2, 1, 4, 4))

    @pytest.mark.parametrize("steps", [0, -1, 2.5, True])
    def test_wrong_number_of_steps(self, name: str, steps: object) -> None:
        with pytest.raises(Exception, match="num_inference_steps|type"):
            S.SCHEDULERS[name]().set_timesteps(steps)

    def test_neither_or_both_tables(self, name: str) -> None:
        s, own = (
            S.SCHEDULERS[name](),
            {"sigmas": [1.0, 0.5]} if name.startswith("Flow") else {"timesteps": [5, 3]},
        )
        with pytest.raises(ValueError, match="either num_inference_steps or"):
            s.set_timesteps()
        with pytest.raises(ValueError, match="either num_inference_steps or"):
            s.set_timesteps(2, **own)
        with pytest.raises(ValueError, match="must go down"):
            s.set_timesteps(**{k: v[::-1] for k, v in own.items()})

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_is_kept(self, name: str, dtype: torch.dtype) -> None:
        s = ready(name)
        x = noise(2, 1, 4, 4, dtype=dtype) * s.init_noise_sigma
        for t in s.timesteps:
            scaled = s.scale_model_input(x, t)
            out = s.step(0.1 * scaled, t, x, generator=torch.Generator().manual_seed(0))
            assert scaled.dtype == out.prev_sample.dtype == out.pred_original_sample.dtype == dtype
            x = out.prev_sample
            assert x.isfinite().all()

    def test_half_precision_is_stepped_in_float32(self, name: str) -> None:
        s, x, m = (
            ready(name),
            noise(2, 1, 4, 4, dtype=torch.bfloat16),
            noise(2, 1, 4, 4, seed=1, dtype=torch.bfloat16),
        )
        low = s.step(m, s.timesteps[0], x, generator=torch.Generator().manual_seed(0)).pred_original_sample
        s = ready(name)
        high = s.step(m.float(), s.timesteps[0], x.float(), generator=torch.Generator().manual_seed(0))
        assert torch.equal(low, high.pred_original_sample.bfloat16())

    def test_output(self, name: str) -> None:
        s = ready(name)
        x, m, t = noise(2, 1, 4, 4), noise(2, 1, 4, 4, seed=1), s.timesteps[0]
        out = s.step(m, t, x, generator=torch.Generator().manual_seed(0))
        s.set_timesteps(5)
        pair = s.step(m, t, x, generator=torch.Generator().manual_seed(0), return_dict=False)
        assert type(pair) is tuple and torch.equal(pair[0], out.prev_sample) and torch.equal(pair[1], out[1])
        assert torch.equal(out.pred_original_sample, out[1])

    def test_inputs_are_left_alone(self, name: str) -> None:
        s = ready(name)
        x, m = noise(2, 1, 4, 4), noise(2, 1, 4, 4, seed=1)
        before = x.clone(), m.clone()
        s.step(m, s.timesteps[0], s.scale_model_input(x, s.timesteps[0]))
        assert torch.equal(x, before[0]) and torch.equal(m, before[1])

    def test_gradients_flow_through_a_step(self, name: str) -> None:
        s, x = ready(name), noise(1, 1, 2, 2, dtype=torch.float64).requires_grad_()
        s.step(
            0.3 * x, s.timesteps[0], x, generator=torch.Generator().manual_seed(0)
        ).prev_sample.sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() > 0

    def test_first_half_of_two_c_channels(self, name: str) -> None:
        x, m = noise(2, 3, 4, 4), noise(2, 6, 4, 4, seed=1)
        s = ready(name)
        both = s.step(m, s.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample
        s = ready(name)
        half = s.step(m[:, :3], s.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.equal(both, half)

    @pytest.mark.parametrize("shape", [(4,), (4, 2), (1, 1, 2, 3, 4)])
    def test_any_number_of_dimensions(self, name: str, shape: tuple) -> None:
        s, x = ready(name), noise(*shape)
        for t in s.timesteps:
            x = s.step(0.1 * x, t, x).prev_sample
        assert x.shape == shape

    def test_copies_and_pickles(self, name: str) -> None:
        s, x, m = ready(name), noise(1, 1, 2, 2), noise(1, 1, 2, 2, seed=1)
        others = copy.deepcopy(s), pickle.loads(pickle.dumps(s))
        expected = s.step(m, s.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample
        for other in others:
            assert other.config == s.config
            got = other.step(m, s.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample
            assert torch.equal(got, expected)

    def test_device_argument(self, name: str) -> None:
        s = S.SCHEDULERS[name]()
        s.set_timesteps(5, device="cpu")
        assert s.timesteps.device.type == "cpu"


@pytest.mark.parametrize("name", SEQUENTIAL)
class TestSequential:
    def test_too_many_steps(self, name: str) -> None:
        s, x = ready(name), noise(1, 1, 2, 2)
        for t in s.timesteps:
            s.step(x, t, x)
        with pytest.raises(ValueError, match="timesteps are done"):
            s.step(x, s.timesteps[-1], x)
        s.set_timesteps(5)
        s.step(x, s.timesteps[0], x)

    def test_out_of_turn(self, name: str) -> None:
        s, x = ready(name), noise(1, 1, 2, 2)
        s.step(x, s.timesteps[0], x)
        with pytest.raises(ValueError, match="the next timestep is"):
            s.step(x, s.timesteps[-1], x)

    def test_a_failed_step_does_not_count(self, name: str) -> None:
        s, x = ready(name), noise(1, 1, 2, 2)
        with pytest.raises(ValueError, match="shape"):
            s.step(noise(1, 5, 2, 2), s.timesteps[0], x)
        s.step(x, s.timesteps[0], x)

    def test_start_in_the_middle(self, name: str) -> None:
        """As for an image that is half noised: both ways of saying where."""
        s, x = ready(name, 6), noise(1, 1, 2, 2)
        start = 3 * s.order
        by_time = [x := s.step(0.1 * x, t, x).prev_sample for t in s.timesteps[start:]]
        s.set_timesteps(6)
        s.set_begin_index(start)
        x = noise(1, 1, 2, 2)
        by_index = [x := s.step(0.1 * x, t, x).prev_sample for t in s.timesteps[start:]]
        assert all(torch.equal(a, b) for a, b in zip(by_time, by_index, strict=True))


def test_heun_refuses_to_begin_in_mid_step() -> None:
    s = ready("HeunDiscreteScheduler")
    s.set_begin_index(1)
    with pytest.raises(ValueError, match="second half"):
        s.step(noise(1, 1, 2, 2), s.timesteps[1], noise(1, 1, 2, 2))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_transitions_in_any_order(name: str) -> None:
    s, x = ready(name), noise(1, 1, 2, 2)
    for t in (0, 800, 400, 400):
        s.step(x, t, x)
    assert [s.previous_timestep(t) for t in (800, 600, 0)] == [600, 400, -1]


@pytest.mark.parametrize("name", WITH_BETAS)
def test_choices_are_named(name: str) -> None:
    kind = S.SCHEDULERS[name]
    for option, known in kind.CHOICES.items():
        for value in known:
            kind(**{option: value})
        with pytest.raises(ValueError, match=f"{option} is 'nonsense'; known: .*{next(iter(known))}"):
            kind(**{option: "nonsense"})


@pytest.mark.parametrize("name", WITH_BETAS)
def test_bad_tables_and_times(name: str) -> None:
    kind = S.SCHEDULERS[name]
    with pytest.raises(ValueError, match="from 1 to 10; got 11"):
        kind(num_train_timesteps=10).set_timesteps(11)
    with pytest.raises(ValueError, match="outside 0 ... 9"):
        kind(num_train_timesteps=10).set_timesteps(timesteps=[10, 3])
    with pytest.raises(ValueError, match="outside 0 ... 9"):
        kind(num_train_timesteps=10, steps_offset=2, timestep_spacing="leading").set_timesteps(9)
    s, x = kind(), noise(2, 1, 2, 2)
    for t in (torch.tensor([0, 1000]), torch.tensor([-1, 5])):
        with pytest.raises(ValueError, match="t must lie in 0 ... 999"):
            s.add_noise(x, x, t)
    with pytest.raises(ValueError, match="num_train_timesteps must be an integer"):
        kind(num_train_timesteps=0)
    with pytest.raises(ValueError, match="trained_betas has shape"):
        kind(trained_betas=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        kind(num_train_timesteps=2, trained_betas=[0.1, 1.2])


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_integer_time_refuses_real_times(name: str) -> None:
    with pytest.raises(ValueError, match="whole training steps"):
        plain.SCHEDULERS[name]().add_noise(noise(1, 1), noise(1, 1), torch.tensor([0.5]))


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_karras_chooses_its_own_timesteps(name: str) -> None:
    with pytest.raises(ValueError, match="not timesteps"):
        S.SCHEDULERS[name](use_karras_sigmas=True).set_timesteps(timesteps=[5, 3])


def test_flow_arguments() -> None:
    with pytest.raises(ValueError, match="shift must be positive"):
        S.FlowMatchEulerDiscreteScheduler(shift=0.0)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        S.FlowMatchEulerDiscreteScheduler().set_timesteps(sigmas=[1.2, 0.5])


def test_shifts_multiply() -> None:
    s = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    assert (S.shift_sigmas(S.shift_sigmas(s, 3.0), 2.0) - S.shift_sigmas(s, 6.0)).abs().max() < 1e-12


def test_learned_range_needs_two_c_channels() -> None:
    s, x = ready("DDPMScheduler", variance_type="learned_range"), noise(1, 3, 2, 2)
    with pytest.raises(ValueError, match="6 output channels"):
        s.step(x, s.timesteps[0], x)


def test_eta_outside_0_1() -> None:
    s, x = ready("DDIMScheduler"), noise(1, 1, 2, 2)
    for eta in (-0.1, 3.0):
        with pytest.raises(ValueError, match="eta must lie between 0 and 1"):
            s.step(x, 400, x, eta=eta)


@pytest.mark.parametrize(
    ("name", "extra"),
    [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0}), ("EulerDiscreteScheduler", {"s_churn": 1.0})],
)
def test_generators(name: str, extra: dict) -> None:
    """One generator: reproducible. A list: each sample has its own, whatever the batch around it."""
    x, m = noise(3, 1, 4, 4), noise(3, 1, 4, 4, seed=1)

    def draw(generator: object, rows: slice = slice(None)) -> torch.Tensor:
        s = ready(name)
        return s.step(m[rows], s.timesteps[0], x[rows], generator=generator, **extra).prev_sample

    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(draw(seeded[0]), draw(seeded[1]))
    batch = draw([torch.Generator().manual_seed(k) for k in range(3)])
    alone = draw([torch.Generator().manual_seed(2)], slice(2, 3))
    assert torch.equal(batch[2:], alone)
    with pytest.raises(ValueError, match="got 1 generators for a batch of 3"):
        draw([torch.Generator()])
    torch.manual_seed(0)
    a = draw(None)
    torch.manual_seed(0)
    assert torch.equal(a, draw(None)) and not torch.equal(a, draw(None))


def test_config_of_another_author_is_refused() -> None:
    with pytest.raises(TypeError, match="no option.*sharpness"):
        S.DDIMScheduler.from_config({"sharpness": 3})
    theirs = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    with pytest.raises(ValueError, match="algorithm_type is 'sde-dpmsolver"):
        S.DPMSolverMultistepScheduler.from_config(theirs.config)


def test_import_is_light() -> None:
    """Nothing behind the import but the standard library, numpy, torch and jaxtyping."""
    for file in Path(S.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            roots = {n.split(".")[0] for n in names}
            assert roots <= {*sys.stdlib_module_names, "numpy", "torch", "jaxtyping"}, (file.name, roots)
