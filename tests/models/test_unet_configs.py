import pytest
import torch

from minilib.models import UNet
from minilib.models.unet_configs import UNET_CONFIGS
from minilib.profiling import count_parameters

PUBLISHED = {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684}


@pytest.mark.parametrize("name", UNET_CONFIGS)
def test_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = UNet(**UNET_CONFIGS[name])
    assert count_parameters(model) == PUBLISHED[name]


def test_sdxl_runs():
    config = UNET_CONFIGS["SDXL"]
    with torch.device("meta"), torch.no_grad():
        x, text = torch.zeros(2, 4, 64, 64), torch.zeros(2, 77, 2048)
        out = UNet(**config)(x, torch.zeros(2), text, None, torch.zeros(2, config["pooled_dim"]))
    assert out.shape == x.shape


def test_heads_as_published():
    """SDXL's heads are 64 wide at every level."""
    config = UNET_CONFIGS["SDXL"]
    assert {w // h for w, h in zip(config["block_out_channels"], config["num_heads"], strict=True)} == {64}
