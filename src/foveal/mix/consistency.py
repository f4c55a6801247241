"""Consistency: the prediction for a mixed image is that for its two parts, mixed by the label's weights.

    L_con = 1/B sum_i KL( softmax(w_i L_i + (1 - w_i) L_p(i))  ||  softmax(q_i) )

L are the logits of the clean images, in evaluation and without gradient; q those of the mixed images in training.
Logits are mixed before the softmax, without temperature. From SMMix (Chen et al., 2023), also in TdAttenMix (arXiv
2501.15409).

B batch, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.attention.door import bare
from foveal.maps import Found, Source
from foveal.maps.asking import asking
from foveal.mix.mixed import Mixed


def consistency_loss(clean: Tensor, logits: Tensor, mixed: Mixed) -> Tensor:
    """Mean KL divergence from the mixed clean predictions to the predictions: a scalar in float32 (float64 stays).

    clean: (B, C) logits of the unmixed images; no gradient flows through them.  logits: (B, C) of the mixed ones.
    """
    if clean.shape != logits.shape:
        raise ValueError(
            f"the model gives logits {tuple(logits.shape)} for mixed images but {tuple(clean.shape)} for the clean ones"
        )
    aim = mixed.mix_labels(_wide(clean.detach())).log_softmax(-1)
    return F.kl_div(_wide(logits).log_softmax(-1), aim, reduction="batchmean", log_target=True)


def clean_logits(model: nn.Module, images: Tensor, source: Source, found: Found) -> Tensor:
    """Logits (B, C) of the unmixed images: those of the map's forward where it was the model's own, else one more.

    The extra forward is in evaluation, without gradient, and not seen by readers; the model is left as it was.
    """
    if found.logits is not None and source.model is not None and bare(source.model) is bare(model):
        return found.logits
    with asking(model):
        out = model(images)
    clean: Tensor = getattr(out, "logits", out)
    return clean.float()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
