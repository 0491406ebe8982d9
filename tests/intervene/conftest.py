import pytest
import torch
from snapshots import assert_untouched, bits, structure
from torch import nn
from toys import Residual, randomise

from minilib.models import DiT


@pytest.fixture(scope="module")
def shared_model():
    return randomise(DiT(input_size=4, hidden_size=16, depth=3, num_heads=2))


@pytest.fixture
def model(shared_model):
    before = structure(shared_model), bits(shared_model)
    yield shared_model
    shared_model.zero_grad()
    assert_untouched(shared_model, before)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 4, 4, generator=g), torch.tensor([3.0, 800.0]), torch.tensor([1, 10])


@pytest.fixture
def others():
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 1, 4, 4, generator=g), torch.tensor([40.0, 500.0]), torch.tensor([7, 2])


@pytest.fixture
def stack():
    return randomise(nn.Sequential(*(Residual() for _ in range(3))), 0.5)
