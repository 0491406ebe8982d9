import pytest
import torch
import torch.nn.functional as F

from minilib.models import OracleClassifier


@pytest.mark.parametrize("options", [{}, {"in_channels": 3, "num_classes": 4, "image_size": 16, "width": 8}])
def test_shapes_and_config(options):
    model = OracleClassifier(**options).eval()
    c = model.config
    x = torch.randn(5, c["in_channels"], c["image_size"], c["image_size"])
    assert model(x).shape == (5, c["num_classes"]) and model.features(x).shape == (5, 64)
    torch.testing.assert_close(model(x), model.head(model.features(x)))
    again = OracleClassifier(**c).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = OracleClassifier(width=8), torch.randn(8, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_it_learns_to_tell_rows_from_columns():
    torch.manual_seed(0)
    model = OracleClassifier(num_classes=2, width=8)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    x = torch.stack([stripes.expand(8, 8), stripes[:, None].expand(8, 8)])[:, None].repeat(16, 1, 1, 1)
    y, x = torch.arange(2).repeat(16), x + 0.3 * torch.randn_like(x)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(15):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert (model.eval()(x).argmax(1) == y).all()


@pytest.mark.parametrize("size", [6, 0])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match=f"multiple of 4, got {size}"):
        OracleClassifier(image_size=size)


def test_images_of_another_shape():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) given, this classifier takes \(1, 8, 8\)"):
        OracleClassifier()(torch.zeros(1, 3, 8, 8))
