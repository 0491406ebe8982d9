"""Scales that depend on the diffusion time.

A layer deep in a denoiser does not know what time it is. A ``Clock``, shared by all the quantised layers of a model, does: it is
set from the model's own argument ``t`` whenever the model is called.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .quantizers import Quantizer, QuantSpec


class Clock:
    """The time of the call that is running, and the row of a table of times that it belongs to.

    A time belongs to the nearest of the table's times (to the first of two as near).

    Args:
        timesteps: the table, usually the time steps of the sampler; None: no table, the clock tells the time alone.

    Raises:
        ValueError: an empty table, or a time twice.

    >>> clock = Clock([900.0, 500.0, 100.0])
    >>> clock.set(torch.tensor([480.0, 90.0]))
    >>> clock.row
    tensor([1, 2])
    """

    def __init__(self, timesteps: Sequence[float] | Num[Tensor, " n"] | None = None) -> None:
        self.timesteps = None if timesteps is None else tuple(float(t) for t in timesteps)
        if self.timesteps is not None and len(set(self.timesteps)) != max(1, len(self.timesteps)):
            raise ValueError(
                f"a table of times needs different times, at least one; got {list(self.timesteps)}"
            )
        self.t: Tensor | None = None
        self._row: int | Tensor | None = None

    def set(self, t: float | Num[Tensor, ""] | Num[Tensor, " b"]) -> None:
        """It is now ``t``, for all samples or for each."""
        self.t = torch.as_tensor(t).detach().reshape(-1)
        self._row = None
        if self.timesteps is None:
            return
        table = torch.tensor(self.timesteps, device=self.t.device)
        rows = (self.t.to(table.dtype)[:, None] - table).abs().argmin(1)
        self._row = int(rows[0]) if bool((rows == rows[0]).all()) else rows

    @property
    def row(self) -> int | Int[Tensor, " b"]:
        """The row of this call, if it is one for all samples; else that of each.

        Raises:
            ValueError: no table, or no time yet.
        """
        if self.timesteps is None:
            raise ValueError("this clock has no table of times: give timesteps")
        if self._row is None:
            raise ValueError("no time yet: call the model that the clock is attached to, or clock.set(t)")
        return self._row

    def attach(self, model: nn.Module, argument: str = "t") -> RemovableHandle:
        """Be set by every call of ``model`` from now on; ``handle.remove()`` ends it.

        Raises:
            ValueError: the model's ``forward`` has no such argument.
        """
        names = list(inspect.signature(model.forward).parameters)
        if argument not in names:
            raise ValueError(f"{type(model).__name__}.forward has no argument {argument!r}, only {names}")
        hook = _Hook(self, argument, names.index(argument))
        return model.register_forward_pre_hook(hook, with_kwargs=True)


class _Hook:
    """A hook that a deep copy of the model takes along, with the copy's clock."""

    def __init__(self, clock: Clock, argument: str, place: int) -> None:
        self.clock, self.argument, self.place = clock, argument, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clock.set(kwargs[self.argument] if self.argument in kwargs else args[self.place])


class TimewiseQuantizer(Quantizer):
    """A static quantiser with a scale for each row of its clock's table: each time has its own range (QuEST).

    Samples of one batch may be at different times; the first axis of what passes are then the samples.

    Args:
        spec: static.
        clock: with a table of times.
        channel_axis: as ``Quantizer``.

    Raises:
        ValueError: a dynamic spec, or a clock without a table.
    """

    def __init__(self, spec: QuantSpec, clock: Clock, *, channel_axis: int = -1) -> None:
        super().__init__(spec, channel_axis=channel_axis)
        if spec.dynamic:
            raise ValueError(
                "a dynamic range follows the time by itself: a table of times needs dynamic=False"
            )
        if clock.timesteps is None:
            raise ValueError("a table of scales needs a table of times: Clock(timesteps)")
        self.clock = clock

    @property
    def rows(self) -> int:
        """One for each time of the table."""
        return len(self.clock.timesteps)

    def row(self, x: Float[Tensor, "..."]) -> int | Int[Tensor, " b"]:
        """The row of the time on the clock.

        Raises:
            ValueError: no time yet; samples at different times, and another number of samples in ``x``.
        """
        row = self.clock.row
        if not isinstance(row, int) and (x.ndim < 2 or len(x) != len(row)):
            raise ValueError(
                f"{len(row)} samples at different times, but the layer sees a tensor of shape {tuple(x.shape)}: "
                "samples must come first, or all be at one time"
            )
        return row

    def describe_rows(self, rows: list[int]) -> str:
        """For messages."""
        times = ", ".join(f"{self.clock.timesteps[i]:g}" for i in rows[:8])
        return f"{len(rows)} of {self.rows} times ({times}{', ...' if len(rows) > 8 else ''})"
