"""Garcia Trillos et al. (2024), arXiv 2401.09191: the adversarial risk that no classifier can beat, by optimal transport.

Claim: on labelled points the optimal adversarial risk is a linear program over sets of points whose balls meet; sets of two or
three points already give nearly all of it; entropic (Sinkhorn) iterations approach it from below. This library solves it
exactly. Four demonstrations, on handwritten digits:

1. The bracket [lower, upper] against epsilon, and how it was certified.
2. Order 2 beside order 3, and the entropic algorithm beside both.
3. The two witnesses: an attack that no classifier withstands, and a classifier that holds what the upper end says.
4. Two classes of equal mass, where the bound is ordinary optimal transport, against the solver of POT.

Command:   uv run python examples/trillos2024_lower_bounds.py [--data mnist] [--figure curve.png] [--quick]
Time:      10 seconds on one core; --quick a few seconds, with fewer points; mnist 20 seconds.
Expected:  on the 1,797 digits, l_2, every bracket closed: risk 0.001113, 0.010573, 0.053422, 0.134669 by pairs alone at epsilon
           0.6, 0.7, 0.8, 0.9; 0.281859, 0.356427, 0.436169 with triples at 1.0, 1.05, 1.1. On the first 500 at 1.1: order 2
           0.337000, order 3 0.338000, Sinkhorn within 0.0002 below each (eta 0.02). Attack and classifier meet at 0.281859
           (epsilon 1). POT agrees on 3 against 8.

The bounds are for the given points (the empirical distribution): on others a classifier may do worse, or better.
"""

import argparse
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metarobust.bounds import RiskBound, adversarial_risk_bound, plot_curve, risk_curve, sinkhorn_risk
from metarobust.data import LabelledImages, load
from metarobust.data import load_digits as digits
from metarobust.threat_models import ThreatModel

EPSILONS = {"digits": [0.6, 0.7, 0.8, 0.9, 1.0, 1.05, 1.1], "mnist": [2.0, 2.5, 3.0, 3.25]}


STRENGTHS = (0.1, 0.05, 0.02)  # eta, the regularisation


def part_one(points: LabelledImages, epsilons: list[float]) -> list[RiskBound]:
    """One search for close pairs serves all radii. Exact: no feasible set of any size contradicts the optimum found."""
    print(f"1. Best possible robust accuracy on {len(points)} points, l_2:")
    print(f"{'epsilon':>8} {'risk from':>10} {'to':>9} {'accuracy':>9} {'pairs':>8} order exact  larger sets that entered")
    curve = risk_curve(points.images, points.labels, norm="l2", epsilons=epsilons)
    for bound in curve:
        risks = f"{bound.lower:>10.6f} {bound.upper:>9.6f} {1 - bound.lower:>9.4f}"
        larger = ", ".join(f"{count} of {size} points" for size, count in bound.sets.items()) or "none"
        exact = "yes" if bound.exact else "no"
        print(f"{bound.epsilon:>8g} {risks} {bound.pairs:>8} {bound.order:>5} {exact:>5}  {larger}")
    return curve


def part_two(points: LabelledImages, epsilon: float) -> None:
    """The entropic values are lower bounds too; they rise as the regularisation falls."""
    threat_model = ThreatModel(norm="l2", epsilon=epsilon)
    x, y = points.images, points.labels
    print(f"2. Larger sets, and the entropic algorithm, {len(points)} points, epsilon {epsilon:g}:")
    for order in (2, 3):
        exact = adversarial_risk_bound(x, y, threat_model, order=order).lower
        sweeps = {"tolerance": 1e-4, "most_iterations": 5000}
        entropic = [sinkhorn_risk(x, y, threat_model, order=order, regularisation=eta, **sweeps).item() for eta in STRENGTHS]
        values = ", ".join(f"{value:.6f} (eta {eta:g})" for value, eta in zip(entropic, STRENGTHS, strict=True))
        print(f"   order {order}: exact {exact:.6f}; Sinkhorn {values}")


def part_three(points: LabelledImages, bound: RiskBound) -> None:
    """No classifier has less than `lower` under the attack; the bound's own has at most `upper`, wherever its points move."""
    attack, own = bound.attack(), bound.classifier()
    x, y = points.images.flatten(1).double(), points.labels
    means = torch.stack([x[y == label].mean(0) for label in range(points.num_classes)])

    def nearest(moved: Tensor, anchors: Tensor, labels: Tensor) -> Tensor:
        return one_hot(labels[torch.cdist(moved.flatten(1), anchors).argmin(1)], points.num_classes)

    print(f"3. Witnesses at epsilon {bound.epsilon:g}, risk from {bound.lower:.6f} to {bound.upper:.6f}:")
    print(f"   under the optimal attack ({len(attack.example)} moves to {len(attack.positions)} places):")
    print(f"      the bound's own classifier {attack.risk(own):.6f}")
    print(f"      nearest neighbour          {attack.risk(lambda moved: nearest(moved, x, y)):.6f}")
    print(f"      nearest class mean         {attack.risk(lambda moved: nearest(moved, means, torch.arange(len(means)))):.6f}")
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    random = (x + bound.epsilon * step / step.norm(dim=1, keepdim=True)).reshape(points.images.shape)
    worst = own(random).gather(1, y[:, None]).squeeze(1)
    met = own(attack.positions)[attack.position, attack.label]
    worst = worst.scatter_reduce(0, attack.example, met, "amin")
    kept = bool((worst >= bound.guarantees - 1e-9).all())
    print(f"   the bound's own classifier, worst of these places and a random move: {1 - worst.mean():.6f}")
    print(f"   every guarantee of the classifier was {'kept' if kept else 'BROKEN'}")


def part_four(points: LabelledImages, epsilon: float) -> None:
    """With C the cost of moving one class onto the other where a move beyond 2 epsilon costs 1, R* = (1 - C) / 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT warns of its own source when it is first compiled
        from ot import emd2

    by_class = [points.images[points.labels == label].flatten(1).double() for label in (3, 8)]
    count = min(len(images) for images in by_class)
    left, right = (images[:count] for images in by_class)
    far = (torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist") > 2 * epsilon).double()
    mass = torch.full((count,), 1 / count, dtype=torch.float64)
    cost: Any = emd2(mass, mass, far)
    by_pot = (1 - float(cost)) / 2
    y = torch.arange(2).repeat_interleave(count)
    ours = adversarial_risk_bound(torch.cat([left, right]), y, ThreatModel(norm="l2", epsilon=epsilon)).lower
    print(f"4. {count} threes against {count} eights, epsilon {epsilon:g}: flow {ours:.6f}, POT's transport {by_pot:.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(EPSILONS), default="digits", help="mnist: 2,000 test images, from METAROBUST_DATA")
    parser.add_argument("--figure", metavar="PNG", help="draw the bracket against epsilon")
    parser.add_argument("--quick", action="store_true", help="fewer points, as a smoke test")
    arguments = parser.parse_args()
    data = digits() if arguments.data == "digits" else load("mnist", train=False)
    points = data.select(torch.arange(500 if arguments.quick else min(2000, len(data))))
    epsilons = EPSILONS[arguments.data]
    curve = part_one(points, epsilons)
    part_two(points.select(torch.arange(500)), epsilons[-1])
    part_three(points, curve[-3])
    part_four(points, epsilons[-1])
    if arguments.figure:
        print(f"wrote {plot_curve(curve, arguments.figure)}")
