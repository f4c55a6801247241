"""The cheapest labelling of a grid, exactly, by one minimum cut.

    minimise  sum_p unary_p(l_p) + sum_pq edge_pq ((l_p - l_q) / (L - 1))^2        l in {0, ..., L-1}, edges >= 0

A label becomes L - 1 binary nodes x_k = [l >= k+1], x_0 >= x_1 >= ..., and with K = L - 1

    (l - m)^2 = sum_ij |x_i - y_j| - l (K - l) - m (K - m)

so the square is edges between all nodes of two neighbours and a correction of their unaries: a minimum cut gives the
global minimum for any number of labels (a case of Ishikawa, 2003), where alpha-beta swaps stop at local ones. SciPy's
maximum flow (Dinic) finds the cut.

B images, h x w blocks, L labels; integers, since a cut is exact for integers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

Ints = npt.NDArray[np.int64]

LIMIT = 2**30  # capacities are 32-bit; this one stands for infinite
NODES = 8192  # images are cut together up to this many nodes: calls cost time, and so do graphs beyond the cache


def energy(unary: Ints, down: Ints, right: Ints, labels: Ints) -> Ints:
    """(L-1)^2 times the cost of each labelling, an integer: (B,). Arguments as `cheapest`, labels (B, h, w)."""
    K = unary.shape[-1] - 1
    own = np.take_along_axis(unary, labels[..., None], -1).sum((1, 2, 3))
    below = (down * (labels[:, :-1] - labels[:, 1:]) ** 2).sum((1, 2))
    beside = (right * (labels[:, :, :-1] - labels[:, :, 1:]) ** 2).sum((1, 2))
    total: Ints = K**2 * own + below + beside
    return total


def cheapest(unary: Ints, down: Ints, right: Ints) -> Ints:
    """Labels (B, h, w) of least cost.

    unary: (B, h, w, L) int64, any sign.  down: (B, h-1, w) and right: (B, h, w-1) int64, the edges to the block below
    and to the right, zero or more.  Raises ValueError for negative edges, which no cut can minimise, and for costs
    that do not fit into 32 bits.
    """
    if min(down.min(initial=0), right.min(initial=0)) < 0:
        raise ValueError("an edge has a negative cost: no minimum cut gives the cheapest labels")
    B, h, w, L = unary.shape
    together = max(1, NODES // (h * w * (L - 1)))
    parts = [slice(first, first + together) for first in range(0, B, together)]
    return np.concatenate([_cut(unary[part], down[part], right[part]) for part in parts])


def _cut(unary: Ints, down: Ints, right: Ints) -> Ints:
    B, h, w, L = unary.shape
    K = L - 1
    graph = _graph(B, h, w, K)
    price = _prices(unary, down, right)
    if max(np.abs(price).sum((1, 2, 3)).max(), down.max(initial=0), right.max(initial=0)) >= LIMIT:
        raise ValueError("costs of a labelling sum to 2^30 or more, beyond 32-bit capacities: scale them down")
    edges = np.repeat(np.concatenate([down.ravel(), right.ravel()]), K * K)
    never = np.full(B * h * w * (K - 1), LIMIT)
    to_sink = np.maximum(-price.ravel(), 0)
    forward = [np.maximum(price.ravel(), 0), to_sink, edges, never]
    backward = [np.zeros(2 * to_sink.size, np.int64), edges, np.zeros_like(never)]
    capacity = np.concatenate([*forward, *backward])[graph.order].astype(np.int32)
    nodes = len(graph.indptr) - 1
    whole = csr_array((capacity, graph.indices, graph.indptr), shape=(nodes, nodes))
    left = csr_array(whole - maximum_flow(whole, nodes - 2, nodes - 1).flow)
    left.eliminate_zeros()
    is_one = np.ones(nodes, dtype=np.int64)
    is_one[breadth_first_order(left, nodes - 2, return_predecessors=False)] = 0  # the source's side of the cut
    labels: Ints = is_one[:-2].reshape(B, h, w, K).sum(-1)
    return labels


def _prices(unary: Ints, down: Ints, right: Ints) -> Ints:
    """(L-1)^2 times what x_k = 1 costs, corrected for the edges: (B, h, w, K)."""
    K = unary.shape[-1] - 1
    edges = np.zeros(unary.shape[:-1], dtype=np.int64)  # sum of the edges at each block
    edges[:, :-1] += down
    edges[:, 1:] += down
    edges[:, :, :-1] += right
    edges[:, :, 1:] += right
    step = K - 1 - 2 * np.arange(K)  # of l (K - l), from l = k to k + 1
    prices: Ints = K**2 * np.diff(unary, axis=-1) - edges[..., None] * step
    return prices


@dataclass(frozen=True)
class _Graph:
    """Edges of a grid in compressed rows. The source is the last node but one, the sink the last."""

    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    order: Ints  # place of each compressed entry in: to nodes, to sink, down, right, chain, and the same backwards


@lru_cache(maxsize=64)
def _graph(B: int, h: int, w: int, K: int) -> _Graph:
    nodes = np.arange(B * h * w * K).reshape(B, h, w, K)
    source, sink = nodes.size, nodes.size + 1

    def between(a: Ints, b: Ints) -> tuple[Ints, Ints]:
        every = np.broadcast_arrays(a[..., :, None], b[..., None, :])
        return every[0].ravel(), every[1].ravel()

    flat = nodes.ravel()
    pairs = [
        (np.full_like(flat, source), flat),
        (flat, np.full_like(flat, sink)),
        between(nodes[:, :-1], nodes[:, 1:]),
        between(nodes[:, :, :-1], nodes[:, :, 1:]),
        (nodes[..., :-1].ravel(), nodes[..., 1:].ravel()),  # never x_k = 0 and x_k+1 = 1
    ]
    tail, head = (np.concatenate([pair[end] for pair in pairs]) for end in (0, 1))
    tail, head = np.concatenate([tail, head]), np.concatenate([head, tail])
    order = np.lexsort((head, tail))
    indptr = np.concatenate([[0], np.bincount(tail, minlength=sink + 1).cumsum()])
    return _Graph(indptr.astype(np.int32), head[order].astype(np.int32), order)
