"""What of a model can be read, and where: the allow-list of model families.

A model is searched for one *trunk* (the module that owns the tokens) and, inside it, for attention modules of known
types. Both are recognised by class name, so that no library is imported for its type alone and anything else is refused
by name instead of being read wrongly: windows that pose as a batch, talking heads, channel attention.

A newcomer adds a family here: a row in TRUNKS (who owns the tokens), rows in ATTENTIONS (who computes attention).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveal.attention.errors import UnsupportedModelError
from foveal.attention.layout import TokenLayout

ROWS = ("class_logits", "received", "patch_received", "mean_query", "full", "factors")
PARTS = ("queries", "keys", "values", "tokens", "attn_out", "block_out")
WHAT = ROWS + PARTS


@dataclass(frozen=True)
class Layer:
    """One attention layer that can be read.

    name: of its block, or of the module itself for pooling heads.  kind: `self` (all tokens ask all), `class` (only the
    class token asks), `pool` (a latent query asks), `window` (Swin), `global` (Hiera).  what: the values it offers.
    """

    name: str
    kind: str
    attention: nn.Module
    block: nn.Module
    layout: TokenLayout
    what: tuple[str, ...]
    before_rotation: tuple[nn.Module, nn.Module] | None = None  # modules whose outputs are q and k before rotation
    reorder: Callable[[Tensor], Tensor] | None = None  # (..., N) columns to row-major order
    grid: tuple[int, int] | None = None  # fixed grid where the patch embedding does not tell


@dataclass(frozen=True)
class Anatomy:
    """The readable layers of a model, in the order of the forward."""

    family: str
    trunk: nn.Module
    stem: nn.Module  # its output (B, D, h, w) tells the grid of this forward
    layers: tuple[Layer, ...]
    refused: tuple[str, ...] = field(default=())  # blocks that exist but cannot be read, with the reason

    def blocks(self) -> list[int]:
        """Positions of the layers that integers count: self-attention blocks, not pooling heads or class blocks."""
        return [i for i, layer in enumerate(self.layers) if layer.kind in ("self", "window", "global")]

    def choose(self, layers: int | str | list[int | str] | tuple[int | str, ...] | range) -> list[int]:
        """Positions of the asked layers. Integers count self-attention blocks; names reach every layer."""
        if layers == "all":
            return self.blocks() or self._none()
        asked = [layers] if isinstance(layers, int | str) else list(layers)
        if not asked:
            raise ValueError("no layer asked: give at least one, for instance layers=-1 or layers='all'")
        return [self._position(one) for one in asked]

    def _position(self, one: int | str) -> int:
        names = [layer.name for layer in self.layers]
        if isinstance(one, str):
            if one not in names:
                near = difflib.get_close_matches(one, names, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"layer {one!r} is not in the model; {hint}there are {', '.join(names)}")
            return names.index(one)
        blocks = self.blocks() or self._none()
        if not -len(blocks) <= one < len(blocks):
            raise ValueError(
                f"layers={one} but the model has {len(blocks)} readable self-attention blocks; "
                f"use values in [-{len(blocks)}, {len(blocks) - 1}] or a name: {', '.join(names)}"
            )
        return blocks[one]

    def _none(self) -> list[int]:
        raise UnsupportedModelError(
            "no self-attention block of this model can be read"
            + (f" ({self.refused[0]})" if self.refused else "")
            + f"; ask by name for one of: {', '.join(layer.name for layer in self.layers)}"
        )


# attention modules: full class name -> (kind, has modules q_norm and k_norm that see q and k before rotation)
ATTENTIONS: dict[str, tuple[str, bool]] = {
    "timm.layers.attention.Attention": ("self", True),
    "timm.models.vision_transformer.Attention": ("self", True),
    "timm.layers.attention.AttentionRope": ("self", True),
    "timm.models.vision_transformer.ParallelScalingBlock": ("self", False),
    "timm.models.eva.EvaAttention": ("self", True),
    "timm.models.beit.Attention": ("self", False),
    "timm.models.cait.ClassAttn": ("class", False),
    "timm.layers.attention_pool.AttentionPoolLatent": ("pool", True),
    "timm.models.swin_transformer.WindowAttention": ("window", False),
    "timm.models.swin_transformer_v2.WindowAttention": ("window", False),
    "timm.models.hiera.MaskUnitAttention": ("global", False),
    "torch.nn.modules.activation.MultiheadAttention": ("self", False),
    "foveal.models.pooling.SequencePool": ("score", False),  # a pool whose query is a weight: no projections to read
}
# attention of transformers models, by class name alone (their modules move between versions)
HF_ATTENTIONS = (
    "ViTSelfAttention", "ViTAttention", "DeiTSelfAttention", "DeiTAttention",
    "Dinov2SelfAttention", "Dinov2Attention", "Dinov2WithRegistersSelfAttention", "Dinov2WithRegistersAttention",
    "DINOv3ViTAttention", "CLIPAttention", "CLIPSdpaAttention", "SiglipAttention", "SiglipSdpaAttention",
    "BeitSelfAttention", "BeitSdpaSelfAttention", "BeitAttention",
)  # fmt: skip
REFUSED = {
    "TalkingHeadAttn": "talking heads mix the heads around the softmax",
    "DiffAttention": "differential attention subtracts two maps",
    "DiffParallelScalingBlock": "differential attention subtracts two maps",
}


def _names(module: nn.Module) -> list[str]:
    """Full class names along the inheritance, nearest first: a subclass of a known class is known."""
    return [f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__]


def _timm_layout(trunk: nn.Module) -> TokenLayout:
    owner = getattr(trunk, "embeds", trunk)  # NaFlex keeps its tokens in its embedding
    return TokenLayout.of(
        has_class=getattr(owner, "cls_token", None) is not None,
        has_distillation=getattr(owner, "dist_token", None) is not None,
        prefix=int(getattr(trunk, "num_prefix_tokens", 0)),
    )


def _hf_layout(trunk: nn.Module) -> TokenLayout:
    embeddings = next(m for name, m in trunk.named_modules() if name.rpartition(".")[2] == "embeddings")
    has_class = hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")
    has_distillation = getattr(embeddings, "distillation_token", None) is not None
    registers = getattr(embeddings, "register_tokens", None)
    count = int(registers.shape[1]) if isinstance(registers, Tensor) else 0
    return TokenLayout.of(
        has_class=has_class, has_distillation=has_distillation, prefix=has_class + has_distillation + count
    )


def _no_prefix(trunk: nn.Module) -> TokenLayout:
    return TokenLayout(prefix=0)


def _class_only(trunk: nn.Module) -> TokenLayout:
    return TokenLayout(prefix=1, class_index=0)


# who owns the tokens: class name -> (family, layout). transformers' names carry no module path.
TRUNKS: dict[str, tuple[str, Callable[[nn.Module], TokenLayout]]] = {
    "timm.models.vision_transformer.VisionTransformer": ("timm ViT", _timm_layout),
    "timm.models.eva.Eva": ("timm EVA, DINOv3, PE", _timm_layout),
    "timm.models.beit.Beit": ("timm BEiT", _timm_layout),
    "timm.models.naflexvit.NaFlexVit": ("timm NaFlex", _timm_layout),
    "timm.models.cait.Cait": ("timm CaiT", _class_only),
    "timm.models.swin_transformer.SwinTransformer": ("timm Swin", _no_prefix),
    "timm.models.swin_transformer_v2.SwinTransformerV2": ("timm SwinV2", _no_prefix),
    "timm.models.hiera.Hiera": ("timm Hiera", _no_prefix),
    "torchvision.models.vision_transformer.VisionTransformer": ("torchvision ViT", _class_only),
    "foveal.models.compact.CompactTransformer": ("foveal CCT, CVT, ViT-Lite", _timm_layout),
    "ViTModel": ("transformers ViT", _hf_layout),
    "DeiTModel": ("transformers DeiT", _hf_layout),
    "Dinov2Model": ("transformers DINOv2", _hf_layout),
    "Dinov2WithRegistersModel": ("transformers DINOv2 with registers", _hf_layout),
    "DINOv3ViTModel": ("transformers DINOv3", _hf_layout),
    "CLIPVisionModel": ("transformers CLIP vision", _hf_layout),
    "CLIPVisionTransformer": ("transformers CLIP vision", _hf_layout),
    "SiglipVisionModel": ("transformers SigLIP vision", _hf_layout),
    "SiglipVisionTransformer": ("transformers SigLIP vision", _hf_layout),
    "BeitModel": ("transformers BEiT", _hf_layout),
}
FAMILIES = tuple(dict.fromkeys(family for family, _ in TRUNKS.values()))


def _trunk_row(module: nn.Module) -> tuple[str, Callable[[nn.Module], TokenLayout]] | None:
    for name in _names(module):
        row = TRUNKS.get(name)
        if row is None and name.startswith("transformers."):
            row = TRUNKS.get(name.rpartition(".")[2])
        if row is not None:
            return row
    return None


def _attention_row(module: nn.Module) -> tuple[str, bool] | None:
    for name in _names(module):
        if name in ATTENTIONS:
            return ATTENTIONS[name]
        if name.startswith("transformers.") and name.rpartition(".")[2] in HF_ATTENTIONS:
            return ("self", False)
    return None


def _outermost(model: nn.Module, match: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Matching modules that lie in no other matching module."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if match(module):
            yield name, module
            return
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", model)


def find_trunk(model: nn.Module) -> nn.Module:
    """The one module of `model` that owns the tokens. Raises UnsupportedModelError if there is none, or several."""
    found = list(_outermost(model, lambda m: _trunk_row(m) is not None))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a model that foveal can read exactly; supported are {'; '.join(FAMILIES)}"
        )
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} vision transformers: "
            f"{', '.join(name for name, _ in found)}; pass the one to read"
        )
    return found[0][1]


def dissect(model: nn.Module) -> Anatomy:
    """Find the readable attention layers of a model.

    Raises UnsupportedModelError, naming the reason and what is supported.
    """
    trunk = find_trunk(model)
    row = _trunk_row(trunk)
    assert row is not None
    family, layout_of = row
    layout = layout_of(trunk)
    layers: list[Layer] = []
    refused: list[str] = []
    for name, module in trunk.named_modules():
        kind_row = _attention_row(module)
        if kind_row is None:
            if type(module).__name__ in REFUSED:
                refused.append(f"{name}: {REFUSED[type(module).__name__]}")
            continue
        if any(_attention_row(m) is not None for m in module.modules() if m is not module):
            continue  # a wrapper: the attention is computed inside
        layer = _layer(trunk, family, layout, name, module, *kind_row)
        if isinstance(layer, str):
            refused.append(f"{name}: {layer}")
        else:
            layers.append(layer)
    if not layers:
        why = refused[0] if refused else "it has no attention module of a known type"
        raise UnsupportedModelError(
            f"{type(trunk).__name__} cannot be read: {why}; supported are {'; '.join(FAMILIES)}"
        )
    return Anatomy(family, trunk, _stem(trunk), tuple(layers), tuple(refused))


def _layer(
    trunk: nn.Module,
    family: str,
    layout: TokenLayout,
    name: str,
    module: nn.Module,
    kind: str,
    has_norms: bool,
) -> Layer | str:
    """The layer at an attention module, or the reason why it cannot be read."""
    block_name, block = _block(trunk, name, module)
    parent = trunk.get_submodule(name.rpartition(".")[0]) if name else trunk
    if kind == "score":
        return Layer(name, "pool", module, module, layout, ("class_logits", "full"))
    if kind == "pool" or "PoolingHead" in type(parent).__name__:
        kind = "pool"
        return Layer(name, kind, module, module, layout, ("class_logits", "full", "queries", "keys", "values"))
    if kind == "class":
        what = ("class_logits", "full", "queries", "keys", "values")
        return Layer(block_name, kind, module, block, layout, what)
    if kind == "window":
        return Layer(block_name, kind, module, block, layout, ("received", "patch_received"))
    if kind == "global":
        return _hiera_layer(trunk, block_name, module, block, layout)
    rotation: tuple[nn.Module, nn.Module] | None = None
    if has_norms:
        rotation = (module.q_norm, module.k_norm)  # type: ignore[assignment]
    elif type(module).__name__.startswith("DINOv3"):
        rotation = (module.q_proj, module.k_proj)  # type: ignore[assignment]
    missing: tuple[str, ...] = ()
    if type(module).__name__ == "ParallelScalingBlock":  # attention and MLP share a projection
        missing = ("attn_out",)
    elif _is_branch(trunk, block_name):  # what leaves it is a part of what leaves the block
        missing = ("block_out",)
    offered = tuple(name for name in WHAT if name not in missing)
    return Layer(block_name, kind, module, block, layout, offered, rotation)


def _is_branch(trunk: nn.Module, name: str) -> bool:
    """Whether a layer is one of several attentions side by side in a block, blocks.0.attns.1."""
    above = name.split(".")[:-2]
    return bool(above) and type(trunk.get_submodule(".".join(above))).__name__ == "ParallelThingsBlock"


def _block(trunk: nn.Module, name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The transformer block around an attention module: nearest ancestor that is an item of a list of blocks."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1].isdigit():
            path = ".".join(parts[:end])
            return path, trunk.get_submodule(path)
    for end in range(len(parts), 0, -1):  # torchvision names its blocks encoder_layer_0
        if parts[end - 1].rpartition("_")[2].isdigit():
            path = ".".join(parts[:end])
            return path, trunk.get_submodule(path)
    return name, module


def _hiera_layer(trunk: nn.Module, name: str, module: nn.Module, block: nn.Module, layout: TokenLayout) -> Layer | str:
    if getattr(module, "use_mask_unit_attn", False):
        return "mask units attend within themselves; only Hiera's global blocks are read"
    index = int(name.rpartition(".")[2])
    before = max(index - 1, 0)  # keys arrive in the order that the previous block left
    size = tuple(int(n) for n in trunk.reroll.schedule[before][1])  # type: ignore[union-attr,index]

    def reorder(x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        rolled = trunk.reroll(x.reshape(-1, x.shape[-1], 1), before)  # type: ignore[operator]
        return rolled.reshape(*lead, -1)  # type: ignore[no-any-return]

    what = ("received", "patch_received", "mean_query")
    return Layer(name, "global", module, block, layout, what, None, reorder, size)  # type: ignore[arg-type]


STEMS = (
    "patch_embed.proj",
    "patch_embed.conv_layers",
    "conv_proj",
    "embeddings.patch_embeddings.projection",
    "embeddings.patch_embeddings",
    "embeddings.patch_embedding",
    "vision_model.embeddings.patch_embedding",
    "embeds",
)


def _stem(trunk: nn.Module) -> nn.Module:
    """The module whose call tells the grid: its output is (B, D, h, w); NaFlex's embedding is asked for coordinates."""
    for path in STEMS:
        try:
            module = trunk.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.Conv2d) or path in ("patch_embed.conv_layers", "conv_proj", "embeds"):
            return module
    raise UnsupportedModelError(
        f"the patch embedding of {type(trunk).__name__} is no convolution, so its patch grid is not known"
    )


def grid_of(output: object) -> tuple[int, int] | None:
    """(h, w) of a convolution's output (B, D, h, w)."""
    if isinstance(output, torch.Tensor) and output.dim() == 4:
        return int(output.shape[-2]), int(output.shape[-1])
    return None
