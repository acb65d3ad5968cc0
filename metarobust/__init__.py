"""metarobust: meta-learning robust classifiers through higher-order gradients.

A robust training method is three independent choices, each of which may be learned: **transport** (``metarobust.attacks``
moves the examples), **weighting** (how much each moved example counts) and **update** (``metarobust.meta_optimizers`` moves
the parameters). Every subpackage can be imported alone; importing this one loads nothing heavy.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
