"""The kinds of meta-optimizer there are, by the name that a file gives them, and the streams that they must meet."""

from typing import Any

from metarobust._checks import message, require
from metarobust.meta_optimizers._interpretable import InterpretableOptimizer
from metarobust.meta_optimizers._lstm import LSTMOptimizer

MetaOptimizer = LSTMOptimizer | InterpretableOptimizer

KINDS: dict[str, type[LSTMOptimizer] | type[InterpretableOptimizer]] = {
    kind.__name__: kind for kind in (LSTMOptimizer, InterpretableOptimizer)
}


def check_source(meta_optimizer: MetaOptimizer, task: Any, where: str) -> None:
    """Refuse a task with another second stream than the rule is told to read: the file would name the wrong one."""
    if meta_optimizer.two_streams:
        source, own = getattr(task, "gradient_source", None), meta_optimizer.gradient_source
        remedy = f"or give the rule gradient_source={source!r}"
        require(
            source in (own, "gradient", None), where, f"tasks with gradient_source={own!r}, like the rule", repr(source), remedy
        )


def check_meta_optimizer(value: object) -> None:
    """Check that ``value`` is a meta-optimizer."""
    if not isinstance(value, MetaOptimizer):
        remedy = f"write load({value!r})" if isinstance(value, str) else "write InterpretableOptimizer() or load(path)"
        got = repr(value) if isinstance(value, str) else type(value).__name__
        raise TypeError(message("meta_optimizer", "an LSTMOptimizer or an InterpretableOptimizer", got, remedy))
