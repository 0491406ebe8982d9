"""SS2D: tokens of a grid mixed by selective scans along four paths (VMamba, Liu et al. 2024, arXiv 2401.10166).

A scan reads a sequence in one direction; an image has none. Four scans along different paths let every token reach every
other, in time linear in their number. The paths here are LaMamba-Diff's (Fu et al. 2024, arXiv 2408.02615): snakes, on which
consecutive tokens are neighbours, also where a raster would jump back to the start of the next row.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilib.kernels.halo import Grid
from minilib.kernels.scan import reference as scan_reference
from minilib.kernels.scan import selective_scan

from .grids import check_grid
from .registry import Case, register_attention

DIRECTIONS = 4


def snake_orders(rows: int, columns: int) -> Int[Tensor, "4 n"]:
    """Four paths over a grid, as indices of its tokens in raster order; each visits every token once, by steps of one.

    A snake along the rows from the top left corner, its reverse, a snake along the columns from the bottom left corner, its
    reverse. On a square grid of even side these are the paths of yunxiangfu2001/LaMamba-Diff: model/continuous_scan.py.

    >>> snake_orders(2, 3).tolist()
    [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [3, 0, 1, 4, 5, 2], [2, 5, 4, 1, 0, 3]]
    """
    tokens = torch.arange(rows * columns).view(rows, columns)
    along_rows = _snake(tokens)
    along_columns = _snake(tokens.flip(0).t())
    return torch.stack([along_rows, along_rows.flip(0), along_columns, along_columns.flip(0)])


def _snake(tokens: Tensor) -> Tensor:
    """Every other line backwards."""
    turned = tokens.clone()
    turned[1::2] = tokens[1::2].flip(1)
    return turned.flatten()


def check_ss2d(
    *, grid: Sequence[int], d_state: int = 1, expand: float = 2.0, dt_rank: int | None = None, conv: int = 3
) -> None:
    """Raise unless these options of "ss2d" can be.

    Raises:
        ValueError: a grid or a size without places, an even convolution.
    """
    check_grid("ss2d", grid, axes=(2,))
    for name, value in {"d_state": d_state, "expand": expand, "dt_rank": dt_rank, "conv": conv}.items():
        if value is not None and value <= 0:
            raise ValueError(f"attention 'ss2d': {name}={value!r} has to be positive")
    if conv % 2 == 0:
        raise ValueError(f"attention 'ss2d': conv={conv!r} has to be odd, so that a token is in its middle")


def ss2d_flops(
    b: int,
    h: int,
    n: int,
    m: int,
    d: int,
    *,
    grid: Grid,
    d_state: int = 1,
    expand: float = 2.0,
    dt_rank: int | None = None,
    conv: int = 3,
) -> int:
    """FLOPs of the products of the whole layer: projections, convolution, and C . h of the scans.

    The recurrence itself is element-wise, about 6 more for each state and time, which torch's counter leaves out.
    """
    dim = h * d
    inner, rank = int(expand * dim), dt_rank or math.ceil(dim / 16)
    scans = DIRECTIONS * (inner * (rank + 2 * d_state) + rank * inner + inner * d_state)
    return 2 * b * n * (2 * dim * inner + conv * conv * inner + scans + inner * dim)


def ss2d_reference(layer: "SS2D", x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """The layer, path by path and step by step."""
    u, gate = layer.in_proj(x).chunk(2, dim=-1)
    u = F.silu(
        rearrange(layer.conv2d(rearrange(u, "b (y x) c -> b c y x", x=layer.grid[1])), "b c y x -> b (y x) c")
    )
    y = torch.zeros_like(u)
    sizes = [layer.dt_rank, layer.d_state, layer.d_state]
    for i, order in enumerate(snake_orders(*layer.grid)):
        path = u[:, order]
        dt, B, C = (path @ layer.x_proj_weight[i].t()).split(sizes, dim=-1)
        dt = F.softplus(dt @ layer.dt_projs_weight[i].t() + layer.dt_projs_bias[i])
        decay = -layer.A_logs.chunk(DIRECTIONS)[i].exp()
        parts = (part.transpose(1, 2) for part in (path, dt, B, C))
        u_i, dt_i, b_i, c_i = parts
        y[:, order] += scan_reference(u_i, dt_i, decay, b_i, c_i, layer.Ds.chunk(DIRECTIONS)[i]).transpose(
            1, 2
        )
    return layer.out_proj(layer.out_norm(y) * F.silu(gate))


@register_attention(
    "ss2d",
    layer=True,
    reference=ss2d_reference,
    flops=ss2d_flops,
    check=check_ss2d,
    cases=(
        Case({"grid": (3, 4), "d_state": 2}, n=12),
        Case({"grid": (1, 1)}, n=1),
        Case({"grid": (5, 1), "expand": 1.5, "dt_rank": 3, "conv": 1}, n=5),
    ),
)
class SS2D(nn.Module):
    """A whole mixing layer: project, convolve, scan along four snakes with coefficients of their own, add, gate, project.

    VMamba's SS2D "v2" as LaMamba-Diff configures it (yunxiangfu2001/LaMamba-Diff: model/vmamba.py, configs/): u and a gate
    from one projection; a depth-wise convolution and a SiLU on u; from each token and for each path its own dt, B and C; the
    four results summed where they came from, normalised, multiplied by the SiLU of the gate. Names and shapes of the
    parameters are theirs.

    Args:
        dim: width of a token.
        num_heads: of the attention layer whose place this takes; a scan has no heads, so it changes nothing.
        grid: (rows, columns).
        d_state: numbers in a channel's state; 1 in LaMamba-Diff-XL, 16 in Mamba.
        expand: width of the scans over ``dim``.
        dt_rank: of the projection that makes dt; ``dim`` / 16, rounded up, if None.
        conv: side of the convolution.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Grid,
        d_state: int = 1,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv: int = 3,
    ) -> None:
        super().__init__()
        self.grid, self.d_state = tuple(grid), d_state
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, conv, padding=conv // 2, groups=inner, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, self.dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        orders = snake_orders(*self.grid)
        self.register_buffer("orders", orders, persistent=False)
        self.register_buffer("places", orders.argsort(dim=1), persistent=False)
        self.reset_scans()

    @torch.no_grad()
    def reset_scans(self) -> None:
        """Initial coefficients (Gu and Dao 2023, section 3.6): A = -1, -2, ..., dt log-uniform in 0.001 to 0.1."""
        nn.init.uniform_(self.x_proj_weight, -1, 1).mul_(self.x_proj_weight.shape[-1] ** -0.5)
        nn.init.uniform_(self.dt_projs_weight, -1, 1).mul_(self.dt_rank**-0.5)
        dt = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(0.001), math.log(0.1)))
        # The inverse of softplus.
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_logs.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_logs))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Mix the tokens of ``x``.

        Raises:
            ValueError: their number is not the grid's.
        """
        if x.shape[1] != math.prod(self.grid):
            raise ValueError(
                f"attention 'ss2d' on grid={self.grid} needs {math.prod(self.grid)} tokens, got {x.shape[1]}"
            )
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv2d(rearrange(u, "b (y x) c -> b c y x", x=self.grid[1]))
        u = F.silu(rearrange(u, "b c y x -> b (y x) c"))
        return self.out_proj(self.out_norm(self.scan(u)) * F.silu(gate))

    def scan(self, u: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The sum of the scans along the four paths. Coefficients of a token depend on the token alone."""
        made = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (DIRECTIONS, -1))
        # Time first: (n, b, 4, ...), the layout in which the scan works.
        dt, B, C = self._along(made).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        weights = self.dt_projs_weight.transpose(1, 2)
        dt = torch.baddbmm(self.dt_projs_bias.unsqueeze(1), rearrange(dt, "l b k r -> k (l b) r"), weights)
        dt = rearrange(dt, "k (l b) c -> l b k c", l=len(B))
        path = self._along(u)
        parts = (part.flatten(2).movedim(0, -1) for part in (path, F.softplus(dt)))
        A = -self.A_logs.float().exp() if u.dtype != torch.float64 else -self.A_logs.exp()
        y = selective_scan(*parts, A, B.movedim(0, -1), C.movedim(0, -1), self.Ds)
        return self._back(y.movedim(-1, 0).unflatten(-1, (DIRECTIONS, -1))).sum(2)

    def _along(self, x: Tensor) -> Tensor:
        """(b, n, c), or (b, n, 4, c) with values for each path, -> (n, b, 4, c): at time t the t-th token of each path."""
        b, n = x.shape[:2]
        image = torch.arange(b, device=x.device).view(-1, 1)
        rows = image * n + self.orders.t().unsqueeze(1)
        return self._pick(x, rows, own=x.ndim == 4)

    def _back(self, y: Tensor) -> Tensor:
        """(n, b, 4, c) -> (b, n, 4, c): each path's result for each token."""
        n, b = y.shape[:2]
        image = torch.arange(b, device=y.device).view(-1, 1, 1)
        return self._pick(y, self.places.t() * b + image, own=True)

    def _pick(self, x: Tensor, rows: Tensor, *, own: bool) -> Tensor:
        """Rows of ``x`` with its first two axes as one; with ``own`` each path has its own rows, (rows, 4, c)."""
        if own:
            rows = rows * DIRECTIONS + torch.arange(DIRECTIONS, device=x.device)
        return x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])
