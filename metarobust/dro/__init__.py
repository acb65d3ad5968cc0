"""Distributionally robust optimisation: the worst expectation of losses over all weights within a divergence."""

from metarobust.dro._gather import gather_examples
from metarobust.dro._worst_case import WorstCase, worst_case_expectation

__all__ = ["WorstCase", "gather_examples", "worst_case_expectation"]
