"""TokenMixup's parts on their own: worked examples, the slow twin, what is always true."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from foveal import chance
from foveal.attention import TokenLayout
from foveal.mix import assignment
from foveal.mix.assignment import assign, improvable, pair_scores, prices
from foveal.mix.horizontal import as_many, chosen, count_weights, exchange, first_easy, saliency_weights
from foveal.mix.saliency import random_saliency
from foveal.mix.scorenet import ScoreNet, difficulty
from foveal.mix.vertical import gather, most_salient
from slow_tokenmixup import mixed_by_loops

f64 = torch.float64


def saliency(B, N, seed=0, peak=2.0, dtype=f64):
    g = torch.Generator().manual_seed(seed)
    return (peak * torch.randn(B, N, generator=g, dtype=dtype)).softmax(-1)


def mixed(tokens, S, easy, rho, official=False):
    """Tokens, label weights, partner and mask."""
    partner, _ = assign(pair_scores(S, rho), easy)
    replaced = chosen(S, partner, easy, rho, first_easy(S, easy) if official else None)
    return exchange(tokens, partner, replaced), saliency_weights(S, partner, replaced), partner, replaced


# -- by hand

A_SALIENCY = torch.tensor([[0.40, 0.30, 0.20, 0.10], [0.10, 0.20, 0.30, 0.40], [0.25] * 4], dtype=f64)
A_TOKENS = (10.0 * torch.arange(3)[:, None] + torch.arange(4)).to(f64)[..., None]
A_EASY = torch.tensor([True, False, True])


def test_worked_example():
    scores = pair_scores(A_SALIENCY, 0.04)
    assert torch.allclose(scores[[0, 2]], torch.tensor([[0, 0.32, 0.12], [0.12, 0.12, 0]], dtype=f64), atol=1e-12)
    tokens, weights, partner, replaced = mixed(A_TOKENS, A_SALIENCY, A_EASY, 0.04)
    assert partner.tolist() == [1, 1, 0]
    assert replaced.tolist() == [[False, False, True, True], [False] * 4, [True, True, False, False]]
    assert tokens[..., 0].tolist() == [[0, 1, 12, 13], [10, 11, 12, 13], [0, 1, 22, 23]]
    labels = weights.mix(torch.eye(3, dtype=f64))
    expected = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0.7 / 1.2, 0, 0.5 / 1.2]], dtype=f64)
    assert torch.allclose(labels, expected, atol=1e-12)
    assert torch.allclose(labels[2], torch.tensor([0.58333, 0, 0.41667], dtype=f64), atol=1e-5)


def test_worked_example_with_the_released_mask():
    """Image 2 is compared with image 0, its own donor, so nothing of it is replaced."""
    tokens, weights, _, replaced = mixed(A_TOKENS, A_SALIENCY, A_EASY, 0.04, official=True)
    assert replaced.tolist() == [[False, False, True, True], [False] * 4, [False] * 4]
    assert tokens[2, :, 0].tolist() == [20, 21, 22, 23]
    assert weights.mix(torch.eye(3, dtype=f64))[2].tolist() == [0, 0, 1]


def test_worked_difficulty():
    logits, label = torch.tensor([[2.0, 0.0, 0.0]], dtype=f64), torch.tensor([[0.9, 0.05, 0.05]], dtype=f64)
    assert abs(float(difficulty(logits, label)) - 0.4395) < 5e-5


@pytest.mark.parametrize(("classes", "floor"), [(10, 0.500), (100, 0.778), (1000, 1.015)])
def test_the_least_difficulty_is_the_entropy_of_the_label(classes, floor):
    label = torch.full((1, classes), 0.1 / classes, dtype=f64)
    label[0, 3] += 0.9
    assert abs(float(difficulty(label.log(), label)) - floor) < 6e-4
    uniform = difficulty(torch.zeros(1, classes, dtype=f64), label)
    assert torch.allclose(uniform, torch.tensor(classes, dtype=f64).log())


def test_label_weights_by_the_number_of_tokens():
    replaced = torch.tensor([[True, False, False, False], [True, True, True, True], [False] * 4])
    weights = count_weights(torch.tensor([1, 2, 2]), replaced)
    assert weights.partner.tolist() == [0.25, 1, 0]
    assert (weights.own + weights.partner).tolist() == [1, 1, 1]


# -- the cost matrix


@pytest.mark.parametrize(("B", "N"), [(1, 7), (5, 16), (9, 64), (33, 196)])
@pytest.mark.parametrize("rho", [0.0, 0.003, 0.05])
@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_scores_are_the_sums_of_the_definition(B, N, rho, mass):
    S = saliency(B, N) * mass * torch.rand(B, 1, dtype=f64, generator=torch.Generator().manual_seed(1))
    cube = (S[None, :] - S[:, None] - rho).clamp_min(0).sum(-1)  # [i, j] = sum_t max(S_jt - S_it - rho, 0)
    assert torch.allclose(pair_scores(S, rho), cube, atol=1e-12)
    assert torch.allclose(pair_scores(S.float(), rho).double(), cube, atol=3e-7)  # float32 sums near 1 cancel


def test_scores_of_nothing_to_gain_are_exactly_zero():
    for dtype in (f64, torch.float32):
        constant = torch.full((6, 64), 1 / 64, dtype=dtype)
        assert not pair_scores(constant, 0.0).any()
        assert not pair_scores(saliency(6, 64, dtype=dtype), 1.0).any()
        nearly = constant + 6e-5 * torch.randn(6, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
        assert not pair_scores(nearly, 0.003).any()  # an untrained model


def test_the_diagonal_gains_nothing():
    assert pair_scores(saliency(8, 32), 0.0).diagonal().abs().max() < 1e-15


def test_improvable_is_any_positive_score():
    S = saliency(20, 16, peak=0.3)
    for rho in (0.0, 0.02, 0.05, 0.08, 0.2):
        cube = (S[None, :] - S[:, None] - rho).clamp_min(0).sum(-1)
        assert torch.equal(improvable(S, rho), (cube > 0).any(1))


# -- the assignment


@pytest.mark.parametrize("seed", range(6))
def test_no_other_assignment_is_better(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 5, generator=g, dtype=f64)
    easy = torch.rand(5, generator=g) < 0.7
    easy[0] = True
    partner, gains = assign(scores, easy)
    rows = easy.nonzero().flatten().tolist()
    best = max(
        sum(float(scores[i, j]) for i, j in zip(rows, s, strict=True))
        for s in itertools.permutations(range(5), len(rows))
    )
    assert gains
    assert sum(float(scores[i, partner[i]]) for i in rows) == pytest.approx(best, abs=1e-12)
    assert len({int(partner[i]) for i in rows}) == len(rows)
    assert all(int(partner[i]) == i for i in range(5) if i not in rows)


def test_nothing_to_gain_is_known_without_a_partner():
    partner, gains = assign(torch.zeros(4, 4), torch.ones(4, dtype=torch.bool))
    assert partner.tolist() == [0, 1, 2, 3]
    assert gains is False
    partner, gains = assign(torch.rand(4, 4), torch.zeros(4, dtype=torch.bool))
    assert partner.tolist() == [0, 1, 2, 3]
    assert gains is False


def test_a_diverged_model_exchanges_nothing():
    scores = torch.rand(4, 4)
    scores[2, 1] = torch.nan
    partner, gains = assign(scores, torch.ones(4, dtype=torch.bool))
    assert partner.tolist() == [0, 1, 2, 3]
    assert gains is False


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_a_prepared_problem_has_the_same_optimum(share, monkeypatch):
    monkeypatch.setattr(assignment, "PREPARED", 8)
    B = 64
    S = saliency(B, 49, seed=2)
    scores, easy = pair_scores(S, 0.002), torch.arange(B) < share * B
    partner, _ = assign(scores, easy)
    rows = easy.nonzero().flatten().numpy()
    exact = scores.numpy()[rows]
    best = exact[linear_sum_assignment(exact, maximize=True)].sum()
    assert float(scores[easy].gather(1, partner[easy, None]).sum()) == pytest.approx(best, rel=1e-12)
    assert len(set(partner[easy].tolist())) == int(easy.sum())


def test_prices_nearly_cover_the_scores():
    scores = pair_scores(saliency(64, 49, seed=3), 0.002)
    u, v = prices(scores, torch.ones(64, dtype=torch.bool))
    slack = u[:, None] + v - scores
    matched = linear_sum_assignment(scores.numpy(), maximize=True)
    assert float(slack[matched].mean()) < 0.2 * float(slack.mean())  # so that few rows have to search


# -- the slow twin and what is always true


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("official", [False, True])
def test_mixing_is_the_algorithm_in_loops(seed, B, prefix, official):
    g = torch.Generator().manual_seed(seed)
    S, Y = saliency(B, 9, seed), torch.rand(B, 3, generator=g, dtype=f64).softmax(-1)
    x, easy = torch.randn(B, prefix + 9, 4, generator=g, dtype=f64), torch.rand(B, generator=g) < 0.7
    tokens, labels, mask = mixed_by_loops(x, Y, S, easy, 0.01, official)
    got, weights, _, replaced = mixed(x, S, easy, 0.01, official)
    assert torch.equal(replaced, mask)
    assert torch.equal(got, tokens)
    assert torch.allclose(weights.mix(Y), labels, atol=1e-14)


@pytest.fixture
def case():
    B, N, P = 12, 25, 1
    g = torch.Generator().manual_seed(5)
    S, easy = saliency(B, N, 7), torch.rand(B, generator=g) < 0.6
    return torch.randn(B, P + N, 3, generator=g, dtype=f64), S, easy, 0.01


def test_every_token_is_the_images_or_its_partners_in_place(case):
    x, S, easy, rho = case
    got, _, partner, replaced = mixed(x, S, easy, rho)
    whole = torch.cat([torch.zeros(len(x), 1, dtype=torch.bool), replaced], 1)
    assert torch.equal(got, torch.where(whole[..., None], x[partner], x))
    assert torch.equal(got[:, 0], x[:, 0])
    assert torch.equal(got[~easy], x[~easy])
    assert replaced.any()


def test_label_mass_is_kept_and_never_negative(case):
    x, S, easy, rho = case
    for peak in (0.1, 1.0, 8.0):
        weights = mixed(x, saliency(*S.shape, 1, peak), easy, rho)[1]
        labels = weights.mix(torch.eye(len(x), dtype=f64))
        assert torch.allclose(labels.sum(-1), torch.ones(len(x), dtype=f64))
        assert (labels >= 0).all()


def test_saliency_of_the_mixed_image_grows_by_rho_a_token_or_more(case):
    x, S, easy, rho = case
    _, weights, partner, replaced = mixed(x, S, easy, rho)
    held = torch.where(replaced, S[partner], S).sum(-1)
    kept, gained = (S * ~replaced).sum(-1), (S[partner] * replaced).sum(-1)
    assert torch.allclose(held, kept + gained)
    assert (held >= S.sum(-1) + rho * replaced.sum(-1) - 1e-12).all()
    assert torch.allclose(weights.own, torch.where(replaced.any(-1), kept / held, 1.0))


def test_permuting_the_batch_permutes_the_outcome(case):
    x, S, easy, rho = case
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    Y = torch.rand(len(x), 4, dtype=f64, generator=torch.Generator().manual_seed(4))
    plain, permuted = mixed(x, S, easy, rho), mixed(x[order], S[order], easy[order], rho)
    assert torch.equal(permuted[0], plain[0][order])
    assert torch.allclose(permuted[1].mix(Y[order]), plain[1].mix(Y)[order])


def test_copies_of_an_image_exchange_nothing():
    S = saliency(3, 16).repeat_interleave(2, 0)
    _, _, partner, replaced = mixed(torch.randn(6, 16, 2), S, torch.ones(6, dtype=torch.bool), 0.0)
    twins = torch.arange(6) ^ 1
    assert not replaced[partner == twins].any()


@pytest.mark.parametrize("official", [False, True])
def test_one_easy_image_makes_the_released_mask_right(official, case):
    x, S, _, rho = case
    easy = torch.arange(len(x)) == 4
    assert torch.equal(mixed(x, S, easy, rho, official)[0], mixed(x, S, easy, rho)[0])


def test_the_released_mask_replaces_tokens_that_lose():
    """What the bug does: some tokens gain less than rho."""
    S = saliency(32, 64, 1)
    easy, rho = torch.ones(32, dtype=torch.bool), 0.005
    _, _, partner, replaced = mixed(torch.randn(32, 64, 1), S, easy, rho, official=True)
    gain = (S[partner] - S)[replaced]
    assert (gain <= rho).any()
    right = mixed(torch.randn(32, 64, 1), S, easy, rho)[3]
    assert ((S[partner] - S) * replaced).sum() < ((S[partner] - S) * right).sum()


def test_gradient_counts_the_places_a_token_fills(case):
    x, S, easy, rho = case
    x.requires_grad_()
    got, _, partner, replaced = mixed(x, S, easy, rho)
    got.sum().backward()
    counts = torch.ones_like(S)
    counts -= replaced.to(f64)
    counts.index_put_(
        (partner[:, None].expand_as(S)[replaced], replaced.nonzero()[:, 1]), torch.ones((), dtype=f64), True
    )
    assert torch.equal(x.grad[:, 1:, 0], counts)
    assert float(x.grad.sum()) == got.numel()


def test_as_many_tokens_anywhere():
    replaced = saliency(6, 20, peak=1.0) > 0.05
    drawn = as_many(replaced, torch.rand(6, 20, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(drawn.sum(-1), replaced.sum(-1))
    assert not torch.equal(drawn, replaced)


def test_random_saliency_sums_to_one():
    S = random_saliency(4, 50, chance.generator(0, "mix", 0))
    assert torch.allclose(S.sum(-1), torch.ones(4))
    assert torch.equal(S, random_saliency(4, 50, chance.generator(0, "mix", 0)))


# -- ScoreNet


def test_attention_pooling_by_hand():
    net = ScoreNet(2, 2, TokenLayout(prefix=0), "attention").double()
    with torch.no_grad():
        net.attend.weight.copy_(torch.tensor([[1.0, 0.0]]))
        net.attend.bias.fill_(0.5)
        net.head.weight.copy_(torch.eye(2))
        net.head.bias.zero_()
    pooled = net(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=f64))
    assert torch.allclose(pooled, torch.tensor([[0.7311, 0.5379]], dtype=f64), atol=5e-5)


@pytest.mark.parametrize(
    ("layout", "width", "classes", "count"),
    [
        (TokenLayout(0), 256, 100, 25_957),
        (TokenLayout(0), 256, 10, 2_827),
        (TokenLayout.of(has_class=True, prefix=1), 768, 1000, 769_000),
    ],
)
def test_parameter_counts_of_the_paper(layout, width, classes, count):
    assert sum(p.numel() for p in ScoreNet(width, classes, layout).parameters()) == count


def test_poolings_look_at_the_right_tokens():
    layout = TokenLayout.of(has_class=True, has_distillation=True, prefix=2)
    x = torch.randn(3, 11, 4, dtype=f64)
    for pool, unseen in (("class", slice(1, None)), ("mean", slice(0, 2)), ("attention", slice(0, 2))):
        net, other = ScoreNet(4, 5, layout, pool).double(), x.clone()
        other[:, unseen] += 1.0
        assert torch.equal(net(x), net(other))
    assert ScoreNet(4, 5, layout).pool == "class"
    assert ScoreNet(4, 5, TokenLayout(prefix=3, registers=(0, 1, 2))).pool == "attention"
    mean = ScoreNet(4, 5, layout, "mean").double()
    assert torch.allclose(mean(x), mean.head(x[:, 2:].mean(1)))


def test_the_same_seed_the_same_weights_and_no_global_chance():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two, other = (ScoreNet(8, 3, TokenLayout(0), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_start_of_the_weights_as_in_the_released_code():
    for pool in ("attention", "mean"):
        net = ScoreNet(512, 100, TokenLayout(0), pool)
        assert net.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not net.head.bias.any()
    assert ScoreNet(512, 100, TokenLayout(0)).attend.weight.std().item() == pytest.approx(0.02, rel=0.2)
    head = ScoreNet(
        512, 100, TokenLayout.of(has_class=True, prefix=1)
    ).head  # PyTorch's own: uniform within 1/sqrt(512)
    assert head.weight.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.02)
    assert head.bias.any()


def test_a_pooling_that_is_not_there():
    with pytest.raises(ValueError, match="no class token"):
        ScoreNet(8, 3, TokenLayout(0), "class")
    with pytest.raises(ValueError, match="score_pool='max'"):
        ScoreNet(8, 3, TokenLayout(0), "max")


# -- vertical


def test_worked_example_of_vertical_mixing():
    earlier = torch.tensor([[[2.0, 0], [0, 2], [1, -1]]], dtype=f64)
    map = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3]], dtype=f64)
    S = map.mean(0, keepdim=True)
    assert torch.allclose(S, torch.tensor([[0.26667, 0.46667, 0.26667]], dtype=f64), atol=1e-5)
    extra = gather(earlier, most_salient(S, 1, 0))
    assert extra.tolist() == [[[0, 2]]]
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]], dtype=f64)
    keys = torch.cat([x, extra], 1)
    attn = (x @ keys.transpose(-1, -2) / 2**0.5).softmax(-1)
    rows = [[0.3349, 0.1651, 0.3349, 0.1651], [0.1091, 0.2212, 0.2212, 0.4486], [0.1651, 0.1651, 0.3349, 0.3349]]
    assert torch.allclose(attn[0], torch.tensor(rows, dtype=f64), atol=5e-5)
    out = torch.nn.functional.scaled_dot_product_attention(x, keys, keys)
    expected = [[0.6698, 0.8302], [0.3302, 1.3395], [0.5, 1.1698]]
    assert torch.allclose(out[0], torch.tensor(expected, dtype=f64), atol=5e-5)


def test_the_most_salient_places_count_from_after_the_prefix():
    S = torch.tensor([[0.1, 0.5, 0.2, 0.4]])
    assert most_salient(S, 2, 0).tolist() == [[1, 3]]
    assert most_salient(S, 3, 5).tolist() == [[6, 8, 7]]
    assert most_salient(S, 0, 1).shape == (1, 0)
    with pytest.raises(ValueError, match="kappa=5 but an image has 4 patches"):
        most_salient(S, 5, 0)
