"""TokenMixup: mix tokens between images of a batch (horizontal) and between depths of one image (vertical).

    mixer = TokenMixup(over=MixupCutMix(), horizontal=2, vertical=3)
    score = mixer.learned(model, num_classes)                     # ScoreNet: give its parameters to the optimiser
    with mixer.on(model, images, labels) as step:
        loss = step.loss(model(step.images))

Choi et al., 2022 (arXiv 2210.07562); the steps are in saliency.py, scorenet.py, assignment.py, horizontal.py and
vertical.py. Saliency comes from a peek at the attention of the block that is about to run; the block then runs once, on
the mixed tokens. The batch keeps its order. Blocks are counted from 0.

B batch, T tokens of which P prefix and N patches, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from foveal.attention import ReadError
from foveal.attention.edit import Edit, edit
from foveal.mix.horizontal import Exchange
from foveal.mix.horizontal_block import HorizontalBlock
from foveal.mix.mixed import LabelWeights, Mixed
from foveal.mix.mixer import Draw, Step, Term
from foveal.mix.none import NoMix
from foveal.mix.saliency import Rows, by_class, gradient_saliency
from foveal.mix.scorenet import Pool, ScoreNet
from foveal.mix.token_mixer import TokenMixer, TokenStep
from foveal.mix.vertical import Memory


@dataclass(frozen=True)
class TokenDraw(Draw):
    """A key for what is drawn inside the model, where the number of tokens is known. perm: every image with itself."""

    key: Tensor  # () int64


@dataclass(kw_only=True)
class TokenMixup(TokenMixer[TokenDraw]):
    """TokenMixup, horizontal at some blocks, vertical at one, or both.

    horizontal: block (or blocks) whose input is mixed between images; None: none.  vertical: block that also attends to
    tokens of all blocks before it; None: none. Negative numbers count from the last block.

    Horizontal. rho: least gain in saliency of a token that is replaced, as a share of all attention, or with
    rho_unit="mean" in units of the mean saliency 1/N (0.005 of 256 tokens is 1.28 means).  tau: images whose
    cross-entropy in nats is at most this are easy and get tokens; the paper's code counts a tenth of it (its 0.2 is 2.0
    here).  saliency: `attention`, or the paper's baselines `gradient` (a second forward and backward) and `random`.
    rows: of the attention: the `class` token's, or what tokens have `received`; `auto` takes the first where it is.
    rollout: further blocks that saliency looks through.
    score_pool: how ScoreNet pools (scorenet.py).  score_weight: of its loss; 0.001 with its gradient into the model, or
    score_detached=True and 1, as the paper's runs have it.  smoothing: of the labels that difficulty is judged with:
    give the loss's. The paper's ablations: gate=False mixes every image; pairs="random"; tokens="random" (as many,
    anywhere); labels="count" (by the number of tokens).  official_mask=True compares the partner's saliency with the
    first easy image's, as the released code does by mistake.

    Vertical. kappa: tokens of every earlier block.  stop_gradient: no gradient through them.

    `on` raises ValueError for blocks, poolings or rows that the model does not have and for a missing call of
    `learned`, foveal.UnsupportedModelError for models whose tokens cannot be mixed so; the loss raises foveal.ReadError
    unless one forward ran inside the block.
    """

    horizontal: int | tuple[int, ...] | None = 2
    vertical: int | None = None
    rho: float = 0.005
    rho_unit: Literal["share", "mean"] = "share"
    tau: float = 2.0
    saliency: Literal["attention", "gradient", "random"] = "attention"
    rows: Rows = "auto"
    rollout: int = 0
    score_pool: Pool = "auto"
    score_weight: float = 0.001
    score_detached: bool = False
    smoothing: float = 0.0
    gate: bool = True
    pairs: Literal["assigned", "random"] = "assigned"
    tokens: Literal["salient", "random"] = "salient"
    labels: Literal["saliency", "count"] = "saliency"
    official_mask: bool = False
    kappa: int = 5
    stop_gradient: bool = False
    _scores: nn.ModuleDict | None = field(default=None, init=False, repr=False, compare=False)
    _learned: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.horizontal, int):
            self.horizontal = (self.horizontal,)
        elif self.horizontal is not None:
            self.horizontal = tuple(self.horizontal) or None
        if self.horizontal is None and self.vertical is None:
            raise ValueError(
                "horizontal and vertical are both None, which mixes nothing: name a block, or leave it out"
            )
        for name, kind in (("rho_unit", "share mean"), ("saliency", "attention gradient random"),
                           ("rows", "auto class received"), ("pairs", "assigned random"),
                           ("tokens", "salient random"), ("labels", "saliency count"),
                           ("score_pool", " ".join(get_args(Pool)))):  # fmt: skip
            if getattr(self, name) not in kind.split():
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; use one of {', '.join(kind.split())}")
        for name in ("rho", "score_weight", "rollout", "kappa"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} does not fit: use 0 or more")
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing={self.smoothing} but it is a share of the label: use a value in [0, 1)")

    # -- what a task asks

    def first_mixed_block(self, model: nn.Module) -> int | None:
        """The first horizontal block; None without one: vertical mixing adds tokens of the image itself."""
        return min(self._horizontal(model), default=None)

    @property
    def terms(self) -> tuple[str, ...]:
        """scorenet, where horizontal mixing trains one."""
        return (*self.over.terms, *(("scorenet",) if self._scored else ()))

    @property
    def measures(self) -> tuple[str, ...]:
        """token_easy: share of easy images; token_replaced: share of tokens replaced; token_gain: saliency won.

        Means over the batch and over the blocks that mix horizontally; the gain is that of all images together.
        """
        own = () if self.horizontal is None else ("token_easy", "token_replaced", "token_gain")
        return (*self.over.measures, *own)

    @property
    def _scored(self) -> bool:
        return self.horizontal is not None and (self.gate or self.score_weight > 0)

    def learned(self, model: nn.Module, num_classes: int) -> nn.Module | None:
        """ScoreNet of every horizontal block, and what the image mixer learns; made at the first call."""
        if self._learned is None:
            parts = {}
            if (over := self.over.learned(model, num_classes)) is not None:
                parts["over"] = over
            if self._scored:
                parts["scores"] = self._scores = self._score_nets(model, num_classes)
            self._learned = nn.ModuleDict(parts) if parts else None
        return self._learned

    def _score_nets(self, model: nn.Module, classes: int) -> nn.ModuleDict:
        blocks = self.blocks(model)
        where = next(model.parameters())
        nets = {
            str(block): ScoreNet(blocks.width, classes, blocks.layout, self.score_pool, self.seed + block)
            for block in self._horizontal(model)
        }
        return nn.ModuleDict(nets).to(where.device, where.dtype)

    def _horizontal(self, model: nn.Module) -> list[int]:
        assert self.horizontal is None or isinstance(self.horizontal, tuple)
        return sorted({self.blocks(model).position(block) for block in self.horizontal or ()})

    # -- a step

    def draw(
        self, batch: int, image_size: tuple[int, int], grid: tuple[int, int] | None = None, *, rng: torch.Generator
    ) -> TokenDraw:
        """The key of what random pairs, tokens or saliency are drawn with. The image mixer draws on its own."""
        return TokenDraw(torch.arange(batch), torch.randint(2**62, (), generator=rng))

    def apply(self, images: Tensor, draw: TokenDraw) -> Mixed:
        """The images as they are: tokens are mixed in the model."""
        return NoMix().apply(images, draw)

    @contextmanager
    def mixing(
        self, model: nn.Module, under: Step, draw: TokenDraw, labels: Tensor, num_classes: int | None
    ) -> Iterator[Step]:
        """Edit the forward of `model`; see above."""
        blocks, runs = self.blocks(model), self._runs(model, under, draw, labels, num_classes)
        memory = Memory(self.kappa, self.stop_gradient, self.rows)
        watch, extend = {}, {}
        if self.vertical is not None and self.kappa:
            last = blocks.position(self.vertical)
            if last == 0:
                raise ValueError("vertical=0 but no block comes before block 0: use 1 or more")
            watch = {block: partial(memory.keep, block) for block in range(last)}
            extend = {last: memory.tokens}
        with edit(blocks, {run.block: run for run in runs}, watch, extend) as edits:
            try:
                yield TokenMixupStep(self, under, labels, num_classes, runs, edits)
            finally:
                memory.clear()

    def _runs(
        self, model: nn.Module, under: Step, draw: TokenDraw, labels: Tensor, num_classes: int | None
    ) -> list[HorizontalBlock]:
        blocks, runs, given = self.blocks(model), list[HorizontalBlock](), None
        by_class(blocks.layout, self.rows)  # raises for rows that are not there
        if self.horizontal is not None and self.saliency == "gradient":
            rows = under.mixed.targets(labels, self._classes(num_classes))
            given = gradient_saliency(model, under.images, rows)
        for block in self._horizontal(model):
            if block + self.rollout >= len(blocks.layers):
                raise ValueError(
                    f"rollout={self.rollout} from block {block} leaves the model's {len(blocks.layers)} blocks"
                )
            if self.rollout and (why := blocks.relative(block)):
                raise ValueError(f"rollout={self.rollout} runs further blocks ahead, but this model has {why}: use 0")
            before, score = runs[-1] if runs else None, self._score(block)
            runs.append(HorizontalBlock(self, block, score, under, labels, int(draw.key), before, given))
        return runs

    def _classes(self, num_classes: int | None) -> int | None:
        """How many classes there are, if that is known."""
        if self._scores is not None:
            return next(int(net.head.out_features) for net in self._scores.values())  # type: ignore[union-attr,arg-type]
        return num_classes

    def _score(self, block: int) -> nn.Module | None:
        if not self._scored:
            return None
        if self._scores is None:
            raise ValueError(
                "horizontal mixing judges difficulty by a ScoreNet that learns with the model: call "
                "mixer.learned(model, num_classes) once, and give its parameters to the optimiser"
            )
        return self._scores[str(block)]


class TokenMixupStep(TokenStep):
    """A step with TokenMixup: a Step, and what was exchanged in each block."""

    def __init__(
        self,
        settings: TokenMixup,
        under: Step,
        labels: Tensor,
        num_classes: int | None,
        runs: list[HorizontalBlock],
        edits: Edit,
    ) -> None:
        self._settings, self._runs, self._edits = settings, runs, edits
        terms: dict[str, Term] = {"scorenet": self._scorenet} if "scorenet" in settings.terms else {}
        super().__init__(under, under.mixed, labels, num_classes, self._weights, terms, self._measured)

    @property
    def exchanges(self) -> dict[int, Exchange]:
        """What horizontal mixing did, by block. Raises foveal.ReadError before the forward."""
        if not self._edits.ran:
            raise ReadError(
                "tokens are mixed by the forward, but none ran in the block: call the model inside it, once, in "
                "training mode, and uncompiled"
            )
        return {run.block: run.done for run in self._runs if run.done is not None}

    def _weights(self) -> tuple[LabelWeights, ...]:
        return tuple(done.weights for done in self.exchanges.values())

    def _scorenet(self, mixed: Mixed, logits: Tensor, smoothing: float) -> Tensor:
        image = self._under._final()
        return self._settings.score_weight * torch.stack([run.loss(image, smoothing) for run in self._runs]).sum()

    def _measured(self) -> dict[str, Tensor]:
        done = self.exchanges.values()
        if not done:
            return {}
        means = {
            "token_easy": torch.stack([one.easy.float().mean() for one in done]),
            "token_replaced": torch.stack([one.replaced.float().mean() for one in done]),
            "token_gain": torch.stack([one.gain.float().mean() for one in done]),
        }
        return {name: values.mean() for name, values in means.items()}
