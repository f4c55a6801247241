"""k-NN on frozen features: DINO's vote, its slow twin, worked examples; chunks, ties and classes that differ."""

import math
import sys

import pytest
import torch
from torch.nn import functional as F

from foveal.evaluate import Features, knn
from foveal.evaluate.knn import Neighbours, neighbours, ranked, vote

KS, TS = (1, 3, 10, 20), (0.05, 0.07, 1.0)


def random_features(n, width=16, classes=5, seed=0, pull=0.4):
    """Clusters that overlap: accuracies between chance and 1."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    centres = torch.randn(8, width, generator=torch.Generator().manual_seed(99))
    return Features(
        pull * centres[labels] + torch.randn(n, width, generator=g), labels, classes=tuple("abcdefgh"[:classes])
    )


def plainly(database, queries, k, T):
    """One query after the other, as the formula reads: predicted classes, and the true class among the first five."""
    unit = F.normalize(database.values.double(), dim=1)
    predicted, top5 = [], []
    for x, y in zip(queries.values, queries.labels.tolist(), strict=True):
        s = unit @ F.normalize(x.double(), dim=0)
        score = [0.0] * len(database.classes)
        for i in s.argsort(descending=True)[:k].tolist():
            score[int(database.labels[i])] += math.exp(float(s[i]) / T)
        order = sorted(range(len(score)), key=lambda c: (-score[c], c))
        predicted.append(order[0])
        top5.append(y in order[: min(5, k)])
    return torch.tensor(predicted), sum(top5) / len(top5)


def test_the_worked_example_takes_either_tied_neighbour():
    database = Features(torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]]), torch.tensor([0, 1, 1, 0]))
    query = Features(torch.tensor([[0.5, 0.5]]) * 2**0.5, torch.tensor([0]))
    near = neighbours(database.values, query.values, 3)
    assert torch.allclose(near.similarity, torch.tensor([[0.9899, 0.9899, 0.7071]]).double(), atol=5e-5)
    scores = vote(near, database.labels, 2, 3, 0.07)[0] * math.exp(float(near.similarity[0, 0]) / 0.07)
    large, small = 1410661.8, 1386281.6
    expected = (large, small) if 0 in near.index[0] else (small, large)
    assert torch.allclose(scores, torch.tensor(expected).double(), rtol=1e-5)  # float32 inputs: 0.6 is not 0.6
    assert knn(database, query, k=(3,)).predicted[3, 0.07].tolist() == [0 if 0 in near.index[0] else 1]


def test_one_search_gives_what_the_loop_gives_for_every_setting():
    database, queries = random_features(80), random_features(37, seed=1)
    found = knn(database, queries, KS, TS)
    assert list(found.accuracy) == [(k, T) for k in KS for T in TS]
    for k, T in found.accuracy:
        predicted, top5 = plainly(database, queries, k, T)
        assert torch.equal(found.predicted[k, T], predicted)
        assert torch.equal(found.correct[k, T], predicted == queries.labels)
        assert found.accuracy[k, T] == pytest.approx(float((predicted == queries.labels).double().mean()))
        assert found.top5[k, T] == pytest.approx(top5)
        recalls = [float((predicted == queries.labels)[queries.labels == c].double().mean()) for c in range(5)]
        assert found.balanced[k, T] == pytest.approx(sum(recalls) / 5)
    assert 0.3 < found.accuracy[found.best] == max(found.accuracy.values()) < 1


def test_one_neighbour_is_the_nearest_and_so_is_a_small_temperature():
    database, queries = random_features(60), random_features(30, seed=1)
    nearest = database.labels[(F.normalize(queries.values) @ F.normalize(database.values).T).argmax(1)]
    found = knn(database, queries, (1, 20), (0.07, 1e-9))
    assert torch.equal(found.predicted[1, 0.07], nearest)
    assert torch.equal(found.predicted[20, 1e-9], nearest)


def test_an_infinite_temperature_counts_votes():
    database, queries = random_features(60), random_features(30, seed=1)
    near = neighbours(database.values, queries.values, 7)
    counts = F.one_hot(database.labels[near.index], 5).sum(1)
    assert torch.equal(knn(database, queries, (7,), (math.inf,)).predicted[7, math.inf], counts.argmax(1))
    assert torch.equal(vote(near, database.labels, 5, 7, math.inf), counts.double())


def test_every_image_is_nearest_to_itself():
    database = random_features(50, pull=0.0)
    assert knn(database, database, (1,)).accuracy[1, 0.07] == 1.0


def test_lengths_do_not_matter():
    database, queries = random_features(60), random_features(30, seed=1)
    scale = torch.rand(60, 1, generator=torch.Generator().manual_seed(0)) * 10 + 0.1
    longer = Features(database.values * scale, database.labels, classes=database.classes)
    a, b = knn(database, queries), knn(longer, queries)
    assert a.accuracy == b.accuracy
    assert all(torch.equal(a.predicted[s], b.predicted[s]) for s in a.predicted)


@pytest.mark.parametrize("chunk", [(1, 1), (1, 300), (7, 11), (41, 64), (200, 299), (41, 300)])
@pytest.mark.parametrize("kind", ["clusters", "copies", "nearly the same"])
def test_chunks_change_nothing(chunk, kind):
    database, queries = random_features(300), random_features(41, seed=1)
    if kind == "copies":  # equal similarities, other labels
        values = database.values[:100].repeat(3, 1)
        database = Features(values, database.labels, classes=database.classes)
    if kind == "nearly the same":  # a collapsed model: cosines differ in the seventh digit
        database = Features(1 + 1e-3 * database.values, database.labels, classes=database.classes)
        queries = Features(1 + 1e-3 * queries.values, queries.labels, classes=queries.classes)
    whole, cut = (neighbours(database.values, queries.values, 20, chunk=c) for c in (None, chunk))
    assert torch.equal(whole.index, cut.index)
    assert torch.equal(whole.similarity, cut.similarity)
    a, b = (knn(database, queries, (5, 20), chunk=c) for c in (None, chunk))
    assert all(torch.equal(a.predicted[s], b.predicted[s]) for s in a.predicted)
    assert a.accuracy == b.accuracy


def test_near_ties_are_told_apart_in_float64():
    database, queries = random_features(300), random_features(20, seed=1)
    values, asked = 1 + 1e-3 * database.values, 1 + 1e-3 * queries.values
    unit, ask = (F.normalize(x, dim=1).double() for x in (values, asked))
    exact = (ask[:, None] * unit).sum(-1).argsort(dim=1, descending=True, stable=True)[:, :20]
    assert torch.equal(neighbours(values, asked, 20).index, exact)


def test_copies_are_taken_in_the_order_of_the_database():
    values = torch.eye(4)[torch.tensor([1, 0, 2, 0, 0, 3])]
    assert neighbours(values, torch.eye(4)[:1], 3).index.tolist() == [[1, 3, 4]]


def test_votes_are_chunked_too(monkeypatch):
    database, queries = random_features(60), random_features(30, seed=1)
    whole = knn(database, queries)
    monkeypatch.setattr(sys.modules[neighbours.__module__], "VOTES", 7)
    cut = knn(database, queries)
    assert all(torch.equal(whole.predicted[s], cut.predicted[s]) for s in whole.predicted)
    assert whole.top5 == cut.top5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_database_is_that_database_rounded(dtype):
    database, queries = random_features(200), random_features(41, seed=1)
    found = neighbours(database.values, queries.values, 10, dtype=dtype)
    rounded = F.normalize(database.values, dim=1).to(dtype).double()
    exact = F.normalize(queries.values, dim=1).double() @ rounded.T
    expected = exact.sort(dim=1, descending=True)
    assert torch.equal(found.index, expected.indices[:, :10])
    assert torch.allclose(found.similarity, expected.values[:, :10], atol=1e-12)


def test_classes_are_matched_by_name():
    database, queries = random_features(80), random_features(40, seed=1)
    other = torch.tensor([3, 0, 4, 1, 2])  # class c of the one is class other[c] of the other
    names = tuple(database.classes[int((other == c).nonzero())] for c in range(5))
    renamed = Features(queries.values, other[queries.labels], classes=names)
    a, b = knn(database, queries), knn(database, renamed)
    assert a.accuracy == b.accuracy
    assert a.unknown == b.unknown == 0


def test_queries_of_other_classes_are_wrong_and_counted():
    database, queries = random_features(80, classes=3), random_features(40, seed=1, classes=5)
    found = knn(database, queries, (5,))
    foreign = queries.labels >= 3
    assert found.unknown == int(foreign.sum()) > 0
    assert not found.correct[5, 0.07][foreign].any()
    assert found.correct[5, 0.07][~foreign].any()
    assert found.notes == (
        f"{found.unknown} of 40 queries are of classes that the database has no image of (d, e): counted as wrong",
    )
    named = Features(database.values, database.labels, classes=("a", "b", "c", "d", "e"))  # known, without an image
    assert knn(named, queries, (5,)).accuracy == found.accuracy
    assert knn(named, queries, (5,)).unknown == found.unknown
    assert knn(named, queries, (5,)).per_class.tolist() == [*torch.bincount(database.labels).tolist(), 0, 0]
    for only in (foreign, ~foreign):
        knn(database, queries.subset(only.nonzero()[:, 0]), (5,))


def test_more_neighbours_than_images():
    database, queries = random_features(12), random_features(9, seed=1)
    found = knn(database, queries, (5, 20, 200))
    assert torch.equal(found.predicted[20, 0.07], found.predicted[200, 0.07])
    assert torch.equal(found.predicted[20, 0.07], plainly(database, queries, 12, 0.07)[0])
    assert found.notes[0] == "k=20 is more than the 12 images of the database: all of them vote"


@pytest.mark.parametrize("n", [1, 2, 99])
def test_any_number_of_queries(n):
    database, queries = random_features(50), random_features(n, seed=1)
    assert len(knn(database, queries).correct[20, 0.07]) == n


def test_one_image_in_the_database():
    assert knn(random_features(1, classes=1), random_features(5, seed=1)).size == 1


def test_the_first_five_by_score_the_others_in_their_order():
    scores = torch.tensor([[0.0, 2.0, 0.0, 1.0], [5.0, 5.0, 0.0, 0.0]]).double()
    for labels, places, chosen in [([0, 1], [2, 1], [1, 0]), ([1, 0], [0, 0], [1, 0]), ([2, 3], [3, 3], [1, 0])]:
        place, first = ranked(scores, torch.tensor(labels))
        assert place.tolist() == places
        assert first.tolist() == chosen


def test_the_vote_by_hand():
    near = Neighbours(torch.tensor([[1.0, 0.9, 0.5]]).double(), torch.tensor([[2, 0, 1]]))
    scores = vote(near, torch.tensor([1, 0, 0]), 3, 3, 0.1)
    assert torch.allclose(scores, torch.tensor([[1 + math.exp(-5), math.exp(-1), 0]]).double())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_told(value):
    good, bad = random_features(10), random_features(10)
    bad.values[3, 2] = value
    with pytest.raises(ValueError, match=r"1 of 10 database features are not finite \(image 3 first\)"):
        knn(bad, good)
    with pytest.raises(ValueError, match="query features are not finite"):
        knn(good, bad)


def test_what_cannot_be_compared():
    one = random_features(10)
    with pytest.raises(ValueError, match="the database is 16 wide, the queries 8"):
        knn(one, random_features(10, width=8))
    a, b = (Features(one.values, one.labels, definition=text) for text in ("block 2", "block 1"))
    with pytest.raises(ValueError, match="features of different definitions: the database has 'block 2'"):
        knn(a, b)
    for options, message in [({"k": ()}, "k="), ({"k": (0,)}, "k="), ({"temperature": (0.0,)}, "temperature=")]:
        with pytest.raises(ValueError, match=message):
            knn(one, one, **options)
    with pytest.raises(ValueError, match="chunk="):
        knn(one, one, chunk=(0, 1))


def test_the_result_says_which_features():
    one = random_features(10)
    told = Features(one.values, one.labels, definition="block 2 of 0-2, class token, after the final norm")
    found = knn(told, told, (1,))
    assert str(found) == f"100.0 % (k=1, T=0.07); k-NN, cosine, 10 images in the database; {told.definition}"
