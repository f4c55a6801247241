"""The model that a guide keeps to, where it is not the initial weights themselves: guide_source.

    none                       the model's own architecture with random weights: a control
    demo, a run folder         its own architecture, from its card; also the encoder of a pre-training run
    a timm name                with its pretrained weights
    a file, a transformers     the model's own architecture, filled with these weights
      folder, transformers:NAME

A source sees the images of the model that is tuned. One that learnt from images normalised otherwise has the
difference folded into its patch embedding: with x' = (x - m') / s' in place of x,

    W' = W s' / s        b' = b + sum W (m' - m) / s        m, s: its own mean and deviation
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal.chance import seeded
from foveal.data.config import ImageConfig, image_config
from foveal.train.errors import RunError, SettingsError
from foveal.train.models import DEMO, check_name, create, pretrained, read_card, read_model
from foveal.train.weight_files import HUB, read_weights
from foveal.train.weights import classes_of, fill

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # of files, which a timm name does not have


def guide_source(
    spec: str,
    architecture: str,
    arguments: dict[str, Any],
    *,
    image: ImageConfig | None = None,
    seed: int = 0,
) -> tuple[nn.Module, str]:
    """A frozen model in evaluation, with its own classifier where it has one, and where it comes from in words.

    spec: see above.  architecture, arguments: of the model that is tuned, as in Built.  image: how its images are
    normalised; None: not compared.  Raises SettingsError for a spec that is none of these, RunError for a run that has
    not finished and weights that cannot be had or are of another architecture.
    """
    path = Path(spec).expanduser()
    own: ImageConfig | None = None
    if spec == "none":
        with seeded(seed, "source"):
            model, origin = create(architecture, arguments), "random weights"
    elif spec == "demo" or (path.is_dir() and not (path / "config.json").is_file()):
        model, own, origin = _run(DEMO if spec == "demo" else path, arguments)
    elif spec.startswith(HUB) or path.exists() or path.suffix in ENDINGS:
        model, own, origin = _file(spec, architecture, arguments)
    else:
        model, own, origin = _timm(spec, architecture, arguments)
    if own is not None and image is not None and (own.mean, own.std) != (image.mean, image.std):
        origin += see_as(model, own, image)
    return model.eval().requires_grad_(False), origin


@torch.no_grad()
def see_as(model: nn.Module, own: ImageConfig, given: ImageConfig) -> str:
    """Let a model take images normalised for another one, in place; returns what was done, in words.

    Exact for a patch embedding that is a convolution with bias and no padding; others are left as they are.
    """
    proj = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(proj, nn.Conv2d) or proj.bias is None or proj.padding not in ((0, 0), 0, "valid"):
        return f"; its images were normalised otherwise (mean {own.mean[0]:g}), and it now sees the tuned model's"
    mean, std, to_mean, to_std = (
        proj.weight.new_tensor(v).view(3, 1, 1) for v in (own.mean, own.std, given.mean, given.std)
    )
    shift: Tensor = (proj.weight * ((to_mean - mean) / std)).sum((1, 2, 3))
    proj.bias += shift
    proj.weight *= to_std / std
    return f"; the other normalisation of its images (mean {own.mean[0]:g}) is part of its patch embedding"


def _run(folder: Path, arguments: dict[str, Any]) -> tuple[nn.Module, ImageConfig, str]:
    """A run's model by its card, at the image size of the tuned model."""
    card = read_card(folder)
    size = arguments.get("img_size")
    if size is None or card["arguments"].get("img_size", size) == size:
        model, origin = read_model(folder), f"{card['architecture']} of {folder}"
    else:
        model = create(card["architecture"], card["arguments"] | {"img_size": size})
        origin = f"{card['architecture']}, {fill(model, read_weights(folder))}"
    return model, ImageConfig(**card["image"]), origin


def _file(spec: str, architecture: str, arguments: dict[str, Any]) -> tuple[nn.Module, ImageConfig | None, str]:
    """The tuned model's architecture, filled from a file, with the file's classifier where it has one."""
    file = read_weights(spec)
    try:
        bare = create(architecture, arguments | {"num_classes": 0})
        classes = classes_of(bare, file)
        model = create(architecture, arguments | {"num_classes": classes}) if classes else bare
        loaded = fill(model, file)
    except RunError as error:
        raise RunError(f"guide_source: {error}; a file is put into the model that is trained, {architecture}") from None
    own = None
    if file.mean is not None and file.std is not None:
        own = ImageConfig((1, 1), file.mean, file.std)  # type: ignore[arg-type]
    return model, own, "; ".join((str(loaded), *loaded.notes))


def _timm(spec: str, architecture: str, arguments: dict[str, Any]) -> tuple[nn.Module, ImageConfig, str]:
    """A timm model with its pretrained weights; the tuned one's own architecture keeps its arguments."""
    try:
        check_name(spec)
    except SettingsError as error:
        raise SettingsError(f"guide_source={spec}: {error}, and there is no such run folder or file") from None
    kept = {name: value for name, value in arguments.items() if name != "num_classes"}
    if spec.partition(".")[0] != architecture.partition(".")[0]:
        kept = {name: value for name, value in kept.items() if name == "img_size"}
    model, origin = pretrained(spec, kept, "give a run folder or a file as guide_source")
    return model, image_config(model), origin
