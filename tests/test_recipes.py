"""Every recipe of the zoo starts, and what the generators of scenes share does what it says."""

from dataclasses import asdict

import pytest
import torch

from minilib import models, zoo
from minilib.data import shapes
from minilib.data.shapes import sample_scenes
from minilib.models import SceneReader
from minilib.recipes import RECIPES, train
from minilib.recipes.generators import TEXT, with_trained_text
from minilib.recipes.scenes import draw_scenes, flow_scheduler, judge_scenes, scene_batches, unet_scheduler
from minilib.training import FitConfig


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_takes_its_first_steps_and_can_be_rebuilt(name, tmp_path):
    recipe = RECIPES[name]
    missing = [needed for needed in recipe.needs if needed not in zoo.names()]
    assert not missing, f"{name} needs {missing}, which the zoo does not have"
    config = FitConfig(**(asdict(recipe.config) | {"steps": 2, "batch_size": 4}))
    result = recipe.run(config, tmp_path / "checkpoint.safetensors")
    model = result.ema.cpu()
    assert len(result.history) >= 2 and all(value == value for value in result.history)
    kind = getattr(models, type(model).__name__)
    zoo.publish(name, model, metadata={}, card="", half=recipe.half, root=tmp_path)
    again = zoo.load(name, root=tmp_path)
    assert type(again) is kind and again.config.keys() == model.config.keys()
    for key, value in model.state_dict().items():
        assert torch.allclose(again.state_dict()[key].float(), value.float(), atol=2e-3, rtol=2e-3), key
    assert recipe.data() and recipe.summary.endswith(".")


def test_unknown_recipes_and_missing_models_are_named(tmp_path, monkeypatch):
    with pytest.raises(zoo.UnknownCheckpoint, match="no recipe for 'dit_cats'"):
        train("dit_cats")
    monkeypatch.setattr(zoo, "zoo_dir", lambda: tmp_path)
    with pytest.raises(zoo.UnknownCheckpoint, match="oracle_mnist"):
        train("dit_mnist", steps=1, work=tmp_path)


def test_batches_of_scenes():
    make = scene_batches(
        16, lambda n, generator: 1000 * torch.rand(n, generator=generator), caption_dropout=0.3
    )
    a, b = (make(torch.Generator().manual_seed(5), 200) for _ in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a) and set(a) == {"x0", "y", "noise", "t"}
    empty = (a["y"] == shapes.null_tokens(200)).all(1)
    assert 0.2 < float(empty.float().mean()) < 0.4
    kept = [shapes.decode(row) for row in a["y"][~empty]]
    parsed = shapes.parse(kept)
    assert set(shapes.split_of(parsed).tolist()) == {0}, "training sees the training split only"
    # The caption is of the picture beside it: undo the jitter by comparing with the nearest rendering.
    near = (shapes.render(parsed, 16) - a["x0"][~empty]).flatten(1).norm(dim=1)
    far = (shapes.render(parsed, 16) - a["x0"][~empty].roll(1, 0)).flatten(1).norm(dim=1)
    assert float((near < far).float().mean()) > 0.97


class Knows(torch.nn.Module):
    """A velocity model that knows the answer: it points from any state to the picture of the caption."""

    def encode_text(self, tokens):
        return models.TextStates(tokens.float()[..., None], tokens > 0, tokens.float())

    def null_tokens(self, b, length=None):
        return shapes.null_tokens(b, length or shapes.MAX_TOKENS)

    def forward(self, x, t, y=None, *, context=None, context_mask=None, pooled=None):
        sentences = [shapes.decode(row.long()) for row in context[..., 0]]
        scenes = shapes.parse([s or "small red circle top left" for s in sentences])
        return (x - shapes.render(scenes, x.shape[-1])) / (t / 1000).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("size", "objects"), [(16, 1), (16, 3), (32, 2)])
def test_a_generator_that_knows_the_answer_has_full_marks(size, objects):
    oracle = zoo.load(f"oracle_shapes{size}")
    scores = judge_scenes(
        lambda y: draw_scenes(Knows(), y, flow_scheduler(), size=size, guidance_scale=1.0, steps=4, batch=16),
        oracle,
        size=size,
        objects=objects,
        n=40,
    )
    assert scores["scene"] == 1.0 and scores["extra"] == 0.0


def test_drawings_do_not_depend_on_the_batch():
    tokens = shapes.tokens(sample_scenes(6, torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    unet = {"block_out_channels": (8, 8), "layers_per_block": 1, "attention_levels": (1,), "num_heads": 2}
    model = models.TextUNet(
        text={**TEXT, "dim": 8, "num_heads": 2, "depth": 1}, unet={**unet, "norm_num_groups": 4}
    )
    for p in model.parameters():
        p.data.normal_(std=0.2)
    a, b = (draw_scenes(model, tokens, flow_scheduler(), size=16, steps=3, batch=n) for n in (6, 4))
    assert (a - b).abs().max() < 1e-4 and not torch.equal(a[0], a[1])


def test_the_schedule_is_stable_diffusion_2_s():
    scheduler = unet_scheduler()
    alphas = scheduler.alphas_cumprod
    assert float(alphas[0]) == pytest.approx(0.99915) and float(alphas[-1]) == pytest.approx(0.0047, abs=1e-4)
    assert scheduler.config.prediction_type == "v_prediction"


def test_the_caption_reader_reads_captions():
    reader = zoo.load("text_shapes")
    scenes = sample_scenes(300, torch.Generator().manual_seed(8), objects=(1, 3), split="test")
    assert torch.equal(reader.read(shapes.tokens(scenes))[..., :3], scenes.grid()[..., :3])
    assert (
        reader.read(shapes.null_tokens(1))[..., 0] >= 0
    ).sum() <= 1  # nothing, or nearly: never seen in training


def test_generators_start_from_the_trained_text_encoder():
    torch.manual_seed(0)
    unet = {"block_out_channels": (8, 8), "layers_per_block": 1, "attention_levels": (1,), "num_heads": 2}
    model = models.TextUNet(text=TEXT, unet={**unet, "norm_num_groups": 4})
    trained = zoo.load("text_shapes").text_encoder.state_dict()
    with_trained_text(model)
    assert all(torch.equal(model.text_encoder.state_dict()[k], v) for k, v in trained.items())
    assert SceneReader(**zoo.load("text_shapes").config).config == zoo.load("text_shapes").config


def test_a_second_cycle_goes_on_from_the_average_of_the_first(tmp_path):
    from minilib.recipes.base import Cycle, training_run

    def build():
        return torch.nn.Linear(3, 1)

    def batches():
        return lambda generator, n: {"x": torch.randn(n, 3, generator=generator)}

    def loss():
        return lambda model, batch: (model(batch["x"]) - 1.0).square().mean()

    def run(name, then=None):
        return training_run("test", build, loss, batches, then)(config, tmp_path / f"{name}.safetensors")

    config = FitConfig(steps=10, batch_size=4, lr=1e-2, warmup=0, ema_decay=0.9)
    once, idle = run("once"), run("idle", Cycle(0.5, {"lr": 0.0}))
    assert torch.equal(idle.model.weight, once.ema.weight) and not torch.equal(
        once.model.weight, once.ema.weight
    )
    assert len(idle.history) == 15 and idle.history[:10] == once.history
    assert {p.stem for p in tmp_path.iterdir()} == {"once", "idle", "idle-second"}
    twice = run("twice", Cycle(0.5, {"seed": 1}))
    assert not torch.equal(twice.model.weight, once.ema.weight)
    again = run(
        "twice", Cycle(0.5, {"seed": 1})
    )  # nothing is left to do: both cycles come from their checkpoints
    assert torch.equal(again.ema.weight, twice.ema.weight)
    assert Cycle(0.6, {"lr": 0.5}).config(FitConfig(steps=2, lr=1.0)) == FitConfig(steps=1, lr=0.5)
