"""The claims of the five papers, in our words, each with the rule of its verdict; where each paper is treated at length."""

from typing import NamedTuple

from benchmarks.evidence import _of_attacks_and_bounds as attacks_and_bounds
from benchmarks.evidence import _of_optimizers as optimizers
from benchmarks.evidence import _of_training as training
from benchmarks.evidence import _of_weights as weights
from benchmarks.evidence._findings import Claim


class Paper(NamedTuple):
    """A paper, what differs here from its method, the page with the rest, and its claims."""

    title: str
    page: str
    deviations: tuple[str, ...]
    claims: tuple[Claim, ...]


PAPERS = (
    Paper(
        "BETA: adversarial training as a non-zero-sum game (Robey et al., 2024)",
        "papers/beta.md",
        (
            "The best point of all steps counts, not the last one; the step size of RMSprop is set by the distance to travel.",
            "The evaluation's attack alternates BETA with random search, which is this library's own.",
            "Training ran on small networks, 10,000 MNIST images and a subset of CIFAR-10, 20 epochs.",
        ),
        (
            Claim(
                name="BETA finds what ascent on cross-entropy misses",
                says="An attack on the margin of each wrong class needs no surrogate, and is no weaker than attacks on a surrogate.",
                rule="at equal numbers of backward passes BETA is never weaker than a form of PGD",
                measurement="attacks, equal passes",
                measured=attacks_and_bounds.at_equal_passes,
            ),
            Claim(
                name="BETA is on a par with AutoAttack",
                says="The attack matches, and sometimes beats, the strongest ensemble of attacks.",
                rule="the standard protocol, of which BETA is a part, leaves no more images than AutoAttack on each network",
                measurement="attacks, standing",
                measured=attacks_and_bounds.beside_autoattack,
            ),
            Claim(
                name="BETA training is as robust as PGD training",
                says="Training on the attack's point is as robust as adversarial training.",
                rule="within two points of PGD training on each data set",
                measurement="objectives",
                measured=training.beta_robustness,
            ),
            Claim(
                name="BETA training does not overfit robustly",
                says="No robustness is lost between the best epoch and the last.",
                rule="less is lost than by PGD training in every pair of runs; not shown if in half of them or fewer",
                measurement="objectives",
                measured=training.overfitting,
            ),
        ),
    ),
    Paper(
        "Lower bounds on the risk of any classifier (Garcia Trillos et al., 2024)",
        "papers/risk_bounds.md",
        (
            "Pairs are solved by a maximum flow, larger sets are added only where they cut, and every value comes with two witnesses.",
            "Sinkhorn's rounding is corrected. Closed balls throughout. No table of the paper is quoted.",
        ),
        (
            Claim(
                name="Small sets of classes suffice",
                says="Leaving out all sets of more than two or three points of different classes costs almost nothing.",
                rule="triples are within 0.001 of the exact value at every radius tried",
                measurement="bounds",
                measured=attacks_and_bounds.low_orders,
            ),
            Claim(
                name="Entropic iterations come close",
                says="Sinkhorn iterations with rounding bound the risk from below, cheaply.",
                rule="never above the exact value, and within 0.01 of it",
                measurement="bounds",
                measured=attacks_and_bounds.sinkhorn,
            ),
        ),
    ),
    Paper(
        "CAAT: adversaries and anti-adversaries (Zhou, Yang and Wu, 2023)",
        "papers/caat.md",
        (
            "Epsilon is in input units: the published code normalises its inputs and not epsilon.",
            "The hypergradient is exact; weights are soft by default; a variant lets anti-adversaries move four times as far.",
            "Two-layer MLPs on digits and Fashion-MNIST; the settings were chosen on validation images of digits.",
        ),
        (
            Claim(
                name="CAAT is fairer to classes",
                says="Choosing a direction and a bound for each example makes the errors of classes more alike.",
                rule="at the published radius the worst class gains 5 points over TRADES, at a loss of at most 1 on the average, in every scenario with every bound; in part if in half of these cases",
                measurement="fairness",
                measured=weights.fairness,
            ),
            Claim(
                name="CAAT helps under imbalance and noise",
                says="The trade-off improves in particular with unbalanced classes and wrong labels.",
                rule="at the published radius robust error is below that of TRADES in every scenario with every bound; in part if in half of these cases",
                measurement="fairness",
                measured=weights.trade_off,
            ),
        ),
    ),
    Paper(
        "ARMOR: optimal-transport-regularised divergences (Birrell and Ebrahimi, 2023, 2025)",
        "papers/armor.md",
        (
            "The dual is solved for every batch; published multipliers move by gradient steps beside the parameters.",
            "Small networks, 20 epochs, KL with radius 0.1, nothing tuned per objective.",
        ),
        (
            Claim(
                name="ARMOR adds robustness to UDR, TRADES and MART",
                says="The worst case under reweighting makes established objectives more robust (about two points on CIFAR under AutoAttack).",
                rule="a gain on the mean for every objective; the opposite if a loss for every one",
                measurement="objectives",
                measured=training.armor,
            ),
            Claim(
                name="ARMOR protects binary features",
                says="On malware, whose features can only be added, it is far more robust than training on the published attack.",
                rule="more robust than training on rFGSM",
                measurement="binary features",
                measured=training.binary,
            ),
        ),
    ),
    Paper(
        "Learning to learn from mistakes (Serban, Poll and Visser, 2020)",
        "transfer.md",
        (
            "The optimizer reads a second stream, from a tangent pass beside the clean one; the paper's reads gradients alone.",
            "It has 94 numbers that can be read, not an LSTM. Freezing, saving and transfer are designed here: the released code has none.",
            "The recipe was changed after test figures of earlier versions had been seen ([transfer.md](transfer.md)).",
        ),
        (
            Claim(
                name="Robustness is carried to new models and data",
                says="An optimizer that was trained on mistakes trains new models robustly, across architectures and data sets, in low-data regimes.",
                rule="half of the gap to PGD training is closed on every target; in part if on half of them",
                measurement="transfer",
                measured=optimizers.transfers,
            ),
            Claim(
                name="No new adversarial examples are needed",
                says="Knowledge of adversarial examples is reused, and saves the cost of making them.",
                rule="above FGSM and above free training with as many passes, on the mean over targets; in part if no more than 0.02 below one of them",
                measurement="transfer",
                measured=optimizers.without_attacks,
            ),
            Claim(
                name="It is learned from adversarial examples",
                says="Meta-training on adversarial examples is what makes the optimizer robust.",
                rule="at least 0.01 more robust accuracy on the mean than the same optimizer learned on clean examples",
                measurement="transfer",
                measured=optimizers.robust_meta_loss,
            ),
        ),
    ),
)
