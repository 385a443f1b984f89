r"""Balanced k-means: clusters of n points whose sizes are floor(n / K) or ceil(n / K).

.. math:: \min_{a, \mu} \sum_i |x_i - \mu_{a_i}|^2 \quad \text{with} \quad
    \lfloor n / K \rfloor \le |\{i : a_i = k\}| \le \lceil n / K \rceil

Alternates between the best assignment for given centres and the means of the clusters, as in *Balanced Clustering*
(IJCAI 2019). The assignment is a transport problem with few sinks. Prices of the clusters solve it nearly; points that
move along shortest paths from cluster to cluster do the rest, so that the result is an optimum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

ROWS = 16_384  # of a large array that are worked on at a time
ROUNDS = 20  # of raising prices, before points move one by one
MANY = 64  # points a cluster: prices are found for every eighth of them first
FEW = 0.001  # of the points: so many are left to that


def balanced_kmeans(
    points: np.ndarray,
    clusters: int,
    rng: np.random.Generator,
    *,
    sample: int = 256,
    passes: int = 2,
    rounds: int = 100,
) -> np.ndarray:
    """Labels (n,) of points (n, D).

    Of more than `sample * clusters` points a random sample of that size is clustered first. Then `passes` times all
    points are assigned and the centres moved. Extra memory: 4 n K bytes.

    Args:
        points: Of any float dtype; read in parts, so it may be a map of a file.
        clusters: K.
        rng: For the sample and the first centres, which are K of its points.
        sample: Points a cluster that centres are fitted to.
        passes: Assignments of all points, where they are more than the sample.
        rounds: At most so many assignments of the sample; it ends where one changes nothing.
    """
    count = len(points)
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters: expected 1 to {count}, the number of points, got {clusters}")
    few = count <= sample * clusters
    part = points if few else points[np.sort(rng.choice(count, sample * clusters, replace=False))]
    centres = part[rng.choice(len(part), clusters, replace=False)].astype(np.float64)
    labels, prices = assign(distances(part, centres))
    for _ in range(rounds):
        before = labels
        labels, prices = assign(distances(part, means(part, labels, clusters)), prices)
        if np.array_equal(before, labels):
            break
    for _ in range(0 if few else passes):
        centres, part = means(part, labels, clusters), points
        labels, prices = assign(distances(points, centres), prices)
    return labels


def distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n, K) float32: squared distances of points (n, D) to centres (K, D), less the square of the point itself."""
    middle = centres.mean(0)
    centres = centres - middle
    factor, offset = (-2 * centres.T).astype(np.float32), np.square(centres).sum(1).astype(np.float32)
    found = np.empty((len(points), len(centres)), np.float32)
    for rows in parts(len(points)):
        np.matmul(points[rows].astype(np.float32) - middle.astype(np.float32), factor, out=found[rows])
        found[rows] += offset
    return found


def means(points: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """(K, D) float64: the mean of each cluster of points (n, D)."""
    sums = np.zeros((clusters, points.shape[1]))
    for rows in parts(len(points)):
        inside = labels[rows] == np.arange(clusters)[:, None]
        sums += inside.astype(np.float32) @ points[rows].astype(np.float32)
    return sums / np.bincount(labels, minlength=clusters)[:, None]


def assign(cost: np.ndarray, prices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) of least cost among those whose sizes differ by one at most.

    Besides it returns prices (K,) at which each point has its own cluster as one of the cheapest: a start for the next
    assignment, whose costs are alike.

    Args:
        cost: (n, K), of each point in each cluster.
        prices: (K,), where to start from; None: those of every eighth point. They do not change the cost of the result.
    """
    count, clusters = cost.shape
    low, high = count // clusters, -(-count // clusters)
    if prices is None:
        prices = assign(cost[::8])[1] if count > MANY * clusters else np.zeros(clusters)
    for _ in range(ROUNDS):
        labels, margins = cheapest(cost, prices)
        surplus = np.bincount(labels, minlength=clusters) - high
        if surplus.clip(min=0).sum() <= FEW * count:
            break
        prices = prices.copy()
        for cluster in np.flatnonzero(surplus > 0):
            last = surplus[cluster] - 1
            prices[cluster] += np.partition(margins[labels == cluster], last)[last]
    labels, _ = cheapest(cost, prices)
    return labels, even_out(cost, labels, low, high)


def cheapest(cost: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cluster (n,) where cost and price are least, and how much more the next one would cost."""
    labels, margins = np.empty(len(cost), np.int64), np.empty(len(cost), cost.dtype)
    for rows in parts(len(cost)):
        total = cost[rows] + prices.astype(cost.dtype)
        labels[rows] = total.argmin(1)
        own = np.arange(len(total)), labels[rows]
        least = total[own]
        total[own] = np.inf
        margins[rows] = total.min(1) - least
    return labels, margins


def even_out(cost: np.ndarray, labels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Moves points until all sizes are in low..high, in place; returns prices of the clusters, as `assign` does.

    The labels have to be of least cost for the sizes that they have, and stay so: points move along shortest paths from
    a cluster that is too large to one that is too small. In the end paths are followed that only save costs.
    """
    moves = Moves(cost, labels)
    rounding = 16 * float(np.finfo(cost.dtype).eps * np.abs(cost).max(initial=0))
    while True:
        sizes = np.bincount(labels, minlength=cost.shape[1])
        over, under = (sizes > high).any(), (sizes < low).any()
        giving = sizes > (high if over else low)
        taking = sizes < (low if under and not over else high)
        path, added = shortest_path(moves.price, giving, taking, rounding)
        if not (over or under or added < -rounding):
            break
        moves.follow(path)
    distance, _ = distances_from(moves.price, np.full(len(sizes), True), rounding)
    return -distance


class Moves:
    """For each pair of clusters the point that is the cheapest to move from one to the other.

    Attributes:
        price: (K, K), what it costs; infinite on the diagonal.
        point: (K, K), which one it is.
    """

    def __init__(self, cost: np.ndarray, labels: np.ndarray):
        self.cost, self.labels = cost, labels
        clusters = cost.shape[1]
        self.price, self.point = np.full((clusters, clusters), np.inf), np.full((clusters, clusters), -1)
        for cluster in range(clusters):
            self._search(cluster, np.arange(clusters))

    def follow(self, path: list[int]) -> None:
        """Moves a point along each edge of a path."""
        edges = list(itertools.pairwise(path))
        points = [self.point[edge] for edge in edges]
        for (_, target), point in zip(edges, points, strict=True):
            self.labels[point] = target
        for (source, target), point in zip(edges, points, strict=True):
            self._search(source, np.flatnonzero(self.point[source] == point))
            price = self.cost[point].astype(np.float64) - float(self.cost[point, target])
            price[target] = np.inf
            better = price < self.price[target]
            self.price[target, better], self.point[target, better] = price[better], point

    def _search(self, source: int, targets: np.ndarray) -> None:
        targets = targets[targets != source]
        members = np.flatnonzero(self.labels == source)
        if len(members) == 0 or len(targets) == 0:
            self.price[source, targets] = np.inf
            return
        price = self.cost[np.ix_(members, targets)].astype(np.float64) - self.cost[members, source, None]
        best = price.argmin(0)
        self.price[source, targets], self.point[source, targets] = price.min(0), members[best]


def shortest_path(
    price: np.ndarray, giving: np.ndarray, taking: np.ndarray, rounding: float
) -> tuple[list[int], float]:
    """The cheapest path from a giving to a taking node, and its length; infinite where there is none."""
    distance, steps = distances_from(price, giving, rounding)
    node = int(np.where(taking, distance, np.inf).argmin())
    length = float(distance[node]) if taking[node] else np.inf
    path = [node]
    for step in reversed(steps):
        if step[node] >= 0:
            node = int(step[node])
            path.insert(0, node)
    return path, length


def distances_from(price: np.ndarray, start: np.ndarray, rounding: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """How far nodes are from the nearest start, and for each further edge where it came from, -1 where it is of no use.

    Bellman and Ford's: prices (K, K) may be negative, cycles may not. Less than `rounding` is no difference.
    """
    distance, steps = np.where(start, 0.0, np.inf), list[np.ndarray]()
    for _ in range(len(price)):
        through = distance[:, None] + price
        found = through.min(0)
        better = found < distance - rounding
        if not better.any():
            break
        steps.append(np.where(better, through.argmin(0), -1))
        distance = np.where(better, found, distance)
    return distance, steps


def parts(count: int) -> Iterator[slice]:
    """Slices of so many rows, `ROWS` at a time."""
    return (slice(first, first + ROWS) for first in range(0, count, ROWS))
