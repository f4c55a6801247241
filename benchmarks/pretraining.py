"""What a step of masked pre-training costs: ours plain and guided, over MAE's step written down plainly.

    python benchmarks/pretraining.py [--cases bare tiny small] [--rounds 15] [--device cuda] [--dtype bfloat16]
                                     [--threads 1] [--clock cpu]

Forward, loss, backward and an AdamW step at learning rate 0, so that every round does the same work, on random images:
ViT-S/16 with MAE's decoder, and a tiny ViT with a tiny decoder, where what surrounds the blocks weighs more. `bare` is
the ViT-S without any block, which are the same in all variants: what is left tells them apart on a busy machine. The
written-down step has what MAE's has: a second argsort for the inverse permutation, mask tokens repeated and appended,
three concatenations, and the loss read as a number. All variants share weights and batch; both plain ones give the same
loss. Guided: the maps of the batch come from a map store (uint8, 30 x 30, memory-mapped) in a new crop and flip every
step. Every variant runs once per round, in a shuffled order, in one process; a ratio is taken within a round; median
and quartiles over rounds are printed, and what reading the maps takes by itself. On a machine that does other things
`--clock cpu --threads 1` counts the processor time of this process alone.

To reach: the plain step not slower than the written-down one, the guided step at most 1.01 of the plain one.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import tempfile
from collections.abc import Callable

import timm
import torch
from clock import Clock, clock_of, interleaved, processor, spread, timed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import foveal
from foveal import chance
from foveal.data import ImageConfig, Images
from foveal.maps import MapStore, make_store
from foveal.maps.found import Found, found
from foveal.pretrain import MaskedAutoencoder, guided_reconstruction

IMAGES = 512  # in the map store
CASES = {  # name -> encoder, decoder (width, depth, heads), image side, batch
    "tiny": ({"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 4, "num_heads": 3}, (96, 2, 3), 32, 128),
    "small": (
        {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
        (512, 8, 16),
        224,
        16,
    ),
    "bare": ({"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 0, "num_heads": 6}, (512, 0, 16), 224, 16),
}


class Blobs:
    """A source of smooth maps: the brightness of its images."""

    model = None

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        return found(images.mean(1))


def store_of_blobs(folder: str) -> MapStore:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(IMAGES, 3, 5, 5, generator=g)
    pixels = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").mul(255).to(torch.uint8)
    images = Images(torch.zeros(IMAGES, dtype=torch.int64), ("all",), pixels=pixels)
    config = ImageConfig((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return make_store(folder, images, Blobs(), {"map": "blobs"}, config=config)


class Trainer:
    """An autoencoder, its optimiser, one batch of images; noise, crops and flips by the number of the step."""

    def __init__(self, case: str, batch: int, device: torch.device, dtype: torch.dtype, store: MapStore) -> None:
        settings, decoder, side, _ = CASES[case]
        encoder = VisionTransformer(num_classes=0, **settings)
        self.autoencoder = MaskedAutoencoder(encoder, *decoder)
        self.autoencoder.initialise(0)
        self.autoencoder.to(device).train()
        self.images = torch.randn(batch, 3, side, side, device=device)
        self.store, self.device, self.dtype = store, device, dtype
        trained = [p for p in self.autoencoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95))
        self.batch, self.patches = batch, self.autoencoder.grid[0] * self.autoencoder.grid[1]

    def train(self, loss: Callable[[Tensor], Tensor], number: int) -> Tensor:
        noise = torch.rand(self.batch, self.patches, generator=chance.generator(0, "mask", number)).to(self.device)
        self.optimizer.zero_grad()
        value = loss(noise)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def plain(self, number: int) -> Tensor:
        return self.train(self.reconstruct, number)

    def guided(self, number: int) -> Tensor:
        return self.train(lambda noise: self.reconstruct(noise, self.maps(number)), number)

    def reconstruct(self, noise: Tensor, map: Tensor | None = None) -> Tensor:
        with self.autocast():
            out = self.autoencoder(self.images, noise)
        target = self.autoencoder.target(self.images)
        return guided_reconstruction(out.prediction, target, out.removed, map, scaled=True).loss

    def maps(self, number: int) -> Tensor:
        g = chance.generator(0, "augment", number)
        corner, side = torch.rand(self.batch, 2, generator=g) * 0.4, 0.6
        boxes, flip = torch.cat([corner, corner + side], 1), torch.rand(self.batch, generator=g) < 0.5
        index = torch.randint(IMAGES, (self.batch,), generator=g)
        return self.store.sample(index, boxes, flip, self.autoencoder.grid, self.device)[0]

    def written(self, number: int) -> Tensor:
        value = self.train(self.mae, number)
        value.item()  # MAE's loop stops for a loss that is not finite
        return value

    def mae(self, noise: Tensor) -> Tensor:
        """MAE's forward and loss, on the same modules."""
        with self.autocast():
            prediction, mask = self.forward(noise)
        p = self.autoencoder.patch_size[0]
        B, C, H, W = self.images.shape
        target = self.images.reshape(B, C, H // p, p, W // p, p)
        target = torch.einsum("nchpwq->nhwpqc", target).reshape(B, self.patches, p * p * C)
        error = ((prediction - target) ** 2).mean(-1)
        return (error * mask).sum() / mask.sum()

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        x = encoder.patch_embed(self.images) + encoder.pos_embed[:, 1:]
        B, N, D = x.shape
        K = int(N * (1 - self.autoencoder.mask_ratio))
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        keep = shuffle[:, :K]
        x = torch.gather(x, 1, keep.unsqueeze(-1).repeat(1, 1, D))
        mask = torch.ones(B, N, device=x.device)
        mask[:, :K] = 0
        mask = torch.gather(mask, 1, restore)
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(B, -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        x = decoder.embed(encoder.norm(x))
        tokens = decoder.mask_token.repeat(B, N - K, 1)
        y = torch.cat([x[:, 1:], tokens], dim=1)
        y = torch.gather(y, 1, restore.unsqueeze(-1).repeat(1, 1, y.shape[2]))
        y = torch.cat([x[:, :1], y], dim=1) + decoder.pos_embed
        for block in decoder.blocks:
            y = block(y)
        return decoder.head(decoder.norm(y))[:, 1:], mask


def steps(case: str, batch: int, rounds: int, device: torch.device, dtype: torch.dtype, clock: Clock) -> None:
    settings, (wide, deep, _), side, _ = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        t = Trainer(case, batch, device, dtype, store_of_blobs(folder))
        width, depth = settings["embed_dim"], settings["depth"]
        print(f"\nwidth {width}, depth {depth}, decoder {wide} x {deep}, {side} px, {t.patches} patches", end=", ")
        print(f"batch {batch}, {dtype}, {rounds} rounds")
        variants: dict[str, Callable[[int], object]] = {
            "MAE's step, written down": t.written,
            "plain step": t.plain,
            "guided step, maps from a store": t.guided,
        }
        losses = {name: float(run(0)) for name, run in variants.items()}  # type: ignore[arg-type]
        print(f"  {'':34s} {'median':>10s}   {'over written down':>22s}   {'over plain':>22s}   {'loss':>8s}")
        times = interleaved(variants, rounds, device, clock)
        for name, taken in times.items():
            ratios = [spread(taken, times[base]) for base in ("MAE's step, written down", "plain step")]
            print(
                f"  {name:34s} {statistics.median(taken) * 1e3:7.1f} ms   {ratios[0]:>22s}   {ratios[1]:>22s}", end=""
            )
            print(f"   {losses[name]:8.6f}")
        alone = [timed(t.maps, number, device, clock) for number in range(50)]
        print(f"  sampling the maps alone            {statistics.median(alone) * 1e3:7.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--batch", type=int, default=0, help="0: 128 for tiny, 16 for the others")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: of this process alone")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    print(f"foveal {foveal.__version__}, {where}, {options.clock} clock")
    clock = clock_of(options.clock)
    for case in options.cases:
        steps(case, options.batch or CASES[case][3], options.rounds, device, dtype, clock)


if __name__ == "__main__":
    main()
