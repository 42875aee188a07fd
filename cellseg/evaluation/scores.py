"""COCO average precision of mask records, and a confusion matrix with background."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from cellseg import markdown
from cellseg.coco import Record, group_by_image, instance_map_to_rles, xyxy_to_xywh
from cellseg.errors import RecordsError
from cellseg.evaluation.matches import average_precision, match_records
from cellseg.evaluation.pairs import pair_masks, take_cells
from cellseg.overlap import MaskLine

COCO_CAP = 100  # detections per image and class that pycocotools counts
AT_50, AT_75 = 0, 5  # of the ten IoUs
Truth = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """Average precision of masks, 0-1; None where there is no truth to find.

    Attributes:
        ap: mean over IoU 0.50, 0.55, ..., 0.95 and over the classes that occur in the truth.
        ap50, ap75: the same at one IoU. These three count all records.
        ap_100, ap50_100, ap75_100: at most 100 records per image and class, as pycocotools.
        ap50_per_class: class name -> uncapped AP50; None for a class absent from the truth, which
            the means leave out.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_100: float | None
    ap50_100: float | None
    ap75_100: float | None
    ap50_per_class: dict[str, float | None]

    def table(self) -> str:
        """Return the scores as a Markdown table; "-" where there is no truth."""
        rows = [
            ("AP50", self.ap50, self.ap50_100),
            ("AP75", self.ap75, self.ap75_100),
            ("AP", self.ap, self.ap_100),
            *((f"AP50, {name}", value, None) for name, value in self.ap50_per_class.items()),
        ]
        return scores_table(("uncapped", "at 100"), rows)


def scores_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows (name, score, ...) as a Markdown table; a score of None is shown as "-"."""
    shown = [
        (markdown.escape(name), *("-" if value is None else f"{value:.3f}" for value in values))
        for name, *values in rows
    ]
    return markdown.table(("", *header), shown)


def dataset_truth(dataset: Any, *, progress: bool = False) -> Truth:
    """Return the ground truth of a dataset as a COCO dict.

    Args:
        dataset: has `class_names`, a length, and `read(index)` -> (image, target), untransformed.
        progress: show a bar.

    Returns:
        as `truth_from_targets`.
    """
    indices = tqdm(range(len(dataset)), desc="Truth", leave=False, disable=not progress)
    return truth_from_targets((dataset.read(index)[1] for index in indices), dataset.class_names)


def truth_from_targets(targets: Iterable[Mapping[str, Any]], class_names: Sequence[str]) -> Truth:
    """Return the ground truth of targets as a COCO dict; the cost is the number of pixels.

    Args:
        targets: each has `instance_map` int [L, H, W] (k + 1 marks instance k), `labels` int [N]
            in 1..C, and `image_id`; tensors or arrays.
        class_names: C names, that of label 1 first.

    Returns:
        dict with `images` (id, height, width), `annotations` (id from 1, image_id, category_id,
        area in pixels, tight bbox xywh, iscrowd 0, segmentation RLE) and `categories` (id, name).
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for target in targets:
        instance_map = np.asarray(target["instance_map"])
        labels = np.asarray(target["labels"]).tolist()
        image_id = int(target["image_id"])
        height, width = instance_map.shape[-2:]
        images.append({"id": image_id, "height": height, "width": width})
        rles = instance_map_to_rles(instance_map, len(labels))
        masks = MaskLine.from_rles(rles)
        columns = (labels, masks.areas.tolist(), xyxy_to_xywh(masks.boxes).tolist(), rles)
        for label, area, bbox, rle in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "area": area,
                    "bbox": bbox,
                    "iscrowd": 0,
                    "segmentation": rle,
                }
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(class_names, start=1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def score_records(truth: Truth, records: Sequence[Record]) -> Scores:
    """Return the average precision of records, uncapped and at 100 from one matching.

    Equal to pycocotools at 100 to 1e-9. Nothing predicted scores 0; no truth at all scores None.
    Equal scores rank in the order given, as in pycocotools.

    Args:
        truth: COCO dict as `truth_from_targets` makes it; not changed.
        records: result records; not changed.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    check_fit(truth, records)
    per_class = {category["name"]: None for category in truth["categories"]}
    if not truth["annotations"]:
        return Scores(None, None, None, None, None, None, per_class)
    matches = match_records(truth, records)
    uncapped = average_precision(matches)
    at_100 = average_precision(matches, cap=COCO_CAP)
    names = {category["id"]: category["name"] for category in truth["categories"]}
    for category_id, ap50 in zip(matches.category_ids.tolist(), uncapped[:, AT_50], strict=True):
        per_class[names[category_id]] = mean_or_none(ap50)
    return Scores(
        ap=mean_or_none(uncapped),
        ap50=mean_or_none(uncapped[:, AT_50]),
        ap75=mean_or_none(uncapped[:, AT_75]),
        ap_100=mean_or_none(at_100),
        ap50_100=mean_or_none(at_100[:, AT_50]),
        ap75_100=mean_or_none(at_100[:, AT_75]),
        ap50_per_class=per_class,
    )


def check_fit(truth: Truth, records: Iterable[Record]) -> None:
    """Raise RecordsError for the first record that does not belong to the truth."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    classes = {category["id"] for category in truth["categories"]}
    for index, record in enumerate(records):
        expected, size = sizes.get(record["image_id"]), record["segmentation"]["size"]
        if expected is None:
            fault = f"image_id {record['image_id']} is not in the truth"
        elif record["category_id"] not in classes:
            fault = f"category_id {record['category_id']} is not in the truth"
        elif list(size) != expected:
            fault = f"mask of {size}, but image {record['image_id']} is {expected} in the truth"
        else:
            continue
        message = f"record {index}: {fault}; score it against the data it was predicted on"
        raise RecordsError(message, [f"record {index}: {fault}"])


def mean_or_none(values: np.ndarray) -> float | None:
    """Return the mean of what is not NaN, None if nothing is."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else None


def confusion_matrix(
    truth: Truth,
    records: Iterable[Record],
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """Return how often a cell of one class was found as another, with background.

    Cells are matched whatever their class: records in order of their score (ties: the order
    given) each take the free cell of the truth with the highest mask IoU (ties: the last).

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records.
        score_threshold: use records with score >= this, in 0-1.
        iou_threshold: a match needs a mask IoU >= this, in 0-1.

    Returns:
        int64 [C + 1, C + 1]: rows truth, columns predicted, in the order of category ids; the
        last index is background: last row cells that are none, last column cells not found.

    Raises:
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    records = [record for record in records if record["score"] >= score_threshold]
    check_fit(truth, records)
    order = sorted(category["id"] for category in truth["categories"])
    index = {category_id: k for k, category_id in enumerate(order)}
    background = len(order)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    cells, found = group_by_image(truth["annotations"]), group_by_image(records)
    for image_id in cells.keys() | found.keys():
        image_cells = cells.get(image_id, [])
        image_records = sorted(found.get(image_id, []), key=lambda record: -record["score"])
        rows = np.array([index[cell["category_id"]] for cell in image_cells] + [background])
        columns = np.array([index[entry["category_id"]] for entry in image_records] + [background])
        pairs = pair_masks(image_records, image_cells, iou_threshold=iou_threshold)
        matched = take_cells(*pairs, len(image_records))
        missed = np.setdiff1d(np.arange(len(image_cells)), matched)
        np.add.at(matrix, (rows[matched], columns[:-1]), 1)  # -1, no match, is background
        np.add.at(matrix, (rows[missed], background), 1)
    return matrix
