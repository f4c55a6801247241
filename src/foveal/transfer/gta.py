"""GTA: keep looking where the pre-trained model looked.

    L = L_task + lambda * mean_{b,l,h,j} (a_T - a_S)^2          Seo et al., 2024 (arXiv 2401.02656), section 3

a is the class token's row of attention logits q k^T / sqrt(d) of every block and head, before softmax, patch columns
only; T is the model being tuned, S the frozen pre-trained source, both on the same input. Nothing changes at inference.

The paper's reduction and its lambda per data set are not published in any source that could be read: the mean over
everything and lambda 1 are this project's defaults.

B batch, L guided layers, H heads, M compared columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import foveal.attention as attention
from foveal.attention.door import bare
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.source import Source

MATCHES = ("raw", "centred", "kl")
QUERIES = {"class": "class_logits", "mean": "mean_query", "pool": "class_logits"}
WHATS = ("logits", "attn_out", "block_out")
COLUMNS = ("patches", "drop_first")
# by how many of the B x L x H x M elements the sum is divided
REDUCTIONS: dict[str, Callable[[int, int, int, int], int]] = {
    "mean_all": lambda B, L, H, M: B * L * H * M,
    "sum_heads_tokens__mean_batch_layers": lambda B, L, H, M: B * L,
    "sum_heads_tokens_layers__mean_batch": lambda B, L, H, M: B,
    "sum_all": lambda B, L, H, M: 1,
}


def gta_loss(
    target: Sequence[Tensor], source: Sequence[Tensor], match: str = "raw", reduction: str = "mean_all"
) -> Tensor:
    """Distance of the class rows of two models.

    target, source: one (B, H, M) tensor per layer, logits of the compared columns. Padding (-inf) does not count.
    match: raw: squared difference of the logits.  centred: the same without the row's mean of the difference, which
    softmax ignores.  kl: Kullback-Leibler divergence of the source's row to the target's, as probabilities over the
    compared columns; a row is then one element (M = 1).  reduction: see `converted`.
    Returns a float32 (or wider) scalar; the gradient stops at the source. Raises ValueError where shapes differ.
    """
    _one_of("match", match, MATCHES)
    _one_of("reduction", reduction, tuple(REDUCTIONS))
    _check_shapes(target, source)
    sums, counts = [], []
    for t, s in zip(target, source, strict=True):
        s = s.detach()
        wide = torch.promote_types(torch.float32, t.dtype)
        padding = s == float("-inf")
        t, s = t.to(wide), s.to(wide)
        if match == "kl":
            square = _divergence(t, s, padding)
            counts.append(square.new_full((), square.numel()))
        else:
            difference = (t - s).masked_fill(padding, 0.0)
            there = (~padding).sum(-1, keepdim=True)
            if match == "centred":
                difference = (difference - difference.sum(-1, keepdim=True) / there).masked_fill(padding, 0.0)
            square = difference.square()
            counts.append(there.sum().to(wide))
        sums.append(square.sum())
    total = torch.stack(sums).sum()
    if reduction == "mean_all":
        return total / torch.stack(counts).sum()
    B, H, M = target[0].shape
    return total / REDUCTIONS[reduction](B, len(target), H, M)


def converted(
    weight: float, old: str, new: str, *, layers: int, heads: int, columns: int, batch: int | None = None
) -> float:
    """The lambda that gives with reduction `new` what `weight` gives with `old`.

    Reductions divide the sum over everything by: mean_all B L H M, sum_heads_tokens__mean_batch_layers B L,
    sum_heads_tokens_layers__mean_batch B, sum_all 1. layers L, heads H, columns M (1 for match kl); batch B is only
    needed from or to sum_all.
    """
    for name in (old, new):
        _one_of("reduction", name, tuple(REDUCTIONS))
    if batch is None:
        if (old == "sum_all") != (new == "sum_all"):
            raise ValueError(f"{old} to {new} depends on the batch size: give batch")
        batch = 1
    sizes = batch, layers, heads, columns
    return weight * REDUCTIONS[new](*sizes) / REDUCTIONS[old](*sizes)


def output_loss(target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of outputs, one (B, T, D) tensor per layer: the alternatives of the paper's table 3."""
    _check_shapes(target, source)
    losses = []
    for t, s in zip(target, source, strict=True):
        wide = torch.promote_types(torch.float32, t.dtype)
        losses.append((t.to(wide) - s.detach().to(wide)).square().mean())
    return torch.stack(losses).mean()


class GTA(Guide):
    """Guided Transfer of spatial Attention.

    source: the pre-trained model; it is copied, so the model that will be tuned may be given itself before tuning
    starts. None: the tuned model with its adapters (LoRA) off, without a copy.  weight: lambda.
    layers: blocks to guide, as in `foveal.read`.
    match: raw (the paper), centred or kl.  reduction: see `converted`.
    what: logits (the paper), or attn_out or block_out: the outputs of attention or of the block, over all tokens, which
    the paper's table 3 finds worse.
    query: class; for models without a class token mean (the row of the mean patch query) or pool (the row of the
    attention pooling head's query): that is chosen, never guessed.
    columns: patches, or drop_first (all but the first: registers count too).
    average_pooled: guide the last block although the classifier averages patches and never reads its class row.
    precision, compiled: of the source's forward, see `Source`.

    >>> guide = GTA(source=model)                             # doctest: +SKIP
    >>> with guide.on(model, images) as g:                    # doctest: +SKIP
    ...     loss = task(model(images), labels)
    >>> (loss + sum(g.losses().values())).backward()          # doctest: +SKIP

    Raises UnsupportedModelError or ValueError if what is asked cannot be read of the source, and in the first forward
    where the tuned model's grid, heads or depth differ, or patch dropout removes tokens.
    """

    name: ClassVar[str] = "gta"

    def __init__(
        self,
        source: nn.Module | None,
        weight: float = 1.0,
        layers: attention.Layers = "all",
        *,
        match: str = "raw",
        reduction: str = "mean_all",
        what: str = "logits",
        query: str = "class",
        columns: str = "patches",
        average_pooled: bool = False,
        precision: str | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(weight)
        for name, value, known in (
            ("match", match, MATCHES),
            ("reduction", reduction, tuple(REDUCTIONS)),
            ("what", what, WHATS),
            ("query", query, tuple(QUERIES)),
            ("columns", columns, COLUMNS),
        ):
            _one_of(name, value, known)
        if what != "logits" and (match, reduction) != ("raw", "mean_all"):
            raise ValueError(
                f"what={what} is compared by its mean squared difference: match and reduction do not apply"
            )
        if columns == "drop_first" and query != "class":
            raise ValueError(f"columns=drop_first drops the class token's own column, but query={query}")
        self.match, self.reduction, self.what = match, reduction, what
        self.query, self.columns, self.average_pooled = query, columns, average_pooled
        self.layers: Any = (
            [layers] if isinstance(layers, int) or (isinstance(layers, str) and layers != "all") else layers
        )
        self.frozen = Source(source, precision=precision, compiled=compiled)
        self._checked = -1
        if self.frozen.model is not None:
            self.layers = self._layers_of(self.frozen.model)
            self.frozen.check(self.layers, self.read)

    @property
    def source(self) -> nn.Module | None:
        """The frozen copy; None where the source is the tuned model without its adapters."""
        return self.frozen.model

    @property
    def read(self) -> str:
        """The value that is read of both models."""
        return QUERIES[self.query] if self.what == "logits" else self.what

    def rows(self, look: Any) -> list[Tensor]:
        """What is compared, of a look at either model: one tensor per layer."""
        if self.what != "logits":
            found: list[Tensor] = getattr(look, self.what)(prefix=True)
        elif self.columns == "drop_first":
            found = [row[..., 1:] for row in look.class_logits(prefix=True)]
        else:
            found = getattr(look, self.read)()
        return found

    def on(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, relax: float = 1.0) -> Guided:
        """Guide the forward of `model` on `images` inside the block; then ask `losses()`."""
        if self.weight and self._checked != id(model):
            self._check(bare(model))
            self._checked = id(model)
        return _Guided(self, model, images, self.weight * relax)

    def _layers_of(self, model: nn.Module) -> Any:
        """The layers to guide; those of the pooling query by their names."""
        if self.query != "pool" or self.layers != "all":
            return self.layers
        pools = list(attention.pooling_heads(model))
        if not pools:
            raise ValueError("query=pool, but the model has no attention pooling head: use query=mean or query=class")
        return pools

    def _check(self, model: nn.Module) -> None:
        """Raise ValueError for a tuned model whose rows would not line up or whose classifier does not read them."""
        if self.frozen.model is None:
            self.layers = self._layers_of(model)
            self.frozen.check(self.layers, self.read, model)
        dropping = [
            name
            for name, module in model.named_modules()
            if type(module).__name__ == "PatchDropout" and getattr(module, "prob", 0.0) > 0
        ]
        if dropping:
            raise ValueError(
                f"{dropping[0]} removes patches in training, so the columns of model and source do not line up: build"
                " the model with patch_drop_rate=0"
            )
        if self.query != "class" or self.what != "logits" or self.average_pooled or not _averages(model):
            return
        guided = attention.read(model, self.layers, self.read)
        if guided.last.name == attention.read(model, -1, "attn_out").last.name:
            raise ValueError(
                "the classifier averages patches, so it never reads the last block's class row that GTA would guide:"
                " build the model with global_pool='token' (as the paper), leave the last block out"
                " (layers=range(depth - 1)), choose query='mean', or say average_pooled=True"
            )


class _Guided(Guided):
    """One guided forward."""

    def __init__(self, guide: GTA, model: nn.Module, images: Tensor, strength: float) -> None:
        super().__init__(guide.name, strength)
        self._guide, self._model, self._images = guide, model, images
        self._rows: list[Tensor] = []

    def open(self) -> None:
        guide = self._guide
        # the source runs first: its activations are gone before the target's graph is built
        self._rows = guide.rows(guide.frozen.look(self._images, guide.layers, guide.read, self._model))
        self._seen = attention.read(self._model, guide.layers, guide.read).__enter__()

    def close(self, *error: object) -> None:
        self._seen.__exit__(*error)  # type: ignore[arg-type]

    def term(self) -> Tensor:
        rows = self._guide.rows(self._seen)
        if self._guide.what != "logits":
            return output_loss(rows, self._rows)
        return gta_loss(rows, self._rows, self._guide.match, self._guide.reduction)


def _divergence(t: Tensor, s: Tensor, padding: Tensor) -> Tensor:
    """KL(source || target) of rows of logits, (B, H); padded columns have no share in either."""
    t = t.masked_fill(padding, float("-inf")).log_softmax(-1)
    s = s.log_softmax(-1)
    return (s.exp() * (s - t).masked_fill(padding, 0.0)).sum(-1)


def _check_shapes(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if not target or len(target) != len(source):
        raise ValueError(f"{len(target)} target layers against {len(source)} source layers; one or more of each, equal")
    for i, (t, s) in enumerate(zip(target, source, strict=True)):
        if t.shape != s.shape:
            raise ValueError(
                f"layer {i}: target rows are {tuple(t.shape)}, source rows {tuple(s.shape)} (images, heads, patches); "
                "source and target need the same heads, patch size and input size, and no patch dropout"
            )


def _averages(model: nn.Module) -> bool:
    """Does the classifier read the mean of the patches?"""
    config = getattr(model, "config", None)  # transformers
    return getattr(model, "global_pool", None) in ("avg", "avgmax", "max") or bool(
        getattr(config, "use_mean_pooling", False)
    )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; use {', '.join(known)}")
