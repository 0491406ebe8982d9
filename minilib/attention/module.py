"""The multi-head self-attention layer, with a processor that can be exchanged from outside."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .registry import Attend, Mask, get_attention


class AttentionLayer(nn.Module):
    """Any layer that mixes tokens through an exchangeable ``processor``: self-, cross- and joint attention are its subclasses.

    ``attention_processor`` and ``record_attention`` find every one of them in a model, whatever the model.
    """

    num_heads: int
    processor: Attend

    def __setattr__(self, name: str, value: Any) -> None:
        """Any processor can follow any other: ``nn.Module`` alone refuses a function in the place of a child module.

        A child that the new processor holds as its ``inner`` stays registered, so that its parameters remain the
        model's while somebody watches it.
        """
        if name != "processor" or isinstance(value, nn.Module):
            return super().__setattr__(name, value)
        inner = getattr(value, "inner", None)
        if isinstance(inner, nn.Module):
            self._modules["processor"] = inner
        else:
            self._modules.pop("processor", None)
        # The instance's own attribute is found before the child of the same name.
        self.__dict__["processor"] = value

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        if isinstance(self.processor, nn.Module):  # printed below, as a child
            return f"num_heads={self.num_heads}"
        name = getattr(self.processor, "__name__", None) or getattr(self.processor, "func", self.processor)
        return f"num_heads={self.num_heads}, processor={getattr(name, '__name__', name)}"


class Attention(AttentionLayer):
    """Multi-head self-attention: one linear layer makes q, k and v, a processor mixes the tokens, one linear layer ends it.

    ``processor`` has the signature ``(q, k, v, *, mask=None) -> out`` of ``minilib.attention.registry``. It is
    an ordinary attribute: ``attention_processor`` and ``record_attention`` exchange it for a while.

    Args:
        dim: width of a token.
        num_heads: heads; must divide ``dim``.
        variant: name in ``minilib.attention.attention_variants()``.
        variant_options: keyword arguments of the variant.
        qk_norm: normalise each head's queries and keys to unit root mean square with a learned gain (as SD3
            does).

    Raises:
        ValueError: ``dim`` is no multiple of ``num_heads``, or the variant is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        variant: str = "full",
        variant_options: dict[str, Any] | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {dim}: choose a divisor of {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.qk_norm = qk_norm
        self.processor: Attend = get_attention(variant, **(variant_options or {}))

    def forward(self, x: Float[Tensor, "b n d"], *, mask: Mask | None = None) -> Float[Tensor, "b n d"]:
        """Mix the tokens of ``x``."""
        b, n, dim = x.shape
        # Plain views, not einops: this runs once a block, and at batch 1 the calls themselves are the cost. Splitting
        # along the features keeps the gradients of q, k and v in the layout of the linear layer: one copy, not three.
        shape = (b, n, self.num_heads, dim // self.num_heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out = self.processor(q, k, v, mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, n, dim))
