"""What is not the network in a whole step: of training, through `fit`, and of prediction."""

import importlib
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.made import write_tissue
from benchmarks.section import Section, seconds_text
from benchmarks.stopwatch import Stopwatch
from cellseg.data import CellDataset, TrainTransform, make_loaders, transforms
from cellseg.data.tissue import make_tissue
from cellseg.inference import prediction
from cellseg.models import get_model_mobilenetv2, heads, rpn
from cellseg.training import keeper
from cellseg.training.session import Session

NUM_CLASSES = 5
BATCH = 2
CROP = 512
CELLS = (10, 100, 450)
MOST_TRAINING_SHARE = 0.10
DETECTIONS = 500
MOST_PREDICTION_SHARE = 0.15

NETWORK = "network"
fit_module = importlib.import_module("cellseg.training.fit")  # `cellseg.training.fit` is `fit`
OWN_PARTS = (
    ("loading", CellDataset, "__getitem__"),
    ("augmentation", TrainTransform, "__call__"),
    ("target building", transforms, "update_target"),
    ("target building", heads.CellRoIHeads, "select_training_samples"),
    ("matching", rpn.CellRPN, "assign_targets_to_anchors"),
    ("mask targets", heads, "sample_mask_targets"),
    ("logging", fit_module, "_train_epoch"),  # less all that is named here
    ("logging", keeper, "write_history"),
)
NETWORK_PART = (NETWORK, Session, "train_step")


def profile_training(cells: int, *, epochs: int, width: int = 256) -> dict[str, float]:
    """Return seconds a step by part, medians over epochs of one step through `fit`.

    Loading is done in this process, so that nothing of it hides behind the network.

    Args:
        cells: cells in a crop, about.
        epochs: epochs that are measured, after a first one.
        width: channels of FPN, RPN and mask head.
    """
    watch, measured = Stopwatch(), []
    with tempfile.TemporaryDirectory() as folder:
        train_dir = Path(folder, "train")
        # A crop of 512 is cut out of images a little larger than itself.
        write_tissue(train_dir, BATCH, 640, round(cells * (640 / CROP) ** 2))
        dataset = CellDataset(train_dir, channel_order="true")
        train = dataset.subset(dataset.sample_ids, transform=TrainTransform(crop_size=CROP))
        loaders = make_loaders(train, dataset, batch_size=BATCH, workers=0)
        model = get_model_mobilenetv2(NUM_CLASSES, weights=None, norm="frozen", fpn_channels=width)
        summaries = fit_module.fit(
            model,
            *loaders,
            run_dir=Path(folder, "run"),
            epochs=epochs + 2,
            validate_every=epochs + 2,
            progress=False,
        )
        with closing(summaries), watch.watch((*OWN_PARTS, NETWORK_PART)):
            for _ in range(1 + epochs):
                watch.seconds.clear()
                next(summaries)
                measured.append(dict(watch.seconds))
    return {part: float(np.median([m[part] for m in measured[1:]])) for part in measured[0]}


def training_step(*, quick: bool = False) -> list[Section]:
    """Return the profile of a training step at several densities."""
    parts = list(dict.fromkeys(part for part, *_ in OWN_PARTS))
    rows, misses = [], []
    for cells in CELLS:
        seconds = profile_training(cells, epochs=1 if quick else 3)
        step = sum(seconds.values())
        share = 1 - seconds[NETWORK] / step
        shares = [f"{100 * seconds.get(part, 0) / step:.2f} %" for part in parts]
        rows.append([str(cells), seconds_text(step), *shares, f"{100 * share:.1f} %"])
        if share > MOST_TRAINING_SHARE:
            misses.append(
                f"{cells} cells: {100 * share:.1f} % of a step is not the network, at most "
                f"{100 * MOST_TRAINING_SHARE:g} % wanted"
            )
    section = Section(
        title="A training step: what is not the network",
        text=f"Shares of a step's wall time through `fit`: crops of {CROP}, batch {BATCH}, "
        "MobileNetV2 with 256 channels, CPU, loading in the same process. Wanted: at most "
        f"{100 * MOST_TRAINING_SHARE:g} % together.",
        header=["cells a crop", "step", *parts, "together"],
        rows=rows,
        misses=misses,
    )
    return [section]


def prediction_step(*, quick: bool = False) -> list[Section]:
    """Return the times of forward pass and post-processing at 500 detections."""
    model = get_model_mobilenetv2(
        NUM_CLASSES,
        weights=None,
        norm="frozen",
        detections_per_image=DETECTIONS,
        score_threshold=0.0,
    ).eval()
    image, _ = make_tissue(1000, 1000, density=450e-6, seed=0)
    watch, forward, after, found = Stopwatch(), [], [], 0
    places = [
        ("forward", model, "forward"),
        ("post-processing", prediction, "detections_to_records"),
    ]
    for _ in range(2 if quick else 4):
        watch.seconds.clear()
        with watch.watch(places):
            found = len(prediction.predict_image(model, image, image_id=1, score_threshold=0.0))
        forward.append(watch.seconds["forward"])
        after.append(watch.seconds["post-processing"])
    # The first run of each is left out.
    network, ours = float(np.median(forward[1:])), float(np.median(after[1:]))
    misses = []
    if ours > MOST_PREDICTION_SHARE * network:
        misses.append(
            f"post-processing takes {100 * ours / network:.1f} % of the forward time, at most "
            f"{100 * MOST_PREDICTION_SHARE:g} % wanted"
        )
    section = Section(
        title="Prediction: post-processing beside the forward pass",
        text=f"One image of 1000 x 1000 with {DETECTIONS} detections, MobileNetV2 with 256 "
        "channels, CPU. The network is random, so that its masks are noise of many runs. Wanted: "
        f"at most {100 * MOST_PREDICTION_SHARE:g} % of the forward time.",
        header=["detections", "records", "forward", "masks to records", "share"],
        rows=[
            [
                str(DETECTIONS),
                str(found),
                seconds_text(network),
                seconds_text(ours),
                f"{100 * ours / network:.2f} %",
            ]
        ],
        misses=misses,
    )
    return [section]
