"""The block of an MM-DiT, and the embeddings around a stack of them (Esser et al. 2024, arXiv 2403.03206, figure 2)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from ..attention.joint import JointAttention, JointTable, RotaryAttention, rows
from ..attention.registry import Mask
from .layers import GeluMLP
from .positions import sincos_1d

NORM_EPS = 1e-6


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``layers.modulate``, for a shift and a scale of each sample (b, 1, d) or of each token (b, n, d)."""
    return torch.addcmul(shift, x, 1 + scale)


class MMDiTBlock(nn.Module):
    """Two streams with their own weights, adaLN-Zero in both, mixed by one joint attention.

    Both modulations start at zero, so the block starts as the identity on both streams.

    Args:
        dim: width of a token.
        num_heads: attention heads.
        mlp_ratio: hidden width of both feed-forward networks over ``dim``.
        context_pre_only: the context is read and returned as it came: the last block.
        dual_attention: a second attention, of the image tokens among themselves, beside the joint one (SD3.5).
        attention: options of ``JointAttention``; ``dual_attention`` gets those it shares.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: str = "rms_norm",
        context_pre_only: bool = False,
        unused_context_query: bool = False,
        dual_attention: bool = False,
        attention: str = "full",
        attention_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        variant = {"variant": attention, "variant_options": attention_options}
        self.context_pre_only, self.dual_attention = context_pre_only, dual_attention
        self.attn = JointAttention(
            dim,
            num_heads,
            qk_norm=qk_norm,
            context_pre_only=context_pre_only,
            unused_context_query=unused_context_query,
            **variant,
        )
        self.attn2 = (
            RotaryAttention(dim, num_heads, qk_norm=bool(qk_norm), **variant) if dual_attention else None
        )
        self.mlp = GeluMLP(dim, int(dim * mlp_ratio))
        self.context_mlp = None if context_pre_only else GeluMLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Linear(dim, (9 if dual_attention else 6) * dim)
        self.context_adaLN_modulation = nn.Linear(dim, (2 if context_pre_only else 6) * dim)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b l d"],
        c: Float[Tensor, "b d"] | Float[Tensor, "b g d"],
        *,
        mask: Mask | None = None,
        rotary: JointTable | None = None,
        groups: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"]]:
        """Transform both streams under the condition ``c``, which has passed through SiLU already.

        Args:
            x: image tokens.
            context: context tokens.
            c: the condition, or several of them.
            mask: over image and context tokens in this order, see ``JointAttention``.
            rotary: positions of image and context tokens.
            groups: for several conditions, which one modulates which image token; the context has the first.

        Returns:
            both streams.
        """
        c = c if c.ndim == 3 else c.unsqueeze(1)
        modulation = self.adaLN_modulation(c)
        if groups is not None:
            modulation = modulation[:, groups]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, *second = modulation.split(x.shape[-1], dim=2)
        ctx_modulation = self.context_adaLN_modulation(c[:, :1]).split(x.shape[-1], dim=2)
        normed = _norm(x)
        ctx_normed = _modulate(_norm(context), *ctx_modulation[:2])
        out, ctx_out = self.attn(_modulate(normed, shift_a, scale_a), ctx_normed, mask=mask, rotary=rotary)
        x = torch.addcmul(x, gate_a, out)
        if self.attn2 is not None:
            shift, scale, gate = second
            n = x.shape[1]
            own_mask = None if mask is None else rows(mask, n)[..., :n]
            own_rotary = None if rotary is None else rotary[..., :n, :]
            out = self.attn2(_modulate(normed, shift, scale), rotary=own_rotary, mask=own_mask)
            x = torch.addcmul(x, gate, out)
        x = torch.addcmul(x, gate_m, self.mlp(_modulate(_norm(x), shift_m, scale_m)))
        if self.context_pre_only:
            return x, context
        _, _, gate_a, shift_m, scale_m, gate_m = ctx_modulation
        context = torch.addcmul(context, gate_a, ctx_out)
        return x, torch.addcmul(
            context, gate_m, self.context_mlp(_modulate(_norm(context), shift_m, scale_m))
        )


class PooledEmbedder(nn.Module):
    """A vector for the whole text becomes a part of the condition: linear, SiLU, linear."""

    def __init__(self, pooled_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pooled_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        """Embed the pooled text."""
        return self.fc2(F.silu(self.fc1(pooled)))


class SincosPositions(nn.Module):
    """Fixed sine-cosine positions at any (row, column), at unit scale: the ones of ``sincos_2d``, not stored."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}: sine and cosine of row and column")
        self.dim = dim

    def forward(self, ids: Num[Tensor, "*b n 2"]) -> Float[Tensor, "*b n {self.dim}"]:
        """The embedding of each position."""
        rows, columns = (sincos_1d(ids[..., axis].flatten(), self.dim // 2) for axis in (0, 1))
        return torch.cat([columns, rows], dim=1).float().view(*ids.shape[:-1], self.dim)


class CroppedPositions(nn.Module):
    """A stored table of ``max_size`` x ``max_size`` positions, of which a canvas uses the middle (SD3).

    At first they are sines and cosines of rows and columns counted in units of ``max_size / base_size``
    (diffusers, ``embeddings.py: PatchEmbed``). The table is a buffer and is saved with the weights.
    """

    def __init__(self, dim: int, max_size: int, base_size: int) -> None:
        super().__init__()
        self.max_size = max_size
        steps = torch.arange(max_size, dtype=torch.float32) / (max_size / base_size)
        columns = sincos_1d(steps.repeat(max_size), dim // 2)
        rows = sincos_1d(steps.repeat_interleave(max_size), dim // 2)
        self.register_buffer("table", torch.cat([columns, rows], dim=1).float())

    def offset(self, height: int, width: int) -> tuple[int, int]:
        """Row and column of the table at which a canvas of ``height`` x ``width`` patches begins.

        Raises:
            ValueError: the canvas is larger than the table.
        """
        if max(height, width) > self.max_size:
            raise ValueError(
                f"a canvas of {height} x {width} patches given, the position table has {self.max_size} x {self.max_size}"
            )
        return (self.max_size - height) // 2, (self.max_size - width) // 2

    def forward(self, ids: Int[Tensor, "*b n 2"]) -> Float[Tensor, "*b n d"]:
        """Rows of the table at (row, column) of the table itself."""
        return self.table[ids[..., 0] * self.max_size + ids[..., 1]]
