import pytest
import torch

from minilib.guidance import classifier_free_guidance, conditional
from minilib.models import DiT
from minilib.sampling import SampleStep, initial_noise, sample, sample_final


class Halver:
    """A scheduler of the protocol's smallest form: each step halves what the model says."""

    init_noise_sigma = 3.0

    def set_timesteps(self, n, device=None):
        self.timesteps = torch.arange(n, 0, -1)

    def scale_model_input(self, x, t):
        return x / t

    def step(self, prediction, t, x, generator=None):
        class Out:
            prev_sample = x - 0.5 * prediction
            pred_original_sample = prediction

        self.generator = generator
        return Out


def test_sampling_follows_the_protocol():
    seen = []

    def model(x, t):
        seen.append((x.clone(), t.clone()))
        return x

    noise = torch.ones(2, 1)
    steps = list(sample(model, Halver(), noise, num_inference_steps=2))
    assert [s.t for s in steps] == [2.0, 1.0] and all(isinstance(s, SampleStep) for s in steps)
    assert torch.equal(seen[0][0], 3 * noise / 2) and seen[0][1].tolist() == [2, 2]
    assert torch.equal(steps[0].x, 3 * noise - 0.75) and torch.equal(steps[1].x, steps[0].x / 2)
    assert torch.equal(sample_final(model, Halver(), noise, num_inference_steps=2), steps[-1].x)


def test_sampling_passes_the_generator_and_refuses_zero_steps():
    scheduler, generator = Halver(), torch.Generator()
    sample_final(lambda x, t: x, scheduler, torch.ones(1, 1), num_inference_steps=1, generator=generator)
    assert scheduler.generator is generator
    with pytest.raises(ValueError, match="num_inference_steps"):
        next(sample(lambda x, t: x, Halver(), torch.ones(1, 1), num_inference_steps=0))


def test_noise_is_a_function_of_the_seed():
    a, b = (initial_noise((2, 3), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.fixture
def dit():
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


X, T, Y = torch.randn(2, 1, 4, 4), torch.tensor([300.0, 300.0]), torch.tensor([0, 2])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_extrapolates_the_mean_and_keeps_the_variance(dit, scale):
    with torch.no_grad():
        cond, uncond = dit(X, T, Y), dit(X, T, torch.full_like(Y, 3))
        out = classifier_free_guidance(dit, Y, guidance_scale=scale)(X, T)
    expected = uncond[:, :1] + scale * (cond[:, :1] - uncond[:, :1])
    assert (out[:, :1] - expected).abs().max() < 1e-5
    assert (out[:, 1:] - cond[:, 1:]).abs().max() < 1e-5


def test_guidance_takes_embeddings_and_negative_conditions(dit):
    with torch.no_grad():
        e, null = dit.embed_label(Y), dit.embed_label(torch.full_like(Y, 3))
        by_id = classifier_free_guidance(dit, Y, guidance_scale=2.5)(X, T)
        by_embedding = classifier_free_guidance(dit, cond=e, null=null, guidance_scale=2.5)(X, T)
        negative = classifier_free_guidance(dit, Y, 1, guidance_scale=2.0)(X, T)
        expected = 2 * dit(X, T, Y)[:, :1] - dit(X, T, torch.full_like(Y, 1))[:, :1]
    assert (by_id - by_embedding).abs().max() < 1e-5
    assert (negative[:, :1] - expected).abs().max() < 1e-5


def test_guidance_interval_and_cost(dit):
    calls = []
    handle = dit.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    guided = classifier_free_guidance(dit, Y, guidance_scale=3.0, interval=(100, 400))
    plain = conditional(dit, Y)
    with torch.no_grad():
        for t, size in ((50.0, 2), (100.0, 4), (300.0, 4), (400.0, 4), (401.0, 2)):
            out, bare = guided(X, torch.full((2,), t)), plain(X, torch.full((2,), t))
            assert calls[-2:] == [size, 2]
            assert torch.equal(out, bare) == (size == 2)
        classifier_free_guidance(dit, Y, guidance_scale=1.0)(X, T)
        assert calls[-1] == 2
    handle.remove()


def test_guidance_refuses(dit):
    with pytest.raises(ValueError, match="exactly one"):
        classifier_free_guidance(dit)
    with pytest.raises(ValueError, match="exactly one"):
        conditional(dit, Y, cond=torch.zeros(2, 16))
    with pytest.raises(ValueError, match="null embeddings"):
        classifier_free_guidance(dit, cond=torch.zeros(2, 16))
    with pytest.raises(ValueError, match="interval"):
        classifier_free_guidance(dit, Y, interval=(5, 1))


def test_guidance_of_texts_by_tokens_and_by_states_is_the_same():
    from minilib.guidance import classifier_free_guidance, conditional
    from minilib.models import TextUNet

    torch.manual_seed(0)
    unet = {"block_out_channels": (8, 8), "layers_per_block": 1, "attention_levels": (1,), "num_heads": 2}
    model = TextUNet(
        text={"vocab_size": 9, "max_length": 5, "dim": 8, "num_heads": 2, "depth": 1}, unet={**unet, "norm_num_groups": 4}
    ).eval()  # fmt: skip
    for p in model.parameters():  # nothing may start at zero, or the text would not matter
        p.data.normal_(std=0.3)
    x, t = torch.randn(3, 3, 8, 8), torch.full((3,), 500)
    tokens, null = torch.randint(1, 9, (3, 5)), model.null_tokens(3, 5)
    states, null_states = (model.encode_text(y)._asdict() for y in (tokens, null))
    by_tokens = classifier_free_guidance(model, tokens, null, guidance_scale=3.0)(x, t)
    by_states = classifier_free_guidance(model, cond=states, null=null_states, guidance_scale=3.0)(x, t)
    by_hand = model(x, t, null) + 3.0 * (model(x, t, tokens) - model(x, t, null))
    assert (by_tokens - by_states).abs().max() < 1e-5 and (by_tokens - by_hand).abs().max() < 1e-4
    assert (by_tokens - model(x, t, tokens)).abs().max() > 1e-2
    assert torch.equal(conditional(model, cond=states)(x, t), conditional(model, tokens)(x, t))
    with pytest.raises(ValueError, match="context"):
        classifier_free_guidance(model, cond=states, null={"pooled": states["pooled"]}, guidance_scale=2.0)
    with pytest.raises(ValueError, match="same keys"):
        classifier_free_guidance(model, cond=states, guidance_scale=2.0)
