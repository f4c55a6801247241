"""Feedback into a vision transformer's values: what comes down is added to V of every block, nothing else changes.

    R_D = c Z,   R_l = R_{l+1} W1_l,   F_l = sigma R_l W2_l,   v_l <- v_l + V(F_l)      Shi et al., 2023, section 4

Z are the normalised tokens of a first pass, c their gate, V(.) the value rows of the block's own projection. W1 and W2
are square, without bias, norm or non-linearity; sigma scales what is emitted, not what is passed on.

B batch, T tokens with prefix, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from foveal import chance
from foveal.maps.errors import MapModelError


class Decoder(nn.Module):
    """W1 (`linear`) and W2 (`linear2`) of one block, named as in AbSViT's checkpoints."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # without torch's own weights, which come from the global generator
        self.linear = skip_init(nn.Linear, width, width, bias=False)
        self.linear2 = skip_init(nn.Linear, width, width, bias=False)


class Decoders(nn.ModuleList):
    """One decoder per block, in the order of the blocks."""

    def __iter__(self) -> Iterator[Decoder]:
        return cast("Iterator[Decoder]", super().__iter__())

    def __init__(self, depth: int, width: int, seed: int | None = 0) -> None:
        """depth, width: of the model. seed: of weights that are normal with deviation 0.02; None: to be loaded."""
        super().__init__(Decoder(width) for _ in range(depth))
        if seed is not None:
            rng = chance.generator(seed, "init")
            with torch.no_grad():
                for weight in self.parameters():
                    weight.copy_(0.02 * torch.randn(weight.shape, generator=rng))

    @property
    def width(self) -> int:
        """D."""
        return int(next(self.parameters()).shape[0])

    def forward(self, gated: Tensor, sigma: float = 1.0) -> list[Tensor]:
        """Feedback F_l of every block from the gated tokens R_D: (B, T, D) to L tensors (B, T, D)."""
        out = []
        for decoder in reversed(list(self)):
            gated = decoder.linear(gated)
            out.append(sigma * decoder.linear2(gated))
        return out[::-1]


@dataclass(frozen=True)
class ValuePath:
    """The linear layer of one block whose outputs from `start` on are the values."""

    name: str
    linear: nn.Linear
    start: int

    def project(self, feedback: Tensor, bias: bool) -> Tensor:
        """Feedback (B, T, D) as values (B, T, D'), with the projection's bias or without."""
        own = self.linear.bias
        return F.linear(
            feedback, self.linear.weight[self.start :], own[self.start :] if bias and own is not None else None
        )


FUSED = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
SPLIT = ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")


def value_paths(model: nn.Module) -> list[ValuePath]:
    """Where the values of each block are made. Raises MapModelError, naming the block, for other attention modules."""
    blocks: Any = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise MapModelError(
            f"{type(model).__name__} has no blocks to feed back to: topdown fits timm's vision transformers"
        )
    return [_value_path(f"blocks.{i}.attn", getattr(block, "attn", None)) for i, block in enumerate(blocks)]


def _value_path(name: str, attention: Any) -> ValuePath:
    known = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(attention).__mro__]
    split = getattr(attention, "v_proj", None)
    fused = getattr(attention, "qkv", None)
    if any(one in SPLIT for one in known) and isinstance(split, nn.Linear):
        return ValuePath(f"{name}.v_proj", split, 0)
    if any(one in (*FUSED, *SPLIT) for one in known) and isinstance(fused, nn.Linear):
        if getattr(attention, "q_bias", None) is None:
            return ValuePath(f"{name}.qkv", fused, fused.out_features // 3 * 2)
        raise MapModelError(f"{name} keeps the bias of its fused projection apart, so feedback cannot be added to it")
    raise MapModelError(
        f"{name} is {type(attention).__name__}: feedback is added to the values of timm's Attention, AttentionRope and "
        "EvaAttention (with separate projections)"
    )


@contextmanager
def fed_back(paths: Sequence[ValuePath], feedback: Sequence[Tensor], *, bias: bool) -> Iterator[None]:
    """One forward in here has `feedback` added to its values. bias: the projection's bias is added once more.

    Raises MapModelError if a block's projection did not run exactly once.
    """
    ran = [0] * len(paths)

    def adds(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            ran[index] += 1
            path = paths[index]
            extra = path.project(feedback[index], bias).to(output.dtype)
            if path.start == 0:
                return output + extra
            return torch.cat([output[..., : path.start], output[..., path.start :] + extra], dim=-1)

        return hook

    with ExitStack() as stack:
        for index, path in enumerate(paths):
            stack.callback(path.linear.register_forward_hook(adds(index)).remove)
        yield
    for path, count in zip(paths, ran, strict=True):
        if count != 1:
            raise MapModelError(f"{path.name} ran {count} times in the pass with feedback; exactly once is needed")
