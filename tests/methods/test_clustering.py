"""Balanced k-means. Its assignment is compared with that of scipy's exact solver."""

from __future__ import annotations

import numpy as np
import pytest
from recordings import load, recorded
from scipy.optimize import linear_sum_assignment

from corrmatch.methods.parts.clustering import assign, balanced_kmeans, distances, means

FILES = recorded("48_usrn_*")


def exact(cost):
    """The best assignment. A cluster has as many columns as it may have points; only its last column may be empty."""
    count, clusters = cost.shape
    least = count // clusters
    columns = np.repeat(np.arange(clusters), least + 1)
    last = np.tile(np.arange(least + 1) == least, clusters)
    never = count * np.abs(cost).max() + 1
    nobody = np.tile(np.where(last, 0, never), ((least + 1) * clusters - count, 1))
    _, taken = linear_sum_assignment(np.concatenate([cost[:, columns], nobody]))
    return columns[taken[:count]]


def exact_kmeans(points, clusters, rng):
    """The published solver: Forgy's start, then exact assignments of all points until none changes."""
    centres, before = points[rng.choice(len(points), clusters, replace=False)], None
    while True:
        labels = exact(np.square(points).sum(1)[:, None] - 2 * points @ centres.T + np.square(centres).sum(1))
        if before is not None and np.array_equal(labels, before):
            return labels
        centres, before = means(points, labels, clusters), labels


def total(cost, labels):
    return cost[np.arange(len(cost)), labels].sum()


def spread(points, labels):
    """The cost that k-means minimises."""
    return np.square(points - means(points, labels, labels.max() + 1)[labels]).sum()


def balanced(labels, clusters):
    sizes = np.bincount(labels, minlength=clusters)
    return len(sizes) == clusters and sizes.min() >= len(labels) // clusters and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("seed", range(60))
def test_assignment_is_the_best(seed):
    """For any starting prices, with ties, with as many clusters as points, and with one cluster."""
    rng = np.random.default_rng(seed)
    clusters = int(rng.integers(1, 9))
    count = clusters if seed % 10 == 0 else int(rng.integers(clusters, 90))
    points = rng.normal(size=(count, 3)) * (1000 if seed % 2 else 1)
    points = points.round() if seed % 3 == 0 else points
    centres = points[rng.choice(count, clusters, replace=False)]
    cost = np.square(points[:, None] - centres).sum(2)
    labels, _ = assign(cost, rng.normal(size=clusters) * (seed % 5))
    assert balanced(labels, clusters)
    assert total(cost, labels) == pytest.approx(total(cost, exact(cost)), rel=1e-12)


def test_assignment_of_more_points_than_fit_into_one_part():
    """Most points are near one centre, so most of them must go to other clusters."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40_001, 2)) * [1, 3]
    cost = distances(points, np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 9.0], [9.0, 9.0]]))
    labels, prices = assign(cost)
    assert balanced(labels, 4)
    again, _ = assign(cost, prices)
    assert total(cost.astype(float), again) == pytest.approx(total(cost.astype(float), labels), rel=1e-6)
    worth = cost + prices
    assert (worth[np.arange(len(worth)), labels] - worth.min(1)).max() < 1e-4  # each is one of the cheapest


@FILES
def test_recorded_clusters(path):
    """The centres are means, and the assignment costs no more than the recorded one."""
    at = {
        name: x.numpy()
        for name, x in load(path, "kmeans_").items()
        if name in ("points", "assignment", "centers", "cost")
    }
    points = at["points"].astype(np.float64)
    assert np.allclose(means(points, at["assignment"], 4), at["centers"], rtol=1e-5)  # recorded with six digits
    cost = np.square(points[:, None] - at["centers"]).sum(2)
    labels, _ = assign(cost, np.zeros(4))
    assert balanced(labels, 4)
    assert total(cost, labels) == pytest.approx(at["cost"], rel=1e-12)
    assert np.array_equal(labels, at["assignment"])


def test_means_and_distances_of_half_precision():
    rng = np.random.default_rng(0)
    points = (100 + rng.normal(size=(20_000, 5))).astype(np.float16)
    labels = rng.integers(3, size=20_000)
    wide = points.astype(np.float64)
    expected = np.stack([wide[labels == k].mean(0) for k in range(3)])
    assert np.allclose(means(points, labels, 3), expected, rtol=1e-6)
    squares = np.square(wide[:, None] - expected).sum(2)
    found = distances(points, expected)
    assert np.allclose(found[:, 1:] - found[:, :1], squares[:, 1:] - squares[:, :1], atol=1e-3)


@pytest.fixture(scope="module")
def features():
    """1200 points in groups of very different sizes."""
    rng = np.random.default_rng(5)
    groups = rng.choice(40, 1200, p=rng.dirichlet(np.ones(40)))
    return (rng.normal(size=(40, 256))[groups] + 0.7 * rng.normal(size=(1200, 256))).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_gives_nearly_the_cost_of_the_exact_solver(features, seed):
    """The cost is within two percent, although centres are fitted to less than half of the points. Sizes are exact."""
    labels = balanced_kmeans(features, 8, np.random.default_rng(seed), sample=64)
    assert balanced(labels, 8)
    wide = features.astype(np.float64)
    reference = spread(wide, exact_kmeans(wide, 8, np.random.default_rng(seed)))
    assert spread(wide, labels) < 1.02 * reference


def test_the_same_generator_gives_the_same_clusters(features):
    first, again = (balanced_kmeans(features[:500], 7, np.random.default_rng(3), sample=30) for _ in range(2))
    assert np.array_equal(first, again)
    assert balanced(first, 7)


def test_few_points_are_clustered_as_published(features):
    """If the sample contains all points, the last assignments and means change nothing."""
    part = features[:600].astype(np.float64)
    labels = balanced_kmeans(part, 5, np.random.default_rng(0))
    again = exact(np.square(part[:, None] - means(part, labels, 5)).sum(2))
    assert np.array_equal(labels, again)


def test_extremes():
    points = np.random.default_rng(0).normal(size=(6, 2))
    assert sorted(balanced_kmeans(points, 6, np.random.default_rng(0))) == list(range(6))
    assert not balanced_kmeans(points, 1, np.random.default_rng(0)).any()
    same = balanced_kmeans(np.ones((10, 3)), 4, np.random.default_rng(0))
    assert balanced(same, 4)
    for clusters in (0, 7):
        with pytest.raises(ValueError, match=f"clusters: expected 1 to 6, the number of points, got {clusters}"):
            balanced_kmeans(points, clusters, np.random.default_rng(0))
