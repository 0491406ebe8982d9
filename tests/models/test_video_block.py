import pytest
import torch

from minilib.attention.factorised import spatial_sees, temporal_sees
from minilib.models.video import FactorisedBlock


def tiny(grid=(3, 2, 2)):
    torch.manual_seed(0)
    return FactorisedBlock(16, 2, grid)


def by_hand(block, x, frames):
    """Frame by frame, then place by place, with the layers' own softmax attention over plain sequences."""

    def attend(layer, h):
        q, k, v = layer.qkv(h).chunk(3, dim=-1)
        parts = []
        for one in range(2):
            cut = slice(8 * one, 8 * one + 8)
            parts.append((q[..., cut] @ k[..., cut].mT / 8**0.5).softmax(-1) @ v[..., cut])
        return layer.proj(torch.cat(parts, -1))

    x = x.unflatten(1, (frames, -1))
    x = x + torch.stack([attend(block.spatial, block.norm1(x[:, f])) for f in range(frames)], 1)
    places = range(x.shape[2])
    x = x + torch.stack([attend(block.temporal, block.norm2(x[:, :, p])) for p in places], 2)
    return (x + block.mlp(block.norm3(x))).flatten(1, 2)


@pytest.mark.parametrize("grid", [(3, 2, 2), (2, 5), (1, 4), (4, 1, 1)])
def test_the_block_is_the_one_written_out(grid):
    block = tiny(grid)
    n = torch.Size(grid).numel()
    x = torch.randn(2, n, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(block(x), by_hand(block, x, grid[0]), atol=1e-5)


def test_who_influences_whom():
    """Own frame and own place after both attentions: every token, through the frame's token at the same place."""
    grid, block = (3, 2, 2), tiny()
    x = torch.randn(1, 12, 16, requires_grad=True)
    spatial, temporal = spatial_sees(12, 12, grid=grid), temporal_sees(12, 12, grid=grid)
    assert ((temporal.int() @ spatial.int()) > 0).all()
    h = x + block.spatial(block.norm1(x))
    (gradient,) = torch.autograd.grad(h[0, 0].sum(), x)
    assert torch.equal(gradient[0].abs().sum(-1) > 0, spatial[0])
    (gradient,) = torch.autograd.grad((x + block.temporal(block.norm2(x)))[0, 0].sum(), x)
    assert torch.equal(gradient[0].abs().sum(-1) > 0, temporal[0])


def test_gradients_reach_every_parameter():
    block = tiny()
    block(torch.randn(2, 12, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FactorisedBlock(16, 3, (2, 2)), "3 heads do not divide"),
        (lambda: FactorisedBlock(16, 2, (2, 2, 2, 2)), "grid"),
        (lambda: tiny()(torch.zeros(1, 11, 16)), "11 tokens given, the grid"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
