"""Which tokens a model has besides its patches.

Order is always [class, distillation, registers ..., patches]; any of the first three may be missing. A register is not
a class token: `P > 0` says nothing about a class token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """Prefix tokens of one attention layer.

    prefix: P, number of tokens before the patches.  class_index, distillation_index: their place, or None.
    registers: places of the register tokens.
    """

    prefix: int
    class_index: int | None = None
    distillation_index: int | None = None
    registers: tuple[int, ...] = ()

    @classmethod
    def of(cls, *, has_class: bool, has_distillation: bool = False, prefix: int) -> TokenLayout:
        """Layout in the usual order: class, distillation, then registers up to `prefix`."""
        special = int(has_class) + int(has_distillation)
        return cls(
            prefix=prefix,
            class_index=0 if has_class else None,
            distillation_index=int(has_class) if has_distillation else None,
            registers=tuple(range(special, prefix)),
        )
