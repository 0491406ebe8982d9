"""Causal attention, and decoding with a cache."""

import pytest
import torch

from minilib.attention import (
    Attention,
    CausalAttention,
    KVCache,
    attention_processor,
    full_attention,
    get_attention,
    grid_ids,
)
from minilib.attention.rope import RotaryEmbedding

DIM, HEADS, LENGTH = 16, 2, 7


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def qkv(n, m, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, length, 4, generator=g, dtype=torch.float64) for length in (n, m, m))


class TestFunction:
    def test_each_query_is_full_attention_to_its_past(self):
        q, k, v = qkv(5, 5)
        out = get_attention("causal")(q, k, v)
        for i in range(5):
            close(
                out[:, :, i], full_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])[:, :, 0]
            )
        close(out[:, :, 0], v[:, :, 0])

    def test_more_keys_than_queries_are_aligned_at_the_end(self):
        q, k, v = qkv(7, 7)
        whole = get_attention("causal")(q, k, v)
        for n in range(1, 8):
            close(get_attention("causal")(q[:, :, -n:], k, v), whole[:, :, -n:])

    def test_more_queries_than_keys_are_refused(self):
        q, k, v = qkv(5, 3)
        with pytest.raises(
            ValueError, match="5 queries, but only 3 keys, would leave the first 2 without any"
        ):
            get_attention("causal")(q, k, v)

    def test_half_precision_is_computed_in_float32(self):
        q, k, v = (x.bfloat16() for x in qkv(5, 5))
        expected = get_attention("causal")(q.float(), k.float(), v.float())
        assert torch.equal(get_attention("causal")(q, k, v), expected.bfloat16())


def layer_and_tokens(qk_norm=False):
    torch.manual_seed(0)
    layer = CausalAttention(DIM, HEADS, qk_norm=qk_norm).double().eval()
    return layer, torch.randn(2, LENGTH, DIM, dtype=torch.float64)


def cache(capacity=LENGTH, dtype=torch.float64):
    return KVCache(2, HEADS, capacity, DIM // HEADS, dtype=dtype)


class TestDecoding:
    @pytest.fixture(autouse=True)
    def for_sampling(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("qk_norm", [False, True])
    @pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 3], [7], [4, 3]])
    def test_piece_by_piece_equals_the_full_pass(self, pieces, qk_norm):
        layer, x = layer_and_tokens(qk_norm)
        rotary = RotaryEmbedding(DIM // HEADS, 1)
        table, kept = rotary(grid_ids(LENGTH)), cache(capacity=LENGTH + 2)
        out, start = [], 0
        for piece in pieces:
            own = slice(start, start + piece)
            out.append(layer(x[:, own], rotary=table[own], cache=kept))
            start += piece
            assert len(kept) == start
        close(torch.cat(out, dim=1), layer(x, rotary=table), atol=1e-10)

    def test_reset_starts_a_new_sequence_in_the_same_memory(self):
        layer, x = layer_and_tokens()
        kept = cache()
        memory = kept.keys.data_ptr()
        first = layer(x, cache=kept)
        kept.reset()
        assert len(kept) == 0
        close(layer(x[:, :4], cache=kept), first[:, :4])
        assert kept.keys.data_ptr() == memory

    def test_nothing_is_allocated_or_moved_by_appending(self):
        kept = cache()
        k, v = kept.append(*(torch.ones(2, HEADS, 3, DIM // HEADS, dtype=torch.float64) for _ in range(2)))
        assert k.data_ptr() == kept.keys.data_ptr() and v.data_ptr() == kept.values.data_ptr()
        assert (kept.keys[:, :, 3:] == 0).all() and (kept.keys[:, :, :3] == 1).all()

    def test_without_a_cache_the_layer_is_attention_with_the_causal_variant(self):
        layer, x = layer_and_tokens()
        plain = Attention(DIM, HEADS, variant="causal").double()
        plain.load_state_dict(layer.state_dict())
        close(layer(x), plain(x))

    def test_a_cache_works_in_layers_that_know_nothing_of_it(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(Attention(DIM, HEADS, variant="causal") for _ in range(2))).double()
        x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
        caches = {name: cache() for name in ("0", "1")}
        with attention_processor(model, lambda name, layer: caches[name].attend):
            out = [model(x[:, i : i + 1]) for i in range(LENGTH)]
        close(torch.cat(out, dim=1), model(x), atol=1e-10)

    def test_a_mask_over_the_tokens_so_far(self):
        layer, x = layer_and_tokens()
        padded = torch.tensor([[False, True, True, True, True, True, True], [True] * 7])[:, None, None]
        # The first token of the first sequence is padding; it may see itself, so that its row is not empty.
        mask = padded | torch.eye(LENGTH, dtype=torch.bool)
        kept = cache()
        layer(x[:, :5], cache=kept, mask=mask[..., :5, :5])
        out = layer(x[:, 5:], cache=kept, mask=mask[..., 5:, :])
        close(out, layer(x, mask=mask)[:, 5:], atol=1e-10)


class TestErrors:
    def test_capacity(self):
        kept = cache(capacity=4)
        k = torch.zeros(2, HEADS, 3, DIM // HEADS, dtype=torch.float64)
        kept.append(k, k)
        with pytest.raises(ValueError, match="room for 4 tokens: 3 are in it, 2 more do not fit"):
            kept.append(k[:, :, :2], k[:, :, :2])
        assert len(kept) == 3
        kept.append(k[:, :, :1], k[:, :, :1])
        assert len(kept) == kept.capacity == 4

    @pytest.mark.parametrize(
        "shape, dtype",
        [((1, 2, 1, 8), torch.float64), ((2, 2, 1, 4), torch.float64), ((2, 2, 1, 8), torch.float32)],
    )
    def test_other_shapes_and_dtypes(self, shape, dtype):
        x = torch.zeros(shape, dtype=dtype)
        with pytest.raises(
            ValueError, match=r"the cache holds torch.float64 of shape \(2, 2, 7, 8\), but k is"
        ):
            cache().append(x, x)

    def test_gradients(self):
        layer, x = layer_and_tokens()
        with pytest.raises(ValueError, match="decode under torch.no_grad"):
            layer(x, cache=cache())
