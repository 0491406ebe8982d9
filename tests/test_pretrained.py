"""Real weights in diffusers' layout; the hub itself is a fake, as tests have no network."""

import json

import diffusers
import pytest
import torch

from minilib import zoo
from minilib.models import (
    ConversionError,
    ConvVAE,
    DiT,
    MMDiT,
    UNet,
    mmdit_to_diffusers,
    to_diffusers,
    unet_to_diffusers,
    vae_to_diffusers,
)
from minilib.pretrained import PretrainedError, converters, from_folder, load_pretrained


def perturbed(model):
    """No layer at its zero start, which would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def unet():
    return perturbed(UNet(block_out_channels=(8, 16), cross_attention_dim=8, attention_levels=(1,)))


def mmdit():
    return perturbed(
        MMDiT(8, 2, 3, 16, 2, 2, context_dim=12, pooled_dim=4, positions="sincos_cropped",
              pos_embed_max_size=8, unused_context_query=True)
    )  # fmt: skip


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 700])
TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
CASES = {
    "UNet2DConditionModel": (unet, unet_to_diffusers, lambda m: m(X, T, TEXT)),
    "AutoencoderKL": (
        lambda: perturbed(ConvVAE(block_out_channels=[8, 16], latent_channels=4)),
        vae_to_diffusers,
        lambda m: m(X)[0],
    ),
    "SD3Transformer2DModel": (
        mmdit,
        mmdit_to_diffusers,
        lambda m: m(X, T.float(), torch.cat([TEXT, TEXT[..., :4]], -1), None, TEXT[:, 0, :4]),
    ),
    "DiTTransformer2DModel": (
        lambda: perturbed(DiT(8, 2, 3, 16, 2, 2, num_classes=5, frequency_shift=1)),
        to_diffusers,
        lambda m: m(X, T, torch.tensor([1, 4])),
    ),
}


def save(name, folder, **options):
    """The model as diffusers writes it; comes back as ours."""
    build, convert, _ = CASES[name]
    model = build()
    state, config = convert(model)
    theirs = getattr(diffusers, name)(**config)
    theirs.load_state_dict(state)
    theirs.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_diffusers_wrote(name, tmp_path):
    model, call = save(name, tmp_path), CASES[name][2]
    loaded = load_pretrained(f"folder:{tmp_path}")
    assert type(loaded) is type(model) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        wanted = call(model)
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(call(loaded), wanted, atol=1e-5, rtol=0)


def test_every_converter_is_tried_here():
    assert {*converters()} == {*CASES, "Transformer2DModel"}


def test_weights_of_the_old_dit_class(tmp_path):
    """DiT's published configuration says Transformer2DModel and has options that do not matter to it."""
    model = save("DiTTransformer2DModel", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "_class_name": "Transformer2DModel",
        "cross_attention_dim": None,
        "only_cross_attention": False,
    }
    path.write_text(json.dumps(config))
    call = CASES["DiTTransformer2DModel"][2]
    torch.testing.assert_close(call(from_folder(tmp_path)), call(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_and_variants(variant, tmp_path):
    options = {"variant": variant} if variant else {}
    model = save("UNet2DConditionModel", tmp_path, max_shard_size="60KB", **options)
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    call = CASES["UNet2DConditionModel"][2]
    torch.testing.assert_close(call(from_folder(tmp_path, variant)), call(model), atol=1e-5, rtol=0)
    next(iter(sorted(tmp_path.glob("*-00002-of-*")))).unlink()
    with pytest.raises(PretrainedError, match="00002-of.*not there"):
        from_folder(tmp_path, variant)


def test_a_name_of_the_zoo():
    model = load_pretrained("oracle_digits")
    assert type(model) is type(zoo.load("oracle_digits"))
    with pytest.raises(zoo.UnknownCheckpoint, match="oracle_digit"):
        load_pretrained("oracle_digit")


class TestHub:
    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        """A fake hub that has the model below ``unet``; returns what it was asked for."""
        calls = []
        save("UNet2DConditionModel", tmp_path / "unet")

        def snapshot_download(repository, **options):
            calls.append((repository, options))
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return calls

    def test_address(self, asked):
        assert isinstance(load_pretrained("hub:some-one/a.model/unet"), UNet)
        assert isinstance(load_pretrained("hub:some-one/a.model/unet@v1.0"), UNet)
        assert [(name, options["revision"]) for name, options in asked] == [
            ("some-one/a.model", None),
            ("some-one/a.model", "v1.0"),
        ]

    def test_only_what_is_needed_is_asked_for(self, asked):
        from fnmatch import fnmatch

        load_pretrained("hub:a/b/unet")
        patterns = asked[0][1]["allow_patterns"]

        def wanted(file):
            return any(fnmatch(file, pattern) for pattern in patterns)

        stem = "unet/diffusion_pytorch_model"
        for file in ("unet/config.json", f"{stem}.safetensors", f"{stem}-00001-of-00002.safetensors"):
            assert wanted(file), file
        assert wanted(f"{stem}.safetensors.index.json")
        for file in (
            "vae/config.json",
            f"{stem}.bin",
            f"{stem}.fp16.safetensors",
            f"{stem}.non_ema.safetensors",
        ):
            assert not wanted(file), file

    def test_the_whole_repository_is_one_model(self, asked):
        with pytest.raises(PretrainedError, match="has no config.json; name the folder of one model"):
            load_pretrained("hub:a/b")
        assert "config.json" in asked[0][1]["allow_patterns"]

    def test_no_network(self, monkeypatch):
        def offline(*_, **__):
            raise OSError("no route to host")

        monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
        with pytest.raises(PretrainedError, match="no route to host.*use a model of the zoo"):
            load_pretrained("hub:a/b/unet")

    @pytest.mark.parametrize("name", ["hub:", "hub:alone", "hub:/b", "hub:a/", "hub:a/b/c@"])
    def test_no_address(self, name):
        with pytest.raises(PretrainedError, match="is no address; expected hub:OWNER/NAME"):
            load_pretrained(name)


class TestBadFolders:
    def test_another_class(self, tmp_path):
        (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
        with pytest.raises(
            PretrainedError, match="is of a 'FluxTransformer2DModel'; these convert: AutoencoderKL"
        ):
            from_folder(tmp_path)

    def test_pickled_weights_only(self, tmp_path):
        save("UNet2DConditionModel", tmp_path, safe_serialization=False)
        with pytest.raises(PretrainedError, match=r"but .*diffusion_pytorch_model.bin; only safetensors"):
            from_folder(tmp_path)

    def test_a_variant_that_is_not_there(self, tmp_path):
        save("UNet2DConditionModel", tmp_path)
        with pytest.raises(PretrainedError, match="neither diffusion_pytorch_model.fp16.safetensors"):
            from_folder(tmp_path, "fp16")

    def test_an_option_that_we_have_not(self, tmp_path):
        save("UNet2DConditionModel", tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_embed_type": "text"}))
        with pytest.raises(ConversionError, match="addition_embed_type"):
            from_folder(tmp_path)
