"""The slow, obvious twin of TokenMixup: Algorithm 1 in loops, attention written out, every assignment tried."""

import itertools

import torch

from foveal.models import CompactTransformer


def embedded(model, images):
    """Tokens that enter block 0, of a timm ViT or a CCT."""
    x = model.patch_embed(images)
    if isinstance(model, CompactTransformer):
        x = x if model.cls_token is None else torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
        return x + model.pos_embed
    return model.norm_pre(model.patch_drop(model._pos_embed(x)))


def attend(attn, asking, asked):
    """Attention of `asking` tokens (B, Q, D) to `asked` ones (B, T, D): output (B, Q, D), map (B, H, Q, T)."""
    H, D = attn.num_heads, attn.attn_dim
    d = D // H

    def project(x, part):
        bias = None if attn.qkv.bias is None else attn.qkv.bias[part * D : (part + 1) * D]
        y = torch.nn.functional.linear(x, attn.qkv.weight[part * D : (part + 1) * D], bias)
        return torch.stack([y[..., h * d : (h + 1) * d] for h in range(H)], 1)

    q, k, v = attn.q_norm(project(asking, 0)), attn.k_norm(project(asked, 1)), project(asked, 2)
    map = (q @ k.transpose(-1, -2) / d**0.5).softmax(-1)
    out = torch.cat([(map @ v)[:, h] for h in range(H)], -1)
    return attn.proj(out), map


def through(block, x, extra=None):
    """The block on tokens x, whose attention may also look at `extra` ones; and its map."""
    keys = x if extra is None else torch.cat([x, extra], 1)
    out, map = attend(block.attn, block.norm1(x), block.norm1(keys))
    if type(block).__module__.startswith("foveal"):
        x = block.norm2(x + out)
        return x + block.mlp(x), map
    x = x + block.ls1(out)
    return x + block.ls2(block.mlp(block.norm2(x))), map


def saliency_of(map, prefix, has_class):
    """(B, N): the class token's row, or the column mean."""
    B, H, Q, T = map.shape
    S = torch.zeros(B, T - prefix, dtype=map.dtype)
    for i in range(B):
        for t in range(prefix, T):
            if has_class:
                S[i, t - prefix] = sum(map[i, h, 0, t] for h in range(H)) / H
            else:
                S[i, t - prefix] = sum(map[i, h, q, t] for h in range(H) for q in range(Q)) / (H * Q)
    return S


def best_pairs(scores, easy):
    """The injective map of easy images to all with the largest total, by trying all of them."""
    B, rows = len(scores), [i for i in range(len(scores)) if easy[i]]
    return max(
        itertools.permutations(range(B), len(rows)),
        key=lambda s: sum(scores[i][j] for i, j in zip(rows, s, strict=True)),
    )


def mixed_by_loops(x, Y, S, easy, rho, official=False):
    """Tokens (B, T, D), labels (B, C) and replaced (B, N) after horizontal mixing."""
    (B, T, _), N = x.shape, S.shape[1]
    rows = [i for i in range(B) if easy[i]]
    scores = [[float(sum(max(S[j, t] - S[i, t] - rho, 0.0) for t in range(N))) for j in range(B)] for i in range(B)]
    out, labels, replaced = x.clone(), Y.clone(), torch.zeros(B, N, dtype=torch.bool)
    for i, j in zip(rows, best_pairs(scores, easy), strict=True):
        compared = rows[0] if official else i
        kept, gained = 0.0, 0.0
        for t in range(N):
            if S[j, t] - S[compared, t] > rho:
                replaced[i, t] = True
                out[i, T - N + t] = x[j, T - N + t]
                gained += S[j, t]
            else:
                kept += S[i, t]
        labels[i] = (kept * Y[i] + gained * Y[j]) / (kept + gained)
    return out, labels, replaced


def cross_entropy(logits, Y):
    """(B,) nats."""
    return -(Y * logits.log_softmax(-1)).sum(-1)


def forward(
    model, images, Y, *, horizontal=None, vertical=None, rho=0.0, tau=2.0, kappa=1, detached=False, stop=False,
    official=False,
):  # fmt: skip
    """Logits, labels and ScoreNet's loss of a model without dropout; horizontal: {block: its ScoreNet}."""
    horizontal = horizontal or {}
    P, has_class = model.num_prefix_tokens, getattr(model, "cls_token", None) is not None
    x, memory, loss, seen = embedded(model, images), [], torch.zeros((), dtype=images.dtype), {}
    for number, block in enumerate(model.blocks):
        if number in horizontal:
            logits = horizontal[number](x.detach() if detached else x)
            CE = cross_entropy(logits, Y)
            loss = loss + CE.mean()
            with torch.no_grad():
                S = saliency_of(through(block, x)[1], P, has_class)
            easy = [bool(ce <= tau) for ce in CE.detach()]
            x, Y, replaced = mixed_by_loops(x, Y, S, easy, rho, official)
            seen[number] = replaced
        extra = torch.cat(memory, 1) if number == vertical else None
        out, map = through(block, x, extra)
        if vertical is not None and number < vertical:
            S = saliency_of(map.detach(), P, has_class)
            kept = torch.stack([x[b, P + S[b].argsort(descending=True)[:kappa]] for b in range(len(x))])
            memory.append(kept.detach() if stop else kept)
        x = out
    return model.forward_head(model.norm(x)), Y, loss, seen
