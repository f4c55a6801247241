"""Slow, obvious twins of the object discoveries: one image, numpy, float64, dense. And pictures made of clusters."""

import numpy as np
import scipy.linalg
import torch


def clusters(labels, width=16, noise=0.05, seed=0, dtype=torch.float32):
    """Features of patches that belong to clusters: (1, N, D). labels: (h, w) integers; clusters are orthogonal."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels).flatten()
    centres = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
    x = centres[labels] + noise * torch.randn(len(labels), width, generator=g, dtype=torch.float64)
    return x[None].to(dtype)


def random_features(B, N, D=8, seed=0, dtype=torch.float32):
    """Loose groups, so that graphs are neither empty nor full, of different scales: (B, N, D)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(B, 4, D, generator=g, dtype=torch.float64)
    which = torch.randint(4, (B, N), generator=g)
    x = centres.gather(1, which[..., None].expand(-1, -1, D)) + torch.randn(B, N, D, generator=g, dtype=torch.float64)
    return (x * (0.1 + torch.rand(B, N, 1, generator=g, dtype=torch.float64) * 5)).to(dtype)


def weights(features, tau, eps, binary=True):
    """(N, N) of features (N, D), a row at a time."""
    x = features.double().numpy()
    length = np.linalg.norm(x, axis=1)
    rows = []
    for one, size in zip(x, length, strict=True):
        cosine = np.divide(x @ one, length * size, out=np.zeros(len(x)), where=length * size > 0)
        if binary:
            rows.append(np.where(cosine > tau, 1.0, eps))
        else:
            rows.append(np.maximum(np.where(cosine >= tau, cosine, eps), eps))
    return np.stack(rows)


def eigen(W):
    """All eigenvalues and vectors of (D - W) y = lambda D y."""
    D = np.diag(W.sum(1))
    return scipy.linalg.eigh(D - W, D)


def piece(side, seed):
    """Flood fill from a cell (r, c)."""
    found, open_ = np.zeros_like(side), [seed]
    while open_:
        r, c = open_.pop()
        if 0 <= r < side.shape[0] and 0 <= c < side.shape[1] and side[r, c] and not found[r, c]:
            found[r, c] = True
            open_ += [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
    return found


def tokencut(features, grid, tau=0.2, eps=1e-5, by_corners=False):
    """Eigenvector of the object's sign (h, w), its side, its mask, the seed, of features (N, D)."""
    y = eigen(weights(features, tau, eps))[1][:, 1]
    seed = int(np.argmax(np.abs(y)))
    if not y[seed] > y.mean():
        y = -y
    side = (y > y.mean()).reshape(grid)
    if by_corners and side[0, 0] + 0 + side[0, -1] + side[-1, 0] + side[-1, -1] >= 3:
        y, side = -y, ~side
        seed = int(np.argmax(y))
    return y.reshape(grid), side, piece(side, divmod(seed, grid[1])), seed


def ties(y, near=1e-3):
    """Are the two largest entries, of either sign, or one entry and the mean, too close to be told apart?"""
    gaps = [-np.diff(np.sort(values.ravel())[::-1][:2])[0] for values in (np.abs(y), y)]
    return min(*gaps, np.abs(y - y.mean()).min()) < near * np.abs(y).max()


def maskcut(features, grid, objects=3, tau=0.15, eps=1e-5):
    """Disjoint masks (K, h, w) of features (N, D); are they the only right ones?"""
    x = features.clone()
    masks, taken, previous, clear = [], np.zeros(grid, bool), None, True
    for t in range(objects):
        y, _, mask, _ = tokencut(x, grid, tau, eps, by_corners=True)
        values = eigen(weights(x, tau, eps))[0]
        clear = clear and values[2] - values[1] > 1e-3 and not ties(y)
        if t:
            overlap = (mask & previous).sum() / (mask | previous).sum()
            if overlap > 0.5 or mask.sum() / mask.size <= 0.01:
                mask = np.zeros(grid, bool)
        masks.append(mask & ~taken)
        taken, previous = taken | mask, mask
        x[torch.from_numpy(mask).flatten()] = 0
    return np.stack(masks), clear


def lost(features, grid, candidates=100):
    """M (h, w), mask, seed of features (N, D)."""
    x = features.double().numpy()
    N = len(x)
    A = x @ x.T
    degree = [sum(A[i, j] > 0 for j in range(N) if j != i) for i in range(N)]
    order = sorted(range(N), key=lambda i: degree[i])  # of equal ones the first stays first
    seed = order[0]
    M = sum(A[s] for s in order[:candidates] if A[seed, s] > 0).reshape(grid)
    return M, piece(M > 0, divmod(seed, grid[1])), seed


def box(mask):
    rows, columns = np.nonzero(mask)
    return [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1] if len(rows) else [0, 0, 0, 0]
