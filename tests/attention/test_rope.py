import math

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from minilib.attention.rope import RotaryEmbedding, apply_rotary, grid_ids, rotary_frequencies


def vectors(n=6, dim=12, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, n, dim, generator=g, dtype=dtype)


def places(n=6, axes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, axes, generator=g, dtype=torch.float64) * 5


@pytest.mark.parametrize("axes, dim", [(1, 6), (2, 12), (3, 12)])
class TestProperties:
    def test_products_depend_on_differences_only(self, axes, dim):
        rotary = RotaryEmbedding(dim, axes)
        q, k, ids = vectors(dim=dim), vectors(dim=dim, seed=1), places(axes=axes)
        shift = torch.tensor([3.0, -7.5, 40.0], dtype=torch.float64)[:axes]

        def logits(ids):
            table = rotary(ids)
            return apply_rotary(q, table) @ apply_rotary(k, table).transpose(-1, -2)

        torch.testing.assert_close(logits(ids + shift), logits(ids), atol=1e-5, rtol=0)
        scaled = shift.new_tensor([1.0, 1.0, 1.3][-axes:])
        assert (logits(ids * scaled) - logits(ids)).abs().max() > 0.1, (
            "differences do matter, on the last axis"
        )

    def test_norm_and_origin(self, axes, dim):
        rotary, x = RotaryEmbedding(dim, axes), vectors(dim=dim)
        turned = apply_rotary(x, rotary(places(axes=axes)))
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=0)
        assert (turned - x).abs().max() > 0.1
        assert torch.equal(apply_rotary(x, rotary(torch.zeros(6, axes))), x)

    def test_two_turns_add_up(self, axes, dim):
        rotary, x = RotaryEmbedding(dim, axes), vectors(dim=dim)
        a, b = places(axes=axes), places(axes=axes, seed=1)
        twice = apply_rotary(apply_rotary(x, rotary(a)), rotary(b))
        torch.testing.assert_close(twice, apply_rotary(x, rotary(a + b)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("axes_dims", [[12], [8, 4], [2, 4, 6]])
@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_against_diffusers_flux(axes_dims, theta):
    x, ids = vectors(), places(axes=len(axes_dims))
    rotary = RotaryEmbedding(12, len(axes_dims), theta=theta, axes_dims=axes_dims)
    expected = apply_rotary_emb(x.float(), FluxPosEmbed(theta, axes_dims)(ids.float()))
    ours = apply_rotary(x.float(), rotary(ids.float()))
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_closed_form():
    """Axis 1 at position 3 with theta 100: angles 3 and 0.3 on the second half, nothing on the first."""
    rotary = RotaryEmbedding(8, theta=100.0)
    x = torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 1], dtype=torch.float64).view(1, 1, 1, 8)
    turned = apply_rotary(x, rotary(torch.tensor([[0, 3]]))).flatten()
    c, s = math.cos, math.sin
    expected = torch.tensor([1, 0, 1, 0, c(3), s(3), -s(0.3), c(0.3)], dtype=torch.float64)
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


def test_every_sample_its_own_positions():
    rotary, x = RotaryEmbedding(12), vectors()
    ids = torch.stack([places(), places(seed=1)])
    both = apply_rotary(x, rotary(ids))
    for i in range(2):
        assert torch.equal(both[i : i + 1], apply_rotary(x[i : i + 1], rotary(ids[i])))


def test_far_positions_are_exact():
    """At position 100,003 the fastest wave's float32 angle would be off by up to 0.004."""
    table = RotaryEmbedding(4, 1)(torch.tensor([[100_003]]))
    assert abs(float(table[0, 0].real) - math.cos(100_003)) < 1e-6


def test_half_precision_is_turned_in_float32():
    table = RotaryEmbedding(12)(places())
    x = vectors(dtype=torch.float32).bfloat16()
    out = apply_rotary(x, table)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rotary(x.float(), table).bfloat16())


def test_gradient():
    table = RotaryEmbedding(4)(places(3))
    x = vectors(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, table), x, fast_mode=True, atol=1e-5)


def test_scaling_changes_the_frequencies_of_its_axis():
    rotary, ids = RotaryEmbedding(12), places()
    plain = rotary(ids)
    rotary.scaling = lambda frequencies, axis: frequencies / 2 if axis == 1 else frequencies
    torch.testing.assert_close(rotary(ids * torch.tensor([1, 2])), plain, atol=1e-6, rtol=0)
    assert (rotary(ids) - plain)[:, 3:].abs().max() > 0.1
    rotary.scaling = None
    assert torch.equal(rotary(ids), plain)


def test_frequencies_and_grid():
    torch.testing.assert_close(
        rotary_frequencies(6, theta=1000.0), torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    )
    assert grid_ids(2, 2, 2)[5].tolist() == [1, 0, 1]
    assert not list(RotaryEmbedding(4).state_dict())


class TestErrors:
    @pytest.mark.parametrize(
        "args, options",
        [((6, 2), {}), ((12, 5), {}), ((12, 2), {"axes_dims": [6, 4]}), ((12, 3), {"axes_dims": [6, 6]})],
    )
    def test_shares(self, args, options):
        with pytest.raises(ValueError, match=f"a head of width {args[0]} cannot be shared by {args[1]} axes"):
            RotaryEmbedding(*args, **options)

    def test_axes(self):
        with pytest.raises(ValueError, match="position ids of 3 axes given, this embedding has 2"):
            RotaryEmbedding(8)(torch.zeros(4, 3))

    def test_odd(self):
        with pytest.raises(ValueError, match="even and positive, got 3"):
            rotary_frequencies(3)
