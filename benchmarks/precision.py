"""Where bfloat16 autocast pays on this machine's CPU: forward and whole training step, over float32.

    python benchmarks/precision.py [--threads 1] [--repeats 7]

Both kinds of step take turns, so that what else runs on the machine slows both alike; the ratio is of medians of
process time. `foveal.train.precision` chooses by these numbers.
"""

import argparse
import platform
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn

from foveal.train.precision import has_bfloat16_units

MODELS = (  # width, depth, heads, image, patch, batch
    (64, 4, 2, 32, 4, 32),
    (128, 4, 4, 32, 4, 32),
    (192, 4, 3, 32, 4, 32),
    (192, 4, 3, 224, 16, 8),
    (384, 4, 6, 224, 16, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    units = "with" if has_bfloat16_units() else "without"
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()} {units} bfloat16 units,", end=" ")
    print(f"{asked.threads} threads, median of {asked.repeats}; bfloat16 time / float32 time")
    print(f"{'width':>5} {'depth':>5} {'image':>5} {'patch':>5} {'batch':>5} {'forward':>8} {'training step':>14}")
    for width, depth, heads, image, patch, batch in MODELS:
        shape = {"embed_dim": width, "depth": depth, "num_heads": heads, "img_size": image, "patch_size": patch}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
        forward, step = ratio(model, image, batch, asked.repeats)
        print(f"{width:5} {depth:5} {image:5} {patch:5} {batch:5} {forward:8.2f} {step:14.2f}", flush=True)


def ratio(model: nn.Module, image: int, batch: int, repeats: int) -> tuple[float, float]:
    """Time in bfloat16 over time in float32: of a forward without gradient, and of forward and backward."""
    images, labels = torch.randn(batch, 3, image, image), torch.arange(batch) % 10
    times: dict[tuple[bool, bool], list[float]] = {}
    for turn in range(repeats + 1):  # the first one warms up
        for autocast in (False, True):
            for train in (False, True):
                spent = one(model, images, labels, autocast, train)
                if turn:
                    times.setdefault((autocast, train), []).append(spent)
    median = {key: statistics.median(values) for key, values in times.items()}
    return median[True, False] / median[False, False], median[True, True] / median[False, True]


def one(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: bool, train: bool) -> float:
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(train):
        loss = F.cross_entropy(model(images).float(), labels)
    if train:
        loss.backward()
        model.zero_grad(set_to_none=True)
    return time.process_time() - began


if __name__ == "__main__":
    main()
