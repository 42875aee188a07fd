"""Kinds of error and what mending them gives, against the code of TIDE's authors.

Runs where it is installed: `pip install tidecv` (1.0.1); nothing else needs it.
"""

import numpy as np
import pytest
from test_analysis import random_tissue

from cellseg.evaluation import KINDS, explain_errors, matches

main_errors = pytest.importorskip("tidecv.errors.main_errors")
tidecv = pytest.importorskip("tidecv")

ERRORS = dict(
    zip(
        KINDS,
        (
            main_errors.ClassError,
            main_errors.BoxError,
            main_errors.OtherError,
            main_errors.DuplicateError,
            main_errors.BackgroundError,
            main_errors.MissedError,
        ),
        strict=True,
    )
)
LITTLE = 1e-9  # below a threshold: there an IoU of exactly 0.5 is no duplicate, here it is


class BestOfKind:
    """The surest record that could find a cell, of each kind of error for itself.

    In tidecv a cell that a wrong class and a poor mask could find goes to the surer of them; see
    `cellseg.evaluation.analysis`.
    """

    def __init__(self, pred, gt):
        self.pred, self.gt = pred, gt
        self.kind = "surest of its class" if pred["class"] == gt["class"] else "surest of another"
        gt["usable"] = True
        if self.kind not in gt or gt[self.kind]["score"] < pred["score"]:
            gt[self.kind] = pred

    def fix(self):
        found = self.gt[self.kind] is self.pred
        return (self.pred["score"], True, self.pred["info"]) if found else None


def run_tide(truth, records):
    """Return tidecv's run over masks."""
    cells, found = tidecv.Data("truth", max_dets=1000), tidecv.Data("records", max_dets=1000)
    for cell in truth["annotations"]:
        cells.add_ground_truth(cell["image_id"], cell["category_id"], mask=cell["segmentation"])
    for entry in records:
        place = (entry["image_id"], entry["category_id"], entry["score"])
        found.add_detection(*place, mask=entry["segmentation"])
    thresholds = {"pos_threshold": 0.5 - LITTLE, "background_threshold": 0.1 - LITTLE}
    return tidecv.TIDE(mode=tidecv.TIDE.MASK).evaluate(cells, found, **thresholds)


@pytest.mark.parametrize("seed", range(40))
def test_errors_are_those_of_the_authors_code(seed, monkeypatch):
    monkeypatch.setattr(main_errors, "BestGTMatch", BestOfKind)
    # pycocotools asks at the recalls of linspace, tidecv at the nearest numbers to hundredths: a
    # recall of 0.29 lies on either side.
    monkeypatch.setattr(matches, "RECALLS", np.arange(101) / 100)
    truth, records = random_tissue(seed)
    ranks = np.random.default_rng(seed).permutation(len(records)) + 1  # no two scores alike
    records = [
        entry | {"score": rank / (len(records) + 1)}
        for entry, rank in zip(records, ranks.tolist(), strict=True)
    ]
    report, run = explain_errors(truth, records), run_tide(truth, records)
    counts, gains = run.count_errors(), run.fix_main_errors()
    assert report.ap50 == pytest.approx(run.ap / 100, abs=1e-9)
    for kind, error in ERRORS.items():
        mended = report.kinds[kind]
        assert mended.count == counts[error], kind
        # tidecv shows no gain below 0.
        after = max(mended.ap50_after, report.ap50)
        assert after == pytest.approx((run.ap + gains[error]) / 100, abs=1e-9), kind
