"""The encoder that comes with foveal: a tiny ViT for 32-pixel digit scenes, trained without labels.

`model.safetensors` and its card `model.json` (how it was trained, on what, what it reaches) lie in this folder.
`recipes/demo_source.py` makes both; no digit image and no part of a photograph that it was trained on is in the
scenes of stage "target".
"""

import json
from importlib.resources import as_file, files
from typing import Any

import timm
from safetensors.torch import load_file
from torch import nn

from foveal.chance import seeded


def demo_card() -> dict[str, Any]:
    """The card: architecture and arguments for timm.create_model, image configuration, training, results."""
    return dict(json.loads((files(__name__) / "model.json").read_text(encoding="utf-8")))


def demo_encoder(num_classes: int = 0, *, seed: int = 0) -> nn.Module:
    """The bundled encoder as a timm VisionTransformer in float32, in train mode as timm builds models.

    num_classes: outputs of a new classifier whose start is drawn from `seed`; 0: none, the model gives the
    class token's features (B, 64). Its images are 32 pixels; `foveal.data.image_config(model)` knows mean and
    deviation.
    """
    card = demo_card()
    with seeded(seed, "init"):
        model: nn.Module = timm.create_model(card["architecture"], **{**card["arguments"], "num_classes": num_classes})
    with as_file(files(__name__) / "model.safetensors") as path:
        found = model.load_state_dict(load_file(path), strict=False)
    missing = [name for name in found.missing_keys if not name.startswith("head.")]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"the bundled encoder does not fit this timm: {missing}, {found.unexpected_keys}")
    return model
