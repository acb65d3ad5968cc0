"""CAAT: every example is moved against the model or in its favour, and a network learns which from clean meta-data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarobust import _checks
from metarobust._checks import choice, finite, integer, message, require
from metarobust._processes import like_rank_0
from metarobust.attacks._common import buffers_kept
from metarobust.data import LabelledImages
from metarobust.evaluation._inputs import as_tensors, digest
from metarobust.meta_weighters._batch_step import meta_step_on_batch
from metarobust.meta_weighters._branches import Branches, Call, Points, evaluation_mode, rows_independent
from metarobust.meta_weighters._caat_checks import check_bound, check_reading, chosen_hypergradient
from metarobust.meta_weighters._characteristics import ClassStatistics, training_characteristics
from metarobust.meta_weighters._class_balance import ReMargin, held_out_errors, published_attack
from metarobust.meta_weighters._hypergradient import HYPERGRADIENTS
from metarobust.meta_weighters._meta_step import routed
from metarobust.meta_weighters._network import Weighting, WeightingNetwork
from metarobust.meta_weighters._optimizer_state import check_optimizer, optimizer_state, restore_optimizer
from metarobust.meta_weighters._radii import GradientBound, PerturbationBound
from metarobust.objectives import TRADES
from metarobust.threat_models import ThreatModel
from metarobust.types import Batch, Model, RobustLoss

ROUTINGS = ("hard", "soft", "random")
"""How examples are sent to branches; see `CAAT`."""


class CAAT(nn.Module):
    r"""Combining adversaries with anti-adversaries (Zhou et al., 2023, arXiv 2304.12550), on top of any robust loss.

    A network sees six characteristics of each example and weighs its branches: moved against the model it is charged the robust
    loss, moved in the model's favour the cross-entropy, perhaps unmoved the cross-entropy too,

    .. math:: \ell_i = w_{i,adv}\, \ell_{robust}(x_i, x_i^{adv}) + w_{i,anti}\, CE(f(x_i^{anti}), y_i)
        + w_{i,nat}\, CE(f(x_i), y_i).

    Every ``meta_every`` calls the network itself takes a step: a virtual step of the model's optimizer, momentum and weight decay
    included, then the loss on clean, balanced meta-data there, differentiated in the weights (`meta_weighted_step`). The
    characteristics are constants in both the virtual and the actual step. Attacks, virtual steps and the meta-loss leave the
    model's mode and buffers as they are.

    With ``routing="soft"`` all branches are found for all examples, and weighted. With ``"hard"`` an example gets one branch
    whole, is attacked towards that side alone, and costs what an adversarial example costs; it takes many meta-steps until any
    example changes sides. ``"random"`` is a control: as many as the network would send to each branch, chosen at random.

    With adversaries only and no meta-step the losses are those of the robust loss, for `TRADES` to the last bit. What differs
    from the published code, and why, stands in docs/papers/caat.md.

    Args:
        threat_model: ball and box, in input units.
        meta_data: ``(x, y)`` or `LabelledImages`, clean and balanced, on the device and in the dtype of the model; neither in the
            training data nor in the test data.
        optimizer: the one that trains the model; its state is read for the virtual step. SGD, Adam or AdamW of ``torch.optim``.
        class_counts: examples of each class in the training data, as labelled.
        network: by default a `WeightingNetwork` with two branches.
        robust_loss: by default `TRADES` with beta 1.5, as published. `AdversarialTraining`, `TRADES` and `MART` charge the points
            of one `signed_pgd` on what they climb, whatever attack they came with; any other finds its adversaries itself.
        bound: None for epsilon itself, a `GradientBound`, a `ReMargin`, or a callable ``(characteristics, y) -> factors``. A
            network with ``bound_range`` has its own.
        routing: ``"hard"``, ``"soft"`` or ``"random"``.
        meta_every: calls from one meta-step to the next; None for no meta-step. (Published: 50.)
        meta_batch_size: meta-examples of a step.
        meta_loss: a robust loss, or an objective with a scalar ``.loss``, on the meta-data; by default the robust loss.
        learning_rate: of AdamW on the network, whose weight decay is 5e-4. (Published: 1e-4, of Adam.)
        temperature: of the network, from the first epoch to the last, geometrically, as (1.0, 0.1); None leaves it as it is.
        hypergradient: ``"jvp"``, ``"double_backward"``, ``"finite_difference"``, or ``"auto"``: the JVP, which is the faster of
            the exact ones on a CPU and needs less memory (docs/speed.md), wherever it is exact, otherwise double backward.
        virtual_steps: more than 1 with ``"double_backward"`` only.
        steps: of the attack.
        step_size: of the attack, input units; by default ``2.5 * epsilon / steps``.
        anti_factor: how many times as far anti-adversaries may move as adversaries. (Published: 1. See docs/papers/caat.md.)
        clip_norm: largest norm of the network's gradient.
        reads_loss: the network has one input, the loss of each example's adversary, as in `MetaWeightNet`; ``"soft"`` only.

    A call takes ``x [batch, ...]``, ``y [batch]`` int64 and a CPU generator and returns one loss per example. ``state_dict``
    holds network, its optimizer, statistics and count of calls: `training.fit` keeps it in its checkpoint.

    Raises:
        TypeError: an argument of the wrong type; on a call that takes a meta-step, a model that is no ``nn.Module``.
        ValueError: a setting out of range, settings that do not go together.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> meta_data = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> objective = CAAT(
        ...     threat_model=ThreatModel(epsilon=0.1), meta_data=meta_data, optimizer=optimizer, class_counts=[20, 20, 5]
        ... )
        >>> losses = objective(model, torch.rand(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
        >>> losses.mean().backward()
        >>> losses.shape, sorted(objective.diagnostics)
        (torch.Size([8]), ['adversary', 'anti_adversary', 'meta_gradient', 'meta_loss', 'radius'])
    """

    bound: PerturbationBound | None
    calls: Tensor
    meta_told: Tensor

    def __init__(
        self,
        *,
        threat_model: ThreatModel,
        meta_data: tuple[Tensor, Tensor] | LabelledImages,
        optimizer: torch.optim.Optimizer,
        class_counts: Sequence[int] | Tensor,
        network: WeightingNetwork | None = None,
        robust_loss: RobustLoss | None = None,
        bound: PerturbationBound | None = None,
        routing: str = "soft",
        meta_every: int | None = 5,
        meta_batch_size: int = 128,
        meta_loss: Callable[..., Any] | None = None,
        learning_rate: float = 3e-3,
        temperature: tuple[float, float] | None = None,
        hypergradient: str = "auto",
        virtual_steps: int = 1,
        steps: int = 10,
        step_size: float | None = None,
        anti_factor: float = 4.0,
        clip_norm: float | None = None,
        reads_loss: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
        choice("routing", routing, ROUTINGS)
        choice("hypergradient", hypergradient, ("auto", *HYPERGRADIENTS))
        require(routing == "soft" or not reads_loss, "routing", "'soft' where the network reads the loss", repr(routing))
        every = 1 if meta_every is None else meta_every
        counts = {"meta_batch_size": meta_batch_size, "virtual_steps": virtual_steps, "steps": steps, "meta_every": every}
        for name, value in counts.items():
            integer(name, value, least=1)
        finite("learning_rate", learning_rate, above=0.0)
        finite("anti_factor", anti_factor, above=0.0)
        check_optimizer(optimizer, clip_norm)
        self.statistics = ClassStatistics(class_counts)
        self.network = WeightingNetwork() if network is None else network
        check_reading(self.network, reads_loss=reads_loss)
        robust_loss = TRADES(threat_model=threat_model, beta=1.5) if robust_loss is None else robust_loss
        self.branches = Branches(
            names=self.network.branches,
            robust_loss=robust_loss,
            threat_model=threat_model,
            steps=steps,
            step_size=step_size,
            anti_factor=anti_factor,
        )
        self.bound = bound
        check_bound(bound, self.network, self.branches, classes=len(self.statistics.share))
        hypergradient = chosen_hypergradient(hypergradient, robust_loss, self.network, virtual_steps=virtual_steps)
        if temperature is not None:
            _checks.pair("temperature", temperature, "(1.0, 0.1)")
        for value in temperature or ():
            finite("temperature", value, above=0.0)
        x, y = as_tensors(meta_data)
        _checks.images(x, lower=threat_model.lower, upper=threat_model.upper)
        _checks.labels(y, examples=len(x), classes=len(self.statistics.share))
        require(len(x) > 0, "meta_data", "at least one example", 0)
        self.meta_data = (x, y)
        self.threat_model, self.routing, self.reads_loss = threat_model, routing, reads_loss
        self.meta_every, self.meta_batch_size, self.temperature = meta_every, meta_batch_size, temperature
        self.meta_loss: Callable[..., Any] = robust_loss if meta_loss is None else meta_loss
        self.optimizer, self.hypergradient, self.virtual_steps = optimizer, hypergradient, virtual_steps
        self.clip_norm, self._joined = clip_norm, False
        # Decoupled decay: a meta-gradient shrinks with the model's learning rate, and would drown in a decay added to it.
        self.network_optimizer = torch.optim.AdamW(self.network.parameters(), lr=learning_rate, weight_decay=5e-4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.diagnostics: dict[str, float | None] = {}
        self.register_buffer("meta_told", torch.zeros(2, dtype=torch.float64))

    def start_epoch(self, model: nn.Module, *, epoch: int, epochs: int, generator: torch.Generator) -> None:
        """Begin ``epoch`` (from 0) of ``epochs``: temperature, and a `ReMargin` by ``model``'s errors (noise: ``generator``)."""
        if self.temperature is not None:
            first, last = self.temperature
            self.network.temperature = first * (last / first) ** (epoch / max(1, epochs - 1))
        self._follow(next(model.parameters()).device)
        if isinstance(self.bound, ReMargin):
            x, y = self.meta_data
            classes, attack = len(self.statistics.share), published_attack(self.threat_model)
            errors = held_out_errors(model, x, y, classes=classes, attack=attack, generator=generator)
            self.bound.start_epoch(errors, epoch=epoch)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Beside buffers and parameters the temperature and the state of the network's optimizer, all tensors."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}temperature"] = torch.tensor(self.network.temperature, dtype=torch.float64)
        destination.update(optimizer_state(f"{prefix}network_optimizer.", self.network_optimizer))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        _, _, missing, unexpected, _ = args
        own = (f"{prefix}temperature", f"{prefix}network_optimizer.")
        unexpected[:] = [name for name in unexpected if not name.startswith(own)]
        if own[0] in state_dict:
            self.network.temperature = float(state_dict[own[0]])
            restore_optimizer(own[1], self.network_optimizer, state_dict)
        else:
            missing.append(own[0])

    def forward(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``; every ``meta_every`` calls, move the network first."""
        self._follow(x.device)
        if not self._joined:
            like_rank_0([*self.parameters(), *self.buffers()])
            self._joined = True
        meta = self.meta_every is not None and int(self.calls) % self.meta_every == 0
        self.calls += 1
        natural = self._natural(model, x)
        six = training_characteristics(natural, y, self.statistics)
        self.statistics.update(six[:, 0], y)
        if isinstance(self.bound, GradientBound):
            self.bound.observe(six)
        radii = None if self.bound is None else self._radii(self.bound(six, y))
        return (self._soft if self.routing == "soft" else self._routed)(Call(model, x, y, natural, six, radii, generator), meta)

    @torch.no_grad()
    def weigh(self, model: nn.Module, x: Tensor, y: Tensor) -> Weighting:
        """The network's weights of examples ``x`` with labels ``y``, from ``model`` in evaluation mode; nothing changes."""
        expected = "asked of a network that reads the six characteristics"
        require(not self.reads_loss, "weigh", expected, "one that reads the loss")
        with evaluation_mode(model):
            logits = model(x)
        return self.network(training_characteristics(logits, y, self.statistics))

    def _routed(self, call: Call, meta: bool) -> Tensor:
        """The losses ``[batch]`` with one branch for each example."""
        self.network.observe(call.six)
        points = self._all_points(call) if meta else None
        if points is not None:
            self._meta_step(call, call.six, points)
        with torch.no_grad():
            weighting = self.network(call.six)
        weights, radii = routed(weighting.weights), self._network_radii(weighting, call.radii)
        if self.routing == "random":
            weights = weights[torch.randperm(len(call.y), generator=call.generator).to(call.y.device)]
        self._tell(weights, radii)
        branch = weights.argmax(1)
        sign_of = {"natural": 0, "adversary": 1, "anti_adversary": -1}
        signs = torch.tensor([sign_of[name] for name in self.network.branches], device=branch.device)[branch]
        if points is None or self.network.bound_range is not None:
            moved = self.branches.points(call.model, call.x, call.y, signs, call.natural, radii, call.generator)
        else:
            moved = points.chosen(call.x, signs)
        found = self.branches.routed_losses(call.model, call.x, call.y, branch, moved, call.natural, call.generator)
        return found * weights.sum(1) if weights.shape[1] == 1 else found

    def _soft(self, call: Call, meta: bool) -> Tensor:
        """The losses ``[batch]`` with all branches of each example, weighted."""
        if not self.reads_loss:
            self.network.observe(call.six)
        points = self._all_points(call)
        joint = isinstance(call.model, nn.Module) and rows_independent(call.model)
        seed = int(torch.randint(2**62, (), generator=call.generator))
        clean = call.natural if self.branches.reads_clean else None
        losses = self.branches.losses(call.model, call.x, call.y, points, joint=joint, seed=seed, clean=clean)
        known = losses.detach() if self.reads_loss else call.six
        if self.reads_loss:
            self.network.observe(known)
        if meta:
            self._meta_step(call, known, points)
        with torch.no_grad():
            weighting = self.network(known)
        self._tell(weighting.weights, self._network_radii(weighting, call.radii))
        return (weighting.weights.to(losses) * losses).sum(1)

    def _follow(self, device: torch.device) -> None:
        """Bring what is kept to the device of the model."""
        if self.calls.device != device or self.meta_data[0].device != device:
            self.to(device)
            self.meta_data = (self.meta_data[0].to(device), self.meta_data[1].to(device))

    def _natural(self, model: Model, x: Tensor) -> Tensor:
        """The logits at x: with their graph if a branch is charged for them, otherwise without a trace."""
        if self.branches.reads_clean:
            return model(x)
        with torch.no_grad(), buffers_kept(model):
            return model(x)

    def _radii(self, factors: Tensor) -> Tensor:
        """Factors of epsilon ``[batch]`` as radii, inside what the box allows."""
        return self.branches.radii(self.threat_model.epsilon * factors)

    def _network_radii(self, weighting: Weighting, radii: Tensor | None) -> Tensor | None:
        return radii if weighting.bound is None else self._radii(weighting.bound.detach())

    def _all_points(self, call: Call) -> Points:
        radii = call.radii
        if self.network.bound_range is not None:
            with torch.no_grad():
                radii = self._network_radii(self.network(call.six), radii)
        return self.branches.all_points(call.model, call.x, call.y, call.natural, radii, call.generator)

    def _meta_step(self, call: Call, known: Tensor, points: Points) -> None:
        """Equations 9 and 10: virtual step, meta-gradient, one step of the network."""
        if not isinstance(call.model, nn.Module):
            remedy = "pass the module, or set meta_every=None"
            raise TypeError(message("model", "an nn.Module for meta-steps", type(call.model).__name__, remedy))
        meta_x, meta_y = self.meta_data
        rows = torch.randperm(len(meta_x), generator=call.generator)[: self.meta_batch_size].to(meta_x.device)
        step = meta_step_on_batch(
            self.network,
            self.network_optimizer,
            self.branches,
            call.model,
            Batch(call.x, call.y),
            known,
            points,
            meta_batch=Batch(meta_x[rows], meta_y[rows]),
            meta_loss=self.meta_loss,
            optimizer=self.optimizer,
            method=self.hypergradient,
            steps=self.virtual_steps,
            hard=self.routing != "soft",
            clip_norm=self.clip_norm,
            generator=call.generator,
        )
        self.meta_told.copy_(torch.tensor([step.meta_loss, step.norm]))

    def _tell(self, weights: Tensor, radii: Tensor | None) -> None:
        """Keep the numbers that `training.fit` logs: the mean weight of each branch, and of the radius; None of no examples."""
        means = weights.mean(0).tolist() if len(weights) else [None] * weights.shape[1]
        radius = None if not len(weights) else self.threat_model.epsilon if radii is None else float(radii.mean())
        self.diagnostics = {**dict(zip(self.network.branches, means, strict=True)), "radius": radius}
        if self.meta_every is not None:  # of the last meta-step; the first call takes one
            self.diagnostics |= dict(zip(("meta_loss", "meta_gradient"), self.meta_told.tolist(), strict=True))

    def extra_repr(self) -> str:
        names = ("routing", "meta_every", "meta_batch_size", "temperature", "hypergradient", "virtual_steps", "clip_norm")
        told = [f"{name}={getattr(self, name)!r}" for name in (*names, "reads_loss", "branches", "meta_loss")]
        told += [f"meta_data={digest(*self.meta_data)}", f"learning_rate={self.network_optimizer.param_groups[0]['lr']:g}"]
        return ", ".join(told if isinstance(self.bound, nn.Module) else [*told, f"bound={self.bound!r}"])
