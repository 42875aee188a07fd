"""What is measured after an epoch, on the validation images and on a few training images."""

from functools import cached_property
from typing import Any

import torch

from cellseg.data import CellDataset, SampleImages
from cellseg.evaluation import Scores, dataset_truth, score_records
from cellseg.inference import predict_images
from cellseg.training.precision import autocast
from cellseg.training.run import EpochSummary
from cellseg.training.session import Session
from cellseg.training.validation import Validation


class EpochEvaluator:
    """Scores epochs against the truth, which it reads once, at the first epoch that is scored.

    Attributes:
        probe: the few training images, as they lie on disk.
    """

    def __init__(
        self, val_dataset: CellDataset | None, train_dataset: CellDataset, probe_images: int
    ) -> None:
        """Choose the training images: spread over the sorted ids, always the same.

        Without a validation dataset there is no validation to summarise, and no truth is read.
        """
        self.val_dataset = val_dataset
        ids = train_dataset.sample_ids
        count = min(probe_images, len(ids))
        self.probe = train_dataset.subset([ids[i * len(ids) // count] for i in range(count)])

    @cached_property
    def _truth(self) -> dict[str, Any]:
        """The truth of the validation images."""
        return dataset_truth(self.val_dataset)

    @cached_property
    def _probe_truth(self) -> dict[str, Any]:
        """The truth of the training images."""
        return dataset_truth(self.probe)

    def summarise(self, session: Session, validation: Validation | None) -> EpochSummary:
        """Return the summary of the epoch just trained, scored if it was validated."""
        scores, probe_ap50 = None, None
        if validation is not None:
            scores = score_records(self._truth, validation.records)
            probe_ap50 = self._score_probe(session).ap50
        train, val = session.mean_losses, validation.losses if validation else {}
        return EpochSummary(
            epoch=session.epoch + 1,
            step=session.step,
            learning_rate=session.optimiser.param_groups[0]["lr"],
            train_loss=sum(train.values()),
            val_loss=sum(val.values()) if val else None,
            losses={"train": train, "val": val},
            ap=scores and scores.ap,
            ap50=scores and scores.ap50,
            ap75=scores and scores.ap75,
            ap50_100=scores and scores.ap50_100,
            ap50_per_class=scores.ap50_per_class if scores else {},
            train_ap50=probe_ap50,
            seconds=session.epoch_seconds,
            images_per_second=session.epoch_images / max(session.epoch_seconds, 1e-9),
            peak_memory_mb=peak_memory_mb(session.device),
        )

    def _score_probe(self, session: Session) -> Scores:
        """Return how well the averaged weights find what they were trained on."""
        with autocast(session.device, session.dtype):
            records = predict_images(
                session.average.model,
                SampleImages(self.probe),
                score_threshold=0.0,
                progress=False,
            )
        return score_records(self._probe_truth, records)


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the most memory that was in use so far, in MB: the GPU's, or this process's.

    None where the system does not tell (Windows without a GPU).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
        import sys
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
