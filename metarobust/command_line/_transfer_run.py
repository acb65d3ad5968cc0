"""What ``metarobust transfer`` does once its flags are read: data, network, training, judging, table, files."""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metarobust import __version__
from metarobust._files import json_text, write_atomically
from metarobust._progress import progress_bar
from metarobust._randomness import generator_for
from metarobust._tensor_files import WEIGHTS, write_tensors
from metarobust.command_line._evaluate_run import _device
from metarobust.command_line._notes import say
from metarobust.command_line._points import read_points
from metarobust.command_line._train_network import Network, check_network, chosen_network
from metarobust.command_line._train_run import initial_model
from metarobust.command_line._transfer_methods import (
    CLEAN,
    LEARNING_RATES,
    Setting,
    Trained,
    share_of_gap,
    train_baseline,
    train_with,
)
from metarobust.data import LabelledImages, digits_pools, split
from metarobust.evaluation import RobustnessReport, evaluate
from metarobust.meta_optimizers import load
from metarobust.threat_models import ThreatModel

if TYPE_CHECKING:
    from metarobust.command_line._transfer import Transfer

FORMAT = "metarobust transfer 1"
TEST_SHARE = 0.3
"""Of an .npz file, which has no test part of its own."""
Judged = list[tuple[Trained, RobustnessReport]]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Disjoint parts of the data; ``validation`` is None where no learning rate is to be chosen."""

    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages

    def sizes(self) -> dict[str, int]:
        """How many examples there are of each kind."""
        held_out = 0 if self.validation is None else len(self.validation)
        return {"train": len(self.train), "held_out": held_out, "test": len(self.test)}


def run_transfer(flags: "Transfer", epsilon: float, baselines: list[str]) -> None:
    """Train with the meta-optimizer and with each baseline, judge all of them, print, write."""
    threat_model = ThreatModel(norm=flags.norm, epsilon=epsilon)
    device = _device(flags.device)
    rule = learned_rule(flags.optimizer)
    check_network(flags.model)
    pool, test = read_parts(flags)
    parts = divided(flags, pool, test, choosing=bool(baselines))
    network = chosen_network(flags.model, pool)
    refuse_strangers(flags, network)
    initial = initial_model(network, flags.seed, pool, device)
    announce(flags, parts, network, threat_model, device)
    runs = 1 + sum(len(LEARNING_RATES[name]) for name in baselines)
    with progress_bar("training", runs * flags.steps) as advance:
        setting = Setting(
            initial=initial,
            train=parts.train.to(device),
            validation=None if parts.validation is None else parts.validation.to(device),
            threat_model=threat_model,
            steps=flags.steps,
            batch_size=flags.batch_size,
            seed=flags.seed,
            advance=advance,
        )
        trained = [train_with(rule, Path(flags.optimizer).name, setting)]
        trained += [train_baseline(name, setting) for name in baselines]
    for note in trained[0].notes:
        say(note)
    judged = [(method, judge(method, flags, parts.test, threat_model)) for method in trained]
    share = gap_share(judged)
    print_table(judged, threat_model, parts)
    said = conclusion(judged, share, runs)
    print("\n".join(said))
    write(flags, network, judged, {"data": parts.sizes(), "threat_model": repr(threat_model), "device": str(device),
                                   "model": network.name, "share_of_gap": share, "said": said})  # fmt: skip


def learned_rule(name: str) -> Any:
    """The meta-optimizer of this name or file."""
    if Path(name).is_dir():
        raise ValueError(f"--optimizer must be a file or the name of a trained meta-optimizer, got the folder {name}")
    try:
        return load(name)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--optimizer: {error}") from error


def read_parts(flags: "Transfer") -> tuple[LabelledImages, LabelledImages]:
    """What may be trained on, and what judges."""

    def read(part: str) -> LabelledImages:
        return read_points(flags.data, part=part, root=flags.root, download=flags.download)

    if flags.data == "digits":
        return digits_pools(0).target, read("test")
    if not flags.data.endswith(".npz"):
        return read("train"), read("test")
    data = read("train")
    count = round(TEST_SHARE * len(data))
    if count < 1:
        raise ValueError(f"--data must have examples to train on and to judge on, got {len(data)} in {flags.data}")
    pool, test = split(data, (len(data) - count, count), generator=generator_for(flags.seed, "transfer test", 0))
    return pool, test


def divided(flags: "Transfer", pool: LabelledImages, test: LabelledImages, *, choosing: bool) -> Parts:
    """The examples asked for, of each class its share, and the part of them that learning rates are chosen by."""
    count = len(pool) if flags.examples is None else flags.examples
    if count > len(pool):
        raise ValueError(f"--examples must be at most {len(pool)}, which the training part of {flags.data} has, got {count}")
    held_out = max(1, round(flags.validation * count)) if choosing else 0
    if held_out >= count:
        raise ValueError(f"--validation must leave examples to train on, got {flags.validation} of {count}")
    train, validation = split(pool, (count - held_out, held_out), generator=generator_for(flags.seed, "transfer split", 0))
    kept = test.select(torch.arange(min(flags.judge_examples or len(test), len(test))))
    return Parts(train=train, validation=validation if choosing else None, test=kept)


def refuse_strangers(flags: "Transfer", network: Network) -> None:
    """Nothing is overwritten: least of all a file with the user's own network."""
    strangers = [path for path in (flags.out, flags.out.with_suffix(".json")) if path.exists()]
    source = flags.out.with_suffix(".py")
    if network.source is not None and source.exists() and source.read_text() != network.source:
        strangers.append(source)
    if strangers:
        got = " and ".join(map(str, strangers))
        raise ValueError(f"--out must be a name whose files are not there yet, got {got}; pass another --out, or move it away")


def announce(flags: "Transfer", parts: Parts, network: Network, threat_model: ThreatModel, device: torch.device) -> None:
    """Before the first step: what is trained on what, and where test data comes from."""
    sizes, norm = parts.sizes(), threat_model.norm.replace("l", "l_", 1)
    told = f"{sizes['train']:,} examples to train on, {sizes['held_out']:,} held out, {sizes['test']:,} to judge on"
    print(f"{flags.optimizer}, model {network.name} on {device}, {norm}, epsilon {threat_model.epsilon:.4g}")
    print(f"{flags.data}: {told}", flush=True)
    if flags.data.endswith(".npz"):
        print(f"{flags.data} has no test part: {TEST_SHARE:g} of it were held back for judging", flush=True)


def judge(method: Trained, flags: "Transfer", test: LabelledImages, threat_model: ThreatModel) -> RobustnessReport:
    """The report of one model on test data."""
    return evaluate(method.model, test, threat_model=threat_model, protocol=flags.protocol, seed=flags.seed)


def gap_share(judged: Judged) -> float | None:
    """The meta-optimizer's share of the way from the best clean baseline to PGD training, where both are there."""
    robust = {method.name: report.worst_case_accuracy for method, report in judged[1:]}
    clean = [robust[name] for name in CLEAN if name in robust]
    if not clean or "pgd" not in robust:
        return None
    return share_of_gap(judged[0][1].worst_case_accuracy, clean=max(clean), top=robust["pgd"])


def conclusion(judged: Judged, share: float | None, runs: int) -> list[str]:
    """What the table does not say."""
    learned = judged[0][0]
    names = [method.name for method, _ in judged[1:]]
    said = [f"attack calls while {learned.name} trained: {learned.attack_calls}"]
    if share is not None:
        said.append(f"share of the gap from the best clean baseline to PGD training: {share:.2f}")
    elif "pgd" in names and any(name in CLEAN for name in names):
        said.append("PGD training is not above the best clean baseline here: there is no gap to have a share of")
    if runs > 1:
        said.append(f"passes are those of the chosen run; {runs - 1} runs were trained to choose the baselines' learning rates")
    for method, report in judged:
        said += [f"{method.name}: {doubt}" for doubt in report.warnings]
    return said


def cells(method: Trained, report: RobustnessReport) -> list[str]:
    """One row of the table."""
    rate = "its own" if method.learning_rate is None else f"{method.learning_rate:g}"
    low, high = report.worst_case_interval
    accuracies = f"{report.clean_accuracy:.3f}", f"{report.worst_case_accuracy:.3f} ({low:.2f} to {high:.2f})"
    doubts = ", ".join(doubt.check for doubt in report.warnings) or "none"
    return [method.name, rate, f"{method.passes:.0f}", *accuracies, doubts]


def print_table(judged: Judged, threat_model: ThreatModel, parts: Parts) -> None:
    """Every method with what it cost and what it is worth."""
    from rich.console import Console
    from rich.table import Table

    norm = threat_model.norm.replace("l", "l_", 1)
    title = f"accuracy on {len(parts.test):,} test examples, {norm}, epsilon {threat_model.epsilon:.4g}, 95 % intervals"
    table = Table(title=title, title_justify="left")
    for column in ("method", "learning rate", "passes", "clean", "worst case", "doubts"):
        justify = "left" if column in ("method", "doubts") else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column == "worst case")
    for method, report in judged:
        table.add_row(*cells(method, report))
    Console(highlight=False).print(table)


def write(flags: "Transfer", network: Network, judged: Judged, known: dict[str, Any]) -> None:
    """Weights, the network's source if it is one of this package, and the record at last."""
    record, source = flags.out.with_suffix(".json"), network.source
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in judged[0][0].model.state_dict().items()}
    write_tensors(flags.out, weights, {"format": WEIGHTS})
    written = [flags.out]
    if source is not None:
        written.append(flags.out.with_suffix(".py"))
        write_atomically(written[-1], lambda path: path.write_text(source))
    versions = {"metarobust": __version__, "torch": torch.__version__, "python": platform.python_version()}
    rows = [row(method, report) for method, report in judged]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(flags).items()}
    content = {"format": FORMAT, "settings": settings, **known, "methods": rows, "versions": versions}
    text = json_text(content)
    write_atomically(record, lambda path: path.write_text(text))
    print("wrote " + ", ".join(map(str, written)) + f" and {record}")


def row(method: Trained, report: RobustnessReport) -> dict[str, Any]:
    """Everything about one method: how it was trained, and its whole report."""
    return {
        "method": method.name,
        "learning_rate": method.learning_rate,
        "candidates": [{"learning_rate": rate, "robust_accuracy": found} for rate, found in method.candidates.items()],
        "steps": method.steps,
        "passes_per_step": method.passes_per_step,
        "passes": method.passes,
        "attack_calls": method.attack_calls,
        "notes": list(method.notes),
        "clean_accuracy": report.clean_accuracy,
        "worst_case_accuracy": report.worst_case_accuracy,
        "worst_case_interval": list(report.worst_case_interval),
        "doubts": [doubt.check for doubt in report.warnings],
        "report": json.loads(report.to_json()),
    }
