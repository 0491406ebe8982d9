"""Plans and routers against independent loops, counted operations, finite differences and the limits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilib import cache_plans as cp
from minilib import cache_router as cr
from minilib.costs import attention_flops, dit_flops, linear_flops
from minilib.intervene import trace_executions
from minilib.models import DIT_CONFIGS, DiT
from minilib.models.layers import modulate
from minilib.profiling import to_meta

STEPS = 6


def small(seed: int = 0, **options) -> DiT:
    torch.manual_seed(seed)
    model = DiT(input_size=4, hidden_size=16, depth=2, num_heads=2, **options).requires_grad_(False)
    for module in model.modules():  # adaLN-Zero starts as the identity: no branch would matter
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def inputs(steps: int = STEPS, n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    y = torch.randint(10, (n,), generator=g)
    return [(torch.randn(n, 1, 4, 4, generator=g), torch.full((n,), 900 - 150 * i), y) for i in range(steps)]


def by_hand(model, calls, weights, threshold=None):
    """The blocks written out with explicit caches: hard where ``threshold`` is None, else soft as in training."""
    stored, outputs = {}, []
    for step, (x, t, y) in enumerate(calls):
        c = F.silu(model.embed_condition(t, y))
        h = model.x_embedder(x) + model.pos_embed
        for i, block in enumerate(model.blocks):
            parts = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
            for j, branch in enumerate((block.attn, block.mlp)):
                shift, scale, gate = parts[3 * j : 3 * j + 3]
                r, key = weights[step, 2 * i + j], 2 * i + j
                out = branch(modulate(F.layer_norm(h, h.shape[-1:], eps=1e-6), shift, scale))
                if key in stored:
                    if threshold is None:
                        out = out if r else stored[key]
                    else:
                        out = r * out + (1 - r) * stored[key]
                if key not in stored or r > (threshold or 0.5):
                    stored[key] = out.detach()
                h = torch.addcmul(h, gate, out)
        outputs.append(model.unpatchify(model.final_layer(h, c)))
    return outputs


PLAN = torch.tensor(
    [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0]], dtype=torch.bool
)


def test_names_follow_the_order_of_running():
    model = small()
    names = cp.branch_names(model)
    with trace_executions(model, list(names)) as trace:
        model(*inputs()[0])
    assert tuple(trace.order) == names and len(names) == 4
    assert cp.branch_names(model, ("mlp",)) == ("blocks.0.mlp", "blocks.1.mlp")


@pytest.mark.parametrize(
    "blocks, kinds",
    [("blocks", ("attn", "nothing")), ("stack", ("attn",)), ("final_layer", ("linear",)), ("blocks", ())],
)
def test_unknown_branches_are_refused(blocks, kinds):
    with pytest.raises(ValueError, match="nothing|stack|FinalLayer|kind"):
        cp.branch_names(small(), kinds, blocks=blocks)


# --- plans ---


def test_interval_and_key_steps():
    plan = cp.interval_plan(7, 3, 3)
    assert plan.all(1).tolist() == [True, False, False, True, False, False, True]
    assert torch.equal(plan.any(1), plan.all(1))
    assert torch.equal(plan, cp.key_step_plan(7, 3, (6, 0, 3)))
    assert cp.interval_plan(5, 2, 1).all()
    assert cp.interval_plan(5, 2, 9).sum() == 2


@pytest.mark.parametrize("reused", [0, 1, 7, 20])
def test_the_smallest_scores_are_reused_and_never_the_first_row(reused):
    scores = torch.rand(STEPS, 4, generator=torch.Generator().manual_seed(3))
    scores[0] = 0  # as small as can be: still computes
    plan = cp.keep_largest(scores, reused)
    assert plan[0].all() and int((~plan).sum()) == reused
    if 0 < reused < 20:
        assert scores[~plan].max() < scores[1:][plan[1:]].min()


def test_ties_are_reused_in_the_order_of_running():
    assert cp.keep_largest(torch.ones(3, 2), 3).int().tolist() == [[1, 1], [0, 0], [0, 1]]


def test_random_plans_have_the_exact_count_and_reach_every_entry():
    g = torch.Generator().manual_seed(0)
    plans = torch.stack([cp.random_plan(4, 3, 4, g) for _ in range(400)])
    assert plans[:, 0].all() and bool(((~plans).sum((1, 2)) == 4).all())
    share = (~plans[:, 1:]).double().mean(0)  # 4 of 9 entries, each as often: 4 standard deviations
    assert float((share - 4 / 9).abs().max()) < 4 * (4 / 9 * 5 / 9 / 400) ** 0.5


@pytest.mark.parametrize("reused", [-1, 21])
def test_more_than_there_is_cannot_be_reused(reused):
    with pytest.raises(ValueError, match="can reuse 0 to 20"):
        cp.random_plan(STEPS, 4, reused, torch.Generator())


@pytest.mark.parametrize(
    "plan, says",
    [
        (torch.ones(2, 3), "boolean"),
        (torch.ones(3, dtype=torch.bool), "boolean"),
        (torch.ones(0, 3, dtype=torch.bool), "boolean"),
        (torch.tensor([[True, False], [True, True]]), r"\[1\] do not"),
    ],
)
def test_what_is_not_a_plan_is_refused(plan, says):
    with pytest.raises(ValueError, match=says):
        cp.checked_plan(plan)


def test_following_a_plan_whose_first_row_reuses_is_refused():
    model = small()
    plan = ~torch.eye(4, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match=r"\[0\] do not"),
        cp.follow_plan(model, cp.branch_names(model), plan),
    ):
        pass


@pytest.mark.parametrize("keys", [(0, 6), (-1, 0), (1, 2), ()])
def test_key_steps_out_of_range_or_without_the_first(keys):
    with pytest.raises(ValueError, match="steps from 0 to 5|step 0"):
        cp.key_step_plan(STEPS, 4, keys)


def test_cache_utilisation_counts_the_first_row():
    assert cp.cache_utilisation(PLAN) == pytest.approx(12 / 24)
    assert cp.cache_utilisation(cp.interval_plan(20, 16, 2)) == 0.5
    assert cp.cache_utilisation(torch.ones(3, 2, dtype=torch.bool)) == 0


# --- what it costs ---


@pytest.mark.parametrize("config", [small().config, DIT_CONFIGS["DiT-S/8"]])
def test_branch_macs_are_those_of_the_formulas(config):
    with torch.device("meta"):
        model = DiT(**config)
    c = {"patch_size": 1, "in_channels": 1} | config
    n, d = (c["input_size"] // c["patch_size"]) ** 2, c["hidden_size"]
    x = torch.zeros(1, c["in_channels"], c["input_size"], c["input_size"])
    names = cp.branch_names(model)
    macs = cp.branch_macs(model, names, x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    attention = (linear_flops(n, d, 4 * d) + attention_flops(1, 1, n, n, d)) // 2
    mlp = 2 * linear_flops(n, d, 4 * d) // 2
    assert macs.branches == (attention, mlp) * c["depth"]
    assert sum(macs.branches) + macs.rest == dit_flops(config) // 2


def test_a_plan_costs_what_a_sampler_that_follows_it_executes():
    model = small()
    names, calls = cp.branch_names(model), inputs(n=1)
    macs = cp.branch_macs(model, names, *calls[0])
    ghost = to_meta(model)
    for plan in (PLAN, torch.ones_like(PLAN), cp.interval_plan(STEPS, 4, 4)):
        with torch.no_grad(), cp.follow_plan(ghost, names, plan), FlopCounterMode(display=False) as counter:
            for x, t, y in calls:
                ghost(x.to("meta"), t.to("meta"), y.to("meta"))
        assert counter.get_total_flops() // 2 == macs.of(plan)
        assert macs.speed_up(plan) == macs.of(torch.ones_like(plan)) / macs.of(plan)


def test_costs_of_another_number_of_branches_are_refused():
    with pytest.raises(ValueError, match="4 branches, 2 are known"):
        cp.BranchMacs((1, 2), 3).of(PLAN)
    with pytest.raises(ValueError, match="called 'blocks.7.attn'"):
        cp.branch_macs(small(), ["blocks.7.attn"], *inputs()[0])


# --- inference ---


def test_following_a_plan_is_the_loop_written_out():
    model, calls = small(), inputs()
    want = by_hand(model, calls, PLAN)
    with torch.no_grad(), cp.follow_plan(model, cp.branch_names(model), PLAN) as cache:
        got = [model(*call) for call in calls]
        cache.clear()
        again = [model(*call) for call in calls]
    for a, b, c in zip(got, want, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    plain = [model(*call) for call in calls]
    assert not torch.allclose(plain[1], got[1]) and torch.equal(plain[0], got[0])


def test_columns_belong_to_names_in_the_order_given():
    model, calls = small(), inputs()
    order = [2, 0, 3, 1]
    names = cp.branch_names(model)
    with torch.no_grad(), cp.follow_plan(model, [names[i] for i in order], PLAN[:, order]):
        got = [model(*call) for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(got, by_hand(model, calls, PLAN), strict=True))


def test_a_plan_of_ones_changes_nothing():
    model, calls = small(), inputs()
    with torch.no_grad():
        plain = [model(*call) for call in calls]
        with cp.follow_plan(model, cp.branch_names(model), torch.ones_like(PLAN)):
            assert all(torch.equal(model(*call), p) for call, p in zip(calls, plain, strict=True))


def test_a_reused_branch_executes_nothing():
    model = small()
    names, ran = cp.branch_names(model), []
    with torch.no_grad(), trace_executions(model) as trace, cp.follow_plan(model, names, PLAN) as cache:
        for call in inputs():
            before = len(trace.order)
            model(*call)
            ran.append([name in trace.order[before:] for name in names])
            inside = [n for n in trace.order[before:] for name in names if n.startswith(name + ".")]
            assert {n.rsplit(".", 1)[0] for n in inside} <= {
                n for n, r in zip(names, ran[-1], strict=True) if r
            }
    assert torch.equal(torch.tensor(ran), PLAN)
    assert [cache.computed[name] for name in names] == PLAN.sum(0).tolist()
    assert [cache.reused[name] for name in names] == (~PLAN).sum(0).tolist()


def test_steps_may_be_set_and_keys_keep_two_halves_apart():
    model, calls = small(), inputs()
    both = {"yes": calls, "no": [(x, t, torch.full_like(y, 10)) for x, t, y in calls]}
    want = {key: by_hand(model, half, PLAN) for key, half in both.items()}
    with torch.no_grad(), cp.follow_plan(model, cp.branch_names(model), PLAN) as cache:
        for cache.step in range(STEPS):
            for cache.key, half in both.items():
                assert torch.equal(model(*half[cache.step]), want[cache.key][cache.step])


def test_one_call_too_many_is_an_error_that_says_what_to_do():
    model, calls = small(), inputs()
    with torch.no_grad(), cp.follow_plan(model, cp.branch_names(model), PLAN):
        for call in calls:
            model(*call)
        with pytest.raises(RuntimeError, match=r"plan has 6 steps, this is call 6.*clear\(\)"):
            model(*calls[0])


def test_names_and_columns_must_agree():
    model = small()
    with (
        pytest.raises(ValueError, match="2 branches are named, the plan has 4"),
        cp.follow_plan(model, cp.branch_names(model)[:2], PLAN),
    ):
        pass
    with (
        pytest.raises(ValueError, match="inside"),
        cp.follow_plan(model, ["blocks.0", "blocks.0.attn"], PLAN[:, :2]),
    ):
        pass
    assert "forward" not in vars(model.blocks[0].attn)


# --- training ---


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_soft_mixing_is_the_loop_written_out(threshold):
    model, calls = small(), inputs()
    weights = torch.rand(STEPS, 4, generator=torch.Generator().manual_seed(5))
    weights[3] = torch.tensor([0.0, 0.05, 1.0, 0.1])
    want, plain = by_hand(model, calls, weights, threshold), [model(*call) for call in calls]
    got = []
    with cr.soft_cache(model, cp.branch_names(model), threshold=threshold) as cache:
        for row, call, alone in zip(weights, calls, plain, strict=True):
            cache.weights = None
            assert torch.equal(model(*call), alone)  # neither reads nor writes
            cache.weights = row
            got.append(model(*call))
    assert max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) == 0
    assert min(float((a - b).abs().max()) for a, b in zip(got[1:], plain[1:], strict=True)) > 1e-3


def test_weights_of_one_change_nothing_and_fill_the_cache():
    model, calls = small(), inputs()
    with torch.no_grad():
        plain = [model(*call) for call in calls]
    with cr.soft_cache(model, cp.branch_names(model)) as cache:
        for call, p in zip(calls, plain, strict=True):
            cache.weights = torch.ones(4)
            assert torch.equal(model(*call), p)
        cache.weights = torch.zeros(4)
        reused = model(*calls[0])
    both = [calls[-1], calls[0]]  # all branches of the last call, used again in the first
    assert torch.equal(reused, by_hand(model, both, torch.tensor([[1.0] * 4, [0.0] * 4]), 0.1)[1])


def test_a_soft_cache_of_zeros_and_ones_is_the_hard_one():
    model, calls = small(), inputs()
    names = cp.branch_names(model)
    with torch.no_grad(), cp.follow_plan(model, names, PLAN):
        hard = [model(*call) for call in calls]
    with cr.soft_cache(model, names) as cache:
        for row, call, want in zip(PLAN.float(), calls, hard, strict=True):
            cache.weights = row
            assert float((model(*call) - want).abs().max()) == 0


def test_gradients_reach_this_steps_weights_only_and_are_right():
    model, calls = small().double(), [(x.double(), t, y) for x, t, y in inputs(3)]
    model.pos_embed = model.pos_embed.double()
    rows = torch.tensor([[1.0] * 4, [0.6, 0.3, 0.9, 0.2], [0.7, 0.4, 0.05, 0.5]], dtype=torch.float64)

    def last(row: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        with cr.soft_cache(model, cp.branch_names(model)) as cache:
            for weights, call in zip((rows[0], before, row), calls, strict=True):
                cache.weights = weights
                out = model(*call)
        return out.square().mean()

    row, before = rows[2].clone().requires_grad_(), rows[1].clone().requires_grad_()
    last(row, before).backward()
    assert before.grad is None  # what is stored is cut from the graph
    for i in range(4):
        h = torch.zeros(4, dtype=torch.float64)
        h[i] = 1e-6
        slope = (last(rows[2] + h, rows[1]) - last(rows[2] - h, rows[1])) / 2e-6
        assert float(row.grad[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-9)


def test_soft_cache_refuses_other_shapes_and_leaves_the_model_as_it_was():
    model, calls = small(), inputs()
    names = cp.branch_names(model)
    with pytest.raises(RuntimeError, match="3.*for 4 branches"), cr.soft_cache(model, names) as cache:
        cache.weights = torch.ones(3)
        model(*calls[0])
    with pytest.raises(RuntimeError, match=r"stored: clear\(\)"), cr.soft_cache(model, names) as cache:
        cache.weights = torch.ones(4)
        model(*calls[0])
        model(*(v[:2] for v in calls[0]))
    with (
        pytest.raises(ValueError, match="inside"),
        cr.soft_cache(model, ["blocks.0.attn", "blocks.0.attn.qkv"]),
    ):
        pass
    assert all("forward" not in vars(model.get_submodule(name)) for name in names)


# --- the router ---


def test_the_router_starts_as_the_full_model_and_its_first_row_is_fixed():
    router = cr.Router(5, 3)
    assert router.logits.shape == (4, 3)
    assert router.plan().all() and router.weights()[1, 0].item() == pytest.approx(0.880797, abs=1e-6)
    torch.nn.init.constant_(router.logits, -4.0)
    assert (
        torch.equal(router.weights()[0], torch.ones(3))
        and router.plan().tolist() == [[True] * 3] + [[False] * 3] * 4
    )
    router.weights().sum().backward()
    assert float(router.logits.grad[0, 0]) == pytest.approx(0.0176627, rel=1e-4)  # r (1 - r)


def test_the_threshold_is_on_weights_and_a_count_moves_it():
    router = cr.Router(3, 2, threshold=0.3)
    with torch.no_grad():  # weights 0.29, 0.31 around the threshold
        router.logits.copy_(torch.logit(torch.tensor([[0.29, 0.31], [0.9, 0.5]])))
    assert router.plan().int().tolist() == [[1, 1], [0, 1], [1, 1]]
    assert router.plan(2).int().tolist() == [[1, 1], [0, 0], [1, 1]]
    assert router.plan(0).all() and not router.plan().requires_grad


def test_clamping_is_symmetric():
    router = cr.Router(2, 3, limit=2.5)
    with torch.no_grad():
        router.logits.copy_(torch.tensor([[-9.0, 1.0, 9.0]]))
    router.clamp_()
    assert router.logits.tolist() == [[-2.5, 1.0, 2.5]] and router.logits.requires_grad


@pytest.mark.parametrize(
    "steps, branches, options",
    [(1, 3, {}), (3, 0, {}), (3, 3, {"threshold": 0.0}), (3, 3, {"threshold": 1.0}), (3, 3, {"start": -6.0})],
)
def test_a_router_refuses_numbers_out_of_range(steps, branches, options):
    with pytest.raises(ValueError, match="need steps >= 2"):
        cr.Router(steps, branches, **options)


def test_training_a_router_prunes_what_is_free_and_keeps_what_is_not():
    """One branch whose output never changes, one whose does: only the first can be reused without a loss."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.still, self.moving = nn.Identity(), nn.Identity()

        def forward(self, a, b):
            return self.still(a) + self.moving(b)

    model, router = Two(), cr.Router(4, 2)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.2)
    calls = [(torch.ones(2), torch.full((2,), float(i))) for i in range(4)]
    for _ in itertools.repeat(None, 60):
        with cr.soft_cache(model, ["still", "moving"]) as cache:
            for i, (a, b) in enumerate(calls):
                cache.weights = router.weights()[i]
                loss = (model(a, b) - a - b).square().mean() + 0.05 * cache.weights.sum()
                loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        router.clamp_()
    assert router.plan().int().tolist() == [[1, 1], [0, 1], [0, 1], [0, 1]]
