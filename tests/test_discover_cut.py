"""The graph of look-alikes and its normalised cut: dense twins, graphs without a cut, what float32 cannot tell."""

import numpy as np
import pytest
import torch

import discover_twins as twins
from foveal.maps.discover import graph, normalised_cut
from foveal.maps.discover.cut import _at_once
from foveal.maps.discover.exactly import exactly
from foveal.maps.discover.lanczos import FLOAT32, FLOAT64, lanczos


def cosine(y, other, W):
    """Of the angle between two vectors, in the product that the eigenvectors are orthogonal in."""
    d = W.sum(1)
    return abs((y * d) @ other) / np.sqrt((y * y * d).sum() * (other * other * d).sum())


def check(W, cut, i, tolerance):
    """One graph's cut against all eigenvectors. tolerance: of 1 - cosine."""
    values, vectors = twins.eigen(W)
    assert float(cut.eigenvalue[i]) == pytest.approx(values[1], abs=2e-6)
    y = cut.vector[i].double().numpy()
    d = W.sum(1)
    assert (d * y).sum() == pytest.approx(0, abs=1e-5 * d.sum() ** 0.5)
    assert (d * y * y).sum() == pytest.approx(1, abs=1e-5)
    assert 0 <= float(cut.eigenvalue[i]) <= 2
    assert not cut.degenerate[i]
    near = vectors[:, 1:][:, values[1:] - values[1] < 1e-9]  # equal ones share a plane
    assert np.sqrt(sum(cosine(y, v, W) ** 2 for v in near.T)) > 1 - tolerance
    if near.shape[1] == 1 and len(W) > 2:
        assert float(cut.gap[i]) > values[2] - values[1] - 1e-5


# -- the graph


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("tau", [0.0, 0.2, 0.7])
def test_graph_is_its_slow_twin(binary, tau):
    x = twins.random_features(2, 35, dtype=torch.float64)
    x[0, 3] = 0
    W = graph(x, tau, 1e-5, binary)
    for one, features in zip(W, x, strict=True):
        assert np.allclose(one.numpy(), twins.weights(features, tau, 1e-5, binary), atol=1e-12)
    assert float(W[0, 3].max()) == 1e-5  # a vector of zeros does not even resemble itself
    assert torch.allclose(W, W.mT)


def test_graph_knows_directions_only():
    x = twins.random_features(2, 20, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    scale = torch.rand(2, 20, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(graph(x), graph(x * scale))
    assert torch.equal(graph(x), graph(x @ turn))


def test_threshold_is_strict_for_a_binary_graph():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # cosine 0
    assert graph(x, tau=0.0)[0, 0, 1] == pytest.approx(1e-5)
    assert graph(x, tau=0.0, binary=False)[0, 0, 1] == pytest.approx(1e-5)  # no patch without an edge
    assert graph(x, tau=-0.1)[0, 0, 1] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    x = twins.random_features(1, 30).to(dtype)
    assert graph(x).dtype == torch.float32
    assert torch.equal(graph(x), graph(x.float()))


def test_features_that_are_not_finite_resemble_nothing():
    x = twins.random_features(1, 12)
    x[0, 2], x[0, 5, 1] = float("nan"), float("inf")
    W = graph(x, binary=True)
    assert W[0, [2, 5]].max() == W[0, :, [2, 5]].max() == torch.tensor(1e-5)
    assert graph(x, binary=False).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 1.0}, r"tau=1.0"),
        ({"tau": float("nan")}, "tau"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"tau": -0.5, "binary": False}, "negative weights"),
    ],
)
def test_settings_that_make_no_graph(settings, message):
    with pytest.raises(ValueError, match=message):
        graph(torch.ones(1, 4, 2), **settings)
    with pytest.raises(ValueError, match="B, N, D"):
        graph(torch.ones(4, 2))


def test_products_are_exact_whatever_is_set_outside():
    x = twins.random_features(2, 40, D=64)
    plain = graph(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graph(x), plain)
        assert torch.is_autocast_enabled("cpu")
    torch.set_float32_matmul_precision("medium")
    try:
        with exactly(x):
            if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            else:
                assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.equal(graph(x), plain)
    finally:
        torch.set_float32_matmul_precision("highest")


# -- the cut


def test_example_of_six_patches():
    W = torch.full((6, 6), 1e-5, dtype=torch.float64).fill_diagonal_(1)
    for a, b in [(0, 1), (0, 3), (1, 3), (1, 4), (0, 4), (3, 4), (2, 5), (4, 5)]:
        W[a, b] = W[b, a] = 1
    assert W.sum(1).tolist() == pytest.approx([4, 4, 2, 4, 5, 3], abs=1e-4)
    known = [-0.141625, -0.141625, 0.484171, -0.141625, -0.038114, 0.307239]
    for dtype in (torch.float64, torch.float32):
        cut = normalised_cut(W[None].to(dtype))
        assert float(cut.eigenvalue) == pytest.approx(0.182738, abs=1e-6)
        assert float(cut.gap) == pytest.approx(0.841257 - 0.182738, abs=1e-6)
        y = cut.vector[0] * cut.vector[0, 2].sign()
        assert y.tolist() == pytest.approx(known, abs=1e-6)
        assert float(y.mean()) == pytest.approx(0.054736, abs=1e-6)


@pytest.mark.parametrize("N", [2, 3, 5, 7, 8, 9, 35, 64, 196])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cut_is_the_dense_solvers(N, dtype):
    for tau in (0.1, 0.4):
        W = graph(twins.random_features(3, N, seed=N, dtype=dtype), tau)
        cut = normalised_cut(W)
        assert cut.vector.shape == (3, N)
        assert cut.vector.dtype == dtype
        for i, one in enumerate(W.double().numpy()):
            values = twins.eigen(one)[0]
            if values[1] > 1 - 1e-6 or (N > 2 and values[-1] - values[1] < 1e-6):
                assert cut.degenerate[i]
            else:
                check(one, cut, i, 1e-12 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_cut_of_graphs_that_no_features_make(share, seed):
    """Random edges: narrow gaps, negative eigenvalues, patches without neighbours."""
    g = torch.Generator().manual_seed(seed)
    edges = torch.rand(4, 60, 60, generator=g) < share
    W = (edges | edges.mT).float().clamp_min(1e-5)
    W.diagonal(dim1=1, dim2=2).fill_(1)
    cut = normalised_cut(W)
    for i, one in enumerate(W.double().numpy()):
        check(one, cut, i, 1e-7)


def test_a_narrow_gap_is_resolved():
    """Parts that faint edges join: eigenvalues within 1e-5 of each other, below float32."""
    N = 60
    for sizes in ([30, 20, 10], [56, 1, 1, 1, 1], [20, 20, 19, 1]):
        W = torch.full((1, N, N), 1e-5)
        start = 0
        for size in sizes:
            W[0, start : start + size, start : start + size] = 1
            start += size
        check(W[0].double().numpy(), normalised_cut(W), 0, 1e-7)


def test_two_objects_alike_give_one_vector_of_their_plane():
    labels = torch.zeros(9, 9, dtype=torch.long)
    labels[1:3, 1:3], labels[6:8, 6:8] = 1, 2
    W = graph(twins.clusters(labels, noise=0))
    cut = normalised_cut(W)
    check(W[0].double().numpy(), cut, 0, 1e-6)
    assert torch.equal(cut.vector, normalised_cut(W.clone()).vector)


@pytest.mark.parametrize("N", [2, 3, 6, 35, 196])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graphs_without_a_cut(N, dtype):
    full = torch.ones(1, N, N, dtype=dtype)
    alone = torch.full((1, N, N), 1e-5, dtype=dtype)
    empty = alone.clone()
    alone.diagonal(dim1=1, dim2=2).fill_(1)
    cut = normalised_cut(torch.cat([full, empty, alone]))
    assert cut.degenerate.tolist() == [True, True, N > 2]  # two strangers are cut apart
    assert not cut.vector[cut.degenerate].any()
    assert cut.vector.isfinite().all()
    assert cut.eigenvalue[0] == pytest.approx(1, abs=1e-5)
    if N > 2:
        assert cut.eigenvalue[2] == pytest.approx(N * 1e-5 / (1 + (N - 1) * 1e-5), abs=1e-6)


def test_one_missing_edge_is_a_cut():
    for N in (4, 30, 300):
        W = torch.ones(1, N, N)
        W[0, 0, 1] = W[0, 1, 0] = 1e-5
        cut = normalised_cut(W)
        assert not cut.degenerate
        y = cut.vector[0] / cut.vector[0, 0]
        assert y.tolist() == pytest.approx([1, -1, *[0] * (N - 2)], abs=1e-3)


def test_images_of_a_batch_do_not_meet():
    W = graph(twins.random_features(5, 49, seed=3))
    W[2] = 1
    together = normalised_cut(W)
    for i in range(5):
        alone = normalised_cut(W[i : i + 1])
        for name in ("vector", "eigenvalue", "gap", "degenerate"):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0])
    assert together.degenerate.tolist() == [False, False, True, False, False]


def test_no_images_no_cuts():
    assert normalised_cut(torch.zeros(0, 4, 4)).vector.shape == (0, 4)


@pytest.mark.parametrize("N", [35, 196])
def test_torch_takes_the_same_steps_as_numpy(N):
    """What runs on other devices, on this one."""
    W = graph(twins.random_features(4, N, seed=N), 0.3)
    W[1] = 1
    ours, twin = lanczos(W), [lanczos(one.numpy()) for one in W]
    assert ours.vector.dtype == torch.float32
    for i, one in enumerate(twin):
        assert one.vector.dtype == np.float32
        assert bool(ours.sure[i]) == bool(one.sure[0]) == (i != 1)
        assert float(ours.value[i]) == pytest.approx(float(one.value[0]), abs=1e-6)
        if i != 1:
            known = torch.from_numpy(one.vector)
            sign = (ours.vector[i] * known).sum().sign()  # either one, as their LAPACK has it
            assert torch.allclose(sign * ours.vector[i], known, atol=1e-5)
    for dtype, precision in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        batch = lanczos(W.to(dtype), precision)
        for i in (0, 2, 3):  # the first check that satisfies an image decides, whatever its neighbours need
            alone = lanczos(W[i : i + 1].to(dtype), precision).vector[0]
            assert torch.allclose(batch.vector[i], (batch.vector[i] * alone).sum().sign() * alone, atol=1e-5)


def test_a_device_hands_on_what_it_cannot_tell():
    N = 60
    hard = torch.full((N, N), 1e-5)
    for start, end in ((0, 30), (30, 50), (50, 60)):
        hard[start:end, start:end] = 1
    W = torch.stack([graph(twins.random_features(1, N))[0], hard, torch.ones(N, N)])
    found, cut = _at_once(W), normalised_cut(W)
    assert not lanczos(W).sure[1]
    assert torch.allclose(found.vector.abs(), cut.vector.abs(), atol=1e-5)
    assert torch.allclose(found.eigenvalue[:2], cut.eigenvalue[:2], atol=1e-6)
    assert found.degenerate.tolist() == cut.degenerate.tolist() == [False, False, True]
    assert float(found.gap[1]) == pytest.approx(float(cut.gap[1]))


def test_chance_is_left_alone():
    W = graph(twins.random_features(2, 41))
    before = torch.get_rng_state()
    normalised_cut(W)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 5), (2, 1, 1)])
def test_weights_that_are_no_graphs(shape):
    with pytest.raises(ValueError, match="B, N, N"):
        normalised_cut(torch.ones(shape))
