"""The table of sizes: by hand, and as scikit-image measures the whole map."""

import numpy as np
import pytest
from data_files import plain_image, write_png
from skimage.measure import label as connected_pieces
from skimage.measure import regionprops_table
from tiny_sets import RING, SIZE, mask_of, one_picture, read_table

from cellseg import interchange
from cellseg.coco import mask_to_rle
from cellseg.errors import DataError, SettingsError


def test_morphometry_of_a_rectangle_by_hand(tmp_path):
    pictures, cells = one_picture(tmp_path, (2, 0.75, mask_of((2, 1, 6, 4))))
    interchange.write_morphometry(tmp_path / "t.csv", pictures, cells, ["x", "y"], pixel_size=0.5)
    [row] = read_table(tmp_path / "t.csv")
    assert [row[k] for k in ("image_id", "image", "cell", "class_id", "class", "score")] == [
        "1", "a", "1", "2", "y", "0.75",
    ]  # fmt: skip
    numbers = {name: float(row[name]) for name in list(row)[6:]}
    assert (numbers["area_px2"], numbers["area_um2"]) == (12, 3)
    assert (numbers["centroid_x_px"], numbers["centroid_y_px"]) == (4, 2.5)
    assert (numbers["centroid_x_um"], numbers["centroid_y_um"]) == (2, 1.25)
    assert (numbers["perimeter_px"], numbers["perimeter_um"]) == (10, 5)  # 2 (4 - 1) + 2 (3 - 1)
    assert numbers["solidity"] == 1
    diameter = np.sqrt(4 * 12 / np.pi)
    assert numbers["equivalent_diameter_px"] == pytest.approx(diameter, rel=1e-5)
    assert numbers["equivalent_diameter_um"] == pytest.approx(diameter / 2, rel=1e-5)
    # Axes of the ellipse of equal second moments, those of the pixels' centres.
    assert numbers["major_axis_px"] == pytest.approx(4 * np.sqrt((4**2 - 1) / 12), rel=1e-5)
    assert numbers["minor_axis_px"] == pytest.approx(4 * np.sqrt((3**2 - 1) / 12), rel=1e-5)
    assert numbers["eccentricity"] == pytest.approx(np.sqrt(1 - 8 / 15), rel=1e-5)
    # The image counts up its values: 27 a row, 3 a column.
    assert [numbers[f"mean_{name}"] for name in ("red", "green", "blue")] == [64.5, 65.5, 66.5]


def test_morphometry_is_that_of_scikit_image_on_the_whole_map():
    rng = np.random.default_rng(3)
    ids = connected_pieces(rng.random((60, 80)) < 0.45, connectivity=1)
    image = rng.integers(0, 256, (60, 80, 3), np.uint8)
    cells = [{"segmentation": mask_to_rle(ids == k)} for k in range(1, ids.max() + 1)]
    rows = list(interchange.measure_cells(image, cells, pixel_size=0.25))
    names = {
        "area": "area_px2", "perimeter": "perimeter_px", "eccentricity": "eccentricity",
        "equivalent_diameter_area": "equivalent_diameter_px", "solidity": "solidity",
        "axis_major_length": "major_axis_px", "axis_minor_length": "minor_axis_px",
        "intensity_mean-0": "mean_red", "intensity_mean-2": "mean_blue",
    }  # fmt: skip
    wanted = [name.split("-")[0] for name in names]
    table = regionprops_table(ids, image, properties=[*dict.fromkeys(wanted), "centroid"])
    assert len(rows) > 50
    for theirs, ours in names.items():
        assert [row[ours] for row in rows] == pytest.approx(table[theirs].tolist(), nan_ok=True)
    assert [row["centroid_x_px"] - 0.5 for row in rows] == pytest.approx(
        table["centroid-1"].tolist()
    )
    assert [row["area_um2"] * 16 for row in rows] == pytest.approx([*table["area"]])


@pytest.mark.parametrize("box", [(3, 3, 4, 4), (0, 5, 9, 6), (8, 0, 9, 6)])
@pytest.mark.filterwarnings("error")
def test_morphometry_of_a_pixel_and_of_lines_is_finite(box):
    cells = [{"segmentation": mask_to_rle(mask_of(box))}]
    [row] = interchange.measure_cells(plain_image(*SIZE), cells)
    assert all(np.isfinite(value) for value in row.values())
    assert row["solidity"] == 1


def test_cells_of_another_image_are_not_measured(tmp_path):
    pictures, cells = one_picture(tmp_path, (1, 0.9, RING))
    write_png(tmp_path / "a.png", plain_image(9, 6))
    with pytest.raises(DataError, match=r"a\.png has 9 x 6 pixels, .* 6 x 9"):
        interchange.write_morphometry(tmp_path / "t.csv", pictures, cells, ["one"])
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("pixel_size", [0, -1, float("nan"), float("inf")])
def test_a_pixel_has_a_size(tmp_path, pixel_size):
    with pytest.raises(SettingsError, match="pixel_size"):
        interchange.write_morphometry(tmp_path / "t.csv", [], [], [], pixel_size=pixel_size)
    assert not list(tmp_path.iterdir())
