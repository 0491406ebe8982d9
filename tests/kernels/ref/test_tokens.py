import inspect

import pytest
import torch
from torch import nn

from minilib.kernels.tokens import (
    TokenKeyValues,
    complement_indices,
    gather_tokens,
    partial_attention,
    scatter_tokens,
)
from minilib.models import DiTBlock, MMDiTBlock

SHARED = torch.tensor([4, 0, 2])
EACH = torch.tensor([[4, 0, 2], [1, 3, 0]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(indices, b=2):
    return indices.expand(b, -1).tolist()


def awake(module):
    """Random weights everywhere: gates that start at zero would hide a difference."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return module.eval().requires_grad_(False)


class TestIndices:
    @pytest.mark.parametrize("indices", [SHARED, EACH])
    def test_gather_and_scatter_by_hand(self, indices):
        x, values = draw(2, 5, 3), draw(2, 3, 3, seed=1)
        taken = torch.stack([torch.stack([x[i, j] for j in row]) for i, row in enumerate(rows(indices))])
        assert torch.equal(gather_tokens(x, indices), taken)
        put = x.clone()
        for i, row in enumerate(rows(indices)):
            for place, j in enumerate(row):
                put[i, j] = values[i, place]
        assert torch.equal(scatter_tokens(x, values, indices), put)
        assert torch.equal(scatter_tokens(x, gather_tokens(x, indices), indices), x)

    @pytest.mark.parametrize("indices", [SHARED, EACH])
    def test_gradients(self, indices):
        x, values = draw(2, 5, 3).double().requires_grad_(), draw(2, 3, 3).double().requires_grad_()
        torch.autograd.gradcheck(lambda x: gather_tokens(x, indices), (x,))
        torch.autograd.gradcheck(lambda x, v: scatter_tokens(x, v, indices), (x, values))

    @pytest.mark.parametrize("indices", [SHARED, EACH])
    def test_the_complement(self, indices):
        rest = complement_indices(indices, 7)
        for row, other in zip(
            rows(indices, len(rest) if rest.ndim == 2 else 1), rest.reshape(-1, 4).tolist(), strict=True
        ):
            assert other == sorted(set(range(7)) - set(row))
        x = draw(2, 7, 3)
        parts = gather_tokens(x, indices), gather_tokens(x, rest)
        blank = torch.full_like(x, torch.nan)
        whole = scatter_tokens(scatter_tokens(blank, parts[0], indices), parts[1], rest)
        assert torch.equal(whole, x)

    @pytest.mark.parametrize("shape", [(0,), (2, 0)])
    def test_none_and_all(self, shape):
        x, none = draw(2, 5, 3), torch.zeros(shape, dtype=torch.long)
        assert gather_tokens(x, none).shape == (2, 0, 3)
        assert torch.equal(scatter_tokens(x, x[:, :0], none), x)
        rest = complement_indices(none, 5)
        assert torch.equal(rest, torch.arange(5).expand_as(rest)) and rest.shape[-1] == 5
        assert complement_indices(torch.randperm(5), 5).shape == (0,)

    def test_noncontiguous(self):
        x = draw(2, 3, 5).transpose(1, 2)
        for indices in (SHARED, EACH):
            assert torch.equal(gather_tokens(x, indices), gather_tokens(x.contiguous(), indices))
            values = draw(2, 3, 3, seed=2).transpose(1, 2)
            assert torch.equal(
                scatter_tokens(x, values, indices), scatter_tokens(x.contiguous(), values, indices)
            )

    @pytest.mark.parametrize(
        "indices, message",
        [
            (torch.tensor([0, 5]), r"run from 0 to 5: there are tokens 0\.\.4"),
            (torch.tensor([-1, 2]), "run from -1"),
            (torch.tensor([2, 2]), "named twice"),
            (torch.tensor([[0, 1], [3, 3]]), "named twice"),
            (torch.tensor([[0, 1]]), r"\(1, 2\) given for 2 samples"),
        ],
    )
    def test_refusals(self, indices, message):
        x = draw(2, 5, 3)
        for call in (
            lambda: inspect.unwrap(gather_tokens)(x, indices),
            lambda: inspect.unwrap(scatter_tokens)(x, x[:, :2], indices),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(ValueError, match="3 of 5 tokens"):
            inspect.unwrap(scatter_tokens)(x, x[:, :2], SHARED)
        if "twice" in message or "from" in message:
            with pytest.raises(ValueError, match=message):
                complement_indices(indices, 5)


class TestKeyValues:
    @pytest.mark.parametrize("indices", [SHARED, EACH])
    def test_rows_are_overwritten_and_the_others_stay(self, indices):
        cache, old, new = TokenKeyValues(2, 3, 5, 4), draw(2, 3, 5, 4), draw(2, 3, 3, 4, seed=1)
        cache.update(old, -old)
        k, v = cache.update(new, 2 * new, indices)
        expected = old.clone()
        for i, row in enumerate(rows(indices)):
            expected[i][:, row] = new[i]
        assert torch.equal(k, expected)
        rest = complement_indices(indices.expand(2, -1), 5)
        for i in range(2):
            assert torch.equal(v[i][:, rest[i]], -old[i][:, rest[i]])
            assert torch.equal(v[i][:, indices.expand(2, -1)[i]], 2 * new[i])

    def test_memory_is_taken_once(self):
        cache, old = TokenKeyValues(2, 3, 5, 4), draw(2, 3, 5, 4)
        k, v = cache.update(old, old)
        again = cache.update(old[:, :, :3], old[:, :, :3], SHARED)
        assert [t.data_ptr() for t in again] == [k.data_ptr(), v.data_ptr()]
        assert cache.nbytes() == 2 * 2 * 3 * 5 * 4 * 4

    def test_every_token_has_to_be_written_before_it_is_read(self):
        cache, some = TokenKeyValues(2, 1, 5, 4), draw(2, 1, 3, 4)
        with pytest.raises(ValueError, match="4 of 10 tokens have no keys"):
            cache.update(some, some, SHARED)
        assert cache.written.sum(1).tolist() == [3, 3]
        rest = complement_indices(SHARED, 5)
        k, _ = cache.update(some[:, :, :2], some[:, :, :2], rest)
        assert cache.written.all() and k.shape == (2, 1, 5, 4)
        cache.reset()
        with pytest.raises(ValueError, match="4 of 10"):
            cache.update(some, some, EACH)

    def test_refusals(self):
        cache, all_of = TokenKeyValues(2, 1, 5, 4), draw(2, 1, 5, 4)
        with pytest.raises(ValueError, match="at least 1"):
            TokenKeyValues(2, 0, 5, 4)
        with pytest.raises(ValueError, match=r"both have to be \(2, 1, 3, 4\)"):
            inspect.unwrap(TokenKeyValues.update)(cache, all_of, all_of, SHARED)
        with pytest.raises(ValueError, match="no gradient"):
            cache.update(all_of.requires_grad_(), all_of)
        cache.update(all_of.detach(), all_of.detach())
        with pytest.raises(ValueError, match="tokens 0..4"):
            cache.update(all_of[:, :, :1].detach(), all_of[:, :, :1].detach(), torch.tensor([5]))

    def test_dtype_is_the_caches(self):
        cache = TokenKeyValues(1, 1, 2, 4, dtype=torch.bfloat16)
        k, _ = cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
        assert k.dtype == torch.bfloat16


class TestPartialRuns:
    @pytest.mark.parametrize("kept", [1, 16, 48, 64])
    @pytest.mark.parametrize("each", [False, True])
    def test_with_fresh_keys_and_values_it_is_the_full_run(self, kept, each):
        block, x, c = awake(DiTBlock(32, 4)), draw(3, 64, 32), draw(3, 32, seed=1)
        full = block(x, c)
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randperm(64, generator=generator)[:kept] for _ in range(3)]
        indices, caches = torch.stack(drawn) if each else drawn[0], {}
        with partial_attention(block, caches):
            assert torch.equal(block(x, c), full)
        with partial_attention(block, caches, indices):
            part = block(gather_tokens(x, indices), c)
        expected = gather_tokens(full, indices)
        assert (part - expected).abs().max() <= 1e-6 * expected.abs().max() and expected.std() > 0.5

    def test_a_stack_of_blocks(self):
        blocks, x, c = awake(nn.ModuleList(DiTBlock(16, 2) for _ in range(3))), draw(2, 12, 16), draw(2, 16)
        indices, caches = torch.tensor([[3, 7, 1], [0, 11, 5]]), {}

        def run(h):
            for block in blocks:
                h = block(h, c)
            return h

        with partial_attention(blocks, caches):
            full = run(x)
        assert list(caches) == ["0.attn", "1.attn", "2.attn"]
        with partial_attention(blocks, caches, indices):
            part = run(gather_tokens(x, indices))
        expected = gather_tokens(full, indices)
        assert (part - expected).abs().max() <= 1e-6 * expected.abs().max()

    def test_stale_keys_and_values_are_another_matter(self):
        block, c = awake(DiTBlock(32, 4)), draw(2, 32, seed=1)
        x, later, caches = draw(2, 16, 32), draw(2, 16, 32, seed=2), {}
        with partial_attention(block, caches):
            block(x, c)
        mixed = scatter_tokens(x, gather_tokens(later, SHARED), SHARED)
        with partial_attention(block, caches, SHARED):
            part = block(gather_tokens(later, SHARED), c)
        # What it computes exactly: the old tokens' keys and values, the new ones of the tokens that ran.
        assert torch.allclose(part, gather_tokens(block(mixed, c), SHARED), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(part, gather_tokens(block(later, c), SHARED), atol=1e-2)

    def test_joint_attention_names_image_and_text(self):
        block, c = awake(MMDiTBlock(16, 2)), draw(2, 16, seed=1)
        x, text, caches = draw(2, 6, 16), draw(2, 3, 16, seed=2), {}
        with partial_attention(block, caches):
            full, full_text = block(x, text, c)
        some = torch.tensor([5, 2])
        with partial_attention(block, caches, torch.cat([some, 6 + torch.arange(3)])):
            part, part_text = block(gather_tokens(x, some), text, c)
        assert torch.allclose(part, gather_tokens(full, some), rtol=1e-5, atol=1e-5)
        assert torch.allclose(part_text, full_text, rtol=1e-5, atol=1e-5)

    def test_a_first_run_of_some_tokens_is_refused_and_the_layer_is_put_back(self):
        block, x, c = awake(DiTBlock(32, 4)), draw(2, 3, 32), draw(2, 32)
        before = block.attn.processor
        with pytest.raises(ValueError, match="no keys and values of 'attn' were kept"):
            with partial_attention(block, {}, SHARED):
                block(x, c)
        assert block.attn.processor is before

    def test_fewer_tokens_cost_fewer_operations(self):
        from torch.utils.flop_counter import FlopCounterMode

        from minilib.costs import register_cpu_attention_flops

        register_cpu_attention_flops()
        n, kept, d = 64, 16, 32
        block, x, c, caches = awake(DiTBlock(d, 4)), draw(1, n, d), draw(1, d), {}
        with partial_attention(block, caches):
            block(x, c)
        indices = torch.arange(kept)
        with partial_attention(block, caches, indices), FlopCounterMode(display=False) as counter:
            block(gather_tokens(x, indices), c)
        assert counter.get_total_flops() == 2 * kept * 12 * d * d + 4 * kept * n * d + 2 * 6 * d * d
