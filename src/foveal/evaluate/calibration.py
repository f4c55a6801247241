"""Expected calibration error: how far a model's confidence is from how often it is right.

    ECE = sum_b n_b / N |accuracy_b - confidence_b|        bins [k/15, (k+1)/15) of the largest probability

Guo et al., 2017, computed by torchmetrics.
"""

import math

from torch import Tensor

from foveal.evaluate.accuracy import some

BELOW_ONE = 1.0 - 2.0**-24  # the last float32 before 1


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """In [0, 1]; 0 where every bin is right as often as it says.

    logits: (N, C), any float type.  labels: (N,) int64.  bins: of equal width; a confidence of 1 is in the last one.
    NaN if a logit is NaN: a model that has diverged has no confidence. Raises ValueError for no images, for lengths
    that differ and for no bins.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes a second to import

    some(labels)
    if logits.dim() != 2 or len(logits) != len(labels) or bins < 1:
        raise ValueError(f"logits {tuple(logits.shape)}, {len(labels)} labels, bins={bins}: (N, C), N and 1 or more")
    # probabilities, since torchmetrics takes logits that happen to lie in [0, 1] for such
    probabilities = logits.float().softmax(-1).clamp_max(BELOW_ONE)
    if bool(probabilities.isnan().any()):
        return math.nan
    error: Tensor = multiclass_calibration_error(
        probabilities, labels, num_classes=logits.shape[1], n_bins=bins, validate_args=False
    )
    return float(error)
