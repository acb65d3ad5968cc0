"""Bad inputs of metarobust.data and metarobust.bounds."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from bad_inputs import BALL, BYTES, DIAMOND, NOWHERE, WITH_NAN, BadInput, X, Y, generator, labelled

from metarobust.bounds import adversarial_risk_bound, plot_curve, risk_curve, sinkhorn_risk
from metarobust.data import (
    LabelledImages,
    LowDataTasks,
    digits_pools,
    load,
    load_npz,
    long_tail,
    minibatch,
    noise_matrix,
    split,
    split_meta,
    with_label_noise,
)

IMAGES = torch.rand(6, 1, 8, 8, generator=generator())


def npz(**arrays: object) -> Path:
    """A new .npz file."""
    path = Path(tempfile.mkdtemp()) / "some.npz"
    np.savez(path, **arrays)
    return path


def text_file() -> Path:
    path = Path(tempfile.mkdtemp()) / "some.npz"
    path.write_text("no archive")
    return path


def bound(x: object = X, y: object = Y, ball: object = BALL, **settings: object) -> object:
    return adversarial_risk_bound(x, y, ball, **settings)


ROWS = [
    # LabelledImages
    BadInput(
        "data.LabelledImages",
        "images of bytes",
        lambda: LabelledImages((255 * IMAGES).byte(), Y, 3),
        TypeError,
        ("images must be floating point in [0, 1], got dtype uint8; for 8-bit images write images.float() / 255"),
    ),
    BadInput(
        "data.LabelledImages",
        "images in 0..255",
        lambda: LabelledImages(255 * IMAGES, Y, 3),
        ValueError,
        (
            "images must be finite and in [0, 1], got values from 0.315185 to 254.951; write images / 255 for "
            "8-bit values, and put any normalisation inside the model"
        ),
    ),
    BadInput(
        "data.LabelledImages",
        "normalised images",
        lambda: LabelledImages(4 * IMAGES - 2, Y, 3),
        ValueError,
        (
            "images must be finite and in [0, 1], got values from -1.99506 to 1.99923; write images / 255 for "
            "8-bit values, and put any normalisation inside the model"
        ),
    ),
    BadInput(
        "data.LabelledImages",
        "images with a NaN",
        lambda: LabelledImages(IMAGES * torch.nan, Y, 3),
        ValueError,
        (
            "images must be finite and in [0, 1], got values from nan to nan; write images / 255 for 8-bit "
            "values, and put any normalisation inside the model"
        ),
    ),
    BadInput(
        "data.LabelledImages",
        "images without channels",
        lambda: LabelledImages(IMAGES[:, 0], Y, 3),
        ValueError,
        ("images must be of shape [n, channels, height, width], got [6, 8, 8]; for [n, height, width] write images.unsqueeze(1)"),
    ),
    BadInput(
        "data.LabelledImages",
        "images as an array",
        lambda: LabelledImages(IMAGES.numpy(), Y, 3),
        TypeError,
        "images must be a tensor, floating point in [0, 1], got ndarray; write torch.from_numpy(images)",
    ),
    BadInput(
        "data.LabelledImages",
        "labels of floats",
        lambda: LabelledImages(IMAGES, Y.float(), 3),
        TypeError,
        "labels must be integers (torch.int64) in [0, 3), got dtype float32; write labels.long()",
    ),
    BadInput(
        "data.LabelledImages",
        "labels from 1",
        lambda: LabelledImages(IMAGES, Y + 1, 3),
        ValueError,
        (
            "labels must be integers (torch.int64) in [0, 3), got values from 1 to 3; number the classes from 0 "
            "and write num_classes=int(labels.max()) + 1"
        ),
    ),
    BadInput(
        "data.LabelledImages",
        "too few labels",
        lambda: LabelledImages(IMAGES, Y[:5], 3),
        ValueError,
        ("labels must be of shape [6], one label per image, got [5]; for one-hot rows write labels.argmax(dim=1)"),
    ),
    BadInput(
        "data.LabelledImages",
        "no number of classes",
        lambda: LabelledImages(IMAGES, Y, None),
        TypeError,
        "num_classes must be an integer >= 1, got None",
    ),
    BadInput(
        "data.LabelledImages",
        "labels on another device",
        lambda: LabelledImages(IMAGES, Y.to("meta"), 3),
        ValueError,
        "labels must be on the device of the images, cpu, got meta; write labels.to(images.device)",
    ),
    BadInput(
        "data.LabelledImages",
        "images without values",
        lambda: LabelledImages(IMAGES.to("meta"), Y.to("meta"), 3),
        ValueError,
        (
            "images must be a tensor with values, got one on the meta device, which has none; build or load it "
            "on the device of the model"
        ),
    ),
    BadInput(
        "data.LabelledImages",
        "select rows that are not there",
        lambda: labelled().select(torch.tensor([99])),
        ValueError,
        "indices must be in [0, 30), the rows of the data set, got indices from 99 to 99",
    ),
    BadInput(
        "data.LabelledImages",
        "select by floats",
        lambda: labelled().select(torch.tensor([1.0])),
        TypeError,
        (
            "indices must be integers (torch.int64) of shape [m], got dtype float32 and shape [1]; for a mask "
            "write mask.nonzero().flatten()"
        ),
    ),
    BadInput(
        "data.LabelledImages",
        "select by a list",
        lambda: labelled().select([0, 1]),
        TypeError,
        "indices must be integers (torch.int64) of shape [m], got list; write torch.tensor(indices)",
    ),
    # Files
    BadInput(
        "data.load_npz",
        "no such file",
        lambda: load_npz("nowhere/some.npz"),
        FileNotFoundError,
        (
            "path must be an .npz file, got nowhere/some.npz, which does not exist; write it with "
            "numpy.savez(path, images=images, labels=labels)"
        ),
    ),
    BadInput(
        "data.load_npz",
        "a text file",
        lambda: load_npz(text_file()),
        ValueError,
        (
            "path must be an .npz archive, got .../some.npz, which is of another kind; write it "
            "with numpy.savez(path, images=images, labels=labels)"
        ),
    ),
    BadInput(
        "data.load_npz",
        "other names",
        lambda: load_npz(npz(x=np.zeros((2, 8, 8)), y=np.zeros(2))),
        KeyError,
        (
            "the arrays must be named 'images' and 'labels', got ['x', 'y'] in .../some.npz; write "
            "it with numpy.savez(path, images=images, labels=labels)"
        ),
    ),
    BadInput(
        "data.load_npz",
        "images of int64",
        lambda: load_npz(npz(images=np.zeros((2, 8, 8), dtype=np.int64), labels=np.zeros(2, dtype=int))),
        TypeError,
        (
            "images must be uint8 in [0, 255] or floating point in [0, 1], got dtype int64 in "
            ".../some.npz; for 8-bit values write images.astype(numpy.uint8)"
        ),
    ),
    BadInput(
        "data.load_npz",
        "labels of floats",
        lambda: load_npz(npz(images=np.zeros((2, 8, 8)), labels=np.zeros(2))),
        TypeError,
        ("labels must be integers, got dtype float64 in .../some.npz; write labels.astype(numpy.int64)"),
    ),
    BadInput(
        "data.load_npz",
        "channels first",
        lambda: load_npz(npz(images=np.zeros((2, 3, 8, 8)), labels=np.zeros(2, dtype=int))),
        ValueError,
        (
            "images must be of shape [n, height, width] or [n, height, width, channels] with 1, 3 or 4 channels, "
            "got [2, 3, 8, 8]; for [n, channels, height, width] write images.transpose(0, 2, 3, 1)"
        ),
    ),
    BadInput(
        "data.load_npz",
        "images beyond 1",
        lambda: load_npz(npz(images=np.full((2, 8, 8), 255.0), labels=np.zeros(2, dtype=int))),
        ValueError,
        (
            "images must be finite and in [0, 1], got values from 255 to 255; write images / 255 for 8-bit "
            "values, and put any normalisation inside the model"
        ),
    ),
    BadInput(
        "data.load_npz",
        "pickled objects",
        lambda: load_npz(npz(images=np.array([{}, {}], dtype=object), labels=np.zeros(2, dtype=int))),
        ValueError,
        (
            "images and labels must be plain numeric arrays, got objects in .../some.npz; convert "
            "them with numpy.stack or .astype before saving"
        ),
    ),
    BadInput(
        "data.load_npz",
        "fewer classes than labels",
        lambda: load_npz(npz(images=np.zeros((2, 8, 8)), labels=np.array([0, 5])), num_classes=3),
        ValueError,
        (
            "labels must be integers (torch.int64) in [0, 3), got values from 0 to 5; number the classes from 0 "
            "and write num_classes=int(labels.max()) + 1"
        ),
    ),
    BadInput(
        "data.load",
        "an unknown name",
        lambda: load("imagenet", train=True),
        ValueError,
        "name must be one of 'digits', 'mnist', 'fashion-mnist', 'cifar10', 'cifar100', got 'imagenet'",
    ),
    BadInput(
        "data.load",
        "another spelling",
        lambda: load("FashionMNIST", train=True),
        ValueError,
        (
            "name must be one of 'digits', 'mnist', 'fashion-mnist', 'cifar10', 'cifar100', got 'FashionMNIST'; "
            "write 'fashion-mnist'"
        ),
    ),
    BadInput(
        "data.load",
        "train as text",
        lambda: load("digits", train="test"),
        TypeError,
        "train must be True or False, got 'test'",
    ),
    BadInput(
        "data.load",
        "an empty root",
        lambda: load("mnist", train=True, root="nowhere"),
        FileNotFoundError,
        (
            "root must be a torchvision root that holds mnist, got nowhere, which has no intact copy of it; "
            "write download=True to fetch it, or set root= or METAROBUST_DATA to a folder that has it"
        ),
    ),
    BadInput(
        "data.digits_pools",
        "seed as text",
        lambda: digits_pools("0"),
        TypeError,
        "seed must be an integer >= 0, got '0'",
    ),
    # Parts
    BadInput(
        "data.split",
        "more than there is",
        lambda: split(labelled(), (20, 20), generator=generator()),
        ValueError,
        ("sizes must be of a sum of at most 30, the length of the data set, got [20, 20] with the sum 40; write smaller sizes"),
    ),
    BadInput(
        "data.split",
        "a negative size",
        lambda: split(labelled(), (-1, 20), generator=generator()),
        ValueError,
        "each of sizes must be an integer >= 0, got -1",
    ),
    BadInput(
        "data.split",
        "shares in place of sizes",
        lambda: split(labelled(), (0.8, 0.2), generator=generator()),
        TypeError,
        "each of sizes must be an integer >= 0, got 0.8",
    ),
    BadInput(
        "data.split",
        "one size",
        lambda: split(labelled(), 20, generator=generator()),
        TypeError,
        "sizes must be a list, got 20; write sizes=(700, 300)",
    ),
    BadInput(
        "data.split",
        "no generator",
        lambda: split(labelled(), (20,), generator=None),
        TypeError,
        "generator must be a torch.Generator on the CPU, got None; write torch.Generator().manual_seed(seed)",
    ),
    BadInput(
        "data.split",
        "a seed as generator",
        lambda: split(labelled(), (20,), generator=0),
        TypeError,
        "generator must be a torch.Generator on the CPU, got 0; write torch.Generator().manual_seed(seed)",
    ),
    BadInput(
        "data.split",
        "a pair of tensors",
        lambda: split((X, Y), (2,), generator=generator()),
        TypeError,
        "dataset must be a LabelledImages, got tuple; write LabelledImages(images, labels, num_classes)",
    ),
    BadInput(
        "data.split_meta",
        "more than a class has",
        lambda: split_meta(labelled(), 11, generator=generator()),
        ValueError,
        (
            "per_class must be at most 10 here, the number of examples of class 0, got 11; write a smaller "
            "number, or pass a data set with more examples of that class"
        ),
    ),
    BadInput(
        "data.split_meta",
        "none per class",
        lambda: split_meta(labelled(), 0, generator=generator()),
        ValueError,
        "per_class must be an integer >= 1, got 0",
    ),
    BadInput(
        "data.minibatch",
        "a size of 0",
        lambda: minibatch(labelled(), 0, generator=generator()),
        ValueError,
        "size must be an integer >= 1, got 0",
    ),
    BadInput(
        "data.minibatch",
        "a size as a float",
        lambda: minibatch(labelled(), 8.0, generator=generator()),
        TypeError,
        "size must be an integer >= 1, got 8.0",
    ),
    BadInput(
        "data.minibatch",
        "no generator",
        lambda: minibatch(labelled(), 8, generator=None),
        TypeError,
        "generator must be a torch.Generator on the CPU, got None; write torch.Generator().manual_seed(seed)",
    ),
    BadInput(
        "data.long_tail",
        "a factor below 1",
        lambda: long_tail(labelled(), factor=0.1, generator=generator()),
        ValueError,
        "factor must be a finite number >= 1, got 0.1",
    ),
    BadInput(
        "data.long_tail",
        "a factor as text",
        lambda: long_tail(labelled(), factor="10", generator=generator()),
        TypeError,
        "factor must be a finite number >= 1, got '10'",
    ),
    BadInput(
        "data.long_tail",
        "an order that leaves out a class",
        lambda: long_tail(labelled(), factor=2, order=[0, 1], generator=generator()),
        ValueError,
        "order must be a permutation of 0, ..., 2, got [0, 1]; name every class once, from head to tail",
    ),
    BadInput(
        "data.long_tail",
        "a head larger than the class",
        lambda: long_tail(labelled(), factor=2, head=100, generator=generator()),
        ValueError,
        (
            "head must be small enough for the examples of every class, got 100, of which class 0 is to keep 100 "
            "but has 10; write a smaller head, or an order with that class nearer to the tail"
        ),
    ),
    BadInput(
        "data.noise_matrix",
        "an unknown kind",
        lambda: noise_matrix("symmetric", 0.2, 10),
        ValueError,
        "kind must be one of 'uniform', 'flip1', 'flip2', 'pair', got 'symmetric'",
    ),
    BadInput(
        "data.noise_matrix",
        "a rate in per cent",
        lambda: noise_matrix("uniform", 20, 10),
        ValueError,
        "rate must be a probability in [0, 1], got 20; for a percentage write rate / 100",
    ),
    BadInput(
        "data.noise_matrix",
        "one class",
        lambda: noise_matrix("uniform", 0.2, 1),
        ValueError,
        "num_classes must be an integer >= 2, got 1",
    ),
    BadInput(
        "data.noise_matrix",
        "two classes for flip2",
        lambda: noise_matrix("flip2", 0.2, 2, generator=generator()),
        ValueError,
        "num_classes must be at least 3 for 'flip2', got 2; write 'flip1'",
    ),
    BadInput(
        "data.noise_matrix",
        "no generator where one is needed",
        lambda: noise_matrix("flip1", 0.2, 10),
        ValueError,
        ("generator must be given for 'flip1', whose classes are random, got None; write torch.Generator().manual_seed(seed)"),
    ),
    BadInput(
        "data.noise_matrix",
        "a seed as generator",
        lambda: noise_matrix("flip1", 0.2, 10, generator=0),
        TypeError,
        "generator must be a torch.Generator on the CPU, got 0; write torch.Generator().manual_seed(seed)",
    ),
    BadInput(
        "data.with_label_noise",
        "a rate in place of a matrix",
        lambda: with_label_noise(labelled(), 0.2, generator=generator()),
        TypeError,
        ("matrix must be a floating-point tensor [3, 3], row = true class, got float; write torch.tensor(matrix)"),
    ),
    BadInput(
        "data.with_label_noise",
        "a matrix for other classes",
        lambda: with_label_noise(labelled(), torch.eye(10), generator=generator()),
        ValueError,
        (
            "matrix must be a floating-point tensor [3, 3], row = true class, got [10, 10]; pass "
            "num_classes=dataset.num_classes to noise_matrix"
        ),
    ),
    BadInput(
        "data.with_label_noise",
        "rows that do not sum to 1",
        lambda: with_label_noise(labelled(), 0.9 * torch.eye(3), generator=generator()),
        ValueError,
        (
            "matrix must be one whose rows sum to 1 (to within 1e-9), got the sum 0.8999999762 in row 0; write "
            "matrix.double() / matrix.double().sum(1, keepdim=True)"
        ),
    ),
    BadInput(
        "data.with_label_noise",
        "integer matrix",
        lambda: with_label_noise(labelled(), torch.eye(3).long(), generator=generator()),
        TypeError,
        ("matrix must be a floating-point tensor [3, 3], row = true class, got torch.int64; write matrix.double()"),
    ),
    BadInput(
        "data.with_label_noise",
        "a matrix of NaN",
        lambda: with_label_noise(labelled(), torch.eye(3) * torch.nan, generator=generator()),
        ValueError,
        "matrix must be of probabilities in [0, 1], got values from nan to nan",
    ),
    BadInput(
        "data.LowDataTasks",
        "more examples than there are",
        lambda: LowDataTasks(dataset=labelled(), examples=1000),
        ValueError,
        (
            "examples must be at most 30 here, where class 0 has 10 rows, got 1000, which takes 334 rows of "
            "every class; write a smaller number, or pass a data set with more rows of that class"
        ),
    ),
    BadInput(
        "data.LowDataTasks",
        "no examples",
        lambda: LowDataTasks(dataset=labelled(), examples=0),
        ValueError,
        (
            "examples must be an integer >= 1 or a range (low, high) with 1 <= low <= high, got 0; write "
            "examples=100 or examples=(50, 200)"
        ),
    ),
    BadInput(
        "data.LowDataTasks",
        "an empty range",
        lambda: LowDataTasks(dataset=labelled(), examples=(20, 10)),
        ValueError,
        (
            "examples must be an integer >= 1 or a range (low, high) with 1 <= low <= high, got (20, 10); write "
            "examples=100 or examples=(50, 200)"
        ),
    ),
    BadInput(
        "data.LowDataTasks",
        "a pair of tensors",
        lambda: LowDataTasks(dataset=(X, Y), examples=3),
        TypeError,
        "dataset must be a LabelledImages, got tuple; write LabelledImages(images, labels, num_classes)",
    ),
    BadInput(
        "data.LowDataTasks",
        "no generator",
        lambda: LowDataTasks(dataset=labelled(), examples=9).sample(None),
        TypeError,
        "generator must be a torch.Generator on the CPU, got None; write torch.Generator().manual_seed(seed)",
    ),
    # bounds
    BadInput(
        "bounds.adversarial_risk_bound",
        "epsilon in place of a threat model",
        lambda: bound(ball=0.1),
        TypeError,
        "threat_model must be a ThreatModel, got 0.1",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "l1",
        lambda: bound(ball=DIAMOND),
        ValueError,
        "norm must be 'l2' or 'linf', got 'l1'; l1 balls have no such solver here",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "x of uint8",
        lambda: bound(BYTES),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "x with a NaN",
        lambda: bound(WITH_NAN),
        ValueError,
        "x must be finite, got NaN or infinite values; find them with x.isfinite().logical_not().nonzero()",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "x as an array",
        lambda: bound(X.numpy()),
        TypeError,
        "x must be a floating-point tensor, got ndarray; write torch.from_numpy(x)",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "x without values",
        lambda: bound(NOWHERE),
        ValueError,
        (
            "x must be a tensor with values, got one on the meta device, which has none; build or load it on the "
            "device of the model"
        ),
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "no example",
        lambda: bound(X[:0], Y[:0]),
        ValueError,
        "x must be at least one example, [examples, ...], got [0, 4]",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "a scalar",
        lambda: bound(torch.tensor(0.5), Y[:1]),
        ValueError,
        "x must be at least one example, [examples, ...], got []",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "y of floats",
        lambda: bound(y=Y.float()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "y of -1 and 1",
        lambda: bound(y=2 * (Y % 2) - 1),
        ValueError,
        "y must be labels of at least 0, got -1; number the classes from 0",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "y of 10**12",
        lambda: bound(y=Y + 10**12),
        ValueError,
        (
            "y must be labels below 1,000,000, got 1000000000002; number the classes from 0: write y = "
            "y.unique(return_inverse=True)[1]"
        ),
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "order 1",
        lambda: bound(order=1),
        ValueError,
        "order must be an integer >= 2, got 1",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "order as text",
        lambda: bound(order="all"),
        TypeError,
        "order must be an integer >= 2, got 'all'",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "an unknown method",
        lambda: bound(method="lp"),
        ValueError,
        "method must be one of 'exact', 'sinkhorn', got 'lp'",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "a list of weights",
        lambda: bound(weights=[1.0] * 6),
        TypeError,
        "weights must be a tensor [examples], got list; write torch.tensor(weights)",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "negative weights",
        lambda: bound(weights=-torch.ones(6)),
        ValueError,
        "weights must be finite and at least 0, got values from -1 to -1",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "weights of another length",
        lambda: bound(weights=torch.ones(5)),
        ValueError,
        "weights must be of shape [6], one per example, got [5]",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "weights of NaN",
        lambda: bound(weights=torch.full((6,), torch.nan)),
        ValueError,
        "weights must be finite and at least 0, got values from nan to nan",
    ),
    BadInput(
        "bounds.adversarial_risk_bound",
        "no sets",
        lambda: bound(most_sets=0),
        ValueError,
        "most_sets must be an integer >= 1, got 0",
    ),
    BadInput(
        "bounds.RiskBound",
        "a network that returns logits to attack",
        lambda: bound().attack().risk(lambda x: 9 * x),
        ValueError,
        (
            "classifier must be a function from float64 inputs to probabilities [batch, classes], got rows that "
            "are no probabilities of sum 1; for a network that returns logits write attack.risk(lambda x: "
            "model(x.float()).softmax(1))"
        ),
    ),
    BadInput(
        "bounds.OptimalAttack",
        "a network in single precision",
        lambda: bound().attack().risk(torch.nn.Linear(4, 3)),
        ValueError,
        (
            "classifier must be a function from float64 inputs to probabilities [batch, classes], got one that "
            "fails (mat1 and mat2 must have the same dtype, but got Double and Float); for a network that "
            "returns logits write attack.risk(lambda x: model(x.float()).softmax(1))"
        ),
    ),
    BadInput(
        "bounds.RobustClassifier",
        "inputs of another shape",
        lambda: bound().classifier()(X[:, :3]),
        ValueError,
        "x must be of shape [batch, 4], got [6, 3]",
    ),
    BadInput(
        "bounds.RobustClassifier",
        "bytes",
        lambda: bound().classifier()(BYTES),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    BadInput(
        "bounds.RobustClassifier",
        "a list",
        lambda: bound().classifier()(X.tolist()),
        TypeError,
        "x must be a floating-point tensor, got list; write torch.tensor(x)",
    ),
    BadInput(
        "bounds.risk_curve",
        "one radius",
        lambda: risk_curve(X, Y, norm="l2", epsilons=0.1),
        TypeError,
        "epsilons must be a list of radii, got 0.1; write epsilons=[0.1]",
    ),
    BadInput(
        "bounds.risk_curve",
        "no radius",
        lambda: risk_curve(X, Y, norm="l2", epsilons=[]),
        ValueError,
        "epsilons must be at least one radius, got none",
    ),
    BadInput(
        "bounds.risk_curve",
        "a negative radius",
        lambda: risk_curve(X, Y, norm="l2", epsilons=[0.1, -0.1]),
        ValueError,
        "epsilon must be a finite number >= 0, got -0.1",
    ),
    BadInput(
        "bounds.risk_curve",
        "a radius as text",
        lambda: risk_curve(X, Y, norm="l2", epsilons=["0.1"]),
        TypeError,
        "epsilons must be a list of radii, got '0.1'; write 0.1 as a number",
    ),
    BadInput(
        "bounds.risk_curve",
        "an unknown norm",
        lambda: risk_curve(X, Y, norm="l1", epsilons=[0.1]),
        ValueError,
        "norm must be 'l2' or 'linf', got 'l1'; l1 balls have no such solver here",
    ),
    BadInput(
        "bounds.sinkhorn_risk",
        "no threat model",
        lambda: sinkhorn_risk(X, Y, 0.1),
        TypeError,
        "threat_model must be a ThreatModel, got 0.1",
    ),
    BadInput(
        "bounds.sinkhorn_risk",
        "a regularisation of 0",
        lambda: sinkhorn_risk(X, Y, BALL, regularisation=0.0),
        ValueError,
        "regularisation must be a finite number > 0, got 0.0",
    ),
    BadInput(
        "bounds.sinkhorn_risk",
        "an unknown gradient",
        lambda: sinkhorn_risk(X, Y, BALL, gradient="exact"),
        ValueError,
        "gradient must be one of 'implicit', 'unrolled', got 'exact'",
    ),
    BadInput(
        "bounds.sinkhorn_risk",
        "a negative softness",
        lambda: sinkhorn_risk(X, Y, BALL, softness=-1.0),
        ValueError,
        "softness must be a finite number >= 0, got -1.0",
    ),
    BadInput(
        "bounds.sinkhorn_risk",
        "no iteration",
        lambda: sinkhorn_risk(X, Y, BALL, most_iterations=0),
        ValueError,
        "most_iterations must be an integer >= 1, got 0",
    ),
    BadInput(
        "bounds.plot_curve",
        "no bound",
        lambda: plot_curve([], "curve.png"),
        ValueError,
        "bounds must be at least one RiskBound, got none",
    ),
    BadInput(
        "bounds.plot_curve",
        "one bound",
        lambda: plot_curve(bound(), "curve.png"),
        TypeError,
        "bounds must be a list of RiskBounds, got RiskBound; write plot_curve([bound], path)",
    ),
    BadInput(
        "bounds.plot_curve",
        "a file format that is none",
        lambda: plot_curve([bound()], "curve.doc"),
        ValueError,
        (
            "path must be a file that ends in one of .avif, .eps, .gif, .jpeg, .jpg, .pdf, .pgf, .png, .ps, "
            ".raw, .rgba, .svg, .svgz, .tif, .tiff, .webp, got curve.doc; write curve.png"
        ),
    ),
    BadInput(
        "bounds.plot_curve",
        "a folder that is not there",
        lambda: plot_curve([bound()], "nowhere/curve.png"),
        FileNotFoundError,
        "no folder at nowhere to write curve.png to; make it first",
    ),
]
