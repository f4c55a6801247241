"""Input gradient against autograd and against finite differences."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveal import maps
from map_models import MODELS, batch, resnet, vit


def plain(model, images, labels):
    x = images.clone().requires_grad_()
    loss = F.cross_entropy(model.eval()(x), labels)  # the mean over the batch
    (g,) = torch.autograd.grad(loss, x)
    return g.square().mean(1).sqrt()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("B", [1, 2, 3])
def test_it_is_the_gradient_of_the_batch_mean_loss(name, B):
    build, size, _ = MODELS[name]
    model = build()
    images, labels = batch(B, size)
    got = maps.InputGradient(model)(images, labels)
    expected = plain(model, images, labels)
    assert got.map.shape == (B, *size)
    assert torch.allclose(got.map, expected, rtol=1e-4, atol=float(expected.max()) * 1e-5)


class TwoPixels(nn.Module):
    """Logits W (x_1 + x_2 / 2) of an image of two pixels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0, 2], [0, 3, 0]]))

    def forward(self, x):
        return (x[:, :, 0, 0] + x[:, :, 0, 1] / 2) @ self.weight.T


def test_by_hand():
    """Logits (1, 3), label 0: the gradient at the first pixel is p_1 (w_1 - w_0), at the second half of that."""
    images = torch.tensor([[1.0, 0], [1, 0], [0, 0]]).view(1, 3, 1, 2)
    p = torch.e**3 / (torch.e + torch.e**3)
    rms = p * (14 / 3) ** 0.5
    got = maps.InputGradient(TwoPixels())(images, torch.tensor([0])).map
    assert torch.allclose(got, torch.tensor([[[rms, rms / 2]]]))


def test_labels_as_rows():
    model = vit()
    images, labels = batch(3, (32, 32))
    source = maps.InputGradient(model)
    assert torch.allclose(source(images, F.one_hot(labels, 5)).map, source(images, labels).map, atol=1e-7)


def test_gradients_of_parameters_are_left_as_they_were():
    model = resnet()
    images, labels = batch(2, (64, 64))
    maps.InputGradient(model)(images, labels)
    assert all(p.grad is None for p in model.parameters())
    model(images).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    maps.InputGradient(model)(images, labels)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_frozen_model_and_images_that_need_gradient():
    model = vit().requires_grad_(False)
    images, labels = batch(2, (32, 32))
    expected = plain(model, images, labels)
    images.requires_grad_()
    found = maps.InputGradient(model)(images, labels)
    assert torch.allclose(found.map, expected, rtol=1e-4, atol=float(expected.max()) * 1e-5)
    assert images.grad is None
    assert not found.map.requires_grad


def test_a_large_batch_does_not_underflow_in_half_precision():
    model = vit(dtype=torch.float16)
    with torch.no_grad():
        model.head.weight.mul_(1e-4)
    images, labels = batch(64, (32, 32))
    assert not maps.InputGradient(model)(images, labels).blank.any()


def test_what_does_not_fit():
    images, labels = batch(2, (32, 32))
    with pytest.raises(ValueError, match="differentiates the loss of a label"):
        maps.InputGradient(vit())(images)
    with pytest.raises(ValueError, match="labels from 0 to 5 but the model has 5 classes"):
        maps.InputGradient(vit())(images, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="label rows of 3 classes but the model has 5"):
        maps.InputGradient(vit())(images, torch.rand(2, 3))
    with pytest.raises(maps.MapModelError, match=r"returns \(2, 5\); logits \(B, 7\)"):
        maps.InputGradient(vit(), classes=7)(images, labels)
    with pytest.raises(maps.MapModelError, match="returns no logits"):
        maps.InputGradient(nn.Conv2d(3, 5, 1))(images, labels)
