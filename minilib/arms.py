"""Run the arms of an experiment: every arm with every seed, side by side, one thread each.

On two cores two one-thread processes are worth 1.65 to 2 single ones; one two-thread process is worth less, and collapses when
anything else runs. So an experiment is a list of independent calls, and joblib's processes take them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run_arms(
    fn: Callable[[Any, int], T], arms: Mapping[str, Any], seeds: Sequence[int], n_jobs: int | None = None
) -> dict[str, list[T]]:
    """Call ``fn(setting, seed)`` for every arm and seed.

    Args:
        fn: a function of (arm's setting, seed); may be defined in a notebook. It should draw all its randomness from the seed, so
            that arms are paired: the same seed means the same data order and noise in every arm.
        arms: name -> setting.
        seeds: one entry a repetition.
        n_jobs: processes; default: ``MINILIB_JOBS``, else the cores at hand, at most 2 a call.

    Returns:
        name -> results in the order of ``seeds``. The result does not depend on ``n_jobs``.

    Raises:
        ValueError: no arm or no seed. Exceptions of ``fn`` pass through.
    """
    if not arms or not seeds:
        raise ValueError(
            f"run_arms needs at least one arm and one seed; got {len(arms)} arms, {len(seeds)} seeds"
        )
    n_jobs = n_jobs or int(os.environ.get("MINILIB_JOBS") or min(2, os.cpu_count() or 1))
    # Seeds outermost: if a run is cut short, whole paired repetitions are done rather than whole arms.
    todo = [(name, seed) for seed in seeds for name in arms]
    if n_jobs == 1:
        done = [fn(arms[name], seed) for name, seed in todo]
    else:
        from joblib import Parallel, delayed, parallel_config

        with parallel_config(backend="loky", inner_max_num_threads=1):
            done = Parallel(n_jobs=n_jobs)(delayed(_one_thread)(fn, arms[name], seed) for name, seed in todo)
    results: dict[str, list[T]] = {name: [] for name in arms}
    for (name, _), result in zip(todo, done, strict=True):
        results[name].append(result)
    return results


def _one_thread(fn: Callable[[Any, int], T], setting: Any, seed: int) -> T:
    import torch

    torch.set_num_threads(1)
    return fn(setting, seed)
