"""A run's folder in, report.pdf out: values travel as JSON data, never as typst source."""

import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import typst
from PIL import Image

from cellseg.errors import DataError
from cellseg.files import read_text, write_atomically
from cellseg.report.experiments import compare_experiments
from cellseg.report.facts import (
    Facts,
    data_sets_named,
    facts_of_epochs,
    facts_of_run,
    read_epochs,
)
from cellseg.report.glyphs import drop_undrawable, pick_fonts
from cellseg.report.plots import plot_learning_curves
from cellseg.report.student import read_experiments, read_words
from cellseg.report.style import save_figure

_BESIDE = ("report.typ", "references.yml")
_DRAWINGS = ("precision_recall", "errors_mended", "calibration")
_MAX_OVERLAYS = 2
_TISSUE_PIXELS = 1800
_DEFAULT_CUT = 0.5
_SVG = "{http://www.w3.org/2000/svg}svg"


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        path: the PDF.
        pages: number of its A4 pages.
        warnings: what the reader should know, in sentences; empty if all is well.
    """

    path: Path
    pages: int
    warnings: list[str]


def build_report(
    run_dir: str | Path,
    *,
    title: str = "Cell instance segmentation with Mask R-CNN",
    name: str = "",
    student_id: str = "",
    data_set: str = "",
    output: str | Path | None = None,
    tissue: bool = True,
    system_fonts: bool = True,
) -> Report:
    """Write the report of a run as PDF; the same folder gives the same bytes.

    Reads settings.json and metrics.jsonl, and what there is of what `evaluate_run` writes:
    scores.json, confusion.json and errors.json, and of figures/ precision_recall.svg,
    errors_mended.svg, calibration.svg, gallery.png and overlay*.png (the first two). What is
    missing is said. The student's own words and experiments come from words.md and
    experiments.toml, which are made with prompts if they are missing and never written over.

    Args:
        run_dir: folder of the run, or of a run of folds, which is told by its first fold and by
            the records of all.
        title: printed as it is, like all texts: no character has a special meaning.
        name: author, in any script for which a font is installed.
        student_id: printed beside the name.
        data_set: name of the data, printed in place of their folder's name. MoNuSAC and CoNSeP
            are cited where this, the folder or the student's words name them.
        output: the PDF to write; report.pdf in the run's folder by default.
        tissue: False leaves out every figure that shows pixels of images, and says so.
        system_fonts: False uses only the fonts that typst brings, which hold Latin, Greek and
            Cyrillic.

    Returns:
        the Report; characters that no font can draw are left out, with a warning.

    Raises:
        DataError: if settings.json or metrics.jsonl is missing, or a file is damaged; names it.
        TrainingError: if a line of metrics.jsonl is no epoch.
    """
    run_dir = Path(run_dir)
    output = Path(output) if output is not None else run_dir / "report.pdf"
    epochs = read_epochs(run_dir)
    facts = {"title": title, "author": name, "student_id": student_id, "tissue": tissue}
    facts |= facts_of_run(run_dir, data_set=data_set) | facts_of_epochs(epochs)
    facts |= _facts_of_student(run_dir, facts)
    fonts = typst.Fonts(include_system_fonts=system_fonts)
    facts, warnings = drop_undrawable(facts, fonts)
    facts["fonts"] = pick_fonts(fonts)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        facts["figures"] = _copy_figures(run_dir / "figures", root, tissue=tissue)
        save_figure(plot_learning_curves(epochs), root / "curves.svg")
        (root / "data.json").write_text(json.dumps(facts), encoding="utf-8")
        pdf, pages = _compile(root, fonts)
    write_atomically(output, pdf)
    return Report(output, pages, warnings)


def _facts_of_student(run_dir: Path, facts: Facts) -> Facts:
    """Return the student's words and experiments, and the data sets that are to be cited."""
    words = read_words(run_dir)
    cut = float(facts["confusion"]["score_threshold"]) if facts["confusion"] else _DEFAULT_CUT
    experiments = compare_experiments(run_dir, read_experiments(run_dir), score_threshold=cut)
    written = json.dumps([part for part in words.values() if not part["is_prompt"]])
    named = data_sets_named(facts["images"]["source"], written)
    return {"words": words, "experiments": experiments, "data_sets": named}


def _compile(root: Path, fonts: typst.Fonts) -> tuple[bytes, int]:
    """Compile the template beside its data; return the PDF and its number of pages.

    PDF/A is an archive's format: everything is embedded, and a character without a glyph is an
    error instead of a box.
    """
    for name in _BESIDE:
        shutil.copyfile(Path(__file__).with_name(name), root / name)
    compiler = typst.Compiler(root / "report.typ", root=root, font_paths=fonts)
    pdf = compiler.compile(format="pdf", pdf_standards="a-2b", timestamp=0)
    return pdf, int(json.loads(compiler.query("<pages>", field="value", one=True)))


def _copy_figures(figures_dir: Path, root: Path, *, tissue: bool) -> Facts:
    """Copy the figures: drawings as lines and letters, tissue at print size.

    Returns:
        name of each drawing -> file's name or None; "gallery" the same; "overlays" the files.
    """
    figures: Facts = {}
    for name in _DRAWINGS:
        path = figures_dir / f"{name}.svg"
        figures[name] = _copy_drawing(path, root) if path.exists() else None
    gallery, overlays = figures_dir / "gallery.png", sorted(figures_dir.glob("overlay*.png"))
    figures["gallery"] = _copy_tissue([gallery] if tissue and gallery.exists() else [], root)
    figures["overlays"] = _copy_tissue(overlays[:_MAX_OVERLAYS] if tissue else [], root)
    return figures


def _copy_drawing(path: Path, root: Path) -> str:
    """Copy a figure of lines and letters; return its name.

    Raises:
        DataError: if the file is no SVG.
    """
    text = read_text(path)
    try:
        whole = ElementTree.fromstring(text).tag == _SVG
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is no usable drawing ({error}); evaluate the run again") from None
    if not whole:
        raise DataError(f"{path} is no usable drawing (no SVG); evaluate the run again")
    (root / path.name).write_text(text, encoding="utf-8")
    return path.name


def _copy_tissue(paths: Sequence[Path], root: Path) -> list[str]:
    """Copy figures of tissue as JPEG; return their new names."""
    names = []
    for path in paths:
        image = _open_figure(path)
        image.thumbnail((_TISSUE_PIXELS, _TISSUE_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        names.append(f"{path.stem}.jpg")
        (root / names[-1]).write_bytes(buffer.getvalue())
    return names


def _open_figure(path: Path) -> Image.Image:
    """Return a figure's pixels as RGB.

    Raises:
        DataError: if the file is no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no usable image ({error}); remove it or draw it anew") from None
