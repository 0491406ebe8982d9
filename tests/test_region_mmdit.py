"""An MM-DiT that runs some of its tokens: against the dense model, a mixed input, a mask, and counted operations."""

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minilib.costs import mmdit_flops
from minilib.guidance import classifier_free_guidance
from minilib.kernels.tokens import gather_tokens
from minilib.models import MMDiT, TextMMDiT
from minilib.profiling import to_meta
from minilib.region_adaptive import RegionAdaptiveEuler
from minilib.region_mmdit import MMDiTTokens, image_to_tokens, partial_mmdit_flops
from minilib.schedulers import FlowMatchEulerDiscreteScheduler


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight away from its start, so that no branch is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    return model.eval()


TEXT = {"vocab_size": 20, "max_length": 5, "dim": 16, "depth": 1, "num_heads": 2}
TOKENS = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 2], [5, 0, 0, 0, 0]])
INDICES = torch.stack(
    [torch.randperm(24, generator=torch.Generator().manual_seed(i))[:7].sort().values for i in range(3)]
)


def text_model(**options) -> TextMMDiT:
    mmdit = {"hidden_size": 16, "depth": 3, "num_heads": 2, "rope_theta": 100.0, **options}
    return awake(TextMMDiT(TEXT, mmdit))


@torch.no_grad()
def states(model: TextMMDiT, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    return model.encode_text(tokens)._asdict()


class TestMMDiT:
    @pytest.mark.parametrize("options", [{}, {"positions": "sincos"}, {"pooled_dim": 16}, {"depth": 1}])
    @pytest.mark.parametrize("keys_values", ["kept", "fresh", "dropped"])
    def test_a_dense_call_is_the_model(self, options, keys_values):
        model, image = text_model(**options), draw(3, 3, 8, 12)
        run = MMDiTTokens(model.denoiser, states(model), 4, 6, keys_values=keys_values)
        with torch.no_grad():
            ours = run.image(run(run.tokens(image), 0.3))
            theirs = model(image, torch.full((3,), 300.0), TOKENS)
        assert (ours - theirs).abs().max() <= 1e-6 and theirs.std() > 0.1
        assert torch.equal(run.image(run.tokens(image)), image)

    @pytest.mark.parametrize("options", [{}, {"positions": "sincos"}, {"pooled_dim": 16}])
    def test_some_tokens_with_fresh_keys_and_values_get_what_a_dense_call_gives_them(self, options):
        model, x = text_model(**options), draw(3, 24, 12)
        kept = MMDiTTokens(model.denoiser, states(model), 4, 6)
        fresh = MMDiTTokens(model.denoiser, states(model), 4, 6, keys_values="fresh")
        with torch.no_grad():
            dense, part = kept(x, 0.7), kept(x, 0.7, INDICES)
            assert torch.equal(fresh(x, 0.7, INDICES), gather_tokens(fresh(x, 0.7), INDICES))
        assert (part - gather_tokens(dense, INDICES)).abs().max() <= 1e-5

    def test_keys_and_values_of_idle_tokens_are_old_ones(self):
        """With one block, keys and values are made of the input alone: old rows are those of a mixed input."""
        model, old, new = text_model(depth=1), draw(3, 24, 12), draw(3, 24, 12, seed=1)
        run = MMDiTTokens(model.denoiser, states(model), 4, 6)
        fresh = MMDiTTokens(model.denoiser, states(model), 4, 6, keys_values="fresh")
        ran = torch.zeros(3, 24, 1, dtype=torch.bool).scatter_(1, INDICES[..., None], True)
        with torch.no_grad():
            run(old, 0.5)
            part = run(new, 0.5, INDICES)
            expected = fresh(torch.where(ran, new, old), 0.5, INDICES)
            assert (part - expected).abs().max() <= 1e-5
            assert (part - fresh(new, 0.5, INDICES)).abs().max() > 1e-3
            # and the rows that ran stay for the next step
            again = run(old, 0.5, INDICES[:, :3])
            mixed = torch.where(ran, new, old).scatter(
                1, INDICES[:, :3, None].expand(-1, -1, 12), gather_tokens(old, INDICES[:, :3])
            )
            assert (again - fresh(mixed, 0.5, INDICES[:, :3])).abs().max() <= 1e-5

    def test_dropped_tokens_are_not_seen(self):
        model, x = text_model(), draw(3, 24, 12)
        run = MMDiTTokens(model.denoiser, states(model), 4, 6, keys_values="dropped")
        seen = torch.zeros(3, 24 + 5, dtype=torch.bool)
        seen.scatter_(1, INDICES, True)
        seen[:, 24:] = states(model)["context_mask"]
        with torch.no_grad():
            part = run(x, 0.5, INDICES)
            hidden = model.denoiser(
                run.image(x), torch.full((3,), 500.0), states(model)["context"], mask=seen[:, None, None]
            )
        expected = gather_tokens(run.tokens(hidden), INDICES)
        assert (part - expected).abs().max() <= 1e-5
        assert (part - gather_tokens(run(x, 0.5), INDICES)).abs().max() > 1e-3

    @pytest.mark.parametrize("keys_values", ["kept", "fresh"])
    def test_guidance(self, keys_values):
        model, image = text_model(), draw(3, 3, 8, 12)
        null = states(model, model.null_tokens(3))
        run = MMDiTTokens(
            model.denoiser, states(model), 4, 6, keys_values=keys_values, null=null, guidance_scale=3.0
        )
        guided = classifier_free_guidance(model, TOKENS, model.null_tokens(3), guidance_scale=3.0)
        with torch.no_grad():
            expected = run.tokens(guided(image, torch.full((3,), 500.0)))
            dense, part = run(run.tokens(image), 0.5), run(run.tokens(image), 0.5, INDICES)
        assert (dense - expected).abs().max() <= 1e-5
        assert (part - gather_tokens(expected, INDICES)).abs().max() <= 1e-5

    def test_ratio_one_through_the_kept_rows_is_dense_sampling(self):
        model, image = text_model(), draw(3, 3, 8, 12)
        run = MMDiTTokens(model.denoiser, states(model), 4, 6)
        every = torch.arange(24).expand(3, -1)

        def all_named(x: Tensor, sigma: float, indices: Tensor | None) -> Tensor:
            return run(x, sigma, every if run.caches else None)

        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(6)
        *_, ours = RegionAdaptiveEuler(1.0, resets=()).sample(all_named, run.tokens(image), scheduler.sigmas)
        x = image
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.expand(3), TOKENS), t, x).prev_sample
        assert (run.image(ours.x) - x).abs().max() <= 1e-4  # six steps pass the rounding of each call on

    def test_tokens_of_an_image_of_other_sides(self):
        image = draw(2, 3, 8, 12)
        tokens = image_to_tokens(image, 2)
        assert tokens.shape == (2, 24, 12)
        assert torch.equal(tokens[1, 8], image[1, :, 2:4, 4:6].permute(1, 2, 0).flatten())

    def test_refusals(self):
        model = text_model()
        with pytest.raises(ValueError, match="choose one of"):
            MMDiTTokens(model.denoiser, states(model), 4, 6, keys_values="some")
        with pytest.raises(ValueError, match="give its text as null"):
            MMDiTTokens(model.denoiser, states(model), 4, 6, guidance_scale=2.0)
        dual = MMDiT(hidden_size=16, depth=2, num_heads=2, context_dim=16, dual_attention_layers=[0])
        with pytest.raises(ValueError, match="second attention"):
            MMDiTTokens(dual, states(model), 4, 6)
        run = MMDiTTokens(model.denoiser, states(model), 4, 6)
        with torch.no_grad(), pytest.raises(ValueError, match="run all tokens"):
            inspect.unwrap(MMDiTTokens.__call__)(run, draw(3, 24, 12), 0.5, INDICES)


class TestFlops:
    @pytest.mark.parametrize(
        "options", [{}, {"depth": 1, "mlp_ratio": 2.0}, {"pooled_dim": 16}, {"unused_context_query": True}]
    )
    @pytest.mark.parametrize("active", [1, 7, 24])
    def test_formula_is_what_is_counted(self, options, active):
        model = text_model(**options)
        ghost = to_meta(model.denoiser)
        text = {name: value[:1].to("meta") for name, value in states(model).items()}
        run, x = MMDiTTokens(ghost, text, 4, 6), torch.zeros(1, 24, 12, device="meta")
        with torch.no_grad():
            run(x, 0.5)
            with FlopCounterMode(display=False) as counter:
                run(x, 0.5, torch.zeros(1, active, dtype=torch.long, device="meta"))
        assert counter.get_total_flops() == partial_mmdit_flops(model.denoiser.config, 8, 12, 5, active)

    def test_all_tokens_cost_a_dense_call_and_wrong_ones_are_refused(self):
        config = text_model().denoiser.config
        assert partial_mmdit_flops(config, 8, 12, 5, 24) == mmdit_flops(config, 8, 12, 5)
        for wrong in (-1, 25):
            with pytest.raises(ValueError, match="active is 0 to 24"):
                partial_mmdit_flops(config, 8, 12, 5, wrong)
        with pytest.raises(ValueError, match="one attention a block"):
            partial_mmdit_flops({**config, "dual_attention_layers": [0]}, 8, 12, 5, 3)
