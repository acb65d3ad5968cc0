"""What an evaluation knows of each example: which attack ran on it, which broke it, and with what."""

import torch
from torch import Tensor

UNKNOWN, WITHSTOOD, BROKEN = 0, 1, 2
ROBUST, CLEAN_WRONG = -1, -2


class EvaluationState:
    """What is known of each example so far, all on the CPU.

    Attributes:
        outcomes: uint8 ``[attacks, n]``: UNKNOWN (not run), WITHSTOOD or BROKEN.
        adversarial: the first example found that breaks the prediction, where there is one; elsewhere the clean one.
        predictions: int64 ``[n]``, the class predicted for ``adversarial``.
        seconds: wall time of each stage, over all runs.
    """

    def __init__(self, x: Tensor, predictions: Tensor, attacks: int) -> None:
        self.outcomes = torch.full((attacks, len(x)), UNKNOWN, dtype=torch.uint8)
        self.adversarial = x.cpu().clone()
        self.predictions = predictions.clone()
        self.seconds: dict[str, float] = {}

    def broken_by(self, correct: Tensor) -> Tensor:
        """Index of the first attack that broke each example, ROBUST where none did, CLEAN_WRONG where none had to."""
        broken = self.outcomes == BROKEN
        first = torch.where(broken.any(0), broken.to(torch.int8).argmax(0), ROBUST)
        return torch.where(correct, first, CLEAN_WRONG)

    def targets(self, attack: int, correct: Tensor, *, survivors_only: bool) -> Tensor:
        """Rows that the attack runs on: the correct ones, or of these the survivors of all attacks before it."""
        survivors = correct & (self.outcomes[:attack] != BROKEN).all(0) if survivors_only else correct
        return survivors.nonzero().squeeze(1)

    def standing(self, correct: Tensor, rows: Tensor) -> int:
        """How many of these rows are correct and were broken by no attack so far."""
        return int((correct[rows] & (self.outcomes[:, rows] != BROKEN).all(0)).sum())

    def accuracies(self, correct: Tensor, names: list[str], *, survivors_only: bool) -> dict[str, float]:
        """For each attack the fraction correct after it: after all before it too, if it ran on survivors only."""
        found = {}
        for position, name in enumerate(names):
            counted = self.outcomes[: position + 1] if survivors_only else self.outcomes[position : position + 1]
            found[name] = (correct & (counted != BROKEN).all(0)).double().mean().item()
        return found

    def record(self, attack: int, rows: Tensor, x_adv: Tensor, predictions: Tensor, y: Tensor) -> None:
        """Enter the result of one batch. The outcomes come last and at once: an interrupt leaves the batch in or out."""
        broken = predictions != y
        first = broken & (self.outcomes[:, rows] != BROKEN).all(0)
        self.adversarial[rows[first]] = x_adv[first]
        self.predictions[rows[first]] = predictions[first]
        self.outcomes[attack, rows] = torch.where(broken, BROKEN, WITHSTOOD).to(torch.uint8)

    def forget(self, rows: Tensor, x: Tensor, predictions: Tensor) -> None:
        """Make broken rows survivors again, so that the attacks that broke them run on them once more."""
        outcomes = self.outcomes[:, rows]
        self.outcomes[:, rows] = outcomes.masked_fill(outcomes == BROKEN, UNKNOWN)
        self.adversarial[rows] = x[rows].cpu()
        self.predictions[rows] = predictions[rows]
