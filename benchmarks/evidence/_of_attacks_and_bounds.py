"""What the runs of the attacks beside their peers and of the bounds say of the claims."""

import statistics

from benchmarks.evidence._catalogue import Measured
from benchmarks.evidence._findings import NOT_SHOWN, PARTLY, SHOWN, Finding, share_verdict


def beside_autoattack(measured: Measured) -> Finding | None:
    rows = {
        name: row["autoattack"] for content in measured.contents("attacks, standing") for name, row in content["results"].items()
    }
    if not rows:
        return None
    told = [
        f"{name}: {100 * r['ours']:.1f} % robust under ours, {100 * r['autoattack']:.1f} % under AutoAttack; AutoAttack took "
        f"{r['ratio']:.1f} times as long ({r['their_seconds']:.0f} s against {r['our_seconds']:.0f} s)"
        for name, r in rows.items()
    ]
    met = sum(r["ours"] <= r["autoattack"] for r in rows.values())
    return Finding([*told, "One seed each, first test images of each set"], share_verdict(met, len(rows)))


def at_equal_passes(measured: Measured) -> Finding | None:
    won = tied = cases = 0
    for content in measured.contents("attacks, equal passes"):
        for row in content["results"].values():
            for budget in (90, 270):
                here = {n: statistics.mean(v) for n, v in row["quality"].items() if n.startswith(f"{budget} passes")}
                if len(set(here.values())) == 1:
                    continue  # a network on which all attacks agree compares nothing
                beta = min(v for n, v in here.items() if "BETA" in n)
                for n, v in here.items():
                    if ": PGD" in n:
                        cases, won, tied = cases + 1, won + (beta < v), tied + (beta == v)
    if not cases:
        return None
    told = f"The better of BETA's step rules found more adversarial examples than a form of PGD in {won} of {cases} comparisons, as many in "
    return Finding(
        [f"{told}{tied}, fewer in {cases - won - tied} (100 images, two seeds, 90 and 270 backward passes)"],
        share_verdict(won + tied, cases),
    )


def low_orders(measured: Measured) -> Finding | None:
    contents = measured.contents("bounds")
    if not contents or "orders" not in contents[0]:
        return None
    content, told = contents[0], []
    for epsilon, row in content["orders"].items():
        told.append(
            f"Digits, l2 {epsilon}: {row['order 2']:.4f} by pairs, {row['order 3']:.4f} by triples, {row['all']:.4f} for sets of any size"
        )
    for row in content.get("sweep", {}).get("bounds", []):
        told.append(
            f"MNIST, 60,000 points, l2 {row['epsilon']:g}, pairs alone: between {row['lower']:.4f} and {row['upper']:.4f}{' (certified: equal)' if row['exact'] else ''}"
        )
    lost = [row["all"] - row["order 3"] for row in content["orders"].values()]
    return Finding(told, SHOWN if max(lost) <= 1e-3 else PARTLY if min(lost) <= 1e-3 else NOT_SHOWN)


def sinkhorn(measured: Measured) -> Finding | None:
    contents = measured.contents("bounds")
    if not contents or "orders" not in contents[0]:
        return None
    rows = contents[0]["orders"]
    gaps = [row["all"] - row["sinkhorn"] for row in rows.values()]
    told = (
        f"Digits, l2 {', '.join(rows)}: the entropic lower end is {', '.join(f'{gap:.4f}' for gap in gaps)} below the exact value"
    )
    return Finding([told], SHOWN if min(gaps) >= 0 and max(gaps) <= 0.01 else PARTLY)
