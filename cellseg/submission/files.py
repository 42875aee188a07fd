"""Records -> the files to hand in: test-results.json and a zip of exactly that; and back."""

import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from cellseg.coco import FAULTS_SHOWN, Record, check_records, write_records
from cellseg.data import CellDataset
from cellseg.data.archive import DAMAGE
from cellseg.errors import RecordsError
from cellseg.evaluation import Scores, dataset_truth, score_records
from cellseg.files import open_atomically
from cellseg.markdown import first_few

RESULTS_NAME = "test-results.json"
ARCHIVE_NAME = "test-results.zip"
MAX_BYTES = 200_000_000  # of the JSON; 100,000 records take about 30 MB
MAX_VALUES = 20_000_000  # of the JSON; a record has about 16, and each takes memory


def write_submission(records: Iterable[Record], output_dir: str | Path) -> tuple[Path, Path]:
    """Write the files to hand in; the same records give the same bytes.

    Args:
        records: result records in any order.
        output_dir: folder of the two files; made if it is missing. Each file appears whole or
            not at all.

    Returns:
        the paths of test-results.json and of test-results.zip.

    Raises:
        RecordsError: if a record is faulty; nothing is written.
    """
    records = list(records)
    _raise_faults(check_records(records), "records with {} faults were not written")
    json_path, zip_path = Path(output_dir) / RESULTS_NAME, Path(output_dir) / ARCHIVE_NAME
    write_records(json_path, records)
    entry = ZipInfo(RESULTS_NAME, date_time=(1980, 1, 1, 0, 0, 0))  # the format's earliest
    entry.compress_type = ZIP_DEFLATED
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # one file mode on every system
    with (
        open_atomically(zip_path) as file,
        ZipFile(file, "w") as archive,
        archive.open(entry, "w") as target,
        json_path.open("rb") as source,
    ):
        shutil.copyfileobj(source, target)
    return json_path, zip_path


def score_submission(path: str | Path, dataset: CellDataset) -> Scores:
    """Return the scores of the very file to hand in, against samples with truth.

    An `image_id` is the sample's position, from 1, among the sorted folders of the truth, as
    `predict --train-dir` numbers them (`CellDataset.image_ids`).

    Args:
        path: the zip, or the bare JSON that belongs into it.
        dataset: the samples that were predicted; the cells of one without records are missed.

    Raises:
        RecordsError: if the file cannot be read, or a record is faulty or of another data set.
    """
    path = Path(path)
    records = parse_results(path, read_results(path)[0])
    classes = range(1, dataset.num_classes)
    faults = check_records(records, image_ids=dataset.image_ids, category_ids=classes)
    _raise_faults(faults, f"{path} has {{}} faults, held against {dataset.train_dir}")
    return score_records(dataset_truth(dataset, progress=True), records)


def _raise_faults(faults: list[str], text: str) -> None:
    """Raise RecordsError with their number in the text and the first of them, if there are any."""
    if faults:
        shown = "\n  ".join(faults[:FAULTS_SHOWN])
        raise RecordsError(f"{text.format(len(faults))}:\n  {shown}", faults)


def read_results(path: Path) -> tuple[bytes, bool]:
    """Return the bytes of the JSON to hand in, and whether they came out of a zip.

    Raises:
        RecordsError: with one reason why there are none to be had; nothing beyond `MAX_BYTES` was
            unpacked.
    """
    if not path.is_file():
        raise RecordsError(f"{path} is not a file; name the zip to hand in")
    try:
        if not zipfile.is_zipfile(path):
            if path.suffix.lower() == ".zip":
                raise RecordsError(f"{path} is no zip, or was cut short; let `ensemble` write it")
            _check_amount(path, path.stat().st_size)
            return path.read_bytes(), False
        with ZipFile(path) as archive:
            entry = _only_entry(path, archive)
            with archive.open(entry) as file:
                return file.read(entry.file_size + 1), True  # never more than is announced
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise RecordsError(f"{path} is damaged ({reason}); let `ensemble` write it") from None


def _only_entry(path: Path, archive: ZipFile) -> ZipInfo:
    """Return the one entry that the zip of a hand-in has; RecordsError if it has others."""
    if path.suffix.lower() != ".zip":
        raise RecordsError(f"{path} is a zip by its content; name it {ARCHIVE_NAME}")
    entries = archive.infolist()
    if [entry.filename for entry in entries] != [RESULTS_NAME]:
        names = first_few([repr(entry.filename[:100]) for entry in entries], 5) or "nothing"
        raise RecordsError(
            f"{path} holds {names}; it must hold exactly {RESULTS_NAME}, in no folder: "
            "let `ensemble` write it"
        )
    if entries[0].flag_bits & 1:
        raise RecordsError(f"{path} is encrypted; let `ensemble` write it")
    _check_amount(path, entries[0].file_size)
    return entries[0]


def _check_amount(path: Path, size: int) -> None:
    """Raise RecordsError for a JSON that is too large to be handed in."""
    if size > MAX_BYTES:
        raise RecordsError(
            f"{path} holds {size / 1e6:.0f} MB of JSON, more than the {MAX_BYTES / 1e6:.0f} MB "
            "that are read; drop the records of the lowest scores"
        )


def parse_results(path: Path, data: bytes) -> Any:
    """Return the content of the JSON to hand in.

    Raises:
        RecordsError: with one reason why it has none; `path` is for the message.
    """
    try:
        text = data.decode("utf-8")
        if sum(map(text.count, ",[{")) <= MAX_VALUES:
            return json.loads(text)
        reason = f"holds more than {MAX_VALUES:,} values, as no list of records does"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start})"
    except RecursionError:
        reason = "is nested too deeply to be a list of records"
    except ValueError as error:  # no JSON, a byte order mark, a number of endless digits
        reason = f"is not JSON ({str(error).splitlines()[0]})"
    raise RecordsError(f"{path} {reason}; let `ensemble` write it")
