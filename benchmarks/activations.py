"""What a trained model sees in mixed images: activation maps of both labels, and how much of each lies on each object.

    python benchmarks/activations.py RUN [--mixers cutmix tdattenmix ...] [--images 500] [--pairs 6] [--out FILE]

RUN: a finished run of a timm ViT on data with object masks, such as scenes. Test images are mixed in pairs, as in
training. The map of a label is that of HiResCAM (Draelos & Carin, 2020): the gradient of its logit times the patch
tokens that go into the last block's attention, summed over the width, above zero. (Grad-CAM averages the gradient over
places first and is blurred by that; the cosine of the last tokens with the classifier's row is no map of evidence in
small ViTs, which is measured elsewhere.) Its mass is shared out among the first image's visible object, the second's,
and the rest. A label whose evidence the model
finds has more of its mass on its own object than on the other's. Prints the mean shares with intervals over images
(bootstrap), and writes a page with the first pairs, the same for every mixer.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import foveal
from foveal import stats
from foveal.chance import generator
from foveal.data.batches import Batches
from foveal.explain import overlay, resize, save
from foveal.maps import on_grid
from foveal.mix import MIXERS
from foveal.mix.guided import MapMixer
from foveal.report.gather import test_images
from foveal.train import Run

NAMES = ("own label on own object", "own label on other", "other label on other object", "other label on own")
SIDE = 128  # pixels of a picture on the page


def activation(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    """HiResCAM of each image for its label: (B, h, w), zero or more."""
    held: list[Tensor] = []
    hook = model.blocks[-1].norm1.register_forward_hook(lambda module, args, output: held.append(output))
    try:
        logits = model(images.clone().requires_grad_())
    finally:
        hook.remove()
    (slope,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), held[0])
    evidence = (slope * held[0].detach())[:, model.num_prefix_tokens :].sum(-1).clamp_min(0)
    return evidence.unflatten(1, model.patch_embed.grid_size)


def mixed_with_objects(mixer: Any, model: Any, images: Tensor, labels: Tensor, masks: Tensor, rng: Any) -> Any:
    """The mixed batch, and where each image's own and its partner's object can be seen in it: (B, 2, H, W).

    The draw that mixes the images mixes their masks too, those of the batch's first and second half in channels of
    their own: as partners come from opposite halves, one channel is the own object and the other the partner's.
    """
    size = (images.shape[-2], images.shape[-1])
    first = torch.arange(len(images)) < len(images) // 2
    none = torch.zeros_like(masks)  # three channels, as images have
    shown = torch.stack([masks * first[:, None, None], masks * ~first[:, None, None], none], 1).float()
    if isinstance(mixer, MapMixer):
        draw = mixer.draw(len(images), size, mixer.grid(model, size), rng=rng)
        map = mixer.source(model)(images, labels, masks).map if mixer.follows(draw) else None
        mixed, objects = mixer.apply(images, draw, map), mixer.apply(shown, draw, map).images
    else:
        draw = mixer.draw(len(images), size, rng=rng)
        mixed, objects = mixer.apply(images, draw), mixer.apply(shown, draw).images
    return mixed, torch.where(first[:, None, None, None], objects[:, :2], objects[:, :2].flip(1)).clamp(0, 1)


def shares(map: Tensor, objects: Tensor) -> Tensor:
    """Share of a map's mass on each of two objects: (B, 2). map: (B, h, w).  objects: (B, 2, H, W) in [0, 1]."""
    grid = (map.shape[1], map.shape[2])
    on = torch.stack([on_grid(objects[:, k], grid) for k in (0, 1)], 1)
    return (map[:, None] * on).sum((2, 3)) / map.sum((1, 2))[:, None]


def looked(run: Run, model: Any, name: str, images: Any, pairs: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Shares (N, 4) in the order of NAMES, and what the page shows of the first pairs."""
    mixer = MIXERS[name](**({"switch_prob": 1.0} if name in ("tdattenmix", "smmix") else {}))
    found, pictures = [], []
    mean, std = (torch.tensor(v)[:, None, None] for v in (run.config.mean, run.config.std))
    for number, batch in enumerate(Batches(images, run.config, 50, train=False)):
        even = len(batch.labels) // 2 * 2
        inputs, labels, masks = batch.images[:even], batch.labels[:even], batch.masks[:even]
        mixed, objects = mixed_with_objects(mixer, model, inputs, labels, masks, generator(0, "mix", 0, number))
        others = labels[mixed.perm]
        maps = [activation(model, mixed.images, one) for one in (labels, others)]
        own, other = (shares(map, objects) for map in maps)
        rows = torch.stack([own[:, 0], own[:, 1], other[:, 1], other[:, 0]], 1)
        both = (objects.flatten(2).sum(2) > 0).all(1) & (labels != others)
        found.append(rows.masked_fill(~both[:, None], torch.nan))
        for i in both.nonzero()[:, 0].tolist():
            if len(pictures) == pairs or number:
                break
            pixels = ((mixed.images[i] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            pair = [
                (run.classes[int(c[i])], map[i], share[i])
                for c, map, share in ((labels, maps[0], own), (others, maps[1], other.flip(1)))
            ]
            pictures.append({"pixels": pixels, "maps": pair})
    return torch.cat(found).double().numpy(), pictures


def page(run: Run, told: dict[str, tuple[np.ndarray, list[dict[str, Any]]]]) -> str:
    rows = []
    for name, (values, pictures) in told.items():
        cells = "".join(f"<td>{interval(values[:, k])}</td>" for k in range(4))
        rows.append(
            f"<h2>{html.escape(name)}</h2><table><tr>{''.join(f'<th>{n}</th>' for n in NAMES)}</tr>"
            f"<tr>{cells}</tr></table><div class=pairs>"
        )
        for shown in pictures:
            figures = (
                f"<figure><img src='{picture(resize(shown['pixels'], SIDE))}'><figcaption>mixed</figcaption></figure>"
            )
            for label, map, share in shown["maps"]:
                drawn = overlay(shown["pixels"], map, side=SIDE)
                figures += (
                    f"<figure><img src='{picture(drawn)}'><figcaption>{html.escape(label)}: "
                    f"{100 * share[0]:.0f} % on its object, {100 * share[1]:.0f} % on the other"
                    "</figcaption></figure>"
                )
            rows.append(f"<div class=pair>{figures}</div>")
        rows.append("</div>")
    style = (
        "body{font:15px/1.5 system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem;color-scheme:light dark}"
        "img{width:100%;border-radius:4px}figure{margin:0;flex:1 1 0}figcaption{font-size:12px}"
        ".pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1.5rem;margin:1rem 0}"
        ".pair{display:flex;gap:.5rem}td,th{padding:.2rem 1rem .2rem 0;text-align:left;font-weight:normal}"
    )
    return (
        f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Activations"
        f"</title><style>{style}</style><h1>Activation maps of both labels on mixed images</h1><p>Model: "
        f"{html.escape(run.folder.name)} on {html.escape(str(run.split['data']))}. Share of the map's mass, mean "
        f"over pairs of different classes with both objects in sight, 95 % bootstrap interval over images. Pairs "
        f"are the first such of the test set.</p>{''.join(rows)}"
    )


def interval(values: np.ndarray) -> str:
    found = stats.over_images(values[np.isfinite(values)])
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def picture(pixels: np.ndarray) -> str:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument(
        "--mixers", nargs="+", default=[n for n in MIXERS if n not in ("none", "mixup", "mixup+cutmix")]
    )
    parser.add_argument("--test", help="test set; by default the last of the run")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--out", default="activations.html")
    options = parser.parse_args()
    run = Run.load(options.run)
    model, data = run.model(), test_images(run)
    if isinstance(data, str):
        raise SystemExit(data)
    name = options.test or list(run.results["sets"])[-1]
    images = data.tests[name]
    if images.masks is None:
        raise SystemExit(f"{name} has no object masks")
    images = images.subset(range(min(options.images, len(images))))
    print(f"foveal {foveal.__version__}, torch {torch.__version__}; {run.folder.name}, {len(images)} images of {name}")
    print(f"{'':14s}" + "".join(f"{n:>30s}" for n in NAMES) + f"{'pairs':>8s}")
    told = {}
    for mixer in options.mixers:
        told[mixer] = looked(run, model, mixer, images, options.pairs)
        values = told[mixer][0]
        print(f"{mixer:14s}" + "".join(f"{interval(values[:, k]):>30s}" for k in range(4)), end="")
        print(f"{int(np.isfinite(values[:, 0]).sum()):8d}")
    print(f"page {save(page(run, told).encode(), Path(options.out))}")


if __name__ == "__main__":
    main()
