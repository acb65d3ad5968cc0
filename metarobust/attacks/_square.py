"""Square: an attack by random search that asks the model for logits and never for a gradient."""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metarobust._checks import called, finite, integer, losses, message, require
from metarobust._checks import generator as check_generator
from metarobust._tensors import flat
from metarobust.attacks._common import buffers_kept, checked, checked_logits, checked_start
from metarobust.attacks._counting import record_call
from metarobust.attacks._memory import rows_within
from metarobust.attacks._square_proposals import PROPOSALS, Grid
from metarobust.losses import Loss, known_loss, loss_function
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

# Numbers of proposals after which the window's share of the input is halved: the paper's, for 10,000 queries.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Proposals whose random numbers are drawn at once: the same for every call, so that more queries only continue a search.
BLOCK = 64
# Finished rows leave the batch when they are at least this share of it.
FINISHED_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Square:
    r"""The Square Attack: random search, one square window at a time (Andriushchenko et al., 2020, arXiv 1912.00049).

    One proposal per query. A proposal is kept when it raises the loss or is misclassified; a misclassified example is finished
    and is asked for no more. A window holds the share :math:`p` of the coordinates of a channel, :math:`p` halving after 10,
    50, 200, 500, 1000, 2000, 4000, 6000 and 8000 proposals, whatever ``queries`` is: the same generator gives the same search,
    only longer, so more queries never do worse.

    - l_inf (algorithm 2) starts from vertical stripes of :math:`\pm\epsilon`; a proposal sets a window to :math:`x+\epsilon` or
      :math:`x-\epsilon`, by one random sign per channel, clipped to the box. A proposal that would change nothing tries the
      opposite signs.
    - l2 (algorithm 3) starts from a grid of :math:`\pm\eta` bumps of length :math:`\epsilon`; a proposal empties a window
      :math:`W_2` and gives its squared length, with what the ball has left, to :math:`W_1`, along
      :math:`\rho\,\eta/\|\eta\| + \nu_{W_1}/\|\nu_{W_1}\|` per channel, :math:`\nu` being the perturbation so far.

    Windows are squares over all channels of ``[channels, height, width]``, runs of neighbours on ``[dimensions]`` and
    ``[channels, length]``, cubes on more axes; no side is longer than its axis. The model is called in the mode it is in,
    without gradients, on the unfinished rows (in training mode, where BatchNorm couples rows, on all): once on the clean input,
    which is not counted, and at most ``queries`` times on perturbed ones, the start being the first. The result is the
    misclassified point, or else the one of the largest loss, never below that of the clean input.

    Args:
        threat_model: ball and box, in input units; l_inf or l2.
        queries: largest number of perturbed points that the model is asked for, per example.
        initial_fraction: share of the coordinates in the first windows (``p_init``), in (0, 1]; default as in AutoAttack
            (Croce and Hein, 2020, arXiv 2003.01690).
        loss: ``"margin"``, ``"cross_entropy"``, or a callable ``(logits, y) -> [batch]``.

    A call takes ``generator``, a CPU generator (without one: torch's global generator). An example's noise does not depend on
    which others are finished.

    Raises:
        ValueError: an l1 ball, no query, a fraction outside (0, 1]; on a call, inputs or labels out of range.
        TypeError: on a call, for inputs or labels of the wrong dtype.

    Example:
        >>> attack = Square(threat_model=ThreatModel(norm="linf", epsilon=0.2), queries=50)
        >>> attack(lambda x: x.round(), torch.tensor([[0.6, 0.4]]), torch.tensor([0]), generator=torch.Generator().manual_seed(0))
        tensor([[0.4000, 0.6000]])
    """

    threat_model: ThreatModel
    queries: int = 5000
    initial_fraction: float = 0.8
    loss: str | Loss = "margin"

    def __post_init__(self) -> None:
        if not isinstance(self.threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(self.threat_model)))
        norm = self.threat_model.norm
        require(norm in PROPOSALS, "norm", "'linf' or 'l2' for Square", repr(norm), "for l1 write APGD(..., loss='margin')")
        integer("queries", self.queries, least=1)
        finite("initial_fraction", self.initial_fraction, above=0.0)
        require(self.initial_fraction <= 1, "initial_fraction", "at most 1 (the whole input)", self.initial_fraction)
        loss_function(self.loss)

    @torch.inference_mode(False)
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box.

        ``start``, points inside ball and box shaped like ``x``, takes the place of stripes and bumps; begin with a small
        ``initial_fraction`` then.
        """
        x, y = checked(self.threat_model, model, x, y)
        if start is not None:
            start = checked_start(self.threat_model, start, x)
        record_call(len(x))
        if x.numel() == 0 or self.threat_model.epsilon == 0:
            return x.clone()
        with torch.no_grad(), buffers_kept(model):
            return _search(self, model, x, y, generator, start)


def _search(
    attack: Square, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, start: Tensor | None
) -> Tensor:
    """Random search (algorithm 1) on all unfinished rows at once, each laid out as ``[channels, places]``."""
    check_generator("generator", generator)
    grid, loss_of = Grid.of(x), known_loss(attack.loss)

    # Large batches are asked in parts that stay in the cache; small ones are not worth the measurement.
    at_once = rows_within(None, model, x) if len(x) > 128 and not _coupled(model) else len(x)

    def ask(points: Tensor, y: Tensor, *, first: bool = False) -> tuple[Tensor, Tensor]:
        parts = points.view(-1, *x.shape[1:]).split(at_once)
        answers = [called(model, part) if first else model(part) for part in parts]
        if first:
            for answer, own in zip(answers, y.split(at_once), strict=True):
                checked_logits(answer, own)
        logits = answers[0] if len(parts) == 1 else torch.cat(answers)
        wrong = logits.argmax(1) != y  # before the loss, which might write into the logits
        return losses(loss_of(logits, y), examples=len(y)), wrong

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(x.device)

    # The model gets copies throughout: one that writes into its input must not reach the points of the search.
    result = flat(x).clone().view(len(x), grid.channels, grid.places)
    clean_loss, wrong = ask(result.clone(), y, first=True)
    # In training mode BatchNorm makes a row's logits depend on the others: then finished rows stay in the batch, unmoved.
    coupled = _coupled(model)
    rows = torch.arange(len(x), device=x.device) if coupled else (~wrong).nonzero().squeeze(1)
    wrong, y, clean_loss = wrong[rows], y[rows], clean_loss[rows]
    if wrong.all():  # also where no row is left
        return result.view(x.shape)
    proposals = PROPOSALS[attack.threat_model.norm](attack.threat_model, result[rows], grid)
    if start is None:
        points = proposals.start(noise(len(x), proposals.numbers_to_start)[rows])
    else:
        points = flat(start).clone().view_as(result)[rows]
    points = torch.where(wrong[:, None, None], result[rows], points)
    loss, finished = ask(points.clone(), y)
    finished |= wrong

    check_every = 1 if x.device.type == "cpu" else 8  # elsewhere a look at `finished` waits for the device
    numbers, planned = points, 0
    for proposal in range(1, attack.queries):
        position = (proposal - 1) % BLOCK
        stale = position == 0 or proposal - 1 in HALVED_AFTER
        if (proposal - 1) % check_every == 0:
            count = int(finished.sum())
            if count == len(rows):
                break
            if count and not coupled and count >= FINISHED_SHARE * len(rows):
                result[rows[finished]] = points[finished]
                left = (~finished).nonzero().squeeze(1)
                rows, y, clean_loss, loss, points, finished = (t[left] for t in (rows, y, clean_loss, loss, points, finished))
                proposals.keep(left)
                stale = True
        if position == 0:  # noise for every row, finished or not: an example's search is its own
            numbers = noise(BLOCK, len(x), proposals.numbers)
        if stale:
            proposals.plan(numbers[position:, rows], points, _fraction(attack.initial_fraction, proposal))
            planned = position
        new_loss, wrong = ask(proposals.propose(points, position - planned), y)
        accepted = ((new_loss > loss) | wrong) & ~finished
        proposals.accept(points, accepted)
        loss = torch.where(accepted, new_loss, loss)
        finished |= wrong
    better = finished | (loss > clean_loss)
    result[rows[better]] = points[better]
    return result.view(x.shape)


def _coupled(model: Model) -> bool:
    return isinstance(model, nn.Module) and any(module.training for module in model.modules())


def _fraction(initial_fraction: float, proposal: int) -> float:
    """Share of the coordinates of a channel in the window of a proposal, counted from 1."""
    return initial_fraction / 2 ** bisect_left(HALVED_AFTER, proposal)
