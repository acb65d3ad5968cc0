"""Order 2 exactly: a maximum flow on the bipartite double cover of the conflict graph, and its most decided minimum cut."""

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, maximum_flow

MOST_FLOW = 2**31 - 1
MOST_SCALED = 2**30 - 1  # where an arc and its reverse both have a capacity, scipy adds them up in 32 bits
REFINEMENTS = 6
ROUNDING = 1e-13  # of a total mass of 1; flows are exact multiples of more than that, or of a refinement's last digits


class PairBound(NamedTuple):
    """An optimal pair of the order-2 problem.

    Attributes:
        mass: ``[pairs]``, weight that the adversary joins at each pair's midpoint, for both ends alike.
        potential: ``[points]``, probability in {0, 1/2, 1} that the classifier answers rightly around each point.
    """

    mass: np.ndarray
    potential: np.ndarray


def pair_bound(first: np.ndarray, second: np.ndarray, weight: np.ndarray, count: np.ndarray | None) -> PairBound:
    r"""Solve :math:`\max \sum_e x_e` with :math:`x \ge 0` and :math:`\sum_{e \ni i} x_e \le w_i`, and its dual.

    Every point i becomes two nodes :math:`L_i, R_i`; pairs become arcs :math:`L_i \to R_j` and :math:`L_j \to R_i` without a
    capacity, sources feed :math:`L_i` and drain :math:`R_i` with :math:`w_i`. Half of a maximum flow, folded back, is optimal
    (Nemhauser and Trotter, 1975). In the residual graph of the symmetrised flow, closed by an arc from sink to source, a point
    is decided (1 or 0) exactly if :math:`L_i` and :math:`R_i` lie in different strongly connected components; 1/2 remains only
    where every optimal cut has it (Picard and Queyranne, 1977).

    Args:
        first: ``[pairs]``, the lower end of each pair.
        second: ``[pairs]``, the higher end.
        weight: ``[points]``, positive, sum 1.
        count: integers proportional to ``weight``, if there are any: they make the flow exact.
    """
    points = len(weight)
    potential = np.ones(points)
    if len(first) == 0:
        return PairBound(np.zeros(0), potential)
    paired = np.zeros(points, dtype=bool)  # only points with a pair enter
    paired[first] = paired[second] = True
    inside, rank = np.flatnonzero(paired), np.cumsum(paired) - 1
    i, j = rank[first], rank[second]
    if count is not None and count[inside].sum() < MOST_FLOW:
        capacity = count[inside]
        flow = _max_flow(i, j, capacity, capacity, None) / count.sum()
    else:
        flow = _scaled_flow(i, j, weight[inside])
    mass = (flow[0] + flow[1]) / 2
    potential[inside] = _cut(i, j, mass, weight[inside])
    return PairBound(mass, potential)


def _scaled_flow(i: np.ndarray, j: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Real capacities: integer flows in finer and finer units, each on the residual graph of those before.

    Rounding the capacities down to units leaves a round short of the maximum by less than one unit per node of the cover. The
    next round carries no more than that, whatever larger capacities are left, so its units may be as much smaller.
    """
    nodes = len(weight)
    flow = np.zeros((2, len(i)))
    short = float(weight.sum())
    for _ in range(REFINEMENTS):
        scale = 2.0 ** np.floor(np.log2(MOST_SCALED / short))  # a power of 2: what flows already is whole in the new units
        out = weight - np.bincount(i, flow[0], nodes) - np.bincount(j, flow[1], nodes)
        into = weight - np.bincount(j, flow[0], nodes) - np.bincount(i, flow[1], nodes)
        supply, demand, back = (np.floor((v * scale).clip(0, MOST_SCALED)).astype(np.int64) for v in (out, into, flow))
        flow = np.maximum(flow + _max_flow(i, j, supply, demand, back) / scale, 0)
        short = 2 * nodes / scale
        if short <= ROUNDING:
            break
    return flow


def _max_flow(i: np.ndarray, j: np.ndarray, supply: np.ndarray, demand: np.ndarray, back: np.ndarray | None) -> np.ndarray:
    """A maximum integer flow through the double cover, on the arcs ``L_i -> R_j`` and ``L_j -> R_i``, ``[2, pairs]``, i < j.

    ``back`` is what flows already on these arcs and may be taken back.
    """
    nodes, most = len(supply), MOST_FLOW if back is None else MOST_SCALED
    source, sink, start = 2 * nodes, 2 * nodes + 1, 2 * nodes + 2
    every = np.arange(nodes)
    tail = [i, j, np.full(nodes, source), every + nodes, np.array([start])]
    head = [j + nodes, i + nodes, every, np.full(nodes, sink), np.array([source])]
    capacity = [np.full(2 * len(i), most), supply, demand, np.array([most])]  # the last arc keeps the total in range
    if back is not None:
        tail += [j + nodes, i + nodes]
        head += [i, j]
        capacity += [back.ravel()]
    tails, heads = np.concatenate(tail), np.concatenate(head)
    ends = tails.astype(np.int32), heads.astype(np.int32)  # older scipy takes no other integers
    graph = csr_matrix((np.concatenate(capacity).astype(np.int32), ends), shape=(2 * nodes + 3, 2 * nodes + 3))
    # Dinic's algorithm, also where all capacities are 1: scipy's matching took 5 times as long on 4 million pairs of MNIST.
    found: Any = maximum_flow(graph, start, sink).flow
    last = found.indptr[nodes]  # what leaves L_0, L_1, ...; few arcs carry anything
    used = np.flatnonzero((found.data[:last] != 0) & (found.indices[:last] >= nodes) & (found.indices[:last] < 2 * nodes))
    tail, head = np.searchsorted(found.indptr, used, side="right") - 1, found.indices[used] - nodes
    key = i.astype(np.int64) * nodes + j
    order = np.argsort(key, kind="stable")  # at once where the pairs are sorted, as they usually are
    place = order[np.searchsorted(key, np.minimum(tail, head) * nodes + np.maximum(tail, head), sorter=order)]
    flow = np.zeros((2, len(i)))
    flow[(tail > head).astype(np.int64), place] = found.data[used]
    return flow


def _cut(i: np.ndarray, j: np.ndarray, mass: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Potentials of the points with a pair, from the strongly connected components of the residual graph."""
    nodes = len(weight)
    source, sink = 2 * nodes, 2 * nodes + 1
    through = np.bincount(i, mass, nodes) + np.bincount(j, mass, nodes)
    flowing = mass > ROUNDING
    unfilled, filled = np.flatnonzero(through < weight * (1 - 1e-9) - ROUNDING), np.flatnonzero(through > ROUNDING)
    both = [(i, j + nodes), (j, i + nodes)]
    back = [(head[flowing], tail[flowing]) for tail, head in both]
    ends = [
        (np.full(len(unfilled), source), unfilled),
        (unfilled + nodes, np.full(len(unfilled), sink)),
        (filled, np.full(len(filled), source)),
        (np.full(len(filled), sink), filled + nodes),
        (np.array([sink]), np.array([source])),
    ]
    arcs = [*both, *back, *ends]
    tails, heads = (np.concatenate([arc[end] for arc in arcs]).astype(np.int32) for end in (0, 1))
    graph = csr_matrix((np.ones(len(tails), dtype=np.int8), (tails, heads)), shape=(2 * nodes + 2, 2 * nodes + 2))
    component = connected_components(graph, directed=True, connection="strong")[1].astype(np.int64)
    # Labels follow a topological order of the components, in one direction or the other: the arc sink -> source tells which.
    order = component if component[sink] <= component[source] else -component
    if component[sink] == component[source] or (order[tails] > order[heads]).any():
        raise RuntimeError("the minimum cut could not be read off the components; please report this with your scipy version")
    return (1 + np.sign(order[:nodes] - order[nodes : 2 * nodes])) / 2
