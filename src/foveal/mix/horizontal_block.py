"""One block of horizontal TokenMixup during a step: judge, pair, mix; then tell what was done.

It is called with the tokens that are about to enter the block, and again when a checkpointed block is recomputed: then
it repeats what it did, with the same operations, and decides nothing anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foveal.attention.edit import Visit
from foveal.mix.assignment import assign, pair_scores
from foveal.mix.horizontal import Exchange, as_many, chosen, count_weights, exchange, first_easy, saliency_weights
from foveal.mix.mixed import Mixed, label_rows
from foveal.mix.mixer import Step
from foveal.mix.saliency import attention_saliency, by_class, random_saliency
from foveal.mix.scorenet import difficulty

if TYPE_CHECKING:
    from foveal.mix.tokenmixup import TokenMixup


class HorizontalBlock:
    """Settings, what is known before the forward, and afterwards `done`.

    score: the ScoreNet of this block, None where nothing judges.  under: the step of the image mixer.  labels: unmixed.
    key: of what is drawn.  before: the horizontal block before this one, whose labels arrive here.
    given: saliency (B, N) found otherwise; None: from the attention of the block.
    """

    def __init__(
        self,
        settings: TokenMixup,
        block: int,
        score: nn.Module | None,
        under: Step,
        labels: Tensor,
        key: int,
        before: HorizontalBlock | None,
        given: Tensor | None = None,
    ) -> None:
        self.settings, self.block, self.score = settings, block, score
        self.under, self.labels, self.before, self.given = under, labels, before, given
        self.rng = torch.Generator().manual_seed((key + block) % 2**63)
        self.done: Exchange | None = None
        self.logits: Tensor | None = None  # ScoreNet's, with gradient

    def __call__(self, visit: Visit) -> Tensor:
        """The tokens with which the block runs."""
        tokens, logits = visit.tokens, None
        if self.score is not None:
            logits = self.score(tokens.detach() if self.settings.score_detached else tokens)
        if not visit.replay:
            self.logits = logits
            saliency = self._saliency(visit)
            with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
                self.done = self._decide(saliency, logits)
        assert self.done is not None
        return exchange(tokens, self.done.partner, self.done.replaced) if self.done.any else tokens

    def targets(self, smoothing: float) -> Tensor:
        """Labels as they enter the block, (B, C), with the image mixer's provisional weights."""
        assert self.logits is not None
        rows = self.under.mixed.targets(self.labels, self.logits.shape[-1], smoothing)
        return self._passed(rows)

    def _passed(self, rows: Tensor) -> Tensor:
        """Rows after the horizontal blocks before this one."""
        if self.before is None:
            return rows
        assert self.before.done is not None
        return self.before.done.weights.mix(self.before._passed(rows))

    def loss(self, image: Mixed, smoothing: float) -> Tensor:
        """ScoreNet's loss, unweighted: a scalar. image: the batch with the image mixer's final label weights."""
        if self.logits is None:
            return torch.zeros((), device=self.labels.device)
        rows = image.mix_labels(label_rows(self.labels, self.logits.shape[-1], smoothing))
        return difficulty(self.logits, self._passed(rows)).mean()

    def _saliency(self, visit: Visit) -> Tensor:
        B, N = visit.tokens.shape[0], visit.tokens.shape[1] - visit.layout.prefix
        if self.settings.saliency == "random":
            return random_saliency(B, N, self.rng).to(visit.tokens.device, non_blocking=True)
        if self.given is None:
            row = by_class(visit.layout, self.settings.rows)
            return attention_saliency(visit.peek(self.settings.rollout, row), self.settings.rows)
        if self.given.shape != (B, N):
            raise ValueError(
                f"saliency of {tuple(self.given.shape)} for {B} images of {N} patches: token counts differ"
            )
        return self.given

    def _decide(self, saliency: Tensor, logits: Tensor | None) -> Exchange:
        s, (B, N) = self.settings, saliency.shape
        rho = s.rho / N if s.rho_unit == "mean" else s.rho
        hard_to_tell = None if logits is None else difficulty(logits, self.targets(s.smoothing))
        easy = torch.ones(B, dtype=torch.bool, device=saliency.device)
        if s.gate:
            assert hard_to_tell is not None
            easy = hard_to_tell <= s.tau
        if s.pairs == "random":
            drawn = torch.randperm(B, generator=self.rng).to(saliency.device, non_blocking=True)
            partner, gains = torch.where(easy, drawn, torch.arange(B, device=saliency.device)), True
        else:
            partner, gains = assign(pair_scores(saliency, rho), easy)
        replaced = torch.zeros(B, N, dtype=torch.bool, device=saliency.device)
        if gains:
            reference = first_easy(saliency, easy) if s.official_mask else None
            replaced = chosen(saliency, partner, easy, rho, reference)
        if s.tokens == "random":
            noise = torch.rand(B, N, generator=self.rng).to(saliency.device, non_blocking=True)
            replaced = as_many(replaced, noise)
        by_count = s.labels == "count"
        weights = count_weights(partner, replaced) if by_count else saliency_weights(saliency, partner, replaced)
        return Exchange(easy, hard_to_tell, saliency, partner, replaced, weights, gains)
