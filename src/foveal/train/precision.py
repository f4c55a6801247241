"""Which arithmetic the forward runs in: float32, or autocast to a 16-bit type where that is faster.

`auto` looks at the hardware and the model, not at a clock: the same command gives the same arithmetic each time.

Measured with benchmarks/precision.py, a training step in bfloat16 over one in float32 (median of 7, one thread of
an AMD EPYC with AVX512-BF16, torch 2.15): width 64 1.09, width 128 0.92, width 192 0.67 to 0.75, width 384 0.60.
On a CPU with AMX the forward of a ViT-S is three times as fast, while the backward of a model of width 64 is slower.
"""

import torch
from torch import nn

from foveal.train.errors import SettingsError

CHOICES = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}  # Lightning's names

# Width D from which a whole training step gains on every CPU tried that multiplies bfloat16 in hardware.
CPU_WIDTH = 192


def choose(precision: str, device: torch.device, model: nn.Module) -> str:
    """float32, bfloat16 or float16 for a run. precision: one of these, or "auto".

    auto: bfloat16 on a GPU that has it; on a CPU bfloat16 when it has tile or dot-product units for it (AMX,
    AVX512-BF16) and the model is wide enough to use them; else float32.
    Raises SettingsError for float16 where it cannot train.
    """
    if precision == "float16" and device.type == "cpu":
        raise SettingsError("precision=float16 has no loss scaling on the CPU: use bfloat16 or float32")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu" and has_bfloat16_units() and width(model) >= CPU_WIDTH:
        return "bfloat16"
    return "float32"


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    cpu = torch.cpu
    asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private: absent means unknown, so no
    return any(bool(getattr(cpu, ask)()) for ask in asks if hasattr(cpu, ask))


def width(model: nn.Module) -> int:
    """Width D of the model's tokens."""
    return int(getattr(model, "embed_dim", 0) or getattr(model, "num_features", 0))
