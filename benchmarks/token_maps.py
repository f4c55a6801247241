"""What TokenMixup did in trained runs: whom it mixes, what its saliency looks like, how alike tokens become.

    python benchmarks/token_maps.py COMPARISON [--images 500] [--figure FILE.png] [--pictures 5]

COMPARISON: the folder of a finished `foveal compare` with horizontal token mixing among its arms.
1 Whom: with the last epoch's model and ScoreNet, the share of easy images among mixed training images, by how much of
  the label is the heavier image's (1: not mixed).
2 Saliency: of the mixed block, by attention, by gradient (the paper's baseline, Co-Mixup's) and at random: rank
  correlation between them, entropy over that of an even map, share of the tokens in the top quarter of the mass.
  The figure shows their maps on the first test images.
3 Depth: mean cosine between the patch tokens of an image after each block (Choi et al., 2022: over-smoothing).
Means over images and over the seeds of an arm; intervals are 95 % over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import foveal
from foveal import stats
from foveal.attention.blocks import Blocks
from foveal.attention.edit import Visit, edit
from foveal.chance import generator
from foveal.data.batches import Batches
from foveal.explain import overlay, save_png, sheet
from foveal.explain.overlay import resize
from foveal.mix.saliency import attention_saliency, by_class, gradient_saliency, random_saliency
from foveal.train import Run
from foveal.train.fitting import load_data, mixer_of
from foveal.train.models import Built

BINS = ((0.5, 0.6), (0.6, 0.8), (0.8, 0.999), (0.999, 1.01))
SIDE = 128


def built_of(run: Run) -> Built:
    return Built(run.model(), run.card["architecture"], run.card["arguments"], run.config, "")


def shares(run: Run, taus: tuple[float, ...], images: int) -> dict[float, list[float]]:
    """Share of easy images per bin of label weight, for each tau."""
    data, built = load_data(run.settings), built_of(run)
    state = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    built.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    mixer = mixer_of(run.settings, built, data)
    score = mixer.learned(built.model, len(data.classes))
    score.load_state_dict({k.removeprefix("mixing."): v for k, v in state.items() if k.startswith("mixing.")})
    batches = Batches(data.train, built.image, 50, train=True, seed=1, flip=data.flip, crop_scale=(0.8, 1.0))
    weights, difficulties = [], []
    for batch in batches:
        rng = generator(1, "mix", 0, batch.micro)
        with torch.no_grad(), mixer.on(built.model.train(), batch.images, batch.labels, rng=rng) as step:
            built.model(step.images)
            (done,) = step.exchanges.values()
            under = step._under.mixed.targets(batch.labels, len(data.classes))  # labels as they enter the block
        assert done.difficulty is not None
        weights.append(under.max(1).values)
        difficulties.append(done.difficulty)
        if sum(len(w) for w in weights) >= images:
            break
    weight, difficulty = torch.cat(weights), torch.cat(difficulties)
    out = {}
    for tau in taus:
        easy = (difficulty <= tau).double()
        out[tau] = [float(easy[(weight >= low) & (weight < high)].mean()) for low, high in BINS]
    return out


def saliencies(run: Run, images: int) -> tuple[dict[str, Tensor], Tensor, tuple[int, int]]:
    """Maps (B, N) of test images by each way, the images, and the grid."""
    data, model, block = load_data(run.settings), run.model(), run.settings.token_mix_args.get("horizontal", 2)
    held = next(iter(data.tests.values()))
    chosen = torch.linspace(0, len(held) - 1, images).round().long()
    (batch,) = Batches(held.subset(chosen), run.config, images, train=False)
    visits: list[Visit] = []

    def look(visit: Visit) -> Tensor:
        visits.append(visit)
        return visit.tokens

    model.train()
    with torch.no_grad(), edit(Blocks(model), change={block: look}):
        model(batch.images)
    row = by_class(visits[0].layout, "auto")
    attention = attention_saliency(visits[0].peek(by_class=row))
    model.eval()
    drawn = random_saliency(images, attention.shape[1], generator(0, "mix", 0))
    gradient = gradient_saliency(model, batch.images, batch.labels)
    mean, std = (batch.images.new_tensor(v).view(3, 1, 1) for v in (run.config.mean, run.config.std))
    pixels = ((batch.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    grid = foveal.maps.cells(model, (pixels.shape[-2], pixels.shape[-1]))
    return {"gradient": gradient, "attention": attention, "random": drawn}, pixels, grid


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, mean over rows."""
    ranks = [x.argsort(1).argsort(1).double() for x in (a, b)]
    x, y = (r - r.mean(1, keepdim=True) for r in ranks)
    return float(((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean())


def entropy(x: Tensor) -> float:
    """Of each row over that of an even row: mean, 1 for even maps."""
    p = x.double() / x.double().sum(1, keepdim=True)
    return float((-(p * p.clamp_min(1e-30).log()).sum(1) / torch.tensor(float(x.shape[1])).log()).mean())


def above(x: Tensor, rho: float) -> float:
    """Share of tokens whose saliency is more than rho means above that of the same place in another image."""
    x = x / x.sum(1, keepdim=True) * x.shape[1]
    return float((x.roll(1, 0) - x > rho).double().mean())


def likeness(run: Run, images: int) -> list[float]:
    """Mean cosine between different patch tokens of an image, after each block."""
    data, model = load_data(run.settings), run.model()
    held = next(iter(data.tests.values()))
    total, count = None, 0
    for batch in Batches(held.subset(range(min(images, len(held)))), run.config, 100, train=False):
        with torch.no_grad(), foveal.read(model, layers="all", what="block_out") as seen:
            model(batch.images)
        layers = [layer for layer in seen.block_out() if layer is not None]
        cosines = []
        for x in layers:
            x = torch.nn.functional.normalize(x.double(), dim=-1)
            N = x.shape[1]
            cosines.append(((x.sum(1).square().sum(-1) - N) / (N * (N - 1))).sum())
        row = torch.stack(cosines)
        total, count = row if total is None else total + row, count + len(batch)
    assert total is not None
    return (total / count).tolist()


def told(values: list[float]) -> str:
    interval = stats.over_seeds(torch.tensor(values))
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--taus", type=float, nargs="+", default=[1.0, 2.0])
    options = parser.parse_args()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}"
    )
    finished = json.loads((options.comparison / "comparison.json").read_text())["runs"]
    runs = {arm: [Run.load(options.comparison / folder) for folder in folders] for arm, folders in finished.items()}

    print("\nshare of easy images by the label weight of the heavier image (after mixing of images, before tokens')")
    print("  " + " ".join(f"[{low:.1f}, {min(high, 1.0):.1f}{']' if high > 1 else ')'}" for low, high in BINS))
    taus = tuple(options.taus)
    for arm, group in runs.items():
        if group and group[0].settings.token_mix in ("horizontal", "both") and "gate" not in arm:
            rows = [shares(run, taus, options.images) for run in group]
            for tau in taus:
                means = torch.tensor([row[tau] for row in rows]).nanmean(0).tolist()
                print(f"  tau {tau:g}: {'  '.join(f'{m:.3f}' for m in means)}   {arm}")

    print("\nsaliency of the mixed block on test images")
    for arm, group in runs.items():
        if not group or group[0].settings.token_mix != "horizontal":
            continue
        found = defaultdict[str, list[float]](list)
        for run in group:
            maps, pixels, grid = saliencies(run, options.images)
            found["attention ~ gradient"].append(rank_correlation(maps["attention"], maps["gradient"]))
            found["random ~ gradient"].append(rank_correlation(maps["random"], maps["gradient"]))
            for name, x in maps.items():
                found[f"entropy, {name}"].append(entropy(x))
                found[f"above rho=1 mean, {name}"].append(above(x, 1.0))
            if options.figure is not None and run is group[0]:
                draw(options.figure, maps, pixels, grid, options.pictures)
                options.figure = None
        print(f"  {arm}")
        for name, values in found.items():
            print(f"    {name:32s} {told(values)}")

    print("\nmean cosine between patch tokens of an image after each block")
    for arm, group in runs.items():
        if group:
            rows = torch.tensor([likeness(run, options.images) for run in group])
            print(f"  {'  '.join(told(column.tolist()) for column in rows.T)}   {arm}")


def draw(path: Path, maps: dict[str, Tensor], pixels: Tensor, grid: tuple[int, int], count: int) -> None:
    """Image, and each way's map on it, a row per image."""
    rows: list[Any] = []
    for i in torch.linspace(0, len(pixels) - 1, count).round().long().tolist():
        rows.append(
            [
                resize(pixels[i], SIDE),
                *(overlay(pixels[i], x[i].unflatten(0, grid), side=SIDE, smooth=False) for x in maps.values()),
            ]
        )
    save_png(sheet(rows), path)


if __name__ == "__main__":
    main()
