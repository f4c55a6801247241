"""What reading attention costs over a plain forward.

    python benchmarks/reading.py [--rounds 9] [--device cuda] [--dtype bfloat16] [--threads 1]

ViT-S, inference, random weights. Every variant runs once per round, shuffled, in one process; the ratio is
that of a round against the plain forward of the same round; median and quartiles over rounds are printed. On a CPU the
clock counts the process's own seconds on all threads, so that other jobs on the machine count less; on a GPU it is the
wall. A single time means nothing on a busy machine.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torchvision

import foveal

DEPTH, HEADS = 12, 6
PATCH = {224: 16, 518: 14}  # 518 = 37 x 14, as DINOv2 is read


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def interleaved(variants: dict[str, Callable[[], object]], base: str, rounds: int, device: torch.device) -> None:
    for run in variants.values():
        run()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(rounds):
        random.Random(len(times[base])).shuffle(order)
        for name in order:
            times[name].append(timed(variants[name], device))
    for name, taken in times.items():
        ratios = [t / b for t, b in zip(taken, times[base], strict=True)]
        low, mid, high = statistics.quantiles(ratios, n=4)
        print(f"  {name:58s} {statistics.median(taken) * 1e3:9.1f} ms   x {mid:.3f}  [{low:.3f}, {high:.3f}]")


def reading(model: torch.nn.Module, images: torch.Tensor, layers: object, what: str) -> Callable[[], object]:
    def run() -> object:
        with foveal.read(model, layers=layers, what=what) as seen:  # type: ignore[arg-type]
            model(images)
        return seen.class_logits() if what == "class_logits" else seen.received()

    return run


def unfused_with_maps(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """The same weights with fused attention off, every map kept by a hook on its dropout."""
    maps: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))

    def run() -> object:
        maps.clear()
        model(images)
        return maps

    return run


def extracted(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """timm's AttentionExtract, which needs fused attention off."""
    from timm.utils import AttentionExtract

    for block in model.blocks:
        block.attn.fused_attn = False
    extract = AttentionExtract(model, method="fx")
    return lambda: extract(images)


def eager_transformers(images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """transformers' own way, over its own fused forward. Empty without transformers."""
    try:
        from transformers import ViTConfig, ViTModel
    except ImportError:
        return {}
    size = images.shape[-1]
    settings = {
        "hidden_size": 384,
        "num_attention_heads": HEADS,
        "num_hidden_layers": DEPTH,
        "intermediate_size": 1536,
        "image_size": size,
        "patch_size": PATCH[size],
    }
    fused, eager = (
        ViTModel(ViTConfig(**settings, attn_implementation=kind)).to(images.device, images.dtype).eval()
        for kind in ("sdpa", "eager")
    )
    return {
        "transformers, fused": lambda: fused(images),
        "transformers, fused + foveal class rows, all layers": reading(fused, images, "all", "class_logits"),
        "transformers, eager + output_attentions": lambda: eager(images, output_attentions=True),
    }


def memory(images: torch.Tensor, patches: int) -> None:
    B, N = images.shape[0], patches + 1
    model = vit(images)
    with foveal.read(model, layers="all") as seen:
        model(images)
    rows = sum(r.numel() * r.element_size() for r in seen.class_logits(prefix=True))
    maps = B * DEPTH * HEADS * N * N * 4
    print(f"  memory: class rows {rows / 2**20:.2f} MiB, full maps {maps / 2**20:.1f} MiB: {rows / maps:.2%}")


def vit(images: torch.Tensor) -> torch.nn.Module:
    size = images.shape[-1]
    model = timm.create_model("vit_small_patch16_224", img_size=size, patch_size=PATCH[size], num_classes=0)
    return model.to(images.device, images.dtype).eval()


def torchvision_vit(images: torch.Tensor) -> torch.nn.Module:
    size = images.shape[-1]
    model = torchvision.models.VisionTransformer(size, PATCH[size], DEPTH, HEADS, 384, 1536)
    return model.to(images.device, images.dtype).eval()


def compare(batch: int, size: int, rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    print(f"\nViT-S/{PATCH[size]}, {size} px, batch {batch}, {rounds} rounds")
    plain, fx = vit(images), vit(images)
    slow = vit(images)
    variants: dict[str, Callable[[], object]] = {
        "plain forward": lambda: plain(images),
        "class rows, all 12 layers": reading(plain, images, "all", "class_logits"),
        "class row, last layer": reading(plain, images, -1, "class_logits"),
        "received attention, last layer": reading(plain, images, -1, "received"),
        "received attention, all 12 layers": reading(plain, images, "all", "received"),
        "unfused, 12 maps stored": unfused_with_maps(slow, images),
        "timm AttentionExtract (fx, unfused)": extracted(fx, images),
    }
    interleaved(variants, "plain forward", rounds, device)
    other = torchvision_vit(images)
    interleaved(
        {
            "torchvision, plain forward": lambda: other(images),
            "torchvision, class rows, all 12 layers": reading(other, images, "all", "class_logits"),
            "torchvision, received attention, last layer": reading(other, images, -1, "received"),
            "torchvision, received attention, all 12 layers": reading(other, images, "all", "received"),
        },
        "torchvision, plain forward",
        rounds,
        device,
    )
    hf = eager_transformers(images)
    if hf:
        interleaved(hf, "transformers, fused", rounds, device)
    memory(images, (size // PATCH[size]) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, choices=[224, 518], help="one image size only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="more than one spin while they wait, and are counted")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"foveal {foveal.__version__}, torch {torch.__version__}, timm {timm.__version__}, {args.dtype}, "
        f"{chip}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )
    with torch.inference_mode():
        dtype = getattr(torch, args.dtype)
        for batch, size in [(8, 224), (16, 224), (2, 518)]:
            if args.size in (None, size):
                compare(batch, size, args.rounds, device, dtype)


if __name__ == "__main__":
    main()
