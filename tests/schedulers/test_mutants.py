"""Do the oracles see a bug? Each mutant is a copy of the package with one line broken; a check must fail on it.

A mutant counts as seen only if an assertion of an oracle fails; a crash would not do. The line must occur exactly once in its
file, so a mutant cannot quietly become no mutant when the code changes.
"""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import minilib.schedulers

from .oracles import CHECKS

SOURCE = Path(minilib.schedulers.__file__).parent

MUTANTS = {
    "sign of epsilon in x_0": (
        "conversion.py",
        "return 1 / alpha, -sigma / alpha",
        "return 1 / alpha, sigma / alpha",
    ),
    "sign of v in x_0": ("conversion.py", "else (alpha, -sigma)", "else (alpha, sigma)"),
    "sign of v in eps": ("conversion.py", "else (sigma, alpha)", "else (-sigma, alpha)"),
    "sign of v in the target": (
        "conversion.py",
        "else alpha * noise - sigma * x0",
        "else sigma * x0 - alpha * noise",
    ),
    "swapped coefficients of eps": (
        "conversion.py",
        "return 1 / sigma, -alpha / sigma",
        "return 1 / alpha, -sigma / alpha",
    ),
    "forward process without a root": ("noising.py", "(1 - alpha_bar).sqrt().to", "(1 - alpha_bar).to"),
    "forward process one step late": ("noising.py", "_f64.index_select(", "_f64.roll(1).index_select("),
    "beta added instead of multiplied": (
        "noising.py",
        "(1 - betas).cumprod(0)\n",
        "1 - betas.cumsum(0).clamp(max=0.999)\n",
    ),
    "trailing off by one": ("schedules.py", "[:count]) - 1", "[:count]) - 2"),
    "leading off by one": ("schedules.py", "np.arange(steps - 1, -1, -1)", "np.arange(steps, 0, -1)"),
    "linspace misses the end": (
        "schedules.py",
        "np.linspace(0, last - 1, steps)",
        "np.linspace(0, last - 2, steps)",
    ),
    "cosine without its offset": ("schedules.py", "torch.cos((u + 0.008) / 1.008 * ", "torch.cos(u * "),
    "scaled linear without a square": ("schedules.py", "dtype=torch.float64) ** 2", "dtype=torch.float64)"),
    "zero SNR not scaled back": ("schedules.py", "* root[0] / (root[0] - root[-1])", "* 1.0"),
    "previous timestep by formula": (
        "transitions.py",
        "zip(times, [*times[1:], -1]",
        "zip(times, [max(t - total // steps, -1) for t in times]",
    ),
    "swapped alphas": ("transitions.py", "alpha_prev=math.sqrt(bar_prev)", "alpha_prev=math.sqrt(bar)"),
    "swapped sigmas": (
        "transitions.py",
        "sigma_prev=math.sqrt(1 - bar_prev)",
        "sigma_prev=math.sqrt(1 - bar)",
    ),
    "beta upside down": ("transitions.py", "beta = 1 - bar / bar_prev", "beta = 1 - bar"),
    "variance of the wrong level": (
        "transitions.py",
        "variance=(1 - bar_prev) / (1 - bar) * beta",
        "variance=beta",
    ),
    "last step ends at the wrong level": (
        "transitions.py",
        "if previous >= 0 else self.final_alpha_bar",
        "if previous >= 0 else bar",
    ),
    "noise added in the last step": ("ddpm.py", "if row.previous >= 0:", "if True:"),
    "no noise at all": ("ddpm.py", "if row.previous >= 0:", "if False:"),
    "variance instead of deviation": ("ddpm.py", "return math.sqrt(row.variance)", "return row.variance"),
    "large variance without a root": ("ddpm.py", "return math.sqrt(row.beta)", "return row.beta"),
    "learned range upside down": ("ddpm.py", "0.25 * (large - small) * v", "0.25 * (small - large) * v"),
    "learned variance as deviation": ("ddpm.py", "v + 0.25 * (large + small))", "v + 0.5 * (large + small))"),
    "posterior mean without a root": ("ddpm.py", "math.sqrt(1 - row.beta) *", "(1 - row.beta) *"),
    "eta without the root": ("ddim.py", "eta * math.sqrt(row.variance)", "eta * row.variance"),
    "direction ignores the noise": (
        "ddim.py",
        "left = row.sigma_prev**2 - std**2",
        "left = row.sigma_prev**2",
    ),
    "DDIM from the wrong alpha": (
        "ddim.py",
        "affine(row.alpha_prev, x0, row.sigma_prev,",
        "affine(row.alpha, x0, row.sigma_prev,",
    ),
    "Euler the other way round": (
        "euler.py",
        "torch.lerp(x0, x, next_sigma / sigma)",
        "torch.lerp(x, x0, next_sigma / sigma)",
    ),
    "Heun without the mean": (
        "heun.py",
        "torch.lerp(self._begun_at, prev, 0.5)",
        "torch.lerp(self._begun_at, prev, 1.0)",
    ),
    "Heun with Euler's second slope": ("heun.py", "(2 * after - s) / after", "after / s"),
    "model input not scaled": (
        "sigmas.py",
        "return scaled(self._input_scale[self._locate(timestep)],",
        "return scaled(1.0,",
    ),
    "model input scaled twice": (
        "euler.py",
        "[1 / math.hypot(s, 1.0) for s in sigmas[:-1]]",
        "[1 / (s * s + 1.0) for s in sigmas[:-1]]",
    ),
    "first noise without the image": ("sigmas.py", "else math.hypot(largest, 1.0)", "else largest"),
    "sigma without a root": ("sigmas.py", "np.sqrt((1 - bar) / bar)", "(1 - bar) / bar"),
    "2M with the wrong half": ("dpmsolver.py", "line = 0.5 * on_x0", "line = on_x0"),
    "2M with the ratio upside down": (
        "dpmsolver.py",
        "on_change = line * h / h_before",
        "on_change = line * h_before / h",
    ),
    "2M looks ahead": ("dpmsolver.py", "x0 - self._previous_x0", "self._previous_x0 - x0"),
    "2M forgets": ("dpmsolver.py", "self._previous_x0 = x0", "self._previous_x0 = None"),
    "2M starts too late": ("dpmsolver.py", "solver_order == 1 or i == 0", "solver_order == 1 or i <= 1"),
    "flow runs uphill": ("flow_match.py", "FlowLevel(s, after - s)", "FlowLevel(s, s - after)"),
    "flow shift upside down": (
        "flow_match.py",
        "shift * sigmas / (1 + (shift - 1) * sigmas)\n\n",
        "sigmas / (shift - (shift - 1) * sigmas)\n\n",
    ),
    "flow x_0 with the wrong sign": (
        "flow_match.py",
        "affine(1.0, x, -sigma, output)",
        "affine(1.0, x, sigma, output)",
    ),
    "flow noises the wrong way": (
        "flow_match.py",
        "torch.lerp(original_samples, noise,",
        "torch.lerp(noise, original_samples,",
    ),
    "inversion at the wrong level": (
        "inversion.py",
        "affine(row.alpha, clean, row.sigma,",
        "affine(row.alpha_prev, clean, row.sigma_prev,",
    ),
    "inversion from noise": ("inversion.py", "in reversed(table.transitions)", "in table.transitions"),
    "posterior of the wrong step": (
        "posterior.py",
        "scheduler.alpha_bar((t - 1).clamp(min=0))",
        "scheduler.alpha_bar(t)",
    ),
    "posterior mean swapped": (
        "posterior.py",
        "return on_x0 * x0 + on_x * x_t,",
        "return on_x0 * x_t + on_x * x0,",
    ),
    "posterior range upside down": ("posterior.py", "0.5 * (large - small) * v", "0.5 * (small - large) * v"),
}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = []

    def build(file: str | None = None, old: str = "", new: str = "") -> ModuleType:
        name = f"schedulers_mutant_{tmp_path.name.replace('-', '_')}"
        shutil.copytree(SOURCE, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        if file:
            text = (tmp_path / name / file).read_text()
            assert text.count(old) == 1, f"{file}: {old!r} occurs {text.count(old)} times"
            (tmp_path / name / file).write_text(text.replace(old, new))
        made.append(name)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield build
    for module in [m for m in sys.modules if m.split(".")[0] in made]:
        del sys.modules[module]


def failing(package: ModuleType) -> list[str]:
    """Names of the checks that see something wrong."""
    seen = []
    for name, check in CHECKS.items():
        try:
            check(package)
        except AssertionError:
            seen.append(name)
            break
        except ValueError:
            continue  # refused by an error of ours: safe, but no oracle's doing
    return seen


def test_the_copy_without_a_mutation_passes(build) -> None:
    package = build()
    for check in CHECKS.values():
        check(package)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_seen(build, mutant: str) -> None:
    assert failing(build(*MUTANTS[mutant])), f"no oracle notices: {mutant}"
