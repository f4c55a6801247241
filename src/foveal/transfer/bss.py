"""BSS, batch spectral shrinkage: weaken the directions in which a batch's features hardly differ.

    L = L_task + eta * sum of the k smallest sigma_i(F)^2        Chen et al., 2019 (NeurIPS), section 4

F (B, D) is what enters the classifier, one row per image, with min(B, D) singular values sigma; small ones carry what
does not transfer, says the paper. Squared, they are the eigenvalues of the smaller of F F' and F' F, which is B x B and
cheap; their gradient 2 sigma_i u_i v_i' divides by no gap between values, as that of a whole decomposition does.

The term depends on the batch: several devices, or micro-batches that are accumulated, shrink each their own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from foveal.transfer.guide import Guide, Guided
from foveal.transfer.head import entering


def bss(features: Tensor, k: int = 1) -> Tensor:
    """Sum of the k smallest squared singular values of the features.

    features: (B, D).  k: at least 1; all values where there are fewer. One row has one, its squared norm.
    Returns a float32 scalar, float64 for float64. On an accelerator the eigenvalues wait for the device.
    Raises ValueError for features of another shape, without rows or columns, or k below 1.
    """
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features are {tuple(features.shape)}; one row per image is shrunk, (B, D)")
    if k < 1:
        raise ValueError(f"k={k}: give the number of singular values to shrink, 1 or more")
    with torch.autocast(features.device.type, enabled=False):
        F = features.to(torch.promote_types(torch.float32, features.dtype))  # half precision loses the small values
        gram = F @ F.mT if F.shape[0] <= F.shape[1] else F.mT @ F
        smallest: Tensor = torch.linalg.eigvalsh(gram)[:k].sum()  # ascending
    return smallest


class BSS(Guide):
    """Batch spectral shrinkage.

    weight: eta.  k: number of singular values.
    A batch of one image gives 0: its only singular value is the norm of its features, which is not to be shrunk. Of a
    distilled model the features of the class token's head count.
    Raises ValueError in `on` for a model without a classifier, ReadError where the classifier did not run once.
    """

    name: ClassVar[str] = "bss"

    def __init__(self, weight: float = 0.001, k: int = 1) -> None:
        super().__init__(weight)
        if k != int(k) or k < 1:
            raise ValueError(f"k={k}: give the number of singular values to shrink, 1 or more")
        self.k = int(k)

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """Listen to what enters the classifier of `model` inside the block; then ask `losses()`."""
        return _Guided(self, model, self.weight * relax)


class _Guided(Guided):
    """One forward that is listened to."""

    def __init__(self, guide: BSS, model: nn.Module, strength: float) -> None:
        super().__init__(guide.name, strength)
        self._k, self._model = guide.k, model

    def open(self) -> None:
        self._entered = entering(self._model, "BSS shrinks what enters it").__enter__()

    def close(self, *error: object) -> None:
        self._entered.__exit__(*error)

    def term(self) -> Tensor:
        features = self._entered.features
        if len(features) == 1:
            return features.new_zeros((), dtype=torch.promote_types(torch.float32, features.dtype))
        return bss(features, self._k)
