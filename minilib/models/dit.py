"""DiT, the diffusion transformer with adaLN-Zero conditioning (Peebles and Xie 2023, arXiv 2212.09748).

An image is cut into patches, each patch becomes a token, a stack of transformer blocks transforms the tokens
under the control of time and label, and a last linear layer turns every token back into a patch of the
prediction.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from ..attention import Attention
from .layers import GeluMLP, LabelEmbedder, PatchEmbed, SwiGLU, TimestepEmbedder, modulate
from .moe import MoEFeedForward
from .positions import sincos_2d

MLPS: dict[str, type[nn.Module]] = {"gelu": GeluMLP, "swiglu": SwiGLU, "moe": MoEFeedForward}


def build_mlp(name: str, dim: int, mlp_ratio: float, options: dict[str, Any] | None = None) -> nn.Module:
    """The feed-forward network ``name`` ('gelu', 'swiglu' or 'moe') of hidden width ``dim * mlp_ratio``.

    Raises:
        ValueError: no such network.
    """
    if name not in MLPS:
        raise ValueError(f"unknown mlp {name!r}: choose one of {sorted(MLPS)}")
    return MLPS[name](dim, **{"hidden_dim": int(dim * mlp_ratio), **(options or {})})


class DiTBlock(nn.Module):
    """One adaLN-Zero transformer block (DiT, figure 3).

    A linear layer makes six vectors of the condition: shift, scale and gate for attention, and the same for
    the feed-forward network. That layer starts at zero, so both gates start at zero and the block starts as
    the identity.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        mlp_options: dict[str, Any] | None = None,
        attention: str = "full",
        attention_options: dict[str, Any] | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        mlp_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.attn = Attention(
            dim, num_heads, variant=attention, variant_options=attention_options, qk_norm=qk_norm
        )
        self.mlp = build_mlp(mlp, dim, mlp_ratio, mlp_options)
        self.adaLN_modulation = nn.Linear(dim, 6 * dim)
        self.norm_eps = norm_eps
        self.mlp_norm_eps = mlp_norm_eps

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b n d"]:
        """Transform the tokens ``x`` under the condition ``c``, which has passed through SiLU already (once, in the model)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        )
        width = x.shape[-1:]
        h = modulate(F.layer_norm(x, width, eps=self.norm_eps), shift_a, scale_a)
        x = torch.addcmul(x, gate_a, self.attn(h))
        h = modulate(F.layer_norm(x, width, eps=self.mlp_norm_eps), shift_m, scale_m)
        return torch.addcmul(x, gate_m, self.mlp(h))


class FinalLayer(nn.Module):
    """Adaptive layer norm, then one linear layer to the values of a patch. Both linear layers start at zero."""

    def __init__(self, dim: int, out_features: int, *, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Linear(dim, 2 * dim)
        self.norm_eps = norm_eps

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b n f"]:
        """Read out the tokens ``x`` under the condition ``c`` (after SiLU)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=self.norm_eps), shift, scale))


class DiT(nn.Module):
    """A class-conditional diffusion transformer.

    Label ``num_classes`` is the null class, which stands for 'no label'. Dropping labels in training is the
    loss's business, not the model's. ``config`` rebuilds the model: ``DiT(**model.config)``. The blocks are
    ``model.blocks[i]``, each with ``.attn`` and ``.mlp``, for hooks to act on.

    Args:
        input_size: height and width of the image.
        patch_size: height and width of a patch; divides ``input_size``.
        in_channels: channels of the image.
        hidden_size: width of a token; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward network over ``hidden_size``.
        num_classes: labels, without the null class.
        learn_sigma: predict a second value per channel for the variance (Nichol and Dhariwal 2021).
        attention: name in ``minilib.attention.attention_variants()``; ``attention_options`` are its keyword arguments.
        mlp: 'gelu' (DiT), 'swiglu' or 'moe' (DiT-MoE); ``mlp_options`` are its keyword arguments.
        qk_norm: normalise queries and keys.
        frequency_shift: see ``timestep_embedding``; 0 as in the official code, 1 for weights from diffusers.
        mlp_norm_eps: epsilon of the norm before the feed-forward network; 1e-6 as in the official code,
            diffusers has 1e-5.

    Raises:
        ValueError: sizes that do not divide, or an unknown ``attention`` or ``mlp``.

    >>> model = DiT(hidden_size=32, depth=2)
    >>> model(torch.zeros(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([1, 2, 10])).shape
    torch.Size([3, 2, 8, 8])
    """

    def __init__(
        self,
        input_size: int = 8,
        patch_size: int = 1,
        in_channels: int = 1,
        hidden_size: int = 96,
        depth: int = 8,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
        learn_sigma: bool = True,
        attention: str = "full",
        *,
        attention_options: dict[str, Any] | None = None,
        mlp: str = "gelu",
        mlp_options: dict[str, Any] | None = None,
        qk_norm: bool = False,
        frequency_shift: float = 0.0,
        mlp_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if patch_size < 1 or input_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an image of {input_size} x {input_size}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.grid_size = input_size // patch_size
        self.num_classes = num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_2d(hidden_size, self.grid_size, self.grid_size)
        self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                mlp=mlp,
                mlp_options=mlp_options,
                attention=attention,
                attention_options=attention_options,
                qk_norm=qk_norm,
                mlp_norm_eps=mlp_norm_eps,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The initialisation of the paper: the residual branches and the output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.y_embedder, self.t_embedder.fc1, self.t_embedder.fc2):
            nn.init.normal_(embedding.weight, std=0.02)
        starts_at_zero = [block.adaLN_modulation for block in self.blocks]
        for linear in (*starts_at_zero, self.final_layer.adaLN_modulation, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def embed_label(self, y: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The label's part of the condition; ``num_classes`` is the null class."""
        return self.y_embedder(y)

    def embed_condition(
        self, t: Num[Tensor, " b"], y: Int[Tensor, " b"] | None, *, cond: Float[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Time embedding plus label embedding; ``cond`` takes the label embedding's place.

        Raises:
            ValueError: both or neither of ``y`` and ``cond`` are given.
        """
        if (y is None) == (cond is None):
            raise ValueError(
                f"give labels y or an embedding cond, one of the two; 'no label' is y = {self.num_classes}"
            )
        return self.t_embedder(t) + (self.embed_label(y) if cond is None else cond)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Num[Tensor, " b"],
        y: Int[Tensor, " b"] | None,
        *,
        cond: Float[Tensor, "b d"] | None = None,
    ) -> Float[Tensor, "b c_out h w"]:
        """Predict noise, velocity or image, whichever the loss asked for.

        Args:
            x: noisy images.
            t: times on the scale 0 to 1000, for diffusion and for flow models.
            y: labels; None if ``cond`` is given.
            cond: label embeddings instead of labels, as ``embed_label`` gives them.

        Returns:
            ``in_channels`` channels, followed by as many for the variance if ``learn_sigma``.

        Raises:
            ValueError: an image of another size, an unknown label, or both or neither of ``y`` and ``cond``.
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            expected = (self.in_channels, self.input_size, self.input_size)
            raise ValueError(f"images of shape {tuple(x.shape[1:])} given, this model takes {expected}")
        c = F.silu(self.embed_condition(t, y, cond=cond))
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c))

    def unpatchify(self, tokens: Float[Tensor, "b n f"]) -> Float[Tensor, "b c h w"]:
        """Put the patches, each flattened in the order (row, column, channel), back into an image."""
        p, g = self.patch_size, self.grid_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=g, w=g, p=p, q=p)
