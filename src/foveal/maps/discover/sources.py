"""The sources `tokencut`, `maskcut`, `lost` and `dino`: objects found without labels in what a model makes of images.

>>> found = TokenCut(model)(images)                       # doctest: +SKIP
>>> found.map, found.mask, found.pixel_boxes              # doctest: +SKIP

Each runs its model once, in evaluation, and leaves no trace. Made for encoders that were trained without labels (DINO);
what others' features give is worth a look at `degenerate` and `inverted`. An object is best looked for in the whole
image: in a crop it often fills the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from foveal.attention import UnsupportedModelError, read
from foveal.data.config import image_config
from foveal.maps import attended
from foveal.maps.asking import as_wanted, asking
from foveal.maps.discover.bilateral import refine
from foveal.maps.discover.components import in_pixels
from foveal.maps.discover.discovered import Discovered, Objects
from foveal.maps.discover.graph import check_settings
from foveal.maps.discover.lost import lost
from foveal.maps.discover.maskcut import maskcut
from foveal.maps.discover.mass import dino_mass, mass_mask
from foveal.maps.discover.patches import Kind, one_grid, patches, reader
from foveal.maps.discover.tokencut import Foreground, check_foreground, tokencut
from foveal.maps.found import found
from foveal.maps.pixels import pixels_of

Result = TypeVar("Result", Discovered, Objects)


class TokenCut:
    """The source `tokencut`.

    variant: of the map: `clipped`, `eigenvector` and `mask` as in `foveal.maps.discover.tokencut`, on the patch grid;
    `soft`: the mask refined by the bilateral solver, (B, H, W) in [0, 1], with its pixels in `refined`.
    tau, eps, binary: of the graph.  foreground: which side of the cut is the object.
    features, layer: what of the model is compared, and where.
    mean, std: how the images were normalised, for `soft`; by default as the model wants them.

    Raises MapModelError for a model that cannot be read, ValueError for settings that are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        variant: Literal["clipped", "eigenvector", "mask", "soft"] = "clipped",
        tau: float = 0.2,
        eps: float = 1e-5,
        binary: bool = True,
        foreground: Foreground = "smaller",
        features: Kind = "keys",
        layer: int | str = -1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        check_settings(tau, eps, binary)
        check_foreground(foreground)
        known = ("clipped", "eigenvector", "mask", "soft")
        if variant not in known:
            raise ValueError(f"variant={variant!r} is not known; use one of {', '.join(known)}")
        self.model, self.features, self.layer = model, features, layer
        self.variant, self.mean, self.std = variant, mean, std
        self.settings: dict[str, Any] = {"tau": tau, "eps": eps, "binary": binary, "foreground": foreground}
        reader(model, features, layer, self._asks_attention)  # says now, not in the first step, if it cannot be read

    @property
    def _asks_attention(self) -> bool:
        return bool(self.settings["foreground"] == "attention")

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Discovered:
        """The object of each of the normalised images (B, 3, H, W); labels are not looked at."""
        seen = patches(self.model, images, self.features, self.layer, self._asks_attention)
        variant = "mask" if self.variant == "soft" else self.variant
        object = tokencut(seen.features, seen.grid, attention=seen.attention, variant=variant, **self.settings)
        object = _with_image(object, seen.logits, seen.grid, images)
        return self._refined(object, images) if self.variant == "soft" else object

    def _refined(self, object: Discovered, images: Tensor) -> Discovered:
        mean, std = self.mean, self.std
        if mean is None or std is None:
            config = image_config(self.model)
            mean, std = config.mean, config.std
        refined = refine(pixels_of(images.detach(), mean, std), object.mask)
        base = found(refined.soft.clamp(0, 1))
        return replace(object, map=base.map, blank=base.blank | object.degenerate, refined=refined.mask)


class MaskCut:
    """The source `maskcut`: up to `objects` objects; its map counts them all alike.

    tau, eps: of the graph.  features, layer: what of the model is compared, and where. Errors as TokenCut.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objects: int = 3,
        tau: float = 0.15,
        eps: float = 1e-5,
        features: Kind = "keys",
        layer: int | str = -1,
    ) -> None:
        check_settings(tau, eps)
        if objects < 1:
            raise ValueError(f"objects={objects}: look for one or more")
        self.model, self.features, self.layer = model, features, layer
        self.objects, self.tau, self.eps = objects, tau, eps
        reader(model, features, layer)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Objects:
        """The objects of each of the normalised images (B, 3, H, W); labels are not looked at."""
        seen = patches(self.model, images, self.features, self.layer)
        objects = maskcut(seen.features, seen.grid, objects=self.objects, tau=self.tau, eps=self.eps)
        return _with_image(objects, seen.logits, seen.grid, images)


class Lost:
    """The source `lost`. candidates: patches of lowest degree that are compared with the seed. Errors as TokenCut."""

    def __init__(
        self, model: nn.Module, *, candidates: int = 100, features: Kind = "keys", layer: int | str = -1
    ) -> None:
        if candidates < 1:
            raise ValueError(f"candidates={candidates}: one or more patches are compared with the seed")
        self.model, self.candidates, self.features, self.layer = model, candidates, features, layer
        reader(model, features, layer)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Discovered:
        """The object of each of the normalised images (B, 3, H, W); labels are not looked at."""
        seen = patches(self.model, images, self.features, self.layer)
        return _with_image(lost(seen.features, seen.grid, candidates=self.candidates), seen.logits, seen.grid, images)


class DinoMass:
    """The source `dino`: the class token's attention, and the largest piece of what holds the share `keep` of it.

    head: one head (LOST's baseline takes the fifth, 4, of ViT-S/16), None for the mean over heads.
    A model without class token: what the patches receive from each other.
    Raises MapModelError for a model that cannot be read, ValueError for a share or head that is not there.
    """

    def __init__(self, model: nn.Module, *, keep: float = 0.6, head: int | None = None, layer: int | str = -1) -> None:
        self.model, self.keep, self.head, self.layer = model, keep, head, layer
        self.kind: attended.Kind = "class" if _has_class(model, layer) else "received"
        attended.reader(model, self.kind, layer)
        mass_mask(next(model.parameters()).new_ones(1), keep)

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Discovered:
        """The object of each of the normalised images (B, 3, H, W); labels are not looked at."""
        with asking(self.model):
            with attended.reader(self.model, self.kind, self.layer) as seen:
                output = self.model(as_wanted(self.model, images))
            grid = one_grid(seen)
            attn = seen.class_attention() if self.kind == "class" else seen.patch_received()  # (B, H, N)
        if self.head is not None and not 0 <= self.head < attn.shape[1]:
            raise ValueError(f"head={self.head} is not there: use 0 to {attn.shape[1] - 1}, or None for all")
        attn = attn.mean(1) if self.head is None else attn[:, self.head]
        return _with_image(dino_mass(attn, grid, keep=self.keep), attended.logits_of(output), grid, images)


def _has_class(model: nn.Module, layer: int | str) -> bool:
    try:
        read(model, layers=layer, what="class_logits")
    except UnsupportedModelError:
        return False  # and the reader says why
    except ValueError:
        return False
    return True


def _with_image(result: Result, logits: Tensor | None, grid: tuple[int, int], images: Tensor) -> Result:
    """The result with what only the source knows: its model's logits, and the boxes in pixels."""
    boxes = in_pixels(result.boxes, grid, (images.shape[2], images.shape[3]))
    return replace(result, logits=None if logits is None else logits.detach().float(), pixel_boxes=boxes)
