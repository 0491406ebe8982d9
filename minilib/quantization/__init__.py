"""Low-bit models, simulated: specifications, quantisers, layers, whole models, and which layer suffers most.

Everything here rounds and stays in floating point (``minilib.kernels.quant`` has the grid, and layers that compute in integers):
it shows what low bits do to a model, and makes it slower.
"""

import lazy_loader as lazy

# A function with its module's name: imported here, or whoever imports the module first would put the module in its place.
from minilib.quantization.sensitivity import sensitivity  # noqa: F401

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "allocation": [
            "allocate_bits",
            "allocate_by_group",
            "allocate_in_order",
            "gain_per_bit",
            "mean_bits",
        ],
        "audit": ["Variation", "audit_variation", "inject_outliers", "peak_over_median"],
        "balance": [
            "ChannelBalance",
            "ChannelMaxima",
            "TimeRanges",
            "balance_scale",
            "channel_balance",
            "watch_channels",
        ],
        "folding": ["fold_balance", "modulated_inputs"],
        "layers": ["QuantConv2d", "QuantLinear", "Transform", "quantize_layer"],
        "model": [
            "Memory",
            "QuantRule",
            "calibrate",
            "quant_layers",
            "quantize_copy",
            "quantize_model",
            "select_layers",
            "uniform_rules",
            "weight_memory",
        ],
        "grids": ["OFF", "QuantSpec", "grid_of_range", "round_to_grid", "spec_grid"],
        "quantizers": ["Quantizer"],
        "rotation": ["Chain", "HadamardRotation", "block_size", "hadamard", "rotation_cost"],
        "timewise": ["Clock", "TimewiseQuantizer"],
    },
)
