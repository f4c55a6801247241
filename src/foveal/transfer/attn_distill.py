"""AttnDistill: the class token of a small model learns to look where that of another, maybe bigger model looks.

    L = L_task + 0.1 * KL(teacher || student)          last block's class row, after softmax        Wang et al., 2022

If the grids differ the teacher's patches are resized to the student's; if the numbers of heads differ the heads of each
are merged, softmax_j( 1/T sum_h log p_hj ). Wang, Yang, van de Weijer: BMVC 2022 (arXiv 2210.00944); weight 0.1 and
T = 10 are those of their training script. They add a squared error of the class features, which is not part of this.

B batch, H heads, N patches, h x w patch grid. A row is [class column, patches], (B, H, 1 + N), and sums to 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal import attention
from foveal.attention.anatomy import dissect
from foveal.attention.door import bare, door_of
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.source import Source

FLOOR, CEILING = 1e-5, 0.996
TEMPERATURE = 10.0


def class_row(logits: Tensor, patches: int) -> Tensor:
    """Class row as probabilities over the class token and the patches.

    logits: (B, H, T) over all tokens, the class token first.  patches: N; the tokens between are registers or a
    distillation token, which another model need not have: they are left out and the rest is normalised without them.
    Returns (B, H, 1 + N), float32 or wider.
    """
    kept = torch.cat([logits[..., :1], logits[..., -patches:]], -1)
    return kept.to(torch.promote_types(torch.float32, kept.dtype)).softmax(-1)


def to_grid(row: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A row on another grid: patches resized bicubically, then scaled to 1 minus the class column.

    row: (B, H, 1 + h w).  old, new: (h, w).  Returns (B, H, 1 + h' w'). Bicubic interpolation overshoots: single
    patches may come out at or below 0.
    """
    column, patches = row[..., :1], row[..., 1:].unflatten(-1, old)
    resized = F.interpolate(patches, size=new, mode="bicubic", align_corners=False).flatten(-2)
    return torch.cat([column, resized * ((1 - column) / resized.sum(-1, keepdim=True))], -1)


def merge_heads(row: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """One row for all heads: softmax over columns of 1/T times the sum over heads of the logarithms.

    row: (B, H, M) probabilities; what is not positive (overshoot, underflow) counts as 1e-5. Returns (B, M).
    """
    return (torch.where(row > 0, row, FLOOR).log().sum(-2) / temperature).softmax(-1)


def clamped(row: Tensor) -> Tensor:
    """Rows clamped to [1e-5, 0.996] and scaled to sum 1."""
    return F.normalize(row.clamp(FLOOR, CEILING), p=1.0, dim=-1)


def attn_distill_loss(
    student: Tensor,
    teacher: Tensor,
    student_grid: tuple[int, int],
    teacher_grid: tuple[int, int],
    temperature: float = TEMPERATURE,
) -> Tensor:
    """KL(teacher || student), summed over columns (and heads, where they are as many), mean over images.

    student: (B, H, 1 + h w) probabilities.  teacher: the same with its own heads and grid. Returns a scalar in float32
    or wider; no gradient to the teacher. Raises ValueError where the images differ in number or a row does not fit its
    grid.
    """
    for name, row, (h, w) in (("student", student, student_grid), ("teacher", teacher, teacher_grid)):
        if row.dim() != 3 or row.shape[-1] != 1 + h * w:
            raise ValueError(
                f"the {name}'s rows are {tuple(row.shape)}, expected (images, heads, 1 + {h} x {w}): patch dropout "
                "removes tokens (set patch_drop_rate=0), or the grid is another row's"
            )
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} images of the student against {len(teacher)} of the teacher")
    wide = torch.promote_types(torch.promote_types(torch.float32, student.dtype), teacher.dtype)
    s, t = student.to(wide), teacher.detach().to(wide)
    if teacher_grid != student_grid:
        t = to_grid(t, teacher_grid, student_grid)
    if s.shape[1] != t.shape[1]:
        s, t = merge_heads(s, temperature), merge_heads(t, temperature)
    return F.kl_div(clamped(s).log(), clamped(t), reduction="batchmean")


class AttnDistill(Guide):
    """Attention distillation from a source that may be another architecture.

    source: a model with a class token that can be read, copied and frozen: bigger, with other patches or heads.
    weight: 0.1.  temperature: T, where the numbers of heads differ.

    The source sees the same images, normalised for the model that is tuned; one whose patch embedding insists on its
    own input size gets them resized to it (bilinear, antialiased). Registers and distillation tokens of either model
    are left out of its row before it is normalised.

    Raises UnsupportedModelError or ValueError if the source has no class row that can be read, and in the first forward
    where the model has none.
    """

    name: ClassVar[str] = "attn_distill"

    def __init__(self, source: nn.Module | None, weight: float = 0.1, *, temperature: float = TEMPERATURE) -> None:
        super().__init__(weight)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: it divides logarithms, so it is positive")
        self.temperature = temperature
        self.frozen = Source(source)
        self.frozen.check(-1, "class_logits")
        self._size = None if self.frozen.model is None else input_size(self.frozen.model)

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """Guide the forward of `model` on `images` inside the block; then ask `losses()`."""
        return _Guided(self, model, images, self.weight * relax)

    def fitted(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in the size that the source insists on, if it does."""
        if self._size is None or tuple(images.shape[-2:]) == self._size:
            return images
        return F.interpolate(images, size=self._size, mode="bilinear", align_corners=False, antialias=True)


class _Guided(Guided):
    """One guided forward."""

    def __init__(self, guide: AttnDistill, model: nn.Module, images: Tensor, strength: float) -> None:
        super().__init__(guide.name, strength)
        self._guide, self._model, self._images = guide, model, images

    def open(self) -> None:
        guide = self._guide
        look = guide.frozen.look(guide.fitted(self._images), -1, "class_logits", self._model)
        self._teacher, self._teacher_grid = _row(look), look.grid
        self._seen = attention.read(self._model, -1, "class_logits").__enter__()

    def close(self, *error: object) -> None:
        self._seen.__exit__(*error)  # type: ignore[arg-type]

    def term(self) -> Tensor:
        student, teacher = _row(self._seen), self._teacher
        grid = self._seen.grid
        return attn_distill_loss(student, teacher, grid, self._teacher_grid, self._guide.temperature)


def _row(look: Any) -> Tensor:
    return class_row(look.class_logits(prefix=True), look.class_logits().shape[-1])


# transformers models that take any size interpolate their positions; these raise for any size but their own
FIXED = {
    "transformers ViT",
    "transformers DeiT",
    "transformers CLIP vision",
    "transformers SigLIP vision",
    "transformers BEiT",
}


def input_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) of the only input that a model's patch embedding takes; None if it takes others too."""
    model = bare(model)
    door = door_of(model)
    anatomy = dissect(model) if door is None else door.anatomy
    trunk: Any = anatomy.trunk
    size: Any = None
    if anatomy.family in FIXED:
        size = trunk.config.image_size
    elif anatomy.family == "torchvision ViT":
        size = trunk.image_size
    elif getattr(getattr(trunk, "patch_embed", None), "strict_img_size", False):
        size = trunk.patch_embed.img_size
    if size is None:
        return None
    h, w = (size, size) if isinstance(size, int) else size
    return int(h), int(w)
