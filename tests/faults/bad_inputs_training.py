"""Bad inputs of metarobust.evaluation, metarobust.training and metarobust.objectives."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from bad_inputs import ATTACK, BALL, BYTES, DIAMOND, NORMALISED, PIXELS, WITH_NAN, BadInput, X, Y, constant, network, pgd
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metarobust.attacks import BETA, FGSM
from metarobust.divergences import KL
from metarobust.evaluation import RobustnessReport, evaluate, protocol_attacks
from metarobust.objectives import (
    ARMOR,
    MART,
    TRADES,
    UDR,
    AdversarialTraining,
    BETATraining,
    ClassWeighted,
    LogitAdjusted,
    SmoothedBETATraining,
)
from metarobust.threat_models import ThreatModel
from metarobust.training import cosine, fit, piecewise
from metarobust.transport_costs import Insertion, NormPower

OBJECTIVE = AdversarialTraining(attack=ATTACK)


def judge(model: object = None, data: object = (X, Y), **changed: object) -> object:
    settings = {"threat_model": BALL, "attacks": {"fgsm": ATTACK}, "reliability_checks": False, **changed}
    return evaluate(network() if model is None else model, data, **settings)


@cache
def report() -> RobustnessReport:
    return judge()


def train(model: object = None, objective: object = OBJECTIVE, data: object = (X, Y), **changed: object) -> object:
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if isinstance(model, nn.Module) else None
    return fit(model, objective, data, **{"optimizer": optimizer, "epochs": 1, "silent": True, **changed})


def sgd_of_another() -> torch.optim.Optimizer:
    return torch.optim.SGD(network().parameters(), lr=0.1)


def outside(model: object, x: Tensor, y: Tensor, *, generator: object = None) -> Tensor:
    return 1 - x


def not_there() -> Path:
    return Path(tempfile.gettempdir(), "nowhere", "run.safetensors")


def armor(**changed: object) -> ARMOR:
    return ARMOR(**{"robust_loss": OBJECTIVE, "divergence": KL(), "radius": 0.1, **changed})


ROWS = [
    # evaluate
    BadInput("evaluation.evaluate", "a model in training mode", lambda: judge(network().train())),
    BadInput("evaluation.evaluate", "one layer in training mode", lambda: judge(nn.Sequential(network(), nn.Dropout()).train(False).append(nn.Dropout()))),
    BadInput("evaluation.evaluate", "a path as model", lambda: judge("model.pt")),
    BadInput("evaluation.evaluate", "a model without weights", lambda: judge(network().to("meta"))),
    BadInput("evaluation.evaluate", "a model with NaN logits", lambda: judge(lambda x: x[:, :3] * torch.nan)),
    BadInput("evaluation.evaluate", "a model that returns predictions", lambda: judge(lambda x: x.argmax(1))),
    BadInput("evaluation.evaluate", "a model for other shapes", lambda: judge(data=(X[:, :3], Y))),
    BadInput("evaluation.evaluate", "epsilon in place of a threat model", lambda: judge(threat_model=8 / 255)),
    BadInput("evaluation.evaluate", "x of uint8", lambda: judge(data=(BYTES, Y))),
    BadInput("evaluation.evaluate", "x in 0..255", lambda: judge(data=(PIXELS, Y))),
    BadInput("evaluation.evaluate", "x normalised outside the model", lambda: judge(data=(NORMALISED, Y))),
    BadInput("evaluation.evaluate", "x with a NaN", lambda: judge(data=(WITH_NAN, Y))),
    BadInput("evaluation.evaluate", "y of floats", lambda: judge(data=(X, Y.float()))),
    BadInput("evaluation.evaluate", "y beyond the classes", lambda: judge(data=(X, Y + 10**12))),
    BadInput("evaluation.evaluate", "arrays", lambda: judge(data=(X.numpy(), Y.numpy()))),
    BadInput("evaluation.evaluate", "x alone", lambda: judge(data=X)),
    BadInput("evaluation.evaluate", "no example", lambda: judge(data=(X[:0], Y[:0]))),
    BadInput("evaluation.evaluate", "an empty loader", lambda: judge(data=[])),
    BadInput("evaluation.evaluate", "a loader of images alone", lambda: judge(data=DataLoader(X, batch_size=3))),
    BadInput("evaluation.evaluate", "an unknown protocol", lambda: judge(attacks=None, protocol="autoattack")),
    BadInput("evaluation.evaluate", "another spelling of a protocol", lambda: judge(attacks=None, protocol="Standard")),
    BadInput("evaluation.evaluate", "a list of attacks", lambda: judge(attacks=[ATTACK])),
    BadInput("evaluation.evaluate", "one attack", lambda: judge(attacks=ATTACK)),
    BadInput("evaluation.evaluate", "no attack", lambda: judge(attacks={})),
    BadInput("evaluation.evaluate", "an attack that is none", lambda: judge(attacks={"fgsm": "fgsm"})),
    BadInput("evaluation.evaluate", "an attack class", lambda: judge(attacks={"fgsm": FGSM})),
    BadInput("evaluation.evaluate", "a reserved name", lambda: judge(attacks={"clean": ATTACK})),
    BadInput("evaluation.evaluate", "an attack of another ball", lambda: judge(lambda x: x[:, :3], attacks={"wide": FGSM(threat_model=ThreatModel(epsilon=0.5))}, data=(X, X[:, :3].argmax(1)))),
    BadInput("evaluation.evaluate", "an attack that returns bytes", lambda: judge(lambda x: x[:, :3], attacks={"bytes": lambda m, x, y, generator: BYTES}, data=(X, X[:, :3].argmax(1)))),
    BadInput("evaluation.evaluate", "a batch size of 0", lambda: judge(batch_size=0)),
    BadInput("evaluation.evaluate", "a negative seed", lambda: judge(seed=-1)),
    BadInput("evaluation.evaluate", "a checkpoint in no folder", lambda: judge(checkpoint=not_there())),
    BadInput("evaluation.evaluate", "a folder as checkpoint", lambda: judge(checkpoint=tempfile.gettempdir())),
    BadInput("evaluation.evaluate", "a model without a gradient for gradient attacks", lambda: judge(constant, data=(X, 0 * Y))),
    BadInput("evaluation.protocol_attacks", "an unknown protocol", lambda: protocol_attacks("fast", BALL)),
    BadInput("evaluation.protocol_attacks", "no threat model", lambda: protocol_attacks("quick", 0.1)),
    BadInput("evaluation.protocol_attacks", "one class", lambda: protocol_attacks("quick", BALL, classes=1)),
    BadInput("evaluation.RobustnessReport", "RobustBench entry without a name", lambda: report().to_robustbench(name="", dataset="cifar10", architecture="x")),
    BadInput("evaluation.RobustnessReport", "RobustBench entry for l1", lambda: replace(report(), settings=report().settings | {"norm": "l1"}).to_robustbench(name="x", dataset="x", architecture="x")),
    BadInput("evaluation.RobustnessReport", "a JSON file in no folder", lambda: report().to_json(not_there())),
    BadInput("evaluation.RobustnessReport", "a figure of a format that is none", lambda: report().plot("figure.doc")),
    BadInput("evaluation.RobustnessReport", "a bound of order 1", lambda: report().with_distance_to_bound(order=1)),
    # fit
    BadInput("training.fit", "a function as model", lambda: train(constant)),
    BadInput("training.fit", "a frozen model", lambda: train(network().requires_grad_(False))),
    BadInput("training.fit", "a class as objective", lambda: train(objective=AdversarialTraining)),
    BadInput("training.fit", "the name of an objective", lambda: train(objective="trades")),
    BadInput("training.fit", "a loss without generator", lambda: train(objective=lambda model, x, y: x.sum(1))),
    BadInput("training.fit", "an objective that returns the mean", lambda: train(objective=lambda m, x, y, generator: m(x).mean())),
    BadInput("training.fit", "an objective that returns a float", lambda: train(objective=lambda m, x, y, generator: 1.0)),
    BadInput("training.fit", "an objective without a gradient", lambda: train(objective=lambda m, x, y, generator: m(x).detach().sum(1))),
    BadInput("training.fit", "an objective that is NaN", lambda: train(objective=lambda m, x, y, generator: m(x).sum(1) * torch.nan)),
    BadInput("training.fit", "a DataLoader", lambda: train(data=DataLoader(X))),
    BadInput("training.fit", "x of uint8", lambda: train(data=(BYTES, Y))),
    BadInput("training.fit", "x of float64", lambda: train(data=(X.double(), Y))),
    BadInput("training.fit", "x in 0..255", lambda: train(data=(PIXELS, Y))),
    BadInput("training.fit", "x with a NaN", lambda: train(data=(WITH_NAN, Y))),
    BadInput("training.fit", "y of floats", lambda: train(data=(X, Y.float()))),
    BadInput("training.fit", "y beyond the classes", lambda: train(data=(X, Y + 1))),
    BadInput("training.fit", "y one-hot", lambda: train(data=(X, nn.functional.one_hot(Y)))),
    BadInput("training.fit", "no example", lambda: train(data=(X[:0], Y[:0]))),
    BadInput("training.fit", "inputs of another shape", lambda: train(data=(X[:, :3], Y))),
    BadInput("training.fit", "a learning rate as optimizer", lambda: train(optimizer=0.1)),
    BadInput("training.fit", "an optimizer of another model", lambda: train(optimizer=sgd_of_another())),
    BadInput("training.fit", "epochs of 0", lambda: train(epochs=0)),
    BadInput("training.fit", "epochs as a float", lambda: train(epochs=1.5)),
    BadInput("training.fit", "a batch size of 0", lambda: train(batch_size=0)),
    BadInput("training.fit", "validation without an attack", lambda: train(validation=(X, Y))),
    BadInput("training.fit", "an attack without validation", lambda: train(validation_attack=pgd())),
    BadInput("training.fit", "validation labels of floats", lambda: train(validation=(X, Y.float()), validation_attack=pgd())),
    BadInput("training.fit", "a schedule as a list", lambda: train(schedule=[0.1, 0.01])),
    BadInput("training.fit", "a schedule that turns negative", lambda: train(schedule=lambda progress: -1.0)),
    BadInput("training.fit", "clip_norm of 0", lambda: train(clip_norm=0.0)),
    BadInput("training.fit", "amp of True", lambda: train(amp=True)),
    BadInput("training.fit", "an unknown precision", lambda: train(amp="int8")),
    BadInput("training.fit", "float16 on a CPU", lambda: train(amp="float16")),
    BadInput("training.fit", "augment that changes the shape", lambda: train(augment=lambda x, generator: x[:, :3])),
    BadInput("training.fit", "a seed as text", lambda: train(seed="0")),
    BadInput("training.fit", "a checkpoint in no folder", lambda: train(checkpoint=not_there())),
    BadInput("training.piecewise", "a factor below 0", lambda: piecewise({0.5: -0.1})),
    BadInput("training.piecewise", "epochs in place of progress", lambda: piecewise({100: 0.1, 150: 0.01})),
    BadInput("training.piecewise", "a list", lambda: piecewise([0.5, 0.75])),
    BadInput("training.piecewise", "nothing", lambda: piecewise({})),
    BadInput("training.cosine", "progress as text", lambda: cosine("half")),
    BadInput("training.TrainingResult", "a folder below a file", lambda: train().save(__file__ + "/run")),
    # objectives
    BadInput("objectives.AdversarialTraining", "an attack class", lambda: AdversarialTraining(attack=FGSM)),
    BadInput("objectives.AdversarialTraining", "a ball in place of an attack", lambda: AdversarialTraining(attack=BALL)),
    BadInput("objectives.AdversarialTraining", "an unknown loss", lambda: AdversarialTraining(attack=ATTACK, loss="ce")),
    BadInput("objectives.AdversarialTraining", "an averaged loss", lambda: AdversarialTraining(attack=ATTACK, loss=nn.CrossEntropyLoss())(network(), X, Y)),
    BadInput("objectives.AdversarialTraining", "x in 0..255", lambda: OBJECTIVE(network(), PIXELS, Y)),
    BadInput("objectives.AdversarialTraining", "an attack that returns another shape", lambda: AdversarialTraining(attack=lambda m, x, y, generator=None: x[:2])(network(), X, Y)),
    BadInput("objectives.TRADES", "neither ball nor attack", lambda: TRADES()),
    BadInput("objectives.TRADES", "ball and attack", lambda: TRADES(threat_model=BALL, attack=ATTACK)),
    BadInput("objectives.TRADES", "a negative beta", lambda: TRADES(threat_model=BALL, beta=-6.0)),
    BadInput("objectives.TRADES", "a start without noise", lambda: TRADES(threat_model=BALL, start_std=0.0)),
    BadInput("objectives.TRADES", "a step size in 8-bit units", lambda: TRADES(threat_model=BALL, step_size=2)),
    BadInput("objectives.TRADES", "y of floats", lambda: TRADES(threat_model=BALL)(network(), X, Y.float())),
    BadInput("objectives.TRADES", "beta of 0 with y of floats", lambda: TRADES(threat_model=BALL, beta=0)(network(), X, Y.float())),
    BadInput("objectives.MART", "an infinite beta", lambda: MART(attack=ATTACK, beta=float("inf"))),
    BadInput("objectives.MART", "no attack", lambda: MART(attack=None)),
    BadInput("objectives.MART", "y beyond the classes", lambda: MART(attack=ATTACK)(network(), X, Y + 3)),
    BadInput("objectives.UDR", "an l1 ball", lambda: UDR(threat_model=DIAMOND)),
    BadInput("objectives.UDR", "a negative multiplier", lambda: UDR(threat_model=BALL, multiplier=-1.0)),
    BadInput("objectives.UDR", "x of uint8", lambda: UDR(threat_model=BALL)(network(), BYTES, Y)),
    BadInput("objectives.BETATraining", "neither ball nor attack", lambda: BETATraining()),
    BadInput("objectives.BETATraining", "an attack that is no BETA", lambda: BETATraining(attack=ATTACK)),
    BadInput("objectives.BETATraining", "an unknown hypergradient", lambda: BETATraining(threat_model=BALL, hypergradient="jvp")),
    BadInput("objectives.BETATraining", "implicit in l1", lambda: BETATraining(threat_model=DIAMOND, hypergradient="implicit")),
    BadInput("objectives.BETATraining", "y beyond the classes", lambda: BETATraining(threat_model=BALL)(network(), X, Y + 3)),
    BadInput("objectives.SmoothedBETATraining", "a negative mu", lambda: SmoothedBETATraining(threat_model=BALL, mu=-1.0)),
    BadInput("objectives.SmoothedBETATraining", "an attack that drops examples", lambda: SmoothedBETATraining(attack=BETA(threat_model=BALL, survivors_only=True), mu=1.0)),
    BadInput("objectives.ARMOR", "a class of divergence", lambda: armor(divergence=KL)),
    BadInput("objectives.ARMOR", "a negative radius", lambda: armor(radius=-0.1)),
    BadInput("objectives.ARMOR", "a natural weight above 1", lambda: armor(natural_weight=2.0)),
    BadInput("objectives.ARMOR", "an attack as robust loss", lambda: armor(robust_loss=ATTACK)),
    BadInput("objectives.ARMOR", "one robust class", lambda: armor(robust_classes=1)),
    BadInput("objectives.ARMOR", "a robust class that is none", lambda: armor(robust_classes=(7,))(network(), X, Y)),
    BadInput("objectives.ARMOR", "steps without a transport cost", lambda: armor(steps=5)),
    BadInput("objectives.ARMOR", "a transport cost without step size", lambda: armor(transport_cost=NormPower(weight=1.0))),
    BadInput("objectives.ARMOR", "insertions for TRADES", lambda: armor(robust_loss=TRADES(threat_model=BALL), transport_cost=Insertion(weight=1.0))),
    BadInput("objectives.ARMOR", "a model that explodes", lambda: armor()(lambda x: (x[:, :3] + 1) ** 5000, X, Y)),
    BadInput("objectives.ClassWeighted", "negative weights", lambda: ClassWeighted(robust_loss=OBJECTIVE, class_weights=[-1.0, 1.0, 1.0])),
    BadInput("objectives.ClassWeighted", "weights of other classes", lambda: ClassWeighted(robust_loss=OBJECTIVE, class_weights=[1.0, 1.0])(network(), X, Y)),
    BadInput("objectives.ClassWeighted", "a count of 0", lambda: ClassWeighted.balanced(robust_loss=OBJECTIVE, class_counts=[0, 5, 5])),
    BadInput("objectives.ClassWeighted", "an attack as robust loss", lambda: ClassWeighted(robust_loss=ATTACK, class_weights=[1.0, 1.0, 1.0])),
    BadInput("objectives.LogitAdjusted", "a count of 0", lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts=[0, 5, 5])),
    BadInput("objectives.LogitAdjusted", "counts of other classes", lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts=[5, 5])(network(), X, Y)),
    BadInput("objectives.LogitAdjusted", "counts as text", lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts="5,5,5")),
    BadInput("objectives.LogitAdjusted", "a negative temperature", lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts=[5, 5, 5], temperature=-1.0)),
]
