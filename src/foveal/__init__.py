"""foveal: attention-guided learning for vision transformers.

A vision transformer computes where it looks at every forward pass. foveal reads that attention off any ViT
exactly, with fused kernels left on, and uses it as a training signal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveal.attention import (
        ReadError,
        Seen,
        Support,
        TokenLayout,
        UnsupportedModelError,
        attach,
        read,
        supported,
    )

__version__ = "0.1.0"

__all__ = [
    "ReadError",
    "Seen",
    "Support",
    "TokenLayout",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "read",
    "supported",
]

ROOMS = (
    "assets",
    "attention",
    "chance",
    "data",
    "evaluate",
    "explain",
    "maps",
    "mix",
    "models",
    "pretrain",
    "report",
    "stats",
    "train",
    "transfer",
)


def __getattr__(name: str) -> Any:
    """Rooms and the names of the door, imported when first used: `foveal --help` needs no torch."""
    if name in ROOMS:
        return import_module(f"foveal.{name}")
    if name in __all__:
        return getattr(import_module("foveal.attention"), name)
    raise AttributeError(f"module 'foveal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *ROOMS])
