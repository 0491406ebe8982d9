import matplotlib
import pytest
import torch
from scipy import stats

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from minilib import plotting


def test_grid_puts_each_image_in_its_place():
    x = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 2, 2) / 2 - 1  # -1, -0.5, 0, 0.5, 1
    grid = plotting.image_grid(x, columns=3)
    assert grid.shape == (7, 10, 1)
    for i, value in enumerate((0, 0.25, 0.5, 0.75, 1.0)):
        row, column = divmod(i, 3)
        assert (grid[1 + 3 * row : 3 + 3 * row, 1 + 3 * column : 3 + 3 * column] == value).all()
    assert (grid[0] == 0.75).all() and (grid[:, 0] == 0.75).all()
    with pytest.raises(ValueError, match="columns"):
        plotting.image_grid(x, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_drawn_with_their_labels(channels):
    ax = plotting.show_images(
        torch.zeros(4, channels, 8, 8), 2, row_labels=["a", "b"], column_labels=["c", "d"], title="t"
    )
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["c", "d"] and ax.get_title() == "t"
    plt.close(ax.figure)


def test_interval_is_scipys():
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    mean, low, high = plotting.mean_interval(values)
    expected = stats.t.interval(0.9, 4, loc=values.mean(0), scale=stats.sem(values.numpy(), axis=0))
    assert (low.numpy() - expected[0]).max() < 1e-6 and (high.numpy() - expected[1]).max() < 1e-6
    mean, low, high = plotting.mean_interval(values[:1])
    assert torch.equal(low, mean) and torch.equal(high, mean)


def test_style_is_undone_and_figures_close():
    before = matplotlib.rcParams["axes.spines.top"]
    with plotting.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert matplotlib.rcParams["axes.spines.top"] == before
    fig, ax = plt.subplots()
    plotting.curve(ax, [1, 2, 3], torch.rand(3, 3), "arm", plotting.PALETTE[0])
    assert ax.get_legend_handles_labels()[1] == ["arm"] and len(ax.collections) == 1
    assert plotting.finish(fig) is fig and not plt.fignum_exists(fig.number)
