"""What TokenCut costs: ours over a straightforward one as published, on the same features.

    python benchmarks/discovery.py [--rounds 9] [--threads 1] [--clock cpu] [--device cuda] [--tokens 196 900]

As published: one image after the other, a dense float64 generalised eigenproblem in SciPy for the two smallest non-zero
eigenvalues, on the CPU. "solve" goes from the graph's weights to the eigenvector, "whole call" from the features to
mask and box; the backbone is in neither. Features are planted (one object, noise) or the bundled encoder's keys on
photographs. In every round, in one process and a shuffled order, ours runs on 32 images, a batch at a time, and the
published one on four of them; the ratio is that of a round, per image; median and quartiles over rounds are printed.
Masks are compared where the gap between eigenvalues is above 1e-3. To reach in the solve, batch of one: 10 at 196
tokens, 40 at 900.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import scipy.linalg
import torch
import torch.nn.functional as F
from clock import clock_of, processor, timed
from scipy import ndimage
from torch import Tensor

import foveal
from foveal import chance
from foveal.assets import demo_encoder
from foveal.data.config import image_config
from foveal.data.photographs import PHOTOGRAPHS, photograph
from foveal.maps.discover import graph, normalised_cut, tokencut
from foveal.maps.discover.patches import patches

SIDES = {196: 14, 784: 28, 900: 30, 1600: 40}
TAU, EPS = 0.2, 1e-5
IMAGES = 32


def published_graph(features: Tensor) -> Any:
    """Weights (N, N) float64 of features (N, D)."""
    x = F.normalize(features, dim=-1)
    return np.where((x @ x.T).cpu().numpy() > TAU, 1.0, EPS)


def published_solve(weights: Any) -> tuple[Any, Any]:
    degrees = np.diag(weights.sum(1))
    return scipy.linalg.eigh(degrees - weights, degrees, subset_by_index=[1, 2])


def published_call(features: Tensor, grid: tuple[int, int]) -> tuple[Any, float]:
    """Mask (h, w) of features (N, D), and the gap."""
    values, vectors = published_solve(published_graph(features))
    y = vectors[:, 0]
    side, seed = y > y.mean(), int(np.argmax(np.abs(y)))
    side = side if side[seed] else ~side
    labels, _ = ndimage.label(side.reshape(grid))
    mask = labels == labels[np.unravel_index(seed, grid)]
    rows, columns = np.nonzero(mask)
    assert rows.min() <= rows.max()
    assert columns.min() <= columns.max()  # the box
    return mask, float(values[1] - values[0])


def planted(batch: int, side: int) -> Tensor:
    """One object on a background: (B, N, 384)."""
    g = chance.generator(0, "bench", side)
    labels = torch.zeros(batch, side, side, dtype=torch.long)
    for b in range(batch):
        height, width = (int(torch.randint(side // 5, side // 2 + 1, (), generator=g)) for _ in range(2))
        top, left = (int(torch.randint(0, side - span + 1, (), generator=g)) for span in (height, width))
        labels[b, top : top + height, left : left + width] = 1
    centres = torch.randn(batch, 2, 384, generator=g)
    x = centres.gather(1, labels.flatten(1)[..., None].expand(-1, -1, 384))
    return x + 1.8 * torch.randn(x.shape, generator=g)


def photographed(batch: int, side: int) -> Tensor:
    """The bundled encoder's keys on parts of photographs: (B, N, 64)."""
    model = demo_encoder().eval()
    model.set_input_size(img_size=(4 * side, 4 * side))
    config = image_config(demo_encoder())
    g = chance.generator(0, "bench", side)
    crops = []
    for b in range(batch):
        whole = torch.from_numpy(photograph(PHOTOGRAPHS[b % len(PHOTOGRAPHS)]).copy()).permute(2, 0, 1)
        edge = int(min(whole.shape[1:]) * (0.4 + 0.6 * float(torch.rand((), generator=g))))
        top, left = (int(torch.randint(0, n - edge + 1, (), generator=g)) for n in whole.shape[1:])
        crop = whole[None, :, top : top + edge, left : left + edge].float()
        crops.append(F.interpolate(crop, (4 * side, 4 * side), mode="bicubic", antialias=True).clamp(0, 255))
    images = config.normalise(torch.cat(crops).round().to(torch.uint8))
    return torch.cat([patches(model, part, "keys", -1).features for part in images.split(4)])


def compare(name: str, features: Tensor, batch: int, options: argparse.Namespace, clock: Callable[[], float]) -> None:
    """All images, `batch` at a time; the published way on the first four."""
    B, N, _ = features.shape
    grid = (SIDES[N], SIDES[N])
    parts = features.split(batch)
    graphs, dense = [graph(part, TAU, EPS) for part in parts], [published_graph(one) for one in features[:4]]
    stages: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "solve": (lambda: [published_solve(one) for one in dense], lambda: [normalised_cut(one) for one in graphs]),
        "whole call": (
            lambda: [published_call(one, grid) for one in features[:4]],
            lambda: [tokencut(part, grid, tau=TAU, eps=EPS) for part in parts],
        ),
    }
    for stage, (theirs, ours) in stages.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        order = [False, True]
        theirs(), ours()  # warm-up
        for number in range(max(3, options.rounds * 196 // N)):
            random.Random(number).shuffle(order)
            for mine in order:
                run = ours if mine else theirs
                taken = timed(lambda _, run=run: run(), number, features.device, clock)
                times[mine].append(taken / (B if mine else len(dense)))
        ratios = [t / o for t, o in zip(times[False], times[True], strict=True)]
        low, mid, high = statistics.quantiles(ratios, n=4)
        ms = [statistics.median(times[mine]) * 1e3 for mine in (False, True)]
        print(
            f"  {name:12s} {N:5d} tokens, batch {batch:2d}  {stage:10s} {ms[0]:8.2f} ms  {ms[1]:7.3f} ms"
            f"   x {mid:6.1f} [{low:.1f}, {high:.1f}]"
        )


def agreement(name: str, features: Tensor, side: int) -> None:
    """The smallest IoU of ours and the published masks."""
    found = tokencut(features, (side, side), tau=TAU, eps=EPS)
    overlaps, unclear = [], 0
    for mine, one in zip(found.mask.cpu().numpy(), features, strict=True):
        mask, gap = published_call(one, (side, side))
        if gap > 1e-3:
            overlaps.append((mine & mask).sum() / (mine | mask).sum())
        else:
            unclear += 1
    least = f"smallest IoU of {len(overlaps)} masks {min(overlaps):.4f}; {unclear} without a gap"
    print(f"  {name:14s} {side * side:5d} tokens: {least}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="at 196 tokens; fewer where there are more")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = clock_of(options.clock)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {options.threads} threads"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, scipy {scipy.__version__}")
    print(f"foveal {foveal.__version__}, {where}, {options.clock} clock; as published, ours, per image")
    with torch.inference_mode():
        for tokens in options.tokens:
            side = SIDES[tokens]
            for name, make in {"planted": planted, "photographs": photographed}.items():
                features = make(IMAGES, side).to(device)
                for batch in options.batch:
                    compare(name, features, batch, options, clock)
                agreement(name, features[:8], side)


if __name__ == "__main__":
    main()
