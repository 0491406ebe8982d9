"""DiT written a second time, from the paper's equations, as one function of the official state dict's names. In float64."""

import math

import numpy as np
import torch


def sincos_positions(dim, grid):
    """Column first, then row; sines, then cosines; wavelengths from 2 pi to 10000 * 2 pi."""
    table = np.zeros((grid * grid, dim))
    quarter = dim // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                omega = 10000.0 ** (-i / quarter)
                values = (
                    math.sin(column * omega),
                    math.cos(column * omega),
                    math.sin(row * omega),
                    math.cos(row * omega),
                )
                for part, value in enumerate(values):
                    table[row * grid + column, part * quarter + i] = value
    return torch.from_numpy(table)


def random_state(
    *, hidden=16, depth=2, patch=2, channels=3, grid=3, classes=5, ratio=4, learn_sigma=True, seed=0
):
    """A random checkpoint: every tensor is non-zero, the modulations too."""
    g = torch.Generator().manual_seed(seed)
    state = {"pos_embed": sincos_positions(hidden, grid)[None].float()}

    def linear(name, out, *fan_in):
        state[f"{name}.weight"] = torch.randn(out, *fan_in, generator=g) * 0.8 / math.sqrt(math.prod(fan_in))
        state[f"{name}.bias"] = torch.randn(out, generator=g) * 0.3

    linear("x_embedder.proj", hidden, channels, patch, patch)
    linear("t_embedder.mlp.0", hidden, 256)
    linear("t_embedder.mlp.2", hidden, hidden)
    state["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, hidden, generator=g)
    for i in range(depth):
        linear(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        linear(f"blocks.{i}.attn.proj", hidden, hidden)
        linear(f"blocks.{i}.mlp.fc1", int(ratio * hidden), hidden)
        linear(f"blocks.{i}.mlp.fc2", hidden, int(ratio * hidden))
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * hidden, hidden)
    linear("final_layer.linear", patch * patch * channels * (2 if learn_sigma else 1), hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return state


def forward(state, x, t, y, *, heads):
    """The official model's output for images x, times t, labels y."""
    state, x = {k: v.double() for k, v in state.items()}, x.double()

    def linear(name, a):
        return a @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(a):
        a = a - a.mean(-1, keepdim=True)
        return a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(a):
        return a / (1 + (-a).exp())

    def gelu_tanh(a):
        return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))

    kernel = state["x_embedder.proj.weight"]
    hidden, _, p, _ = kernel.shape
    h = (
        torch.nn.functional.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=p)
        .flatten(2)
        .transpose(1, 2)
    )
    h = h + state["pos_embed"]

    omega = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = t.double()[:, None] * omega
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    c = silu(c + state["y_embedder.embedding_table.weight"][y])

    depth = sum(k.endswith("attn.qkv.weight") for k in state)
    for i in range(depth):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            m[..., j * hidden : (j + 1) * hidden] for j in range(6)
        )
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale1) + shift1)
        q, k, v = (a.unflatten(-1, (heads, -1)) for a in qkv.split(hidden, -1))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(math.sqrt(hidden // heads)).softmax(-1)
        h = h + gate1 * linear(
            f"blocks.{i}.attn.proj", torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
        )
        z = linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale2) + shift2)
        h = h + gate2 * linear(f"blocks.{i}.mlp.fc2", gelu_tanh(z))

    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].split(hidden, -1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    grid = int(out.shape[1] ** 0.5)
    out = out.view(len(x), grid, grid, p, p, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, grid * p, grid * p)
