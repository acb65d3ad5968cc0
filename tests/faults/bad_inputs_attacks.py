"""Bad inputs of metarobust.attacks."""

import numpy as np
import torch
import torchopt
from bad_inputs import (
    BALL,
    BYTES,
    DIAMOND,
    NORMALISED,
    NOWHERE,
    PIXELS,
    WITH_NAN,
    BadInput,
    X,
    Y,
    constant,
    network,
    pgd,
)
from torch import Tensor, nn

from metarobust.attacks import (
    APGD,
    BETA,
    FGSM,
    PGD,
    Adapted,
    Alternating,
    RandomRoundingFGSM,
    Square,
    TransportAscent,
    Unrolled,
    WorstCase,
)
from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import HardBall, Insertion, NormPower


def apgd(**changed: object) -> APGD:
    return APGD(threat_model=BALL, **{"steps": 3, **changed})


def beta(**changed: object) -> BETA:
    return BETA(threat_model=BALL, **{"steps": 3, **changed})


def square() -> Square:
    return Square(threat_model=BALL, queries=5)


def unrolled(**changed: object) -> Unrolled:
    return Unrolled(**{"threat_model": BALL, "update_rule": torchopt.sgd(0.1), "steps": 2, **changed})


def ascent(**changed: object) -> TransportAscent:
    return TransportAscent(**{"transport_cost": NormPower(weight=1.0), "step_size": 0.1, "steps": 2, **changed})


def adapted(find: object) -> Adapted:
    return Adapted(threat_model=BALL, find=find)


def one_row(x: Tensor) -> Tensor:
    return x.sum(1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :3], x


ROWS = [
    # Configuration
    BadInput(
        "attacks.FGSM",
        "epsilon in place of a threat model",
        lambda: FGSM(threat_model=8 / 255),
        TypeError,
        "threat_model must be a ThreatModel, got 0.03137254901960784",
    ),
    BadInput(
        "attacks.FGSM",
        "an unknown loss",
        lambda: FGSM(threat_model=BALL, loss="ce"),
        ValueError,
        "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'ce'",
    ),
    BadInput(
        "attacks.FGSM",
        "another spelling of a loss",
        lambda: FGSM(threat_model=BALL, loss="CrossEntropy"),
        ValueError,
        "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'CrossEntropy'; write 'cross_entropy'",
    ),
    BadInput(
        "attacks.FGSM",
        "a loss that is neither name nor function",
        lambda: FGSM(threat_model=BALL, loss=3),
        ValueError,
        "loss must be one of 'cross_entropy', 'margin', 'dlr', got 3",
    ),
    BadInput(
        "attacks.FGSM",
        "a list as loss",
        lambda: FGSM(threat_model=BALL, loss=["margin"]),
        ValueError,
        "loss must be one of 'cross_entropy', 'margin', 'dlr', got ['margin']",
    ),
    BadInput(
        "attacks.FGSM",
        "another spelling of a direction",
        lambda: FGSM(threat_model=BALL, direction="anti-adversary"),
        ValueError,
        "direction must be one of 'adversary', 'anti_adversary', got 'anti-adversary'; write 'anti_adversary'",
    ),
    BadInput(
        "attacks.FGSM",
        "a loss of two classes where three are needed",
        lambda: FGSM(threat_model=BALL, loss="dlr")(lambda x: x[:, :2], X, Y % 2),
        ValueError,
        "logits must be of at least 3 classes for the DLR loss, got 2; use loss='margin'",
    ),
    BadInput(
        "attacks.PGD",
        "steps of 0",
        lambda: PGD(threat_model=BALL, steps=0),
        ValueError,
        "steps must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.PGD",
        "steps as a float",
        lambda: PGD(threat_model=BALL, steps=10.0),
        TypeError,
        "steps must be an integer >= 1, got 10.0",
    ),
    BadInput(
        "attacks.PGD",
        "steps as a bool",
        lambda: PGD(threat_model=BALL, steps=True),
        TypeError,
        "steps must be an integer >= 1, got True",
    ),
    BadInput(
        "attacks.PGD",
        "a negative step size",
        lambda: PGD(threat_model=BALL, step_size=-0.1),
        ValueError,
        "step_size must be a finite number > 0, got -0.1",
    ),
    BadInput(
        "attacks.PGD",
        "a NaN step size",
        lambda: PGD(threat_model=BALL, step_size=float("nan")),
        ValueError,
        "step_size must be a finite number > 0, got nan",
    ),
    BadInput(
        "attacks.PGD",
        "step size as text",
        lambda: PGD(threat_model=BALL, step_size="2/255"),
        TypeError,
        "step_size must be a finite number > 0, got '2/255'",
    ),
    BadInput(
        "attacks.PGD",
        "a step size in 8-bit units",
        lambda: PGD(threat_model=BALL, step_size=2),
        ValueError,
        (
            "step_size must be at most 1 (= upper - lower) in input units for l_inf, got 2; for 8-bit images in "
            "[0, 1] write 2 / 255"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "restarts without noise",
        lambda: PGD(threat_model=BALL, restarts=5, random_start=False),
        ValueError,
        ("restarts must be 1 without a random start (every restart would be the same), got 5; write random_start=True"),
    ),
    BadInput(
        "attacks.PGD",
        "no threat model",
        lambda: PGD(threat_model=None),
        TypeError,
        "threat_model must be a ThreatModel, got None",
    ),
    # The batch
    BadInput(
        "attacks.PGD",
        "x of uint8",
        lambda: pgd()(network(), BYTES, Y),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "attacks.PGD",
        "x in 0..255",
        lambda: pgd()(network(), PIXELS, Y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "attacks.PGD",
        "x normalised outside the model",
        lambda: pgd()(network(), NORMALISED, Y),
        ValueError,
        (
            "x must be in the box [0, 1], got values in [-2, 2]; put normalisation inside the model "
            "(metarobust.models.Normalize) and pass x in input units"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "x with a NaN",
        lambda: pgd()(network(), WITH_NAN, Y),
        ValueError,
        "x must be finite, got NaN or infinite values; find them with x.isfinite().logical_not().nonzero()",
    ),
    BadInput(
        "attacks.PGD",
        "x with an infinite value",
        lambda: pgd()(network(), X / 0, Y),
        ValueError,
        "x must be finite, got NaN or infinite values; find them with x.isfinite().logical_not().nonzero()",
    ),
    BadInput(
        "attacks.PGD",
        "x as a NumPy array",
        lambda: pgd()(network(), X.numpy(), Y),
        TypeError,
        "x must be a floating-point tensor, got ndarray; write torch.from_numpy(x)",
    ),
    BadInput(
        "attacks.PGD",
        "x as a list",
        lambda: pgd()(network(), X.tolist(), Y),
        TypeError,
        "x must be a floating-point tensor, got list; write torch.tensor(x)",
    ),
    BadInput(
        "attacks.PGD",
        "x complex",
        lambda: pgd()(network(), X.to(torch.complex64), Y),
        TypeError,
        "x must be a floating-point tensor, got torch.complex64; write x.abs() or x.real",
    ),
    BadInput(
        "attacks.PGD",
        "x sparse",
        lambda: pgd()(network(), X.to_sparse(), Y),
        TypeError,
        "x must be a dense tensor, got the layout torch.sparse_coo; write x.to_dense()",
    ),
    BadInput(
        "attacks.PGD",
        "x a scalar",
        lambda: pgd()(network(), torch.tensor(0.5), Y),
        ValueError,
        "x must be of shape [batch, ...], got a scalar; for one example write x[None]",
    ),
    BadInput(
        "attacks.PGD",
        "x without values",
        lambda: pgd()(network(), NOWHERE, Y),
        ValueError,
        (
            "x must be a tensor with values, got one on the meta device, which has none; build or load it on the "
            "device of the model"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "y of floats",
        lambda: pgd()(network(), X, Y.float()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "attacks.PGD",
        "y of int32",
        lambda: pgd()(network(), X, Y.int()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.int32; write y.long()",
    ),
    BadInput(
        "attacks.PGD",
        "y one-hot",
        lambda: pgd()(network(), X, nn.functional.one_hot(Y)),
        ValueError,
        "y must be of shape [6], one label per example, got [6, 3]; for one-hot rows write y.argmax(dim=1)",
    ),
    BadInput(
        "attacks.PGD",
        "y one too short",
        lambda: pgd()(network(), X, Y[:5]),
        ValueError,
        "y must be of shape [6], one label per example, got [5]",
    ),
    BadInput(
        "attacks.PGD",
        "y a column",
        lambda: pgd()(network(), X, Y[:, None]),
        ValueError,
        "y must be of shape [6], one label per example, got [6, 1]; write y.flatten()",
    ),
    BadInput(
        "attacks.PGD",
        "y a list",
        lambda: pgd()(network(), X, [0, 1, 2, 0, 1, 2]),
        TypeError,
        "y must be class indices of dtype torch.int64, got list; write torch.tensor(y).long()",
    ),
    BadInput(
        "attacks.PGD",
        "y from 1",
        lambda: pgd()(network(), X, Y + 1),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "y of -100",
        lambda: pgd()(network(), X, Y - 100),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from -100 to -98; check "
            "the label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "y of 10**12",
        lambda: pgd()(network(), X, Y + 10**12),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 1000000000000 to "
            "1000000000002; check the label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "y on another device",
        lambda: pgd()(network(), X, torch.empty(6, dtype=torch.int64, device="meta")),
        ValueError,
        "y must be on the device of x, cpu, got meta; write y.to('cpu')",
    ),
    # The model
    BadInput(
        "attacks.PGD",
        "a model on another device",
        lambda: pgd()(network().to("meta"), X, Y),
        ValueError,
        (
            "model must be one with weights, got parameters on the meta device, which have no values; load its "
            "weights: model.load_state_dict(weights, assign=True)"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a path as model",
        lambda: pgd()("model.pt", X, Y),
        TypeError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got 'model.pt'; build "
            "the network and load its weights into it"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a state dict as model",
        lambda: pgd()({"weight": X}, X, Y),
        TypeError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got a dict; build the "
            "network and load its weights into it"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a class as model",
        lambda: pgd()(Pair, X, Y),
        TypeError,
        ("model must be a callable from inputs [batch, ...] to logits [batch, classes], got the class Pair; build it: Pair(...)"),
    ),
    BadInput(
        "attacks.PGD",
        "no model",
        lambda: pgd()(None, X, Y),
        TypeError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got None; pass an "
            "nn.Module or a function"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a model that returns a pair",
        lambda: pgd()(Pair(), X, Y),
        ValueError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got tuple for 6 "
            "inputs; wrap it: lambda x: model(x)[0]"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a model that returns one number per example",
        lambda: pgd()(one_row, X, Y),
        ValueError,
        ("model must be a callable from inputs [batch, ...] to logits [batch, classes], got an output of shape [6] for 6 inputs"),
    ),
    BadInput(
        "attacks.PGD",
        "a model that returns predictions",
        lambda: pgd()(lambda x: x.argmax(1), X, Y),
        ValueError,
        ("model must be a callable from inputs [batch, ...] to logits [batch, classes], got an output of shape [6] for 6 inputs"),
    ),
    BadInput(
        "attacks.PGD",
        "a model without a gradient",
        lambda: pgd()(constant, X, Y),
        ValueError,
        (
            "the model's logits must depend differentiably on x, got logits without a gradient; remove "
            "torch.no_grad(), .detach(), .round() or .argmax() from the model's forward pass"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a model under no_grad",
        lambda: pgd()(torch.no_grad()(network()), X, Y),
        ValueError,
        (
            "the model's logits must depend differentiably on x, got logits without a gradient; remove "
            "torch.no_grad(), .detach(), .round() or .argmax() from the model's forward pass"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a model that loses the batch",
        lambda: pgd()(lambda x: x[:1, :3], X, Y),
        ValueError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got an output of "
            "shape [1, 3] for 6 inputs"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a model for other shapes",
        lambda: pgd()(network(), torch.rand(6, 3, 8, 8), Y),
        ValueError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got one that fails on "
            "torch.float32 [6, 3, 8, 8] (addmm: mat1 and mat2 shapes cannot be multiplied (6x192 and 4x5)); "
            "check the shape of x"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a model of another dtype",
        lambda: pgd()(network().double(), X, Y),
        ValueError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got one that fails on "
            "torch.float32 [6, 4] (mat1 and mat2 must have the same dtype, but got Float and Double); write "
            "x.to(torch.float64), or model.to(torch.float32)"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a model in half precision",
        lambda: pgd()(network().half(), X, Y),
        ValueError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got one that fails on "
            "torch.float32 [6, 4] (mat1 and mat2 must have the same dtype, but got Float and Half); write "
            "x.to(torch.float16), or model.to(torch.float32)"
        ),
    ),
    BadInput(
        "attacks.PGD",
        "a loss that is averaged",
        lambda: PGD(threat_model=BALL, loss=nn.CrossEntropyLoss(), steps=2)(network(), X, Y),
        ValueError,
        ("loss must be a function that returns one loss per example, [6], got shape []; drop the mean: reduction='none'"),
    ),
    BadInput(
        "attacks.PGD",
        "a loss that is averaged, with restarts",
        lambda: PGD(threat_model=BALL, loss=nn.CrossEntropyLoss(), steps=2, restarts=2)(network(), X, Y),
        ValueError,
        ("loss must be a function that returns one loss per example, [12], got shape []; drop the mean: reduction='none'"),
    ),
    BadInput(
        "attacks.PGD",
        "a loss that returns a float",
        lambda: PGD(threat_model=BALL, loss=lambda z, y: 1.0, steps=2)(network(), X, Y),
        ValueError,
        ("loss must be a function that returns one loss per example, [6], got float; drop the mean: reduction='none'"),
    ),
    BadInput(
        "attacks.PGD",
        "a seed as generator",
        lambda: pgd()(network(), X, Y, generator=0),
        TypeError,
        ("generator must be a torch.Generator on the CPU or None, got 0; write torch.Generator().manual_seed(seed)"),
    ),
    BadInput(
        "attacks.PGD",
        "a NumPy generator",
        lambda: pgd()(network(), X, Y, generator=np.random.default_rng(0)),
        TypeError,
        (
            "generator must be a torch.Generator on the CPU or None, got Generator(PCG64) at ...; "
            "write torch.Generator().manual_seed(seed)"
        ),
    ),
    BadInput(
        "attacks.FGSM",
        "x in 0..255",
        lambda: FGSM(threat_model=BALL)(network(), PIXELS, Y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "attacks.FGSM",
        "y of floats",
        lambda: FGSM(threat_model=BALL)(network(), X, Y.float()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    # APGD
    BadInput(
        "attacks.APGD",
        "targets of 0",
        lambda: apgd(targets=0),
        ValueError,
        "targets must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.APGD",
        "targets as a name",
        lambda: apgd(targets="all"),
        TypeError,
        "targets must be an integer >= 1, got 'all'",
    ),
    BadInput(
        "attacks.APGD",
        "eot_samples of 0",
        lambda: apgd(eot_samples=0),
        ValueError,
        "eot_samples must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.APGD",
        "a memory budget as text",
        lambda: apgd(memory_budget="1GB"),
        TypeError,
        "memory_budget must be an integer >= 1, got '1GB'",
    ),
    BadInput(
        "attacks.APGD",
        "a memory budget of 0",
        lambda: apgd(memory_budget=0),
        ValueError,
        "memory_budget must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.APGD",
        "an unknown loss",
        lambda: apgd(loss="cw"),
        ValueError,
        "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'cw'",
    ),
    BadInput(
        "attacks.APGD",
        "two classes for the DLR loss",
        lambda: apgd(loss="dlr")(lambda x: x[:, :2], X, Y % 2),
        ValueError,
        "logits must be of at least 3 classes for the DLR loss, got 2; use loss='margin'",
    ),
    BadInput(
        "attacks.APGD",
        "three classes for the targeted DLR loss",
        lambda: apgd(loss="dlr", targets=2)(network(), X, Y),
        ValueError,
        "logits must be of at least 4 classes for the targeted DLR loss, got 3; use loss='margin'",
    ),
    BadInput(
        "attacks.APGD",
        "an untargeted loss for targets",
        lambda: apgd(loss=nn.CrossEntropyLoss(reduction="none"), targets=2)(network(), X, Y),
        TypeError,
        (
            "loss must be a function of (logits, y, target), got CrossEntropyLoss(input: "
            "torch.Tensor, target: torch.Tensor) -> torch.Tensor"
        ),
    ),
    BadInput(
        "attacks.APGD",
        "a loss that is averaged",
        lambda: apgd(loss=nn.CrossEntropyLoss())(network(), X, Y),
        ValueError,
        ("loss must be a function that returns one loss per example, [6], got shape []; drop the mean: reduction='none'"),
    ),
    BadInput(
        "attacks.APGD",
        "a start of another shape",
        lambda: apgd()(network(), X, Y, start=X[:5]),
        ValueError,
        "start must be of the shape of x, [6, 4], got [5, 4]",
    ),
    BadInput(
        "attacks.APGD",
        "a start outside the ball",
        lambda: apgd()(network(), X, Y, start=1 - X),
        ValueError,
        (
            "start must be inside ThreatModel(norm='linf', epsilon=0.1, lower=0.0, upper=1.0), got 6 examples "
            "outside; write threat_model.project(start, x)"
        ),
    ),
    BadInput(
        "attacks.APGD",
        "a start that is no tensor",
        lambda: apgd()(network(), X, Y, start=0.5),
        TypeError,
        "start must be a tensor of the shape of x, got float; write torch.tensor(start)",
    ),
    BadInput(
        "attacks.APGD",
        "a start with NaN",
        lambda: apgd()(network(), X, Y, start=WITH_NAN),
        ValueError,
        (
            "start must be inside ThreatModel(norm='linf', epsilon=0.1, lower=0.0, upper=1.0), got 1 examples "
            "outside; write threat_model.project(start, x)"
        ),
    ),
    BadInput(
        "attacks.APGD",
        "x of uint8",
        lambda: apgd()(network(), BYTES, Y),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "attacks.APGD",
        "a model of one class",
        lambda: apgd()(lambda x: x[:, :1], X, 0 * Y),
        ValueError,
        (
            "model must be a classifier with at least 2 logits per example, got 1; for one logit z of a binary "
            "model return torch.cat([0 * z, z], 1)"
        ),
    ),
    BadInput(
        "attacks.APGD",
        "a seed as generator",
        lambda: apgd()(network(), X, Y, generator=1),
        TypeError,
        ("generator must be a torch.Generator on the CPU or None, got 1; write torch.Generator().manual_seed(seed)"),
    ),
    # BETA
    BadInput(
        "attacks.BETA",
        "an unknown step rule",
        lambda: beta(step_rule="adam"),
        ValueError,
        "step_rule must be one of 'rmsprop', 'sign', 'apgd', got 'adam'",
    ),
    BadInput(
        "attacks.BETA",
        "unknown targets",
        lambda: beta(targets="random"),
        ValueError,
        "targets must be one of 'all', 'top_logits', 'nearest', 'halving', got 'random'",
    ),
    BadInput(
        "attacks.BETA",
        "targets without a count",
        lambda: beta(targets="top_logits"),
        ValueError,
        "target_count must be given with targets='top_logits', got None; write target_count=3",
    ),
    BadInput(
        "attacks.BETA",
        "a count without targets",
        lambda: beta(target_count=3),
        ValueError,
        ("target_count must be None with targets='all', got 3; write targets='top_logits' to bound the number of targets"),
    ),
    BadInput(
        "attacks.BETA",
        "targets as a number",
        lambda: beta(targets=9),
        ValueError,
        "targets must be one of 'all', 'top_logits', 'nearest', 'halving', got 9",
    ),
    BadInput(
        "attacks.BETA",
        "a model of one class",
        lambda: beta()(lambda x: x[:, :1], X, 0 * Y),
        ValueError,
        (
            "model must be a classifier with at least 2 logits per example, got 1; for one logit z of a binary "
            "model return torch.cat([0 * z, z], 1)"
        ),
    ),
    BadInput(
        "attacks.BETA",
        "each target of survivors only",
        lambda: beta(survivors_only=True).each_target(network(), X, Y),
        ValueError,
        "survivors_only must be False for a point of each target, got True",
    ),
    BadInput(
        "attacks.BETA",
        "y beyond the classes",
        lambda: beta()(network(), X, Y + 5),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 5 to 7; check the "
            "label encoding or the model's last layer"
        ),
    ),
    # Square
    BadInput(
        "attacks.Square",
        "l1",
        lambda: Square(threat_model=DIAMOND),
        ValueError,
        "norm must be 'linf' or 'l2' for Square, got 'l1'; for l1 write APGD(..., loss='margin')",
    ),
    BadInput(
        "attacks.Square",
        "no query",
        lambda: Square(threat_model=BALL, queries=0),
        ValueError,
        "queries must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.Square",
        "a fraction of 0",
        lambda: Square(threat_model=BALL, initial_fraction=0.0),
        ValueError,
        "initial_fraction must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "attacks.Square",
        "a fraction in per cent",
        lambda: Square(threat_model=BALL, initial_fraction=80),
        ValueError,
        "initial_fraction must be at most 1 (the whole input), got 80",
    ),
    BadInput(
        "attacks.Square",
        "x in 0..255",
        lambda: square()(network(), PIXELS, Y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "attacks.Square",
        "a loss that is averaged",
        lambda: Square(threat_model=BALL, loss=nn.CrossEntropyLoss(), queries=5)(network(), X, Y),
        ValueError,
        ("loss must be a function that returns one loss per example, [6], got shape []; drop the mean: reduction='none'"),
    ),
    BadInput(
        "attacks.Square",
        "a start outside the box",
        lambda: square()(network(), X, Y, start=X + 1),
        ValueError,
        (
            "start must be inside ThreatModel(norm='linf', epsilon=0.1, lower=0.0, upper=1.0), got 6 examples "
            "outside; write threat_model.project(start, x)"
        ),
    ),
    BadInput(
        "attacks.Square",
        "a model that returns a pair",
        lambda: square()(Pair(), X, Y),
        ValueError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got tuple for 6 "
            "inputs; wrap it: lambda x: model(x)[0]"
        ),
    ),
    # Alternating
    BadInput(
        "attacks.Alternating",
        "negative rounds",
        lambda: Alternating(threat_model=BALL, rounds=-1),
        ValueError,
        "rounds must be an integer >= 0, got -1",
    ),
    BadInput(
        "attacks.Alternating",
        "closest in per cent",
        lambda: Alternating(threat_model=BALL, closest=15),
        ValueError,
        "closest must be at most 1 (every standing example), got 15",
    ),
    BadInput(
        "attacks.Alternating",
        "no threat model",
        lambda: Alternating(threat_model="linf"),
        TypeError,
        "threat_model must be a ThreatModel, got 'linf'",
    ),
    BadInput(
        "attacks.Alternating",
        "y of floats",
        lambda: Alternating(threat_model=BALL, steps=2, queries=2)(network(), X, Y.double()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float64; write y.long()",
    ),
    # Unrolled
    BadInput(
        "attacks.Unrolled",
        "a torch optimizer as rule",
        lambda: unrolled(update_rule=torch.optim.SGD),
        TypeError,
        (
            "update_rule must be a TorchOpt GradientTransformation, got <class 'torch.optim.sgd.SGD'>; write "
            "torchopt.sgd(0.1), or meta_optimizer.as_gradient_transformation(total_steps=..., stacked=True)"
        ),
    ),
    BadInput(
        "attacks.Unrolled",
        "a truncation of 0",
        lambda: unrolled(truncation=0),
        ValueError,
        "truncation must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.Unrolled",
        "steps of 0",
        lambda: unrolled(steps=0),
        ValueError,
        "steps must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.Unrolled",
        "a model without a gradient",
        lambda: unrolled()(constant, X, Y),
        ValueError,
        (
            "the model's logits must depend differentiably on x, got logits without a gradient; remove "
            "torch.no_grad(), .detach(), .round() or .argmax() from the model's forward pass"
        ),
    ),
    BadInput(
        "attacks.Unrolled",
        "x with a NaN",
        lambda: unrolled()(network(), WITH_NAN, Y),
        ValueError,
        "x must be finite, got NaN or infinite values; find them with x.isfinite().logical_not().nonzero()",
    ),
    BadInput(
        "attacks.Unrolled",
        "a loss that is averaged",
        lambda: unrolled(loss=nn.CrossEntropyLoss())(network(), X, Y),
        ValueError,
        ("loss must be a function that returns one loss per example, [6], got shape []; drop the mean: reduction='none'"),
    ),
    # TransportAscent
    BadInput(
        "attacks.TransportAscent",
        "a ball in place of a cost",
        lambda: TransportAscent(transport_cost=BALL),
        TypeError,
        (
            "transport_cost must be a transport cost, as NormPower(weight=1.0), got ThreatModel(norm='linf', "
            "epsilon=0.1, lower=0.0, upper=1.0)"
        ),
    ),
    BadInput(
        "attacks.TransportAscent",
        "a class in place of a cost",
        lambda: TransportAscent(transport_cost=HardBall),
        TypeError,
        ("transport_cost must be a transport cost, as NormPower(weight=1.0), got <class 'metarobust.transport_costs.HardBall'>"),
    ),
    BadInput(
        "attacks.TransportAscent",
        "a negative scale",
        lambda: ascent(scale=-1.0),
        ValueError,
        "scale must be a number >= 0 (inf allows only what costs nothing), got -1.0",
    ),
    BadInput(
        "attacks.TransportAscent",
        "a NaN scale",
        lambda: ascent(scale=float("nan")),
        ValueError,
        "scale must be a number >= 0 (inf allows only what costs nothing), got nan",
    ),
    BadInput(
        "attacks.TransportAscent",
        "no step size without a radius",
        lambda: ascent(step_size=None),
        ValueError,
        (
            "step_size must be given for NormPower(weight=1.0, norm='l2', power=2.0, lower=0.0, upper=1.0), "
            "which has no radius to take it from, got None; write step_size=2.5 * distance / 2 with the furthest "
            "distance that may pay off, in input units"
        ),
    ),
    BadInput(
        "attacks.TransportAscent",
        "half a bit",
        lambda: TransportAscent(transport_cost=Insertion(weight=1.0), step_size=0.5),
        TypeError,
        "step_size (the bits of one step) must be an integer >= 1, got 0.5",
    ),
    BadInput(
        "attacks.TransportAscent",
        "x that is not binary",
        lambda: TransportAscent(transport_cost=Insertion(weight=1.0))(network(), X, Y),
        ValueError,
        (
            "x must be 0 or 1 everywhere for an attack that inserts bits, got 22 other values; write (x > "
            "0.5).to(x.dtype), or take NormPower(norm='l1') for inputs in between"
        ),
    ),
    BadInput(
        "attacks.TransportAscent",
        "x in 0..255",
        lambda: ascent()(network(), PIXELS, Y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    BadInput(
        "attacks.TransportAscent",
        "rescale returns a tensor",
        lambda: ascent().search(network(), X, Y, rescale=lambda a, b: a.mean()),
        TypeError,
        "the result of rescale must be a number >= 0 (inf allows only what costs nothing), got tensor(1.1322)",
    ),
    # RandomRoundingFGSM
    BadInput(
        "attacks.RandomRoundingFGSM",
        "x that is not binary",
        lambda: RandomRoundingFGSM()(network(), X, Y),
        ValueError,
        (
            "x must be 0 or 1 everywhere for an attack that inserts bits, got 22 other values; write (x > "
            "0.5).to(x.dtype), or take NormPower(norm='l1') for inputs in between"
        ),
    ),
    BadInput(
        "attacks.RandomRoundingFGSM",
        "a step size of 0",
        lambda: RandomRoundingFGSM(step_size=0.0),
        ValueError,
        "step_size must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "attacks.RandomRoundingFGSM",
        "steps of 0",
        lambda: RandomRoundingFGSM(steps=0),
        ValueError,
        "steps must be an integer >= 1, got 0",
    ),
    BadInput(
        "attacks.RandomRoundingFGSM",
        "a ball in l2",
        lambda: RandomRoundingFGSM(threat_model=ThreatModel(norm="l2", epsilon=1.0)),
        ValueError,
        (
            "threat_model must be an l1 ball on the box [0, 1], got ThreatModel(norm='l2', epsilon=1.0, "
            "lower=0.0, upper=1.0); write ThreatModel(norm='l1', epsilon=5) for at most 5 insertions"
        ),
    ),
    # WorstCase
    BadInput(
        "attacks.WorstCase",
        "one attack in place of several",
        lambda: WorstCase(pgd()),
        TypeError,
        "attacks must be a sequence of attacks, got PGD; write [FGSM(...), PGD(...)]",
    ),
    BadInput(
        "attacks.WorstCase",
        "no attack",
        lambda: WorstCase([]),
        ValueError,
        "attacks must be at least one attack, got none",
    ),
    BadInput(
        "attacks.WorstCase",
        "a name of an attack",
        lambda: WorstCase(["pgd"]),
        TypeError,
        "attacks must be a sequence of attacks, got an element 'pgd'; write [FGSM(...), PGD(...)]",
    ),
    BadInput(
        "attacks.WorstCase",
        "two threat models",
        lambda: WorstCase([pgd(), PGD(threat_model=ThreatModel(norm="linf", epsilon=0.2))]),
        ValueError,
        (
            "attacks must be of one threat model, got ThreatModel(norm='linf', epsilon=0.1, lower=0.0, "
            "upper=1.0) and ThreatModel(norm='linf', epsilon=0.2, lower=0.0, upper=1.0)"
        ),
    ),
    BadInput(
        "attacks.WorstCase",
        "an attack class",
        lambda: WorstCase([PGD]),
        TypeError,
        (
            "attacks must be a sequence of attacks, got an element <class 'metarobust.attacks._gradient.PGD'>; "
            "write [FGSM(...), PGD(...)]"
        ),
    ),
    BadInput(
        "attacks.WorstCase",
        "y beyond the classes",
        lambda: WorstCase([pgd()])(network(), X, Y + 3),
        ValueError,
        (
            "y must be in [0, 3), the classes that the model has logits for, got labels from 3 to 5; check the "
            "label encoding or the model's last layer"
        ),
    ),
    BadInput(
        "attacks.WorstCase",
        "x in 0..255 for attacks without a ball",
        lambda: WorstCase([lambda m, x, y, generator: x])("model.pt", X, Y),
        TypeError,
        (
            "model must be a callable from inputs [batch, ...] to logits [batch, classes], got 'model.pt'; build "
            "the network and load its weights into it"
        ),
    ),
    # Adapted
    BadInput(
        "attacks.Adapted",
        "an attack class in place of a function",
        lambda: adapted(PGD),
        TypeError,
        (
            "find must be a function of model, x and y, got <class 'metarobust.attacks._gradient.PGD'>; write "
            "lambda model, x, y: torchattacks.PGD(model, eps=8 / 255)(x, y)"
        ),
    ),
    BadInput(
        "attacks.Adapted",
        "a function that leaves the ball",
        lambda: adapted(lambda m, x, y: 1 - x)(network(), X, Y),
        ValueError,
        (
            "find must be a function that stays inside ThreatModel(norm='linf', epsilon=0.1, lower=0.0, "
            "upper=1.0), got 0.9 beyond it; give it the same norm and epsilon, in input units, and the same box"
        ),
    ),
    BadInput(
        "attacks.Adapted",
        "a function that returns NaN",
        lambda: adapted(lambda m, x, y: x / 0 * 0)(network(), X, Y),
        ValueError,
        "find must be a function that returns finite values, got NaN or infinite ones",
    ),
    BadInput(
        "attacks.Adapted",
        "a function that returns a NumPy array",
        lambda: adapted(lambda m, x, y: x.numpy())(network(), X, Y),
        TypeError,
        "find must be a function that returns the moved examples, got ndarray",
    ),
    BadInput(
        "attacks.Adapted",
        "a function that drops rows",
        lambda: adapted(lambda m, x, y: x[:3])(network(), X, Y),
        ValueError,
        "find must be a function that returns [6, 4], got [3, 4]",
    ),
    BadInput(
        "attacks.Adapted",
        "a negative tolerance",
        lambda: Adapted(threat_model=BALL, find=lambda m, x, y: x, tolerance=-1),
        ValueError,
        "tolerance must be a finite number >= 0, got -1",
    ),
    BadInput(
        "attacks.Adapted",
        "no threat model",
        lambda: Adapted(threat_model=0.1, find=lambda m, x, y: x),
        TypeError,
        "threat_model must be a ThreatModel, got 0.1",
    ),
]
