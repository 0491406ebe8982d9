import os

import pytest


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, poisoned):
    """Every check here runs the Triton path, interpreted; what it allocates is NaN until written."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run these with TRITON_INTERPRET=1"
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
