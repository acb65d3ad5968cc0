"""What the transfer of the shipped meta-optimizer says of the claims."""

import statistics
from typing import NamedTuple

from benchmarks._transfer_baselines import AT_EQUAL_PASSES, CLEAN
from benchmarks._transfer_runs import joined
from benchmarks.evidence._catalogue import Measured
from benchmarks.evidence._findings import NOT_SHOWN, PARTLY, SHOWN, Finding, share_verdict, spread


class Row(NamedTuple):
    """One target of the transfer benchmark, means over seeds."""

    target: str
    seeds: int
    clean: float
    low: float
    shipped: float
    shipped_clean: float
    top: float
    equal_passes: dict[str, float]

    @property
    def share(self) -> float:
        return (self.shipped - self.low) / (self.top - self.low)


def transfer_rows(measured: Measured) -> list[Row]:
    rows = []
    for target, groups in joined(measured.contents("transfer")).items():
        methods = {method: row["reports"] for method, row in groups.items()}
        if not {*CLEAN, *AT_EQUAL_PASSES, "robust-small-v1", "PGD-5 training"} <= methods.keys():
            continue
        robust = {m: statistics.mean(r["robust"] for r in reports) for m, reports in methods.items()}
        clean = {m: statistics.mean(r["clean"] for r in reports) for m, reports in methods.items()}
        best = max(CLEAN, key=lambda method: robust[method])
        rows.append(
            Row(target, len(methods["robust-small-v1"]), clean[best], robust[best], robust["robust-small-v1"], clean["robust-small-v1"],
                robust["PGD-5 training"], {m: robust[m] for m in AT_EQUAL_PASSES})
        )  # fmt: skip
    return rows


def transfers(measured: Measured) -> Finding | None:
    rows = transfer_rows(measured)
    if not rows:
        return None
    told = [
        f"{r.target}: {r.shipped:.3f} robust, {r.low:.3f} by the best tuned clean training, {r.top:.3f} by PGD training: {r.share:.2f} of the gap ({r.seeds} seeds)"
        for r in rows
    ]
    return Finding(told, share_verdict(sum(r.share >= 0.5 for r in rows), len(rows)))


def without_attacks(measured: Measured) -> Finding | None:
    rows = transfer_rows(measured)
    if not rows:
        return None
    told, best = [], []
    for name in AT_EQUAL_PASSES:
        ahead = [r.shipped - r.equal_passes[name] for r in rows]
        best.append(statistics.mean(ahead))
        told.append(
            f"Robust accuracy above {name}: {spread(ahead, '+.3f')} over {len(rows)} targets, {sum(a > 0 for a in ahead)} of them positive"
        )
    return Finding(told, SHOWN if min(best) > 0 else PARTLY if max(best) > -0.02 else NOT_SHOWN)


def robust_meta_loss(measured: Measured) -> Finding | None:
    found: dict[str, dict[str, float]] = {}
    for target, methods in joined(measured.contents("transfer")).items():
        for method, row in methods.items():
            found.setdefault(method, {})[target] = statistics.mean(r["robust"] for r in row["reports"])
    clean, one = (found.get(f"control: {name}", {}) for name in ("clean meta-loss", "one stream"))
    shipped = found.get("robust-small-v1", {})
    if not clean or not one or not shipped:
        return None
    from_loss, from_stream = ([shipped[t] - other[t] for t in other if t in shipped] for other in (clean, one))
    told = [
        f"Learned with a robust meta-loss over a clean one, the same two streams: {spread(from_loss, '+.3f')} robust accuracy on {len(from_loss)} unseen targets",
        f"Learned with the second stream over the gradient alone, the same robust meta-loss: {spread(from_stream, '+.3f')} on {len(from_stream)}",
    ]
    return Finding(told, SHOWN if statistics.mean(from_loss) >= 0.01 else NOT_SHOWN)
