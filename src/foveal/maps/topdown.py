"""Top-down guide: the image seen a second time, with feedback from what the label's class looks like.

    Z  = tokens of a plain pass                     c_n = clamp(cos(Z_n, u), 0, 1)       u: classifier row of the label
    Z' = tokens of a pass with F(c Z) added to V    m_n = clamp(cos(Z'_n, u), 0, 1),  n over patches
    A_n = max( m_n - (0.7 max m + 0.3 min m), 0 )

Analysis-by-synthesis attention, Shi et al., 2023 (arXiv 2303.13043), as the guide of TdAttenMix (arXiv 2501.15409).
F are decoders trained with the model, see `feedback`; all tokens take part in c Z, patches only in A. The map is
conditioned on the label at every sigma: the last cosine is with the label's row. A model trained on single objects has
a weak top-down effect; adding one common vector to the values of all tokens has none at all, since rows of attention
sum to one.

Tokens are those after the norm that the classifier's input goes through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal import chance
from foveal.attention import read
from foveal.attention.door import bare
from foveal.attention.rows import widen
from foveal.maps import guide_files
from foveal.maps.asking import as_wanted, asking
from foveal.maps.errors import MapModelError
from foveal.maps.features import classifier
from foveal.maps.feedback import Decoders, fed_back, value_paths
from foveal.maps.found import Found, found
from foveal.maps.label_term import above, label_cosine, label_rows


class TopDown:
    """A vision transformer with feedback decoders as the source of maps; see above.

    model: timm's VisionTransformer or alike, with a linear head whose classes are the labels'.  decoders: one per
    block.  sigma: feedback gain, 1 as published.  feedback_bias: the value bias is added to the feedback too, as AbSViT
    was trained; False makes sigma 0 the plain pass.  prompt: (D,) stands in for the label's row where no label is
    given.  threshold: keep what exceeds 0.7 max + 0.3 min.  classes: how many classes the data have, checked.

    `TopDown.load(path)` reads AbSViT's checkpoints and what `save` wrote. Found.logits are those of the plain pass.
    Raises MapModelError for models, heads and decoders that do not fit, ValueError without label and prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        decoders: Decoders,
        *,
        sigma: float = 1.0,
        feedback_bias: bool = True,
        prompt: Tensor | None = None,
        threshold: bool = True,
        classes: int | None = None,
    ) -> None:
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma={sigma}: the feedback gain is 0 (none) or more; 1 is published")
        self.model: Any = bare(model)
        self.paths = value_paths(self.model)
        rows = classifier(self.model, classes)
        if len(decoders) != len(self.paths) or decoders.width != rows.shape[1]:
            raise MapModelError(
                f"{len(decoders)} decoders of width {decoders.width} for a model of {len(self.paths)} blocks and width "
                f"{rows.shape[1]}: each block needs one, as wide as the tokens"
            )
        if prompt is not None and prompt.shape != (rows.shape[1],):
            raise MapModelError(f"a prompt of shape {tuple(prompt.shape)}; ({rows.shape[1]},) fits the tokens")
        self.decoders, self.prompt = decoders, prompt
        self.sigma, self.feedback_bias, self.threshold = sigma, feedback_bias, threshold

    @classmethod
    def fresh(cls, model: nn.Module, *, seed: int = 0, **options: Any) -> TopDown:
        """A guide to be trained: new decoders and prompt for `model`, drawn from the seed."""
        width = classifier(model).shape[1]
        prompt = nn.Parameter(torch.randn(width, generator=chance.generator(seed, "init", 1)))
        return cls(model, Decoders(len(value_paths(bare(model))), width, seed), prompt=prompt, **options)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        heads: int | None = None,
        image_size: tuple[int, int] | None = None,
        **options: Any,
    ) -> TopDown:
        """A guide from a file: safetensors, or .pth, .pt, .bin with plain tensors. Other options: the constructor's.

        The architecture is read off the tensors' shapes. heads: width / 64 by default.  image_size: (height, width),
        a square by default; what `save` wrote knows both.
        Raises MapModelError for files that cannot be read, tensors that are missing, superfluous or misshapen.
        """
        model, decoders, prompt, card = guide_files.load(path, heads=heads, image_size=image_size)
        return cls(model, decoders, prompt=prompt, **{"feedback_bias": card.feedback_bias, **options})

    def save(self, path: str | Path) -> None:
        """Write model, decoders and prompt to one safetensors file, under AbSViT's names.

        Raises MapModelError for models that `load` could not build again.
        """
        guide_files.save(path, self.model, self.decoders, self.prompt, self.feedback_bias)

    def parameters(self) -> list[nn.Parameter]:
        """Everything that can be trained: the model's, the decoders', the prompt."""
        own = [self.prompt] if isinstance(self.prompt, nn.Parameter) else []
        return [*self.model.parameters(), *self.decoders.parameters(), *own]

    def __call__(self, images: Tensor, labels: Tensor | None = None, given: Tensor | None = None) -> Found:
        """Maps (B, h, w) of normalised images for their labels, indices (B,) or rows (B, C); for the prompt without."""
        images = as_wanted(self.model, images)
        self.decoders.to(next(self.model.parameters()))
        with asking(self.model):
            u = self.rows(images, labels)
            first = self.model.forward_features(images)
            second = self.again(images, first, u)
            patches = self.normed(second)[:, self.model.num_prefix_tokens :]
            map = label_cosine(patches, u)
            h, w = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
            map = map.unflatten(1, (int(h), int(w)))
            return found(above(map) if self.threshold else map, self.model.forward_head(first))

    def rows(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """u: (B, D)."""
        if labels is not None:
            return label_rows(classifier(self.model), labels.to(images.device))
        if self.prompt is None:
            raise ValueError("topdown looks for the label's class: give labels, or a prompt that stands in for them")
        return self.prompt.to(images.device).expand(len(images), -1)

    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens in the space of the classifier's rows."""
        normed: Tensor = self.model.fc_norm(tokens) if getattr(self.model, "fc_norm", None) is not None else tokens
        return normed

    def again(self, images: Tensor, first: Tensor, u: Tensor) -> Tensor:
        """The pass with feedback. first: (B, T, D) of the plain pass.  u: (B, D).  Returns (B, T, D)."""
        tokens = self.normed(first)
        gate = label_cosine(tokens, u).to(tokens.dtype)
        feedback = self.decoders(tokens * gate.unsqueeze(-1), self.sigma)
        with fed_back(self.paths, feedback, bias=self.feedback_bias):
            second: Tensor = self.model.forward_features(images)
        return second


@dataclass(frozen=True)
class GuideLoss:
    """Terms of the loss that trains a guide; `total` is what to differentiate."""

    total: Tensor
    first: Tensor  # cross-entropy of the plain pass
    second: Tensor  # cross-entropy of the pass with feedback
    reconstruction: Tensor  # sum over blocks of the squared error, unweighted
    logits: Tensor  # (B, C) of the pass with feedback


def topdown_loss(
    guide: TopDown, images: Tensor, labels: Tensor, *, smoothing: float = 0.0, reconstruction: float = 0.1
) -> GuideLoss:
    """The loss of AbSViT, in the mode that the model is in, with gradient.

        1/2 (CE(first) + CE(second)) + reconstruction * sum_l mean( (stop(out_l) W1_l - stop(in_l))^2 )

    Both passes look for the prompt, not for the label; in_l and out_l are a block's input and output in the second
    pass, and that term trains W1 alone. labels: indices (B,) or rows (B, C).
    Raises ValueError without a prompt or under activation checkpointing, whose second run would miss the feedback.
    """
    model = guide.model
    if getattr(model, "grad_checkpointing", False):
        raise ValueError(
            "activation checkpointing would run the blocks again without feedback: model.set_grad_checkpointing(False)"
        )
    first = model.forward_features(images)
    with read(model, layers="all", what=("tokens", "block_out")) as seen:
        second = guide.again(images, first, guide.rows(images, None))
    logits = [widen(model.forward_head(tokens)) for tokens in (first, second)]
    losses = [F.cross_entropy(each, labels, label_smoothing=smoothing) for each in logits]
    errors = [
        F.mse_loss(widen(decoder.linear(out.detach())), widen(into.detach()))
        for decoder, into, out in zip(
            guide.decoders, seen.tokens(prefix=True), seen.block_out(prefix=True), strict=True
        )
    ]
    error = torch.stack(errors).sum()
    total = (losses[0] + losses[1]) / 2 + reconstruction * error
    return GuideLoss(total, losses[0].detach(), losses[1].detach(), error.detach(), logits[1])
