"""The weights that masked pre-training starts from.

Linear layers Xavier-uniform with zero bias, norms 1 and 0, the patch embedding Xavier-uniform on its (D, P) matrix with
PyTorch's default bias, tokens normal with deviation 0.02, position tables fixed.        He et al., 2022 (MAE)

Numbers are drawn on the CPU, in float32, from the generator that is given. What has no rule here (a learnt rotary
frequency) stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS = ("cls_token", "dist_token", "reg_token", "mask_token")


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator, skip: tuple[str, ...] = ()) -> None:
    """Give the parameters of `module` MAE's first values, in place. skip: names of children that are left alone."""
    for name, part in module.named_modules():
        if name.partition(".")[0] in skip:
            continue
        for own, parameter in part.named_parameters(recurse=False):
            value = first(part, own, parameter, generator)
            if value is not None:
                parameter.copy_(value)


def first(part: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor | None:
    """The first value of one parameter of `part`, float32 on the CPU; None where there is no rule."""
    fresh = torch.empty(parameter.shape)
    if name in TOKENS:
        return fresh.normal_(std=0.02, generator=generator)
    if isinstance(part, nn.Conv2d):  # the patch embedding
        if name == "weight":
            return nn.init.xavier_uniform_(fresh.flatten(1), generator=generator).view(parameter.shape)
        bound = float(part.weight[0].numel()) ** -0.5
        return fresh.uniform_(-bound, bound, generator=generator)
    if name.endswith("bias"):  # also the separate biases of queries and values in EVA
        return fresh.zero_()
    if isinstance(part, nn.Linear):
        return nn.init.xavier_uniform_(fresh, generator=generator)
    if name == "weight" and "norm" in type(part).__name__.lower():
        return fresh.fill_(1.0)
    scale = getattr(part, "init_values", None)  # layer scale
    return fresh.fill_(float(scale)) if name.startswith("gamma") and scale is not None else None
