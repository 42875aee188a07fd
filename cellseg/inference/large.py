"""One very large image, read by windows; a prediction that was stopped goes on where it was.

Memory holds a window, the network's features of it and the records, never the image. A row of
tiles that is done is appended to a file beside the output, `<output>.partial`; at the end the
records of all rows are joined, the output is written and that file goes.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from cellseg import __version__
from cellseg.coco import MAX_PIXELS, Record, write_records
from cellseg.data.decoding import read_size
from cellseg.data.windows import open_windows
from cellseg.errors import DataError, SettingsError
from cellseg.inference.tiles import Tile, join_tiles, place_records, plan_for_model
from cellseg.inference.views import predict_views

Parts = list[list[Record]]  # of the tiles of one row


def predict_file(
    model: nn.Module,
    path: str | Path,
    output: str | Path,
    *,
    image_id: int = 1,
    swapped: bool = False,
    tile_size: int | None = None,
    overlap: int | None = None,
    iou_threshold: float = 0.5,
    resume: bool = True,
    progress: bool = True,
    **options: Any,
) -> list[Record]:
    """Write the COCO result records of one image file, however large, and return them.

    Takes the memory of one tile above the model's, some 0.6 GB for decoded pieces of the image at
    most, and about 1 kB a cell.

    Args:
        model: Mask R-CNN of this package, in eval mode, on any device.
        path: TIFF (in tiles or strips; BigTIFF, too) or PNG of one page; of a TIFF only the pieces
            that a tile touches are decoded, a PNG is held as a whole.
        output: the result file, .json; `<output>.partial` lies beside it until it is complete.
        image_id: number written into each record.
        swapped: exchange the first and the third channel, for files that are stored as BGR.
        tile_size: image pixels a side, at most; see `predict_tiles`.
        overlap: image pixels that neighbours have in common; see `predict_tiles`.
        iou_threshold: mask IoU over which records show the same cell, in 0-1.
        resume: go on with the rows of tiles that a stopped prediction has left; False starts anew.
        progress: show a bar with the time left.
        **options: views, scales, score_threshold and mask_threshold of `predict_views`.

    Raises:
        DataError: if the file cannot be read by windows, or has 2**31 pixels or more: there RLE
            ends, whose run lengths other tools keep in 32 bits.
        SettingsError: if what was left comes from another model, image or setting; or as
            `predict_tiles`.
    """
    path, left = Path(path), Path(f"{output}.partial")
    size = _checked_size(path)
    tiles = plan_for_model(model, size, tile_size=tile_size, overlap=overlap)
    rows = [list(row) for _, row in groupby(tiles, key=lambda tile: tile.row)]
    settings = options | {"image_id": image_id, "swapped": swapped, "iou_threshold": iou_threshold}
    key = _key(model, path, size, tiles[0], settings)
    if not resume:
        left.unlink(missing_ok=True)
    done = _resume(left, key)
    predict = partial(
        predict_views, model, image_id=image_id, iou_threshold=iou_threshold, **options
    )
    with (
        open_windows(path, swapped=swapped, max_pixels=MAX_PIXELS) as image,
        tqdm(total=len(tiles), desc=path.name, unit="tile", disable=not progress) as bar,
    ):
        bar.update(sum(map(len, done)))
        for row in rows[len(done) :]:
            parts = []
            for tile in row:
                parts.append(place_records(tile, predict(image.read(tile.window)), size))
                bar.update()
            _append(left, parts)
            done.append(parts)
    records = join_tiles(tiles, list(chain.from_iterable(done)), iou_threshold=iou_threshold)
    write_records(output, records)
    left.unlink()
    return records


def _checked_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image file, DataError if RLE cannot hold its masks."""
    size = read_size(path, max_pixels=2**62)
    if size[0] * size[1] >= MAX_PIXELS:
        raise DataError(
            f"{path} has {size[0]} x {size[1]} pixels, masks (RLE) can have {MAX_PIXELS - 1:,} at "
            "most, 46,340 x 46,340; cut it into pieces and segment each"
        )
    return size


def _key(
    model: nn.Module, path: Path, size: tuple[int, int], tile: Tile, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return all that the records depend on, as it comes back from JSON."""
    stat = path.stat()
    key = {
        "version": __version__,
        "model": _model_digest(model),
        "image": [*size, stat.st_size, stat.st_mtime_ns],
        "tiles": [*tile.shape, tile.overlap],
        "settings": settings,
    }
    return json.loads(json.dumps(key))


def _model_digest(model: nn.Module) -> str:
    """Return a SHA-256 over what a model is made of: how it was built, and its weights."""
    digest = hashlib.sha256(repr(getattr(model, "spec", None)).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _resume(left: Path, key: dict[str, Any]) -> list[Parts]:
    """Return the rows that were done, and leave a file that more can be appended to."""
    lines = _whole_lines(left) if left.exists() else iter(())
    found = next(lines, None)
    if found is None:
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"")
        _append(left, key)
        return []
    differ = [name for name in key if found.get(name) != key[name]]
    if differ:
        raise SettingsError(
            f"{left} is what another prediction has left: {', '.join(differ)} differ; go on with "
            "the same ones, or start anew with resume=False (--no-resume)"
        )
    return list(lines)


def _append(left: Path, value: Any) -> None:
    """Append one line, value and checksum, that is on the disk when this returns."""
    text = json.dumps(value, separators=(",", ":")).encode()
    with left.open("ab") as file:
        file.write(b"%08x %b\n" % (zlib.crc32(text), text))
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(left: Path) -> Iterator[Any]:
    """Yield the values of a file's lines up to the first torn one, at which it is cut off."""
    whole = 0
    with left.open("rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                break
            whole += len(line)
            yield json.loads(text)
    os.truncate(left, whole)
