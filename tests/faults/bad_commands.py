"""Bad command lines: the words, and the one sentence that each must give. They run in a folder of small files."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from metarobust.models import mlp

NETS = """
import torch
from metarobust.models import mlp

def build():
    return mlp([64, 4, 10])

def broken():
    raise RuntimeError("no such layer")

def nothing():
    return None
"""


def prepare(folder: Path) -> None:
    """The files that the commands name: a model file, weights of it and of others, archives with and without errors."""
    (folder / "nets.py").write_text(NETS)
    (folder / "syntax.py").write_text("def build(:\n")
    (folder / "text.txt").write_text("no weights")
    weights = mlp([64, 4, 10]).state_dict()
    save_file(weights, folder / "net.safetensors")
    save_file(mlp([64, 5, 10]).state_dict(), folder / "wide.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "net.safetensors").read_bytes()[:200])
    torch.save(list(weights.values()), folder / "list.pt")
    images, labels = np.zeros((4, 8, 8), dtype=np.uint8), np.arange(4)
    np.savez(folder / "good.npz", images=images, labels=labels)
    np.savez(folder / "names.npz", x=images, y=labels)
    np.savez(folder / "bright.npz", images=images + 300.0, labels=labels)
    np.savez(folder / "floats.npz", images=images, labels=labels + 0.5)
    np.savez(folder / "large.npz", images=np.zeros((4, 9, 9), dtype=np.uint8), labels=labels)
    np.savez(folder / "classes.npz", images=images, labels=labels + 20)


EVALUATE = "evaluate --model nets.py:build --weights net.safetensors --data good.npz --epsilon 8/255"

ROWS = [
    # The verb and its flags
    (
        "evalute --data digits",
        (
            "the first word must be one of demo, train, evaluate, bound, meta-train, transfer, version, got "
            "'evalute'; run metarobust --help"
        ),
    ),
    ("evaluate", ("evaluate needs --model, --data, --epsilon; run metarobust evaluate --help")),
    (f"{EVALUATE} --eps 0.1", ("evaluate does not know --eps (did you mean --epsilon?); run metarobust evaluate --help")),
    (
        f"{EVALUATE} --seed one",
        ("--seed must be an integer, got 'one'; run metarobust evaluate --help"),
    ),
    (f"{EVALUATE} --examples 1e3", "--examples must be an integer, got '1e3'; run metarobust evaluate --help"),
    (
        "train --data digits --epsilon 0.1 --learning-rate fast",
        "--learning-rate must be a number, got 'fast'; run metarobust train --help",
    ),
    (
        "train --data digits --epsilon 0.1 --model nowhere.py:build",
        "--model must name a file that exists, got nowhere.py",
    ),
    ("transfer --data digits --epsilon 0.1 --model nowhere.py:build", "--model must name a file that exists, got nowhere.py"),
    # evaluate: units and choices
    (
        EVALUATE.replace("8/255", "8"),
        (
            "epsilon must be at most 1 (= upper - lower) in input units for l_inf, got 8.0; for 8-bit images in "
            "[0, 1] write 8 / 255"
        ),
    ),
    (
        EVALUATE.replace("8/255", "-0.1"),
        ("epsilon must be >= 0 in input units, got -0.1; for 8-bit images in [0, 1] write 8 / 255"),
    ),
    (
        EVALUATE.replace("8/255", "nan"),
        ("epsilon must be >= 0 in input units, got nan; for 8-bit images in [0, 1] write 8 / 255"),
    ),
    (EVALUATE.replace("8/255", "8/0"), ("--epsilon must be a number such as 0.3 or 8/255, got '8/0'")),
    (
        f"{EVALUATE} --norm l0",
        ("--norm must be one of 'linf', 'l2', 'l1', got 'l0'; run metarobust evaluate --help"),
    ),
    (
        f"{EVALUATE} --protocol autoattack",
        ("--protocol must be one of 'quick', 'standard', 'strong', got 'autoattack'; run metarobust evaluate --help"),
    ),
    (f"{EVALUATE} --batch-size 0", ("--batch-size must be an integer >= 1, got 0")),
    (f"{EVALUATE} --examples -3", ("--examples must be an integer >= 1, got -3")),
    (f"{EVALUATE} --device abacus", ("--device must be cpu, or a device that this machine has, got 'abacus'")),
    (f"{EVALUATE} --plot figure.doc", ("--plot must end in .png, .jpg, .pdf or .svg, got figure.doc")),
    (
        f"{EVALUATE} --json nowhere/report.json",
        ("--json must be a file in an existing folder, got nowhere/report.json, whose folder does not exist; pass another path"),
    ),
    (
        f"{EVALUATE} --json nets.py",
        ("--json must be another file than --model, got nets.py for both; pass another path"),
    ),
    (
        f"{EVALUATE} --json ./net.safetensors",
        ("--json must be another file than --weights, got net.safetensors for both; pass another path"),
    ),
    (
        f"{EVALUATE} --json report.png --plot report.png",
        ("--plot must be another file than --json, got report.png for both; pass another path"),
    ),
    (EVALUATE.replace("net.safetensors", "."), ("--weights must name a file that exists, got the folder .")),
    (
        EVALUATE.replace("nets.py:build", "nets:build"),
        ("--model must name a file that exists, got nets; write nets.py:build"),
    ),
    (f"{EVALUATE} --device meta", ("--device must be cpu, or a device that this machine has, got 'meta'")),
    # evaluate: the model
    (EVALUATE.replace("nets.py:build", "nets.py"), ("--model must be FILE.py:FUNCTION, got 'nets.py'; write nets.py:build")),
    (EVALUATE.replace("nets.py:build", "nowhere.py:build"), ("--model must name a file that exists, got nowhere.py")),
    (
        EVALUATE.replace("nets.py:build", "nets.py:biuld"),
        ("--model must name a function of nets.py, got 'biuld'; the file has build, broken, nothing"),
    ),
    (
        EVALUATE.replace("nets.py:build", "nets.py:broken"),
        ("--model must run without errors, got RuntimeError in nets.py: no such layer"),
    ),
    (
        EVALUATE.replace("nets.py:build", "nets.py:nothing"),
        ("--model must name a function that returns an nn.Module, nothing returned a NoneType"),
    ),
    (
        EVALUATE.replace("nets.py:build", "syntax.py:build"),
        ("--model must run without errors, got SyntaxError in syntax.py, line 1: invalid syntax (syntax.py, line 1)"),
    ),
    (
        EVALUATE.replace("net.safetensors", "nowhere.safetensors"),
        ("--weights must name a file that exists, got nowhere.safetensors"),
    ),
    (
        EVALUATE.replace("net.safetensors", "cut.safetensors"),
        (
            "--weights cut.safetensors must be a safetensors file, got one that cannot be read, damaged or of another kind "
            "(Error while deserializing header: invalid header length); save it again"
        ),
    ),
    (
        EVALUATE.replace("net.safetensors", "wide.safetensors"),
        ("--weights must fit the model, got 1.weight of shape [5, 64] in wide.safetensors; it needs [4, 64]"),
    ),
    (
        EVALUATE.replace("net.safetensors", "text.txt"),
        (
            "--weights must be a state dictionary that loads without executing code, got text.txt "
            "(UnpicklingError); write it with torch.save(model.state_dict(), path)"
        ),
    ),
    (EVALUATE.replace("net.safetensors", "list.pt"), ("--weights must be a state dictionary, got a list in list.pt")),
    # evaluate: the data
    (EVALUATE.replace("good.npz", "nowhere.npz"), ("--data must name a file that exists, got nowhere.npz")),
    (
        EVALUATE.replace("good.npz", "names.npz"),
        (
            "--data names.npz: the arrays must be named 'images' and 'labels', got ['x', 'y'] in names.npz; "
            "write it with numpy.savez(path, images=images, labels=labels)"
        ),
    ),
    (
        EVALUATE.replace("good.npz", "bright.npz"),
        (
            "--data bright.npz: images must be finite and in [0, 1], got values from 300 to 300; write images / "
            "255 for 8-bit values, and put any normalisation inside the model"
        ),
    ),
    (
        EVALUATE.replace("good.npz", "floats.npz"),
        ("--data floats.npz: labels must be integers, got dtype float64 in floats.npz; write labels.astype(numpy.int64)"),
    ),
    (
        EVALUATE.replace("good.npz", "large.npz"),
        (
            "--model must take images of the data, [1, 1, 9, 9], got RuntimeError: addmm: mat1 and mat2 shapes "
            "cannot be multiplied (1x81 and 64x4)"
        ),
    ),
    (
        EVALUATE.replace("good.npz", "classes.npz"),
        (
            "y must be in [0, 10), the classes that the model has logits for, got labels from 20 to 23; check "
            "the label encoding or the model's last layer"
        ),
    ),
    (
        EVALUATE.replace("good.npz", "imagenet"),
        (
            "--data imagenet: name must be one of 'digits', 'mnist', 'fashion-mnist', 'cifar10', 'cifar100', got "
            "'imagenet'; for data of your own pass a file that ends in .npz"
        ),
    ),
    # train
    (
        "train --data digits --epsilon 8 --out net2.safetensors",
        (
            "epsilon must be at most 1 (= upper - lower) in input units for l_inf, got 8.0; for 8-bit images in "
            "[0, 1] write 8 / 255"
        ),
    ),
    (
        "train --data digits --epsilon 0.1 --objective fast --out net2.safetensors",
        (
            "--objective must be one of 'at', 'trades', 'mart', 'udr', "
            "'beta', 'smoothed-beta', 'caat', 'meta-weight-net', 'frl', 'armor-at', 'armor-trades', "
            "'armor-mart', 'armor-udr', 'armor-beta', 'armor-smoothed-beta', 'armor-caat', "
            "'armor-meta-weight-net', 'armor-frl', got 'fast'; run metarobust train --help"
        ),
    ),
    ("train --data digits --epsilon 0.1 --epochs 0 --out net2.safetensors", ("--epochs must be an integer >= 1, got 0")),
    (
        "train --data digits --epsilon 0.1 --update nowhere.safetensors --out net2.safetensors",
        (
            "--update: no meta-optimizer at nowhere.safetensors; write the path of a file, or a name of a "
            "trained one: robust-small-v1; or write sgd, adam or adamw"
        ),
    ),
    (
        "train --data names.npz --epsilon 0.1 --out net2.safetensors",
        (
            "--data names.npz: the arrays must be named 'images' and 'labels', got ['x', 'y'] in names.npz; "
            "write it with numpy.savez(path, images=images, labels=labels)"
        ),
    ),
    (
        "train --data digits --epsilon 0.1 --out nowhere/net.safetensors",
        (
            "--out must be a file in an existing folder, got nowhere/net.safetensors, whose folder does not "
            "exist; pass another path"
        ),
    ),
    (
        "train --data digits --epsilon 0.1 --device meta --out net2.safetensors",
        ("--device must be cpu, or a device that this machine has, got 'meta'"),
    ),
    (
        "train --data digits --epsilon 0.1 --transport fgsm --steps 7 --out net2.safetensors",
        ("--steps is read by --transport pgd, apgd and beta only, not by fgsm; leave it out"),
    ),
    (
        "train --data digits --epsilon 0.1 --transport none --steps 10 --out net2.safetensors",
        ("--steps is read by --transport pgd, apgd and beta only, not by none; leave it out"),
    ),
    # bound
    (
        "bound --data good.npz --norm linf --epsilons 8",
        ("--epsilons must be at most 1 for linf, where pixels lie in [0, 1], got 8; for 8-bit images in [0, 1] write 8/255"),
    ),
    ("bound --data good.npz --epsilons 0.1,x", ("--epsilons must be a number such as 0.3 or 8/255, got 'x'")),
    (
        "bound --data names.npz --epsilons 0.1",
        (
            "--data names.npz: the arrays must be named 'images' and 'labels', got ['x', 'y'] in names.npz; "
            "write it with numpy.savez(path, images=images, labels=labels)"
        ),
    ),
    (
        "bound --data good.npz --norm l1 --epsilons 0.1",
        ("--norm must be one of 'l2', 'linf', got 'l1'; run metarobust bound --help"),
    ),
    # meta-train, transfer, demo
    (
        "meta-train --data digits --out nowhere/rule.safetensors",
        (
            "--out must be a file in an existing folder, got nowhere/rule.safetensors, whose folder does not "
            "exist; pass another path"
        ),
    ),
    ("meta-train --data digits --out rule.safetensors --iterations 0", ("--iterations must be an integer >= 1, got 0")),
    (
        "transfer --optimizer nowhere.safetensors --data digits --epsilon 0.1",
        (
            "--optimizer: no meta-optimizer at nowhere.safetensors; write the path of a file, or a name of a "
            "trained one: robust-small-v1"
        ),
    ),
    (
        "transfer --optimizer robust-small-v1 --data digits --epsilon 0.1 --device meta --out net2.safetensors",
        ("--device must be cpu, or a device that this machine has, got 'meta'"),
    ),
    ("demo --out text.txt", ("--out must be a folder that can be written to, got text.txt (File exists); pass another folder")),
]
