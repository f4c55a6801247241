"""Rows, means and maps as pure functions, against plain matrix arithmetic."""

import pytest
import torch

from foveal.attention import rows


def qkv(B=2, H=3, Q=11, T=11, d=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, Q, d, generator=g, dtype=dtype)
    k = torch.randn(B, H, T, d, generator=g, dtype=dtype)
    return q, k


def plain(q, k, scale, mask=None):
    logits = q @ k.transpose(-1, -2) * scale
    return logits if mask is None else logits + mask


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that batch, heads and queries are all cut."""
    monkeypatch.setitem(rows.TILE_BYTES, "cpu", 8 * 11 * 5)


def test_two_tokens_by_hand():
    q = torch.tensor([[[[2.0], [0.0]]]])
    k = torch.tensor([[[[1.0], [0.0]]]])
    assert torch.allclose(rows.query_row(q[:, :, 0], k, 1.0), torch.tensor([[[2.0, 0.0]]]))
    expected = torch.tensor([[[[0.8808, 0.1192], [0.5, 0.5]]]])
    assert torch.allclose(rows.attention_map(q, k, 1.0), expected, atol=5e-5)
    assert torch.allclose(rows.received(q, k, 1.0), torch.tensor([[[0.6904, 0.3096]]]), atol=5e-5)
    mean = rows.mean_query_row(q, k, 1.0).softmax(-1)
    assert torch.allclose(mean, torch.tensor([[[0.7311, 0.2689]]]), atol=5e-5)  # not the received attention


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_received_is_the_column_mean_of_the_map(shape, masked):
    q, k = qkv(*shape)
    mask = torch.randn(1, shape[1], 11, 11, dtype=torch.float64) if masked else None
    expected = plain(q, k, 0.3, mask).softmax(-1).mean(-2)
    assert torch.allclose(rows.received(q, k, 0.3, mask), expected, atol=1e-14)


def test_received_sums_to_one_and_is_uniform_for_equal_keys():
    q, k = qkv()
    assert torch.allclose(rows.received(q, k, 0.3).sum(-1), torch.ones(2, 3, dtype=torch.float64))
    same = k[:, :, :1].expand_as(k)
    assert torch.allclose(rows.received(q, same, 0.3), torch.full((2, 3, 11), 1 / 11, dtype=torch.float64))


@pytest.mark.parametrize("mask_shape", [(1, 3, 11, 11), (2, 1, 1, 11), (2, 3, 11, 11)])
def test_received_has_the_gradient_of_the_plain_form(mask_shape):
    q, k = (x.requires_grad_() for x in qkv())
    mask = torch.randn(mask_shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 11, dtype=torch.float64)
    expected = torch.autograd.grad((plain(q, k, 0.3, mask).softmax(-1).mean(-2) * weight).sum(), (q, k, mask))
    got = torch.autograd.grad((rows.received(q, k, 0.3, mask) * weight).sum(), (q, k, mask))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_received_can_be_differentiated_twice():
    inputs = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda q, k, m: rows.received(q, k, 0.3, m), (*inputs, mask))


def test_padded_queries_do_not_count():
    q, k = qkv()
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1, 7:] = False
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    mask = torch.zeros(2, 1, 11, 11, dtype=torch.float64).masked_fill(~pairs, torch.finfo(torch.float64).min)
    got = rows.received(q, k, 0.3, mask, valid)
    short = plain(q[1:, :, :7], k[1:, :, :7], 0.3).softmax(-1).mean(-2)
    assert torch.allclose(got[1:, :, :7], short)
    row = rows.mean_query_row(q, k, 0.3, mask, valid)
    assert torch.allclose(row[1:, :, :7], plain(q[1:, :, :7], k[1:, :, :7], 0.3).mean(-2))
    assert (row[1, :, 7:] < -1e300).all()


def test_mean_query_row_is_the_mean_of_the_logits():
    q, k = qkv()
    mask = torch.randn(1, 3, 11, 11, dtype=torch.float64)
    assert torch.allclose(rows.mean_query_row(q, k, 0.3, mask), plain(q, k, 0.3, mask).mean(-2))


def test_a_long_sequence_never_holds_a_square():
    q, k = qkv(1, 1, 4096, 4096, 8, torch.float32)
    rows.TILE_BYTES["cpu"] = 1 << 20
    biggest = max((i.stop - i.start) * 4096 * 4 for _, _, i in rows._tiles(q, k))
    assert biggest <= 1 << 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    q, k = (x.to(dtype) for x in qkv(dtype=torch.float32))
    row = rows.query_row(q[:, :, 0], k, 0.3)
    assert row.dtype == torch.float32
    assert torch.allclose(row, plain(q.float(), k.float(), 0.3)[:, :, 0], atol=1e-6)
    assert rows.received(q, k, 0.3).dtype == torch.float32


def test_boolean_masks_become_additive():
    mask = torch.tensor([True, False])
    assert rows.additive(mask, torch.zeros(1)).tolist() == [0.0, float("-inf")]


@pytest.mark.parametrize("fused", [True, False])
def test_a_row_has_the_derivatives_of_its_definition(fused):
    """Keys as a fused projection leaves them, token by token, and keys on their own: first and second derivatives."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 3, 4, dtype=torch.float64, generator=rng, requires_grad=True)

    def row(x, by):
        q, k, _ = x.permute(2, 0, 3, 1, 4).unbind(0)
        return by(q[:, :, 1], k if fused else k.contiguous())

    def ours(q, k):
        return rows.query_row(q, k, 0.5)

    def plain(q, k):
        return 0.5 * (q.unsqueeze(2) * k).sum(-1)

    weight = torch.randn(2, 3, 5, dtype=torch.float64, generator=rng)
    assert torch.allclose(row(x, ours), row(x, plain), rtol=1e-13)
    mine, theirs = (
        torch.autograd.grad((row(x, by) * weight).square().sum(), x, create_graph=True)[0] for by in (ours, plain)
    )
    assert torch.allclose(mine, theirs, rtol=1e-12)
    second = [torch.autograd.grad(first.square().sum(), x)[0] for first in (mine, theirs)]
    assert torch.allclose(*second, rtol=1e-11)


def test_half_precision_rows_give_half_precision_gradients():
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, generator=rng).bfloat16().requires_grad_()
    k = torch.randn(2, 5, 3, 4, generator=rng).bfloat16().transpose(1, 2).requires_grad_()
    row = rows.query_row(q, k, 0.5)
    assert row.dtype == torch.float32
    row.sum().backward()
    assert q.grad.dtype == k.grad.dtype == torch.bfloat16
    assert torch.allclose(q.grad.float(), 0.5 * k.float().sum(2), rtol=1e-2)


def test_a_row_keeps_no_copy_of_the_keys():
    x = torch.randn(2, 64, 3, 4, 8, requires_grad=True)
    q, k, _ = x.permute(2, 0, 3, 1, 4).unbind(0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rows.query_row(q[:, :, 0], k, 1.0)
    assert {t.untyped_storage().data_ptr() for t in kept} == {x.untyped_storage().data_ptr()}
