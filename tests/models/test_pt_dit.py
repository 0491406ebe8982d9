"""PT-DiT: each part by hand, who hears of whom at the start and later, costs at real sizes, gradients, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilib.attention import full_attention
from minilib.models.pt_dit import PTDiT
from minilib.models.pt_dit_blocks import (
    PixArtBlock,
    Proxies,
    PTDiTBlock,
    pixart_block_flops,
    pt_dit_block_flops,
)

DIM, HEADS, GRID = 8, 2, (4, 6)
N = 24


def seeded(module, seed=0, std=0.4):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.normal_(std=std, generator=g)
    return module.double()


def block(**options):
    torch.manual_seed(0)
    return seeded(PTDiTBlock(DIM, HEADS, GRID, **({"window": (2, 2), "cell": (2, 2)} | options)))


def inputs(b=2, n=N, rows=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return make(b, n, DIM), make(b, rows, DIM)


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


def members(y, x, size):
    return [(size[0] * y + i) * GRID[1] + size[1] * x + j for i in range(size[0]) for j in range(size[1])]


def attend(layer, asks, answers):
    """Softmax attention of one image with the layer's projections, in the open."""
    heads = layer.num_heads
    if hasattr(layer, "qkv"):
        wq, wk, wv = layer.qkv.weight.chunk(3)
        bq, bk, bv = layer.qkv.bias.chunk(3)
        out = layer.proj
    else:
        wq, wk, wv, out = layer.to_q.weight, layer.to_k.weight, layer.to_v.weight, layer.to_out
        bq = bk = bv = 0
    q, k, v = asks @ wq.T + bq, answers @ wk.T + bk, answers @ wv.T + bv
    q, k, v = (p.view(len(p), heads, -1).transpose(0, 1) for p in (q, k, v))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return out((weights @ v).transpose(0, 1).reshape(len(asks), -1))


def test_proxies_by_hand():
    module, (x, _) = seeded(Proxies(DIM, HEADS, GRID, (2, 3))), inputs()
    for i, tokens in enumerate(x):
        means = torch.stack([tokens[members(y, c, (2, 3))].mean(0) for y in range(2) for c in range(2)])
        means = means + attend(module.attn, norm(means), norm(means))
        wanted = module.inject(attend(module.read, norm(tokens), norm(means)))
        torch.testing.assert_close(module(x)[i], wanted, rtol=1e-9, atol=1e-9)


def test_random_proxies_are_tokens_of_their_cells_each_at_times():
    module, (x, _) = Proxies(DIM, HEADS, GRID, (2, 2), "random").double(), inputs(b=1)
    torch.manual_seed(0)
    drawn = torch.stack([module.pick(x)[0] for _ in range(200)])
    cells = [members(y, c, (2, 2)) for y in range(2) for c in range(3)]
    for m, cell in enumerate(cells):
        hits = (drawn[:, m, None] == x[0, cell]).all(-1)
        assert hits.any(1).all() and (hits.sum(0) > 20).all()


def test_the_block_is_its_parts_in_order():
    module, (x, condition) = block(context_dim=5), inputs()
    context = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parts = (condition + module.table).unsqueeze(2)

    def branch(tokens, first, mix):
        shift, scale, gate = (parts[:, first + i] for i in range(3))
        return tokens + gate * mix(F.layer_norm(tokens, (DIM,), eps=1e-6) * (1 + scale) + shift)

    wanted = x + module.proxies(x)
    wanted = branch(wanted, 0, module.window_attn)
    wanted = branch(wanted, 3, lambda h: module.shifted_proj(module.shifted_attn(h)))
    wanted = wanted + module.text_attn(wanted, context)
    wanted = branch(wanted, 6, module.mlp)
    torch.testing.assert_close(module(x, condition, context), wanted, rtol=1e-9, atol=1e-9)


def test_windows_by_hand():
    module, (x, _) = block(), inputs(b=1)
    for y in range(2):
        for c in range(3):
            rows = members(y, c, (2, 2))
            wanted = attend(module.window_attn, x[0, rows], x[0, rows])
            torch.testing.assert_close(module.window_attn(x)[0, rows], wanted, rtol=1e-9, atol=1e-9)
    corner = attend(module.shifted_attn, x[0, [0]], x[0, [0]])
    (
        torch.testing.assert_close(module.shifted_attn(x)[0, [0]], corner, rtol=1e-9, atol=1e-9),
        "the corner is alone",
    )


def hears(module, rows=9, n=N):
    """(n, n): does token i change with token j?"""
    x, condition = inputs(b=1, n=n, rows=rows)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x, condition), x)
    return jacobian[0, :, :, 0].abs().sum((1, 3)) != 0


def same(grid, size, shift=(0, 0)):
    place = torch.cartesian_prod(*(torch.arange(s) for s in grid))
    cell = (place - torch.tensor(shift)).div(torch.tensor(size), rounding_mode="floor")
    return (cell[:, None] == cell[None]).all(-1)


def test_who_hears_of_whom():
    windows, shifted = same(GRID, (2, 2)), same(GRID, (2, 2), (1, 1))
    both = (shifted.double() @ windows.double()) > 0
    start = block()
    for linear in (start.proxies.inject, start.shifted_proj):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    assert torch.equal(hears(start), windows), "at the start: windows alone"
    nn.init.eye_(start.proxies.inject.weight)
    assert hears(start).all(), "through the proxies: everybody"
    assert torch.equal(hears(block(proxy="none")), both)
    assert torch.equal(hears(block(proxy="none", shift=False)), windows)
    assert hears(seeded(PixArtBlock(DIM, HEADS)), rows=6).all()


def test_windows_move_by_half_of_their_side():
    grid = (8, 8)
    torch.manual_seed(0)
    module = seeded(PTDiTBlock(DIM, HEADS, grid, window=(4, 4), cell=(4, 4), proxy="none"))
    both = (same(grid, (4, 4), (2, 2)).double() @ same(grid, (4, 4)).double()) > 0
    assert torch.equal(hears(module, n=64), both)


def test_pixart_block_by_hand():
    module, (x, condition) = seeded(PixArtBlock(DIM, HEADS)), inputs(rows=6)
    shift, scale, gate, *rest = (condition + module.table).unsqueeze(2).unbind(1)
    modulated = lambda t, a, b: F.layer_norm(t, (DIM,), eps=1e-6) * (1 + b) + a  # noqa: E731
    h = modulated(x, shift, scale)
    wanted = x + gate * torch.stack([attend(module.attn, tokens, tokens) for tokens in h])
    wanted = wanted + rest[2] * module.mlp(modulated(wanted, rest[0], rest[1]))
    torch.testing.assert_close(module(x, condition), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side, text", [(32, 0), (32, 120), (64, 120), (256, 120)])
def test_flops_are_the_counters_and_the_papers(side, text):
    """Width 1152; windows of 8 x 8, cells of 4 x 4."""
    d, n, m, w = 1152, side * side, side * side // 16, 64
    with torch.device("meta"):
        ours = PTDiTBlock(d, 16, (side, side), window=(8, 8), cell=(4, 4), context_dim=d if text else 0)
        full = PixArtBlock(d, 16, context_dim=d if text else 0)
        x = torch.empty(1, n, d)
        context = torch.empty(1, text, d) if text else None
    for module, rows, formula in (
        (ours, 9, pt_dit_block_flops(1, n, d, proxies=m, window=w, text=text)),
        (full, 6, pixart_block_flops(1, n, d, text=text)),
    ):
        with FlopCounterMode(display=False) as counter:
            module(x, torch.empty(1, rows, d, device="meta"), context)
        assert counter.get_total_flops() == formula
    by_token = 4 * m * d * d / n + 2 * m * m * d / n + 2 * d * d + 2 * m * d * d / n + 2 * m * d + d * d
    by_token += 8 * d * d + 4 * w * d + d * d + 8 * d * d
    by_token += (2 * d * d + 2 * text * d + 2 * text * d * d / n) if text else 0
    assert pt_dit_block_flops(1, n, d, proxies=m, window=w, text=text) == pytest.approx(
        2 * n * by_token, rel=1e-12
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"block": "pixart"}, {"proxy": "none"}, {"proxy": "random"}, {"shift": False}, {"context_dim": 6}],
)
def test_models_start_at_zero_rebuild_and_learn_everything(options):
    torch.manual_seed(0)
    model = PTDiT(input_size=8, patch_size=2, hidden_size=16, depth=2, num_heads=2, **options)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    context = torch.randn(3, 4, 6) if "context_dim" in options else torch.tensor([0, 1, 2])
    assert not model(x, t, context).any(), "the output starts at zero"
    twin = PTDiT(**model.config)
    twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        seeded(net.float()).float()
    torch.manual_seed(1)
    out = model(x, t, context)
    torch.manual_seed(1)
    assert torch.equal(out, twin(x, t, context)) and out.shape == x.shape
    out.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_a_window_that_covers_all_is_full_attention():
    module, (x, _) = block(window=(4, 6)), inputs()
    q, k, v = module.window_attn.qkv(x).view(2, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    wanted = module.window_attn.proj(full_attention(q, k, v).transpose(1, 2).reshape(2, N, DIM))
    torch.testing.assert_close(module.window_attn(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"proxy": "median"}, "unknown proxies 'median'"),
        ({"cell": 5}, "do not tile a grid"),
        ({"block": "swin"}, "unknown block 'swin'"),
        ({"patch_size": 5}, "do not tile an image"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        PTDiT(input_size=8, hidden_size=16, depth=1, num_heads=2, **options)


def test_bad_input():
    model = PTDiT(input_size=8, hidden_size=16, depth=1, num_heads=2, context_dim=6)
    with pytest.raises(ValueError, match="this model takes"):
        model(torch.zeros(1, 3, 9, 9), torch.zeros(1), torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="give context"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1), None)
    with pytest.raises(ValueError, match="unknown proxies 'none'"):
        Proxies(8, 2, (4, 4), (2, 2), "none")
