"""Which settings of `CAAT` go together, and the derivative that suits them."""

from metarobust._checks import message, require
from metarobust.meta_weighters._branches import Branches
from metarobust.meta_weighters._characteristics import CHARACTERISTICS
from metarobust.meta_weighters._class_balance import ReMargin
from metarobust.meta_weighters._network import WeightingNetwork, check_network
from metarobust.meta_weighters._radii import PerturbationBound
from metarobust.objectives._common import PairLoss
from metarobust.types import RobustLoss


def check_reading(network: object, *, reads_loss: bool) -> None:
    """Check that the network reads what it is given: the loss, or the six characteristics.

    Raises:
        TypeError: no `WeightingNetwork`.
        ValueError: one with other inputs, or one that would set the radius by a loss that is known after the attack only.
    """
    check_network(network)
    assert isinstance(network, WeightingNetwork)
    expected = 1 if reads_loss else len(CHARACTERISTICS)
    require(len(network.mean) == expected, "network", f"with inputs={expected}", len(network.mean))
    range_ = network.bound_range
    expected = "without bound_range where it reads the loss, which is known once the radius is"
    require(
        range_ is None or not reads_loss,
        "network",
        expected,
        f"bound_range={range_}",
        "leave it out, or write bound=GradientBound()",
    )


def check_bound(bound: PerturbationBound | None, network: WeightingNetwork, branches: Branches, *, classes: int) -> None:
    """Check that the bounds of examples, from ``bound`` or the network, suit robust loss and classes.

    Raises:
        ValueError: a robust loss that finds its adversaries itself, two sources of bounds, a `ReMargin` of other classes.
    """
    if bound is None and network.bound_range is None:
        return
    expected = "one whose adversaries signed_pgd can find (AdversarialTraining, TRADES, MART) where examples have bounds"
    require(branches.signed, "robust_loss", expected, type(branches.robust_loss).__name__, "leave bound out")
    require(bound is None or network.bound_range is None, "bound", "None beside a network with bound_range", bound)
    if isinstance(bound, ReMargin):
        found = len(bound.factors)
        require(found == classes, "bound", f"ReMargin(classes={classes}), as many as class_counts has", f"classes={found}")


def chosen_hypergradient(name: str, robust_loss: RobustLoss, network: WeightingNetwork, *, virtual_steps: int) -> str:
    """The derivative that ``name`` asks for; for ``"auto"`` the JVP wherever it is exact.

    Raises:
        ValueError: ``"jvp"`` for a loss that attacks when it is called.
    """
    whole = not isinstance(robust_loss, PairLoss)
    if name == "auto":
        return "double_backward" if whole or virtual_steps > 1 or network.bound_range is not None else "jvp"
    if whole and name == "jvp":
        remedy = "write hypergradient='double_backward'"
        expected = "not 'jvp' for a loss that attacks when it is called"
        raise ValueError(message("hypergradient", expected, f"'jvp' with {type(robust_loss).__name__}", remedy))
    return name
