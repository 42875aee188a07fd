"""Run a notebook from top to bottom outside Jupyter, with settings overridden from outside."""

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from cellseg.errors import CellsegError, DataError, SettingsError
from cellseg.files import read_json, write_atomically

_RUN_DIR_CELL = "print(run_dir)"
_WIDGET = "application/vnd.jupyter.widget-view+json"


def execute_notebook(
    path: str | Path,
    output_path: str | Path | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Execute a notebook in a kernel of its own and save the executed copy.

    The copy is saved also when a cell fails, up to that cell; the notebook itself is not
    changed.

    Args:
        path: the notebook; its cells run in its own folder.
        output_path: where to save the copy. By default it goes into the folder that the notebook
            calls `run_dir`, or into `runs/` if it did not come that far, under its own name.
        parameters: values that replace those of the cell tagged `parameters`: a cell after it
            assigns them (plain values and paths).
        timeout: seconds that one cell may take; None sets no limit.
        tell: called with a line such as "[3/20] Training" before each code cell, and with what
            the cells print.

    Returns:
        the path of the copy.

    Raises:
        DataError: if the path does not exist or is no notebook.
        SettingsError: if a parameter is not a variable of the tagged cell.
        CellsegError: if a cell fails; names the cell, the error and the saved copy.
    """
    path = Path(path)
    notebook = _read(path)
    if parameters:
        _inject(notebook, parameters, path)
    folder = path.resolve().parent
    client = _TellingClient(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": folder}},
        extra_arguments=["--log-level=ERROR"],  # its warning of a port of this machine scares
    )
    client.tell = tell
    failure, run_dir = None, None
    with client.setup_kernel():
        try:
            _execute_cells(client, tell)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failure = error
        if output_path is None and isinstance(failure, CellExecutionError | None):
            run_dir = _ask_run_dir(client)
    _drop_widgets(notebook)
    output_path = Path(output_path or folder / (run_dir or "runs") / path.name)
    write_atomically(output_path, nbformat.writes(notebook) + "\n")
    if failure is not None:
        raise CellsegError(_failure_text(failure, notebook, path, output_path)) from None
    return output_path


def _read(path: Path) -> NotebookNode:
    """Return a notebook; DataError if the file is missing or something else."""
    read_json(path)  # says by name what is missing, or is not JSON
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.ValidationError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a Jupyter notebook; name an .ipynb file") from error


class _TellingClient(NotebookClient):
    """A notebook client that passes on what the cells print."""

    tell: Callable[[str], None] | None = None

    def process_message(
        self, msg: dict, cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        """Handle one message of the kernel; printed lines are told too."""
        content = msg["content"]
        if self.tell and msg["msg_type"] == "stream" and content["name"] == "stdout":
            for line in content["text"].splitlines():
                self.tell(f"    {line}")
        return super().process_message(msg, cell, cell_index)


def _inject(notebook: NotebookNode, parameters: Mapping[str, Any], path: Path) -> None:
    """Insert a cell that assigns the parameters after the cell tagged for them."""
    cells = notebook.cells
    tagged = (k for k, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    place = next(tagged, None)
    if place is None:
        raise SettingsError(f"{path} has no cell tagged `parameters` to override; tag one")
    known = _assigned_names(cells[place].source)
    if unknown := sorted(set(parameters) - known):
        raise SettingsError(
            f"{path} has no setting {', '.join(unknown)}; its settings are "
            f"{', '.join(sorted(known))}"
        )
    values = {k: str(v) if isinstance(v, Path) else v for k, v in parameters.items()}
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    cell = new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    cells.insert(place + 1, cell)


def _assigned_names(source: str) -> set[str]:
    """Return the variables that a cell assigns."""
    names = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def _execute_cells(client: NotebookClient, tell: Callable[[str], None] | None) -> None:
    """Execute the code cells in order, telling the heading above each of them."""
    cells = client.nb.cells
    total = sum(cell.cell_type == "code" for cell in cells)
    heading, number = "", 0
    for index, cell in enumerate(cells):
        heading = _heading(cell) or heading
        if cell.cell_type == "code":
            number += 1
            if tell is not None:
                tell(f"[{number}/{total}] {heading}".rstrip())
            client.execute_cell(cell, index)


def _heading(cell: NotebookNode) -> str:
    """Return the last heading of a Markdown cell, "" if there is none."""
    if cell.cell_type != "markdown":
        return ""
    headings = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
    return headings[-1] if headings else ""


def _ask_run_dir(client: _TellingClient) -> str | None:
    """Return the notebook's `run_dir`, None if it has none."""
    probe = new_code_cell(_RUN_DIR_CELL)
    client.tell = None  # what it prints is for us
    client.nb.cells.append(probe)
    try:
        client.execute_cell(probe, len(client.nb.cells) - 1, store_history=False)
    except CellExecutionError:
        return None
    finally:
        client.nb.cells.pop()
    return probe.outputs[0].text.strip()


def _drop_widgets(notebook: NotebookNode) -> None:
    """Take away progress bars, of which a copy would show the beginning for ever."""
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if _WIDGET not in o.get("data", {})]


def _failure_text(failure: Exception, notebook: NotebookNode, path: Path, output_path: Path) -> str:
    """Say which cell failed with which error, and where to look."""
    heading = ""
    for cell in notebook.cells:
        heading = _heading(cell) or heading
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            break
    if isinstance(failure, CellExecutionError):
        what = f"the cell under {heading!r} failed: {failure.ename}: {failure.evalue}"
    elif isinstance(failure, CellTimeoutError):
        what = "a cell took longer than it may"
    else:
        what = "the kernel died, perhaps for want of memory"
    return f"{path.name}: {what}; the notebook up to there is {output_path}"
