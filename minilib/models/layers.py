"""The small layers around a transformer block: patches, time, label, feed-forward networks, modulation."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from .positions import timestep_embedding


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b n d"]:
    """x (1 + scale) + shift: the adaptive part of adaptive layer norm (DiT, section 3.2)."""
    return torch.addcmul(shift, x, 1 + scale)


def autocast_off(device_type: str) -> AbstractContextManager:
    """A context without automatic half precision, also for devices that know none (meta)."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


class PatchEmbed(nn.Module):
    """Cuts an image into patches and embeds each by one linear layer.

    The linear layer acts on a patch flattened in the order (channel, row, column): it is the strided
    convolution of the official code, with its weight reshaped, and it gives contiguous tokens.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Tokens in raster order."""
        p = self.patch_size
        return self.proj(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))


class TimestepEmbedder(nn.Module):
    """A time becomes 256 waves, and a two-layer network (SiLU between) makes them a vector of width ``dim``."""

    def __init__(self, dim: int, *, frequency_dim: int = 256, frequency_shift: float = 0.0) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.frequency_shift = frequency_shift
        self.fc1 = nn.Linear(frequency_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Num[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Embed the times ``t`` (0 to 1000)."""
        waves = timestep_embedding(t, self.frequency_dim, frequency_shift=self.frequency_shift)
        return self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


class LabelEmbedder(nn.Embedding):
    """A table with one row a class and one more, row ``num_classes``, for 'no label'."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)
        self.num_classes = num_classes

    def forward(self, y: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Look the labels up.

        Raises:
            ValueError: a label outside 0..num_classes (seen on a CPU; a GPU reports a device assertion).
        """
        try:
            return super().forward(y)
        except IndexError as error:
            raise ValueError(
                f"labels run from {int(y.min())} to {int(y.max())}; this model knows 0..{self.num_classes - 1} "
                f"and {self.num_classes} for 'no label'"
            ) from error


class GeluMLP(nn.Module):
    """The feed-forward network of DiT: linear, GELU (tanh approximation), linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """Act on each token by itself."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """A gated feed-forward network, W_down (SiLU(W_gate x) * W_up x), without biases (Shazeer 2020, arXiv 2002.05202).

    ``w_in`` holds W_gate above W_up, so that one matrix product serves both.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w_down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """Act on each token by itself."""
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_down(F.silu(gate) * up)
