"""Does guided transfer help when labels are few? Every method under one recipe, on scenes with a misleading background.

    python benchmarks/guided_transfer.py OUT [--data SPEC --size 32] [--init demo] [--shares 0.15 0.3 0.5 1]
                                         [--methods plain gta ...] [--seeds 3] [--epochs 30] [--sweep gta bss ...]
                                         [--threads 1] [--table]

Fine-tunes one encoder (--init: demo, a run folder, a file) with every method, share of the labels and seed; a seed
draws the images of the share, the head's first weights and the order of batches, the same for all methods. Methods of
--sweep choose their weight by foveal.train.sweeping: the share's own training images, a fifth held out, no test image;
all weights of GTA are run on the tests as well (its curve). --table prints what is there without training more.
Finished runs are kept in OUT, and called again it goes on; several processes may share OUT if their --shares differ.

Methods: plain; head (linear probe), lp-ft, attention, bias, last-1, lora (what is trained; head, bias and lora at ten
times the learning rate); l2-sp, l2-sp-decoupled, delta, bss, attention-transfer; gta at its default, gta-0.1 ... its
curve, gta-centred, gta-kl, gta-cosine (relaxed to zero), gta-attn-out, gta-block-out (the paper's table 3), gta-random
(a source of random weights), gta-lora, transmix, gta+transmix, lp-ft+gta.

Printed per share: accuracy on each test set, BG-Gap, attention on the object and drift, each as mean over seeds and
paired difference to plain with its 95 % interval over seeds (Student's t). With `--data backgrounds` the label is the
photograph behind the digit.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import timm
import torch
from torchvision.io import encode_png

import foveal
from foveal import stats
from foveal.train import Run, Settings, fit
from foveal.train.files import write_text
from foveal.train.folder import is_finished
from foveal.train.sweeping import sweep, usual_weights

FAST = 10.0  # times the learning rate where little is trained
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head": {"tune": "head"},
    "lp-ft": {"head_start": "probe"},
    "attention": {"tune": "attention"},
    "bias": {"tune": "bias"},
    "last-1": {"tune": "last-1"},
    "lora": {"tune": "lora"},
    "l2-sp": {"guide": "l2_sp"},
    "l2-sp-decoupled": {"guide": "l2_sp", "guide_args": {"decoupled": True}},
    "delta": {"guide": "delta"},
    "bss": {"guide": "bss"},
    "attention-transfer": {"guide": "attention_transfer"},
    "gta": {"guide": "gta"},
    **{f"gta-{weight:g}": {"guide": "gta", "guide_weight": weight} for weight in usual_weights("gta") if weight},
    "gta-centred": {"guide": "gta", "guide_args": {"match": "centred"}},
    "gta-kl": {"guide": "gta", "guide_args": {"match": "kl"}},
    "gta-cosine": {"guide": "gta", "guide_schedule": "cosine"},
    "gta-attn-out": {"guide": "gta", "guide_args": {"what": "attn_out"}},
    "gta-block-out": {"guide": "gta", "guide_args": {"what": "block_out"}},
    "gta-random": {"guide": "gta", "guide_source": "none"},
    "gta-lora": {"guide": "gta", "tune": "lora"},
    "lp-ft+gta": {"guide": "gta", "head_start": "probe"},
    "transmix": {"mix": "transmix"},
    "gta+transmix": {"guide": "gta", "mix": "transmix"},
}


def backgrounds(folder: Path, size: int) -> Path:
    """Packs of scenes whose label is the photograph behind the digit, not the digit: a task that objects do not help.

    Digits are any of 5 to 9 in front of any of the five photographs.
    """
    from foveal.data import scenes

    options = scenes.Scenes(train=300, val=100, test=500, classes=(5, 6, 7, 8, 9), size=size)
    photographs = [scenes.PHOTOGRAPHS[c] for c in options.classes]
    data, drawn = scenes.load(options), scenes.plan(options)
    for name, images, key in (
        ("train", data.train, "train"),
        ("val", data.val, "val"),
        ("test", data.tests["mixed_rand"], "mixed_rand"),
    ):
        path = folder / f"{name}.npz"
        assert images.pixels is not None
        assert images.masks is not None
        arrays = {
            "label": np.array([photographs.index(scene.photo) for scene in drawn[key]], np.int16),
            "classes": np.array(photographs),
        }
        for kind, pictures in (("image", images.pixels), ("mask", images.masks[:, None].byte() * 255)):
            blobs = [bytes(encode_png(picture).tolist()) for picture in pictures]
            arrays[f"{kind}_blob"] = np.frombuffer(b"".join(blobs), np.uint8)
            arrays[f"{kind}_offset"] = np.cumsum([0, *map(len, blobs)])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
    return folder


class Study:
    """All runs on one data set from one encoder, below a folder."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self.out, self.options = out, options

    def settings(self, method: str, share: float, seed: int) -> Settings:
        """One run; with its own weight where the method has none of its own yet."""
        own = METHODS[method]
        o = self.options
        fast = own.get("tune") in ("head", "bias", "lora")
        return Settings(
            data=o.data,
            data_seed=None,  # a seed draws its own share
            label_fraction=share,
            model=o.model,
            model_args=json.loads(o.model_args),
            image_size=o.size,
            init=o.init,
            epochs=o.epochs,
            batch_size=o.batch,
            lr=o.lr * (FAST if fast else 1.0),
            crop_scale=(0.6, 1.0),
            device="cpu",
            precision="float32",
            workers=0,
            seed=seed,
            out=str(self.out),
            name=f"{method}-{share:g}-seed{seed}",
        ).replace(**own)

    def run(self, method: str, share: float, seed: int, train: bool) -> dict[str, Any] | None:
        """Train and measure, or read what was measured; None where it is not there and is not to be trained."""
        settings = self.settings(method, share, seed)
        if method in self.options.sweep:
            weight = self.chosen(method, share, seed, train)
            if weight is None:
                return None
            settings = settings.replace(guide_weight=weight)
            if method == "gta":  # a point of its curve
                settings = settings.replace(name=f"gta-{weight:g}-{share:g}-seed{seed}")
        if not is_finished(settings.folder) and not train:
            return None
        return measured(fit(settings, resume=True))

    def chosen(self, method: str, share: float, seed: int, train: bool) -> float | None:
        """The weight that the share's own held-out part prefers; chosen once."""
        path = self.out / "sweeps" / f"{method}-{share:g}-seed{seed}" / "sweep.json"
        if not path.is_file():
            if not train:
                return None
            settings = self.settings(method, share, seed)
            sweep(settings, [w for w in usual_weights(settings.guide) if w], out=path.parent)
        return float(json.loads(path.read_text())["best"])


def measured(run: Run) -> dict[str, Any]:
    """What is told of a run, shares in percent."""
    sets = run.results["sets"]
    told = {f"accuracy/{name}": 100 * scores["accuracy"] for name, scores in sets.items()}
    if run.results["bg_gap"] is not None:
        told["BG-Gap"] = 100 * run.results["bg_gap"]
    name = "mixed_rand" if "mixed_rand" in sets else next(iter(sets))
    if sets[name]["pointing"] is not None:
        told["on object"] = 100 * sets[name]["pointing"]
    if run.results.get("drift") is not None:
        told["drift"] = 100 * run.results["drift"]
    told["weight"] = run.settings.guide_weight
    told["images"] = run.results["images"]
    ratios = [float(row["gradient_ratio"] or 0) for row in run.metrics[1:] if row.get("gradient_ratio") is not None]
    if ratios:
        told["gradient ratio"] = statistics.median(ratios)
    return told


def table(rows: dict[str, dict[int, dict[str, Any]]], share: float) -> None:
    """Print the methods of one share; plain first."""
    plain = rows["plain"]
    first = next(iter(plain.values()))
    names = [name for name in first if name not in ("weight", "images", "gradient ratio")]
    print(f"\n{100 * share:g} % of the labels, {first['images']} training images, {len(plain)} seeds\n")
    print("| method | " + " | ".join(names) + " | weights | gradient ratio |")
    print("|---" * (3 + len(names)) + "|")
    for method, made in rows.items():
        both = [seed for seed in made if seed in plain]
        cells = []
        for name in names:
            values = [made[seed][name] for seed in both]
            cell = f"{statistics.mean(values):.1f}"
            if method != "plain" and len(both) > 1:
                gap = stats.paired_over_seeds(values, [plain[seed][name] for seed in both])
                cell += (
                    f" ({gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}])" if gap.available else f" ({gap.mean:+.1f})"
                )
            cells.append(cell)
        weights = [made[seed]["weight"] for seed in both if made[seed]["weight"] is not None]
        ratios = [made[seed]["gradient ratio"] for seed in both if "gradient ratio" in made[seed]]
        cells.append(" ".join(f"{weight:g}" for weight in weights))
        cells.append(f"{statistics.median(ratios):.2g}" if ratios else "")
        print(f"| {method} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--data", default="scenes:classes=5-9,shortcut=0.8,train=300,val=100,test=500", help="what is fine-tuned on"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--model-args", default="{}", help="JSON")
    parser.add_argument("--init", default="demo")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.15, 0.3, 0.5, 1.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sweep", nargs="*", default=[], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__},"
        f" Lightning {lightning.__version__}, foveal {foveal.__version__}"
    )
    print(f"{options.data}; from {options.init}; {options.epochs} epochs of batch {options.batch}, lr {options.lr:g}")
    if options.data == "backgrounds":
        options.data = str(backgrounds(options.out / "backgrounds", options.size))
    study = Study(options.out, options)
    methods = ["plain", *(method for method in options.methods if method != "plain")]
    found: dict[float, dict[str, dict[int, dict[str, Any]]]] = {share: {} for share in options.shares}
    for seed in range(options.seeds):
        for share in options.shares:
            start = time.perf_counter()
            for method in methods:
                row = study.run(method, share, seed, train=not options.table)
                if row is not None:
                    found[share].setdefault(method, {})[seed] = row
            if not options.table:
                print(f"seed {seed}, {100 * share:g} %: {time.perf_counter() - start:.0f} s", flush=True)
    for share, rows in found.items():
        if "plain" in rows:
            table(rows, share)
    write_text(options.out / "rows.json", json.dumps({f"{share:g}": rows for share, rows in found.items()}))


if __name__ == "__main__":
    main()
