import re
import subprocess
import sys

import pytest
import torch

from minilib import zoo
from minilib.models import OracleClassifier


@pytest.fixture
def root(tmp_path):
    torch.manual_seed(0)
    zoo.publish(
        "judge",
        OracleClassifier(width=8).eval(),
        metadata={"summary": "a judge"},
        card="# judge\n",
        root=tmp_path,
    )
    return tmp_path


def test_a_published_model_comes_back_bit_for_bit(root):
    torch.manual_seed(0)
    original, model = OracleClassifier(width=8).eval(), zoo.load("judge", root=root)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(original(x), model(x)) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert zoo.names(root) == ["judge"] and zoo.checksum("judge", root) == zoo.entry("judge", root)["sha256"]
    assert (root / "judge.md").read_text() == "# judge\n"


def test_half_precision_costs_half_and_loads_as_float32(root):
    size = zoo.entry("judge", root)["bytes"]
    zoo.publish("judge", OracleClassifier(width=8), metadata={}, card="", half=True, root=root)
    assert zoo.entry("judge", root)["bytes"] < 0.6 * size
    assert all(p.dtype == torch.float32 for p in zoo.load("judge", root=root).parameters())


def test_damage_has_a_name(root):
    path = root / "judge.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(zoo.TruncatedFile, match="train judge"):
        zoo.load("judge", root=root)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(zoo.ChecksumMismatch, match="sha256"):
        zoo.load("judge", root=root)
    path.unlink()
    with pytest.raises(zoo.MissingFile, match="does not exist"):
        zoo.load("judge", root=root)
    with pytest.raises(zoo.UnknownCheckpoint, match="known: judge"):
        zoo.load("juge", root=root)


def test_the_shipped_checkpoints_are_whole_and_have_cards():
    assert {"oracle_digits", "dit_digits"} <= set(zoo.names())
    total = 0
    for name in zoo.names():
        total += len(zoo.read(name))
        card = (zoo.zoo_dir() / f"{name}.md").read_text()
        for needed in ("Data", "Recipe", "Measured on the test split", "Licence", f"train {name}"):
            assert needed in card, (name, needed)
        assert len(zoo.read(name)) <= 8 << 20
    assert total <= 40 << 20


def test_the_cards_figures_are_the_entries():
    for name in zoo.names():
        card = (zoo.zoo_dir() / f"{name}.md").read_text()
        for key, value in zoo.entry(name)["metrics"].items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            assert f"| {key.replace('_', ' ')} | {shown} |" in card, (name, key)


def test_the_oracle_reads_real_digits_as_its_card_says():
    from minilib.data import load
    from minilib.metrics import class_accuracy

    test = load("digits", "test")
    accuracy = class_accuracy(zoo.load("oracle_digits"), test.x, test.y)
    assert (
        accuracy == pytest.approx(zoo.entry("oracle_digits")["metrics"]["accuracy_test"], abs=0.003)
        and accuracy > 0.99
    )


def test_dit_digits_draws_what_is_asked():
    from minilib.metrics import class_accuracy
    from minilib.recipes import sample_digits

    y = torch.arange(10).repeat(5)
    x = sample_digits(zoo.load("dit_digits"), y, guidance_scale=1.5, steps=15)
    assert class_accuracy(zoo.load("oracle_digits"), x, y) >= 0.94


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "minilib.zoo", *args], capture_output=True, text=True, timeout=120
    )


def test_command_line():
    listing = run("list")
    assert listing.returncode == 0 and re.search(r"oracle_digits +\d", listing.stdout)
    assert "oracle_digits: ok" in run("check", "oracle_digits").stdout
    for command in (("check", "nobody"), ("train", "nobody")):
        wrong = run(*command)
        assert wrong.returncode == 1 and "nobody" in wrong.stderr and "oracle_digits" in wrong.stderr
        assert "Traceback" not in wrong.stderr


def test_train_writes_a_loadable_checkpoint_with_card(tmp_path):
    done = run(
        "train",
        "oracle_digits",
        "--steps",
        "30",
        "--out",
        str(tmp_path / "zoo"),
        "--work",
        str(tmp_path / "work"),
    )
    assert done.returncode == 0, done.stderr
    assert zoo.entry("oracle_digits", tmp_path / "zoo")["recipe"]["steps"] == 30
    assert isinstance(zoo.load("oracle_digits", root=tmp_path / "zoo"), OracleClassifier)
    assert "accuracy test" in (tmp_path / "zoo" / "oracle_digits.md").read_text()
