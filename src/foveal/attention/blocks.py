"""Which blocks of a model can be edited, and what stands in the way of those that cannot.

Tokens are mixed where a block is self-attention over one sequence of tokens that has the same places in every image.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from foveal.attention.anatomy import Layer, dissect
from foveal.attention.door import door_of
from foveal.attention.errors import UnsupportedModelError
from foveal.attention.layout import TokenLayout


class Blocks:
    """The self-attention blocks of a model, examined once.

    Raises UnsupportedModelError for a model without such blocks, or one that is compiled as a whole.
    """

    def __init__(self, model: nn.Module) -> None:
        if type(model).__name__ == "OptimizedModule":
            raise UnsupportedModelError(compiled("the model"))
        door = door_of(model)
        anatomy = dissect(model) if door is None else door.anatomy
        self.model, self.trunk = model, anatomy.trunk
        if "NaFlex" in anatomy.family:
            raise UnsupportedModelError(
                "images with patch grids of their own have no tokens at the same place: tokens of NaFlex models are "
                "not mixed"
            )
        if getattr(getattr(self.trunk, "patch_drop", None), "prob", 0.0):
            raise UnsupportedModelError("patch dropout leaves every image other places: set patch_drop_rate=0")
        self.layers = [anatomy.layers[i] for i in anatomy.choose("all")]
        for layer in self.layers:
            if layer.kind != "self":
                raise UnsupportedModelError(
                    f"{layer.name} attends in windows or mask units; tokens are mixed where all attend to all"
                )
        self._compiled = _touched_by_compiled(model, self.layers)

    @property
    def layout(self) -> TokenLayout:
        """Prefix tokens, the same in every block."""
        return self.layers[0].layout

    @property
    def width(self) -> int:
        """D of the tokens."""
        attention = self.layers[0].attention
        if isinstance(attention, nn.MultiheadAttention):
            return int(attention.embed_dim)
        return next(int(m.in_features) for m in attention.modules() if isinstance(m, nn.Linear))

    def position(self, block: int) -> int:
        """A block's number counted from 0; -1 is the last. Raises ValueError for one that is not there."""
        depth = len(self.layers)
        if not -depth <= block < depth:
            raise ValueError(f"block {block} but the model has {depth} blocks; use values in [-{depth}, {depth - 1}]")
        return block % depth

    def relative(self, block: int) -> str:
        """What makes a block's attention depend on where its tokens are; empty for absolute positions only."""
        attention = self.layers[block].attention
        name = type(attention).__name__
        if getattr(self.trunk, "rope", None) is not None or "Rope" in name or name.startswith("DINOv3"):
            return "rotary position embedding"
        tables = [
            n for n, _ in (*self.trunk.named_parameters(), *self.trunk.named_buffers()) if "relative_position" in n
        ]
        if tables or getattr(self.trunk, "rel_pos_bias", None) is not None:
            return "relative position bias"
        return ""

    def check_change(self, block: int) -> None:
        """Raise UnsupportedModelError, with the way out, for a block whose input cannot be replaced."""
        name = self.layers[block].name
        if sum(part.rpartition("_")[2].isdigit() for part in name.split(".")) > 1:
            raise UnsupportedModelError(f"{name} is one of several branches of a block: its input is not replaced")
        if block in self._compiled:
            raise UnsupportedModelError(compiled(name))

    def check_extend(self, block: int) -> None:
        """Raise UnsupportedModelError, with the way out, for a block to whose attention no tokens can be added."""
        layer = self.layers[block]
        if why := self.relative(block):
            raise UnsupportedModelError(
                f"{layer.name} of {type(self.trunk).__name__} has {why}: tokens of other blocks have no place in it, "
                "so vertical mixing needs absolute positions only (timm and torchvision ViTs, CCT, transformers ViT, "
                "DeiT, DINOv2); horizontal mixing works here"
            )
        if layer.attention is layer.block:
            raise UnsupportedModelError(f"{layer.name} has no attention module of its own to which tokens can be added")


def compiled(what: str) -> str:
    """What to do about a compiled part."""
    return (
        f"{what} is compiled, and compiled code passes by the hooks that change tokens: train uncompiled, or compile "
        "the other blocks one by one (block.compile()) and leave those that are mixed, and for vertical mixing all "
        "before them, as they are"
    )


def _touched_by_compiled(model: nn.Module, layers: Sequence[Layer]) -> set[int]:
    """Blocks that are compiled, lie in a compiled module or hold one."""
    compiled = [
        module
        for module in model.modules()
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
    ]
    around = {id(inner) for module in compiled for inner in module.modules()}
    own = {id(module) for module in compiled}
    return {
        i
        for i, layer in enumerate(layers)
        if id(layer.block) in around or any(id(part) in own for part in layer.block.modules())
    }
