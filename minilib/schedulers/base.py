"""What every scheduler shares: options read by name, a read-only config, one output type, and the place in the table.

A scheduler is a table of noise levels and a rule that goes from one level to the next. The table is made in float64 by
``set_timesteps``; ``step`` then only looks up Python floats. So a step is two to six tensor operations.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

Timestep = int | float | Tensor
Generators = torch.Generator | list[torch.Generator] | None
Kind = TypeVar("Kind", bound="Scheduler")
HALF = (torch.float16, torch.bfloat16)

ANY = object()
# Options of diffusers that are not implemented here, with the value at which they do nothing (ANY: they only refine another).
NOT_IMPLEMENTED: dict[str, Any] = {
    "thresholding": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    **dict.fromkeys(["dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"], ANY),
    **dict.fromkeys(["base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"], ANY),
}


class SchedulerOutput(NamedTuple):
    """``prev_sample``: x at the next, less noisy level. ``pred_original_sample``: the x_0 that the step aimed at."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Config(dict[str, Any]):
    """Constructor options; read as attributes or as a dict, never written."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no option {name!r}; known: {sorted(self)}") from None

    def _refuse(self, *_: object) -> None:
        raise TypeError(
            "config is read-only; build another scheduler: type(s).from_config(s.config, option=value)"
        )

    __setattr__ = __setitem__ = __delitem__ = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return Config, (dict(self),)


def choose(option: str, value: Any, known: Iterator[Any] | Mapping[str, Any] | tuple[Any, ...]) -> None:
    """Refuse a value that is not among the known ones.

    >>> choose("beta_schedule", "cubic", ("linear", "scaled_linear"))
    Traceback (most recent call last):
    ValueError: beta_schedule is 'cubic'; known: 'linear', 'scaled_linear'
    """
    if value not in known:
        raise ValueError(f"{option} is {value!r}; known: {', '.join(map(repr, known))}")


class Scheduler:
    """Base class. ``OPTIONS`` maps each constructor option to its default, ``CHOICES`` an option to its legal values."""

    OPTIONS: ClassVar[dict[str, Any]] = {}
    CHOICES: ClassVar[dict[str, Any]] = {}
    order: ClassVar[int] = 1
    init_noise_sigma: float = 1.0
    timesteps: Tensor

    def __init_subclass__(cls) -> None:
        kind = inspect.Parameter.KEYWORD_ONLY
        cls.__signature__ = inspect.Signature(
            [inspect.Parameter(name, kind, default=value) for name, value in cls.OPTIONS.items()]
        )

    def __init__(self, **options: Any) -> None:
        unknown = sorted(name for name in options if name not in {**self.OPTIONS, **NOT_IMPLEMENTED})
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {unknown}; known: {sorted(self.OPTIONS)}")
        for name in [n for n in options if n not in self.OPTIONS]:
            value, neutral = options.pop(name), NOT_IMPLEMENTED[name]
            if neutral is not ANY and value != neutral:
                raise NotImplementedError(
                    f"{name}={value!r} is not implemented here; only {name}={neutral!r} is"
                )
        self.config = Config({**self.OPTIONS, **options})
        for name, known in self.CHOICES.items():
            choose(name, self.config[name], known)
        if not isinstance(self.config.num_train_timesteps, int) or self.config.num_train_timesteps < 1:
            raise ValueError(
                f"num_train_timesteps must be an integer >= 1; got {self.config.num_train_timesteps!r}"
            )
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls: type[Kind], config: Mapping[str, Any], **changes: Any) -> Kind:
        """Build from another scheduler's config, ours or diffusers'.

        Options that only that scheduler has are dropped; None stands for the default.

        Raises:
            TypeError: an option that no scheduler has. NotImplementedError: one of diffusers' that matters and is not here.
        """
        foreign = {name for kind in _kinds(Scheduler) for name in kind.OPTIONS} - set(cls.OPTIONS)
        kept = {k: v for k, v in config.items() if not (k.startswith("_") or k in foreign or v is None)}
        return cls(**{**kept, **changes})

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """What the model is shown in place of ``sample``: here, the sample itself."""
        return sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.items())})"


def _kinds(kind: type[Scheduler]) -> Iterator[type[Scheduler]]:
    for child in kind.__subclasses__():
        yield child
        yield from _kinds(child)
