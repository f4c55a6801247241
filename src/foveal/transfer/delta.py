"""DELTA: keep the features of the pre-trained model, the more the more a channel matters.

    L = L_task + alpha/B sum_l sum_b 1/2 ||F_T - F_S||^2                                  every channel alike
    L = L_task + alpha/B sum_l sum_{b,c} 1/2 C w_lc ||F_T[b,c] - F_S[b,c]||^2 / S         weighted, sum_c w_lc = 1

Li et al., 2019 (arXiv 1901.09229), section 3. F (B, C, S) are the features of layer l at S positions, T of the model
being tuned, S of the frozen source, both on the same input. With w = 1/C the second is the first divided by S.

The authors sum over the batch (alpha 0.01 with 64 images, 0.1 on Stanford Dogs), which makes the strength depend on its
size. Here it is a mean over images, so the same strength is alpha * B: 0.01 * 64 = 0.64 (6.4 for Dogs). Their alpha is
for convolutional features of a ResNet, and is to be tuned over powers of ten for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import foveal.attention as attention
from foveal.attention.door import bare
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.source import Source


def delta_loss(target: Tensor, source: Tensor, channels: Tensor | None = None, dim: int = 1) -> Tensor:
    """Half the squared distance of the features of one layer, summed over channels and positions, mean over images.

    target, source: (B, C, S) or (B, C, h, w); tokens (B, S, C) with dim=-1.  dim: where the channels are.
    channels: (C,) weights with sum 1, then the positions are averaged and C w_c multiplies each channel; None: no
    weights, and the positions are summed.
    Returns a float32 (or wider) scalar; the gradient stops at the source. Raises ValueError for shapes that differ.
    """
    if target.shape != source.shape or target.dim() < 2 or dim % target.dim() == 0:
        raise ValueError(
            f"target features are {tuple(target.shape)}, source features {tuple(source.shape)}, channels in dim {dim}; "
            "both need the same width, patch size and input size, images first, and no patch dropout"
        )
    C = target.shape[dim]
    wide = torch.promote_types(torch.float32, target.dtype)
    square = (target.to(wide) - source.detach().to(wide)).square()
    if channels is None:
        return square.sum() / (2 * len(target))
    if channels.shape != (C,):
        raise ValueError(f"channel weights are {tuple(channels.shape)}, but there are {C} channels: give ({C},)")
    each = square.transpose(0, dim).flatten(1).sum(1)  # (C,)
    S = target[0].numel() // C
    return (channels.detach().to(each) * each).sum() * C / (2 * S * len(target))


class DELTA(Guide):
    """DELTA on the patch tokens that leave some blocks. Prefix tokens (class, registers) are not compared.

    source: the pre-trained model; it is copied, so the model that will be tuned may be given itself before tuning
    starts. None: the tuned model with its adapters (LoRA) off, without a copy.  weight: alpha * B.
    layers: blocks, as in `foveal.read`; None: the four quarters of the depth (of 12 blocks 2, 5, 8 and 11), as the
    authors take the four stages of a ResNet.
    channels: weights (C,) per layer, in their order, with sum 1, as `channel_attention` gives them; None: unweighted.
    precision, compiled: of the source's forward, see `Source`.

    The authors also set weight decay to 0 and add beta/2 ||head||^2 with beta 0.01: that is left to the optimiser.
    Raises UnsupportedModelError or ValueError for a source whose blocks cannot be read, and in the first forward where
    the features of model and source have other shapes.
    """

    name: ClassVar[str] = "delta"

    def __init__(
        self,
        source: nn.Module | None,
        weight: float = 0.64,
        layers: attention.Layers | None = None,
        channels: Sequence[Tensor] | None = None,
        *,
        precision: str | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(weight)
        if isinstance(channels, str) or (isinstance(channels, Sequence) and not all(map(torch.is_tensor, channels))):
            raise ValueError(
                f"channels={channels!r}: give one tensor of weights per layer (foveal.transfer.channel_attention), or "
                "None for features that all count alike"
            )
        self.channels = None if channels is None else list(channels)
        self.frozen = Source(source, precision=precision, compiled=compiled)
        self._asked, self.layers = layers, layers
        if self.frozen.model is not None:
            self._choose(self.frozen.model)

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """Guide the forward of `model` on `images` inside the block; then ask `losses()`."""
        if self.frozen.model is None and self.layers is None:
            self._choose(bare(model))
        return _Guided(self, model, images, self.weight * relax)

    def _choose(self, model: nn.Module) -> None:
        """Fix the layers, and say now, not in the first step, what does not fit."""
        asked = quarters(model) if self._asked is None else self._asked
        self.layers = [asked] if isinstance(asked, int) or (isinstance(asked, str) and asked != "all") else asked
        self.frozen.check(self.layers, "block_out", model)
        found = attention.read(model, self.layers, "block_out").layers
        if self.channels is not None and len(self.channels) != len(found):
            raise ValueError(
                f"{len(self.channels)} tensors of channel weights for {len(found)} layers ({', '.join(found)}): "
                "give one each"
            )


def quarters(model: nn.Module) -> list[int]:
    """The last block of each quarter of the depth: of 12 blocks 2, 5, 8, 11; fewer where there are less than four."""
    depth = len(attention.read(model, "all", "block_out").layers)
    return sorted({-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})


class _Guided(Guided):
    """One guided forward."""

    def __init__(self, guide: DELTA, model: nn.Module, images: Tensor, strength: float) -> None:
        super().__init__(guide.name, strength)
        self._guide, self._model, self._images = guide, model, images

    def open(self) -> None:
        guide = self._guide
        assert guide.layers is not None
        # the source runs first: its activations are gone before the target's graph is built
        self._kept = guide.frozen.look(self._images, guide.layers, "block_out", self._model)
        self._seen = attention.read(self._model, guide.layers, "block_out").__enter__()

    def close(self, *error: object) -> None:
        self._seen.__exit__(*error)  # type: ignore[arg-type]

    def term(self) -> Tensor:
        target, source = self._seen.block_out(), self._kept.block_out()
        channels: Sequence[Tensor | None] = self._guide.channels or [None] * len(target)
        terms = [delta_loss(t, s, w, dim=-1) for t, s, w in zip(target, source, channels, strict=True)]
        return torch.stack(terms).sum()
