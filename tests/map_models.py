"""Tiny random models that have preferences, and all of a model's state, for tests of maps."""

import copy

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "patch_size": 4}


def vit(cls=VisionTransformer, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = cls(**{"img_size": 32, **SMALL, **settings}).to(dtype).train()
    with torch.no_grad():  # a fresh model has zero biases, and looks everywhere alike
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def resnet():
    torch.manual_seed(0)
    return timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5).train()


MODELS = {
    "8x8": (lambda: vit(), (32, 32), (8, 8)),
    "14x14": (lambda: vit(img_size=56), (56, 56), (14, 14)),
    "7x5": (lambda: vit(img_size=(28, 20)), (28, 20), (7, 5)),
    "registers": (lambda: vit(img_size=(28, 20), reg_tokens=2), (28, 20), (7, 5)),
    "pooled": (
        lambda: vit(img_size=(28, 20), class_token=False, reg_tokens=2, global_pool="avg"),
        (28, 20),
        (7, 5),
    ),
    "distilled": (lambda: vit(VisionTransformerDistilled, img_size=(28, 20)), (28, 20), (7, 5)),
}


def batch(B, size, classes=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(B)
    return torch.randn(B, 3, *size, generator=g, dtype=torch.float64).to(dtype), torch.randint(
        classes, (B,), generator=g
    )


def everything(model):
    """Weights, buffers, gradients, modes, hooks and attributes of a model, and the state of chance."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in kinds],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "chance": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
