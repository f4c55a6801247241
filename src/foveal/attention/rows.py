"""A few numbers of the attention matrix, without the matrix.

    r_j = scale q . k_j + m_j                     one row of logits: one product with K
    S_t = 1/N sum_i softmax_j(r_ij)_t             attention received by token t, averaged over queries
    -1/N sum_ij softmax_j(s_ij) log softmax_j(r_ij)   cross entropy of a whole map with that of a source, logits s

Definitions: Seo et al., 2024 (GTA) for the class row; Choi et al., 2022 (TokenMixup) for the column mean; Li et al.,
2024 (Attention Transfer) for the cross entropy.

B batch, H heads, T tokens (prefix and patches), d head width. Half precision comes in, float32 goes out: a bfloat16 sum
of 64 products keeps two digits. A row is taken *before* softmax and includes mask or position bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Logits held at once by `received`: a CPU tile stays in the second-level cache, a GPU tile fills the device."""


def widen(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; wider types as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask (True = may attend) as 0 / -inf; an additive one in `like`'s type; None stays."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))
    return mask.to(like.dtype)


def as_4d(mask: Tensor | None) -> Tensor | None:
    """A mask of 2 to 4 dimensions with the leading ones written out."""
    if mask is None:
        return None
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def query_row(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Logits of one query per head.

    q: (B, H, d).  k: (B, H, T, d).  mask: additive, broadcastable to (B, H, T).  Returns (B, H, T).
    """
    row: Tensor = _QueryRow.apply(q, k, scale)
    return row if mask is None else row + mask.to(row.dtype)


class _QueryRow(torch.autograd.Function):
    """scale k q, keeping q and k as they are for the backward: a product would keep its own copy of k.

    Keys that lie token by token, as fused projections leave them, are multiplied without a copy, all heads at once:
    each head's query in a row of its own (H, H d) times (H d, T), which on a CPU is several times faster than a product
    per head, or than the same with H columns.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k)
        ctx.scale = scale
        q, k = widen(q) * scale, widen(k)
        if (tokens := _by_tokens(k)) is None:
            return torch.matmul(k, q.unsqueeze(-1)).squeeze(-1)
        return torch.matmul(_spread(q), tokens.transpose(1, 2))

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        q, k = ctx.saved_tensors
        wide, g = widen(k), g * ctx.scale
        needs_q, needs_k, _ = ctx.needs_input_grad
        dq = dk = None
        if (tokens := _by_tokens(wide)) is None:
            dq = torch.matmul(g.unsqueeze(-2), wide).squeeze(-2) if needs_q else None
            dk = g.unsqueeze(-1) * widen(q).unsqueeze(-2) if needs_k else None
        else:
            if needs_q:  # of what each head's row gives to all heads' keys only its own
                dq = torch.matmul(g, tokens).unflatten(-1, q.shape[1:]).diagonal(dim1=1, dim2=2).transpose(1, 2)
            if needs_k:  # token by token again
                dk = (g.transpose(1, 2).unsqueeze(-1) * widen(q).unsqueeze(1)).transpose(1, 2)
        return None if dq is None else dq.to(q.dtype), None if dk is None else dk.to(k.dtype), None


def _by_tokens(k: Tensor) -> Tensor | None:
    """Keys (B, H, T, d) as (B, T, H d) where that takes no copy."""
    if k.stride(3) != 1 or k.stride(1) != k.shape[3] or k.stride(2) < k.shape[1] * k.shape[3]:
        return None
    return k.transpose(1, 2).flatten(2)


def _spread(q: Tensor) -> Tensor:
    """Queries (B, H, d), each in a row of its own at its head's place: (B, H, H d), zero elsewhere."""
    return torch.diag_embed(q.transpose(1, 2), dim1=1, dim2=2).flatten(2)


def mean_query_row(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Mean over queries of the logits, which is the row of the mean query: as cheap as one row.

    q: (B, H, Q, d) the queries to average.  mask: (B|1, H|1, Q|1, T).  valid: (B, Q) bool, queries that count.
    Not the attention received: softmax of a mean is not the mean of softmaxes.  Returns (B, H, T).
    """
    q = widen(q)
    if valid is None:
        return query_row(q.mean(-2), k, scale, None if mask is None else widen(mask).mean(-2))
    share = valid.to(q.dtype) / valid.sum(-1, keepdim=True)  # (B, Q)
    row = query_row(torch.einsum("bhqd,bq->bhd", q, share), k, scale)
    if mask is not None:
        # a padded query's row holds -inf or the most negative float: 0 x -inf is not a number, so leave it out first
        kept = widen(mask).expand(-1, -1, q.shape[-2], -1).masked_fill(~valid[:, None, :, None], 0.0)
        row = row + torch.einsum("bhqt,bq->bht", kept.expand(q.shape[0], -1, -1, -1), share)
    return row


def attention_map(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The whole map, probabilities (B, H, Q, T). For looking, not for training loops: it is quadratic in tokens."""
    logits = torch.matmul(widen(q) * scale, widen(k).transpose(-1, -2))
    return (logits if mask is None else logits + mask.to(logits.dtype)).softmax(-1)


def received(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Attention each token receives, mean over queries, without a Q x T tensor.

    q: (B, H, Q, d).  k: (B, H, T, d).  mask: additive, broadcastable to (B, H, Q, T).  valid: (B, Q) bool, queries that
    count (None: all).  Returns (B, H, T), each row sums to 1. Differentiable: the backward recomputes the tiles.
    """
    return _Received.apply(widen(q), widen(k), as_4d(mask), _query_share(q, valid), scale)  # type: ignore[no-any-return]


def carried(weight: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """A row vector times the attention map, without the map: what weighted queries give to each token.

    weight: (B, Q), any scale.  q, k, mask: as `received`.  Returns (B, H, T), each row sums to that of `weight`.
    """
    q = widen(q)
    return _Received.apply(q, widen(k), as_4d(mask), weight.to(q.dtype), scale)  # type: ignore[no-any-return]


def map_cross_entropy(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    q_source: Tensor,
    k_source: Tensor,
    scale_source: float,
    mask_source: Tensor | None,
    valid: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the source's map with the target's, mean over images, heads and queries, without a Q x T tensor.

        -sum_j softmax(source logits)_j log_softmax(target logits)_j

    q: (B, H, Q, d).  k: (B, H, T, d).  mask: additive, broadcastable to (B, H, Q, T), or None. The source's likewise;
    its head width may differ.  valid: (B, Q) bool, queries that count (None: all). A query that may attend to nothing
    does not count. Returns a scalar, float32 or wider; at equality it is the source's entropy, not 0. Gradient flows to
    q, k and mask; it is computed with the value, tile by tile, so that one pass over the map is enough and the source's
    q and k are not kept.
    """
    source = (q_source.detach(), k_source.detach(), None if mask_source is None else as_4d(mask_source.detach()))
    return _MapCrossEntropy.apply(q, k, as_4d(mask), scale, source, scale_source, valid)  # type: ignore[no-any-return]


def _query_share(q: Tensor, valid: Tensor | None) -> Tensor:
    """Weight of each query in the mean: (B, Q), rows sum to 1."""
    B, _, Q, _ = q.shape
    if valid is None:
        return torch.full((B, Q), 1.0 / Q, dtype=widen(q).dtype, device=q.device)
    return valid.to(widen(q).dtype) / valid.sum(-1, keepdim=True)


def _tiles(q: Tensor, k: Tensor) -> list[tuple[slice, slice, slice]]:
    """Slices of (batch, heads, queries) whose logits fit TILE_BYTES."""
    (B, H, Q, _), T = q.shape, k.shape[-2]
    budget = TILE_BYTES.get(q.device.type, TILE_BYTES["cuda"]) // q.element_size()
    if torch.compiler.is_compiling():
        budget = max(budget, B * H * Q * T // 8)  # the loop is unrolled into the graph: keep it short
    rows = max(1, budget // max(T, 1))
    nq = min(Q, rows)
    nh = min(H, max(1, rows // max(Q, 1)))
    nb = min(B, max(1, rows // max(Q * H, 1)))
    return [
        (slice(b, min(b + nb, B)), slice(h, min(h + nh, H)), slice(i, min(i + nq, Q)))
        for b in range(0, B, nb)
        for h in range(0, H, nh)
        for i in range(0, Q, nq)
    ]


def _tile(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, at: tuple[slice, slice, slice]) -> Tensor:
    """Probabilities of one tile: (b, h, i, T)."""
    return _tile_logits(q, k, mask, scale, at).softmax(-1)


def _tile_logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, at: tuple[slice, slice, slice]) -> Tensor:
    """Logits of one tile: (b, h, i, T)."""
    b, h, i = at
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.matmul(q[b, h, i] * scale, k[b, h].transpose(-1, -2))
    if mask is not None:
        part = mask
        part = part[b] if part.shape[0] > 1 else part
        part = part[:, h] if part.shape[1] > 1 else part
        part = part[:, :, i] if part.shape[2] > 1 else part
        logits += part.to(logits.dtype)
    return logits


class _Received(torch.autograd.Function):
    """received() with a backward that recomputes its tiles.

    dL/dlogit_it = w_i A_it (g_t - sum_t' A_it' g_t'),  w_i the query's weight in the mean.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, mask: Tensor | None, share: Tensor, scale: float
    ) -> Tensor:
        out = k.new_zeros(k.shape[:-1])
        for at in _tiles(q, k):
            b, h, i = at
            weight = share[b, i][:, None, None, :]  # (b, 1, 1, i)
            out[b, h] += torch.matmul(weight, _tile(q, k, mask, scale, at)).squeeze(-2)
        ctx.save_for_backward(q, k, share, *(() if mask is None else (mask,)))
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        q, k, share, *rest = ctx.saved_tensors
        mask = rest[0] if rest else None
        needs_q, needs_k, needs_mask = ctx.needs_input_grad[:3]
        dq = torch.zeros_like(q) if needs_q else None
        dk = torch.zeros_like(k) if needs_k else None
        dm = torch.zeros_like(mask) if needs_mask and mask is not None else None
        for at in _tiles(q, k):
            b, h, i = at
            attn = _tile(q, k, mask, ctx.scale, at)  # (b, h, i, T)
            gt = g[b, h].unsqueeze(-2)  # (b, h, 1, T)
            ds = attn * (gt - (attn * gt).sum(-1, keepdim=True)) * share[b, i][:, None, :, None]
            if dq is not None:
                dq[b, h, i] = torch.matmul(ds, k[b, h]) * ctx.scale
            if dk is not None:
                dk[b, h] += torch.matmul(ds.transpose(-1, -2), q[b, h, i]) * ctx.scale
            if dm is not None:
                _add_broadcast(dm, ds, at)
        return dq, dk, dm, None, None


def _add_broadcast(total: Tensor, part: Tensor, at: tuple[slice, slice, slice]) -> None:
    """Add a tile's gradient to a mask that may have been broadcast over batch, heads, queries or columns."""
    index: list[slice] = []
    for dim, where in enumerate((*at, slice(None))):
        if total.shape[dim] > 1:
            index.append(where)
        else:
            part = part.sum(dim, keepdim=True)
            index.append(slice(None))
    total[tuple(index)] += part.to(total.dtype)


class _MapCrossEntropy(torch.autograd.Function):
    """map_cross_entropy(): dL/dlogit = (softmax(target) - softmax(source)) / number of rows, known with the value."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float,
        source: tuple[Tensor, Tensor, Tensor | None],
        scale_source: float,
        valid: Tensor | None,
    ) -> Tensor:
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, mask)]
        wide = torch.promote_types(widen(q).dtype, source[0].dtype)
        q, k, q_source, k_source = (x.to(wide) for x in (q, k, *source[:2]))
        dq, dk, dm = (
            torch.zeros_like(x, dtype=wide) if x is not None and needed else None
            for x, needed in zip((q, k, mask), ctx.needs_input_grad, strict=False)
        )
        masked = mask is not None or source[2] is not None
        total, count = q.new_zeros(()), q.new_zeros(())
        with torch.autocast(q.device.type, enabled=False):
            for at in _tiles(q, k):
                b, h, i = at
                logits = _tile_logits(q, k, mask, scale, at)
                logits_source = _tile_logits(q_source, k_source, source[2], scale_source, at)
                log_attn, attn_source = logits.log_softmax(-1), logits_source.softmax(-1)
                counts = torch.ones_like(logits[..., 0], dtype=torch.bool)
                if valid is not None:
                    counts &= valid[b, i][:, None]
                if masked:
                    # a row of -inf alone has no softmax, and 0 x -inf is not a number
                    counts &= (logits.amax(-1) > float("-inf")) & (logits_source.amax(-1) > float("-inf"))
                    log_attn_there = log_attn.masked_fill(attn_source == 0, 0.0)
                else:
                    log_attn_there = log_attn
                rows = -(attn_source * log_attn_there).sum(-1)  # (b, h, i)
                total += rows.masked_fill(~counts, 0.0).sum()
                count += counts.sum()
                if dq is None and dk is None and dm is None:
                    continue
                ds = (log_attn.exp() - attn_source).masked_fill_(~counts[..., None], 0.0)
                if dq is not None:
                    dq[b, h, i] = torch.matmul(ds, k[b, h]) * scale
                if dk is not None:
                    dk[b, h] += torch.matmul(ds.transpose(-1, -2), q[b, h, i]) * scale
                if dm is not None:
                    _add_broadcast(dm, ds, at)
        count.clamp_(min=1)
        ctx.save_for_backward(*(None if x is None else x.div_(count) for x in (dq, dk, dm)))
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        known = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if x is None else (g * x).to(dtype) for x, dtype in known)
        return *gradients, None, None, None, None
