"""Run or collect the benchmarks, and write docs/evidence.md, its figures, and the six figures of the README.

    uv run python -m benchmarks [--only meta-step bounds] [--models FOLDER] [--out results]
    uv run python -m benchmarks --from benchmarks/measured

The first form runs what is missing in ``--out`` and then writes the page from it; METAROBUST_DATA names a torchvision root, for
those that need images. The second runs nothing.
"""

import argparse
from pathlib import Path

from benchmarks.evidence._catalogue import CATALOGUE, ROOT, Measured, measure
from benchmarks.evidence._figures import draw_claims, draw_speed
from benchmarks.evidence._page import page, put_into, six
from metarobust._files import write_atomically


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="folder", metavar="FOLDER", help="write the page from the files of this folder, and run nothing"
    )
    parser.add_argument("--only", nargs="*", choices=CATALOGUE, default=list(CATALOGUE), help="a part of the measurements to run")
    parser.add_argument("--models", help="folder of trained classifiers by others, for the attacks")
    parser.add_argument("--out", default="results", help="folder of the measurements that are run")
    parser.add_argument("--docs", default=str(ROOT / "docs"), help="folder of evidence.md and its figures")
    parser.add_argument("--readme", default=str(ROOT / "README.md"), help="file whose six figures are renewed")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or arguments.out)
    if arguments.folder and not folder.is_dir():
        told = f"--from must name a folder of measurements, got {arguments.folder}, which is no folder"
        parser.error(f"{told}; the project's own: benchmarks/measured")
    if not arguments.folder:
        for name in arguments.only:
            if Measured(folder).files(name):
                print(f"{name}: there already, in {folder}")
                continue
            print(f"{name}: {CATALOGUE[name].shown}, about {CATALOGUE[name].minutes} minutes of one core", flush=True)
            reason = measure(name, folder, arguments.models)
            if reason:
                print(f"{name}: left out, {reason}", flush=True)
    measured, docs = Measured(folder), Path(arguments.docs)
    docs.mkdir(parents=True, exist_ok=True)
    _write(docs / "evidence.md", page(measured))
    for name, draw in (("evidence_claims.png", draw_claims), ("evidence_speed.png", draw_speed)):
        write_atomically(docs / name, lambda temporary, draw=draw: draw(measured, temporary))
        print(f"wrote {docs / name}")
    _write(Path(arguments.readme), put_into(Path(arguments.readme), six(measured)))


if __name__ == "__main__":
    main()
