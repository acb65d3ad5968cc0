"""Bad inputs of metarobust.meta_optimizers and metarobust.meta_weighters."""

import tempfile
from functools import cache
from pathlib import Path

import torch
import torchopt
from bad_inputs import (
    ATTACK,
    BALL,
    BYTES,
    LOGITS,
    PIXELS,
    WITH_NAN,
    BadInput,
    X,
    Y,
    generator,
    labelled,
    network,
)
from torch import nn

from metarobust.meta_optimizers import (
    AttackTask,
    ClassificationTask,
    InterpretableOptimizer,
    LearnedOptimizer,
    LSTMOptimizer,
    MetaTrainingSettings,
    TaskDistribution,
    calibrate,
    combine_factors,
    factor_gradients,
    load,
    meta_search,
    meta_train,
    record_factors,
    save,
    train_optimizees,
)
from metarobust.meta_weighters import (
    CAAT,
    FRL,
    ClassStatistics,
    GradientBound,
    MetaWeightNet,
    ReMargin,
    WeightingNetwork,
    held_out_errors,
    hypergradient,
    meta_weighted_step,
    signed_pgd,
    training_characteristics,
    virtual_update,
)
from metarobust.models import mlp

STATISTICS = ClassStatistics([2, 2, 2])
WEIGHTS = torch.ones(6, 1)


def small() -> nn.Module:
    return mlp([64, 4, 3])


def task(**changed: object) -> ClassificationTask:
    settings = {"build": small, "dataset": labelled(), "subsets": torch.arange(20).reshape(2, 10), "threat_model": BALL}
    return ClassificationTask(**settings | changed)


def attack_task(**changed: object) -> AttackTask:
    return AttackTask(**{"model": network(), "x": X, "y": Y, "threat_model": BALL, **changed})


def tasks(**changed: object) -> TaskDistribution:
    settings = {"architectures": {"small": small}, "datasets": {"some": labelled()}, "examples": (5, 10), "copies": 2}
    return TaskDistribution(**settings | changed)


@cache
def one_stream() -> LSTMOptimizer:
    return LSTMOptimizer(gradient_source="gradient", hidden_size=2)


def meta_trained(optimizer: object = None, sample: object = None, **changed: object) -> object:
    optimizer = LSTMOptimizer(hidden_size=2) if optimizer is None else optimizer
    sample = (lambda generator: task()) if sample is None else sample
    return meta_train(optimizer, sample, **{"iterations": 1, "total_steps": 2, "unroll": 1, "slots": 1, **changed})


def searched(optimizer: object = None, sample: object = None, **changed: object) -> object:
    optimizer = InterpretableOptimizer() if optimizer is None else optimizer
    sample = (lambda generator: [task()]) if sample is None else sample
    small_run = {"generations": 1, "population": 3, "elite": 1, "total_steps": (1, 2)}
    return meta_search(optimizer, sample, **small_run | changed)


def learned(parameters: object = None, rule: object = None, **changed: object) -> LearnedOptimizer:
    parameters = network().parameters() if parameters is None else parameters
    return LearnedOptimizer(parameters, one_stream() if rule is None else rule, **{"total_steps": 3, **changed})


def stepped_without_stream() -> None:
    model = network()
    optimizer = learned(model.parameters(), LSTMOptimizer(hidden_size=2))
    model(X).sum().backward()
    optimizer.step()


def factors(model: object = None, loss: object = None, **changed: object) -> object:
    model = network() if model is None else model
    loss = (lambda: nn.functional.cross_entropy(model(X), Y)) if loss is None else loss
    return factor_gradients(model, loss, **{"threat_model": BALL, **changed})


def recorded(model: object = None, **changed: object) -> object:
    with record_factors(network() if model is None else model, **{"threat_model": BALL, **changed}) as recorder:
        return recorder


def text_file() -> Path:
    path = Path(tempfile.mkdtemp()) / "rule.safetensors"
    path.write_text("no tensors")
    return path


def caat(**changed: object) -> CAAT:
    model = network()
    settings = {
        "threat_model": BALL,
        "meta_data": (X, Y),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "class_counts": [2, 2, 2],
        "steps": 1,
    }
    return CAAT(**settings | changed)


def net(**changed: object) -> MetaWeightNet:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    settings = {"threat_model": BALL, "meta_data": (X, Y), "optimizer": optimizer, "class_counts": [2, 2, 2]}
    return MetaWeightNet(**settings | changed)


def frl(**changed: object) -> FRL:
    return FRL(**{"threat_model": BALL, "held_out": (X, Y), "steps": 1, **changed})


def derivative(**changed: object) -> object:
    parameters = {"w": torch.tensor(0.5)}
    settings = {
        "branch_losses": lambda p: (p["w"] * X.sum(1))[:, None],
        "meta_loss": lambda p: p["w"] ** 2,
        "parameters": parameters,
        "weights": WEIGHTS,
        "update": virtual_update(torch.optim.SGD([parameters["w"]], lr=0.1), (parameters["w"],)),
    }
    return hypergradient(**settings | changed)


def meta_step(**changed: object) -> object:
    parameters = {"w": torch.tensor(0.5)}
    network = WeightingNetwork(branches=("adversary",), inputs=1)
    settings = {
        "network": network,
        "network_optimizer": torch.optim.Adam(network.parameters(), lr=1e-3),
        "characteristics": X[:, :1],
        "branch_losses": lambda p: (p["w"] * X.sum(1))[:, None],
        "meta_loss": lambda p: p["w"] ** 2,
        "parameters": parameters,
        "update": virtual_update(torch.optim.SGD([parameters["w"]], lr=0.1), (parameters["w"],)),
    }
    return meta_weighted_step(**settings | changed)


def signed(signs: object = None, model: object = None, **changed: object) -> object:
    signs = torch.ones(6) if signs is None else signs
    settings = {"x": X, "y": Y, "threat_model": BALL, "steps": 1, **changed}
    return signed_pgd(network() if model is None else model, signs=signs, **settings)


def errors(**changed: object) -> object:
    settings = {"x": X, "y": Y, "classes": 3, "attack": ATTACK, "generator": generator(), **changed}
    return held_out_errors(network(), **settings)


ROWS = [
    # Rules
    BadInput(
        "meta_optimizers.LSTMOptimizer",
        "an unknown source",
        lambda: LSTMOptimizer(gradient_source="both"),
        ValueError,
        (
            "gradient_source must be one of 'gradient', 'gradient+perturbed_factors', "
            "'gradient+adversarial_estimate', 'gradient+adversarial_tangent', got 'both'"
        ),
    ),
    BadInput(
        "meta_optimizers.LSTMOptimizer",
        "no hidden unit",
        lambda: LSTMOptimizer(hidden_size=0),
        ValueError,
        "hidden_size must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_optimizers.LSTMOptimizer",
        "an unknown base",
        lambda: LSTMOptimizer(base="rmsprop"),
        ValueError,
        "base must be one of 'adam', 'none', got 'rmsprop'",
    ),
    BadInput(
        "meta_optimizers.LSTMOptimizer",
        "a learning rate of 0",
        lambda: LSTMOptimizer(initial_learning_rate=0.0),
        ValueError,
        "initial_learning_rate must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "meta_optimizers.InterpretableOptimizer",
        "an unknown source",
        lambda: InterpretableOptimizer(gradient_source="factors"),
        ValueError,
        (
            "gradient_source must be one of 'gradient', 'gradient+perturbed_factors', "
            "'gradient+adversarial_estimate', 'gradient+adversarial_tangent', got 'factors'"
        ),
    ),
    BadInput(
        "meta_optimizers.InterpretableOptimizer",
        "a NaN learning rate",
        lambda: InterpretableOptimizer(initial_learning_rate=float("nan")),
        ValueError,
        "initial_learning_rate must be a finite number > 0, got nan",
    ),
    BadInput(
        "meta_optimizers.InterpretableOptimizer",
        "coefficients of an unknown role",
        lambda: InterpretableOptimizer().coefficients(role="conv", fan_in=64, time=0.5),
        ValueError,
        (
            "role must be one of 'first dense', 'inner dense', 'last dense', 'first convolution', 'inner "
            "convolution', 'last convolution', 'bias', 'normalisation', got 'conv'"
        ),
    ),
    BadInput(
        "meta_optimizers.InterpretableOptimizer",
        "a knob that is none",
        lambda: InterpretableOptimizer().turn({"lr": 0.1}),
        ValueError,
        (
            "by must be one of 'learning rate', 'learning rate, slope', 'learning rate, fall', 'learning rate, "
            "fan-in', 'weight decay', 'l1, first', 'factor, first', 'factor, first, slope', 'factor, inner', "
            "'factor, inner, slope', 'factor, last', 'factor, last, slope', 'factor, biases and normalisations', "
            "'factor, biases and normalisations, slope', 'factor, networks with normalisation', got 'lr'"
        ),
    ),
    BadInput(
        "meta_optimizers.LearnedOptimizer",
        "steps of 0",
        lambda: learned(total_steps=0),
        ValueError,
        "total_steps must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_optimizers.LearnedOptimizer",
        "a negative lr",
        lambda: learned(lr=-1.0),
        ValueError,
        "lr must be a finite number >= 0, got -1.0",
    ),
    BadInput(
        "meta_optimizers.LearnedOptimizer",
        "no parameters",
        lambda: learned([]),
        ValueError,
        "params must be at least one parameter, got none; write model.parameters()",
    ),
    BadInput(
        "meta_optimizers.LearnedOptimizer",
        "a model in place of its parameters",
        lambda: learned(network()),
        TypeError,
        "params must be parameters, got Sequential; write model.parameters()",
    ),
    BadInput(
        "meta_optimizers.LearnedOptimizer",
        "a path as meta-optimizer",
        lambda: learned(rule="robust-small-v1"),
        TypeError,
        (
            "meta_optimizer must be an LSTMOptimizer or an InterpretableOptimizer, got 'robust-small-v1'; write "
            "load('robust-small-v1')"
        ),
    ),
    BadInput(
        "meta_optimizers.LearnedOptimizer",
        "epsilon in place of a threat model",
        lambda: learned(threat_model=0.1),
        TypeError,
        "threat_model must be a ThreatModel or None, got 0.1",
    ),
    BadInput(
        "meta_optimizers.LearnedOptimizer",
        "a second stream that was not recorded",
        stepped_without_stream,
        ValueError,
        (
            "parameters must be with a second gradient stream (.second_grad), which this "
            "meta-optimizer was trained on, got gradients that were computed without it; write `with "
            "optimizer.record_factors(model, threat_model=...) as recorder: recorder.backward(loss)`"
        ),
    ),
    BadInput(
        "meta_optimizers.save",
        "a model",
        lambda: save(network(), Path(tempfile.gettempdir()) / "rule.safetensors"),
        TypeError,
        (
            "meta_optimizer must be an LSTMOptimizer or an InterpretableOptimizer, got Sequential; write "
            "InterpretableOptimizer() or load(path)"
        ),
    ),
    BadInput(
        "meta_optimizers.save",
        "a folder that is not there",
        lambda: save(one_stream(), Path(tempfile.gettempdir()) / "nowhere" / "rule.safetensors"),
        FileNotFoundError,
        "no folder at .../nowhere to write rule.safetensors to; make it first",
    ),
    BadInput(
        "meta_optimizers.load",
        "an unknown name",
        lambda: load("robust-large-v1"),
        FileNotFoundError,
        ("no meta-optimizer at robust-large-v1; write the path of a file, or a name of a trained one: robust-small-v1"),
    ),
    BadInput(
        "meta_optimizers.load",
        "a text file",
        lambda: load(text_file()),
        ValueError,
        (
            ".../rule.safetensors must be a safetensors file, got one that cannot be read, damaged or "
            "of another kind (Error while deserializing header: header too large); save it again"
        ),
    ),
    BadInput(
        "meta_optimizers.combine_factors",
        "an infinite offset",
        lambda: combine_factors(first=float("inf"), others=0.1),
        ValueError,
        "first must be a finite number, got inf",
    ),
    BadInput(
        "meta_optimizers.combine_factors",
        "an offset as text",
        lambda: combine_factors(first="1", others=0.1),
        TypeError,
        "first must be a finite number, got '1'",
    ),
    # Streams
    BadInput(
        "meta_optimizers.factor_gradients",
        "a function as model",
        lambda: factor_gradients(lambda x: x, lambda: X.sum()),
        TypeError,
        "model must be an nn.Module, whose layers are watched, got function",
    ),
    BadInput(
        "meta_optimizers.factor_gradients",
        "epsilon in place of a threat model",
        lambda: factors(threat_model=0.1),
        TypeError,
        "threat_model must be a ThreatModel or None, got 0.1",
    ),
    BadInput(
        "meta_optimizers.factor_gradients",
        "an unknown source",
        lambda: factors(gradient_source="gradient"),
        ValueError,
        (
            "gradient_source must be one of 'gradient+perturbed_factors', 'gradient+adversarial_estimate', "
            "'gradient+adversarial_tangent', got 'gradient'"
        ),
    ),
    BadInput(
        "meta_optimizers.factor_gradients",
        "a loss per example",
        lambda: factor_gradients(model := network(), lambda: model(X).sum(1), threat_model=BALL),
        ValueError,
        "loss must be a scalar, got shape [6]; write loss.mean()",
    ),
    BadInput(
        "meta_optimizers.factor_gradients",
        "a loss without a graph",
        lambda: factors(loss=lambda: torch.tensor(1.0)),
        ValueError,
        (
            "loss must be computed inside the recording block by a model with Linear or Conv layers, got no "
            "recorded layer call; call the model inside the block, under enabled gradients"
        ),
    ),
    BadInput(
        "meta_optimizers.factor_gradients",
        "a loss as a tensor",
        lambda: factors(loss=torch.tensor(1.0)),
        TypeError,
        ("loss_closure must be a function that computes the loss, got Tensor; write lambda: F.cross_entropy(model(x), y)"),
    ),
    BadInput(
        "meta_optimizers.record_factors",
        "a function as model",
        lambda: recorded(lambda x: x),
        TypeError,
        "model must be an nn.Module, whose layers are watched, got function",
    ),
    BadInput(
        "meta_optimizers.LSTMOptimizer",
        "recording for a rule of one stream",
        lambda: LSTMOptimizer(gradient_source="gradient").record_factors(network(), threat_model=BALL),
        ValueError,
        (
            "gradient_source must be one with a second stream, which is what is recorded, got 'gradient'; write loss.backward(), "
            "which is all that this rule needs"
        ),
    ),
    BadInput(
        "meta_optimizers.record_factors",
        "an unknown source",
        lambda: recorded(gradient_source="tangent"),
        ValueError,
        (
            "gradient_source must be one of 'gradient+perturbed_factors', 'gradient+adversarial_estimate', "
            "'gradient+adversarial_tangent', got 'tangent'"
        ),
    ),
    BadInput(
        "meta_optimizers.FactorRecorder",
        "gradients of a loss per example",
        lambda: recorded().gradients(X.sum(1)),
        ValueError,
        "loss must be a scalar, got shape [6]; write loss.mean()",
    ),
    # Tasks
    BadInput(
        "meta_optimizers.ClassificationTask",
        "epsilon in place of a threat model",
        lambda: task(threat_model=0.1),
        TypeError,
        "threat_model must be a ThreatModel or None, got 0.1",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "subsets as a list",
        lambda: task(subsets=[[0, 1], [2, 3]]),
        TypeError,
        "subsets must be an int64 tensor of shape [optimizees, examples], got list",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "one subset",
        lambda: task(subsets=torch.arange(10)),
        ValueError,
        "subsets must be of shape [optimizees, examples], got [10]",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "rows that are not there",
        lambda: task(subsets=torch.arange(20).reshape(2, 10) + 20),
        ValueError,
        "subsets must be indices in [0, 30), rows of the data set, got indices from 20 to 39",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "all rows",
        lambda: task(subsets=torch.arange(30)[None]),
        ValueError,
        "subsets must be smaller than the data set (=30 examples), got 30",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "a row twice",
        lambda: task(subsets=torch.zeros(2, 5, dtype=torch.int64)),
        ValueError,
        "subsets must be such that a copy's examples are distinct, got repeated indices",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "a model in place of a builder",
        lambda: task(build=small()),
        TypeError,
        "build must be a function that makes a fresh model, got Sequential; write lambda: mlp([64, 32, 10])",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "a pair of tensors as data",
        lambda: task(dataset=(X, Y)),
        TypeError,
        "dataset must be a LabelledImages, got tuple; write LabelledImages(images, labels, num_classes)",
    ),
    BadInput(
        "meta_optimizers.ClassificationTask",
        "no copy",
        lambda: task(subsets=torch.zeros(0, 5, dtype=torch.int64)),
        ValueError,
        "subsets must be of at least one copy and one example, got [0, 5]",
    ),
    BadInput(
        "meta_optimizers.AttackTask",
        "x in 0..255",
        lambda: attack_task(x=PIXELS),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "meta_optimizers.AttackTask",
        "y beyond the classes",
        lambda: attack_task(y=Y + 1),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "meta_optimizers.AttackTask",
        "no example",
        lambda: attack_task(x=X[:0], y=Y[:0]),
        ValueError,
        "x must be at least one example, got none",
    ),
    BadInput(
        "meta_optimizers.AttackTask",
        "an unknown direction",
        lambda: attack_task(direction="up"),
        ValueError,
        "direction must be one of 'adversary', 'anti_adversary', got 'up'",
    ),
    BadInput(
        "meta_optimizers.AttackTask",
        "an unknown loss",
        lambda: attack_task(loss="kl"),
        ValueError,
        "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'kl'",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "no architecture",
        lambda: tasks(architectures={}),
        ValueError,
        "architectures must be at least one architecture, got none",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "a list of architectures",
        lambda: tasks(architectures=[small]),
        TypeError,
        "architectures must be a mapping from names, got list; write architectures={'small': ...}",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "one epsilon",
        lambda: tasks(epsilon=0.1),
        TypeError,
        "epsilon must be a pair, got 0.1; write epsilon=(0.05, 0.15)",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "an empty range of epsilon",
        lambda: tasks(epsilon=(0.2, 0.1)),
        ValueError,
        "epsilon must be a pair (least, largest), got (0.2, 0.1)",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "a largest epsilon that is text",
        lambda: tasks(epsilon=(0.1, "0.2")),
        TypeError,
        "epsilon must be a finite number > 0, got '0.2'",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "up to 15.5 examples",
        lambda: tasks(examples=(12, 15.5)),
        TypeError,
        "examples must be an integer >= 1, got 15.5",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "a number of examples",
        lambda: tasks(examples=100),
        TypeError,
        "examples must be a pair, got 100; write examples=(100, 200)",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "an unknown norm",
        lambda: tasks(norm="Linf"),
        ValueError,
        "norm must be one of 'linf', 'l2', 'l1', got 'Linf'; write 'linf'",
    ),
    BadInput(
        "meta_optimizers.TaskDistribution",
        "epsilon of 8 to 16",
        lambda: tasks(epsilon=(8, 16)),
        ValueError,
        (
            "epsilon must be at most 1 (= upper - lower) in input units for l_inf, got 16; for 8-bit images in "
            "[0, 1] write 16 / 255"
        ),
    ),
    # Training
    BadInput(
        "meta_optimizers.MetaTrainingSettings",
        "more tasks than slots",
        lambda: MetaTrainingSettings(
            iterations=1,
            total_steps=2,
            unroll=1,
            slots=1,
            learning_rate=0.1,
            clip_norm=1.0,
            loss_cap=1.0,
            late_weight=0.0,
            meta_loss_every=1,
            seed=0,
            tasks_per_step=3,
        ),
        ValueError,
        "tasks_per_step must be at most slots (=1), got 3",
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "more elite than population",
        lambda: searched(population=3, elite=5),
        ValueError,
        "elite must be below population (=3), got 5",
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "no iteration",
        lambda: meta_trained(iterations=0),
        ValueError,
        "iterations must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "an unknown estimator",
        lambda: meta_trained(estimator="es"),
        ValueError,
        "estimator must be one of 'second_order', 'first_order', 'pes', got 'es'",
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "a learning rate of 0",
        lambda: meta_trained(learning_rate=0.0),
        ValueError,
        "learning_rate must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "a torch optimizer",
        lambda: meta_trained(torch.optim.SGD),
        TypeError,
        (
            "meta_optimizer must be an LSTMOptimizer or an InterpretableOptimizer, got type; write "
            "InterpretableOptimizer() or load(path)"
        ),
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "a task in place of a function",
        lambda: meta_trained(sample=task()),
        TypeError,
        (
            "sample_task must be a function that returns a task, got ClassificationTask; write a "
            "TaskDistribution, or lambda generator: ClassificationTask(...)"
        ),
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "a function that returns none",
        lambda: meta_trained(sample=lambda generator: None),
        TypeError,
        (
            "sample_task must be a function that returns a task, got NoneType; write a TaskDistribution, or "
            "lambda generator: ClassificationTask(...)"
        ),
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "tasks of another source",
        lambda: meta_trained(sample=lambda g: task(gradient_source="gradient+adversarial_estimate")),
        ValueError,
        (
            "sample_task must be tasks with gradient_source='gradient+perturbed_factors', like the rule, got "
            "'gradient+adversarial_estimate'; or give the rule gradient_source='gradient+adversarial_estimate'"
        ),
    ),
    BadInput(
        "meta_optimizers.meta_train",
        "a checkpoint in no folder",
        lambda: meta_trained(checkpoint=Path(tempfile.gettempdir()) / "nowhere" / "run.safetensors"),
        FileNotFoundError,
        "checkpoint must be a file in an existing folder, got .../nowhere/run.safetensors; make the folder .../nowhere first",
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "an LSTM",
        lambda: searched(LSTMOptimizer(hidden_size=2)),
        TypeError,
        "meta_optimizer must be an InterpretableOptimizer, got LSTMOptimizer",
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "an unknown knob",
        lambda: searched(knobs={"lr": 0.1}),
        ValueError,
        (
            "knobs must be one of 'learning rate', 'learning rate, slope', 'learning rate, fall', 'learning "
            "rate, fan-in', 'weight decay', 'l1, first', 'factor, first', 'factor, first, slope', 'factor, "
            "inner', 'factor, inner, slope', 'factor, last', 'factor, last, slope', 'factor, biases and "
            "normalisations', 'factor, biases and normalisations, slope', 'factor, networks with normalisation', "
            "got 'lr'"
        ),
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "an empty range of steps",
        lambda: searched(total_steps=(5, 2)),
        ValueError,
        "total_steps must be a pair (least, most), got (5, 2)",
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "any number of steps",
        lambda: searched(total_steps=(1, float("inf"))),
        TypeError,
        "total_steps must be an integer >= 1, got inf",
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "up to 3.5 steps",
        lambda: searched(total_steps=(1, 3.5)),
        TypeError,
        "total_steps must be an integer >= 1, got 3.5",
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "one number of steps",
        lambda: searched(total_steps=5),
        TypeError,
        "total_steps must be a pair, got 5; write total_steps=(150, 450)",
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "a function that returns one task",
        lambda: searched(sample=lambda generator: task()),
        TypeError,
        (
            "sample_tasks must be a function that returns a list of tasks, got ClassificationTask; write "
            "tasks.one_of_each of a TaskDistribution"
        ),
    ),
    BadInput(
        "meta_optimizers.meta_search",
        "a function that returns no task",
        lambda: searched(sample=lambda generator: []),
        ValueError,
        (
            "sample_tasks must be a function that returns a list of tasks, got an empty list; write "
            "tasks.one_of_each of a TaskDistribution"
        ),
    ),
    BadInput(
        "meta_optimizers.calibrate",
        "no task",
        lambda: calibrate(InterpretableOptimizer(), [], total_steps=1),
        ValueError,
        "tasks must be at least one task, got none",
    ),
    BadInput(
        "meta_optimizers.calibrate",
        "one stream",
        lambda: calibrate(one_stream(), [task()], total_steps=1),
        ValueError,
        "meta_optimizer must be one that reads two streams, got one that reads the gradient alone",
    ),
    BadInput(
        "meta_optimizers.calibrate",
        "no offset",
        lambda: calibrate(InterpretableOptimizer(), [task()], total_steps=1, first=[]),
        ValueError,
        "first must be at least one offset, got none",
    ),
    BadInput(
        "meta_optimizers.train_optimizees",
        "no step",
        lambda: train_optimizees(task(), torchopt.sgd(0.1), total_steps=0, generator=generator()),
        ValueError,
        "total_steps must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_optimizers.train_optimizees",
        "a torch optimizer",
        lambda: train_optimizees(task(), torch.optim.SGD, total_steps=1, generator=generator()),
        TypeError,
        (
            "rule must be a TorchOpt GradientTransformation that takes two streams, got <class "
            "'torch.optim.sgd.SGD'>; write torchopt.chain(gradients_only(), torchopt.adam(3e-3))"
        ),
    ),
    BadInput(
        "meta_optimizers.train_optimizees",
        "a seed as generator",
        lambda: train_optimizees(task(), torchopt.sgd(0.1), total_steps=1, generator=0),
        TypeError,
        ("generator must be a torch.Generator on the CPU or None, got 0; write torch.Generator().manual_seed(seed)"),
    ),
    # Characteristics and networks
    BadInput(
        "meta_weighters.ClassStatistics",
        "one class",
        lambda: ClassStatistics([5]),
        ValueError,
        (
            "counts must be at least two integers >= 0, examples per class, not all 0, got [5]; write "
            "labels.bincount(minlength=classes)"
        ),
    ),
    BadInput(
        "meta_weighters.ClassStatistics",
        "shares in place of counts",
        lambda: ClassStatistics([0.5, 0.5]),
        ValueError,
        (
            "counts must be at least two integers >= 0, examples per class, not all 0, got [0.5, 0.5]; write "
            "labels.bincount(minlength=classes)"
        ),
    ),
    BadInput(
        "meta_weighters.ClassStatistics",
        "a negative count",
        lambda: ClassStatistics([5, -1]),
        ValueError,
        (
            "counts must be at least two integers >= 0, examples per class, not all 0, got [5, -1]; write "
            "labels.bincount(minlength=classes)"
        ),
    ),
    BadInput(
        "meta_weighters.ClassStatistics",
        "counts as text",
        lambda: ClassStatistics("5,5"),
        TypeError,
        "counts must be a list of integers, got '5,5'; write labels.bincount(minlength=classes)",
    ),
    BadInput(
        "meta_weighters.ClassStatistics",
        "losses of labels beyond the classes",
        lambda: ClassStatistics([2, 2, 2]).update(torch.ones(6), Y + 1),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "meta_weighters.training_characteristics",
        "counts in place of statistics",
        lambda: training_characteristics(LOGITS, Y, [2, 2, 2]),
        TypeError,
        "statistics must be a ClassStatistics, got [2, 2, 2]; write ClassStatistics(labels.bincount())",
    ),
    BadInput(
        "meta_weighters.training_characteristics",
        "other classes",
        lambda: training_characteristics(LOGITS[:, :2], Y % 2, STATISTICS),
        ValueError,
        (
            "logits must be [batch, 3], for the 3 classes of the statistics, got shape [6, 2]; write "
            "ClassStatistics(labels.bincount(minlength=classes))"
        ),
    ),
    BadInput(
        "meta_weighters.training_characteristics",
        "labels of floats",
        lambda: training_characteristics(LOGITS, Y.float(), STATISTICS),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "an unknown branch",
        lambda: WeightingNetwork(branches=("clean", "adversary")),
        ValueError,
        "branches must be one of 'natural', 'adversary', 'anti_adversary', got 'clean'",
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "branches out of order",
        lambda: WeightingNetwork(branches=("anti_adversary", "adversary")),
        ValueError,
        (
            "branches must be a part of ('natural', 'adversary', 'anti_adversary') in this order, got "
            "('anti_adversary', 'adversary')"
        ),
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "no adversary",
        lambda: WeightingNetwork(branches=("natural",)),
        ValueError,
        "branches must be such that 'adversary' is among them, got ('natural',)",
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "one name in place of a tuple",
        lambda: WeightingNetwork(branches="adversary"),
        TypeError,
        "branches must be a list, got 'adversary'; write branches=('adversary', 'anti_adversary')",
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "a temperature of 0",
        lambda: WeightingNetwork(temperature=0.0),
        ValueError,
        "temperature must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "bounds that leave out 1",
        lambda: WeightingNetwork(bound_range=(1.5, 2.0)),
        ValueError,
        "bound_range must be two factors with 0 < lowest < 1 < highest, got (1.5, 2.0); write (0.5, 2.0)",
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "characteristics of another width",
        lambda: WeightingNetwork()(X),
        ValueError,
        ("characteristics must be a tensor [batch, 6], got [6, 4]; write training_characteristics(logits, y, statistics)"),
    ),
    BadInput(
        "meta_weighters.WeightingNetwork",
        "a seed as generator",
        lambda: WeightingNetwork(generator=0),
        TypeError,
        ("generator must be a torch.Generator on the CPU or None, got 0; write torch.Generator().manual_seed(seed)"),
    ),
    BadInput(
        "meta_weighters.GradientBound",
        "lowest above highest",
        lambda: GradientBound(lowest=3.0, highest=2.0),
        ValueError,
        "lowest and highest must be such that 1 lies between them, got (3.0, 2.0)",
    ),
    BadInput(
        "meta_weighters.GradientBound",
        "a memory of 0",
        lambda: GradientBound(memory=0),
        ValueError,
        "memory must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_weighters.ReMargin",
        "one class",
        lambda: ReMargin(classes=1),
        ValueError,
        "classes must be an integer >= 2, got 1",
    ),
    BadInput(
        "meta_weighters.ReMargin",
        "a limit of 1",
        lambda: ReMargin(classes=3, limit=1.0),
        ValueError,
        "limit must be < 1, so that class weights are positive, got 1.0",
    ),
    BadInput(
        "meta_weighters.ReMargin",
        "factors that leave out 1",
        lambda: ReMargin(classes=3, lowest=1.5),
        ValueError,
        "lowest and highest must be such that 1 lies between them, got (1.5, 2.5)",
    ),
    # Weighters
    BadInput(
        "meta_weighters.CAAT",
        "epsilon in place of a threat model",
        lambda: caat(threat_model=0.1),
        TypeError,
        "threat_model must be a ThreatModel, got 0.1",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "an unknown routing",
        lambda: caat(routing="top1"),
        ValueError,
        "routing must be one of 'hard', 'soft', 'random', got 'top1'",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a meta step every 0 calls",
        lambda: caat(meta_every=0),
        ValueError,
        "meta_every must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "an unknown hypergradient",
        lambda: caat(hypergradient="implicit"),
        ValueError,
        "hypergradient must be one of 'auto', 'jvp', 'double_backward', 'finite_difference', got 'implicit'",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "meta-data of bytes",
        lambda: caat(meta_data=(BYTES, Y)),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "meta-data with a NaN",
        lambda: caat(meta_data=(WITH_NAN, Y)),
        ValueError,
        "x must be finite, got NaN or infinite values; find them with x.isfinite().logical_not().nonzero()",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "meta-labels beyond the classes",
        lambda: caat(meta_data=(X, Y + 1)),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "meta_weighters.CAAT",
        "no meta-data",
        lambda: caat(meta_data=(X[:0], Y[:0])),
        ValueError,
        "meta_data must be at least one example, got 0",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a learning rate as optimizer",
        lambda: caat(optimizer=0.1),
        TypeError,
        (
            "optimizer must be a torch.optim.Optimizer, got 0.1; write the one that trains the model, as "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        ),
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a network of other inputs",
        lambda: caat(network=WeightingNetwork(inputs=3)),
        ValueError,
        "network must be with inputs=6, got 3",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a ReMargin of other classes",
        lambda: caat(bound=ReMargin(classes=2)),
        ValueError,
        "bound must be ReMargin(classes=3), as many as class_counts has, got classes=2",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a learned radius from the loss",
        lambda: caat(reads_loss=True, network=WeightingNetwork(inputs=1, branches=("adversary",), bound_range=(0.5, 2.0))),
        ValueError,
        (
            "network must be without bound_range where it reads the loss, which is known once the radius is, got "
            "bound_range=(0.5, 2.0); leave it out, or write bound=GradientBound()"
        ),
    ),
    BadInput(
        "meta_weighters.MetaWeightNet",
        "a routing",
        lambda: net(routing="hard"),
        TypeError,
        "routing must be left out, since MetaWeightNet has 'soft', got 'hard'; CAAT takes others",
    ),
    BadInput(
        "meta_weighters.MetaWeightNet",
        "characteristics to read",
        lambda: net(reads_loss=False),
        TypeError,
        "reads_loss must be left out, since MetaWeightNet has True, got False; CAAT takes others",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "an nn.Linear as network",
        lambda: caat(network=nn.Linear(6, 2)),
        TypeError,
        "network must be a WeightingNetwork, got Linear; write WeightingNetwork(inputs=6)",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a temperature of 0 at the end",
        lambda: caat(temperature=(1.0, 0.0)),
        ValueError,
        "temperature must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "one temperature",
        lambda: caat(temperature=0.1),
        TypeError,
        "temperature must be a pair, got 0.1; write temperature=(1.0, 0.1)",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a step size in 8-bit units",
        lambda: caat(step_size=2.0)(network(), X, Y),
        ValueError,
        (
            "step_size must be at most 1 (= upper - lower) in input units for l_inf, got 2.0; for 8-bit images "
            "in [0, 1] write 2 / 255"
        ),
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a function as model",
        lambda: caat()(lambda x: x[:, :3], X, Y),
        TypeError,
        "model must be an nn.Module for meta-steps, got function; pass the module, or set meta_every=None",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "y beyond the classes",
        lambda: caat()(network(), X, Y + 1),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "meta_weighters.CAAT",
        "x in 0..255",
        lambda: caat()(network(), PIXELS, Y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "meta_weighters.CAAT",
        "a clip_norm of 0",
        lambda: caat(clip_norm=0.0)(network(), X, Y),
        ValueError,
        "clip_norm must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "meta_weighters.MetaWeightNet",
        "a negative learning rate",
        lambda: net(learning_rate=-1.0),
        ValueError,
        "learning_rate must be a finite number > 0, got -1.0",
    ),
    BadInput(
        "meta_weighters.MetaWeightNet",
        "weights asked of a network that reads the loss",
        lambda: net().weigh(network(), X, Y),
        ValueError,
        "weigh must be asked of a network that reads the six characteristics, got one that reads the loss",
    ),
    BadInput(
        "meta_weighters.FRL",
        "a negative beta",
        lambda: frl(beta=-1.0),
        ValueError,
        "beta must be a finite number >= 0, got -1.0",
    ),
    BadInput(
        "meta_weighters.FRL",
        "no held-out data",
        lambda: frl(held_out=(X[:0], Y[:0])),
        ValueError,
        "held_out must be at least one example, got 0",
    ),
    BadInput(
        "meta_weighters.FRL",
        "x in 0..255",
        lambda: frl()(network(), PIXELS, Y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "meta_weighters.FRL",
        "held-out data in 0..255",
        lambda: frl(held_out=(PIXELS, Y)),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "meta_weighters.held_out_errors",
        "labels beyond the classes",
        lambda: errors(y=Y + 3),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 3 to 5; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "meta_weighters.held_out_errors",
        "no example",
        lambda: errors(x=X[:0], y=Y[:0]),
        ValueError,
        "x must be at least one example, got none",
    ),
    BadInput(
        "meta_weighters.held_out_errors",
        "a batch size of 0",
        lambda: errors(batch_size=0),
        ValueError,
        "batch_size must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_weighters.signed_pgd",
        "signs of 0.5",
        lambda: signed(torch.full((6,), 0.5)),
        ValueError,
        (
            "signs must be a tensor [6] of +1 (adversary), 0 (stay) and -1 (anti-adversary), got tensor([0.5000, "
            "0.5000, 0.5000, 0.5000, 0.5000, 0.5000])"
        ),
    ),
    BadInput(
        "meta_weighters.signed_pgd",
        "signs of another length",
        lambda: signed(torch.ones(5)),
        ValueError,
        ("signs must be a tensor [6] of +1 (adversary), 0 (stay) and -1 (anti-adversary), got tensor([1., 1., 1., 1., 1.])"),
    ),
    BadInput(
        "meta_weighters.signed_pgd",
        "steps of 0",
        lambda: signed(steps=0),
        ValueError,
        "steps must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_weighters.signed_pgd",
        "a negative radius",
        lambda: signed(epsilon=-torch.ones(6)),
        ValueError,
        ("epsilon must be a tensor [6] of finite radii >= 0 in input units, got tensor([-1., -1., -1., -1., -1., -1.])"),
    ),
    BadInput(
        "meta_weighters.signed_pgd",
        "radii of another length",
        lambda: signed(epsilon=0.1 * torch.ones(5)),
        ValueError,
        (
            "epsilon must be a tensor [6] of finite radii >= 0 in input units, got tensor([0.1000, 0.1000, "
            "0.1000, 0.1000, 0.1000])"
        ),
    ),
    BadInput(
        "meta_weighters.signed_pgd",
        "one radius as a number",
        lambda: signed(epsilon=0.1),
        ValueError,
        "epsilon must be a tensor [6] of finite radii >= 0 in input units, got 0.1",
    ),
    BadInput(
        "meta_weighters.signed_pgd",
        "x of uint8",
        lambda: signed(x=BYTES),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    # Hypergradients
    BadInput(
        "meta_weighters.virtual_update",
        "a learning rate",
        lambda: virtual_update(0.1, (torch.tensor(0.5),)),
        TypeError,
        (
            "optimizer must be torch.optim.SGD, Adam or AdamW, got float; for a TorchOpt rule write "
            "VirtualUpdate(rule, rule.init(parameters))"
        ),
    ),
    BadInput(
        "meta_weighters.virtual_update",
        "an optimizer of another kind",
        lambda: virtual_update(torch.optim.LBFGS([w := torch.tensor(0.5, requires_grad=True)]), (w,)),
        TypeError,
        (
            "optimizer must be torch.optim.SGD, Adam or AdamW, got LBFGS; for a TorchOpt rule write "
            "VirtualUpdate(rule, rule.init(parameters))"
        ),
    ),
    BadInput(
        "meta_weighters.virtual_update",
        "a parameter that the optimizer does not move",
        lambda: virtual_update(torch.optim.SGD([torch.tensor(0.5)], lr=0.1), (torch.tensor(0.5),)),
        ValueError,
        "optimizer must be over every parameter of the model, got none of the parameters [0]",
    ),
    BadInput(
        "meta_weighters.hypergradient",
        "an unknown method",
        lambda: derivative(method="implicit"),
        ValueError,
        "method must be one of 'jvp', 'double_backward', 'finite_difference', got 'implicit'",
    ),
    BadInput(
        "meta_weighters.hypergradient",
        "no step",
        lambda: derivative(steps=0),
        ValueError,
        "steps must be an integer >= 1, got 0",
    ),
    BadInput(
        "meta_weighters.hypergradient",
        "several steps by the JVP",
        lambda: derivative(method="jvp", steps=2),
        ValueError,
        "steps must be 1 for method='jvp', got 2; write method='double_backward'",
    ),
    BadInput(
        "meta_weighters.hypergradient",
        "weights of another shape",
        lambda: derivative(weights=torch.ones(5, 1)),
        ValueError,
        "branch_losses must be of shape [5, 1], as the weights, got [6, 1]",
    ),
    BadInput(
        "meta_weighters.hypergradient",
        "losses without branches",
        lambda: derivative(branch_losses=lambda p: p["w"] * X.sum(1)),
        ValueError,
        "branch_losses must be of shape [6, 1], as the weights, got [6]",
    ),
    BadInput(
        "meta_weighters.hypergradient",
        "a meta-loss per example",
        lambda: derivative(meta_loss=lambda p: p["w"] * torch.ones(3)),
        ValueError,
        "meta_loss must be a function to a scalar that depends on the parameters, got shape [3]",
    ),
    BadInput(
        "meta_weighters.hypergradient",
        "a constant meta-loss",
        lambda: derivative(meta_loss=lambda p: torch.tensor(1.0)),
        ValueError,
        "meta_loss must be a function to a scalar that depends on the parameters, got a constant",
    ),
    BadInput(
        "meta_weighters.meta_weighted_step",
        "a clip_norm of 0",
        lambda: meta_step(clip_norm=0.0),
        ValueError,
        "clip_norm must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "meta_weighters.meta_weighted_step",
        "a bound without an output for it",
        lambda: meta_step(bound=torch.ones(6)),
        ValueError,
        "bound must be given for a network with bound_range, and for no other, got a tensor",
    ),
    BadInput(
        "meta_weighters.meta_weighted_step",
        "a meta-loss of NaN",
        lambda: meta_step(meta_loss=lambda p: p["w"] * torch.nan),
        FloatingPointError,
        ("the meta-gradient must be finite, got norm nan; lower the learning rate of the virtual step, or set clip_norm"),
    ),
    BadInput(
        "meta_weighters.meta_weighted_step",
        "an nn.Linear as network",
        lambda: meta_step(network=nn.Linear(1, 1)),
        TypeError,
        "network must be a WeightingNetwork, got Linear; write WeightingNetwork(inputs=6)",
    ),
]
