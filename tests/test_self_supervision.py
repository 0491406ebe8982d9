import math

import pytest
import torch

from minilib.metrics import linear_probe, psnr
from minilib.models import ViT
from minilib.recipes.vit import cell_windows, principal_colours, probe_cells, view_batches
from minilib.self_supervision import (
    PrototypeHead,
    SelfDistillation,
    distillation_loss,
    distillation_targets,
    feature_spread,
    random_light,
    random_masks,
    self_distillation_loss,
    teacher_momentum,
    updated_centre,
)
from minilib.training import FitConfig, fit, step_generator

TINY = {"image_size": 8, "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distiller(**options):
    torch.manual_seed(0)
    return SelfDistillation(ViT(**TINY), patches=16, steps=20, prototypes=12, **options)


def batches(generator, n):
    x = torch.randn(n, 3, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    masks = [random_masks(n, 16, generator) for _ in range(2)]
    views = [x + 0.1 * torch.randn(x.shape, generator=generator) for _ in range(2)]
    return {"a": views[0], "b": views[1], "mask_a": masks[0], "mask_b": masks[1]}


class TestTargets:
    def test_closed_form(self):
        targets = distillation_targets(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5, 1.0]), 0.5)
        p = 1 / (1 + math.exp((1.0 - 0.5) / 0.5))
        torch.testing.assert_close(targets, torch.tensor([[p, 1 - p]]))

    def test_no_gradient_comes_back(self):
        logits = randn(2, 3).requires_grad_()
        assert not distillation_targets(logits, torch.zeros(3), 0.1).requires_grad

    def test_a_centre_for_each_place(self):
        logits = randn(1, 4, 3).expand(5, -1, -1)  # an answer that depends on the place alone
        everywhere = distillation_targets(logits, logits.mean((0, 1)), 0.04)
        by_place = distillation_targets(logits, logits.mean(0), 0.04)
        torch.testing.assert_close(by_place, torch.full_like(by_place, 1 / 3))
        assert everywhere.max() > 0.9


class TestLoss:
    def test_closed_form(self):
        student, targets = torch.tensor([[0.0, 0.1 * math.log(3.0)]]), torch.tensor([[0.5, 0.5]])
        wanted = -0.5 * (math.log(0.25) + math.log(0.75))
        assert distillation_loss(student, targets).item() == pytest.approx(wanted, rel=1e-6)
        assert distillation_loss(student, targets, 0.2).item() != pytest.approx(wanted, rel=1e-2)

    def test_it_is_least_where_the_student_agrees(self):
        targets = torch.softmax(randn(4, 6), -1)
        student = (0.1 * targets.log()).requires_grad_()
        loss = distillation_loss(student, targets)
        loss.backward()
        assert student.grad.abs().max() < 1e-6
        assert loss.item() == pytest.approx(-(targets * targets.log()).sum(-1).mean().item(), rel=1e-5)

    def test_masked_mean_is_by_sample_first(self):
        student, targets = randn(3, 4, 5), torch.softmax(randn(3, 4, 5, seed=1), -1)
        each = -(targets * torch.log_softmax(student / 0.1, -1)).sum(-1)
        mask = torch.tensor([[True, False, False, False], [True, True, True, False], [False] * 4])
        wanted = (each[0, 0] + each[1, :3].mean()) / 2  # a sample without a hidden patch does not count
        torch.testing.assert_close(distillation_loss(student, targets, 0.1, mask), wanted)
        full = torch.ones(3, 4, dtype=torch.bool)
        torch.testing.assert_close(
            distillation_loss(student, targets, 0.1, full), distillation_loss(student, targets)
        )
        with pytest.raises(ValueError, match="hides no patch"):
            distillation_loss(student, targets, 0.1, ~full)


class TestSchedules:
    def test_the_centre_moves_by_a_tenth_of_the_way(self):
        centre, logits = torch.ones(2, 3), torch.full((4, 2, 3), 2.0)
        torch.testing.assert_close(updated_centre(centre, logits), torch.full((2, 3), 1.1))
        torch.testing.assert_close(updated_centre(centre, logits, 0.0), torch.full((2, 3), 2.0))
        for _ in range(200):
            centre = updated_centre(centre, logits)
        torch.testing.assert_close(centre, torch.full((2, 3), 2.0))

    def test_momentum_rises_to_one_and_stays(self):
        values = [teacher_momentum(step, 10, 0.9) for step in range(12)]
        assert values[0] == pytest.approx(0.9) and values[10] == values[11] == 1.0
        assert values == sorted(values)


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
            "a": (4, 3, 16, 16), "b": (4, 3, 16, 16), "mask_a": (4, 16), "mask_b": (4, 16),
        }  # fmt: skip
        assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["a"], a["b"])


class TestSelfDistillation:
    def test_losses_against_the_pieces(self):
        model = distiller().eval()
        batch = batches(torch.Generator().manual_seed(0), 3)
        model.patch_centre += 0.1 * randn(16, 12)
        with torch.no_grad():
            losses = model(*(batch[k] for k in ("a", "b", "mask_a", "mask_b")))
            vit, head = model.student["vit"], model.student["head"]
            pooled, patch, pixel, hidden = [], [], 0.0, 0
            for mine, other in (("a", "b"), ("b", "a")):
                mask = batch[f"mask_{mine}"]
                seen, whole = vit(batch[mine], mask), vit(batch[other])  # the teacher is still a copy
                targets = distillation_targets(head(whole.mean(1)), torch.zeros(12), 0.04)
                pooled.append(distillation_loss(head(seen.mean(1)), targets))
                targets = distillation_targets(head(whole), model.patch_centre, 0.04)
                patch.append(distillation_loss(head(seen), targets, 0.1, mask))
                flat = (
                    batch[mine].unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 16, 12)
                )
                pixel += ((model.to_pixels(seen) - flat).abs().mean(-1) * mask).sum()
                hidden += mask.sum()
        torch.testing.assert_close(losses["pooled"], sum(pooled) / 2)
        torch.testing.assert_close(losses["patch"], sum(patch) / 2)
        torch.testing.assert_close(losses["pixel"], pixel / hidden)

    def test_only_the_student_gets_gradients(self):
        model = distiller()
        batch = batches(torch.Generator().manual_seed(0), 4)
        loss = self_distillation_loss({"pooled": 1.0, "patch": 1.0, "pixel": 1.0})(model, batch)
        loss.backward()
        assert all(p.grad is None for p in model.teacher.parameters())
        trained = [*model.student.named_parameters(), *model.to_pixels.named_parameters()]
        # Without a class token or registers the prefix is empty.
        assert all(p.grad.abs().max() > 0 for name, p in trained if not name.endswith("prefix"))

    @pytest.mark.parametrize("name", ["pooled", "patch", "pixel"])
    def test_weights_choose(self, name):
        batch = batches(torch.Generator().manual_seed(0), 4)
        weights = {"pooled": 0.0, "patch": 0.0, "pixel": 0.0, name: 2.0}
        terms = distiller().eval()(*(batch[k] for k in ("a", "b", "mask_a", "mask_b")))
        torch.testing.assert_close(
            self_distillation_loss(weights)(distiller().eval(), batch), 2 * terms[name]
        )

    def test_centres_and_teacher_move_in_training_only(self):
        model, batch = distiller(), batches(torch.Generator().manual_seed(0), 4)
        args = [batch[k] for k in ("a", "b", "mask_a", "mask_b")]
        with torch.no_grad():
            logits = model.teacher["head"](model.teacher["vit"](torch.cat(args[:2])))
        model.eval()(*args)
        assert not model.patch_centre.any() and not model.pooled_centre.any() and model.step == 0
        with torch.no_grad():
            model.student["head"].fc1.weight += 1.0
        old = model.teacher["head"].fc1.weight.clone()
        model.train()(*args)
        torch.testing.assert_close(model.teacher["head"].fc1.weight, old + 0.01)
        assert model.step == 1
        assert (model.patch_centre - 0.1 * logits.mean(0)).abs().max() < 0.02 and model.pooled_centre.any()

    def test_the_teacher_follows_its_schedule(self):
        model = distiller(momentum=0.5)
        model.step += 20
        with torch.no_grad():
            model.student["head"].fc1.weight += 1.0
        old = model.teacher["head"].fc1.weight.clone()
        model.move_teacher()
        assert torch.equal(model.teacher["head"].fc1.weight, old), "at rest at the end"

    def test_an_interrupted_run_ends_with_the_same_teacher(self, tmp_path):
        loss = self_distillation_loss({"pooled": 1.0, "patch": 1.0, "pixel": 1.0})
        config = FitConfig(steps=6, batch_size=4, warmup=0)
        whole = fit(distiller(), loss, batches, config, device="cpu").model

        class Interrupted(Exception):
            pass

        def stop(step, ema, value):
            raise Interrupted

        path = tmp_path / "run.safetensors"
        with pytest.raises(Interrupted):
            fit(
                distiller(),
                loss,
                batches,
                config,
                checkpoint=path,
                checkpoint_every=3,
                callback=stop,
                callback_every=3,
                device="cpu",
            )
        resumed = fit(distiller(), loss, batches, config, checkpoint=path, device="cpu").model
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), name

    def test_it_learns_without_collapse(self):
        loss = self_distillation_loss({"pooled": 1.0, "patch": 1.0, "pixel": 1.0})
        model, held_out = distiller(), batches(step_generator(7, 0), 64)
        args = [held_out[k] for k in ("a", "b", "mask_a", "mask_b")]
        before = model.eval()(*args)["pixel"].item()
        config = FitConfig(steps=60, batch_size=16, lr=3e-3, warmup=5)
        model = fit(model, loss, batches, config, device="cpu").model
        assert model(*args)["pixel"].item() < 0.9 * before
        with torch.no_grad():
            features = model.teacher["vit"].features(held_out["a"])
            answers = (model.teacher["head"](features) - model.patch_centre).argmax(-1)
        assert feature_spread(features[:, 5]) > 0.2
        assert len(answers[:, 5].unique()) >= 4, "the teacher gives the same answer to everything"


def test_the_head_s_logits_are_cosines():
    torch.manual_seed(0)
    head = PrototypeHead(4, 8, 3, 5)
    x = randn(6, 4)
    z = head.fc2(torch.nn.functional.gelu(head.fc1(x)))
    wanted = torch.nn.functional.cosine_similarity(z[:, None], head.prototypes[None], dim=-1)
    torch.testing.assert_close(head(x), wanted)


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
