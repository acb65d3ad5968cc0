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
    BadInput("data.LabelledImages", "images of bytes", lambda: LabelledImages((255 * IMAGES).byte(), Y, 3)),
    BadInput("data.LabelledImages", "images in 0..255", lambda: LabelledImages(255 * IMAGES, Y, 3)),
    BadInput("data.LabelledImages", "normalised images", lambda: LabelledImages(4 * IMAGES - 2, Y, 3)),
    BadInput("data.LabelledImages", "images with a NaN", lambda: LabelledImages(IMAGES * torch.nan, Y, 3)),
    BadInput("data.LabelledImages", "images without channels", lambda: LabelledImages(IMAGES[:, 0], Y, 3)),
    BadInput("data.LabelledImages", "images as an array", lambda: LabelledImages(IMAGES.numpy(), Y, 3)),
    BadInput("data.LabelledImages", "labels of floats", lambda: LabelledImages(IMAGES, Y.float(), 3)),
    BadInput("data.LabelledImages", "labels from 1", lambda: LabelledImages(IMAGES, Y + 1, 3)),
    BadInput("data.LabelledImages", "too few labels", lambda: LabelledImages(IMAGES, Y[:5], 3)),
    BadInput("data.LabelledImages", "no number of classes", lambda: LabelledImages(IMAGES, Y, None)),
    BadInput("data.LabelledImages", "labels on another device", lambda: LabelledImages(IMAGES, Y.to("meta"), 3)),
    BadInput("data.LabelledImages", "images without values", lambda: LabelledImages(IMAGES.to("meta"), Y.to("meta"), 3)),
    BadInput("data.LabelledImages", "select rows that are not there", lambda: labelled().select(torch.tensor([99]))),
    BadInput("data.LabelledImages", "select by floats", lambda: labelled().select(torch.tensor([1.0]))),
    BadInput("data.LabelledImages", "select by a list", lambda: labelled().select([0, 1])),
    # Files
    BadInput("data.load_npz", "no such file", lambda: load_npz("nowhere/some.npz")),
    BadInput("data.load_npz", "a text file", lambda: load_npz(text_file())),
    BadInput("data.load_npz", "other names", lambda: load_npz(npz(x=np.zeros((2, 8, 8)), y=np.zeros(2)))),
    BadInput("data.load_npz", "images of int64", lambda: load_npz(npz(images=np.zeros((2, 8, 8), dtype=np.int64), labels=np.zeros(2, dtype=int)))),
    BadInput("data.load_npz", "labels of floats", lambda: load_npz(npz(images=np.zeros((2, 8, 8)), labels=np.zeros(2)))),
    BadInput("data.load_npz", "channels first", lambda: load_npz(npz(images=np.zeros((2, 3, 8, 8)), labels=np.zeros(2, dtype=int)))),
    BadInput("data.load_npz", "images beyond 1", lambda: load_npz(npz(images=np.full((2, 8, 8), 255.0), labels=np.zeros(2, dtype=int)))),
    BadInput("data.load_npz", "pickled objects", lambda: load_npz(npz(images=np.array([{}, {}], dtype=object), labels=np.zeros(2, dtype=int)))),
    BadInput("data.load_npz", "fewer classes than labels", lambda: load_npz(npz(images=np.zeros((2, 8, 8)), labels=np.array([0, 5])), num_classes=3)),
    BadInput("data.load", "an unknown name", lambda: load("imagenet", train=True)),
    BadInput("data.load", "another spelling", lambda: load("FashionMNIST", train=True)),
    BadInput("data.load", "train as text", lambda: load("digits", train="test")),
    BadInput("data.load", "an empty root", lambda: load("mnist", train=True, root="nowhere")),
    BadInput("data.digits_pools", "seed as text", lambda: digits_pools("0")),
    # Parts
    BadInput("data.split", "more than there is", lambda: split(labelled(), (20, 20), generator=generator())),
    BadInput("data.split", "a negative size", lambda: split(labelled(), (-1, 20), generator=generator())),
    BadInput("data.split", "shares in place of sizes", lambda: split(labelled(), (0.8, 0.2), generator=generator())),
    BadInput("data.split", "one size", lambda: split(labelled(), 20, generator=generator())),
    BadInput("data.split", "no generator", lambda: split(labelled(), (20,), generator=None)),
    BadInput("data.split", "a seed as generator", lambda: split(labelled(), (20,), generator=0)),
    BadInput("data.split", "a pair of tensors", lambda: split((X, Y), (2,), generator=generator())),
    BadInput("data.split_meta", "more than a class has", lambda: split_meta(labelled(), 11, generator=generator())),
    BadInput("data.split_meta", "none per class", lambda: split_meta(labelled(), 0, generator=generator())),
    BadInput("data.minibatch", "a size of 0", lambda: minibatch(labelled(), 0, generator=generator())),
    BadInput("data.minibatch", "a size as a float", lambda: minibatch(labelled(), 8.0, generator=generator())),
    BadInput("data.minibatch", "no generator", lambda: minibatch(labelled(), 8, generator=None)),
    BadInput("data.long_tail", "a factor below 1", lambda: long_tail(labelled(), factor=0.1, generator=generator())),
    BadInput("data.long_tail", "a factor as text", lambda: long_tail(labelled(), factor="10", generator=generator())),
    BadInput("data.long_tail", "an order that leaves out a class", lambda: long_tail(labelled(), factor=2, order=[0, 1], generator=generator())),
    BadInput("data.long_tail", "a head larger than the class", lambda: long_tail(labelled(), factor=2, head=100, generator=generator())),
    BadInput("data.noise_matrix", "an unknown kind", lambda: noise_matrix("symmetric", 0.2, 10)),
    BadInput("data.noise_matrix", "a rate in per cent", lambda: noise_matrix("uniform", 20, 10)),
    BadInput("data.noise_matrix", "one class", lambda: noise_matrix("uniform", 0.2, 1)),
    BadInput("data.noise_matrix", "two classes for flip2", lambda: noise_matrix("flip2", 0.2, 2, generator=generator())),
    BadInput("data.noise_matrix", "no generator where one is needed", lambda: noise_matrix("flip1", 0.2, 10)),
    BadInput("data.noise_matrix", "a seed as generator", lambda: noise_matrix("flip1", 0.2, 10, generator=0)),
    BadInput("data.with_label_noise", "a rate in place of a matrix", lambda: with_label_noise(labelled(), 0.2, generator=generator())),
    BadInput("data.with_label_noise", "a matrix for other classes", lambda: with_label_noise(labelled(), torch.eye(10), generator=generator())),
    BadInput("data.with_label_noise", "rows that do not sum to 1", lambda: with_label_noise(labelled(), 0.9 * torch.eye(3), generator=generator())),
    BadInput("data.with_label_noise", "integer matrix", lambda: with_label_noise(labelled(), torch.eye(3).long(), generator=generator())),
    BadInput("data.with_label_noise", "a matrix of NaN", lambda: with_label_noise(labelled(), torch.eye(3) * torch.nan, generator=generator())),
    BadInput("data.LowDataTasks", "more examples than there are", lambda: LowDataTasks(dataset=labelled(), examples=1000)),
    BadInput("data.LowDataTasks", "no examples", lambda: LowDataTasks(dataset=labelled(), examples=0)),
    BadInput("data.LowDataTasks", "an empty range", lambda: LowDataTasks(dataset=labelled(), examples=(20, 10))),
    BadInput("data.LowDataTasks", "a pair of tensors", lambda: LowDataTasks(dataset=(X, Y), examples=3)),
    BadInput("data.LowDataTasks", "no generator", lambda: LowDataTasks(dataset=labelled(), examples=9).sample(None)),
    # bounds
    BadInput("bounds.adversarial_risk_bound", "epsilon in place of a threat model", lambda: bound(ball=0.1)),
    BadInput("bounds.adversarial_risk_bound", "l1", lambda: bound(ball=DIAMOND)),
    BadInput("bounds.adversarial_risk_bound", "x of uint8", lambda: bound(BYTES)),
    BadInput("bounds.adversarial_risk_bound", "x with a NaN", lambda: bound(WITH_NAN)),
    BadInput("bounds.adversarial_risk_bound", "x as an array", lambda: bound(X.numpy())),
    BadInput("bounds.adversarial_risk_bound", "x without values", lambda: bound(NOWHERE)),
    BadInput("bounds.adversarial_risk_bound", "no example", lambda: bound(X[:0], Y[:0])),
    BadInput("bounds.adversarial_risk_bound", "a scalar", lambda: bound(torch.tensor(0.5), Y[:1])),
    BadInput("bounds.adversarial_risk_bound", "y of floats", lambda: bound(y=Y.float())),
    BadInput("bounds.adversarial_risk_bound", "y of -1 and 1", lambda: bound(y=2 * (Y % 2) - 1)),
    BadInput("bounds.adversarial_risk_bound", "y of 10**12", lambda: bound(y=Y + 10**12)),
    BadInput("bounds.adversarial_risk_bound", "order 1", lambda: bound(order=1)),
    BadInput("bounds.adversarial_risk_bound", "order as text", lambda: bound(order="all")),
    BadInput("bounds.adversarial_risk_bound", "an unknown method", lambda: bound(method="lp")),
    BadInput("bounds.adversarial_risk_bound", "a list of weights", lambda: bound(weights=[1.0] * 6)),
    BadInput("bounds.adversarial_risk_bound", "negative weights", lambda: bound(weights=-torch.ones(6))),
    BadInput("bounds.adversarial_risk_bound", "weights of another length", lambda: bound(weights=torch.ones(5))),
    BadInput("bounds.adversarial_risk_bound", "weights of NaN", lambda: bound(weights=torch.full((6,), torch.nan))),
    BadInput("bounds.adversarial_risk_bound", "no sets", lambda: bound(most_sets=0)),
    BadInput("bounds.RiskBound", "a network that returns logits to attack", lambda: bound().attack().risk(lambda x: 9 * x)),
    BadInput("bounds.OptimalAttack", "a network in single precision", lambda: bound().attack().risk(torch.nn.Linear(4, 3))),
    BadInput("bounds.RobustClassifier", "inputs of another shape", lambda: bound().classifier()(X[:, :3])),
    BadInput("bounds.RobustClassifier", "bytes", lambda: bound().classifier()(BYTES)),
    BadInput("bounds.RobustClassifier", "a list", lambda: bound().classifier()(X.tolist())),
    BadInput("bounds.risk_curve", "one radius", lambda: risk_curve(X, Y, norm="l2", epsilons=0.1)),
    BadInput("bounds.risk_curve", "no radius", lambda: risk_curve(X, Y, norm="l2", epsilons=[])),
    BadInput("bounds.risk_curve", "a negative radius", lambda: risk_curve(X, Y, norm="l2", epsilons=[0.1, -0.1])),
    BadInput("bounds.risk_curve", "a radius as text", lambda: risk_curve(X, Y, norm="l2", epsilons=["0.1"])),
    BadInput("bounds.risk_curve", "an unknown norm", lambda: risk_curve(X, Y, norm="l1", epsilons=[0.1])),
    BadInput("bounds.sinkhorn_risk", "no threat model", lambda: sinkhorn_risk(X, Y, 0.1)),
    BadInput("bounds.sinkhorn_risk", "a regularisation of 0", lambda: sinkhorn_risk(X, Y, BALL, regularisation=0.0)),
    BadInput("bounds.sinkhorn_risk", "an unknown gradient", lambda: sinkhorn_risk(X, Y, BALL, gradient="exact")),
    BadInput("bounds.sinkhorn_risk", "a negative softness", lambda: sinkhorn_risk(X, Y, BALL, softness=-1.0)),
    BadInput("bounds.sinkhorn_risk", "no iteration", lambda: sinkhorn_risk(X, Y, BALL, most_iterations=0)),
    BadInput("bounds.plot_curve", "no bound", lambda: plot_curve([], "curve.png")),
    BadInput("bounds.plot_curve", "one bound", lambda: plot_curve(bound(), "curve.png")),
    BadInput("bounds.plot_curve", "a file format that is none", lambda: plot_curve([bound()], "curve.doc")),
    BadInput("bounds.plot_curve", "a folder that is not there", lambda: plot_curve([bound()], "nowhere/curve.png")),
]
