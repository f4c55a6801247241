"""Does guidance help masked pre-training? Small encoders on scenes with a misleading background, every source of maps.

    python benchmarks/guided_pretraining.py OUT [--arms plain given ...] [--seeds 3] [--epochs 40] [--train 2000]
                                            [--digits 1] [--fine-tune 1.0 0.1] [--threads 1]
                                            [--data SPEC --size 64 --also SPEC]

Pre-trains the demo's architecture (width 64, depth 4, patch 4, 32 px) from random weights on scenes whose background
names the class in half of the images (and is any of them in the others), without labels, then asks its frozen features:
weighted k-NN (k chosen on validation scenes) and logistic regression, on scenes with the background of their class
(same) and with any (rand); the labelled images are those of the pre-training (misled) or as many with any background
(clean).
The control is the plain run of the same seed: same first weights, crops and hidden patches. --fine-tune also trains on
these shares of the labels. Finished parts are kept in OUT, and called again it goes on.

Arms: plain; given (the true masks: an upper bound), given-TAU; mask (patches hidden by the true masks instead of at
random, same budget); tokencut, maskcut, lost (keys of the plain run of the same seed), tokencut-demo and attention
(keys, and class attention, of the bundled encoder, trained on other digits without labels), grad_cam (of an encoder
trained on the scenes' labels), centre (a Gaussian), iou-75, iou-50, iou-25 (true masks of which a part is moved into
the background, so that intersection over union with the truth is this).

Beside accuracies stands how good the maps are: AUC of the map's cells against the true mask's (0.5: chance), and the
mean weight of object and background patches. Intervals are 95 %, over seeds (Student's t) of the difference to plain.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import foveal
from foveal import maps, stats
from foveal.chance import generator
from foveal.data import Data, Images, load
from foveal.data.batches import Batches
from foveal.evaluate import energy_share, features, knn, logistic_probe
from foveal.maps import Found, MapStore, make_store
from foveal.maps.store import describe
from foveal.pretrain import object_weights
from foveal.train import PretrainSettings, Run, Settings, fit, pretrain
from foveal.train.files import write_text
from foveal.train.pretrain_maps import store_of

K = (1, 5, 10, 20, 50)
SIDE = 30


class Centre:
    """A Gaussian in the middle, its deviation a quarter of the side: where photographers put things."""

    model = None

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        at = (torch.arange(SIDE) - (SIDE - 1) / 2) / (SIDE / 4)
        line = (-0.5 * at**2).exp()
        return maps.found((line[:, None] * line).expand(len(images), SIDE, SIDE))


def degraded(masks: Tensor, overlap: float, seed: int) -> Tensor:
    """Masks (N, H, W) whose intersection over union with the true ones is `overlap`, of the same area.

    The part of the object furthest in a random direction is dropped, and as many background pixels nearest to a random
    place are put in: with a share f kept, intersection over union is f / (2 - f).
    """
    _, H, W = masks.shape
    kept = 2 * overlap / (1 + overlap)
    y, x = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")
    out = torch.zeros_like(masks)
    for i, mask in enumerate(masks):
        u = torch.rand(3, generator=generator(seed, "degraded", i))
        along = (x * (u[0] * 6.2832).cos() + y * (u[0] * 6.2832).sin()).masked_fill(~mask, float("inf"))
        away = ((x - u[1] * W) ** 2 + (y - u[2] * H) ** 2).masked_fill(mask, float("inf"))
        area = int(mask.sum())
        stay = round(kept * area)
        out[i].view(-1)[along.flatten().argsort()[:stay]] = True
        out[i].view(-1)[away.flatten().argsort()[: min(area - stay, H * W - area)]] = True
    return out


def quality(store: MapStore, images: Images, temperature: float) -> dict[str, float]:
    """AUC of each map's cells against the mask's, and mean weights on and off the object; means over images."""
    assert images.masks is not None
    index = torch.arange(len(images))
    grid = (8, 8)
    cells, _ = store.sample(index, None, None, grid)
    truth = maps.on_grid(images.masks.float(), grid).flatten(1)
    on, off = truth >= 0.5, truth <= 0.05
    flat, weights = cells.flatten(1), object_weights(cells, temperature)
    areas, inside, outside = [], [], []
    for values, weight, one, other in zip(flat, weights, on, off, strict=True):
        if one.any() and other.any():
            above = (values[one][:, None] > values[other]).float() + 0.5 * (values[one][:, None] == values[other])
            areas.append(above.mean())
            inside.append(weight[one].mean())
            outside.append(weight[other].mean())
    return {
        "auc": float(torch.stack(areas).mean()),
        "object": float(torch.stack(inside).mean()),
        "background": float(torch.stack(outside).mean()),
    }


class Study:
    """All runs of one data set below a folder."""

    def __init__(self, out: Path, data: str, epochs: int, size: int = 32, also: str = "") -> None:
        self.out, self.spec, self.epochs, self.size = out, data, epochs, size
        self.data: Data = load(data, image_size=size)
        self.asked: dict[str, tuple[Data, list[str]]] = {"": (self.data, list(self.data.tests))}
        if "shortcut=0.5" in data:
            clean = load(data.replace("shortcut=0.5", "shortcut=0"), image_size=size)
            self.asked = {"misled/": (self.data, list(self.data.tests)), "clean/": (clean, ["mixed_rand"])}
        if also:
            other = load(also, image_size=size)
            self.asked[f"{Path(also).name}/"] = (other, list(other.tests))

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the demo's architecture, for 8 x 8 patches on images of another size."""
        return {} if self.size == 32 else {"patch_size": self.size // 8}

    def settings(self, arm: str, seed: int) -> PretrainSettings:
        common: dict[str, Any] = {
            "data": self.spec,
            "model": "demo",
            "model_args": self.arguments,
            "image_size": self.size,
            "init": "none",
            "decoder_width": 48,
            "decoder_depth": 1,
            "decoder_heads": 3,
            "epochs": self.epochs,
            "batch_size": 100,
            "base_lr": 3e-3,
            "device": "cpu",
            "precision": "float32",
            "workers": 0,
            "seed": seed,
            "out": str(self.out),
            "name": f"{arm}-seed{seed}",
        }
        kind, _, detail = arm.partition("-")
        plain = str(self.out / f"plain-seed{seed}")
        if kind == "given":
            common |= {"map": "given", "temperature": float(detail or 0.75)}
        elif kind == "mask":
            common |= {"map": "given", "guide": "mask"}
        elif arm == "tokencut-demo":
            common |= {"map": "tokencut", "map_model": "demo"}
        elif arm == "attention":
            common |= {"map": "class_attention", "map_model": "demo"}
        elif kind in ("tokencut", "maskcut", "lost"):
            common |= {"map": kind, "map_model": plain}
        elif kind == "grad_cam":
            common |= {"map": "grad_cam", "map_model": str(self.supervised(seed))}
        elif kind in ("centre", "iou"):
            common |= {"map": "given", "maps": str(self.made(arm, seed))}
        return PretrainSettings.from_dict(common)

    def supervised(self, seed: int) -> Path:
        """A run on the labels of the same scenes: what Grad-CAM explains."""
        settings = Settings(
            data=self.spec,
            model="demo",
            model_args=self.arguments,
            image_size=self.size,
            init="none",
            epochs=20,
            batch_size=50,
            lr=1e-3,
            layer_decay=1.0,
            device="cpu",
            precision="float32",
            workers=0,
            seed=seed,
            out=str(self.out),
            name=f"supervised-seed{seed}",
        )
        return fit(settings, resume=True).folder

    def made(self, arm: str, seed: int) -> Path:
        """A store of maps that no source of ours makes."""
        images, config = self.data.train, Run.load(self.out / f"plain-seed{seed}").config
        folder = self.out / "maps" / f"{arm}-seed{seed}"
        source: Any = Centre()
        if arm != "centre":
            assert images.masks is not None
            overlap = float(arm.partition("-")[2]) / 100
            images = replace(images, masks=degraded(images.masks, overlap, seed))
            source = maps.make("given", torch.nn.Identity())
        about = describe("given", {}, None, None)
        make_store(folder, images, source, about, config=config, batch_size=100)
        return folder

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Pre-train and measure one arm, or read what was measured."""
        settings = self.settings(arm, seed)
        path = settings.folder / "frozen.json"
        if path.is_file():
            return dict(json.loads(path.read_text()))
        run = pretrain(settings, resume=True)
        measured = self.frozen(run)
        if settings.map is not None:
            store = store_of(settings, self.data, run.config, torch.device("cpu"), None)
            assert store is not None
            if self.data.train.masks is not None:
                measured |= quality(store, self.data.train, settings.temperature)
        measured["val_loss"] = run.results["val"]["loss"]
        write_text(path, json.dumps(measured))
        return measured

    def frozen(self, run: Run) -> dict[str, Any]:
        """Accuracies of k-NN and of logistic regression on the frozen features, and attention on the object.

        misled: the labelled images are those of the pre-training, whose background often names the class; clean: as
        many whose background does not.
        """
        model = run.model()
        out: dict[str, Any] = {}
        source = maps.make("class_attention", model, config=run.config)
        for name, images in self.data.tests.items():
            if images.masks is not None:
                batches = Batches(images, run.config, 100, train=False)
                shares = [energy_share(source(batch.images).map, batch.masks) for batch in batches]
                out[f"pointing/{name}"] = float(torch.cat(shares).nanmean())
        for tokens in ("class", "mean"):
            for kind, (data, names) in self.asked.items():
                sets = {"train": data.train, "val": data.val, **{name: data.tests[name] for name in names}}
                held = {
                    name: features(model, images, run.config, tokens=tokens, norm=False)
                    for name, images in sets.items()
                }
                val = knn(held["train"], held["val"], K)
                probe = logistic_probe(held["train"], {name: held[name] for name in names}, (1e-4, 1e-3), held["val"])
                for name in names:
                    found = knn(held["train"], held[name], (val.best[0],), (val.best[1],))
                    out[f"knn/{kind}{tokens}/{name}"] = found.accuracy[found.best]
                    out[f"logistic/{kind}{tokens}/{name}"] = probe.tests[name].accuracy
        return out

    def tuned(self, arm: str, seed: int, share: float) -> dict[str, float]:
        """Fine-tune on a share of the labels."""
        settings = Settings(
            data=self.spec,
            model="demo",
            model_args=self.arguments,
            image_size=self.size,
            init=str(self.out / f"{arm}-seed{seed}"),
            epochs=20,
            label_fraction=share,
            batch_size=50,
            lr=1e-3,
            crop_scale=(0.6, 1.0),
            device="cpu",
            precision="float32",
            workers=0,
            seed=seed,
            out=str(self.out),
            name=f"{arm}-tuned-{share:g}-seed{seed}",
        )
        run = fit(settings, resume=True)
        return {f"tuned-{share:g}/{name}": scores["accuracy"] for name, scores in run.results["sets"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", default=["plain", "given", "tokencut"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--digits", type=int, default=1)
    parser.add_argument("--data", default="", help="another data set than the scenes")
    parser.add_argument("--size", type=int, default=32, help="side of the images; patches are an eighth of it")
    parser.add_argument("--also", default="", help="a data set that the features are asked about too")
    parser.add_argument("--fine-tune", type=float, nargs="*", default=[])
    parser.add_argument("--tuned-arms", nargs="*", default=["plain", "given", "tokencut"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = options.data or (
        f"scenes:shortcut=0.5,train={options.train},val=300,test=1000,size=32,digits={options.digits}"
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    print(f"foveal {foveal.__version__}; {spec}; {options.epochs} epochs, {options.seeds} seeds")
    study = Study(options.out, spec, options.epochs, options.size, options.also)
    arms = ["plain", *(arm for arm in options.arms if arm != "plain")]
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in range(options.seeds):
        for arm in arms:
            start = time.perf_counter()
            row = study.run(arm, seed)
            if arm in options.tuned_arms:
                for share in options.fine_tune:
                    row = row | study.tuned(arm, seed, share)
            measured[arm].append(row)
            print(f"{arm}-seed{seed}: {time.perf_counter() - start:.0f} s", flush=True)
    names = [name for name in measured["plain"][0] if "/" in name]
    print("\n| arm | AUC | weight on object, background | " + " | ".join(names) + " |")
    print("|---" * (3 + len(names)) + "|")
    for arm, rows in measured.items():
        told = [arm]
        told.append("" if "auc" not in rows[0] else f"{sum(row['auc'] for row in rows) / len(rows):.3f}")
        told.append(
            ""
            if "auc" not in rows[0]
            else ", ".join(f"{sum(row[name] for row in rows) / len(rows):.2f}" for name in ("object", "background"))
        )
        for name in names:
            if name not in rows[0]:
                told.append("")
                continue
            values = torch.tensor([row[name] for row in rows]) * 100
            mean = f"{values.mean():.1f}"
            if arm != "plain":
                base = torch.tensor([row[name] for row in measured["plain"]]) * 100
                gap = stats.paired_over_seeds(values, base)
                mean += f" ({gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}])"
            told.append(mean)
        print("| " + " | ".join(told) + " |")


if __name__ == "__main__":
    main()
