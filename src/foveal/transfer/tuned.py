"""Which parameters are tuned: rules on their names.

    all         every parameter
    head        the classifier: a linear probe, trained by gradient
    attention   ".attn." in the name, position table, classifier                 Touvron et al., 2022 (arXiv 2203.09795)
    bias        names that end in "bias", classifier                             Ben Zaken et al., 2022 (BitFit)
    last-K      the last K blocks and whatever follows them: final norm, pooling head, classifier

What is frozen keeps its gradient off; activations' gradients still pass through it to what lies below. Statistics of
batch norm are no parameters: they move in training mode whatever is frozen.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.models import group_parameters
from torch import nn

from foveal.transfer import head

TUNES = ("all", "head", "attention", "bias", "last-K", "lora")
POOLS = ("attn_pool", "seq_pool")  # pooling heads that attend; models have one only where it pools


@dataclass(frozen=True)
class Chosen:
    """Names of parameters, each in the order of the model; together they are all of them."""

    trained: tuple[str, ...]
    frozen: tuple[str, ...]


def choose(model: nn.Module, tune: str) -> Chosen:
    """What of a timm `model` is tuned. tune: "all", "head", "attention", "bias", "last-1" to "last-<depth>".

    Raises ValueError for another word, a K that the model does not have, a model without classifier, and a rule that
    finds nothing beside the classifier.
    """
    names = [name for name, _ in model.named_parameters()]
    if tune == "all":
        return Chosen(tuple(names), ())
    rule = _rule(tune)
    top = set(classifier_names(model))
    body = rule(model, [name for name in names if name not in top])
    return Chosen(
        tuple(name for name in names if name in top or name in body),
        tuple(name for name in names if name not in top and name not in body),
    )


def is_way_to_tune(tune: str) -> bool:
    """Whether `tune` is one of the words, K at least 1."""
    return (tune in TUNES and tune != "last-K") or re.fullmatch(r"last-[1-9]\d*", tune) is not None


def freeze(model: nn.Module, tune: str) -> Chosen:
    """`choose`, and have exactly those parameters require a gradient. Raises ValueError, then nothing has changed."""
    chosen = choose(model, tune)
    train_only(model, chosen)
    return chosen


def train_only(model: nn.Module, chosen: Chosen) -> None:
    """Have exactly the trained parameters require a gradient."""
    trained = set(chosen.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's parameters; distilled models have two classifiers. Raises ValueError without one."""
    names = head.classifier_names(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no classifier to tune: build it with num_classes above 0")
    return names


Rule = Callable[[nn.Module, list[str]], set[str]]  # names without the classifier's -> those tuned


def _rule(tune: str) -> Rule:
    rules: dict[str, Rule] = {"head": lambda model, names: set(), "attention": _attention, "bias": _bias}
    if tune in rules:
        return rules[tune]
    if last := re.fullmatch(r"last-(\d+)", tune):
        return lambda model, names: _last(model, names, int(last[1]))
    if tune == "lora":
        raise ValueError("tune='lora' adds parameters instead of choosing them: use foveal.transfer.lora.inject")
    near = difflib.get_close_matches(tune, TUNES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"tune={tune!r} is not known; {hint}there are {', '.join(TUNES)} (K blocks, as in last-2)")


def _attention(model: nn.Module, names: list[str]) -> set[str]:
    attention = {name for name in names if ".attn." in name}
    if not attention:
        raise ValueError(
            f"tune='attention' finds no parameter with '.attn.' in its name in {type(model).__name__}:"
            " use tune='head', 'bias' or 'last-1'"
        )
    beside = {name for name in names if not {"pos_embed", *POOLS}.isdisjoint(name.split("."))}
    return attention | beside


def _bias(model: nn.Module, names: list[str]) -> set[str]:
    biases = {name for name in names if name.endswith("bias")}
    if not biases:
        raise ValueError(f"tune='bias' finds no bias in {type(model).__name__} but its classifier's: use tune='head'")
    return biases


def _last(model: nn.Module, names: list[str], k: int) -> set[str]:
    """The model's own grouping by depth, as layer-wise learning rates take it: stem, blocks, what follows."""
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"tune='last-{k}' needs a timm model: {type(model).__name__} does not tell its blocks")
    groups: dict[int, list[str]] = group_parameters(model, matcher(coarse=False))
    blocks = [groups[depth] for depth in sorted(groups)][1:-1]
    if not 1 <= k <= len(blocks):
        raise ValueError(f"tune='last-{k}' but {type(model).__name__} has {len(blocks)} blocks: K is 1 to that")
    # the matcher leaves some parameters of the stem to the head's group: only what is built after the blocks follows
    end = max(names.index(name) for name in blocks[-1])
    return {name for block in blocks[-k:] for name in block} | set(names[end + 1 :])
