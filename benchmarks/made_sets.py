"""Sets unlike the tissue that the recipe was chosen on: does the automatic image scale hold there?

    python -m benchmarks.made_sets [--set NAME ...] [--minutes 10] [--threads 1] [--weights FILE]

draws five sets and trains the laptop's preset on each, nothing set by hand: at the automatic
`image_scale`, at half and at twice of it. The held images are predicted whole and as they are (the
preset's views would add to each figure for eight times the time), and the table of their AP50 is
written to made_sets.md in the folder of --keep, one row a set: what the automatic scale reaches
should be at least 0.9 of the best of the three. Sets that were trained before keep their rows. The
budget is processor time of this process, divided by its threads, as in `benchmarks.screen`.

    python -m benchmarks.made_sets --pictures FOLDER

only draws the sets, and the first held image of each with its truth into a PNG.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import torch
from skimage.segmentation import find_boundaries
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from benchmarks.made import write_sample
from benchmarks.our_recipe import train_recipe
from benchmarks.screen import processor_clock
from cellseg import markdown, presets
from cellseg.data import CellDataset, SampleImages
from cellseg.data.stain import STAINS
from cellseg.data.tissue import make_tissue
from cellseg.errors import CellsegError
from cellseg.evaluation import dataset_truth, score_records
from cellseg.files import read_json, write_atomically
from cellseg.inference import predict_images
from cellseg.training import load_model

KEEP = Path("scratch/made_sets")
FACTORS = (0.5, 1.0, 2.0)  # of the automatic image scale
WANTED = 0.9  # of the best factor's AP50, at the automatic scale
VERSION = 1  # of the drawing: count it up when the pixels change

ALL_KINDS = (0.38, 0.38, 0.12, 0.12)  # epithelial, lymphocytes, neutrophils, macrophages
NUCLEI = (0.5, 0.5, 0.0, 0.0)  # the two whose whole extent is a nucleus
LYMPHOCYTES = (0.0, 1.0, 0.0, 0.0)
MEDIAN_DIAMETER = 24.0  # of `NUCLEI` as drawn, px

Drawn = tuple[np.ndarray, dict[int, np.ndarray]]


@dataclass(frozen=True)
class MadeSet:
    """A set of made images.

    Attributes:
        title: what is special about it.
        class_names: of its classes 1..C.
        train: number of images to train on.
        held: number of images that are predicted.
        draw: returns the image, uint8 [H, W, 3] as it is stored, and the maps of its classes;
            called with the number of the image, held ones after the others.
    """

    title: str
    class_names: tuple[str, ...]
    train: int
    held: int
    draw: Callable[[int], Drawn]


def draw_crowd(number: int) -> Drawn:
    """Return 2,000 lymphocytes, side by side, the only class."""
    image, maps = make_tissue(1060, 1000, density=2000 / 1.06e6, shares=LYMPHOCYTES, seed=number)
    return image, {1: maps[2]}


def draw_glow(number: int) -> Drawn:
    """Return nuclei in fluorescence: the amount of haematoxylin as blue light on black."""
    image, maps = make_tissue(420, 460, shares=NUCLEI, seed=100 + number)
    densities = np.log(256 / (image + 1.0))
    haematoxylin = (densities @ np.linalg.inv(STAINS))[..., 0]
    light = 230 * (1 - np.exp(-1.6 * np.maximum(haematoxylin - 0.2, 0)))
    rng = np.random.default_rng(number)
    photons = rng.poisson(light[..., None] * np.array([0.08, 0.25, 1.0]) + 6)
    return photons.clip(0, 255).astype(np.uint8), maps


def draw_small(number: int) -> Drawn:
    """Return cells of 8 px, as through a weaker lens."""
    return zoom(*make_tissue(900, 960, shares=NUCLEI, seed=200 + number), 8 / MEDIAN_DIAMETER)


def draw_large(number: int) -> Drawn:
    """Return cells of 150 px, as through a stronger lens."""
    drawn = make_tissue(170, 150, shares=NUCLEI, density=9e-4, seed=300 + number)
    return zoom(*drawn, 150 / MEDIAN_DIAMETER)


def draw_sizes(number: int) -> Drawn:
    """Return images from 33 to 2,500 px a side, red and blue exchanged; held ones of 500."""
    height = round(33 * (2500 / 33) ** (number / 19)) if number < 20 else 500
    image, maps = make_tissue(height, height + number % 5, shares=ALL_KINDS, seed=400 + number)
    return image[..., ::-1], maps


SETS = {
    "crowd": MadeSet("one class, 2,000 cells an image", ("cell",), 8, 2, draw_crowd),
    "glow": MadeSet("fluorescence: light on black", ("large", "small"), 16, 6, draw_glow),
    "small": MadeSet("cells of 8 px", ("large", "small"), 16, 6, draw_small),
    "large": MadeSet("cells of 150 px", ("large", "small"), 20, 8, draw_large),
    "sizes": MadeSet(
        "20 images of 33 to 2,500 px, red and blue swapped",
        ("epithelial", "lymphocyte", "neutrophil", "macrophage"), 20, 6, draw_sizes,
    ),
}  # fmt: skip


def zoom(image: np.ndarray, maps: dict[int, np.ndarray], factor: float) -> Drawn:
    """Return an image and its maps magnified; cells smaller than a pixel may vanish."""
    size = [round(side * factor) for side in image.shape[:2]]
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
    planes = F.resize(planes, size, InterpolationMode.BICUBIC, antialias=True)
    scaled = {
        label: F.resize(torch.from_numpy(ids)[None], size, InterpolationMode.NEAREST_EXACT)
        for label, ids in maps.items()
    }
    return planes.numpy().transpose(1, 2, 0), {k: ids[0].numpy() for k, ids in scaled.items()}


def write_set(name: str, folder: Path) -> Path:
    """Draw a set, unless it lies there already; return its folder of samples."""
    made, note = SETS[name], folder / "drawn.json"
    train_dir = folder / "train"
    if note.is_file() and read_json(note) == VERSION:
        return train_dir
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(made.train + made.held):
        part = "train" if number < made.train else "held"
        write_sample(train_dir / f"{part}{number:02d}", *made.draw(number))
    write_atomically(note, json.dumps(VERSION))
    return train_dir


def open_set(name: str, folder: Path) -> tuple[CellDataset, CellDataset]:
    """Return the samples of a set to train on and the held ones."""
    samples = CellDataset(
        write_set(name, folder), class_names=SETS[name].class_names, cache_dir=folder / "cache"
    )
    held = [sample_id for sample_id in samples.sample_ids if sample_id.startswith("held")]
    return samples.subset(sorted(set(samples.sample_ids) - set(held))), samples.subset(held)


def examine_set(name: str, folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe on a set at each of the `FACTORS`; return the scale and the AP50 of each."""
    train, held = open_set(name, folder)
    scale = presets.resolve_sizes(recipe, train)["image_scale"]
    looks, ap50 = presets.group_settings(recipe)["predict"], {}
    for factor in FACTORS:
        settled = presets.resolve_sizes(recipe | {"image_scale": scale * factor}, train)
        run_folder = folder / f"{factor:g}"
        shutil.rmtree(run_folder, ignore_errors=True)
        last = train.subset(train.sample_ids[:1])  # nothing is chosen by it
        run_dir = train_recipe(settled, train, last, settled["weights"], run_folder)
        records = predict_images(load_model(run_dir / "last.pt"), SampleImages(held), **looks)
        ap50[f"{factor:g}"] = score_records(dataset_truth(held), records).ap50
    return {"image_scale": scale, "channel_order": train.channel_order, "ap50": ap50}


def results_table(results: dict[str, Any]) -> str:
    """Return the results as Markdown, one row a set."""
    at_factors = [f"AP50 at {factor:g} x" for factor in FACTORS]
    rows = []
    for name, result in results.items():
        ap50 = [result["ap50"][f"{factor:g}"] for factor in FACTORS]
        ratio = result["ap50"]["1"] / max(ap50) if max(ap50) else 0.0
        verdict = "holds" if ratio >= WANTED else "below 0.9"
        title, scale = SETS[name].title, result["image_scale"]
        cells = [f"{value:.3f}" for value in ap50]
        rows.append((title, f"{scale:g}", *cells, f"{ratio:.2f}", verdict))
    header = "set", "automatic scale", *at_factors, "automatic / best", ""
    return markdown.table(header, rows) + "\n"


def write_picture(name: str, folder: Path, path: Path) -> None:
    """Write the first held image of a set beside itself with its truth drawn on it, as PNG."""
    _, held = open_set(name, folder)
    image, target = held[0]
    pixels = image.numpy().transpose(1, 2, 0)
    drawn = pixels.copy()
    drawn[find_boundaries(target["instance_map"][0].numpy(), mode="inner")] = (255, 255, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(imagecodecs.png_encode(np.hstack([pixels, drawn])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, train and write the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", nargs="+", choices=SETS, default=list(SETS), dest="names")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", default="DEFAULT", help="a file of ImageNet weights, or none")
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder of sets, runs and table")
    parser.add_argument("--pictures", type=Path, help="only draw, and write PNGs here")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except CellsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    if options.pictures:
        for name in options.names:
            write_picture(name, options.keep / name, options.pictures / f"{name}.png")
        return
    torch.set_num_threads(options.threads)
    given = {
        "time_budget": options.minutes * 60,
        "workers": 0,
        "views": "plain",
        "weights": None if options.weights == "none" else options.weights,
    }
    recipe = presets.override(presets.preset("laptop"), given)
    results_path = options.keep / "results.json"
    results = read_json(results_path) if results_path.is_file() else {}
    for name in options.names:
        with processor_clock(options.threads):
            results[name] = examine_set(name, options.keep / name, recipe)
        write_atomically(results_path, json.dumps(results, indent=1))
    table = results_table(results)
    write_atomically(options.keep / "made_sets.md", table)
    print(table)


if __name__ == "__main__":
    sys.exit(main())
