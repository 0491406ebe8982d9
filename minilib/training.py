"""Training: one loop for every page and every zoo model, on Hugging Face accelerate.

All the randomness of step ``k`` is drawn by ``make_batch`` from a generator seeded with ``(seed, k)``, for the *global*
batch, and each process then takes its slice. Three things follow, and the tests hold them: a resumed run ends with the same
weights as an uninterrupted one; two processes compute the gradients of one with the whole batch; arms with equal seeds see
equal data and noise.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minilib.resources import atomic_write

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Tensor]
MakeBatch = Callable[[torch.Generator, int], Batch]
LossFn = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class FitConfig:
    """The recipe. Defaults are what two CPU cores like best for models of about a million parameters."""

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay_fraction: float = 0.4
    clip: float = 1.0
    ema_decay: float = 0.995
    seed: int = 0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps and batch_size must be at least 1; got {self.steps} and {self.batch_size}"
            )
        if not 0.0 <= self.decay_fraction <= 1.0 or not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(
                f"decay_fraction must be in [0, 1] and ema_decay in [0, 1); got {self.decay_fraction}, {self.ema_decay}"
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"unknown mixed_precision {self.mixed_precision!r}; expected 'no' or 'bf16'")

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then constant, then linear decay to zero over the last ``decay_fraction`` of the steps."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        decay_steps = self.decay_fraction * self.steps
        left = (self.steps - step) / decay_steps if decay_steps >= 1 else 1.0
        return warm * min(1.0, left)


@dataclass
class FitResult:
    """The trained model, its exponential moving average (sample from this one), and the loss of every step."""

    model: nn.Module
    ema: nn.Module
    history: list[float] = field(default_factory=list)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random source of one step: a function of seed and step alone, so nothing needs to be saved to resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63 - 1))


def fit(
    model: nn.Module,
    loss_fn: LossFn,
    make_batch: MakeBatch,
    config: FitConfig,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 0,
    callback: Callable[[int, nn.Module, float], None] | None = None,
    callback_every: int = 0,
    progress: str = "",
    device: torch.device | str | None = None,
) -> FitResult:
    """Train ``model`` in place with fused AdamW, gradient clipping, warm-up and decay; keep an EMA.

    Args:
        loss_fn: ``(model, batch) -> scalar``, deterministic given the batch.
        make_batch: ``(generator, n) -> dict of tensors`` of length n, with all randomness of the step in it (noise, time, drops).
        config: the recipe. ``batch_size`` is the global batch, shared by all processes of ``accelerate launch``.
        checkpoint: a ``.safetensors`` file. If it exists, training goes on from it (same recipe required).
        checkpoint_every: steps between checkpoints; 0 writes one only at the end.
        callback: ``(step, ema, loss)``, called every ``callback_every`` steps and at the end.
        progress: label of the progress bar; empty for none. It is quiet where nobody watches (CI, papermill).
        device: where to train; default: accelerate's choice.

    Raises:
        FloatingPointError: the loss is not finite. ValueError: the batch does not divide among the processes, or the checkpoint
            belongs to another recipe or model.
    """
    accelerator = _accelerator(config, device)
    share = _share(config.batch_size, accelerator)
    ema = copy.deepcopy(model).to(accelerator.device).requires_grad_(False).eval()
    model.train()
    wrapped = accelerator.prepare(model)
    inner = accelerator.unwrap_model(wrapped)
    params = [p for p in inner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    start, history = 0, []
    if checkpoint and Path(checkpoint).is_file():
        start, history = load_checkpoint(checkpoint, inner, ema, optimizer, config)

    pending: list[Tensor] = []
    for step in _bar(range(start, config.steps), progress, start, config.steps):
        batch = make_batch(step_generator(config.seed, step), config.batch_size)
        batch = {key: value[share].to(accelerator.device) for key, value in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.lr_factor(step)
        with accelerator.autocast():
            loss = loss_fn(wrapped, batch)
        accelerator.backward(loss)
        if config.clip:
            accelerator.clip_grad_norm_(params, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, inner, config.ema_decay, step)
        pending.append(loss.detach())

        last = step + 1 == config.steps
        if last or len(pending) == 100:
            history += _finite(pending, step)
            pending = []
        due = checkpoint and (last or (checkpoint_every and (step + 1) % checkpoint_every == 0))
        if due:
            history += _finite(pending, step)
            pending = []
            if accelerator.is_main_process:
                save_checkpoint(checkpoint, inner, ema, optimizer, config, step + 1, history)
        if callback and callback_every and (last or (step + 1) % callback_every == 0):
            callback(step + 1, ema, float(loss.detach()))
    inner.eval()
    return FitResult(inner, ema, history)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """``ema <- d ema + (1 - d) model`` with ``d = min(decay, (1 + step) / (10 + step))``: short runs are not held back by it."""
    d = min(decay, (1 + step) / (10 + step))
    averaged, current = list(ema.parameters()), list(model.parameters())
    torch._foreach_lerp_(averaged, current, 1.0 - d)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    step: int,
    history: list[float],
) -> None:
    """Everything a resumed run needs, in one safetensors file, written whole or not at all."""
    from safetensors.torch import save

    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors["history"] = torch.tensor(history, dtype=torch.float64)
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    atomic_write(path, save(tensors, {"step": str(step), "config": _fingerprint(config)}))


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
) -> tuple[int, list[float]]:
    """Restore a run; returns the next step and the losses so far."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if meta.get("config") != _fingerprint(config):
        raise ValueError(
            f"{path} was written by another recipe ({meta.get('config')}); this one is {_fingerprint(config)}. "
            "Remove the file to start afresh, or use the recipe it was started with."
        )
    for prefix, module in (("model.", model), ("ema.", ema)):
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    full = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})
    return int(meta["step"]), tensors["history"].tolist()


def _fingerprint(config: FitConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True)


def _accelerator(config: FitConfig, device: torch.device | str | None) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # accelerate keeps one state a process; a page may train one model in float32 and the next in bf16.
    AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    cpu = str(device) == "cpu" if device is not None else not torch.cuda.is_available()
    return Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)


def _share(batch_size: int, accelerator: Accelerator) -> slice:
    world, rank = accelerator.num_processes, accelerator.process_index
    if batch_size % world:
        raise ValueError(
            f"a global batch of {batch_size} does not divide among {world} processes; use a multiple of {world}"
        )
    size = batch_size // world
    return slice(rank * size, (rank + 1) * size)


def _finite(losses: list[Tensor], step: int) -> list[float]:
    values = torch.stack(losses).float().tolist() if losses else []
    for place, value in enumerate(values):
        if not math.isfinite(value):
            at = step - len(values) + 1 + place
            raise FloatingPointError(f"the loss is {value} at step {at}; lower lr, or check the data for NaN")
    return values


def _bar(steps: Iterable[int], label: str, start: int, total: int) -> Iterable[int]:
    if not label or not progress_wanted():
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc=label, initial=start, total=total, mininterval=1.0, leave=False)


def progress_wanted() -> bool:
    """Whether somebody watches: a terminal, or a live notebook. Never in CI or under papermill (``MINILIB_PROGRESS=0``)."""
    if os.environ.get("MINILIB_PROGRESS") is not None:
        return os.environ["MINILIB_PROGRESS"] != "0"
    if os.environ.get("CI"):
        return False
    shell: Any = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return sys.stderr.isatty() or (shell is not None and hasattr(shell, "kernel"))
