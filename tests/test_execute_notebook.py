"""A notebook run outside Jupyter: settings overridden, copy saved, failures named."""

import inspect
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from cellseg.cli.training import train
from cellseg.errors import CellsegError, DataError, SettingsError
from cellseg.notebook import execute_notebook


def write_notebook(folder, *sources):
    """Write a notebook: settings, then a heading and a code cell a source."""
    settings = new_code_cell("rounds = 3\nname = 'a'", metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Settings"), settings]
    for number, source in enumerate(sources):
        cells += [new_markdown_cell(f"Words.\n## Part {number}"), new_code_cell(source)]
    path = folder / "Tiny.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def texts(path):
    notebook = nbformat.read(path, as_version=4)
    return [output.text for cell in notebook.cells for output in cell.get("outputs", [])]


def test_parameters_replace_settings_and_the_copy_goes_to_the_run(tmp_path):
    path = write_notebook(tmp_path, "print(rounds, name)", "run_dir = f'runs/{name}'")
    before, told = path.read_bytes(), []
    copy = execute_notebook(path, parameters={"rounds": 5}, tell=told.append)
    assert copy == tmp_path / "runs" / "a" / "Tiny.ipynb"
    assert texts(copy) == ["5 a\n"]
    assert told == [
        "[1/4] Settings", "[2/4] Settings", "[3/4] Part 0", "    5 a", "[4/4] Part 1",
    ]  # fmt: skip
    assert path.read_bytes() == before


def test_the_copy_holds_no_progress_bar_and_the_kernel_is_quiet(tmp_path, capfd):
    bar = "from tqdm.auto import tqdm\nprint(sum(tqdm(range(3), desc='count', leave=False)))"
    copy = execute_notebook(write_notebook(tmp_path, bar), tmp_path / "out.ipynb")
    outputs = nbformat.read(copy, as_version=4).cells[-1].outputs
    assert [output.get("text") for output in outputs] == ["3\n"]
    assert "WARNING" not in capfd.readouterr().err


def test_failing_cell_is_named_and_the_copy_saved(tmp_path):
    path = write_notebook(tmp_path, "print('so far')", "1 / 0", "print('never')")
    output = tmp_path / "out.ipynb"
    with pytest.raises(
        CellsegError, match=r"cell under 'Part 1' failed: ZeroDivisionError: division"
    ):
        execute_notebook(path, output)
    notebook = nbformat.read(output, as_version=4)
    assert [len(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"] == [
        0,
        1,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; check the path"),
        ("# words", "is not valid JSON"),
        ("[]", "is not a Jupyter notebook; name an .ipynb file"),
        ("{}", "is not a Jupyter notebook"),
        ('{"nbformat": 4, "cells": [1]}', "is not a Jupyter notebook"),
        ('{"nbformat": "x"}', "is not a Jupyter notebook"),
        ('{"nbformat": 99, "cells": []}', "is not a Jupyter notebook"),
    ],
)
def test_what_is_no_notebook_is_named(content, message, tmp_path):
    path = tmp_path / "x.ipynb"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"x\.ipynb {message}"):
        execute_notebook(path)
    assert not (tmp_path / "runs").exists()


def test_unknown_parameter_is_named(tmp_path):
    path = write_notebook(tmp_path)
    with pytest.raises(SettingsError, match="no setting speed; its settings are name, rounds"):
        execute_notebook(path, parameters={"speed": 1})


def test_the_notebook_and_the_command_line_start_from_the_same_settings():
    notebook = nbformat.read(Path(__file__).parents[1] / "Training.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    settings = {}
    exec(cell.source, settings)
    options = {name: row.default for name, row in inspect.signature(train).parameters.items()}
    # None is the preset's weights, the data's names; a folder is a text in the notebook.
    shared = settings.keys() & options.keys() - {"weights", "class_names", "runs_dir"}
    assert {"val_fraction", "groups", "seed", "preset"} <= shared
    assert {name: settings[name] for name in shared} == {name: options[name] for name in shared}
