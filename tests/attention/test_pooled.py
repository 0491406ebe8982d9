"""Local attention with pooled keys and values: against a dense softmax written out, pair by pair."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.attention import (
    JointAttention,
    PooledLocalAttention,
    get_attention,
    joint_mask,
    pool_grid,
    replace_attention,
)
from minilib.attention.local import local_sees


def inputs(b=2, h=2, grid=(4, 6), text=3, d=5, extra_queries=None, seed=0):
    torch.manual_seed(seed)
    n = grid[0] * grid[1]
    queries = n + (text if extra_queries is None else extra_queries)
    return [torch.randn(b, h, m, d, dtype=torch.float64) for m in (queries, n + text, n + text)]


def dense(q, k, v, attend, keys=None):
    """Every pair of query and key, pooled keys last; ``keys`` (b, m): which may be read."""
    rows, columns = attend.grid
    p, n, m = attend.pool, rows * columns, k.shape[2]

    def pooled(x):
        b, h, _, d = x.shape
        image = x[:, :, :n].transpose(2, 3).reshape(b * h, d, rows, columns)
        kernel = attend.weight.double().expand(d, 1, p, p)
        return F.conv2d(image, kernel, stride=p, groups=d).view(b, h, d, -1).transpose(2, 3)

    patches = n // p**2
    sees = torch.zeros(q.shape[2], m + patches, dtype=torch.bool)
    sees[:, :m] = local_sees(q.shape[2], m, grid=attend.grid, radius=attend.radius)
    sees[:n, m:] = True
    sees = sees.expand(len(q), 1, -1, -1)
    if keys is not None:
        sees = sees & F.pad(keys, (0, patches), value=True)[:, None, None]
    k, v = (torch.cat([x, pooled(x)], dim=2) for x in (k, v))
    logits = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~sees, -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize(
    ("grid", "radius", "pool"),
    [((4, 6), 1.5, 2), ((4, 8), 2.0, 4), ((3, 3), 1.0, 1), ((3, 6), 2.5, 3), ((4, 4), 9.0, 4)],
)
@pytest.mark.parametrize("text", [0, 3])
def test_it_is_the_dense_softmax_over_disk_text_and_patches(grid, radius, pool, text):
    attend = PooledLocalAttention(grid=grid, radius=radius, pool=pool).double()
    with torch.no_grad():
        attend.weight.normal_(generator=torch.Generator().manual_seed(1))
    q, k, v = inputs(grid=grid, text=text)
    torch.testing.assert_close(attend(q, k, v), dense(q, k, v, attend), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_padding_is_not_read_and_patches_always_are(kind):
    attend = PooledLocalAttention(grid=(4, 6), radius=2.0, pool=2).double()
    q, k, v = inputs()
    keys = joint_mask(24, torch.tensor([[True, True, False], [True, False, False]]))
    expected = dense(q, k, v, attend, keys[:, 0, 0])
    if kind == "added":
        keys = torch.zeros(keys.shape, dtype=q.dtype).masked_fill(~keys, -torch.inf)
    torch.testing.assert_close(attend(q, k, v, mask=keys), expected, atol=1e-12, rtol=0)


def test_a_context_that_only_gives_keys():
    attend = PooledLocalAttention(grid=(4, 6), radius=2.0, pool=2).double()
    q, k, v = inputs(extra_queries=0)
    torch.testing.assert_close(attend(q, k, v), dense(q, k, v, attend), atol=1e-12, rtol=0)


def test_it_starts_as_a_plain_mean_and_weighs_places_of_a_patch():
    x = torch.randn(2, 3, 24, 5, dtype=torch.float64)
    attend = PooledLocalAttention(grid=(4, 6), radius=2.0, pool=2).double()
    image = x.transpose(2, 3).reshape(6, 5, 4, 6)
    mean = F.avg_pool2d(image, 2).view(2, 3, 5, 6).transpose(2, 3)
    torch.testing.assert_close(pool_grid(x, attend.weight, (4, 6)), mean)
    corner = torch.zeros(2, 2, dtype=torch.float64)
    corner[0, 1] = 1.0  # row 0, column 1 of each patch
    picked = x.view(2, 3, 4, 6, 5)[:, :, 0::2, 1::2].flatten(2, 3)
    torch.testing.assert_close(pool_grid(x, corner, (4, 6)), picked)


def test_gradients():
    attend = PooledLocalAttention(grid=(2, 4), radius=1.5, pool=2).double()
    q, k, v = (x.requires_grad_() for x in inputs(b=1, h=1, grid=(2, 4), text=1, d=2))

    def call(weight, q, k, v):
        return torch.func.functional_call(attend, {"weight": weight}, (q, k, v))

    assert torch.autograd.gradcheck(call, (attend.weight.detach().requires_grad_(), q, k, v))


def test_it_adds_pool_squared_parameters_a_layer_and_text_queries_see_no_patch():
    model = nn.ModuleList(JointAttention(8, 2) for _ in range(2))
    before = sum(p.numel() for p in model.parameters())
    replace_attention(
        model, lambda *_: True, lambda *_: PooledLocalAttention(grid=(4, 4), radius=2.0, pool=4)
    )
    assert sum(p.numel() for p in model.parameters()) == before + 2 * 16
    q, k, v = inputs(grid=(4, 4))
    attend = PooledLocalAttention(grid=(4, 4), radius=2.0).double()
    plain = get_attention("local", grid=(4, 4), radius=2.0)(q, k, v)
    torch.testing.assert_close(attend(q, k, v)[:, :, 16:], plain[:, :, 16:])
    assert (attend(q, k, v)[:, :, :16] - plain[:, :, :16]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grid": (4, 6), "radius": 2.0, "pool": 4}, "4 x 4 do not tile grid=\\(4, 6\\)"),
        ({"grid": (4, 4), "radius": 2.0, "pool": 0}, "do not tile"),
        ({"grid": (4, 4), "radius": 0.0}, "radius must be positive"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        PooledLocalAttention(**options)


def test_inputs_that_cannot_be():
    attend = PooledLocalAttention(grid=(4, 4), radius=2.0)
    q = torch.zeros(1, 1, 18, 4)
    with pytest.raises(ValueError, match="needs 16 tokens, got 9"):
        attend(q, q[:, :, :9], q[:, :, :9])
    with pytest.raises(ValueError, match="needs queries of shape"):
        attend(q[:, :, :9], q, q)
    with pytest.raises(ValueError, match="mask of keys"):
        attend(q, q, q, mask=torch.ones(18, 18, dtype=torch.bool))
    with pytest.raises(ValueError, match="square weight"):
        pool_grid(q, torch.ones(2, 4), (4, 4))
