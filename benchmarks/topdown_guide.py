"""Train a small top-down guide on digit scenes, so that the map `topdown` can be tried without a published checkpoint.

    python benchmarks/topdown_guide.py [--data scenes:...] [--epochs 20] [--out topdown.safetensors]

The bundled encoder with fresh feedback decoders, by AbSViT's loss (topdown_loss) on plain scenes: no
misleading backgrounds, ten times the demo's images, the demo's classes. The guide knows more than the model that it
will guide, as the published one does. Prints what each sigma makes of held-out scenes: the share of the map's mass on
the object for the image's own label and for another. Two minutes on one core. Use it by
`--map topdown --map-model topdown.safetensors`.
"""

from __future__ import annotations

import argparse

import torch

import foveal
from foveal import chance
from foveal.assets import demo_encoder
from foveal.data.batches import Batches
from foveal.data.config import image_config
from foveal.evaluate import energy_share
from foveal.maps import TopDown
from foveal.maps.topdown import topdown_loss
from foveal.train.optimise import shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="scenes:shortcut=0,train=1800,val=100,test=500,classes=5-9,size=32,stage=target"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="topdown.safetensors")
    options = parser.parse_args()
    data = foveal.data.load(options.data, seed=options.seed)
    guide = TopDown.fresh(demo_encoder(num_classes=len(data.classes), seed=options.seed), seed=options.seed)
    config = image_config(guide.model)
    print(f"foveal {foveal.__version__}, torch {torch.__version__}; {options.data}, {options.epochs} epochs")
    train(guide, Batches(data.train, config, 64, train=True, seed=options.seed, flip=False), options)
    guide.save(options.out)
    held = next(iter(Batches(data.tests["mixed_rand"], config, 500, train=False)))
    assert held.masks is not None
    with torch.no_grad():
        right = (guide.model.eval()(held.images).argmax(-1) == held.labels).float().mean()
    print(f"accuracy of the plain pass {100 * right:.1f} %; objects cover {100 * held.masks.float().mean():.1f} %")
    print(f"{'sigma':>8s}{'own label':>12s}{'another':>12s}{'blank':>8s}")
    for sigma in (0.0, 0.5, 1.0, 2.0, 40.0):
        look = TopDown.load(options.out, sigma=sigma, heads=guide.model.blocks[0].attn.num_heads)
        told = [look(held.images, (held.labels + shift) % len(data.classes)) for shift in (0, 1)]
        on = [energy_share(one.map[~one.blank], held.masks[~one.blank]).mean() for one in told]
        print(f"{sigma:8g}{100 * on[0]:10.1f} %{100 * on[1]:10.1f} %{100 * told[0].blank.float().mean():6.1f} %")


def train(guide: TopDown, batches: Batches, options: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(guide.parameters(), lr=options.lr, weight_decay=0.05)
    steps = options.epochs * len(batches)
    guide.model.train()
    for epoch in range(options.epochs):
        batches.set_epoch(epoch)
        for number, batch in enumerate(batches):
            step = epoch * len(batches) + number
            chance.reseed(options.seed, "step", epoch, number)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * shape(step, steps, steps // 20)
            loss = topdown_loss(guide, batch.images, batch.labels)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        terms = ", ".join(f"{name} {getattr(loss, name):.3f}" for name in ("first", "second", "reconstruction"))
        print(f"epoch {epoch + 1}: {terms}", flush=True)


if __name__ == "__main__":
    main()
