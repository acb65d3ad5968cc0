"""Every bar on speed and memory: the measured ratio, its limit, and whether it is met."""

from typing import Any, NamedTuple

from benchmarks.evidence._catalogue import Measured


class Bar(NamedTuple):
    """A ratio against a limit; ``most``: it may be at most that, otherwise it must be at least that."""

    what: str
    against: str
    measured: float
    lowest: float
    highest: float
    limit: float
    most: bool
    measurement: str

    @property
    def met(self) -> bool:
        return self.measured <= self.limit if self.most else self.measured >= self.limit

    @property
    def strain(self) -> float:
        """1 at the limit, above it where the bar is missed."""
        return self.measured / self.limit if self.most else self.limit / self.measured


def _bar(
    what: str, against: str, found: dict[str, float], limit: float, measurement: str, *, most: bool = True, scale: float = 1.0
) -> Bar:
    median, lowest, highest = (scale * found[key] for key in ("median", "lowest", "highest"))
    return Bar(what, against, median, lowest, highest, limit, most, measurement)


def _once(value: float) -> dict[str, float]:
    return dict.fromkeys(("median", "lowest", "highest"), value)


def bars(measured: Measured) -> list[Bar]:
    """All bars whose measurements are there."""
    found: list[Bar] = []
    for content in measured.contents("meta-step"):
        name = "meta-step"
        found.append(
            _bar(
                "second-order meta-step, 4 optimizees",
                "times as fast as torchopt.MetaOptimizer",
                content["meta_step"]["speed_up"],
                2,
                name,
                most=False,
            )
        )
        for case, row in content["passes"].items():
            found.append(_bar(f"PGD-20, {case}", "its 20 passes", row["pgd_over_limit"], 1.1, name))
    for name, told in (("factor gradients", ""), ("factor gradients, memory kept", ", allocator keeps memory")):
        for content in measured.contents(name):
            for model, row in content.items():
                if isinstance(row, dict) and "seconds" in row:
                    for way, title in (("scaled", "factor_gradients"), ("tangents, combined", "combined gradient with tangents")):
                        if way in row:
                            found.append(_bar(f"{title}, {model}{told}", "one pass by parameters and input", row[way], 1.4, name))
    for name, lstm in (("optimizer step", 12), ("optimizer step, GPU", 3)):
        for content in measured.contents(name):
            for rule, row in content["ratios"].items():
                if "many kernels" in rule:  # what the fused step replaces has no bar
                    continue
                limit = lstm if "LSTM" in rule else 3
                found.append(_bar(f"{name}, {rule}, 1 M parameters", "a step of Adam (foreach)", row, limit, name))
    for content in measured.contents("dual"):
        for case, row in content.items():
            if isinstance(row, dict) and "percent" in row:
                found.append(
                    _bar(
                        f"dual solve, {case}",
                        "a PGD-10 training step",
                        row["percent"],
                        row["bar_percent"] / 100,
                        "dual",
                        scale=0.01,
                    )
                )
    for content in measured.contents("training step"):
        for objective, row in content.items():
            if isinstance(row, dict) and row.get("bar"):
                found.append(
                    _bar(
                        f"training step, {objective}",
                        "the passes it cannot do without",
                        row["ratio"],
                        row["bar"],
                        "training step",
                    )
                )
    for content in measured.contents("learned weights"):
        found += _learned_weights(content)
    for content in measured.contents("bounds"):
        found += _bounds(content)
    for content in measured.contents("attacks, standing"):
        for network, row in content["results"].items():
            found.append(
                _bar(
                    f"standard protocol, {network}",
                    f"times as fast as AutoAttack ({content['peer_steps']} steps)",
                    _once(row["autoattack"]["ratio"]),
                    5,
                    "attacks, standing",
                    most=False,
                )
            )
    for content in measured.contents("attacks, cost"):
        for network, row in content["results"].items():
            for attack, title in (("pgd", "PGD-40"), ("beta", "BETA-30")):
                found.append(_bar(f"{title}, {network}", "its passes", row["speed"][attack], 1.05, "attacks, cost"))
    return found


def _learned_weights(content: dict[str, Any]) -> list[Bar]:
    found, name = [], "learned weights"
    for network, rows in content["meta-step"].items():
        found.append(
            _bar(f"CAAT step without attacks, {network}", "the same on torchopt.MetaSGD", rows["jvp"]["ratio"], 1.0, name)
        )
        found.append(
            _bar(
                f"peak memory of its meta-part, {network}",
                "the same on torchopt.MetaSGD",
                _once(rows["jvp"]["memory"]),
                0.75,
                name,
            )
        )
    found.append(_bar("CAAT step, hard routing", "a step of TRADES", content["routed step"]["ratio"]["CAAT, routed"], 1.15, name))
    return found


def _bounds(content: dict[str, Any]) -> list[Bar]:
    found, name = [], "bounds"
    for part, title, seconds in (
        ("sweep", "60,000 points, four radii", 60),
        ("order3", "10,000 points, triples", 20),
        ("linf", "20,000 points, l_inf, three radii", 60),
    ):
        if part in content:
            found.append(_bar(f"bound, {title}, seconds", "a limit of seconds", _once(content[part]["seconds"]), seconds, name))
    if "sweep" in content:
        found.append(_bar("bound, 60,000 points, peak GB", "a limit of GB", _once(content["sweep"]["peak_gb"]), 6, name))
    if "flow" in content:
        found.append(
            _bar("order-2 bound by maximum flow, 72,324 pairs", "times as fast as HiGHS", content["flow"], 30, name, most=False)
        )
    return found
