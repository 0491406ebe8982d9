import os

import pytest
import torch

from minilib.arms import run_arms


def work(setting, seed):
    generator = torch.Generator().manual_seed(seed)
    return setting * torch.rand(1, generator=generator).item(), torch.get_num_threads(), os.getpid()


def test_arms_are_paired_ordered_and_independent_of_the_number_of_processes():
    alone, together = (run_arms(work, {"a": 1.0, "b": 2.0}, [3, 4, 5], n_jobs=n) for n in (1, 2))
    for name in ("a", "b"):
        assert [r[0] for r in alone[name]] == [r[0] for r in together[name]]
    assert [2 * r[0] for r in alone["a"]] == pytest.approx([r[0] for r in alone["b"]])
    everything = [r for results in together.values() for r in results]
    assert {r[1] for r in everything} == {1}
    assert os.getpid() not in {r[2] for r in everything}


def test_functions_without_a_module_can_be_arms():
    assert run_arms(lambda setting, seed: setting + seed, {"a": 10}, [1, 2], n_jobs=2) == {"a": [11, 12]}


def test_failures_and_empty_requests_are_loud():
    with pytest.raises(ZeroDivisionError):
        run_arms(lambda setting, seed: 1 / 0, {"a": 1}, [0], n_jobs=2)
    with pytest.raises(ValueError, match="at least one arm"):
        run_arms(work, {}, [0])
    with pytest.raises(ValueError, match="seed"):
        run_arms(work, {"a": 1}, [])
