"""The kinds of meta-optimizer there are, by the name that a file gives them."""

from metarobust._checks import message
from metarobust.meta_optimizers._interpretable import InterpretableOptimizer
from metarobust.meta_optimizers._lstm import LSTMOptimizer

MetaOptimizer = LSTMOptimizer | InterpretableOptimizer

KINDS: dict[str, type[LSTMOptimizer] | type[InterpretableOptimizer]] = {
    kind.__name__: kind for kind in (LSTMOptimizer, InterpretableOptimizer)
}


def check_meta_optimizer(value: object) -> None:
    """Check that ``value`` is a meta-optimizer."""
    if not isinstance(value, MetaOptimizer):
        remedy = f"write load({value!r})" if isinstance(value, str) else "write InterpretableOptimizer() or load(path)"
        got = repr(value) if isinstance(value, str) else type(value).__name__
        raise TypeError(message("meta_optimizer", "an LSTMOptimizer or an InterpretableOptimizer", got, remedy))
