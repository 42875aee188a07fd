"""The benchmark of splits: what leaks is counted, and both splits are trained and examined."""

import pytest
from test_accuracy import TINY, write_made_release

from benchmarks import optimism
from benchmarks.our_recipe import LAPTOP

FOUND = {
    "splits": {
        "random": {
            "train_images": 8, "val_images": 2, "shared_tiles": 1.0, "optimism": 0.1,
            "validation": {"ap50": 0.5}, "held": {"ap50": 0.4},
        },
        "grouped": {
            "train_images": 8, "val_images": 2, "shared_tiles": 0.0, "optimism": 0.01,
            "validation": {"ap50": 0.4}, "held": {"ap50": 0.39},
        },
    },
    "ap50_difference": 0.1,
    "optimism_difference": 0.09,
}  # fmt: skip


def test_images_whose_tile_is_trained_on_are_counted():
    tiles = {"a": 1, "b": 1, "c": 2, "d": 3}
    assert optimism.shared_tiles((["a", "c"], ["b", "d"]), tiles) == 0.5
    assert optimism.shared_tiles((["a", "b"], ["c"]), tiles) == 0.0


def test_the_table_says_both_differences():
    text = optimism.table(FOUND)
    assert "| random | 8 + 2 | 100% | 0.500 | 0.400 | +0.100 |" in text
    assert "says +0.100 AP50 against the grouped one" in text and "promises +0.090 more" in text


def test_without_data_it_says_what_to_set(monkeypatch, capsys):
    monkeypatch.delenv("CELLSEG_DATA", raising=False)
    assert optimism.main([]) == 1
    assert "error: set CELLSEG_DATA to the folder" in capsys.readouterr().err


@pytest.mark.slow
def test_both_splits_are_trained_and_examined(tmp_path):
    write_made_release(tmp_path / "data")
    recipe = LAPTOP | TINY | {"epochs": 1, "time_budget": None}
    found = optimism.measure(recipe, tmp_path / "data", None, tmp_path / "kept")
    for name in optimism.SPLITS:
        row = found["splits"][name]
        assert row["train_images"] + row["val_images"] == 14
        assert 0 <= row["shared_tiles"] <= 1
        expected = row["validation"]["ap50"] - row["held"]["ap50"]
        assert row["optimism"] == pytest.approx(expected)
        assert (tmp_path / "kept" / name / "run" / "last.pt").exists()
    assert optimism.table(found).startswith("| split |")
