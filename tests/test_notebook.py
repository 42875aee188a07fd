"""Training.ipynb, executed: as a newcomer without data, and as a user with a release."""

import json
import shutil
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from tiny_sets import RECTANGLE, TWO_CELLS, annotation, write_labels_set, write_set
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

from cellseg import coco
from cellseg.data import make_sample_release, read_test_index
from cellseg.notebook import execute_notebook
from cellseg.report import build_report
from cellseg.training import load_model, read_history

pytestmark = pytest.mark.slow
NOTEBOOK = Path(__file__).resolve().parents[1] / "Training.ipynb"
FIGURES = (
    "learning_curves",
    "confusion_matrix",
    "overlay_1",
    # What the report looks for, by these names.
    "precision_recall",
    "errors_mended",
    "calibration",
    "gallery",
)


def markdown_of(notebook: Path) -> str:
    """Return the Markdown that the cells of an executed notebook show."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("data", {}).get("text/markdown", "") for output in outputs)


def keep_sections(folder: Path, *headings: str) -> Path:
    """Write the notebook with these sections alone, as a new kernel that runs only them."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept, section = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            section = cell.source.splitlines()[0].removeprefix("## ")
        if section in headings:
            kept.append(cell)
    notebook.cells = kept
    path = folder / "Part.ipynb"
    nbformat.write(notebook, path)
    return path


def check_results(run_dir: Path, predictions_dir: Path, output_dir: Path, index_path: Path):
    """Assert that a run left everything behind, in the form that it should have."""
    history = read_history(run_dir)
    assert [epoch.epoch for epoch in history] == [1]
    assert all(np.isfinite([history[0].train_loss, history[0].val_loss]))
    assert load_model(run_dir / "best.pt").class_names[0] == "epithelial"
    for name in FIGURES:
        assert (run_dir / "figures" / f"{name}.png").stat().st_size > 10_000
    scores = json.loads((run_dir / "scores.json").read_text())
    assert scores["intervals"]["ap50"]["value"] == pytest.approx(scores["ap50"])
    errors = json.loads((run_dir / "errors.json").read_text())
    assert errors["ap50"] == pytest.approx(scores["ap50"])
    assert (run_dir / "report.pdf").read_bytes().startswith(b"%PDF")
    assert (run_dir / "words.md").exists() and (run_dir / "experiments.toml").exists()

    sizes = {row.image_id: (row.height, row.width) for row in read_test_index(index_path)}
    rules = {"image_ids": sizes, "category_ids": range(1, 5), "image_sizes": sizes}
    records = coco.read_records(predictions_dir / f"{run_dir.name}.json", **rules)
    assert records == coco.sort_records(records)
    merged = coco.read_records(output_dir / "test-results.json", **rules)
    assert len(merged) <= len(records)
    with zipfile.ZipFile(output_dir / "test-results.zip") as file:
        assert file.namelist() == ["test-results.json"]
        assert json.loads(file.read("test-results.json")) == merged
    manifest = json.loads((output_dir / "test-results.manifest.json").read_text())
    assert [member["file"] for member in manifest["members"]] == [f"{run_dir.name}.json"]


def test_without_a_release_made_tissue_stands_in_and_is_marked(tmp_path):
    parameters = {
        "runs_dir": str(tmp_path),
        "quick": True,
        "sample_images": 6,
        "workers": 0,
        "overrides": {"epochs": 1, "crop_size": 64, "batch_size": 2},
    }
    executed = execute_notebook(NOTEBOOK, parameters=parameters)
    root = tmp_path / "sample"
    assert executed.parent.parent == root
    index = root / "hw3-data-release" / "test_image_name_to_ids.json"
    check_results(executed.parent, root / "predictions", root, index)
    shown = markdown_of(executed)
    assert shown.count("drawn tissue, because quick is True") >= 4
    assert "in common with their nearest training image" in shown
    assert "holds exactly test-results.json" in shown and "for want of the test index" not in shown
    assert json.loads((executed.parent / "settings.json").read_text())["sample_data"] is True

    # In a new kernel: evaluation, test and report from the checkpoint alone, ...
    made = [executed.parent / name for name in ("validation.json", "figures/gallery.png")]
    before = [path.read_bytes() for path in made]
    for path in made:
        path.unlink()
    late = ("Evaluation on validation", "Test predictions", "Report", "Ensemble")
    part = keep_sections(tmp_path, "Settings", "Setup", "Data", "Split and loaders", *late)
    execute_notebook(part, parameters=parameters | {"run_dir": str(executed.parent)})
    assert [path.read_bytes() for path in made] == before
    # ... and the ensemble from dropped files, without any data.
    part = keep_sections(tmp_path, "Settings", "Setup", "Ensemble")
    places = {"predictions_dir": str(root / "predictions"), "output_dir": str(tmp_path / "out")}
    execute_notebook(part, tmp_path / "part.ipynb", parameters=places)
    merged = (tmp_path / "out" / "test-results.json").read_bytes()
    assert merged == (root / "test-results.json").read_bytes()
    assert "for want of the test index" in markdown_of(tmp_path / "part.ipynb")

    # A lab's folder without test images is no error.
    part = keep_sections(tmp_path, "Settings", "Setup", "Data", "Test predictions", "Ensemble")
    shutil.copytree(root / "hw3-data-release" / "train", tmp_path / "lab" / "train")
    lab = {"release_dir": str(tmp_path / "lab"), "predictions_dir": str(tmp_path / "none")}
    lab |= {"runs_dir": str(tmp_path), "run_dir": str(executed.parent)}
    execute_notebook(part, tmp_path / "lab.ipynb", parameters=lab)
    shown = markdown_of(tmp_path / "lab.ipynb")
    assert "no test images" in shown and "nothing to merge" in shown


def test_with_a_release_it_is_the_users_own_run(tmp_path):
    release = make_sample_release(
        tmp_path / "data", train_images=5, test_images=2, seed=3, image_size=96
    )
    coco_like = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    torch.save(coco_like.state_dict(), tmp_path / "coco.pth")
    parameters = {
        "quick": False,
        "release_dir": str(release.root),
        "weights": str(tmp_path / "coco.pth"),
        "runs_dir": str(tmp_path / "runs"),
        "predictions_dir": str(tmp_path / "predictions"),
        "output_dir": str(tmp_path / "out"),
        "workers": 0,
        "groups": "alike",
        "tissue_in_report": False,
        "preset": "gpu",
        "overrides": {
            "epochs": 1,
            "crop_size": 64,
            "batch_size": 2,
            "sampler": "shuffle",
            "views": "plain",
        },
    }
    executed = execute_notebook(NOTEBOOK, parameters=parameters)
    assert executed.parent.name.startswith("resnet50v2-")
    check_results(executed.parent, tmp_path / "predictions", tmp_path / "out", release.index_path)
    assert "drawn tissue" not in markdown_of(executed)
    scores = json.loads((executed.parent / "scores.json").read_text())
    assert scores["groups"] == scores["images"]  # five images are too few for a group of two
    report = (executed.parent / "report.pdf").read_bytes()
    again = build_report(executed.parent, output=tmp_path / "again.pdf", tissue=False)
    assert again.path.read_bytes() == report
    settings = json.loads((executed.parent / "settings.json").read_text())
    assert settings["sample_data"] is False
    assert "re-made: roi_heads.box_predictor" in settings["provenance"]


def coco_set(folder):
    """Write a COCO file of two images and three cells; return it."""
    cells = [annotation([RECTANGLE]), annotation([RECTANGLE], 7, image_id=6)]
    return write_set(folder, [*cells, annotation([[0, 0, 2, 0, 2, 2]])], names=("a.png", "b.png"))[
        0
    ]


def labels_set(folder):
    """Write two images and their label TIFFs, of two cells and of one; return the folder."""
    one_cell = np.where(TWO_CELLS == 1, 1, 0)
    return write_labels_set(folder, {"labels/a.tif": TWO_CELLS, "labels/b.tif": one_cell})


@pytest.mark.parametrize(
    ("write", "found"), [(coco_set, {"spindle": 2, "round": 1}), (labels_set, {"cell": 3})]
)
def test_one_setting_takes_what_other_tools_write(write, found, tmp_path):
    part = keep_sections(tmp_path, "Settings", "Setup", "Data")
    parameters = {"release_dir": str(write(tmp_path / "set")), "runs_dir": str(tmp_path / "runs")}
    executed = execute_notebook(part, tmp_path / "data.ipynb", parameters=parameters)
    assert list((tmp_path / "runs" / "imported").glob("*/train/a/class1.tif"))
    shown = markdown_of(executed)
    assert "| number | 2, 0 without cells |" in shown and "drawn tissue" not in shown
    for number, (name, cells) in enumerate(found.items(), start=1):
        assert f"| {number} | {name} | {cells} |" in shown
