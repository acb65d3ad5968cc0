"""How the loss on meta-data, one or several virtual steps later, depends on the weights of the training examples."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import jvp

from metarobust._checks import choice, finite, integer, message, require
from metarobust._processes import processes, summed
from metarobust.meta_weighters._joint import joint_size
from metarobust.meta_weighters._virtual_update import VirtualUpdate
from metarobust.types import Parameters

HYPERGRADIENTS = ("jvp", "double_backward", "finite_difference")
"""Ways to compute a hypergradient."""

BranchLosses = Callable[[Parameters], Tensor]
MetaLoss = Callable[[Parameters], Tensor]


class Hypergradient(NamedTuple):
    """What `hypergradient` returns, all detached.

    Attributes:
        weights_gradient: derivative of the meta-loss in each weight, ``[batch, branches]``.
        bound_gradient: in each bound multiplier, ``[batch]``; None without ``bound``.
        meta_loss: after the virtual steps, a scalar.
        parameters: after the virtual steps.
    """

    weights_gradient: Tensor
    bound_gradient: Tensor | None
    meta_loss: Tensor
    parameters: Parameters


@torch.enable_grad()
def hypergradient(
    branch_losses: BranchLosses,
    meta_loss: MetaLoss,
    parameters: Parameters,
    weights: Tensor,
    *,
    update: VirtualUpdate,
    bound: Tensor | None = None,
    method: str = "double_backward",
    steps: int = 1,
    relative_step: float = 1e-3,
) -> Hypergradient:
    r"""The derivative of the meta-loss after virtual steps in the weights of the training losses.

    With :math:`g(w) = \nabla_W \frac1n \sum_{ik} w_{ik} \ell_{ik}(W)` and the update map U of the optimizer, one virtual step is
    :math:`\hat W = W + U(g(w))` (Shu et al., 2019, arXiv 1902.07379, eq. 3; Zhou et al., 2023, eq. 9), and with
    :math:`v = (\partial U / \partial g)^\top \nabla L_{meta}(\hat W)`

    .. math:: \frac{\partial L_{meta}(\hat W)}{\partial w_{ik}} = \frac1n \langle \nabla_W \ell_{ik}(W), v \rangle,

    a Jacobian-vector product of the losses, because g is linear in the weights. All methods share :math:`\hat W` and v and differ
    in this product alone:

    - ``"double_backward"`` differentiates the gradient g (kept with its graph) in the weights: exact; it needs second derivatives
      of every layer and the most memory. The one for several steps.
    - ``"jvp"`` takes one forward-mode pass: exact; keeps no graph for a second differentiation.
    - ``"finite_difference"`` takes two plain forward passes at :math:`W \pm h v / \|v\|`, as in DARTS, and works with layers
      that have no second derivative; ReLU kinks leave an error of about 1 %.

    Under Adam a parameter without a gradient (a dead unit, a bias before BatchNorm) has an entry of v as large as the learning
    rate over Adam's epsilon. The exact methods lose digits by it (2 % off in float32, on a small network with such a bias);
    finite differences then mean nothing.

    Under `torch.distributed` the virtual step is that of the joint batch, the meta-loss the mean over the processes, and the
    result this process's part, exact; every process must call equally often.

    Args:
        branch_losses: pure function of the parameters to losses ``[batch, branches]``. Batch statistics may be part of it;
            buffers must not be written (pass copies to ``torch.func.functional_call``).
        meta_loss: function of the parameters to a scalar.
        parameters: W, by name.
        weights: ``[batch, branches]``, constants.
        update: from `virtual_update`, or any TorchOpt rule with its state: ``VirtualUpdate(rule, rule.init(tuple))``, for the
            tuple of the parameters in order.
        bound: a leaf ``[batch]`` that ``branch_losses`` reads and the derivative is wanted in too; for ``"double_backward"``
            only: differences of gradients fail at ReLU kinks, and torch's forward mode of BatchNorm in training mode,
            differentiated again, was 3 to 50 % off.
        method: one of the three.
        steps: virtual steps, all with these losses; more than 1 with ``"double_backward"`` only.
        relative_step: h over the norm of the parameters, for ``"finite_difference"``.

    Raises:
        ValueError: an unknown method, several steps or a bound with another than ``"double_backward"``, losses of another shape
            than the weights.

    Example:
        >>> import torchopt
        >>> x, parameters = torch.tensor([1.0, 2.0]), {"w": torch.tensor(3.0)}
        >>> rule = torchopt.sgd(lr=0.1)
        >>> found = hypergradient(
        ...     lambda p: (p["w"] * x)[:, None],
        ...     lambda p: p["w"] ** 2,
        ...     parameters,
        ...     torch.ones(2, 1),
        ...     update=VirtualUpdate(rule, rule.init(tuple(parameters.values()))),
        ... )
        >>> found.weights_gradient.squeeze(1)  # - 0.1 * x / 2 * 2 * (3 - 0.1 * 1.5)
        tensor([-0.2850, -0.5700])
    """
    choice("method", method, HYPERGRADIENTS)
    integer("steps", steps, least=1)
    finite("relative_step", relative_step, above=0.0)
    remedy = "write method='double_backward'"
    require(steps == 1 or method == "double_backward", "steps", f"1 for method={method!r}", steps, remedy)
    world, size = processes(), joint_size(len(weights), weights.device)
    require(steps == 1 or world == 1, "steps", f"1 over {world} processes", steps)
    names, keep_graph = list(parameters), method == "double_backward"
    start = tuple(p.detach().requires_grad_() for p in parameters.values())
    weights = weights.detach().requires_grad_()
    require(bound is None or method == "double_backward", "bound", f"None for method={method!r}", "a tensor", remedy)
    if bound is not None and not (bound.is_leaf and bound.requires_grad):
        raise ValueError(
            message("bound", "a leaf that requires a gradient", "one without", "write bound.detach().requires_grad_()")
        )
    point, state = start, update.state
    gradients: tuple[Tensor, ...] = ()
    for _ in range(steps):
        losses = branch_losses(dict(zip(names, point, strict=True)))
        require(
            losses.shape == weights.shape, "branch_losses", f"of shape {list(weights.shape)}, as the weights", list(losses.shape)
        )
        total = (weights * losses).sum() / size
        gradients = torch.autograd.grad(total, point, create_graph=keep_graph, materialize_grads=True)
        if world > 1:  # the parts of the others do not depend on the weights of this process
            gradients = tuple(g + (whole - g.detach()) for g, whole in zip(gradients, summed(gradients), strict=True))
        if not keep_graph:
            gradients = tuple(g.detach().requires_grad_() for g in gradients)
        moves, state = update.transformation.update(cast("Any", gradients), state, params=cast("Any", point), inplace=False)
        point = tuple(p + move for p, move in zip(point, cast("Any", moves), strict=True))
    arrived = {name: p.detach().requires_grad_() for name, p in zip(names, point, strict=True)}
    reached = meta_loss(arrived)
    if reached.dim() != 0 or not reached.requires_grad:
        got = f"shape {list(reached.shape)}" if reached.dim() else "a constant"
        raise ValueError(message("meta_loss", "a function to a scalar that depends on the parameters", got))
    slopes = torch.autograd.grad(reached, list(arrived.values()), materialize_grads=True)
    if world > 1:
        reached, *slopes = (value / world for value in summed([reached, *slopes]))
    final = Hypergradient(weights, None, reached.detach(), {name: p.detach() for name, p in arrived.items()})
    wanted = [weights] if bound is None else [weights, bound]
    if keep_graph:
        found = torch.autograd.grad(point, wanted, slopes, materialize_grads=True)
        return final._replace(weights_gradient=found[0], bound_gradient=None if bound is None else found[1])
    moved = [(p, slope) for p, slope in zip(point, slopes, strict=True) if p.requires_grad]
    towards = torch.autograd.grad([p for p, _ in moved], gradients, [slope for _, slope in moved], materialize_grads=True)
    differ = _forward_mode if method == "jvp" else _difference
    with torch.no_grad():
        change = differ(branch_losses, dict(zip(names, (p.detach() for p in start), strict=True)), towards, relative_step)
    return final._replace(weights_gradient=change / size)


def _forward_mode(branch_losses: BranchLosses, at: Parameters, towards: tuple[Tensor, ...], relative_step: float) -> Tensor:
    """How the losses ``[batch, branches]`` change along ``towards``, by dual numbers."""
    del relative_step
    with warnings.catch_warnings():
        # At its first use torch compiles formulas of its forward mode, and warns of its own compiler.
        warnings.filterwarnings("ignore", r".*torch\.jit\.", FutureWarning)
        return cast("Tensor", jvp(branch_losses, (at,), (dict(zip(at, towards, strict=True)),))[1])


def _difference(branch_losses: BranchLosses, at: Parameters, towards: tuple[Tensor, ...], relative_step: float) -> Tensor:
    """The same by central differences."""
    length = torch.stack([v.norm() for v in towards]).norm()
    if length == 0:
        return torch.zeros_like(branch_losses(at))
    h = relative_step * torch.stack([p.norm() for p in at.values()]).norm().clamp(min=1e-6) / length
    ahead, behind = (
        branch_losses({name: p + sign * h * v for (name, p), v in zip(at.items(), towards, strict=True)}) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * h)


def copied_buffers(model: torch.nn.Module) -> dict[str, Any]:
    """The model's buffers, each with memory of its own, for `torch.func.functional_call`."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
