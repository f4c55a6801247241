"""MAE's forward and loss written down in plain operations: the slow twin of `foveal.pretrain`."""

import math

import torch


def tokens_of(encoder, images):
    """Patch embedding as a sum over pixels: (B, N, D), row by row."""
    weight, bias = encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias
    p, q = encoder.patch_embed.patch_size
    h, w = images.shape[2] // p, images.shape[3] // q
    cells = [images[:, :, r * p : (r + 1) * p, c * q : (c + 1) * q] for r in range(h) for c in range(w)]
    return torch.stack([torch.einsum("bcyx,dcyx->bd", cell, weight) + bias for cell in cells], 1)


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def block(x, part):
    """A pre-norm block, head by head."""
    d = x.shape[-1] // part.attn.num_heads
    q, k, v = linear(layer_norm(x, part.norm1), part.attn.qkv).chunk(3, -1)
    heads = []
    for one in range(part.attn.num_heads):
        a, b, c = (z[..., one * d : (one + 1) * d] for z in (q, k, v))
        heads.append((a @ b.transpose(1, 2) / math.sqrt(d)).softmax(-1) @ c)
    x = x + linear(torch.cat(heads, -1), part.attn.proj)
    hidden = linear(layer_norm(x, part.norm2), part.mlp.fc1)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, part.mlp.fc2)


def slow_mae(autoencoder, images, noise):
    """(latent, prediction, removed, loss), image by image, patch by patch; for plain blocks and a class token."""
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    B, N = noise.shape
    K = int(N * (1 - autoencoder.mask_ratio))
    tokens = tokens_of(encoder, images)
    latents, predictions, removed = [], [], torch.ones(B, N, dtype=images.dtype)
    for b in range(B):
        kept = sorted(range(N), key=lambda i: float(noise[b, i]))[:K]
        removed[b, kept] = 0
        rows = [encoder.cls_token[0, 0] + encoder.pos_embed[0, 0]]
        rows += [tokens[b, i] + encoder.pos_embed[0, 1 + i] for i in kept]
        x = torch.stack(rows)[None]
        for part in encoder.blocks:
            x = block(x, part)
        latents.append(layer_norm(x, encoder.norm))
        y = linear(latents[-1], decoder.embed)[0]
        rows = [y[0]] + [y[1 + kept.index(i)] if i in kept else decoder.mask_token[0, 0] for i in range(N)]
        z = (torch.stack(rows) + decoder.pos_embed[0])[None]
        for part in decoder.blocks:
            z = block(z, part)
        predictions.append(linear(layer_norm(z, decoder.norm), decoder.head)[:, 1:])
    prediction = torch.cat(predictions)
    total, count = 0.0, 0.0
    p, q = encoder.patch_embed.patch_size
    w = images.shape[3] // q
    for b in range(B):
        for i in range(N):
            r, c = divmod(i, w)
            cell = images[b, :, r * p : (r + 1) * p, c * q : (c + 1) * q]
            truth = torch.stack([cell[ch, y, x] for y in range(p) for x in range(q) for ch in range(len(cell))])
            if autoencoder.norm_pix_loss:
                variance = ((truth - truth.mean()) ** 2).sum() / (len(truth) - 1)
                truth = (truth - truth.mean()) / (variance + 1e-6).sqrt()
            total = total + removed[b, i] * ((prediction[b, i] - truth) ** 2).mean()
            count = count + removed[b, i]
    return torch.cat(latents), prediction, removed, total / count
