"""How far threshold and watershed come without learning: the floor that a model has to leave.

Haematoxylin by colour deconvolution, Gaussian, Otsu, watershed on the distance transform, the best
of nine settings. The baseline is helped twice: each blob is told the class of the truth cell that
it overlaps most, and blobs that overlap none are left out.

    python -m benchmarks.sample_baseline SAMPLE/train --run RUN
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from cellseg.coco import instance_map_to_rles, make_record
from cellseg.data.dataset import CellDataset
from cellseg.evaluation.scores import Scores, dataset_truth, score_records
from cellseg.training import read_history

SIGMAS = (2.0, 3.0, 4.0)
MIN_DISTANCES = (4, 6, 9)


def find_blobs(image: np.ndarray, *, sigma: float, min_distance: int) -> np.ndarray:
    """Return the map of dark blobs in an image.

    Args:
        image: uint8 [H, W, 3], RGB.
        sigma: of the Gaussian over the haematoxylin channel, px.
        min_distance: least distance of two blobs' centres, px.

    Returns:
        int32 [H, W], 0 is background, blobs count from 1.
    """
    haematoxylin = ndimage.gaussian_filter(rgb2hed(image)[..., 0], sigma)
    mask = haematoxylin > threshold_otsu(haematoxylin)
    distance = ndimage.distance_transform_edt(mask)
    peaks = peak_local_max(distance, min_distance=min_distance, labels=mask.astype(int))
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, markers, mask=mask).astype(np.int32)


def classes_by_overlap(blobs: np.ndarray, target: dict) -> np.ndarray:
    """Return for each blob the class of the truth cell it overlaps most, 0 if it meets none."""
    cells, labels = np.asarray(target["instance_map"]), np.asarray(target["labels"])
    shared = np.zeros((int(blobs.max()) + 1, len(labels) + 1), np.int64)
    for layer in cells:
        np.add.at(shared, (blobs, layer), 1)
    shared[:, 0] = 0
    classes = np.concatenate([[0], labels])[shared.argmax(axis=1)]
    return classes[1:]


def baseline_records(
    image: np.ndarray, truth_target: dict, image_id: int, sigma: float, min_distance: int
) -> list[dict]:
    """Return the records of one image, each with score 1.

    Args:
        image: uint8 [H, W, 3], RGB.
        truth_target: holds `labels` (N,) and `instance_map` (L, H, W), where k + 1 marks cell k.
        image_id: number written into each record.
        sigma: of the Gaussian, px.
        min_distance: least distance of two blobs' centres, px.
    """
    blobs = find_blobs(image, sigma=sigma, min_distance=min_distance)
    rles = instance_map_to_rles(blobs[None], int(blobs.max()))
    classes = classes_by_overlap(blobs, truth_target)
    return [
        make_record(image_id, int(label), 1.0, rle)
        for label, rle in zip(classes, rles, strict=True)
        if label
    ]


def best_baseline(
    dataset: CellDataset,
    *,
    sigmas: Sequence[float] = SIGMAS,
    min_distances: Sequence[int] = MIN_DISTANCES,
) -> tuple[Scores, float, int]:
    """Return the best scores by AP50 over all settings, with their sigma and distance."""
    truth, samples = dataset_truth(dataset), [dataset.read(i) for i in range(len(dataset))]
    results = []
    for sigma, min_distance in product(sigmas, min_distances):
        records = []
        for image, target in samples:
            pixels = np.asarray(image).transpose(1, 2, 0)
            records += baseline_records(pixels, target, target["image_id"], sigma, min_distance)
        results.append((score_records(truth, records), sigma, min_distance))
    return max(results, key=lambda result: result[0].ap50)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the best of the settings for a folder of samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train_dir", type=Path, help="folder of samples, each with its maps")
    parser.add_argument("--ids", nargs="*", help="score these samples only")
    parser.add_argument(
        "--run", type=Path, help="a run's folder: score its val_ids, and print its AP50 beside"
    )
    options = parser.parse_args(arguments)
    ids = options.ids
    if options.run:
        ids = json.loads((options.run / "settings.json").read_text(encoding="utf-8"))["val_ids"]
    dataset = CellDataset(options.train_dir, sample_ids=ids)
    scores, sigma, min_distance = best_baseline(dataset)
    print(f"images {len(dataset)}, AP50 uncapped")
    print(
        f"without learning, best of {len(SIGMAS) * len(MIN_DISTANCES)} settings: "
        f"{scores.ap50:.3f} (sigma {sigma}, min distance {min_distance})"
    )
    for name, value in scores.ap50_per_class.items():
        print(f"  {name}: {'none' if value is None else format(value, '.3f')}")
    if options.run:
        learned = read_history(options.run)[-1].ap50
        print(f"learned, last epoch of {options.run.name}: {learned:.3f}")
        print(f"difference: {learned - scores.ap50:+.3f}")


if __name__ == "__main__":
    main()
