import inspect

import pytest
import torch
from torch import nn

from minilib.kernels import dispatch, moe
from minilib.models import MoEFeedForward
from minilib.models.layers import GeluMLP, SwiGLU
from minilib.profiling import count_flops

PATHS = {"mask_loop": moe.mask_loop, "segments": moe.sorted_segments, "grouped": moe.grouped_mm}
#: Widths that are multiples of 4: grouped_mm wants rows of 16 bytes, also on a CPU.
DIM, HIDDEN, EXPERTS = 8, 12, 4


def build(kind=GeluMLP, number=EXPERTS, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    experts = nn.ModuleList(kind(DIM, HIDDEN) for _ in range(number))
    return experts.to(dtype)


def routed(tokens, k, number=EXPERTS, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, DIM, generator=generator, dtype=dtype)
    probs = torch.randn(tokens, number, generator=generator, dtype=dtype).softmax(-1)
    weights, indices = probs.topk(k, dim=-1)
    return x, indices, weights


def gradients(run, experts, x, indices, weights, seed=9):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = run(x, indices, weights, experts)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return out, torch.autograd.grad(out, [x, weights, *experts.parameters()], cotangent)


def assert_same(run, experts, *args, bound=2e-6):
    got, expected = gradients(run, experts, *args), gradients(moe.reference, experts, *args)
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= bound * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [GeluMLP, SwiGLU])
@pytest.mark.parametrize("tokens, k", [(33, 1), (33, 2), (7, EXPERTS), (1, 2)])
def test_values_and_gradients_are_those_of_the_reference(path, kind, tokens, k):
    assert_same(PATHS[path], build(kind), *routed(tokens, k))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_all_tokens_to_one_expert_and_none_to_the_others(path, expert):
    experts = build()
    x, _, weights = routed(19, 1)
    indices = torch.full_like(weights, expert, dtype=torch.long)
    assert_same(PATHS[path], experts, x, indices, weights)
    out, (_, _, *own) = gradients(PATHS[path], experts, x, indices, weights)
    assert torch.allclose(out, weights * experts[expert](x), atol=1e-6)
    zero = [float(g.abs().max()) == 0 for g in own]
    assert zero == [i != expert for i in range(EXPERTS) for _ in range(4)]  # zero, not missing


@pytest.mark.parametrize("path", PATHS)
def test_a_token_sent_to_one_expert_twice_counts_twice(path):
    x, indices, weights = routed(9, 2)
    indices[4] = 1
    assert_same(PATHS[path], build(), x, indices, weights)


@pytest.mark.parametrize("path", [moe.reference, *PATHS.values()])
def test_no_tokens(path):
    assert path(*routed(0, 2), build()).shape == (0, DIM)


@pytest.mark.parametrize("tokens", [64, 257])
def test_nothing_is_dropped(tokens):
    class Identity(nn.Module):
        def forward(self, x):
            return x

    x, indices, weights = routed(tokens, 2)
    out = moe.sorted_segments(x, indices, torch.full_like(weights, 0.5), [Identity()] * EXPERTS)
    assert torch.equal(out, x)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_layer_of_the_models(kind, k):
    torch.manual_seed(0)
    layer = MoEFeedForward(DIM, HIDDEN, num_experts=EXPERTS, k=k, shared=0, expert=kind)
    x = torch.randn(3, 17, DIM)
    routing = layer.gate(x)
    for path in (moe.reference, *PATHS.values(), moe.expert_dispatch):
        out = path(
            x.flatten(0, 1), routing.indices.flatten(0, 1), routing.weights.flatten(0, 1), layer.experts
        )
        assert torch.allclose(out.view_as(x), layer(x), atol=2e-6)


@pytest.mark.parametrize("run", [moe.reference, moe.mask_loop, moe.sorted_segments])
def test_gradients_in_double(run):
    experts, (x, indices, weights) = build(dtype=torch.float64), routed(6, 2, dtype=torch.float64)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    torch.autograd.gradcheck(lambda x, w: run(x, indices, w, experts), (x, weights))
    if run is moe.sorted_segments:
        torch.autograd.gradgradcheck(lambda x, w: run(x, indices, w, experts), (x, weights))


def test_gradients_without_strides_do_not_stop_grouped_mm():
    experts, x = build(SwiGLU), routed(12, 1)[0].requires_grad_()
    order = torch.arange(12)
    ends = torch.tensor([12, 12, 12, 12], dtype=torch.int32)
    stacked = moe.stack_experts(experts)
    out = moe._grouped_linear(x, stacked.w_in, None, ends, order * 0)
    out.sum().backward()  # an expanded gradient, which grouped_mm alone refuses
    expected = stacked.w_in[0].sum(1).expand(12, DIM)
    assert torch.allclose(x.grad, expected, atol=1e-6)


def test_the_same_bits_in_every_run():
    experts, args = build(), routed(65, 2)
    first, second = (gradients(moe.sorted_segments, experts, *args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


class TestStacked:
    @pytest.mark.parametrize("kind", [GeluMLP, SwiGLU])
    def test_every_path_takes_stacked_experts(self, kind):
        experts, args = build(kind), routed(21, 2)
        stacked, expected = moe.stack_experts(experts), moe.reference(*args, experts)
        for run in (moe.reference, *PATHS.values(), moe.expert_dispatch):
            assert torch.allclose(run(*args, stacked), expected, atol=2e-6)

    def test_what_cannot_be_stacked(self):
        with pytest.raises(
            ValueError, match="all GeluMLP or all SwiGLU.*'GeluMLP', 'SwiGLU'.*sorted_segments"
        ):
            moe.stack_experts([GeluMLP(8, 8), SwiGLU(8, 8)])
        with pytest.raises(ValueError, match="2 different shapes"):
            moe.stack_experts([GeluMLP(8, 8), GeluMLP(8, 12)])

    def test_any_experts_can_be_dispatched(self):
        experts = [nn.Linear(DIM, 3), nn.Sequential(nn.Linear(DIM, 5), nn.Tanh(), nn.Linear(5, 3))]
        args = routed(9, 1, number=2)
        assert torch.allclose(moe.expert_dispatch(*args, experts), moe.reference(*args, experts), atol=1e-6)


class TestCost:
    def test_operations_are_those_of_a_dense_network_of_k_experts(self):
        class Layer(nn.Module):
            def __init__(self, run):
                super().__init__()
                self.experts, self.run = build(), run

            def forward(self, x, indices, weights):
                return self.run(x, indices, weights, self.experts)

        args, dense = routed(30, 2), count_flops(GeluMLP(DIM, 2 * HIDDEN), torch.zeros(30, DIM))
        assert count_flops(Layer(moe.sorted_segments), *args) == dense
        assert count_flops(Layer(moe.reference), *args).flops == dense.flops * EXPERTS // 2

    def test_the_choice_says_why(self, monkeypatch):
        args, experts = routed(3, 1), build()
        choice = dispatch.explain("expert_dispatch", *args, experts)
        assert choice.path == "cpu" and "sorted segments" in choice.reason
        monkeypatch.setenv("MINILIB_KERNELS", "ref")
        assert dispatch.explain("expert_dispatch", *args, experts).path == "reference"
        monkeypatch.setenv("MINILIB_KERNELS", "triton")
        with pytest.raises(RuntimeError, match="expert_dispatch.*no Triton path"):
            moe.expert_dispatch(*args, experts)

    @pytest.mark.parametrize(
        "have, dtype, why",
        [
            ((9, 0), torch.bfloat16, None),
            ((8, 0), torch.bfloat16, None),
            ((7, 5), torch.bfloat16, "capability 8.0, this GPU has 7.5"),
            ((8, 0), torch.float32, "takes bfloat16"),
        ],
    )
    def test_the_rule_on_a_gpu(self, have, dtype, why):
        for experts in (build(), moe.stack_experts(build())):
            problem = moe._not_grouped(experts, dtype, have)
            assert problem is None if why is None else why in problem
        mixed = [GeluMLP(8, 8), SwiGLU(8, 8)]
        assert "can be stacked" in moe._not_grouped(mixed, torch.bfloat16, (9, 0))


@pytest.mark.parametrize("run", [moe.reference, *PATHS.values()])
def test_refusals(run):
    x, indices, weights = routed(5, 2)
    with pytest.raises(ValueError, match=r"indices run from 0 to 4: with 4 experts they lie in 0..3"):
        run(x, torch.tensor([[0, 4]]).expand(5, 2), weights, build())
    with pytest.raises(ValueError, match=r"run from -1"):
        run(x, torch.tensor([[0, -1]]).expand(5, 2), weights, build())
    with pytest.raises(ValueError, match=r"x \(4, 8\)"):
        inspect.unwrap(run)(x[:4], indices, weights, build())  # past the type checker
    if run is not moe.grouped_mm:
        with pytest.raises(ValueError, match="at least one"):
            run(x, indices, weights, [])
