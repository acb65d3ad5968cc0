"""The work of an evaluation, batch by batch: clean predictions, attacks on those still standing, verification on resume."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import explained_memory, labels, require
from metarobust._progress import Advance
from metarobust._randomness import generator_for
from metarobust.evaluation._inputs import checked_logits
from metarobust.evaluation._resume import Checkpoint
from metarobust.evaluation._state import UNKNOWN, EvaluationState
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model

PASS_ROWS = 128
"""Rows of a forward pass without a graph."""
LOGITS_KEPT = 1000
"""Logits of this many clean examples tell a checkpoint's model from another."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """One model on one data set: ``x`` anywhere, ``y`` on the CPU, each batch moved to ``device`` when its turn comes."""

    model: Model
    x: Tensor
    y: Tensor
    threat_model: ThreatModel
    device: torch.device
    dtype: torch.dtype
    batch_size: int

    @torch.no_grad()
    def clean(self) -> tuple[Tensor, Tensor, int]:
        """Predicted classes ``[n]``, the first :data:`LOGITS_KEPT` rows of logits, the number of classes; on the CPU."""
        predictions, kept, classes = [], [], 0
        at_once = min(self.batch_size, PASS_ROWS)
        for rows in torch.arange(len(self.x)).split(at_once):
            with explained_memory("batch_size", at_once, "pass a smaller one"):
                logits = checked_logits(self.model(self.x[rows].to(self.device)), len(rows))
            classes = logits.shape[1]
            labels(self.y[rows], examples=len(rows), classes=classes)
            predictions.append(logits.argmax(1).cpu())
            if int(rows[0]) < LOGITS_KEPT:
                kept.append(logits.cpu())
        return torch.cat(predictions), torch.cat(kept)[:LOGITS_KEPT], classes

    def attack(
        self,
        state: EvaluationState,
        attacks: Mapping[str, Attack],
        correct: Tensor,
        advance: Advance,
        *,
        survivors_only: bool,
        seed: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Run every attack on every batch that the state does not know yet; an interrupt leaves the checkpoint written."""
        remedy = "pass a smaller one"
        if checkpoint is not None:
            remedy += f", with another checkpoint; {checkpoint.path} keeps what was finished with this one"
            checkpoint.save(state)  # a file that cannot be written fails now and not after the first hour
        try:
            for position, (name, attack) in enumerate(attacks.items()):
                targets = state.targets(position, correct, survivors_only=survivors_only)
                standing = state.standing(correct, torch.arange(len(self.x)))
                advance(len(self.x) - len(targets), name)
                for batch, rows in enumerate(targets.split(self.batch_size)):
                    unknown = rows[state.outcomes[position, rows] == UNKNOWN]
                    if len(unknown):
                        begin = time.perf_counter()
                        with explained_memory("batch_size", self.batch_size, remedy):
                            x_adv, predictions = self._attacked(attack, unknown, generator_for(seed, position, batch))
                        standing -= state.standing(correct, unknown)
                        state.record(position, unknown, x_adv, predictions, self.y[unknown])
                        standing += state.standing(correct, unknown)
                        state.seconds[name] += time.perf_counter() - begin
                        if checkpoint is not None:
                            checkpoint.save_sometimes(state)
                    advance(len(rows), f"{name}: {standing / len(self.x):.3f} robust")
        finally:
            if checkpoint is not None:
                checkpoint.save(state)

    def _attacked(self, attack: Attack, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The attack's examples and the classes predicted for them, on the CPU; raises unless all lie in ball and box."""
        x, y = self.x[rows].to(self.device), self.y[rows].to(self.device)
        with torch.no_grad():  # attacks take the gradients they need; those that can keep their graph need not
            x_adv = attack(self.model, x, y, generator=generator)
        require(
            isinstance(x_adv, Tensor) and x_adv.shape == x.shape and x_adv.dtype == x.dtype,
            "attacks",
            f"such that every result is a tensor like x, {list(x.shape)} {x.dtype}",
            f"{list(x_adv.shape)} {x_adv.dtype}" if isinstance(x_adv, Tensor) else type(x_adv).__name__,
        )
        outside = int((~self.threat_model.contains(x_adv, x)).sum())
        require(
            outside == 0,
            "attacks",
            f"such that every result lies inside {self.threat_model!r}",
            f"{outside} examples outside from {attack!r}",
            "give the attack the same threat model",
        )
        return x_adv.detach().cpu(), self._predicted(x_adv)[0]

    @torch.no_grad()
    def _predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes and logits on the CPU. A row with NaN logits predicts no class at all: -1, which is never right."""
        logits = torch.cat([self.model(part).cpu() for part in x.split(PASS_ROWS)])
        return logits.argmax(1).where(~logits.isnan().any(1), -1), logits

    def resume(self, state: EvaluationState, checkpoint: Checkpoint, clean_predictions: Tensor) -> tuple[int, int]:
        """Read the checkpoint into the state and verify every example in it: ball, box, and that its prediction is wrong.

        Rows that fail become survivors again. Returns how many failed, and of how many.
        """
        rows = checkpoint.load(state)
        failed = [part[~self._verified(state, part)] for part in rows.split(self.batch_size)]
        lost = torch.cat(failed) if failed else rows
        state.forget(lost, self.x, clean_predictions)
        return len(lost), len(rows)

    def _verified(self, state: EvaluationState, rows: Tensor) -> Tensor:
        x_adv = state.adversarial[rows].to(self.device)
        y = self.y[rows]
        predictions, logits = self._predicted(x_adv)
        # Attacks that stop at the first success end a hair beyond the boundary, and the rounding of a matrix product depends on
        # the batch around a row: within rounding of wrong counts as wrong, as it was when it was found.
        lead = logits.gather(1, y[:, None]).squeeze(1) - logits.scatter(1, y[:, None], float("-inf")).amax(1)
        wrong = (predictions != y) | (lead <= self.rounding * logits.abs().amax(1))
        return wrong & self.threat_model.contains(x_adv, self.x[rows].to(self.device)).cpu()

    @property
    def rounding(self) -> float:
        """How far logits of the same model may differ between batch sizes, threads and devices, relative to the largest."""
        if self.dtype in (torch.float16, torch.bfloat16):
            return 4 * torch.finfo(self.dtype).eps
        return 2e-3 if self.device.type == "cuda" else 1e-5  # CUDA convolutions may use TF32, with 10 bits of mantissa


def per_class(right: Tensor, y: Tensor, classes: int) -> tuple[float, ...]:
    """Accuracy of each class; NaN for a class without examples."""
    count = torch.bincount(y, minlength=classes).double()
    return tuple((torch.bincount(y, weights=right.double(), minlength=classes) / count).tolist())
