"""The audit counts what is there and names what is odd."""

import json

import numpy as np
import pytest
import tifffile
from data_files import plain_image, stained_sample, write_sample
from typer.testing import CliRunner

from cellseg import cli
from cellseg.data.audit import Oddity, audit
from cellseg.data.dataset import CellDataset
from cellseg.errors import DataError


@pytest.fixture
def odd_folder(tmp_path):
    """Return three samples: one odd in every way, its image again, and an empty one."""
    first, second = np.zeros((20, 30)), np.zeros((20, 30))
    first[0:4, 0:5] = 3  # 20 px
    first[8:11, 0:2], first[8:11, 6:8] = 5, 5  # two pieces of 6 px
    first[15, 20] = 9  # one pixel
    first[16, 21] = 9  # touches it at a corner: one piece of 2 px
    second[2:6, 4:8] = 11  # 16 px, of which 2 on the first cell
    write_sample(tmp_path / "a", plain_image(20, 30), {1: first, 3: second})
    write_sample(tmp_path / "b", plain_image(20, 30))
    write_sample(tmp_path / "c", plain_image(10, 40, (1, 2, 3)))
    return tmp_path


def test_counts_areas_and_sizes(odd_folder):
    found = audit(CellDataset(odd_folder))
    assert found.totals == {"epithelial": 3, "lymphocyte": 0, "neutrophil": 1, "macrophage": 0}
    assert found.cells_per_image == [4, 0, 0]
    assert found.rows[0].cells == (3, 0, 1, 0)
    assert [(row.height, row.width) for row in found.rows] == [(20, 30), (20, 30), (10, 40)]
    assert found.areas["epithelial"].tolist() == [20, 12, 2]
    assert found.areas["neutrophil"].tolist() == [16]
    assert found.channel_order == "undecided"


def test_each_oddity_is_named_with_its_file(odd_folder):
    assert audit(CellDataset(odd_folder)).oddities == [
        Oddity("a", "class1.tif", "fragments", "1 cell: id 9 (2 px)"),
        Oddity("a", "class1.tif", "several pieces", "1 cell: id 5 (2 pieces)"),
        Oddity("a", "class1.tif", "overlap", "2 px shared with class3.tif"),
        Oddity("b", "image.tif", "duplicate image", "the same pixels as a"),
    ]


def test_same_bytes_in_another_shape_are_no_duplicate(tmp_path):
    write_sample(tmp_path / "a", plain_image(4, 6))
    write_sample(tmp_path / "b", plain_image(6, 4))
    assert audit(CellDataset(tmp_path)).oddities == []


def test_table_tells_it_all(odd_folder):
    table = audit(CellDataset(odd_folder)).table()
    for line in (
        "| number | 3, 2 without cells |",
        "| height, px | 20 (10-20) |",
        "| width, px | 30 (30-40) |",
        "| cells an image | 0 (0-4) |",
        "| channel order | undecided (left as stored) |",
        "| 1 | epithelial | 3 | 1 | 12 | 4-18 |",
        "| 2 | lymphocyte | 0 | 0 | - | - |",
        "| a/class1.tif | fragments | 1 cell: id 9 (2 px) |",
    ):
        assert line in table.splitlines()


def test_table_shortens_a_long_list_and_says_so(odd_folder):
    table = audit(CellDataset(odd_folder)).table(max_oddities=1)
    assert "| oddities | 4 |" in table
    assert "| ... | | and 3 more |" in table
    assert "duplicate image" not in table


def test_clean_folder_says_so_and_tells_its_channel_order(tmp_path):
    for name, blue in (("a", 140), ("b", 141)):
        stained_sample(tmp_path / name, nuclei=(blue, 60, 90), around=(200, 170, 220))
    table = audit(CellDataset(tmp_path)).table()
    assert "swapped (BGR as stored, mended on reading)" in table
    assert "No oddities." in table


@pytest.fixture
def copied(tmp_path):
    """Return a folder of four images, of which d is a mirrored copy of a."""
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (40, 50, 3), dtype=np.uint8) for name in "abc"}
    for name, image in (images | {"d": images["a"][:, ::-1].copy()}).items():
        write_sample(tmp_path / "train" / name, image)
    return tmp_path / "train"


def audit_command(*arguments):
    texts = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.app, ["audit", *texts])


def test_the_command_tells_what_samples_to_be_held_out_share(copied, tmp_path):
    picture = tmp_path / "closest.png"
    told = audit_command(copied, "--val-ids", "c,d", "--leaks-figure", picture)
    assert told.exit_code == 0, told.output
    assert "2 validation images have in common" in told.output
    assert "| d | a | 0.000 | the same pixels |" in told.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "validation images" not in audit_command(copied).output


def test_the_command_tells_what_leaks_in_a_run(copied, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    sides = {"train_ids": ["a", "b"], "val_ids": ["c", "d"]}
    (run / "settings.json").write_text(json.dumps(sides), encoding="utf-8")
    told = audit_command(copied, "--run", run)
    assert told.exit_code == 0, told.output
    assert "| d | a | 0.000 | the same pixels |" in told.output
    assert f"closest pairs: {run / 'figures' / 'leaks.png'}" in told.output
    assert (run / "figures" / "leaks.png").exists()


def test_a_figure_of_leaks_needs_samples_held_out(copied, tmp_path):
    told = audit_command(copied, "--leaks-figure", tmp_path / "x.png")
    assert "shows what is held out; give --val-ids or --run" in str(told.exception)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, [], "no settings.json that tells of images held out; name a run's folder, of one by"),
        ({"train_ids": ["a"], "val_ids": []}, [], "tells of images held out"),
        ({}, ["--val-ids", "a"], "--run tells what is held out; leave out --val-ids"),
        ({"train_ids": ["a"], "val_ids": ["z"]}, [], "has no sample 'z'"),
    ],
)
def test_a_run_without_a_split_is_told(settings, options, message, copied, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    told = audit_command(copied, "--run", tmp_path, *options)
    assert message in str(told.exception)


def test_file_that_cannot_be_read_stops_the_audit_by_name(odd_folder):
    dataset = CellDataset(odd_folder, channel_order="true")
    tifffile.imwrite(odd_folder / "b" / "image.tif", plain_image(3, 4)[:, :, 0].astype(np.int32))
    with pytest.raises(DataError, match=r"b.image\.tif stores its pixels as int32"):
        audit(dataset)
