"""How well objects are found without labels, with the features that can be had here, beside what needs none.

    python benchmarks/discovery_quality.py [--sod sod.npz] [--boxes FOLDER/val.npz] [--run FOLDER] [--images 240 500]

Two kinds of truth: masks of salient objects (SOD: photographs of one shape or turned, whole) and one box for each image
(Tiny-ImageNet). Features, all on a grid whose shorter side has --tokens patches: keys of the last block of the bundled
encoder (trained without labels on digits over ten photographs, 32 px), of the same encoder before any training, of
--run's encoder, and `colour`: mean and deviation of L, a, b in each patch and its place, each brought to mean 0 and
deviation 1 within the image; no network. Settings are those of the library; none was chosen by these figures.

max F: (1 + .3) P R / (.3 P + R) of the mean precision P and mean recall R over images at 256 thresholds of the map,
which is brought to [0, 1] for each image; the best threshold (Achanta et al., 2009).  IoU, accuracy: of the mask, over
pixels, mean over images; the source's own mask, or the map above its mean where it has none.  CorLoc: share of images
where the box has an IoU of a half or more with the true one; the box of the mask, of its largest piece where it has
several, of MaskCut's first object. Intervals: bootstrap over images; for max F the threshold is chosen anew in each.

Baselines: a box in the middle with half of the area; the mean of all true boxes (which looks at the truth); a Gaussian
in the middle, sigma a quarter of each side; the two saliency maps that need no model.
TokenCut: `smaller` side as published or by the `corners`; `clipped`: eigenvector above its mean; `mask`; `soft`: the
mask refined by the bilateral solver on the pixels. `inverted`: how often three corners were on the side as published.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import skimage.color
import timm
import torch
import torch.nn.functional as F
from clock import processor
from torch import Tensor, nn

import foveal
from foveal import chance, maps
from foveal.assets import demo_card, demo_encoder
from foveal.data import image_config
from foveal.data.config import ImageConfig
from foveal.data.decode import Packed, decode_tensor
from foveal.data.packs import read_pack
from foveal.maps import on_grid
from foveal.maps.centre_surround import centre_surround
from foveal.maps.discover import boxes_of, largest_component, lost, maskcut, refine, tokencut
from foveal.maps.discover.maskcut import iou
from foveal.maps.discover.patches import patches
from foveal.maps.spectral import spectral_residual
from foveal.stats import Interval, over_images, paired_over_images
from foveal.train.run import Run

BATCH = 10
BETA2 = 0.3
LEVELS = 256
RESAMPLES = 1000
MIDDLE = "centre Gaussian"


@dataclass(frozen=True)
class Answer:
    """What a source says of a batch, in pixels of the images."""

    map: Tensor  # (B, H, W) float, any scale
    mask: Tensor  # (B, H, W) bool
    piece: Tensor  # (B, H, W) bool: what the box is drawn around


@dataclass(frozen=True)
class Part:
    """Images of one size, with the objects."""

    pixels: Tensor  # (n, 3, H, W) uint8
    truth: Tensor  # (n, H, W) bool


@dataclass(frozen=True)
class Scores:
    """One number, or one curve, per image."""

    precision: Tensor  # (N, LEVELS)
    recall: Tensor  # (N, LEVELS)
    iou: Tensor  # (N,)
    accuracy: Tensor  # (N,)
    box: Tensor  # (N,) IoU of boxes


# -- images


def photographs(path: Path, most: int) -> list[Part]:
    """The pack's images and masks, whole: a part for each size. Evenly spaced ones where there are more than `most`."""
    with np.load(path) as members:
        arrays = {name: members[name] for name in members.files}
    chosen = evenly(len(arrays["image_offset"]) - 1, most)
    groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for i in chosen.tolist():
        image, mask = (file(arrays, field, i) for field in ("image", "mask"))
        groups.setdefault((image.shape[1], image.shape[2]), []).append((image, mask[0] > 127))
    return [Part(*(torch.stack(column) for column in zip(*group, strict=True))) for group in groups.values()]


def file(arrays: dict[str, Any], field: str, i: int) -> Tensor:
    first, last = arrays[f"{field}_offset"][i : i + 2]
    return decode_tensor(Packed(f"{field} {i}", arrays[f"{field}_blob"][first:last].tobytes()))


def boxed(path: Path, most: int) -> list[Part]:
    images = read_pack(path)
    images = images.subset(evenly(len(images), most))
    assert images.pixels is not None, f"{path} has images of several sizes"
    assert images.masks is not None, f"{path} has neither boxes nor masks"
    return [Part(images.pixels, images.masks)]


def evenly(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(most, count)).round().long()


# -- answers


def at_size(values: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(B, h, w) float or bool to (B, H, W)."""
    resized = F.interpolate(values[:, None].float(), size, mode=mode)[:, 0]
    return resized > 0.5 if values.dtype == torch.bool else resized


def answer(map: Tensor, size: tuple[int, int], mask: Tensor | None = None, piece: Tensor | None = None) -> Answer:
    """In pixels: maps bilinear, masks nearest. No mask: the map above its mean, and the box of its largest piece."""
    soft = at_size(map, size, "bilinear")
    if mask is None:
        whole = soft > soft.mean((1, 2), keepdim=True)
        return Answer(soft, whole, largest_component(whole))
    whole = at_size(mask, size, "nearest")
    return Answer(soft, whole, whole if piece is None else at_size(piece, size, "nearest"))


def discoveries(features: Tensor, grid: tuple[int, int], pixels: Tensor) -> tuple[dict[str, Answer], Tensor, Tensor]:
    """TokenCut, MaskCut and LOST; TokenCut's `inverted` (B,) and `degenerate` (B,). features: (B, N, D)."""
    size = (pixels.shape[2], pixels.shape[3])
    answers = {}
    for rule in ("smaller", "corners"):
        found = tokencut(features, grid, foreground=rule)
        fine = refine(pixels, found.mask)
        hard = at_size(found.mask, size, "nearest")
        answers[f"tokencut, {rule}, clipped"] = answer(found.map, size, found.mask)
        answers[f"tokencut, {rule}, mask"] = Answer(hard.float(), hard, hard)
        answers[f"tokencut, {rule}, soft"] = Answer(fine.soft, fine.mask, fine.mask)
    objects = maskcut(features, grid)
    union = at_size(objects.mask, size, "nearest")
    answers["maskcut, union"] = Answer(union.float(), union, at_size(objects.masks[:, 0], size, "nearest"))
    one = lost(features, grid)
    answers["lost"] = answer(one.map, size, one.mask)
    return answers, found.inverted, found.degenerate


def attended(model: nn.Module, images: Tensor, size: tuple[int, int]) -> dict[str, Answer]:
    """The last block's class attention (what patches receive, without a class token), and DINO's mass mask of it."""
    found = maps.make("dino", model)(images)
    assert isinstance(found, maps.Discovered)
    return {"dino mass": answer(found.map, size, found.mask), "class_attention": answer(found.map, size)}


def baselines(pixels: Tensor, mean_box: Tensor) -> dict[str, Answer]:
    """mean_box: (4,) top, left, bottom, right as shares of the sides."""
    B, _, H, W = pixels.shape
    y, x = (torch.arange(n).add(0.5).div(n) for n in (H, W))
    gauss = torch.exp(-8 * ((y[:, None] - 0.5) ** 2 + (x - 0.5) ** 2)).expand(B, H, W)
    half = 0.5**0.5 / 2
    boxes = {"centre box": torch.tensor([0.5 - half] * 2 + [0.5 + half] * 2), "mean box of the truth": mean_box}
    answers = {}
    for name, (top, left, bottom, right) in boxes.items():
        mask = (((y >= top) & (y < bottom))[:, None] & (x >= left) & (x < right)).expand(B, H, W)
        answers[name] = Answer(mask.float(), mask, mask)
    answers[MIDDLE] = answer(gauss, (H, W))
    answers["centre_surround"] = answer(centre_surround(pixels).float(), (H, W))
    answers["spectral_residual"] = answer(spectral_residual(pixels), (H, W))
    return answers


# -- features


def colour(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean and deviation of L, a, b and the place of each patch, standardised over the image: (B, N, 8)."""
    B = len(pixels)
    lab = torch.from_numpy(skimage.color.rgb2lab(pixels.permute(0, 2, 3, 1).numpy())).float().permute(0, 3, 1, 2)
    mean, square = (on_grid(v.flatten(0, 1), grid).view(B, 3, -1) for v in (lab, lab.square()))
    place = torch.cartesian_prod(*(torch.arange(n).float() for n in grid)).T.expand(B, -1, -1)
    x = torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt(), place], 1)
    x = (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True).clamp_min(1e-6)
    return x.mT


def untrained() -> nn.Module:
    card = demo_card()
    with chance.seeded(0, "init"):
        model: nn.Module = timm.create_model(card["architecture"], **{**card["arguments"], "num_classes": 0})
    return model


def encoders(run: Path | None) -> dict[str, tuple[nn.Module, ImageConfig]]:
    demo = demo_encoder()
    known = {"bundled encoder": demo, "the same, untrained": untrained()}
    found = {name: (model.eval(), image_config(demo)) for name, model in known.items()}
    if run is not None:
        trained = Run.load(run)
        found[f"run {run.name}"] = (trained.model(), trained.config)
    return found


def resized(model: Any, grid: tuple[int, int]) -> tuple[int, int]:
    """The model takes images that fill the grid from now on; their size."""
    patch = model.patch_embed.patch_size
    size = (grid[0] * patch[0], grid[1] * patch[1])
    model.set_input_size(img_size=size)
    return size


# -- scores


def scored(found: Answer, truth: Tensor) -> Scores:
    """truth: (B, H, W) bool."""
    curves = [precision_recall(map, one) for map, one in zip(found.map, truth, strict=True)]
    precision, recall = (torch.stack(column) for column in zip(*curves, strict=True))
    right = (found.mask == truth).double().mean((1, 2))
    return Scores(precision, recall, iou(found.mask, truth).double(), right, box_iou(found.piece, truth))


def precision_recall(map: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Of {map >= level}, for LEVELS levels from the map's least to its most. map, truth: (H, W)."""
    unit = (map - map.min()).double() / (map.max() - map.min()).clamp_min(1e-30)
    level = (unit * (LEVELS - 1)).long().flatten()
    inside = torch.bincount(level[truth.flatten()], minlength=LEVELS).flip(0).cumsum(0).flip(0).double()
    chosen = torch.bincount(level, minlength=LEVELS).flip(0).cumsum(0).flip(0).double()
    return inside / chosen.clamp_min(1), inside / truth.sum()


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of the boxes around masks (B, H, W): (B,)."""
    p, q = boxes_of(a).double(), boxes_of(b).double()
    low, high = torch.maximum(p[:, :2], q[:, :2]), torch.minimum(p[:, 2:], q[:, 2:])
    both = (high - low).clamp_min(0).prod(1)
    return both / ((p[:, 2:] - p[:, :2]).prod(1) + (q[:, 2:] - q[:, :2]).prod(1) - both).clamp_min(1)


def max_f(precision: Tensor, recall: Tensor) -> Tensor:
    """(..., LEVELS) means over images to (...)."""
    f = (1 + BETA2) * precision * recall / (BETA2 * precision + recall).clamp_min(1e-12)
    return f.amax(-1)


def max_f_interval(scores: Scores) -> Interval:
    N = len(scores.iou)
    draws = torch.randint(N, (RESAMPLES, N), generator=chance.generator(0, "bootstrap", N))
    share = torch.zeros(RESAMPLES, N, dtype=torch.float64)
    share.scatter_add_(1, draws, torch.full(draws.shape, 1 / N, dtype=torch.float64))
    drawn = max_f(share @ scores.precision, share @ scores.recall)
    low, high = (float(drawn.quantile(q)) for q in (0.025, 0.975))
    mean = float(max_f(scores.precision.mean(0), scores.recall.mean(0)))
    return Interval(mean, low, high, 0.95, f"{N} images, the threshold chosen anew")


def joined(parts: list[Scores]) -> Scores:
    return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in Scores.__annotations__))


# -- the tables


def measured(parts: list[Part], options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Scores], str]]:
    """Features, their scores by source, and what TokenCut says of itself."""
    edges = [boxes_of(p.truth) / torch.tensor(p.truth.shape[1:]).repeat(2) for p in parts]
    mean_box = torch.cat(edges).mean(0)
    rows: dict[str, list[Scores]] = {}
    for pixels, truth in batches(parts):
        for name, found in baselines(pixels, mean_box).items():
            rows.setdefault(name, []).append(scored(found, truth))
    yield "no features", {name: joined(found) for name, found in rows.items()}, ""
    for kind, known in {**encoders(options.run), "colour and place": None}.items():
        began = time.perf_counter()
        rows, flags = {}, []
        for pixels, truth in batches(parts):
            grid = grid_of(pixels, options.tokens)
            answers: dict[str, Answer] = {}
            if known is None:
                features = colour(pixels, grid)
            else:
                model, config = known
                inputs = F.interpolate(pixels.float(), resized(model, grid), mode="bicubic", antialias=True)
                images = config.normalise(inputs.clamp(0, 255))
                features = patches(model, images, "keys", -1).features
                answers = attended(model, images, (pixels.shape[2], pixels.shape[3]))
            more, inverted, degenerate = discoveries(features, grid, pixels)
            for name, found in {**more, **answers}.items():
                rows.setdefault(name, []).append(scored(found, truth))
            flags.append(torch.stack([inverted, degenerate], 1))
        scores = {name: joined(found) for name, found in rows.items()}
        yield kind, scores, told(torch.cat(flags), scores)
        print(f"{kind} took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def grid_of(pixels: Tensor, tokens: int) -> tuple[int, int]:
    H, W = pixels.shape[2:]
    return (round(tokens * H / min(H, W)), round(tokens * W / min(H, W)))


def told(flags: Tensor, scores: dict[str, Scores]) -> str:
    inverted, degenerate = flags.T
    kept, turned = (scores[f"tokencut, {rule}, mask"].iou[inverted] for rule in ("smaller", "corners"))
    text = (
        f"TokenCut: {float(inverted.double().mean()):.3f} inverted, {float(degenerate.double().mean()):.3f} degenerate"
    )
    if not len(kept):
        return text
    return f"{text}; IoU of those inverted {float(kept.mean()):.3f} as published, {float(turned.mean()):.3f} by corners"


def batches(parts: list[Part]) -> Iterator[tuple[Tensor, Tensor]]:
    for part in parts:
        yield from zip(part.pixels.split(BATCH), part.truth.split(BATCH), strict=True)


def table(parts: list[Part], options: argparse.Namespace, boxes: bool) -> None:
    head = ["CorLoc, %", "minus centre Gaussian's", "mean IoU of boxes"]
    if not boxes:
        head = ["max F", "IoU", "minus centre Gaussian's", "accuracy", "CorLoc, %"]
    print(f"\n| features | source | {' | '.join(head)} |\n|{'---|' * (len(head) + 2)}")
    middle: Scores | None = None
    notes = []
    for kind, rows, said in measured(parts, options):
        middle = rows.get(MIDDLE, middle)
        assert middle is not None
        for name, one in rows.items():
            if boxes and name.endswith("clipped"):
                continue  # the mask's box
            hit, its = ((each.box >= 0.5).double() * 100 for each in (one, middle))
            corloc = shown(over_images(hit), "{:.1f}")
            if boxes:
                cells = [corloc, minus(hit, its, "{:+.1f}"), shown(over_images(one.box))]
            else:
                cells = [shown(max_f_interval(one)), shown(over_images(one.iou)), minus(one.iou, middle.iou)]
                cells += [shown(over_images(one.accuracy)), corloc]
            print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)
        notes += [f"{kind}: {said}."] if said else []
    print("\n" + "\n".join(notes), flush=True)


def minus(a: Tensor, b: Tensor, each: str = "{:+.3f}") -> str:
    return "" if torch.equal(a, b) else shown(paired_over_images(a, b), each)


def shown(found: Interval, each: str = "{:.3f}") -> str:
    mean, low, high = (each.format(value) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]" if found.available else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sod", type=Path, help="a pack of images with masks, of any sizes")
    parser.add_argument("--boxes", type=Path, help="a pack of images of one size with a box each")
    parser.add_argument("--run", type=Path, help="a run folder: its encoder's features too")
    parser.add_argument("--images", type=int, nargs=2, default=[240, 500], help="at most so many of each")
    parser.add_argument("--tokens", type=int, default=24, help="patches along the shorter side")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, ", end="")
    print(f"scikit-image {skimage.__version__}, foveal {foveal.__version__}; {processor()}, ", end="")
    print(f"{torch.get_num_threads()} threads; {options.tokens} patches along the shorter side, {BATCH} to a batch")
    sets = {"masks": (options.sod, photographs), "boxes": (options.boxes, boxed)}
    for (name, (path, read)), most in zip(sets.items(), options.images, strict=True):
        if path is not None:
            parts = read(path, most)
            share = float(torch.cat([part.truth.double().mean((1, 2)) for part in parts]).mean())
            sizes = ", ".join(f"{len(p.truth)} of {p.pixels.shape[3]} x {p.pixels.shape[2]}" for p in parts)
            print(f"\n## {name}: {path.name}\n\n{sizes} pixels; objects cover {share:.3f} of an image on average.")
            with torch.inference_mode():
                table(parts, options, boxes=name == "boxes")


if __name__ == "__main__":
    main()
