"""foveal: attention-guided learning for vision transformers.

A vision transformer computes where it looks at every forward pass. foveal reads that attention off any ViT
exactly, with fused kernels left on, and uses it as a training signal.
"""

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
