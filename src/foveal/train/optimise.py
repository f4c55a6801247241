"""The optimiser, with a learning rate per block, and its schedule.

    lr(step, block) = lr * layer_decay^(blocks above it) * warm-up and cosine(step)         Bao et al., 2022 (BEiT)

timm's parameter groups carry the block's factor as `lr_scale`, which torch's optimisers and schedulers ignore:
here it is part of each group's learning rate at every step.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from foveal.transfer.head import classifiers


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, head_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Optimiser groups of a timm model, each with `lr_scale` = layer_decay^(layers below the head) and `name`.

    Biases, norms and the parameters that the model names (position embeddings, tokens) are not decayed. The new
    classifier is `head_lr_factor` times as fast. Frozen parameters are left out.
    """
    from timm.optim import param_groups_layer_decay

    spared: set[str] = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay=weight_decay, layer_decay=layer_decay, no_weight_decay_list=list(spared)
    )
    if head_lr_factor == 1.0:
        return groups
    head = {id(p) for part in classifiers(model) for p in part.parameters()}
    split: list[dict[str, Any]] = []
    for group in groups:
        for fast in (False, True):
            params = [p for p in group["params"] if (id(p) in head) == fast]
            if params:
                factor = head_lr_factor if fast else 1.0
                split.append(group | {"params": params, "lr_scale": group["lr_scale"] * factor})
    return split


def shape(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at optimiser step `step` of `steps`: linear warm-up, then cosine to 0.

    The first step already moves: with W warm-up steps step k gives (k + 1) / W; without, step 0 gives 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, share: float) -> None:
    """Give each group its learning rate for the coming step: lr * share * its own lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * share * group["lr_scale"]


class Average:
    """Exponential moving average of a model's parameters; buffers are copied.

        average <- d * average + (1 - d) * weights,    d = min(decay, (1 + k) / (10 + k)) after k updates

    It lives beside the model, not inside: no copy in the module tree, checkpoints hold it once by name.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model` after an optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        moving: list[Tensor] = []
        towards: list[Tensor] = []
        for name, tensor in model.state_dict().items():
            own = self.weights[name] = self.weights[name].to(tensor.device)
            if own.is_floating_point():
                moving.append(own)
                towards.append(tensor.detach())
            else:
                own.copy_(tensor)
        torch._foreach_lerp_(moving, towards, 1 - decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"updates": self.updates, "weights": self.weights}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.updates, self.weights = int(state["updates"]), dict(state["weights"])
