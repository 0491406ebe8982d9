"""Small trained additions to a frozen model: LoRA, scale and shift, bottlenecks, layers that start at zero."""

from .add import add_adapter, add_affine, add_affiner, add_lora
from .branches import AffineBranch, AffinerBranch, Branch, LoRABranch
from .handle import Adapter, adapter_names, get_adapter, use_adapters
from .layers import BottleneckAdapter, ZeroConv2d, ZeroLinear, zero_

__all__ = [
    "Adapter",
    "AffineBranch",
    "AffinerBranch",
    "BottleneckAdapter",
    "Branch",
    "LoRABranch",
    "ZeroConv2d",
    "ZeroLinear",
    "adapter_names",
    "add_adapter",
    "add_affine",
    "add_affiner",
    "add_lora",
    "get_adapter",
    "use_adapters",
    "zero_",
]
