"""A picture of what a masked autoencoder sees and makes of it: image, visible patches, reconstruction, map."""

from pathlib import Path

import torch

from foveal.chance import generator
from foveal.data import Data, ImageConfig
from foveal.data.batches import Batches
from foveal.explain import overlay, save_png, sheet
from foveal.explain.overlay import resize
from foveal.maps import MapStore
from foveal.pretrain import MaskedAutoencoder, patchify, unpatchify

ROWS, SIDE = 6, 160


@torch.no_grad()
def write_reconstructions(
    path: Path, autoencoder: MaskedAutoencoder, data: Data, config: ImageConfig, seed: int, store: MapStore | None
) -> None:
    """Write a picture of a few images, whole: held-out ones, or training images where there are maps to show."""
    images = data.val if store is None else data.train
    chosen = torch.linspace(0, len(images) - 1, min(ROWS, len(images))).round().long()
    device = next(autoencoder.parameters()).device
    batch = next(iter(Batches(images.subset(chosen), config, len(chosen), train=False, device=device)))
    h, w = autoencoder.grid
    noise = torch.stack([torch.rand(h * w, generator=generator(seed, "mask_val", int(i))) for i in chosen])
    out = autoencoder(batch.images, noise)
    kept = patchify(batch.images, autoencoder.patch_size) * (1 - out.removed[..., None])
    views = [batch.images, unpatchify(kept, (h, w), autoencoder.patch_size), autoencoder.picture(batch.images, out)]
    mean, std = (batch.images.new_tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    shown = [((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).cpu() for x in views]
    rows = [[resize(view[i], SIDE) for view in shown] for i in range(len(chosen))]
    if store is not None:
        for row, i, image in zip(rows, chosen.tolist(), shown[0], strict=True):
            row.append(overlay(image, store.map(i), side=SIDE))
    save_png(sheet(rows), path)
