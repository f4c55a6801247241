"""LoRA: frozen weights, each with a trained difference of low rank beside it.

    W x + (alpha / r) B A x          A (r, in) Kaiming-uniform, B (out, r) zero: at the start nothing has changed
                                                                                      Hu et al., 2022 (arXiv 2106.09685)

The adapters are peft's (pip install "foveal[lora]"), put into the timm model itself: its class, its forward and its
attention are what they were. timm's EVA, BEiT and SwinV2 multiply with `qkv.weight` without calling `qkv`, so an
adapter there would never run: they are told to call it, and every adapter is asked for a gradient before training.

With its adapters off the model is the pre-trained network but for the classifier, which is trained in place and
stays as it is: guides that compare attention or tokens with the source do not see it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveal.chance import seeded
from foveal.data.config import image_config
from foveal.maps.asking import asking
from foveal.transfer.tuned import Chosen, classifier_names, train_only

SPLIT = ("q_proj", "k_proj", "v_proj")  # what "qkv" is where a block has three
FUSED = "qkv_was_not_called"  # mark on an attention whose qkv_bias_separate was set here


def inject(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 8,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ("qkv",),
    *,
    seed: int = 0,
) -> Chosen:
    """Add adapters to a timm `model` in place; they and the classifier are trained, all else is frozen.

    rank: r.  alpha: scale, times r.  dropout: of the adapters' input, in [0, 1), drawn from torch's generator.
    targets: linear layers of the blocks, by the end of their name: "qkv" (also q_proj, k_proj, v_proj where a block has
    these instead), "proj", "fc1", "attn.proj".  seed: of the start of A.
    One image of zeros goes forward and backward, without trace, to see that each adapter is reached.
    Raises ImportError without peft, ValueError for values that cannot be, a target that no block has, a model that is
    adapted already, and adapters that get no gradient; then the model is as it was.
    """
    if rank < 1 or not 0 < alpha < float("inf") or not 0 <= dropout < 1:
        raise ValueError(f"rank={rank} is 1 or more, alpha={alpha} above 0, dropout={dropout} in [0, 1)")
    if is_adapted(model):
        raise ValueError("the model has adapters already: inject them once, into the model as it was loaded")
    peft = _peft()
    modules = target_modules(model, targets)
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, bias="none")
    head = set(classifier_names(model))
    try:
        _call_qkv(model, modules)
        with seeded(seed, "init", 2):  # peft's start of A takes no generator
            peft.inject_adapter_in_model(config, model)
        for _, layer in _adapted(model):
            layer.train(layer.base_layer.training)  # new modules begin in training, whatever the model does
        names = [name for name, _ in model.named_parameters()]
        chosen = Chosen(
            tuple(name for name in names if name in head or _is_adapter(name)),
            tuple(name for name in names if not (name in head or _is_adapter(name))),
        )
        train_only(model, chosen)
        if unreached := _unreached(model):
            raise ValueError(
                f"adapters would not train: {type(model).__name__} does not call {', '.join(unreached)}, or no path"
                " leads from there to the logits; choose other targets, for instance proj, fc1, fc2"
            )
    except BaseException:
        _eject(model)
        for parameter, flag in needs:
            parameter.requires_grad_(flag)
        raise
    return chosen


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters, on or off."""
    return any(True for _ in _adapted(model))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The network of before the tuning: adapters are off inside the block, and as they were after it.

    Blocks may be nested. The classifier is the tuned one. Raises ValueError for a model without adapters.
    """
    layers = [layer for _, layer in _adapted(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters to switch off: inject them first")
    before = [(layer, bool(layer.disable_adapters)) for layer in layers]
    needs = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, off in before:
            layer.enable_adapters(not off)
        for parameter, flag in needs:  # switching sets them too
            parameter.requires_grad_(flag)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model with W + (alpha / r) B A in place of W: names, order and types as before injection.

    Sums are float32 or wider. Tensors that have no adapter are the model's own, as in `state_dict`; the model is left
    alone. One without adapters gives its state as it is.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in _adapted(model):
        weight = layer.base_layer.weight.detach()
        total = weight.to(torch.promote_types(torch.float32, weight.dtype))
        for adapter, scale in layer.scaling.items():
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            total = total + scale * (up.to(total.dtype) @ down.to(total.dtype))
        state[_inside(name, "base_layer.weight")] = total.to(weight.dtype)
    bases = tuple(_inside(name, "base_layer.") for name, _ in _adapted(model))
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        base = next((base for base in bases if name.startswith(base)), None)
        if base is not None:
            name = base.removesuffix("base_layer.") + name.removeprefix(base)
        elif _is_adapter(name):
            continue
        plain[name] = tensor
    return plain


def target_modules(model: nn.Module, targets: str | Sequence[str] = ("qkv",)) -> list[str]:
    """Names of the linear layers of the blocks that end in a target. Raises ValueError where a target has none."""
    head = {name.rpartition(".")[0] for name in classifier_names(model)}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in head and any(part.isdigit() for part in name.split("."))
    ]
    asked = [targets] if isinstance(targets, str) else list(targets)
    if not asked:
        raise ValueError("targets is empty: give at least one, for instance targets=['qkv']")
    found: set[str] = set()
    for target in asked:
        ends = (target, *SPLIT) if target == "qkv" else (target,)
        these = {name for name in linear if any(f".{name}".endswith(f".{end}") for end in ends)}
        if not these:
            there = sorted({name.rpartition(".")[2] for name in linear})
            near = difflib.get_close_matches(target, there, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"target {target!r} is no linear layer in the blocks of {type(model).__name__}; {hint}"
                f"there are {', '.join(there) or 'none'}"
            )
        found |= these
    return [name for name in linear if name in found]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "foveal[lora]", or pip install "peft>=0.13"') from error
    return peft


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with adapters, by name; recognised without importing peft, which takes seconds."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _inside(name: str, what: str) -> str:
    return f"{name}.{what}" if name else what


def _call_qkv(model: nn.Module, modules: Sequence[str]) -> None:
    """Have attention that adds its biases inside F.linear(x, qkv.weight, ...) call `qkv` and add them after it."""
    for name in modules:
        path, _, last = name.rpartition(".")
        attention: Any = model.get_submodule(path)
        fused = last == "qkv" and attention.qkv.bias is None and getattr(attention, "q_bias", None) is not None
        if fused and getattr(attention, "qkv_bias_separate", None) is False:
            setattr(attention, FUSED, True)
            attention.qkv_bias_separate = True


def _unreached(model: nn.Module) -> list[str]:
    """Modules whose adapters no gradient reaches. A's is zero at the start, as B is zero, but it is there."""
    adapters = {name: parameter for name, parameter in model.named_parameters() if _is_adapter(name)}
    like = next(parameter for parameter in adapters.values())
    with asking(model, gradient=True):
        logits = model(like.new_zeros(1, 3, *image_config(model).size))
        gradients = torch.autograd.grad(logits.float().sum(), list(adapters.values()), allow_unused=True)
    lost = [name for name, gradient in zip(adapters, gradients, strict=True) if gradient is None]
    return list(dict.fromkeys(name.partition(".lora_")[0] for name in lost))


def _eject(model: nn.Module) -> None:
    """Take the adapters out again."""
    for name, layer in list(_adapted(model)):
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, layer.base_layer)
    for module in model.modules():
        if module.__dict__.pop(FUSED, False):
            module.__dict__["qkv_bias_separate"] = False
    model.__dict__.pop("peft_config", None)
