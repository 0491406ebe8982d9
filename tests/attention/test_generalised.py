"""LinFusion's layer: the formula token by token, what replication does, inheritance, costs, gradients, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minilib.attention import CrossAttention, attention_processor, get_attention, replace_attention
from minilib.attention.generalised import GeneralisedLinearAttention, generalised_linear_flops
from minilib.models import UNet

DIM, HEADS = 12, 3


def layer(seed=0, **options):
    torch.manual_seed(seed)
    new = GeneralisedLinearAttention(DIM, HEADS, **options).double()
    for p in new.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return new


def tokens(n=7, seed=1):
    return torch.randn(2, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(module, x, normalise=True, scale=1.0):
    """One head and one query at a time."""

    def seen(network, row):
        return row if network is None else row + network(row)

    out = torch.zeros_like(x)
    for b in range(len(x)):
        q = torch.stack([module.to_q.weight @ seen(module.query_features, row) for row in x[b]])
        k = torch.stack([module.to_k.weight @ seen(module.key_features, row) for row in x[b]])
        v = x[b] @ module.to_v.weight.T
        mixed = torch.zeros_like(v)
        for head in torch.arange(DIM).chunk(HEADS):
            for i in range(len(v)):
                weights = torch.stack([(F.elu(q[i, head]) + 1) @ (F.elu(row[head]) + 1) for row in k])
                top = (weights[:, None] * v[:, head]).sum(0)
                if normalise:
                    mixed[i, head] = (top / len(v)) / (weights.mean() + 1e-4)
                else:
                    mixed[i, head] = scale * top
        out[b] = mixed @ module.to_out.weight.T + module.to_out.bias
    return out


@pytest.mark.parametrize("options", [{}, {"features": False}, {"normalise": False, "scale": 0.25}])
def test_the_formula_token_by_token(options):
    module, x = layer(**options), tokens()
    wanted = by_hand(module, x, options.get("normalise", True), options.get("scale", 1.0))
    torch.testing.assert_close(module(x), wanted, rtol=1e-9, atol=1e-9)


def test_replication_and_order():
    x = tokens()
    again, order = x.repeat_interleave(3, 1), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    module = layer()
    torch.testing.assert_close(module(again), module(x).repeat_interleave(3, 1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], rtol=1e-10, atol=1e-10)
    module = layer(normalise=False)
    bias = module.to_out.bias
    grown = (module(again) - bias) / (module(x) - bias).repeat_interleave(3, 1)
    torch.testing.assert_close(grown, torch.full_like(grown, 3.0), rtol=1e-8, atol=1e-8)


def test_it_starts_as_plain_linear_attention_with_the_inherited_projections():
    torch.manual_seed(0)
    old = CrossAttention(DIM, num_heads=HEADS)
    new = GeneralisedLinearAttention.from_attention(old.eval())
    assert not new.training
    for name in ("to_q", "to_k", "to_v", "to_out"):
        assert torch.equal(getattr(new, name).weight, getattr(old, name).weight)
    assert torch.equal(new.to_out.bias, old.to_out.bias)
    old.to_q.weight.data.zero_()
    assert new.to_q.weight.any(), "nothing is shared"
    plain = GeneralisedLinearAttention.from_attention(old, features=False)
    with torch.no_grad():
        new.to_q.weight.zero_()
        torch.testing.assert_close(new(tokens().float()), plain(tokens().float()))
    with pytest.raises(ValueError, match="is no self-attention"):
        GeneralisedLinearAttention.from_attention(CrossAttention(DIM, 8, HEADS))


def test_it_takes_the_place_of_every_self_attention_of_a_unet():
    torch.manual_seed(0)
    unet = UNet(cross_attention_dim=24, attention_positions=True)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    done = replace_attention(
        unet,
        lambda name, _: name.endswith("attn1"),
        lambda _, a: GeneralisedLinearAttention.from_attention(a),
    )
    assert done.replaced and all(name.endswith("attn1") for name in done.replaced) and not done.left
    assert all("features" in name for name in done.new)
    after = unet.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert unet(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, 4, 24)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("features", [True, False])
def test_flops_are_counted_and_parameters_are_the_papers(features):
    module, n = GeneralisedLinearAttention(64, 4, features=features), 50
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(2, n, 64))
    assert counter.get_total_flops() == generalised_linear_flops(2, n, 64, 4, features=features)
    own = sum(p.numel() for p in module.parameters())
    assert own - sum(p.numel() for p in CrossAttention(64, num_heads=4).parameters()) == features * 2 * (
        2 * 64**2 + 4 * 64
    )


def test_gradients_reach_everything():
    module = layer()
    assert torch.autograd.gradcheck(module, (tokens(4).requires_grad_(),))
    module(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match="5 heads do not divide the width 12"):
        GeneralisedLinearAttention(12, 5)
    for options in ({"scale": 2.0}, {"scale": 0.0, "normalise": False}, {"scale": -1.0, "normalise": False}):
        with pytest.raises(ValueError, match="positive, and 1 where"):
            GeneralisedLinearAttention(12, 3, **options)
    module = layer()
    with pytest.raises(ValueError, match="takes no mask"):
        module.processor(*(torch.ones(1, 3, 2, 4, dtype=torch.float64),) * 3, mask=torch.ones(2, 2) > 0)


def test_its_core_can_be_exchanged_from_outside():
    module, x = layer(features=False), tokens()
    before = module(x)
    with attention_processor(module, lambda *_: get_attention("full")):
        assert not torch.allclose(module(x), before)
    assert torch.equal(module(x), before)


def test_a_copy_is_its_own():
    module, x = layer(), tokens()
    twin = copy.deepcopy(module)
    twin.scale = twin.eps = 7.0
    assert not torch.allclose(twin(x), module(x)), "the copy's core reads the copy's settings"
