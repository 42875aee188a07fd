"""Records -> the files to hand in: test-results.json, and a zip that holds exactly that."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from cellseg.coco import FAULTS_SHOWN, Record, check_records, write_records
from cellseg.errors import RecordsError
from cellseg.files import open_atomically

RESULTS_NAME = "test-results.json"
ARCHIVE_NAME = "test-results.zip"


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
    faults = check_records(records)
    if faults:
        shown = "\n  ".join(faults[:FAULTS_SHOWN])
        raise RecordsError(
            f"records with {len(faults)} faults were not written:\n  {shown}", faults
        )
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
