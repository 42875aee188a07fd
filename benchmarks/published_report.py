"""Make the published report.pdf from the run that `make bench-accuracy` kept.

    python -m benchmarks.published_report [--keep DIR] [--output report.pdf]

needs CELLSEG_DATA. The run is evaluated on the six held tiles with the records kept beside it, at
the score cut of accuracy.json. Its report has the words and experiments of docs/, and is written as
`cellseg report --no-tissue` writes it: the figures of real tissue, and none of its pixels.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import KEEP, RESULTS
from benchmarks.held_tissue import data_folder, examined_samples
from cellseg.coco import read_records
from cellseg.errors import CellsegError
from cellseg.files import read_json
from cellseg.report import build_report, evaluate_run

OWN = {"words.md": "report_words.md", "experiments.toml": "report_experiments.toml"}  # of docs/


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, write and say where; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder of the comparison")
    parser.add_argument("--output", type=Path, default=Path("report.pdf"))
    options = parser.parse_args(arguments)
    side = options.keep / "ours"
    try:
        tiles = examined_samples(data_folder())["tiles"]
        cut = read_json(RESULTS)["ours"]["score_threshold"]
        records = read_records(side / "tiles.json")
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "laptop"  # the run as it is kept stays as it is
            shutil.copytree(side / "run", run)
            for name, own in OWN.items():
                shutil.copyfile(Path("docs") / own, run / name)
            evaluate_run(run, tiles, records, score_threshold=cut)
            written = build_report(run, output=options.output, tissue=False, data_set="CoNSeP")
    except CellsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{written.path}: {written.pages} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
