import pytest
import torch


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
