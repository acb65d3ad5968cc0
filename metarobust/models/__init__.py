"""Classifiers that take inputs in [0, 1]: small networks, the normalisation layer, and stacks of copies."""

from metarobust.models._normalize import Normalize
from metarobust.models._residual import residual_network
from metarobust.models._small import cnn, mlp
from metarobust.models._stacked import stack

__all__ = ["Normalize", "cnn", "mlp", "residual_network", "stack"]
