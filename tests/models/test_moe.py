import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilib.models import (
    DiT,
    ExpertLoad,
    GeluMLP,
    MoEFeedForward,
    MoEGate,
    SwiGLU,
    collect_balance_loss,
    load_balance_loss,
    record_routing,
    upcycle_moe,
)
from minilib.models.moe import DISPATCH, EXPERTS


def layer(dim=8, hidden=12, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return MoEFeedForward(dim, hidden, **options).to(dtype)


def send_to(gate, scores):
    """Make the gate prefer the experts with the larger scores, for tokens whose first feature is 1."""
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = torch.tensor(scores, dtype=gate.weight.dtype)


def tokens(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x[..., 0] = 1
    return x


def token_by_token(moe, x):
    """The formula of the paper for one token at a time."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        p = (moe.gate.weight @ token).softmax(0)
        chosen = sorted(range(len(p)), key=lambda i: -p[i])[: moe.gate.k]
        total = sum(p[i] for i in chosen) if moe.gate.renormalize else 1.0
        row = sum(p[i] / total * moe.experts[i](token[None])[0] for i in chosen)
        rows.append(row if moe.shared is None else row + moe.shared(token[None])[0])
    return torch.stack(rows).view_as(x)


class TestGate:
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_keeps_the_k_likeliest(self, k):
        gate, x = MoEGate(4, 5, k), torch.randn(2, 3, 4)
        probs, indices, weights = gate(x)
        assert torch.equal(probs, (x @ gate.weight.T).softmax(-1))
        ordered = probs.sort(-1, descending=True)
        assert torch.equal(weights, ordered.values[..., :k]) and torch.equal(
            indices, ordered.indices[..., :k]
        )

    def test_renormalised_weights_sum_to_one(self):
        x = torch.randn(2, 3, 4)
        plain, unit = MoEGate(4, 5, 2), MoEGate(4, 5, 2, renormalize=True)
        unit.load_state_dict(plain.state_dict())
        assert (plain(x).weights.sum(-1) < 1).all()
        torch.testing.assert_close(unit(x).weights.sum(-1), torch.ones(2, 3))
        ratio = plain(x).weights[..., 0] / plain(x).weights[..., 1]
        torch.testing.assert_close(unit(x).weights[..., 0] / unit(x).weights[..., 1], ratio)

    @pytest.mark.parametrize("k", [0, 6, -1])
    def test_k_outside_is_refused(self, k):
        with pytest.raises(ValueError, match=f"k = {k} experts a token out of 5"):
            MoEGate(4, 5, k)

    def test_autocast_does_not_decide_ties(self):
        gate, x = MoEGate(64, 8, 2), torch.randn(100, 64)
        with torch.autocast("cpu", torch.bfloat16):
            half = gate(x)
        assert half.probs.dtype == torch.float32 and torch.equal(half.indices, gate(x).indices)


class TestBalanceLoss:
    def test_against_the_double_sum_of_the_paper(self):
        g = torch.Generator().manual_seed(0)
        probs = torch.rand(10, 4, generator=g).softmax(-1)
        indices = probs.topk(2).indices
        t, k, e = 10, 2, 4
        expected = 0.0
        for i in range(e):
            f = e / (k * t) * sum(int((indices[s] == i).sum()) for s in range(t))
            expected += 0.3 * f * float(probs[:, i].mean())
        assert float(load_balance_loss(probs, indices, alpha=0.3)) == pytest.approx(expected, rel=1e-6)

    def test_limits(self):
        uniform = torch.full((8, 4), 0.25)
        even = torch.arange(8)[:, None] % 4
        assert float(load_balance_loss(uniform, even)) == pytest.approx(0.01)
        one = F.one_hot(torch.zeros(8, dtype=torch.long), 4).float()
        assert float(load_balance_loss(one, torch.zeros(8, 1, dtype=torch.long), alpha=0.5)) == pytest.approx(
            4 * 0.5
        )

    def test_shape_of_the_batch_does_not_matter(self):
        probs = torch.rand(2, 5, 3).softmax(-1)
        indices = probs.topk(2).indices
        assert torch.equal(
            load_balance_loss(probs, indices), load_balance_loss(probs.flatten(0, 1), indices.flatten(0, 1))
        )

    def test_gradient_flows_through_the_probabilities(self):
        logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        indices = logits.detach().topk(2).indices
        assert torch.autograd.gradcheck(lambda z: load_balance_loss(z.softmax(-1), indices), logits)

    def test_descending_it_evens_the_load_out(self):
        torch.manual_seed(0)
        moe, x = layer(num_experts=4, k=1), tokens(400, 8)
        with torch.no_grad():
            moe.gate.weight[0, 0] += 2.0
        optimiser = torch.optim.Adam(moe.gate.parameters(), 0.05)
        spread = []
        for _ in range(100):
            with ExpertLoad(moe) as load, collect_balance_loss(moe, alpha=1.0) as balance:
                moe(x)
            optimiser.zero_grad()
            balance.total().backward()
            optimiser.step()
            spread.append(float(load.coefficient_of_variation()))
        assert spread[0] > 1.0 and spread[-1] < 0.3


class TestFeedForward:
    @pytest.mark.parametrize("expert", sorted(EXPERTS))
    @pytest.mark.parametrize("dispatch", sorted(DISPATCH))
    @pytest.mark.parametrize("experts, k", [(1, 1), (4, 1), (4, 2), (3, 3), (8, 2)])
    @pytest.mark.parametrize("shared, renormalize", [(0, False), (2, False), (0, True)])
    def test_equals_the_formula_token_by_token(self, expert, dispatch, experts, k, shared, renormalize):
        moe = layer(
            num_experts=experts, k=k, shared=shared, renormalize=renormalize, dispatch=dispatch, expert=expert
        )
        x = tokens(2, 5, 8)
        torch.testing.assert_close(moe(x), token_by_token(moe, x), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("expert", sorted(EXPERTS))
    @pytest.mark.parametrize("experts, k", [(1, 1), (8, 2), (4, 4), (16, 1)])
    def test_sparse_equals_dense_with_gradients(self, expert, experts, k):
        sparse = layer(num_experts=experts, k=k, expert=expert, dtype=torch.float32)
        dense = layer(num_experts=experts, k=k, expert=expert, dtype=torch.float32, dispatch="dense")
        grads = []
        for moe in (sparse, dense):
            x = tokens(4, 16, 8, dtype=torch.float32).requires_grad_()
            out = moe(x)
            out.square().sum().backward()
            grads.append([out.detach(), x.grad, *(p.grad for p in moe.parameters())])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def test_one_expert_without_gate_choice_is_the_dense_network(self):
        moe, dense = layer(num_experts=1, k=1, shared=0), SwiGLU(8, 12).double()
        dense.load_state_dict(moe.experts[0].state_dict())
        x = tokens(3, 5, 8)
        assert torch.equal(moe(x), dense(x))

    @pytest.mark.parametrize("dispatch", sorted(DISPATCH))
    def test_gradients(self, dispatch):
        moe = layer(dim=4, hidden=3, num_experts=3, k=2, shared=1, dispatch=dispatch)
        with torch.no_grad():
            moe.gate.weight.mul_(3)  # far from ties, where the choice of experts jumps
        names = ["gate.weight", "experts.0.w_in.weight", "experts.2.w_down.weight"]
        values = [moe.get_parameter(n).detach().clone().requires_grad_() for n in names]

        def run(x, *parameters):
            return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), x)

        x = tokens(5, 4).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, *values))
        run(x, *values).square().sum().backward()
        assert values[0].grad.abs().max() > 0, "the gate learns through the weights"

    @pytest.mark.parametrize("dispatch", sorted(DISPATCH))
    def test_experts_without_tokens(self, dispatch):
        moe = layer(num_experts=4, k=2, shared=0, dispatch=dispatch)
        send_to(moe.gate, [3.0, 0.0, 2.0, -1.0])
        x = tokens(2, 5, 8)
        torch.testing.assert_close(moe(x), token_by_token(moe, x), atol=1e-12, rtol=0)
        moe(x).sum().backward()
        for i, expert in enumerate(moe.experts):
            used = i in (0, 2)
            assert all((p.grad.abs().max() > 0) == used for p in expert.parameters()), "zero, not missing"

    @pytest.mark.parametrize("dispatch", sorted(DISPATCH))
    @pytest.mark.parametrize("shape", [(1, 8), (1, 1, 8), (0, 8)])
    def test_one_token_and_none(self, dispatch, shape):
        moe, x = layer(num_experts=4, k=2, dispatch=dispatch), tokens(*shape)
        assert moe(x).shape == x.shape
        if x.numel():
            torch.testing.assert_close(moe(x), token_by_token(moe, x), atol=1e-12, rtol=0)

    def test_each_token_by_itself(self):
        moe, x = layer(num_experts=4, k=2), tokens(20, 8)
        order = torch.randperm(20)
        torch.testing.assert_close(moe(x[order]), moe(x)[order], atol=1e-12, rtol=0)

    def test_names_and_sizes_of_the_parameters(self):
        dim, experts, k = 16, 8, 2
        moe = MoEFeedForward(dim, 4 * dim, num_experts=experts, k=k)
        total = experts * 3 * dim * 4 * dim + 3 * dim * 2 * dim + experts * dim
        assert sum(p.numel() for p in moe.parameters()) == total
        assert not any("bias" in name for name, _ in moe.named_parameters())

    @pytest.mark.parametrize("experts", [4, 8, 16])
    def test_operations_are_those_of_the_chosen_experts_whatever_the_load(self, experts):
        dim, k, n = 16, 2, 10
        expected = 2 * n * (k * 3 * dim * 4 * dim + 3 * dim * 2 * dim + experts * dim)
        moe = MoEFeedForward(dim, 4 * dim, num_experts=experts, k=k)
        for uneven in (False, True):
            if uneven:
                send_to(moe.gate, [2.0, 1.0] + [0.0] * (experts - 2))
            with FlopCounterMode(display=False) as counter:
                moe(tokens(n, dim, dtype=torch.float32))
            assert counter.get_total_flops() == expected
        with FlopCounterMode(display=False) as counter:
            moe.to("meta")(torch.empty(n, dim, device="meta"))
        assert counter.get_total_flops() == expected

    def test_autocast(self):
        moe, x = layer(num_experts=4, k=2, dtype=torch.float32), tokens(6, 8, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            half = moe(x)
        assert (half.float() - moe(x)).abs().max() < 0.05

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"dispatch": "fast"}, r"unknown dispatch 'fast': choose one of \['dense', 'sparse'\]"),
            ({"expert": "relu"}, r"unknown expert 'relu': choose one of \['gelu', 'swiglu'\]"),
            ({"num_experts": 2, "k": 3}, "k = 3 experts a token out of 2"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            MoEFeedForward(8, 12, **options)


def moe_dit(**options):
    torch.manual_seed(0)
    model = DiT(
        input_size=4,
        hidden_size=8,
        depth=3,
        num_heads=2,
        mlp="moe",
        mlp_options={"num_experts": 4, "k": 2, **options},
    )
    for name, p in model.named_parameters():
        if "adaLN" in name or "final" in name:
            nn.init.normal_(p, std=0.3)
    return model


def batch(n=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=g), torch.linspace(0, 999, n), torch.arange(n)


class TestRecorders:
    def test_records_every_layer_and_call_and_stops(self):
        model = moe_dit()
        with record_routing(model) as routing, ExpertLoad(model) as load:
            model(*batch())
            model(*batch(2))
        model(*batch())
        assert list(routing) == [f"blocks.{i}.mlp.gate" for i in range(3)]
        for name, calls in routing.items():
            assert [len(call.indices) for call in calls] == [3, 2]
            assert load.probs[name].shape == (5, 16, 4) and not load.probs[name].requires_grad
            assert load.topk[name].shape == (5, 16, 2)
            assert torch.equal(load.top1[name], load.probs[name].argmax(-1))
            assert torch.equal(load.topk[name][:3], calls[0].indices)

    def test_fractions(self):
        model = moe_dit()
        for block in model.blocks:
            nn.init.zeros_(block.mlp.gate.weight)
        model.blocks[1].mlp.gate.register_forward_hook(lambda m, x, r: r._replace(indices=r.indices * 0 + 3))
        with ExpertLoad(model) as load:
            model(*batch())
        fractions = load.fractions()
        assert fractions.shape == (3, 4)
        torch.testing.assert_close(fractions.sum(1), torch.ones(3))
        assert fractions[1].tolist() == [0, 0, 0, 1]
        assert float(load.coefficient_of_variation()[1]) == pytest.approx(3**0.5)

    def test_balance_loss_of_a_model_is_the_sum_over_its_layers(self):
        model = moe_dit()
        with record_routing(model) as routing, collect_balance_loss(model, alpha=0.02) as balance:
            model(*batch())
        expected = sum(
            load_balance_loss(calls[0].probs, calls[0].indices, alpha=0.02) for calls in routing.values()
        )
        torch.testing.assert_close(balance.total(), expected)
        balance.total().backward()
        assert all(block.mlp.gate.weight.grad.abs().max() > 0 for block in model.blocks)

    def test_recording_leaves_the_output_alone(self):
        model = moe_dit()
        with ExpertLoad(model), collect_balance_loss(model):
            recorded = model(*batch())
        assert torch.equal(recorded, model(*batch()))

    def test_errors(self):
        model = moe_dit()
        for recorder in (ExpertLoad, record_routing, collect_balance_loss):
            with (
                pytest.raises(ValueError, match="contains no MoEGate"),
                recorder(DiT(hidden_size=8, depth=1)),
            ):
                pass
        with collect_balance_loss(model) as balance, pytest.raises(RuntimeError, match="no gate has run"):
            balance.total()
        with ExpertLoad(model) as load, pytest.raises(RuntimeError, match="no gate has run"):
            load.fractions()
        with pytest.raises(KeyError), ExpertLoad(model):
            raise KeyError("inside")
        assert not any(block.mlp.gate._forward_hooks for block in model.blocks)


class TestUpcycling:
    @staticmethod
    def dense(mlp="gelu"):
        torch.manual_seed(0)
        model = DiT(input_size=4, hidden_size=8, depth=2, num_heads=2, mlp=mlp)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        return model.eval()

    @pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
    @pytest.mark.parametrize("experts, k", [(1, 1), (4, 2), (8, 8)])
    def test_starts_as_the_dense_model(self, mlp, experts, k):
        dense = self.dense(mlp)
        sparse = upcycle_moe(dense, num_experts=experts, k=k)
        assert not sparse.training
        with torch.no_grad():
            torch.testing.assert_close(sparse(*batch()), dense(*batch()), atol=1e-5, rtol=1e-5)
        assert sparse.config["mlp_options"]["expert"] == mlp
        again = DiT(**sparse.config)
        again.load_state_dict(sparse.state_dict())

    def test_without_renormalisation_the_routed_output_shrinks_to_the_kept_probability(self):
        dense = self.dense()
        sparse = upcycle_moe(dense, num_experts=8, k=2, renormalize=False, gate_std=0.0)
        x = torch.randn(5, 8)
        torch.testing.assert_close(sparse.blocks[0].mlp(x), dense.blocks[0].mlp(x) * 2 / 8)

    def test_the_experts_are_copies_of_their_own(self):
        dense = self.dense()
        before = {k: v.clone() for k, v in dense.state_dict().items()}
        sparse = upcycle_moe(dense, num_experts=3)
        with torch.no_grad():
            sparse.blocks[0].mlp.experts[0].fc1.weight.zero_()
        assert sparse.blocks[0].mlp.experts[1].fc1.weight.abs().max() > 0
        assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
        assert isinstance(sparse.blocks[0].mlp.experts[0], GeluMLP)

    def test_gates_are_drawn_from_the_generator(self):
        def gates(seed):
            model = upcycle_moe(self.dense(), num_experts=64, generator=torch.Generator().manual_seed(seed))
            return torch.stack([block.mlp.gate.weight.detach() for block in model.blocks])

        assert torch.equal(gates(0), gates(0)) and not torch.equal(gates(0), gates(1))
        assert float(gates(0).std()) == pytest.approx(0.02, rel=0.1) and abs(float(gates(0).mean())) < 0.002

    def test_a_mixture_is_refused(self):
        with pytest.raises(ValueError, match="this one has mlp 'moe'"):
            upcycle_moe(moe_dit())
