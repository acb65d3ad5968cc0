"""The kinds of meta-optimizer there are, by the name that a file gives them."""

from metarobust.meta_optimizers._interpretable import InterpretableOptimizer
from metarobust.meta_optimizers._lstm import LSTMOptimizer

MetaOptimizer = LSTMOptimizer | InterpretableOptimizer

KINDS: dict[str, type[LSTMOptimizer] | type[InterpretableOptimizer]] = {
    kind.__name__: kind for kind in (LSTMOptimizer, InterpretableOptimizer)
}
