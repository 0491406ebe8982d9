import math

import pytest
import torch

from minilib.metrics import linear_probe, psnr
from minilib.models import ViT
from minilib.recipes.vit import cell_windows, principal_colours, probe_cells, view_batches
from minilib.self_supervision import (
    MaskedPrediction,
    feature_spread,
    masked_prediction_loss,
    oriented_gradients,
    random_light,
    random_masks,
)
from minilib.training import FitConfig, fit

TINY = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ramp(angle, size=8):
    """A picture that grows brighter in one direction, by 1 a pixel; rows run downwards."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (math.cos(angle) * column + math.sin(angle) * row)[None, None]


class TestViews:
    def test_masks_hide_the_share_asked_for(self):
        masks = random_masks(2000, 16, torch.Generator().manual_seed(0), (0.25, 0.5))
        counts = masks.sum(1)
        assert counts.min() == 4 and counts.max() == 8
        assert abs(masks.float().mean() - 0.375) < 0.01
        assert (masks.float().mean(0) - 0.375).abs().max() < 0.05, "every place is hidden equally often"

    def test_masks_hide_something_and_never_everything(self):
        generator = torch.Generator().manual_seed(0)
        assert (random_masks(50, 4, generator, (0.0, 0.0)).sum(1) == 1).all()
        assert (random_masks(50, 4, generator, (1.0, 1.0)).sum(1) == 3).all()
        with pytest.raises(ValueError, match="low <= high"):
            random_masks(1, 4, generator, (0.5, 0.2))

    def test_light_changes_and_places_stay(self):
        x = torch.full((64, 3, 8, 8), -0.8)
        x[:, 0, 2:5, 3:6] = 0.9
        view = random_light(x, torch.Generator().manual_seed(0))
        red = view[:, 0] - view[:, 1:].mean(1)
        assert (red[:, 2:5, 3:6].mean((1, 2)) > 0.3).all(), "red stays red, where it is"
        outside = red.clone()
        outside[:, 2:5, 3:6] = 0
        assert (outside.abs().mean((1, 2)) < 0.2).all()
        assert view[:, 0, 3, 4].std() > 0.15
        assert torch.equal(view, random_light(x, torch.Generator().manual_seed(0)))

    def test_the_recipe_s_batches_are_reproducible(self):
        a, b = (view_batches(torch.Generator().manual_seed(3), 4) for _ in "ab")
        assert {k: tuple(v.shape) for k, v in a.items()} == {
            "clean": (4, 3, 16, 16), "view": (4, 3, 16, 16), "mask": (4, 16),
        }  # fmt: skip
        assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["clean"], a["view"])


class TestOrientedGradients:
    @pytest.mark.parametrize(("quarter", "expected"), [(0, 0), (1, 2), (2, 4), (3, 6)])
    def test_a_ramp_falls_into_the_bin_of_its_direction(self, quarter, expected):
        cells = oriented_gradients(ramp(quarter * math.pi / 2), bins=8, cell=2)[0, :, 1:-1, 1:-1]
        assert cells.argmax(0).unique().tolist() == [expected]
        torch.testing.assert_close(cells[expected], torch.full((2, 2), 2.0 / 2.1))  # 2 is the length, eps 0.1

    def test_a_direction_between_two_bins_is_shared(self):
        cells = oriented_gradients(ramp(math.pi / 8), bins=8, cell=2, eps=0.0)[0, :, 1, 1]
        torch.testing.assert_close(cells[:2], torch.full((2,), 0.5**0.5), atol=1e-4, rtol=0)
        assert cells[2:].abs().max() < 1e-4

    def test_the_last_bin_goes_over_into_the_first(self):
        cells = oriented_gradients(ramp(-math.pi / 8), bins=8, cell=2, eps=0.0)[0, :, 1, 1]
        torch.testing.assert_close(cells[[0, 7]], torch.full((2,), 0.5**0.5), atol=1e-4, rtol=0)

    def test_dark_to_bright_is_not_bright_to_dark(self):
        x = randn(2, 3, 8, 8)
        a, b = oriented_gradients(x, bins=6), oriented_gradients(-x, bins=6)
        turned = b.unflatten(1, (3, 6)).roll(3, 2).flatten(1, 2)
        torch.testing.assert_close(a, turned, atol=1e-5, rtol=0)
        assert (a - b).abs().max() > 0.1

    def test_brightness_does_not_matter_and_contrast_little(self):
        x = randn(1, 3, 8, 8)
        torch.testing.assert_close(oriented_gradients(x + 3.0), oriented_gradients(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            oriented_gradients(5 * x, eps=0.0), oriented_gradients(x, eps=0.0), atol=1e-4, rtol=0
        )
        assert oriented_gradients(torch.full((1, 3, 8, 8), 0.7)).abs().max() == 0.0

    def test_against_a_loop_over_pixels(self):
        x, bins, cell, eps = randn(2, 3, 6, 8).double(), 5, 2, 0.1
        wanted = torch.zeros(2, 3 * bins, 3, 4, dtype=torch.float64)
        for n in range(2):
            for c in range(3):
                for i in range(6):
                    for j in range(8):
                        dx = x[n, c, i, min(j + 1, 7)] - x[n, c, i, max(j - 1, 0)]
                        dy = x[n, c, min(i + 1, 5), j] - x[n, c, max(i - 1, 0), j]
                        at = math.degrees(math.atan2(dy, dx)) % 360 / (360 / bins)
                        for k in (int(at), int(at) + 1):
                            weight = (1 - abs(at - k)) * math.hypot(dx, dy) / cell**2
                            wanted[n, c * bins + k % bins, i // cell, j // cell] += weight
        wanted = wanted / (wanted.square().sum(1, keepdim=True).sqrt() + eps)
        torch.testing.assert_close(oriented_gradients(x, bins, cell, eps), wanted)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="cells of 3 that tile 8 x 8"):
            oriented_gradients(randn(1, 3, 8, 8), cell=3)
        with pytest.raises(ValueError, match="got 0 bins"):
            oriented_gradients(randn(1, 3, 8, 8), bins=0)


class TestMaskedPrediction:
    def model(self, **options):
        torch.manual_seed(0)
        return MaskedPrediction(ViT(**TINY), **options)

    def test_losses_against_the_pieces(self):
        model = self.model(bins=4, cell=2)
        view, clean = randn(3, 3, 8, 8), randn(3, 3, 8, 8, seed=1)
        mask = random_masks(3, 4, torch.Generator().manual_seed(0))
        losses = model(view, clean, mask)
        tokens = model.vit(view, mask)
        wanted = gradients = 0.0
        histograms = oriented_gradients(clean, 4, 2)
        for place in range(4):
            r, c = divmod(place, 2)
            patch = clean[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten(1)
            wanted += (model.to_pixels(tokens[:, place]) - patch).square().mean() / 4
            cells = histograms[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1)
            gradients += (model.to_gradients(tokens[:, place]) - cells).square().sum(1).mean() / 4 / 4
        torch.testing.assert_close(losses["pixel"], wanted)
        torch.testing.assert_close(losses["gradient"], gradients)

    def test_a_hidden_patch_is_not_looked_at_and_a_visible_one_is(self):
        model, clean = self.model(), randn(1, 3, 8, 8)
        mask = torch.tensor([[True, False, False, False]])
        other = clean.clone()
        other[:, :, :4, :4] += 1.0
        seen = [model.vit(x, mask) for x in (clean, other)]
        assert torch.equal(*seen)
        other = clean.clone()
        other[:, :, 4:, :4] += 1.0
        assert not torch.equal(model.vit(other, mask), seen[0])

    def test_every_parameter_gets_a_gradient(self):
        model = self.model()
        mask = torch.tensor([[True, False, True, False]] * 2)
        loss = masked_prediction_loss({"pixel": 1.0, "gradient": 1.0})
        loss(model, {"view": randn(2, 3, 8, 8), "clean": randn(2, 3, 8, 8, seed=1), "mask": mask}).backward()
        used = {name: p for name, p in model.named_parameters() if p.numel()}  # no class token, no registers
        assert [name for name, p in used.items() if p.grad is None or not p.grad.abs().max() > 0] == []

    def test_the_weights_of_the_loss(self):
        model, batch = self.model(), {"view": randn(2, 3, 8, 8), "clean": randn(2, 3, 8, 8, seed=1)}
        batch["mask"] = torch.tensor([[True, False, True, False]] * 2)
        terms = model(**batch)
        got = masked_prediction_loss({"pixel": 2.0, "gradient": 0.5})(model, batch)
        torch.testing.assert_close(got, 2.0 * terms["pixel"] + 0.5 * terms["gradient"])

    def test_training_predicts_what_is_hidden(self):
        """Pictures of one colour: a hidden patch has the colour of the others."""

        def batches(generator, n):
            clean = torch.randn(n, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8).contiguous()
            return {"view": clean, "clean": clean, "mask": random_masks(n, 4, generator)}

        loss = masked_prediction_loss({"pixel": 1.0, "gradient": 1.0})
        config = FitConfig(steps=300, batch_size=64, lr=1e-2, ema_decay=0.9)
        model = fit(self.model(), loss, batches, config).model.eval()
        batch = batches(torch.Generator().manual_seed(9), 200)
        tokens = model.vit(batch["view"], batch["mask"])
        error = (
            model.to_pixels(tokens).unflatten(-1, (3, 16)).mean(-1) - batch["clean"][:, None, :, 0, 0]
        ).abs()
        assert error[batch["mask"]].mean() < 0.3, "a guess of zero errs by 0.8"

    def test_cells_must_tile_a_patch(self):
        with pytest.raises(ValueError, match="cells of 3 pixels do not tile patches of 4"):
            self.model(cell=3)


def test_spread_is_one_for_random_directions_and_zero_for_one():
    assert feature_spread(randn(4000, 32)) == pytest.approx(1.0, abs=0.02)
    assert feature_spread(randn(1, 32).expand(50, -1) * (1 + torch.arange(50.0))[:, None]) < 1e-3


class TestProbe:
    def test_separable_classes_and_chance(self):
        y = torch.arange(600) % 3
        x = torch.eye(3)[y] * 4 + randn(600, 3)
        assert linear_probe(x[:300], y[:300], x[300:], y[300:]) > 0.95
        noise = randn(600, 3, seed=1)
        assert abs(linear_probe(noise[:300], y[:300], noise[300:], y[300:]) - 1 / 3) < 0.12

    def test_it_is_linear(self):
        x = randn(2000, 2)
        y = (x[:, 0] * x[:, 1] > 0).long()
        assert linear_probe(x[:1000], y[:1000], x[1000:], y[1000:]) < 0.6

    def test_against_sklearn(self):
        from sklearn.linear_model import RidgeClassifier
        from sklearn.preprocessing import StandardScaler

        x, y = randn(200, 6), torch.arange(200) % 4
        x = x + torch.nn.functional.one_hot(y, 6)
        scaler = StandardScaler().fit(x[:100])
        peer = RidgeClassifier(alpha=0.01 * 100).fit(scaler.transform(x[:100]), y[:100])
        wanted = peer.score(scaler.transform(x[100:]), y[100:])
        assert linear_probe(x[:100], y[:100], x[100:], y[100:], ridge=0.01) == pytest.approx(wanted)

    def test_a_constant_feature_does_no_harm(self):
        x, y = torch.cat([torch.ones(6, 1), torch.tensor([[-1.0, 1.0] * 3]).T], 1), torch.tensor([0, 1] * 3)
        assert linear_probe(x, y, x, y) == 1.0

    def test_bad_input(self):
        with pytest.raises(ValueError, match="samples on both sides"):
            linear_probe(
                torch.zeros(0, 2),
                torch.zeros(0, dtype=torch.long),
                torch.zeros(1, 2),
                torch.zeros(1, dtype=torch.long),
            )


class TestCells:
    @pytest.mark.parametrize("side", [4, 8, 16])
    def test_windows_cover_their_cells(self, side):
        from minilib.data import shapes

        scenes = shapes.sample_scenes(40, torch.Generator().manual_seed(0), objects=(1, 3))
        drawn = (shapes.render_layers(scenes, 16).masks.sum(1, keepdim=True) > 0.5).float()
        maps = torch.nn.functional.adaptive_max_pool2d(drawn, side)
        windows = cell_windows(maps)
        assert windows.shape == (40, 9, (side // 2) ** 2)
        assert (windows.sum(2)[scenes.grid()[..., 0] >= 0] > 0).all()

    def test_window_order(self):
        windows = cell_windows(torch.arange(16.0).view(1, 1, 4, 4))
        assert windows[0, 0].tolist() == [0, 1, 4, 5] and windows[0, 5].tolist() == [6, 7, 10, 11]
        with pytest.raises(ValueError, match="multiple of 4, got 6"):
            cell_windows(torch.zeros(1, 1, 6, 6))

    def test_the_truth_is_read_off_perfectly(self):
        """Maps that hold the answers one-hot: all read-outs are right."""
        from minilib.recipes.vae import mixed_scenes

        scenes = [mixed_scenes(300, torch.Generator().manual_seed(s), "train") for s in (0, 1)]
        maps = []
        for part in scenes:
            grid = part.grid() + 1
            code = torch.cat([torch.nn.functional.one_hot(grid[..., i], 8) for i in range(4)], -1).float()
            board = torch.zeros(300, 32, 4, 4)
            board[:, :, :3, :3] = code.transpose(1, 2).view(300, 32, 3, 3)
            maps.append(board)
        scores = probe_cells(maps[0], scenes[0], maps[1], scenes[1])
        assert set(scores) == {"present", "shape", "colour", "size", "stripe"}
        assert min(scores.values()) > 0.99

    def test_colours_are_in_range(self):
        colours = principal_colours(randn(20, 6, 4, 4), 16)
        assert colours.shape == (20, 3, 16, 16) and colours.abs().max() <= 1.0


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[0] += 0.2
    y[1] += 2.0
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 0.0]))
