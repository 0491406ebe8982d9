"""Either side's scheduler in the other's loop."""

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel

import minilib.schedulers as S
from minilib.sampling import sample_final

# numpy 2 warns of how diffusers turns its tables into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ours_in_diffusers_ddim_pipeline(unet: UNet2DModel, eta: float) -> None:
    images = []
    for scheduler in (diffusers.DDIMScheduler(), S.DDIMScheduler()):
        pipeline = DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler.from_config(scheduler.config))
        pipeline.scheduler = scheduler  # the constructor converts to diffusers' class
        pipeline.set_progress_bar_config(disable=True)
        g = [torch.Generator().manual_seed(k) for k in (3, 4)]
        images.append(
            pipeline(batch_size=2, num_inference_steps=5, eta=eta, generator=g, output_type="np").images
        )
    assert abs(images[0] - images[1]).max() < 1e-5


@pytest.mark.parametrize("name", [n for n in S.SCHEDULERS if not n.startswith("Flow")])
def test_ours_in_a_loop_like_dit_pipeline(unet: UNet2DModel, name: str) -> None:
    """scale_model_input, network, step: with 2c channels split off by the loop, as diffusers' DiTPipeline does."""
    results = []
    for kind in (S.SCHEDULERS[name], getattr(diffusers, name)):
        scheduler = kind(beta_start=1e-4, beta_end=0.02)
        scheduler.set_timesteps(5)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, 1, 8, 8, generator=g) * scheduler.init_noise_sigma
        extra = {"generator": g} if name == "DDPMScheduler" else {}
        with torch.no_grad():
            for t in scheduler.timesteps:
                out = torch.cat([unet(scheduler.scale_model_input(x, t), t).sample] * 2, dim=1)
                model_output, _ = torch.split(out, 1, dim=1)
                x = scheduler.step(model_output, t, x, return_dict=False, **extra)[0]
        results.append(x)
    assert (results[0] - results[1]).abs().max() < 1e-4 * results[1].abs().max()


@pytest.mark.parametrize("name", list(S.SCHEDULERS))
def test_both_in_our_loop(name: str) -> None:
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + 1e-4 * t.view(-1, 1, 1, 1)

    takes_generator = name in ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler")
    a, b = (
        sample_final(
            model, kind(), noise, num_inference_steps=5,
            generator=torch.Generator().manual_seed(1) if takes_generator else None,
        )
        for kind in (S.SCHEDULERS[name], getattr(diffusers, name))
    )  # fmt: skip
    assert (a - b).abs().max() < 1e-4 * max(1.0, b.abs().max().item())
