"""Tokens from convolutions: the stem of the Compact Convolutional Transformer (CCT).

    C times  Conv2d(kernel P, no bias) -> ReLU -> MaxPool2d(3, stride 2, padding 1)        Hassani et al., 2021

Channels go 3 -> 64 -> ... -> 64 -> D, so with C = 1 directly 3 -> D. Neighbouring tokens overlap, which gives the
encoder the locality that it would otherwise have to learn from many images. The patch embeddings of CVT and ViT-Lite
(one convolution with kernel = stride) are timm's PatchEmbed.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

WIDTH = 64  # channels between two convolutions


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as two."""
    h, w = (size, size) if isinstance(size, int) else size
    return int(h), int(w)


class ConvTokenizer(nn.Module):
    """Images (B, 3, H, W) to tokens (B, h w, D), row by row. It tells its grid as timm's PatchEmbed does.

    img_size, grid_size, num_patches: of the size that the model was built for.  stride, padding: None gives
    max(1, P // 2 - 1) and max(1, P // 2), as the named models have it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        kernel_size: int = 3,
        conv_layers: int = 1,
        in_chans: int = 3,
        embed_dim: int = 256,
        stride: int | None = None,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = max(1, kernel_size // 2 - 1) if stride is None else stride
        self.padding = max(1, kernel_size // 2) if padding is None else padding
        widths = [in_chans, *[WIDTH] * (conv_layers - 1), embed_dim]
        self.conv_layers = nn.Sequential(*(self._layer(a, b) for a, b in pairwise(widths)))
        self.set_input_size(img_size)

    def _layer(self, channels: int, out: int) -> nn.Sequential:
        conv = nn.Conv2d(channels, out, self.kernel_size, self.stride, self.padding, bias=False)
        return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Say which images come: (H, W) in pixels."""
        self.img_size = pair(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if min(self.grid_size) < 1:
            raise ValueError(
                f"img_size={self.img_size} leaves no token after {len(self.conv_layers)} convolutions with kernel "
                f"{self.kernel_size}: give larger images or fewer conv_layers"
            )

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid (h, w) of the tokens of an image of (H, W) pixels."""
        return self._side(img_size[0]), self._side(img_size[1])

    def _side(self, pixels: int) -> int:
        for _ in self.conv_layers:
            pixels = (pixels + 2 * self.padding - self.kernel_size) // self.stride + 1
            pixels = (pixels - 1) // 2 + 1  # the pool: (pixels + 2 - 3) // 2 + 1
        return pixels

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels from one token to the next."""
        ratio = int((2 * self.stride) ** len(self.conv_layers))
        return ratio if as_scalar else (ratio, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W).  Returns (B, h w, D)."""
        x = self.conv_layers(x)  # (B, D, h, w)
        return x.flatten(2).transpose(1, 2)
