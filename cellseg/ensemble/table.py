"""The records of a file as columns, so that many files fit into memory side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cellseg.coco import Record
from cellseg.evaluation.pairs import positions_of


@dataclass(frozen=True)
class RecordTable:
    """N records without their boxes, in the order of their file.

    Attributes:
        image_ids, category_ids: int64 [N].
        scores: float64 [N].
        sizes: int64 [N, 2], (height, width) of the masks.
        counts: their runs as text.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    sizes: np.ndarray
    counts: Sequence[str]

    @classmethod
    def from_records(cls, records: Sequence[Record]) -> "RecordTable":
        """Take over the records of one file, which have no faults."""
        rles = [record["segmentation"] for record in records]
        return cls(
            image_ids=np.array([record["image_id"] for record in records], dtype=np.int64),
            category_ids=np.array([record["category_id"] for record in records], dtype=np.int64),
            scores=np.array([record["score"] for record in records], dtype=float),
            sizes=np.array([rle["size"] for rle in rles], dtype=np.int64).reshape(-1, 2),
            counts=[rle["counts"] for rle in rles],
        )

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.scores)

    def image_sizes(self) -> set[tuple[int, int, int]]:
        """Return (image_id, height, width) of all masks, each once."""
        rows = np.column_stack([self.image_ids, self.sizes])
        return set(map(tuple, np.unique(rows, axis=0).tolist()))

    def of_image(self, image_id: int, *, score_threshold: float = 0.0) -> list[Record]:
        """Return the records of an image with score >= a threshold; they have no `bbox`."""
        rows = self._rows_of.get(image_id, np.zeros(0, dtype=np.int64))
        rows = rows[self.scores[rows] >= score_threshold]
        columns = (self.category_ids[rows], self.scores[rows], self.sizes[rows], rows)
        return [
            {
                "image_id": image_id,
                "category_id": category_id,
                "score": score,
                "segmentation": {"size": size, "counts": self.counts[row]},
            }
            for category_id, score, size, row in zip(*(c.tolist() for c in columns), strict=True)
        ]

    @cached_property
    def _rows_of(self) -> dict[int, np.ndarray]:
        """The records of each image, in the order given."""
        return positions_of(self.image_ids)
