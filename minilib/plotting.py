"""Figures of one hand: a colour-blind-safe palette, grids of small images, curves with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Okabe and Ito's colours, told apart with any colour vision."""

_STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


def use_style() -> None:
    """Set the book's figure style for this session."""
    import matplotlib as mpl

    mpl.rcParams.update(_STYLE)
    mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=PALETTE)


@contextmanager
def style() -> Iterator[None]:
    """The book's figure style, within a block."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE | {"axes.prop_cycle": mpl.cycler(color=PALETTE)}):
        yield


def image_grid(x: Float[Tensor, "n c h w"], columns: int, pad: int = 1) -> Float[Tensor, "H W C"]:
    """Tile images in [-1, 1] into one picture in [0, 1], row by row, with light lines between them.

    >>> tuple(image_grid(torch.zeros(6, 1, 8, 8), columns=3).shape)
    (19, 28, 1)
    """
    if columns < 1 or len(x) == 0:
        raise ValueError(f"need at least one column and one image; got columns={columns}, {len(x)} images")
    rows = -(-len(x) // columns)
    full = x.new_ones(rows * columns, *x.shape[1:])
    full[: len(x)] = ((x.detach() + 1) / 2).clamp(0, 1)
    full = torch.nn.functional.pad(full, (0, pad, 0, pad), value=0.75)
    grid = rearrange(full, "(r k) c h w -> (r h) (k w) c", k=columns)
    return torch.nn.functional.pad(grid, (0, 0, pad, 0, pad, 0), value=0.75)


def show_images(
    x: Float[Tensor, "n c h w"],
    columns: int = 10,
    *,
    ax: Axes | None = None,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: float = 0.55,
) -> Axes:
    """Draw images in a grid; labels name rows and columns."""
    import matplotlib.pyplot as plt

    rows = -(-len(x) // columns)
    if ax is None:
        _, ax = plt.subplots(figsize=(columns * scale, rows * scale + (0.3 if title or column_labels else 0)))
    grid = image_grid(x, columns)
    ax.imshow(grid.squeeze(-1).numpy() if grid.shape[-1] == 1 else grid.numpy(), vmin=0, vmax=1)
    height, width = grid.shape[0] / rows, grid.shape[1] / columns
    ax.set_xticks([(i + 0.5) * width for i in range(len(column_labels))], column_labels)
    ax.set_yticks([(i + 0.5) * height for i in range(len(row_labels))], row_labels)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title)
    return ax


def mean_interval(values: Float[Tensor, "seeds ..."], level: float = 0.90) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and t-interval over the first axis: ``(mean, low, high)``; the interval is the mean itself with one seed."""
    from minilib.verdicts import t_quantile

    n = len(values)
    mean = values.double().mean(0)
    if n < 2:
        return mean, mean, mean
    half = t_quantile(n, level) * values.double().std(0) / n**0.5
    return mean, mean - half, mean + half


def curve(
    ax: Axes,
    x: Sequence[float],
    values: Float[Tensor, "seeds points"],
    label: str,
    color: str,
    marker: str = "o",
) -> None:
    """A curve over seeds with its 90 % interval as a band."""
    mean, low, high = mean_interval(values)
    ax.plot(x, mean, marker=marker, ms=4, color=color, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def finish(fig: Figure) -> Figure:
    """Tight layout, then close pyplot's hold on the figure, so that a notebook shows it once, as the cell's value."""
    import matplotlib.pyplot as plt

    fig.tight_layout()
    plt.close(fig)
    return fig
