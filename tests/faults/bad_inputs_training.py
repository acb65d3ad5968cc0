"""Bad inputs of metarobust.evaluation, metarobust.training and metarobust.objectives."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

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
    BadInput(
        "evaluation.evaluate",
        "a model in training mode",
        lambda: judge(network().train()),
        ValueError,
        "model must be in evaluation mode, got a model in training mode; write model.eval()",
    ),
    BadInput(
        "evaluation.evaluate",
        "one layer in training mode",
        lambda: judge(nn.Sequential(network(), nn.Dropout()).train(False).append(nn.Dropout())),
        ValueError,
        "model must be in evaluation mode, got a model in training mode; write model.eval()",
    ),
    BadInput(
        "evaluation.evaluate",
        "a path as model",
        lambda: judge("model.pt"),
        TypeError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got 'model.pt'; build "
            "the network and load its weights into it"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "a model without weights",
        lambda: judge(network().to("meta")),
        ValueError,
        (
            "model must be one with weights, got parameters on the meta device, which have no values; load its "
            "weights: model.load_state_dict(weights, assign=True)"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "a model with NaN logits",
        lambda: judge(lambda x: x[:, :3] * torch.nan),
        ValueError,
        "model must be such that its logits are finite, got NaN or infinite logits",
    ),
    BadInput(
        "evaluation.evaluate",
        "a model that returns predictions",
        lambda: judge(lambda x: x.argmax(1)),
        ValueError,
        ("model must be a callable from inputs [batch, ...] to logits [batch, classes], got an output of shape [1] for 1 inputs"),
    ),
    BadInput(
        "evaluation.evaluate",
        "a model for other shapes",
        lambda: judge(data=(X[:, :3], Y)),
        ValueError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got one that fails on "
            "torch.float32 [1, 3] (addmm: mat1 and mat2 shapes cannot be multiplied (1x3 and 4x5)); check the "
            "shape of x"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "epsilon in place of a threat model",
        lambda: judge(threat_model=8 / 255),
        TypeError,
        "threat_model must be a ThreatModel, got 0.03137254901960784",
    ),
    BadInput(
        "evaluation.evaluate",
        "x of uint8",
        lambda: judge(data=(BYTES, Y)),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "evaluation.evaluate",
        "x in 0..255",
        lambda: judge(data=(PIXELS, Y)),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "evaluation.evaluate",
        "x normalised outside the model",
        lambda: judge(data=(NORMALISED, Y)),
        ValueError,
        (
            "x must be in the box [0, 1], got values in [-2, 2]; put normalisation inside the model "
            "(metarobust.models.Normalize) and pass x in input units"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "x with a NaN",
        lambda: judge(data=(WITH_NAN, Y)),
        ValueError,
        "x must be finite, got NaN or infinite values; find them with x.isfinite().logical_not().nonzero()",
    ),
    BadInput(
        "evaluation.evaluate",
        "y of floats",
        lambda: judge(data=(X, Y.float())),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "evaluation.evaluate",
        "y beyond the classes",
        lambda: judge(data=(X, Y + 10**12)),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 1000000000000 to "
            "1000000000002; check the label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "arrays",
        lambda: judge(data=(X.numpy(), Y.numpy())),
        TypeError,
        (
            "data must be a pair (x, y) of tensors or a DataLoader, got a pair of ndarray and ndarray; for "
            "arrays write torch.from_numpy; for a data set write DataLoader(dataset, batch_size=1000)"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "x alone",
        lambda: judge(data=X),
        TypeError,
        (
            "data must be a pair (x, y) of tensors or a DataLoader, got Tensor; for arrays write "
            "torch.from_numpy; for a data set write DataLoader(dataset, batch_size=1000)"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "no example",
        lambda: judge(data=(X[:0], Y[:0])),
        ValueError,
        "data must be at least one example, got none",
    ),
    BadInput(
        "evaluation.evaluate",
        "an empty loader",
        lambda: judge(data=[]),
        ValueError,
        "data must be at least one batch, got none",
    ),
    BadInput(
        "evaluation.evaluate",
        "a loader of images alone",
        lambda: judge(data=DataLoader(X, batch_size=3)),
        TypeError,
        (
            "data must be a pair (x, y) of tensors or a DataLoader, got batches of something else: Tensor; for "
            "arrays write torch.from_numpy; for a data set write DataLoader(dataset, batch_size=1000)"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "an unknown protocol",
        lambda: judge(attacks=None, protocol="autoattack"),
        ValueError,
        "protocol must be one of 'quick', 'standard', 'strong', got 'autoattack'",
    ),
    BadInput(
        "evaluation.evaluate",
        "another spelling of a protocol",
        lambda: judge(attacks=None, protocol="Standard"),
        ValueError,
        "protocol must be one of 'quick', 'standard', 'strong', got 'Standard'; write 'standard'",
    ),
    BadInput(
        "evaluation.evaluate",
        "a list of attacks",
        lambda: judge(attacks=[ATTACK]),
        TypeError,
        "attacks must be a mapping from names to attacks, got list; write {'pgd': attack}",
    ),
    BadInput(
        "evaluation.evaluate",
        "one attack",
        lambda: judge(attacks=ATTACK),
        TypeError,
        "attacks must be a mapping from names to attacks, got FGSM; write {'pgd': attack}",
    ),
    BadInput(
        "evaluation.evaluate",
        "no attack",
        lambda: judge(attacks={}),
        ValueError,
        "attacks must be at least one attack, got none; write attacks=None for the protocol's",
    ),
    BadInput(
        "evaluation.evaluate",
        "an attack that is none",
        lambda: judge(attacks={"fgsm": "fgsm"}),
        TypeError,
        ("attacks must be a mapping from names to attacks, got 'fgsm' under 'fgsm'; write {'pgd': PGD(threat_model=...)}"),
    ),
    BadInput(
        "evaluation.evaluate",
        "an attack class",
        lambda: judge(attacks={"fgsm": FGSM}),
        TypeError,
        (
            "attacks must be a mapping from names to attacks, got <class 'metarobust.attacks._gradient.FGSM'> "
            "under 'fgsm'; write {'pgd': PGD(threat_model=...)}"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "a reserved name",
        lambda: judge(attacks={"clean": ATTACK}),
        ValueError,
        "attacks must be named otherwise than 'clean' and 'reliability checks', got ['clean']",
    ),
    BadInput(
        "evaluation.evaluate",
        "an attack of another ball",
        lambda: judge(
            lambda x: x[:, :3], attacks={"wide": FGSM(threat_model=ThreatModel(epsilon=0.5))}, data=(X, X[:, :3].argmax(1))
        ),
        ValueError,
        (
            "attacks must be such that every result lies inside ThreatModel(norm='linf', epsilon=0.1, lower=0.0, "
            "upper=1.0), got 6 examples outside from FGSM(threat_model=ThreatModel(norm='linf', epsilon=0.5, "
            "lower=0.0, upper=1.0), loss='cross_entropy', direction='adversary'); give the attack the same "
            "threat model"
        ),
    ),
    BadInput(
        "evaluation.evaluate",
        "an attack that returns bytes",
        lambda: judge(lambda x: x[:, :3], attacks={"bytes": lambda m, x, y, generator: BYTES}, data=(X, X[:, :3].argmax(1))),
        ValueError,
        ("attacks must be such that every result is a tensor like x, [6, 4] torch.float32, got [6, 4] torch.uint8"),
    ),
    BadInput(
        "evaluation.evaluate",
        "a batch size of 0",
        lambda: judge(batch_size=0),
        ValueError,
        "batch_size must be an integer >= 1, got 0",
    ),
    BadInput(
        "evaluation.evaluate",
        "a negative seed",
        lambda: judge(seed=-1),
        ValueError,
        "seed must be an integer >= 0, got -1",
    ),
    BadInput(
        "evaluation.evaluate",
        "a checkpoint in no folder",
        lambda: judge(checkpoint=not_there()),
        FileNotFoundError,
        ("checkpoint must be a file in an existing folder, got .../nowhere/run.safetensors; make the folder .../nowhere first"),
    ),
    BadInput(
        "evaluation.evaluate",
        "a folder as checkpoint",
        lambda: judge(checkpoint=tempfile.gettempdir()),
        ValueError,
        "checkpoint must be a file, got the folder ...; write ...evaluation.safetensors",
    ),
    BadInput(
        "evaluation.evaluate",
        "a model without a gradient for gradient attacks",
        lambda: judge(constant, data=(X, 0 * Y)),
        ValueError,
        (
            "the model's logits must depend differentiably on x, got logits without a gradient; remove "
            "torch.no_grad(), .detach(), .round() or .argmax() from the model's forward pass"
        ),
    ),
    BadInput(
        "evaluation.protocol_attacks",
        "an unknown protocol",
        lambda: protocol_attacks("fast", BALL),
        ValueError,
        "protocol must be one of 'quick', 'standard', 'strong', got 'fast'",
    ),
    BadInput(
        "evaluation.protocol_attacks",
        "no threat model",
        lambda: protocol_attacks("quick", 0.1),
        TypeError,
        "threat_model must be a ThreatModel, got 0.1",
    ),
    BadInput(
        "evaluation.RobustnessReport",
        "RobustBench entry without a name",
        lambda: report().to_robustbench(name="", dataset="cifar10", architecture="x"),
        ValueError,
        "name must be not empty, got ''",
    ),
    BadInput(
        "evaluation.RobustnessReport",
        "RobustBench entry for l1",
        lambda: replace(report(), settings=report().settings | {"norm": "l1"}).to_robustbench(
            name="x", dataset="x", architecture="x"
        ),
        ValueError,
        "report must be for l_inf or l2, which RobustBench lists, got l1",
    ),
    BadInput(
        "evaluation.RobustnessReport",
        "a JSON file in no folder",
        lambda: report().to_json(not_there()),
        FileNotFoundError,
        "no folder at .../nowhere to write run.safetensors to; make it first",
    ),
    BadInput(
        "evaluation.RobustnessReport",
        "a figure of a format that is none",
        lambda: report().plot("figure.doc"),
        ValueError,
        (
            "path must be a file that ends in one of .avif, .eps, .gif, .jpeg, .jpg, .pdf, .pgf, .png, .ps, "
            ".raw, .rgba, .svg, .svgz, .tif, .tiff, .webp, got figure.doc; write report.png"
        ),
    ),
    BadInput(
        "evaluation.RobustnessReport",
        "a bound of order 1",
        lambda: report().with_distance_to_bound(order=1),
        ValueError,
        "order must be an integer >= 2, got 1",
    ),
    # fit
    BadInput(
        "training.fit",
        "a function as model",
        lambda: train(constant),
        TypeError,
        "model must be an nn.Module, got <function constant at ...>",
    ),
    BadInput(
        "training.fit",
        "a frozen model",
        lambda: train(network().requires_grad_(False)),
        ValueError,
        ("model must be a module with parameters that require a gradient, got none; write model.requires_grad_()"),
    ),
    BadInput(
        "training.fit",
        "a class as objective",
        lambda: train(objective=AdversarialTraining),
        TypeError,
        (
            "objective must be a robust loss, got <class "
            "'metarobust.objectives._adversarial_training.AdversarialTraining'>; write "
            "AdversarialTraining(attack=PGD(...))"
        ),
    ),
    BadInput(
        "training.fit",
        "the name of an objective",
        lambda: train(objective="trades"),
        TypeError,
        "objective must be a robust loss, got 'trades'; write AdversarialTraining(attack=PGD(...))",
    ),
    BadInput(
        "training.fit",
        "a loss without generator",
        lambda: train(objective=lambda model, x, y: x.sum(1)),
        TypeError,
        (
            "objective must be callable as f(model, x, y, generator=...), got <function "
            "<lambda>.<locals>.<lambda> at ...>; write def f(model, x, y, *, generator=None)"
        ),
    ),
    BadInput(
        "training.fit",
        "an objective that returns the mean",
        lambda: train(objective=lambda m, x, y, generator: m(x).mean()),
        TypeError,
        (
            "objective must be a function that returns one loss per example, [6], or an object with a scalar "
            ".loss, got a tensor of shape []; leave out the mean over the batch, or return the whole result of "
            "ARMOR"
        ),
    ),
    BadInput(
        "training.fit",
        "an objective that returns a float",
        lambda: train(objective=lambda m, x, y, generator: 1.0),
        TypeError,
        ("objective must be a function that returns one loss per example, [6], or an object with a scalar .loss, got float"),
    ),
    BadInput(
        "training.fit",
        "an objective without a gradient",
        lambda: train(objective=lambda m, x, y, generator: m(x).detach().sum(1)),
        ValueError,
        (
            "objective must be differentiable in the model's parameters, got a loss without a graph; remove "
            "torch.no_grad() or .detach() from the objective"
        ),
    ),
    BadInput(
        "training.fit",
        "an objective that is NaN",
        lambda: train(objective=lambda m, x, y, generator: m(x).sum(1) * torch.nan),
        FloatingPointError,
        (
            "training must be such that loss and gradient stay finite, got loss nan in epoch 1, step 1 of 1, "
            "examples [3, 5, 1, 0, 2, 4] of data; look at these examples, lower the learning rate, or set "
            "clip_norm"
        ),
    ),
    BadInput(
        "training.fit",
        "a DataLoader",
        lambda: train(data=DataLoader(X)),
        TypeError,
        (
            "data must be a pair (x, y) of tensors or a LabelledImages, got DataLoader; read a DataLoader into "
            "two tensors first, and pass augmentations as augment="
        ),
    ),
    BadInput(
        "training.fit",
        "x of uint8",
        lambda: train(data=(BYTES, Y)),
        TypeError,
        "data: x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "training.fit",
        "x of float64",
        lambda: train(data=(X.double(), Y)),
        TypeError,
        (
            "data: x must be of the model's dtype torch.float32, which must be torch.float32 or torch.float64, "
            "got torch.float64; write x.to(next(model.parameters()).dtype); for half precision write "
            "amp='bfloat16'"
        ),
    ),
    BadInput(
        "training.fit",
        "x in 0..255",
        lambda: train(data=(PIXELS, Y)),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "training.fit",
        "x with a NaN",
        lambda: train(data=(WITH_NAN, Y)),
        ValueError,
        ("data: x must be finite, got NaN or infinite values; find them with x.isfinite().logical_not().nonzero()"),
    ),
    BadInput(
        "training.fit",
        "y of floats",
        lambda: train(data=(X, Y.float())),
        TypeError,
        "data: y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "training.fit",
        "y beyond the classes",
        lambda: train(data=(X, Y + 1)),
        ValueError,
        (
            "data: y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3; check "
            "the label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "training.fit",
        "y one-hot",
        lambda: train(data=(X, nn.functional.one_hot(Y))),
        ValueError,
        "data: y must be of shape [6], one label per example, got [6, 3]; for one-hot rows write y.argmax(dim=1)",
    ),
    BadInput(
        "training.fit",
        "no example",
        lambda: train(data=(X[:0], Y[:0])),
        ValueError,
        "data: x must be at least one example, got none",
    ),
    BadInput(
        "training.fit",
        "inputs of another shape",
        lambda: train(data=(X[:, :3], Y)),
        ValueError,
        (
            "data: model must be a callable from inputs [batch, ...] to logits [batch, classes], got one that "
            "fails on torch.float32 [1, 3] (addmm: mat1 and mat2 shapes cannot be multiplied (1x3 and 4x5)); "
            "check the shape of x"
        ),
    ),
    BadInput(
        "training.fit",
        "a learning rate as optimizer",
        lambda: train(optimizer=0.1),
        TypeError,
        (
            "optimizer must be a torch.optim.Optimizer over the model's parameters, got 0.1; write "
            "torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)"
        ),
    ),
    BadInput(
        "training.fit",
        "an optimizer of another model",
        lambda: train(optimizer=sgd_of_another()),
        ValueError,
        (
            "optimizer must be over parameters of the model, got 4 tensors that are none; build it after the "
            "model is on its device, from model.parameters()"
        ),
    ),
    BadInput(
        "training.fit",
        "epochs of 0",
        lambda: train(epochs=0),
        ValueError,
        "epochs must be an integer >= 1, got 0",
    ),
    BadInput(
        "training.fit",
        "epochs as a float",
        lambda: train(epochs=1.5),
        TypeError,
        "epochs must be an integer >= 1, got 1.5",
    ),
    BadInput(
        "training.fit",
        "a batch size of 0",
        lambda: train(batch_size=0),
        ValueError,
        "batch_size must be an integer >= 1, got 0",
    ),
    BadInput(
        "training.fit",
        "validation without an attack",
        lambda: train(validation=(X, Y)),
        ValueError,
        "validation_attack must be an attack where validation is given, got None; write PGD(threat_model=...)",
    ),
    BadInput(
        "training.fit",
        "an attack without validation",
        lambda: train(validation_attack=pgd()),
        ValueError,
        ("validation must be data where validation_attack is given, got None; hold examples out of the training"),
    ),
    BadInput(
        "training.fit",
        "validation labels of floats",
        lambda: train(validation=(X, Y.float()), validation_attack=pgd()),
        TypeError,
        "validation: y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "training.fit",
        "a schedule as a list",
        lambda: train(schedule=[0.1, 0.01]),
        TypeError,
        "schedule must be a function from progress in [0, 1) to a factor, got [0.1, 0.01]; write cosine",
    ),
    BadInput(
        "training.fit",
        "a schedule that turns negative",
        lambda: train(schedule=lambda progress: -1.0),
        ValueError,
        "schedule's factor must be a finite number >= 0, got -1.0",
    ),
    BadInput(
        "training.fit",
        "clip_norm of 0",
        lambda: train(clip_norm=0.0),
        ValueError,
        "clip_norm must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "training.fit",
        "amp of True",
        lambda: train(amp=True),
        TypeError,
        "amp must be False, 'bfloat16' or 'float16', got True; write amp='bfloat16'",
    ),
    BadInput(
        "training.fit",
        "an unknown precision",
        lambda: train(amp="int8"),
        ValueError,
        "amp must be one of 'bfloat16', 'float16', got 'int8'",
    ),
    BadInput(
        "training.fit",
        "float16 on a CPU",
        lambda: train(amp="float16"),
        ValueError,
        "amp must be 'bfloat16' or False on this device, got 'float16' on cpu; write amp='bfloat16'",
    ),
    BadInput(
        "training.fit",
        "augment that changes the shape",
        lambda: train(augment=lambda x, generator: x[:, :3]),
        ValueError,
        ("augment must be a function that returns a tensor like x, [6, 4] torch.float32, got [6, 3] torch.float32"),
    ),
    BadInput(
        "training.fit",
        "a seed as text",
        lambda: train(seed="0"),
        TypeError,
        "seed must be an integer >= 0, got '0'",
    ),
    BadInput(
        "training.fit",
        "a checkpoint in no folder",
        lambda: train(checkpoint=not_there()),
        FileNotFoundError,
        ("checkpoint must be a file in an existing folder, got .../nowhere/run.safetensors; make the folder .../nowhere first"),
    ),
    BadInput(
        "training.piecewise",
        "a factor below 0",
        lambda: piecewise({0.5: -0.1}),
        ValueError,
        "a factor must be a finite number >= 0, got -0.1",
    ),
    BadInput(
        "training.piecewise",
        "epochs in place of progress",
        lambda: piecewise({100: 0.1, 150: 0.01}),
        ValueError,
        "a progress must be a fraction of the steps below 1, got 100; divide by the number of epochs",
    ),
    BadInput(
        "training.piecewise",
        "a list",
        lambda: piecewise([0.5, 0.75]),
        TypeError,
        "factors must be a mapping from progress to factor, got [0.5, 0.75]; write {0.5: 0.1, 0.75: 0.01}",
    ),
    BadInput(
        "training.cosine",
        "progress as text",
        lambda: cosine("half"),
        TypeError,
        "progress must be a finite number, got 'half'",
    ),
    BadInput(
        "training.TrainingResult",
        "a folder below a file",
        lambda: train().save(__file__ + "/run"),
        FileNotFoundError,
        ("folder must be inside an existing folder, got ...bad_inputs_training.py/run; make ...bad_inputs_training.py first"),
    ),
    # objectives
    BadInput(
        "objectives.AdversarialTraining",
        "an attack class",
        lambda: AdversarialTraining(attack=FGSM),
        TypeError,
        ("attack must be an attack, got <class 'metarobust.attacks._gradient.FGSM'>; write FGSM(threat_model=...)"),
    ),
    BadInput(
        "objectives.AdversarialTraining",
        "a ball in place of an attack",
        lambda: AdversarialTraining(attack=BALL),
        TypeError,
        (
            "attack must be an attack, got ThreatModel(norm='linf', epsilon=0.1, lower=0.0, upper=1.0); write "
            "PGD(threat_model=...)"
        ),
    ),
    BadInput(
        "objectives.AdversarialTraining",
        "an unknown loss",
        lambda: AdversarialTraining(attack=ATTACK, loss="ce"),
        ValueError,
        "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'ce'",
    ),
    BadInput(
        "objectives.AdversarialTraining",
        "an averaged loss",
        lambda: AdversarialTraining(attack=ATTACK, loss=nn.CrossEntropyLoss())(network(), X, Y),
        ValueError,
        "loss must be a function that returns [6], got shape []; drop the mean",
    ),
    BadInput(
        "objectives.AdversarialTraining",
        "x in 0..255",
        lambda: OBJECTIVE(network(), PIXELS, Y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "objectives.AdversarialTraining",
        "an attack that returns another shape",
        lambda: AdversarialTraining(attack=lambda m, x, y, generator=None: x[:2])(network(), X, Y),
        ValueError,
        "attack must be a function that returns the moved x, [6, 4], got shape [2, 4]",
    ),
    BadInput(
        "objectives.TRADES",
        "neither ball nor attack",
        lambda: TRADES(),
        TypeError,
        "threat_model must be a ThreatModel, or an attack in its place, got None",
    ),
    BadInput(
        "objectives.TRADES",
        "ball and attack",
        lambda: TRADES(threat_model=BALL, attack=ATTACK),
        TypeError,
        (
            "threat_model must be None beside an attack, which has its own, got ThreatModel(norm='linf', "
            "epsilon=0.1, lower=0.0, upper=1.0)"
        ),
    ),
    BadInput(
        "objectives.TRADES",
        "a negative beta",
        lambda: TRADES(threat_model=BALL, beta=-6.0),
        ValueError,
        "beta must be a finite number >= 0, got -6.0",
    ),
    BadInput(
        "objectives.TRADES",
        "a start without noise",
        lambda: TRADES(threat_model=BALL, start_std=0.0),
        ValueError,
        "start_std must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "objectives.TRADES",
        "a step size in 8-bit units",
        lambda: TRADES(threat_model=BALL, step_size=2),
        ValueError,
        (
            "step_size must be at most 1 (= upper - lower) in input units for l_inf, got 2; for 8-bit images in "
            "[0, 1] write 2 / 255"
        ),
    ),
    BadInput(
        "objectives.TRADES",
        "y of floats",
        lambda: TRADES(threat_model=BALL)(network(), X, Y.float()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "objectives.TRADES",
        "beta of 0 with y of floats",
        lambda: TRADES(threat_model=BALL, beta=0)(network(), X, Y.float()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "objectives.MART",
        "an infinite beta",
        lambda: MART(attack=ATTACK, beta=float("inf")),
        ValueError,
        "beta must be a finite number >= 0, got inf",
    ),
    BadInput(
        "objectives.MART",
        "no attack",
        lambda: MART(attack=None),
        TypeError,
        "attack must be an attack, got None; write PGD(threat_model=...)",
    ),
    BadInput(
        "objectives.MART",
        "y beyond the classes",
        lambda: MART(attack=ATTACK)(network(), X, Y + 3),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 3 to 5; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "objectives.UDR",
        "an l1 ball",
        lambda: UDR(threat_model=DIAMOND),
        ValueError,
        "threat_model must be an l_inf ball for SoftHinge, got norm='l1'; write norm='linf'",
    ),
    BadInput(
        "objectives.UDR",
        "a negative multiplier",
        lambda: UDR(threat_model=BALL, multiplier=-1.0),
        ValueError,
        "multiplier must be a finite number > 0, got -1.0",
    ),
    BadInput(
        "objectives.UDR",
        "x of uint8",
        lambda: UDR(threat_model=BALL)(network(), BYTES, Y),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "objectives.BETATraining",
        "neither ball nor attack",
        lambda: BETATraining(),
        TypeError,
        "threat_model must be a ThreatModel, or a BETA as attack in its place, got None",
    ),
    BadInput(
        "objectives.BETATraining",
        "an attack that is no BETA",
        lambda: BETATraining(attack=ATTACK),
        TypeError,
        (
            "attack must be a BETA, got FGSM(threat_model=ThreatModel(norm='linf', epsilon=0.1, lower=0.0, "
            "upper=1.0), loss='cross_entropy', direction='adversary'); write BETA(threat_model=...), or use "
            "AdversarialTraining"
        ),
    ),
    BadInput(
        "objectives.BETATraining",
        "an unknown hypergradient",
        lambda: BETATraining(threat_model=BALL, hypergradient="jvp"),
        ValueError,
        "hypergradient must be one of 'none', 'unrolled', 'implicit', got 'jvp'",
    ),
    BadInput(
        "objectives.BETATraining",
        "implicit in l1",
        lambda: BETATraining(threat_model=DIAMOND, hypergradient="implicit"),
        ValueError,
        "norm must be 'linf' or 'l2' with hypergradient='implicit', got 'l1'; write hypergradient='unrolled'",
    ),
    BadInput(
        "objectives.BETATraining",
        "y beyond the classes",
        lambda: BETATraining(threat_model=BALL)(network(), X, Y + 3),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 3 to 5; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "objectives.SmoothedBETATraining",
        "a negative mu",
        lambda: SmoothedBETATraining(threat_model=BALL, mu=-1.0),
        ValueError,
        "mu must be a finite number >= 0, got -1.0",
    ),
    BadInput(
        "objectives.SmoothedBETATraining",
        "an attack that drops examples",
        lambda: SmoothedBETATraining(attack=BETA(threat_model=BALL, survivors_only=True), mu=1.0),
        ValueError,
        "survivors_only must be False in an attack to train on, got True",
    ),
    BadInput(
        "objectives.ARMOR",
        "a class of divergence",
        lambda: armor(divergence=KL),
        TypeError,
        (
            "divergence must be divergences.KL(), Alpha(order=...) or Renyi(order=...), got <class "
            "'metarobust.divergences._kl.KL'>"
        ),
    ),
    BadInput(
        "objectives.ARMOR",
        "a negative radius",
        lambda: armor(radius=-0.1),
        ValueError,
        "radius must be a finite number >= 0, got -0.1",
    ),
    BadInput(
        "objectives.ARMOR",
        "a natural weight above 1",
        lambda: armor(natural_weight=2.0),
        ValueError,
        "natural_weight must be a share from 0 to 1, got 2.0",
    ),
    BadInput(
        "objectives.ARMOR",
        "an attack as robust loss",
        lambda: armor(robust_loss=ATTACK)(network(), X, Y),
        ValueError,
        "robust_loss must be one that returns a loss per example, [6], got shape [6, 4]",
    ),
    BadInput(
        "objectives.ARMOR",
        "one robust class",
        lambda: armor(robust_classes=1),
        TypeError,
        ("robust_classes must be a tuple of class indices, got 1; write robust_classes=(1,), or leave it out for all classes"),
    ),
    BadInput(
        "objectives.ARMOR",
        "a robust class that is none",
        lambda: armor(robust_classes=(7,))(network(), X, Y),
        ValueError,
        "robust_classes must be below 3, the classes that the model has logits for, got 7",
    ),
    BadInput(
        "objectives.ARMOR",
        "steps without a transport cost",
        lambda: armor(steps=5),
        ValueError,
        "steps must be None without a transport cost, got 5; give it to the attack, or to UDR",
    ),
    BadInput(
        "objectives.ARMOR",
        "a transport cost without step size",
        lambda: armor(transport_cost=NormPower(weight=1.0)),
        ValueError,
        (
            "step_size must be given for NormPower(weight=1.0, norm='l2', power=2.0, lower=0.0, upper=1.0), "
            "which has no radius to take it from, got None; write step_size=2.5 * distance / 10 with the "
            "furthest distance that may pay off, in input units"
        ),
    ),
    BadInput(
        "objectives.ARMOR",
        "insertions for TRADES",
        lambda: armor(robust_loss=TRADES(threat_model=BALL), transport_cost=Insertion(weight=1.0)),
        TypeError,
        ("robust_loss must be AdversarialTraining for binary features, got TRADES; TRADES needs a start off the data"),
    ),
    BadInput(
        "objectives.ARMOR",
        "a model that explodes",
        lambda: armor()(lambda x: (x[:, :3] + 1) ** 5000, X, Y),
        FloatingPointError,
        (
            "the robust loss is NaN or infinite for 6 of 6 examples, the first in row 0 of the batch; lower the "
            "learning rate or clip gradients"
        ),
    ),
    BadInput(
        "objectives.ClassWeighted",
        "negative weights",
        lambda: ClassWeighted(robust_loss=OBJECTIVE, class_weights=[-1.0, 1.0, 1.0]),
        ValueError,
        "class_weights[0] must be a finite number > 0, got -1.0",
    ),
    BadInput(
        "objectives.ClassWeighted",
        "weights of other classes",
        lambda: ClassWeighted(robust_loss=OBJECTIVE, class_weights=[1.0, 1.0])(network(), X, Y),
        ValueError,
        "class_weights must be one for every label, got 2 for labels 0 to 2",
    ),
    BadInput(
        "objectives.ClassWeighted",
        "a count of 0",
        lambda: ClassWeighted.balanced(robust_loss=OBJECTIVE, class_counts=[0, 5, 5]),
        ValueError,
        "class_counts[0] must be an integer >= 1, got 0",
    ),
    BadInput(
        "objectives.ClassWeighted",
        "an attack as robust loss",
        lambda: ClassWeighted(robust_loss=ATTACK, class_weights=[1.0, 1.0, 1.0])(network(), X, Y),
        TypeError,
        (
            "robust_loss must be one that returns a loss per example, [6], got shape [6, 4]; for ARMOR write "
            "ARMOR(robust_loss=ClassWeighted(...), ...)"
        ),
    ),
    BadInput(
        "objectives.LogitAdjusted",
        "a count of 0",
        lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts=[0, 5, 5]),
        ValueError,
        "class_counts[0] must be an integer >= 1, got 0",
    ),
    BadInput(
        "objectives.LogitAdjusted",
        "counts of other classes",
        lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts=[5, 5])(network(), X, Y),
        ValueError,
        "class_counts must be one for each of the 3 classes that the model has logits for, got 2",
    ),
    BadInput(
        "objectives.LogitAdjusted",
        "counts as text",
        lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts="5,5,5"),
        TypeError,
        "class_counts must be a tuple with a number for each class, got str; write y.bincount().tolist()",
    ),
    BadInput(
        "objectives.LogitAdjusted",
        "a negative temperature",
        lambda: LogitAdjusted(robust_loss=OBJECTIVE, class_counts=[5, 5, 5], temperature=-1.0),
        ValueError,
        "temperature must be a finite number >= 0, got -1.0",
    ),
]
