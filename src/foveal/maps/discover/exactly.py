"""Products in full float32, whatever autocast and TensorFloat-32 say outside.

Cosines are compared with a threshold and a Krylov space is judged by its residual: ten bits do for neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exactly(like: Tensor) -> Iterator[None]:
    """No autocast on `like`'s device and no shortened float32 products in here; afterwards as before."""
    kind = like.device.type
    with torch.autocast(kind, enabled=False):
        backends = _backends()
        kept = [backend.fp32_precision for backend in backends]
        legacy = None if backends else torch.get_float32_matmul_precision()
        try:
            if legacy is not None:
                torch.set_float32_matmul_precision("highest")
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            if legacy is not None:
                torch.set_float32_matmul_precision(legacy)
            for backend, precision in zip(backends, kept, strict=True):
                backend.fp32_precision = precision


def _backends() -> list[Any]:
    """Where torch 2.9 and later keep a precision per kind of device, and refuse to mix it with the older way.

    None of an older torch.
    """
    backends: Any = torch.backends
    known = [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
    return [backend for backend in known if hasattr(backend, "fp32_precision")]
