"""What the demo shows: the report file, the table in the terminal, the figure."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metarobust._files import json_text, write_atomically
from metarobust.command_line import _demo_experiment as experiment

LABELS = {
    "lstm": "LSTM, two streams",
    "lstm_one_stream": "LSTM, gradient only",
    "control": "LSTM, clean meta-loss",
    "factor_rule": "hand-set factor rule",
    "adam": "Adam, clean",
    "sgd_momentum": "SGD momentum, clean",
    "pgd_adversarial_training": "PGD adversarial training",
}
COLOURS = {
    "lstm": "#c1272d",
    "lstm_one_stream": "#e9a15b",
    "control": "#8c8c8c",
    "factor_rule": "#7a4fa3",
    "adam": "#2b6cb0",
    "sgd_momentum": "#4aa3a2",
    "pgd_adversarial_training": "#111111",
}


def build_report(
    settings: experiment.DemoSettings,
    results: list[dict[str, Any]],
    losses: dict[str, list[float]],
    *,
    quick: bool,
    seconds: float,
    versions: dict[str, str],
) -> dict[str, Any]:
    """The content of report.json."""
    pools = experiment.pools(settings.seed)
    by_place = {(r["target"], r["method"]): r for r in results}
    targets = {}
    for target in experiment.TARGETS:
        table = {
            method: {kind: _summary(by_place[target, method][kind]) for kind in ("clean", "robust")}
            for method in experiment.METHODS
        }
        targets[target] = {"results": table, "gap_closed": gap_closed(table)}
    chosen = {
        target: {m: by_place[target, m]["learning_rate"] for m in experiment.LEARNING_RATES} for target in experiment.TARGETS
    }
    validation = {
        target: {m: by_place[target, m]["validation"] for m, rates in experiment.LEARNING_RATES.items() if len(rates) > 1}
        for target in experiment.TARGETS
    }
    return {
        "quick": quick,
        "data": {
            "name": "scikit-learn handwritten digits, 8x8, in [0, 1]",
            "meta_training_pool": len(pools.meta_train),
            "target_pool": len(pools.target),
            "test": len(pools.test),
            "test_bound": experiment.bound_on_test(settings),
        },
        "settings": asdict(settings)
        | {
            "threat_model": repr(experiment.THREAT_MODEL),
            "meta_architectures": list(experiment.META_ARCHITECTURES),
            "target_architectures": experiment.TARGET_NAMES,
            "factor_rule": experiment.FACTOR_RULE,
            "learning_rate_grids": experiment.LEARNING_RATES,
            "learning_rates_chosen_on_validation": chosen,
            "validation_robust_accuracy": validation,
            "evaluation_attacks": results[0]["attacks"],
            "calibration": {r["method"]: r["calibration"] for r in results if r["calibration"] and r["target"] == "mlp"},
            "final_meta_loss": {name: sum(values[-20:]) / len(values[-20:]) for name, values in losses.items()},
        },
        "attack_calls_on_target": sum(r["attack_calls"] for r in results if r["method"] in experiment.LEARNED),
        "targets": targets,
        "seconds": round(seconds, 1),
        "versions": versions,
    }


def gap_closed(table: dict[str, Any]) -> float:
    """Share of the way from the best clean baseline to PGD adversarial training that the LSTM goes; robust means."""
    robust = {method: values["robust"]["mean"] for method, values in table.items()}
    baseline = max(robust["adam"], robust["sgd_momentum"])
    gap = robust["pgd_adversarial_training"] - baseline
    return (robust["lstm"] - baseline) / gap if gap else math.nan


def _summary(seeds: list[float]) -> dict[str, Any]:
    mean = sum(seeds) / len(seeds)
    variance = sum((value - mean) ** 2 for value in seeds) / max(1, len(seeds) - 1)
    return {"mean": mean, "sd": math.sqrt(variance), "seeds": seeds}


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write report.json, atomically."""
    text = json_text(report)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def print_report(report: dict[str, Any], out: Path) -> None:
    """The table: clean and robust accuracy of every method on both targets."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    settings = report["settings"]
    if report["quick"]:
        print("quick run: a smoke test, not evidence")
    names = " and ".join(experiment.TARGET_NAMES.values())
    print(f"targets {names}: unseen in meta-training, {settings['target_examples']} training examples,")
    attacks = ", ".join(settings["evaluation_attacks"])
    print(f"{settings['total_steps']} steps, {settings['seeds']} seeds; judged on test digits by {attacks}")
    table = Table()
    table.add_column("trained by", no_wrap=True)
    for target in experiment.TARGETS:
        table.add_column(f"{target.upper()}\nclean", justify="right", no_wrap=True)
        table.add_column(f"{target.upper()}\nrobust", justify="right", no_wrap=True)
        table.add_column("\nsd", justify="right", no_wrap=True)
    for method in experiment.METHODS:
        row = [LABELS[method]]
        for target in experiment.TARGETS:
            result = report["targets"][target]["results"][method]
            row.append(f"{result['clean']['mean']:.3f}")
            row += [f"{result['robust']['mean']:.3f}", f"{result['robust']['sd']:.3f}"]
        table.add_row(*row, style="bold" if method == "lstm" else None)
    console.print(table)
    shares = ", ".join(f"{report['targets'][t]['gap_closed']:.2f} on the {t.upper()}" for t in experiment.TARGETS)
    print(f"share of the gap to PGD adversarial training closed by the LSTM: {shares}")
    bound = report["data"]["test_bound"]
    best = f"{1 - bound['lower']:.3f}" if bound["exact"] else f"between {1 - bound['upper']:.3f} and {1 - bound['lower']:.3f}"
    lstm = {t: report["targets"][t]["results"]["lstm"]["robust"]["mean"] for t in experiment.TARGETS}
    below = " and ".join(f"{1 - bound['upper'] - mean:.3f} ({target.upper()})" for target, mean in lstm.items())
    print(f"best possible robust accuracy on these {bound['examples']} test digits, of a classifier that knows them: {best};")
    print(f"the LSTM is at least {below} below it, as attacks may miss examples")
    print(f"attack calls while the learned optimizers trained the targets: {report['attack_calls_on_target']}")
    print(f"{report['seconds']:.0f} s; wrote report.json, robust_accuracy.png and meta_optimizer.safetensors to {out}")


def draw(results: list[dict[str, Any]], settings: experiment.DemoSettings, path: Path, *, quick: bool) -> None:
    """Robust accuracy against step, one panel per target; bands are one standard deviation over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(experiment.TARGETS), figsize=(11, 4.4), sharey=True, layout="constrained")
    by_place = {(r["target"], r["method"]): r["curve"] for r in results}
    for axis, target in zip(axes, experiment.TARGETS, strict=True):
        for method in experiment.METHODS:
            curve = by_place[target, method]
            summaries = [_summary(curve[step]) for step in settings.curve_steps]
            means, sds = [s["mean"] for s in summaries], [s["sd"] for s in summaries]
            width = 2.6 if method == "lstm" else 1.6
            style = "--" if method == "pgd_adversarial_training" else "-"
            axis.plot(
                settings.curve_steps, means, style, color=COLOURS[method], linewidth=width, marker="o", markersize=3,
                label=LABELS[method],
            )  # fmt: skip
            low, high = ([m + sign * sd for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
            axis.fill_between(settings.curve_steps, low, high, color=COLOURS[method], alpha=0.1, linewidth=0)
        axis.set_title(f"{experiment.TARGET_NAMES[target]}, unseen in meta-training")
        axis.set_xlabel("training step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy, worse of pgd-20 and margin-pgd-20")
    axes[0].set_ylim(bottom=0)
    title = f"{settings.target_examples} training examples, l_inf epsilon {experiment.THREAT_MODEL.epsilon:g}"
    figure.suptitle(title + f", {settings.seeds} seeds (band: one sd)" + (", quick run" if quick else ""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
    plt.close(figure)
