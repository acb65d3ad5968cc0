"""Divergences that say how far the weights of examples may move: Kullback-Leibler, alpha, Renyi."""

from metarobust.divergences._alpha import Alpha
from metarobust.divergences._kl import KL
from metarobust.divergences._renyi import Renyi
from metarobust.divergences._tilt import Divergence, Tilt

__all__ = ["KL", "Alpha", "Divergence", "Renyi", "Tilt"]
