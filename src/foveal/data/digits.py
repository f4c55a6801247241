"""Handwritten digits: scikit-learn's 1,797 images of 8 x 8, enlarged. Nothing to download, trained in seconds."""

import torch
from torch.nn.functional import interpolate

from foveal.data.images import Data, Images
from foveal.data.splits import hold_out

TEST_SEED = 0  # the test set is the same whatever the seed, so that runs of several seeds can be compared


def load_digits(options: dict[str, str], seed: int = 0, image_size: int | None = None) -> Data:
    """Ten classes, image_size pixels a side (32 if None). Test: 15 % of each class, always the same; val by seed.

    options: none are known.
    """
    from sklearn.datasets import load_digits as sklearn_digits  # here: importing it takes a second

    found = sklearn_digits()
    side = image_size or 32
    grey = torch.from_numpy(found.images).to(torch.float32)[:, None] * (255 / 16)  # (1797, 1, 8, 8), 0 to 255
    large = interpolate(grey, (side, side), mode="bicubic", align_corners=False).round().clamp(0, 255)
    images = Images(
        labels=torch.from_numpy(found.target).to(torch.int64),
        classes=tuple(str(c) for c in found.target_names),
        pixels=large.to(torch.uint8).expand(-1, 3, -1, -1).contiguous(),
    )
    outer, _ = hold_out(images, {"test": 15}, TEST_SEED)
    inner, how = hold_out(outer["train"], {"val": 15}, seed)
    note = f"{how}; {len(outer['test'])} test, the same for every seed"
    return Data("digits", inner["train"], inner["val"], {"test": outer["test"]}, flip=False, notes=(note,))
