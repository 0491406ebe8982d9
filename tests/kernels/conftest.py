from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config):
    """``check_*.py`` belong to test_subprocesses.py; a run with ``--doctest-modules`` would import them all the same."""
    if collection_path.match("check_*.py") and "check_*.py" not in config.getini("python_files"):
        return True
    return None


@pytest.fixture(autouse=True)
def no_mode_from_outside(monkeypatch):
    monkeypatch.delenv("MINILIB_KERNELS", raising=False)


@pytest.fixture
def poisoned():
    """Memory that an operation allocates is full of NaN until it writes there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(before)
