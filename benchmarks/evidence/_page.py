"""The page in Markdown, and the six figures of the README."""

import re
import statistics
from pathlib import Path

from benchmarks.evidence._catalogue import CATALOGUE, Measured
from benchmarks.evidence._claims import PAPERS
from benchmarks.evidence._findings import Claim
from benchmarks.evidence._of_optimizers import transfer_rows
from benchmarks.evidence._speed import Bar, bars

BEGIN, END = "<!-- evidence: written by `python -m benchmarks` -->", "<!-- end of evidence -->"

HEAD = """# Evidence

What the five papers claim, what was measured here, and whether it shows; then every bar on speed and memory. This page is written by
one command from the files of the benchmarks, no figure in it by hand: `uv run python -m benchmarks --from benchmarks/measured`. Without
`--from` the same command runs first whatever is missing in `results` (days on two cores; it goes on where it was interrupted).

A verdict follows from the figures by the rule beside it. It is about these small networks and data sets, not about the papers' own
settings: "not shown here" is no refutation. Figures are means, with the lowest and the highest run in brackets. Ratios are medians of
interleaved rounds in one process.
"""


def anchor(title: str) -> str:
    """The link target that Markdown gives a heading."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def _claim(claim: Claim, measured: Measured) -> tuple[str, str]:
    """Its section, and its verdict."""
    finding = claim.measured(measured)
    measurement = CATALOGUE[claim.measurement]
    verdict = finding.verdict if finding else "not measured"
    lines = [f"### {claim.name}", "", f"- **The claim.** {claim.says}", f"- **Verdict: {verdict}.** Rule: {claim.rule}."]
    if finding:
        lines += ["- **Measured.**", *(f"    - {sentence}." for sentence in finding.sentences)]
        lines.append(f"- **Conditions.** {measured.conditions(claim.measurement)}.")
    lines.append(f"- **Command.** `{measurement.shown}` (about {_long(measurement.minutes)} of one core).")
    return "\n".join(lines), verdict


def _long(minutes: int) -> str:
    return f"{minutes} minute{'s' if minutes > 1 else ''}" if minutes < 90 else f"{minutes / 60:g} hours"


def _speed(found: list[Bar], measured: Measured) -> list[str]:
    missed = [bar for bar in found if not bar.met]
    lines = [
        "## Speed and memory",
        "",
        f"{len(found) - len(missed)} of {len(found)} bars are met. Why the others are missed: [speed.md](speed.md), [papers/beta.md](papers/beta.md).",
        "",
        "![Measured ratios over their limits](evidence_speed.png)",
        "",
        "| what | against | measured | bar | |",
        "|---|---|---|---|---|",
    ]
    for bar in found:
        figure = f"{bar.measured:.3g}" + ("" if bar.lowest == bar.highest else f" ({bar.lowest:.3g} to {bar.highest:.3g})")
        sign = "at most" if bar.most else "at least"
        lines.append(f"| {bar.what} | {bar.against} | {figure} | {sign} {bar.limit:g} | {'met' if bar.met else '**missed**'} |")
    lines += ["", "| measurement | conditions | command |", "|---|---|---|"]
    for name in dict.fromkeys(bar.measurement for bar in found):
        lines.append(f"| {name} | {measured.conditions(name)} | `{CATALOGUE[name].shown}` |")
    return lines


def page(measured: Measured) -> str:
    """The whole page."""
    table = ["| paper | claim | verdict |", "|---|---|---|"]
    body: list[str] = []
    for paper in PAPERS:
        link = f"[{paper.page}]({paper.page})"
        body += [f"## {paper.title}", "", f"What differs from the paper (all of it: {link}):", ""]
        body += [f"- {line}" for line in paper.deviations]
        for claim in paper.claims:
            section, verdict = _claim(claim, measured)
            body += ["", section]
            table.append(f"| {paper.title.split(':')[0].split(' (')[0]} | [{claim.name}](#{anchor(claim.name)}) | {verdict} |")
        body.append("")
    missing = [name for name in CATALOGUE if not measured.files(name)]
    tail = ["", f"Not measured in this folder: {', '.join(missing)}."] if missing else []
    figure = ["", "![What was measured of the claims](evidence_claims.png)", ""]
    return "\n".join([HEAD, *table, *figure, *body, *_speed(bars(measured), measured), *tail]) + "\n"


def six(measured: Measured) -> str:
    """The six figures of the README, each with its link; a measurement that is missing has no row."""
    rows: list[tuple[str, str, str]] = []
    targets = transfer_rows(measured)
    if targets:
        shares = [row.share for row in targets]
        rows.append(
            (
                "gap between the best tuned clean training and PGD training that `robust-small-v1` closes without adversarial examples",
                f"median {statistics.median(shares):.2f} over {len(shares)} unseen networks and data sets ({min(shares):.2f} to {max(shares):.2f})",
                "Robustness is carried to new models and data",
            )
        )
    found = {bar.what: bar for bar in bars(measured)}
    for what, told in (
        ("second-order meta-step, 4 optimizees", "a second-order meta-step over `torchopt.MetaOptimizer`"),
        ("order-2 bound by maximum flow, 72,324 pairs", "the order-2 bound over HiGHS on the same linear program"),
    ):
        if what in found:
            bar = found[what]
            rows.append((told, f"{bar.measured:.1f} times as fast ({bar.lowest:.1f} to {bar.highest:.1f})", "Speed and memory"))
    for paper in PAPERS:
        for claim in paper.claims:
            if claim.name in README_CLAIMS:
                finding = claim.measured(measured)
                if finding:
                    told, sentence = README_CLAIMS[claim.name]
                    rows.append(
                        (
                            told,
                            f"{finding.verdict}. {finding.sentences[sentence]}",
                            claim.name,
                        )
                    )
    lines = ["| what | measured | |", "|---|---|---|"]
    lines += [f"| {what} | {figure} | [how](docs/evidence.md#{anchor(place)}) |" for what, figure, place in rows]
    return "\n".join([BEGIN, *lines, END])


README_CLAIMS = {
    "It is learned from adversarial examples": ("that a robust meta-loss makes the learned optimizer robust", 0),
    "ARMOR adds robustness to UDR, TRADES and MART": ("that reweighting by ARMOR adds robustness", 2),
    "CAAT is fairer to classes": ("that CAAT gains 5 points for the worst class, at the published radius", 0),
}
"""Negative findings that a reader of the README should meet: what is told, and which sentence of the finding."""


def put_into(readme: Path, block: str) -> str:
    """The README with the block between its two marks."""
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme} must hold the two lines that the figures are written between: {BEGIN} and {END}")
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
