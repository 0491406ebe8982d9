"""The published models, built on the meta device from minilib's parts: their sizes and costs are the published ones."""

import pytest
import torch

from minilib.models import DIT_CONFIGS, DIT_MOE_CONFIGS, DiT
from minilib.profiling import count_flops, count_parameters


def on_meta(config):
    with torch.device("meta"):
        return DiT(**config)


def one_image(config):
    size = config["input_size"]
    return torch.zeros(1, 4, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long)


def dit_parameters(d, depth, patch, classes=1000, channels=4):
    block = 3 * d * d + 3 * d + d * d + d + 2 * 4 * d * d + 4 * d + d + 6 * d * d + 6 * d
    embedders = channels * patch**2 * d + d + 256 * d + d + d * d + d + (classes + 1) * d
    final = 2 * d * d + 2 * d + (d + 1) * patch**2 * 2 * channels
    return embedders + depth * block + final


@pytest.mark.parametrize(
    "name, exact",
    [
        ("DiT-S/2", 32_865_056),
        ("DiT-B/2", 130_315_808),
        ("DiT-L/2", 457_840_672),
        ("DiT-XL/2", 674_834_720),
    ],
)
def test_the_formula_gives_the_exact_integer(name, exact):
    config = DIT_CONFIGS[name]
    assert dit_parameters(config["hidden_size"], config["depth"], config["patch_size"]) == exact


#: Peebles and Xie 2023, table 4: parameters in millions, and "Gflops", which are multiply-accumulates.
PUBLISHED = {
    "DiT-S/8": (33, 0.36),
    "DiT-S/4": (33, 1.41),
    "DiT-S/2": (33, 6.06),
    "DiT-B/8": (131, 1.42),
    "DiT-B/4": (130, 5.56),
    "DiT-B/2": (130, 23.01),
    "DiT-L/8": (459, 5.01),
    "DiT-L/4": (458, 19.70),
    "DiT-L/2": (458, 80.71),
    "DiT-XL/8": (676, 7.39),
    "DiT-XL/4": (675, 29.05),
    "DiT-XL/2": (675, 118.64),
}


@pytest.mark.parametrize("name", DIT_CONFIGS)
def test_dit_has_the_published_size_and_cost(name):
    config = DIT_CONFIGS[name]
    model = on_meta(config)
    millions, gmac = PUBLISHED[name]
    exact = dit_parameters(config["hidden_size"], config["depth"], config["patch_size"])
    assert count_parameters(model) == exact
    assert round(exact / 1e6) == millions
    assert count_flops(model, *one_image(config)).macs / 1e9 == pytest.approx(gmac, abs=0.02)


def test_dit_xl_2_multiply_accumulates_by_formula():
    d, depth, n, out = 1152, 28, 256, 32
    block = n * (4 * d * d + 8 * d * d) + 2 * n * n * d + 6 * d * d
    expected = depth * block + n * 16 * d + 256 * d + d * d + 2 * d * d + n * d * out
    assert count_flops(on_meta(DIT_CONFIGS["DiT-XL/2"]), *one_image(DIT_CONFIGS["DiT-XL/2"])).macs == expected


@pytest.mark.parametrize(
    "name, exact, total, active, digit, gmac",
    [  # Fei et al. 2024, table 1; ``digit`` is the worth of the last digit printed
        ("DiT-MoE-S/2-8E2A", 199_209_248, 199e6, 71e6, 1e6, 15.43),
        ("DiT-MoE-S/2-16E2A", 369_115_424, 369e6, 71e6, 1e6, 15.44),
        ("DiT-MoE-B/2-8E2A", 795_664_928, 795e6, 286e6, 1e6, 61.68),
        ("DiT-MoE-L/2-8E2A", 2_823_501_856, 2.8e9, 1.0e9, 1e8, 219.26),
        ("DiT-MoE-XL/2-8E2A", 4_167_869_216, 4.1e9, 1.5e9, 1e8, 323.74),
        ("DiT-MoE-G/2-16E2A", 16_503_356_704, 16.5e9, 3.1e9, 1e8, 690.94),
    ],
)
def test_dit_moe_has_the_published_size_and_cost(name, exact, total, active, digit, gmac):
    config = DIT_MOE_CONFIGS[name]
    model = on_meta(config)
    assert count_parameters(model) == exact
    d, depth, n = config["hidden_size"], config["depth"], 256
    experts, k = config["mlp_options"]["num_experts"], config["mlp_options"]["k"]
    idle = depth * (experts - k) * 3 * d * 4 * d
    # Some entries are rounded, others cut off (71.8 million is printed as 71M).
    assert abs(exact - total) < digit and abs(exact - idle - active) < digit
    # The published count leaves out the two matrix products inside attention, 2 n^2 d a block.
    macs = count_flops(model, *one_image(config)).macs - depth * 2 * n * n * d
    assert macs / 1e9 == pytest.approx(gmac, abs=0.006)
