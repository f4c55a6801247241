"""Train the encoder that comes with foveal: where is the digit, and how was it written? No class labels.

    loss = mean (W z_cls + mean drawing - drawing)^2 / variance        z_cls: class token;  drawing: 8x8 grey levels

A scene shows a handwritten digit somewhere, in some size and colours, on some photograph. The class token has
to give back the digit as it was written, so it must find it and look at its strokes; which digit it is, it is
never told. Scenes are of stage "source": neither their handwriting nor their parts of the photographs are ever
in the scenes of stage "target", which the demo uses.

    python recipes/demo_source.py [--out FOLDER] [--steps N]        # or: make demo-source

Writes model.safetensors and model.json into the package: 8 minutes of one core. On scenes of held-out digits and
backgrounds it should explain about 0.59 of the drawings' variance, put about 0.74 of the last block's class attention
on the digit (which covers 0.27 of the image), and name 0.86 of the ten digits by 10 nearest neighbours. The same
machine and number of threads give the same file; others give other last digits.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from foveal import chance
from foveal.attention import read
from foveal.data import scenes
from foveal.data.config import ImageConfig
from foveal.data.handwriting import handwritten
from foveal.data.images import Images
from foveal.evaluate.pointing import energy_share

PACKAGE = Path(__file__).parents[1] / "src" / "foveal" / "assets"
SEED = 0
SCENES = scenes.Scenes(train=36000, val=500, test=500, stage="source")  # some 50 scenes of each handwriting
KNOWN = 3000  # scenes that the k-NN figure of the card may compare with
STEPS, BATCH, LR, WEIGHT_DECAY, WARM_UP = 4000, 64, 2e-3, 0.05, 0.05
ARCHITECTURE = "vit_tiny_patch16_224"  # timm's name for the class; the arguments make it tinier
SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 0}


def main(out: Path, steps: int) -> None:
    began = time.perf_counter()
    print(f"making {SCENES.train} scenes ...", flush=True)
    data, plan = scenes.load(SCENES, seed=SEED), scenes.plan(SCENES, SEED)
    drawings = torch.from_numpy(handwritten()).flatten(1)  # (1797, 64)
    target = drawings[[scene.digits[0].digit for scene in plan["train"]]]
    held_out = drawings[[scene.digits[0].digit for scene in plan["mixed_rand"]]]
    image = config(data.train)
    arguments = SHAPE | {
        "pretrained_cfg_overlay": {
            "input_size": [3, *image.size],
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "crop_pct": image.crop_pct,
        }
    }
    with chance.seeded(SEED, "init"):
        model = timm.create_model(ARCHITECTURE, **arguments)
        drawer = nn.Linear(SHAPE["embed_dim"], drawings.shape[1])
    train(model, drawer, data.train, target, image, steps)

    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    model.load_state_dict(load_file(out / "model.safetensors"))  # judge what was saved
    results = judge(model, drawer, data, target, held_out, image)
    minutes, busy = (time.perf_counter() - began) / 60, time.process_time() / 60
    card = {
        "architecture": ARCHITECTURE,
        "arguments": arguments,
        "classes": [],
        "image": {
            "size": image.size,
            "mean": image.mean,
            "std": image.std,
            "interpolation": image.interpolation,
            "crop_pct": image.crop_pct,
            "crop_mode": image.crop_mode,
        },
        "init": "random weights",
        "training": {
            "recipe": "recipes/demo_source.py",
            "task": "give back the digit's 8x8 drawing from the class token; no class labels",
            "data": "scikit-learn's digits on photographs of scikit-image and scikit-learn, scenes of stage source",
            "scenes": SCENES.train,
            "handwritings": len({scene.digits[0].digit for scene in plan["train"]}),
            "steps": steps,
            "batch_size": BATCH,
            "lr": LR,
            "weight_decay": WEIGHT_DECAY,
            "seed": SEED,
        },
        "results": results,
        "storage": "float16",
        "sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("foveal", "torch", "timm", "numpy", "scikit-learn", "scikit-image")},
    }
    (out / "model.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(
        f"{json.dumps(results, indent=2)}\n{out / 'model.safetensors'}  ({minutes:.1f} minutes, {busy:.1f} of a core)"
    )


def train(model: nn.Module, drawer: nn.Module, images: Images, target: Tensor, image: ImageConfig, steps: int) -> None:
    """AdamW with warm-up and cosine on random batches; the drawings' mean is taken off, their variance is 1."""
    assert images.pixels is not None
    centre, spread = target.mean(0), target.var(0, correction=0).mean()
    parameters = [*model.parameters(), *drawer.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    began, recent = time.perf_counter(), 0.0
    for step in range(steps):
        index = torch.randint(len(images), (BATCH,), generator=chance.generator(SEED, "order", step))
        drawn = drawer(model(image.normalise(images.pixels[index])))
        loss = (drawn - (target[index] - centre)).square().mean() / spread
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        recent += loss.detach()
        if (step + 1) % 100 == 0:
            spent = time.perf_counter() - began
            print(f"step {step + 1:5d} of {steps}  unexplained {recent / 100:.3f}  {spent:.0f} s", flush=True)
            recent = 0.0


@torch.no_grad()
def judge(
    model: nn.Module, drawer: nn.Module, data: scenes.Data, target: Tensor, held_out: Tensor, image: ImageConfig
) -> dict[str, float]:
    """On held-out handwriting and backgrounds; labels are used here only, to say how good the features are."""
    model.eval()
    test = data.tests["mixed_rand"]
    known = data.train.subset(range(KNOWN))
    known_features, _ = look(model, known, image)
    features, attn = look(model, test, image)
    assert test.masks is not None
    drawn = drawer(features) + target.mean(0)
    around = (held_out - target.mean(0)).square().mean()
    neighbours = KNeighborsClassifier(10, weights="distance", metric="cosine")
    neighbours.fit(known_features.numpy(), known.labels.numpy())
    return {
        "drawing_explained": round(1 - float((drawn - held_out).square().mean() / around), 3),
        "knn_accuracy": round(float(neighbours.score(features.numpy(), test.labels.numpy())), 3),
        "attention_on_object": round(float(energy_share(attn, test.masks).mean()), 3),
        "object_area": round(float(test.masks.float().mean()), 3),
    }


def look(model: nn.Module, images: Images, image: ImageConfig) -> tuple[Tensor, Tensor]:
    """Class-token features (N, D) and class attention of the last block (N, h, w)."""
    assert images.pixels is not None
    features, maps = [], []
    for pixels in images.pixels.split(256):
        with read(model, layers=-1) as seen:
            features.append(model(image.normalise(pixels)))
        maps.append(seen.to_grid(seen.class_attention()))
    return torch.cat(features), torch.cat(maps)


def config(images: Images) -> ImageConfig:
    """Mean and deviation of the training scenes, three digits."""
    assert images.pixels is not None
    x = images.pixels.float().transpose(0, 1).flatten(1) / 255  # (3, N*S*S)
    red, green, blue = (round(float(m), 3) for m in x.mean(1))
    spread = [round(float(s), 3) for s in x.std(1)]
    return ImageConfig((SCENES.size, SCENES.size), (red, green, blue), (spread[0], spread[1], spread[2]))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Train the encoder that comes with foveal.")
    arguments.add_argument("--out", type=Path, default=PACKAGE, help="folder for model.safetensors and model.json")
    arguments.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    given = arguments.parse_args()
    main(given.out, given.steps)
