"""The self-generated set: its parts, its batches, and that the teacher still draws the same pictures."""

import pytest
import torch

from minilib import zoo
from minilib.data import assets, provenance
from minilib.data.build import teacher_scenes as recipe
from minilib.data.build.tools import BuildError
from minilib.data.shapes import null_tokens, sample_scenes, tokens
from minilib.data.teacher_scenes import load_teacher_scenes, teacher_batches
from minilib.losses import uniform_timesteps
from minilib.recipes.scenes import draw_scenes, flow_scheduler


def test_pictures_and_captions_belong_together_and_do_not_overlap():
    scenes = load_teacher_scenes()
    assert len(scenes) == 1024 and scenes.images.shape == (1024, 3, 32, 32)
    assert -1 <= scenes.images.min() and scenes.images.max() <= 1
    assert (scenes.train.stop, scenes.held_out.start, scenes.held_out.stop) == (896, 896, 1024)
    train = {tuple(row) for row in scenes.tokens[scenes.train].tolist()}
    assert not train & {tuple(row) for row in scenes.tokens[scenes.held_out].tolist()}
    wanted = sample_scenes(128, torch.Generator().manual_seed(recipe.SEED + 1), objects=(1, 3), split="test")
    assert torch.equal(scenes.tokens[scenes.held_out], tokens(wanted))


def test_the_judge_finds_what_the_captions_say():
    scenes = load_teacher_scenes()
    part = slice(896, 1024)
    wanted = sample_scenes(128, torch.Generator().manual_seed(recipe.SEED + 1), objects=(1, 3), split="test")
    from minilib.metrics import read_in_batches, scene_scores

    oracle = zoo.load("oracle_shapes32")
    scores = scene_scores(read_in_batches(oracle, scenes.images[part]), wanted)
    assert float(scores["scene"].float().mean()) >= 0.95


def test_the_teacher_draws_the_same_pictures_again():
    scenes = load_teacher_scenes()
    split = draw_scenes(
        zoo.load("mmdit_shapes32"),
        scenes.tokens[scenes.held_out][:4],
        flow_scheduler(),
        size=32,
        steps=recipe.STEPS,
        guidance_scale=recipe.GUIDANCE_SCALE,
        seed=recipe.SEED + 1,
    )
    apart = (split - scenes.images[scenes.held_out][:4]).abs()
    assert apart.mean() < 0.01, (
        "the first pictures start from the first noise, on any machine nearly the same"
    )


def test_batches_are_of_the_training_part():
    scenes = load_teacher_scenes()
    make = teacher_batches(scenes, uniform_timesteps(), caption_dropout=0.5)
    batch = make(torch.Generator().manual_seed(0), 200)
    again = make(torch.Generator().manual_seed(0), 200)
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    known = {
        image.numpy().tobytes(): row for image, row in zip(scenes.images[:896], scenes.tokens, strict=False)
    }
    rows = torch.stack([known[image.numpy().tobytes()] for image in batch["x0"]])
    dropped = (batch["y"] == null_tokens(200)).all(1)
    assert torch.equal(batch["y"][~dropped], rows[~dropped])
    assert 70 <= int(dropped.sum()) <= 130
    with pytest.raises(ValueError, match="probability; got 2"):
        teacher_batches(scenes, uniform_timesteps(), caption_dropout=2)


def test_it_is_noted_and_locked(tmp_path):
    provenance.forget()
    scenes = load_teacher_scenes()
    assert provenance.used()["teacher_scenes"]["splits"] == {"all": scenes.checksum}
    assert assets.entry("teacher_scenes")["source_sha256"] == [zoo.entry("mmdit_shapes32")["sha256"]]
    with pytest.raises(BuildError, match="does not exist; get it with"):
        recipe.build(tmp_path)
