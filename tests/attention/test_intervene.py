import pytest
import torch
from torch import nn

from minilib.attention import (
    Attention,
    attention_modules,
    attention_processor,
    attention_weights,
    naive_attention,
    record_attention,
)
from minilib.models import DiT


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=16, depth=3, num_heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def inputs():
    return torch.randn(2, 1, 4, 4), torch.tensor([3.0, 800.0]), torch.tensor([1, 10])


def processors(model):
    return [block.attn.processor for block in model.blocks]


def test_modules_are_found_by_name(model):
    assert list(attention_modules(model)) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    with pytest.raises(ValueError, match="Linear contains no minilib.attention.AttentionLayer"):
        attention_modules(nn.Linear(2, 2))


def test_record_returns_the_weights_and_leaves_the_output_alone(model, inputs):
    before = model(*inputs)
    with record_attention(model) as weights:
        recorded = model(*inputs)
        model(*inputs)
    assert torch.equal(recorded, before)
    assert list(weights) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    for calls in weights.values():
        assert [w.shape for w in calls] == [(2, 2, 16, 16)] * 2
        assert not calls[0].requires_grad
        torch.testing.assert_close(calls[0].sum(-1), torch.ones(2, 2, 16), atol=1e-5, rtol=0)
        assert torch.equal(calls[0], calls[1])
    model(*inputs)
    assert all(len(calls) == 2 for calls in weights.values())


def test_recorded_weights_reproduce_the_layer(model):
    layer, x = model.blocks[1].attn, torch.randn(2, 16, 16)
    with record_attention(layer) as weights:
        out = layer(x)
    v = layer.qkv(x).view(2, 16, 3, 2, 8)[:, :, 2].transpose(1, 2)
    mixed = (weights[""][0] @ v).transpose(1, 2).reshape(2, 16, 16)
    torch.testing.assert_close(layer.proj(mixed), out, atol=1e-5, rtol=0)


def test_recording_does_not_change_gradients(model, inputs):
    model(*inputs).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with record_attention(model):
        model(*inputs).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_replaced_in_the_named_blocks_only_and_restored(model, inputs):
    original, before = processors(model), model(*inputs)

    def only_self(q, k, v, *, mask=None):
        return v

    with attention_processor(
        model, lambda name, a: only_self if name == "blocks.1.attn" else None
    ) as replaced:
        assert list(replaced) == ["blocks.1.attn"]
        assert processors(model) == [original[0], only_self, original[2]]
        assert (model(*inputs) - before).abs().max() > 1e-3
    assert processors(model) == original
    assert torch.equal(model(*inputs), before)


def test_restored_after_an_error_in_the_block_and_in_the_factory(model):
    original = processors(model)
    with (
        pytest.raises(RuntimeError, match="inside"),
        attention_processor(model, lambda n, a: naive_attention),
    ):
        raise RuntimeError("inside")
    assert processors(model) == original

    def fails_at_the_second(name, attention):
        if name == "blocks.1.attn":
            raise KeyError(name)
        return naive_attention

    with pytest.raises(KeyError), attention_processor(model, fails_at_the_second):
        pass
    assert processors(model) == original


def test_contexts_nest(model, inputs):
    original = processors(model)
    with attention_processor(model, lambda n, a: naive_attention):
        with record_attention(model) as weights:
            model(*inputs)
        assert processors(model) == [naive_attention] * 3
    assert processors(model) == original
    assert all(len(calls) == 1 for calls in weights.values())


def test_attention_maps_of_one_image_can_be_patched_into_another(model, inputs):
    """The use the papers on editing make of it: values of image B, weights of image A."""
    x, t, y = inputs
    with record_attention(model) as source:
        model(x[:1], t[:1], y[:1])

    def inject(name, attention):
        return lambda q, k, v, *, mask=None: source[name][0] @ v

    with attention_processor(model, inject):
        same = model(x[:1], t[:1], y[:1])
        other = model(x[1:], t[1:], y[1:])
    torch.testing.assert_close(same, model(x[:1], t[:1], y[:1]), atol=1e-4, rtol=0)
    assert (other - model(x[1:], t[1:], y[1:])).abs().max() > 1e-3


def test_a_processor_that_is_not_softmax_attention_has_no_weights_to_record():
    layer = Attention(8, 2)
    layer.processor = lambda q, k, v, *, mask=None: v
    processor = layer.processor
    with pytest.raises(ValueError, match="not registered as softmax attention"), record_attention(layer):
        pass
    assert layer.processor is processor


def test_recorded_weights_respect_the_mask():
    layer, x = Attention(8, 2), torch.randn(1, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    with record_attention(layer) as weights:
        layer(x, mask=mask)
    assert (weights[""][0].masked_select(~mask) == 0).all()


def test_weights_of_equal_queries_and_keys_are_uniform():
    q = torch.ones(1, 1, 3, 2)
    assert torch.equal(attention_weights(q, q), torch.full((1, 1, 3, 3), 1 / 3))
