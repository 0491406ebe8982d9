"""An MM-DiT that runs some of its image tokens: the network of ``minilib.region_adaptive``, and what a call costs.

Liu et al. 2025, arXiv 2502.10389, for Stable Diffusion 3; ``microsoft/RAS``,
``src/ras/modules/stable_diffusion_3/transformer_forward.py`` and ``attention_processor.py``.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from minilib.attention.joint import joint_mask
from minilib.costs import attention_flops, linear_flops, mmdit_flops
from minilib.kernels.tokens import TokenKeyValues, gather_tokens, partial_attention
from minilib.models import MMDiT

#: How a sparse step of :class:`MMDiTTokens` lets the tokens that run see the others.
KEYS_VALUES = ("kept", "fresh", "dropped")


def image_to_tokens(x: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n f"]:
    """Cut an image into patches in raster order, each flattened in the order (row, column, channel).

    >>> image_to_tokens(torch.arange(8.0).view(1, 2, 2, 2), patch=2)
    tensor([[[0., 4., 1., 5., 2., 6., 3., 7.]]])
    """
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


class MMDiTTokens:
    """``run(x, sigma, indices)`` for an MM-DiT: a few image tokens and all text tokens, with the keys and values of all.

    A dense call keeps the keys and values of every layer. A sparse call runs the text and the tokens at ``indices``, overwrites
    their rows, and lets them read all rows: those of the other tokens are as old as the call in which these last ran. The
    released code does the same, but that text rows are not kept; since text always runs, this is no difference.

    Args:
        model: the network; predicts ``noise - x_0``, with t = 1000 sigma.
        text: what ``encode_text(tokens)._asdict()`` gives: ``context``, and ``context_mask`` or ``pooled`` if there are any.
        height: of the canvas, in patches.
        width: of the canvas, in patches.
        keys_values: "kept": as above. "fresh": every call is dense, and what was not asked for is thrown away: a
            control, which saves nothing. "dropped": the tokens that run see one another and the text only.
        null: text of the empty caption, in the form of ``text``, for guidance.
        guidance_scale: of classifier-free guidance, with one doubled batch; 1: none. Both halves run the same tokens.

    Raises:
        ValueError: an unknown ``keys_values``, guidance without ``null``, or a model with a second attention in its blocks.
    """

    def __init__(
        self,
        model: MMDiT,
        text: Mapping[str, Tensor],
        height: int,
        width: int,
        *,
        keys_values: str = "kept",
        null: Mapping[str, Tensor] | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        if keys_values not in KEYS_VALUES:
            raise ValueError(f"unknown keys_values {keys_values!r}: choose one of {list(KEYS_VALUES)}")
        if model.config["dual_attention_layers"]:
            raise ValueError(
                "blocks with a second attention have no kept keys and values here: use a model without"
            )
        self.guided = guidance_scale != 1.0
        if self.guided and null is None:
            raise ValueError("guidance moves away from the empty caption: give its text as null")
        self.model, self.height, self.width = model, height, width
        self.keys_values, self.guidance_scale = keys_values, guidance_scale
        texts = [text, null] if self.guided else [text]
        self.context = torch.cat([part["context"] for part in texts])
        masks = [part.get("context_mask") for part in texts]
        self.mask = None if masks[0] is None else torch.cat(masks)
        self.pooled = None if model.pooled_dim is None else torch.cat([part["pooled"] for part in texts])
        self.ids = model.position_ids(height, width, device=self.context.device)
        self.caches: dict[str, TokenKeyValues] = {}

    def image(self, x: Float[Tensor, "b n f"]) -> Float[Tensor, "b c h w"]:
        """Tokens as an image."""
        return self.model.unpatchify(x, self.height, self.width)

    def tokens(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n f"]:
        """An image as tokens."""
        return image_to_tokens(x, self.model.patch_size)

    def __call__(
        self, x: Float[Tensor, "b n f"], sigma: float, indices: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k f"]:
        """The velocities of the tokens at ``indices``; None: of all, which also fills what is kept."""
        if self.guided:
            x = torch.cat([x, x])
            indices = None if indices is None else torch.cat([indices, indices])
        out = self._run(x, sigma, indices)
        if not self.guided:
            return out
        wanted, unwanted = out.chunk(2)
        return unwanted + self.guidance_scale * (wanted - unwanted)

    def _run(self, x: Tensor, sigma: float, indices: Tensor | None) -> Tensor:
        """One forward pass. Positions are added, and gathered, before tokens are taken out."""
        if indices is not None and self.keys_values == "fresh":
            return gather_tokens(self._run(x, sigma, None), indices)
        t = torch.full((len(x),), 1000 * sigma, device=x.device)
        c = F.silu(self.model.embed_condition(t, self.pooled))
        h, ids = self.model.embed(self.image(x), self.ids), self.ids
        if indices is not None:
            h, ids = gather_tokens(h, indices), ids[indices]
        keys = x.shape[1] if self.keys_values == "kept" else h.shape[1]
        mask = None if self.mask is None else joint_mask(keys, self.mask)
        args = h, c, self.model.embed_context(self.context), ids
        if self.keys_values == "kept":
            with partial_attention(self.model, self.caches, self._joint(indices, x.shape[1])):
                h, _ = self.model.run_blocks(*args, mask=mask)
        else:
            h, _ = self.model.run_blocks(*args, mask=mask)
        return self.model.read_out(h, c)

    def _joint(self, indices: Tensor | None, n: int) -> Tensor | None:
        """The image tokens that run, and all text tokens, which come after the n image tokens."""
        if indices is None:
            return None
        text = torch.arange(self.context.shape[1], device=indices.device) + n
        return torch.cat([indices, text.expand(len(indices), -1)], dim=1)


def partial_mmdit_flops(config: Mapping[str, Any], height: int, width: int, l: int, active: int) -> int:  # noqa: E741
    """Operations of one call of :class:`MMDiTTokens` for one image: ``active`` image tokens run, keys and values are kept.

    Attention shrinks with the queries alone, all else in the image stream with the tokens; text, modulation and the embedding
    of the image stay whole.

    Args:
        config: of ``MMDiT``, without a second attention.
        height, width: of the image or latents (not in patches).
        l: text tokens.
        active: image tokens that run.

    Raises:
        ValueError: more tokens than there are, or a configuration that ``minilib.costs.mmdit_flops`` refuses.
    """
    n = (height // config["patch_size"]) * (width // config["patch_size"])
    if not 0 <= active <= n or config.get("dual_attention_layers"):
        raise ValueError(
            f"{active} of {n} tokens given, dual_attention_layers = {config.get('dual_attention_layers')}: "
            f"active is 0 to {n}, and there is one attention a block"
        )
    d, idle = config["hidden_size"], n - active
    hidden = int(d * config.get("mlp_ratio", 4.0))
    block = linear_flops(idle, d, 4 * d + 2 * hidden) + attention_flops(1, 1, idle, n + l, d)
    out = config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"])
    saved = config["depth"] * block + linear_flops(idle, d, out)
    return mmdit_flops(config, height, width, l) - saved
