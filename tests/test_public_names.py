"""The public surface: a snapshot of every module's names, each documented, each module importable on its own."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PUBLIC_NAMES = {
    "metarobust": ["__version__"],
    "metarobust.attacks": [
        "APGD",
        "BETA",
        "FGSM",
        "PGD",
        "Adapted",
        "Alternating",
        "CallCounter",
        "RandomRoundingFGSM",
        "Square",
        "TransportAscent",
        "TransportSearch",
        "Unrolled",
        "WorstCase",
        "count_calls",
    ],
    "metarobust.bounds": [
        "OptimalAttack",
        "RiskBound",
        "RobustClassifier",
        "adversarial_risk_bound",
        "plot_curve",
        "risk_curve",
        "sinkhorn_risk",
    ],
    "metarobust.command_line": ["main"],
    "metarobust.data": [
        "LabelledImages",
        "LowDataTasks",
        "NoisyLabels",
        "Pools",
        "digits_pools",
        "import_learn2learn",
        "load",
        "load_digits",
        "load_npz",
        "long_tail",
        "minibatch",
        "noise_matrix",
        "split",
        "split_meta",
        "with_label_noise",
    ],
    "metarobust.divergences": ["KL", "Alpha", "Divergence", "Renyi", "Tilt"],
    "metarobust.dro": ["WorstCase", "gather_examples", "worst_case_expectation"],
    "metarobust.evaluation": [
        "ClassErrors",
        "ClassSummary",
        "DistanceToBound",
        "Doubt",
        "ErrorSummary",
        "RobustnessReport",
        "evaluate",
        "protocol_attacks",
    ],
    "metarobust.losses": [
        "LOSSES",
        "TARGETED_LOSSES",
        "Loss",
        "TargetedLoss",
        "boosted_cross_entropy",
        "cross_entropy",
        "dlr",
        "kl_divergence",
        "loss_function",
        "margin",
        "targeted_cross_entropy",
        "targeted_dlr",
        "targeted_loss_function",
        "targeted_margin",
    ],
    "metarobust.meta_optimizers": [
        "GRADIENT_SOURCES",
        "ROLES",
        "TRAINED",
        "AttackTask",
        "Calibration",
        "ClassificationTask",
        "FactorGradients",
        "FactorRecorder",
        "Generation",
        "InterpretableOptimizer",
        "InterpretableState",
        "LSTMOptimizer",
        "LSTMState",
        "LearnedOptimizer",
        "MetaTraining",
        "MetaTrainingSettings",
        "TaskDistribution",
        "calibrate",
        "combine_factors",
        "factor_gradients",
        "gradients_only",
        "load",
        "meta_search",
        "meta_train",
        "record_factors",
        "save",
        "train_optimizees",
    ],
    "metarobust.meta_weighters": [
        "BRANCHES",
        "CAAT",
        "CHARACTERISTICS",
        "FRL",
        "HYPERGRADIENTS",
        "ROUTINGS",
        "PerturbationBound",
        "ClassStatistics",
        "GradientBound",
        "HeldOutErrors",
        "Hypergradient",
        "MetaStep",
        "MetaWeightNet",
        "ReMargin",
        "VirtualUpdate",
        "Weighting",
        "WeightingNetwork",
        "held_out_errors",
        "hypergradient",
        "meta_weighted_step",
        "signed_pgd",
        "training_characteristics",
        "virtual_update",
    ],
    "metarobust.models": ["Normalize", "cnn", "mlp", "residual_network", "stack"],
    "metarobust.objectives": [
        "ARMOR",
        "MART",
        "TRADES",
        "UDR",
        "ARMORLoss",
        "AdversarialTraining",
        "BETATraining",
        "BallLoss",
        "ClassWeighted",
        "LogitAdjusted",
        "PairLoss",
        "SmoothedBETATraining",
    ],
    "metarobust.threat_models": ["NORMS", "Norm", "ThreatModel"],
    "metarobust.training": [
        "EpochRecord",
        "Schedule",
        "TrainingResult",
        "cosine",
        "fit",
        "initialise_from_environment",
        "piecewise",
    ],
    "metarobust.transport_costs": ["HardBall", "Insertion", "NormPower", "SoftHinge", "TransportCost"],
    "metarobust.types": ["Attack", "Batch", "Model", "Parameters", "RobustLoss", "Streams", "Task"],
}

every_module = pytest.mark.parametrize("module", PUBLIC_NAMES)

IMPORT_EACH_ALONE = """
import sys
import torch
for module in sys.argv[1:]:
    for name in [n for n in sys.modules if n.split(".")[0] == "metarobust"]:
        del sys.modules[name]
    try:
        __import__(module)
    except Exception as error:
        sys.exit(f"{module} cannot be imported alone: {type(error).__name__}: {error}")
"""


def test_the_snapshot_names_every_public_module():
    package = ROOT / "metarobust"
    found = {"metarobust"}
    for path in [*package.glob("[!_]*.py"), *package.glob("[!_]*/__init__.py")]:
        found.add("metarobust." + (path.parent.name if path.name == "__init__.py" else path.stem))
    assert found == set(PUBLIC_NAMES)


@every_module
def test_public_names_are_those_of_the_snapshot(module):
    imported = importlib.import_module(module)
    assert hasattr(imported, "__all__"), f"{module} has no __all__: say which of its names are public."
    assert sorted(imported.__all__) == sorted(PUBLIC_NAMES[module])
    assert len(set(imported.__all__)) == len(imported.__all__)


@every_module
def test_public_classes_and_functions_have_docstrings(module):
    imported = importlib.import_module(module)
    assert imported.__doc__, f"{module} has no docstring."
    for name in PUBLIC_NAMES[module]:
        thing = getattr(imported, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            generated = f"{name}("  # dataclasses and named tuples without a docstring get their signature as one
            text = thing.__doc__ or generated
            assert not text.startswith(generated), f"{module}.{name} has no docstring."


def test_every_module_can_be_imported_alone():
    """In one fresh interpreter, which forgets the library before each import; torch stays, its import is slow."""
    command = [sys.executable, "-W", "error", "-c", IMPORT_EACH_ALONE, *PUBLIC_NAMES]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_importing_the_top_package_loads_nothing_heavy():
    program = "import sys, metarobust; print(*sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (outcome.returncode, outcome.stdout.strip()) == (0, ""), outcome.stderr + outcome.stdout
