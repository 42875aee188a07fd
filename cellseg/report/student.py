"""What the student writes for the report: words.md and experiments.toml in the run's folder.

Both are made once, with prompts, and never written again: they survive every rebuild.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg.errors import DataError
from cellseg.files import read_text, write_atomically

WORDS_NAME = "words.md"
EXPERIMENTS_NAME = "experiments.toml"
CHAPTERS = {
    "Introduction": "Why is the task hard on these images? What did you set out to do, and what "
    "does this report show?",
    "Data": "What did you see in the images: sizes, colours, crowded places, rare classes? How "
    "was the split chosen?",
    "Model": "Why this backbone? What did you change against the published Mask R-CNN, and why?",
    "Training": "Which settings did you choose yourself, and what did you look at to choose them?",
    "Results": "What do the curves, the confusion matrix and the worst cells tell you? What would "
    "you try next?",
    "Additional experiments": "What did the experiments teach you, taken together?",
}
_WORDS_HEAD = """\
Your own words for the report. Each chapter below is yours: write under its heading, and delete
the lines that begin with ">", which are printed in grey as long as there is nothing else. To leave
a chapter without words of your own, delete its lines and keep it empty. Text is printed as it
stands; an empty line begins a new paragraph, lines that begin with "- " become a list. The file
is never written over. (This paragraph, before the first heading, is not printed.)
"""
_EXPERIMENTS_START = """\
# Your additional experiments, in the order of the report. The file is never written over.
# Take away the "#" before the lines below, or copy them, one block an experiment.
#
# [[experiment]]
# title = "Half the learning rate"
# hypothesis = "A learning rate of 1e-4 instead of 2e-4 raises AP50 by 0.02."
# why = "The validation loss jumps from epoch to epoch, as it does when steps are too long."
# before = "../resnet50v2-1a2b3c4d"
# after = "."
# statistic = "ap50"
# result = "Not confirmed: ..."
#
# before and after (both, or neither) are what is compared: runs' folders that were evaluated on the
# same validation images, or files of records of these images; "." is this run. Paths start
# from this folder. The report adds the scores, their difference and its interval. statistic is
# ap50 unless you say ap, ap75, ap50_100, ap_100, pq, dq, sq, aji, dice or f_d.
"""
_KEYS = ("title", "hypothesis", "why", "result", "before", "after", "statistic")
_HEADING = re.compile(r"#\s+(.*?)\s*#*\s*$")
_LIST_ITEM = re.compile(r"\s*[-*]\s+(.*)")


@dataclass(frozen=True)
class Experiment:
    """One experiment as the student told it; "" where nothing was said.

    Attributes:
        line: where it begins in the file, from 1.
        title, hypothesis, why, result: texts.
        before, after: paths of what is compared; both or neither.
        statistic: the score of the comparison.
    """

    line: int
    title: str = ""
    hypothesis: str = ""
    why: str = ""
    result: str = ""
    before: str = ""
    after: str = ""
    statistic: str = "ap50"


def read_words(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Return the student's words by chapter; makes the file with its prompts if it is missing.

    Returns:
        chapter -> {"blocks": paragraphs (text) and lists (of texts), "is_prompt": bool}; no
        blocks where the file has none.

    Raises:
        DataError: if a heading is no chapter of the report; names file and line.
    """
    path = Path(run_dir) / WORDS_NAME
    if not path.exists():
        sections = (f"# {name}\n\n> {prompt}\n" for name, prompt in CHAPTERS.items())
        write_atomically(path, "\n".join((_WORDS_HEAD, *sections)))
    sections = _sections(path)
    words = {}
    for name in CHAPTERS:
        lines = sections.get(name, [])
        own = [line for line in lines if not line.startswith(">")]
        is_prompt = not "".join(own).strip()
        shown = [line.removeprefix(">").strip() for line in lines] if is_prompt else own
        words[name] = {"blocks": _blocks(shown), "is_prompt": is_prompt}
    return words


def read_experiments(run_dir: str | Path) -> list[Experiment]:
    """Return the student's experiments; makes the file with an example if it is missing.

    Raises:
        DataError: if the file is not TOML or holds something else; names file, line and remedy.
    """
    path = Path(run_dir) / EXPERIMENTS_NAME
    if not path.exists():
        write_atomically(path, _EXPERIMENTS_START)
    text = read_text(path).removeprefix("\ufeff")
    try:
        content = tomllib.loads(text.replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(_toml_fault(path, text, error)) from None
    entries = content.pop("experiment", [])
    if content or not isinstance(entries, list):
        wrong = next(iter(content), "experiment")
        raise DataError(
            f"{path}, line {_line_of(text, wrong)}: {wrong!r} belongs to no experiment; begin each "
            "with a line [[experiment]]"
        )
    headers = re.finditer(r"^[ \t]*\[\[\s*[\"']?experiment[\"']?\s*\]\]", text, re.MULTILINE)
    lines = [text.count("\n", 0, found.start()) + 1 for found in headers]
    lines += [1] * (len(entries) - len(lines))  # written as one inline table
    return [_experiment(path, *pair) for pair in zip(lines, entries, strict=False)]


def _sections(path: Path) -> dict[str, list[str]]:
    """Return the lines of each chapter in words.md."""
    names = {name.lower(): name for name in CHAPTERS}
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").splitlines(), start=1):
        heading = _HEADING.match(line)
        if heading is None:
            lines.append(line)
            continue
        name = names.get(heading[1].lower())
        if name is None:
            raise DataError(
                f"{path}, line {number}: {heading[1]!r} is no chapter of the report; use one of "
                f"{', '.join(CHAPTERS)}, or take the # away"
            )
        lines = sections.setdefault(name, [])
    return sections


def _blocks(lines: list[str]) -> list[str | list[str]]:
    """Return paragraphs, and lists of the lines that begin with a dash."""
    blocks: list[str | list[str]] = []
    fresh = True  # the next line of text begins something new
    for line in lines:
        item = _LIST_ITEM.fullmatch(line)
        if not line.strip():
            fresh = True
        elif item:
            if not (blocks and isinstance(blocks[-1], list)):
                blocks.append([])
            blocks[-1].append(item[1].strip())
            fresh = False
        elif fresh:
            blocks.append(line.strip())
            fresh = False
        elif isinstance(blocks[-1], list):
            blocks[-1][-1] += " " + line.strip()
        else:
            blocks[-1] += " " + line.strip()
    return blocks


def _experiment(path: Path, line: int, entry: Any) -> Experiment:
    """Return one entry of the file after checking it."""
    if not isinstance(entry, dict):
        raise DataError(f"{path}, line {line}: experiment is {entry!r}; begin with [[experiment]]")
    where = f"{path}, line {line}: the experiment"
    for key, value in entry.items():
        if key not in _KEYS:
            raise DataError(f"{where} has {key!r}; it may have {', '.join(_KEYS)}")
        if not isinstance(value, str):
            raise DataError(f'{where} has {key} = {value!r}; write a text in quotes, "{value}"')
    experiment = Experiment(line, **{key: value.strip() for key, value in entry.items()})
    if bool(experiment.before) != bool(experiment.after):
        there, missing = ("before", "after") if experiment.before else ("after", "before")
        raise DataError(f"{where} has {there} but not {missing}; give both, or neither")
    return experiment


def _toml_fault(path: Path, text: str, error: Exception) -> str:
    """Return what is wrong with a TOML file, where, and what to do."""
    found = re.search(r"\s*\(at line (\d+), column \d+\)", str(error))
    line = int(found[1]) if found else text.count("\n") + 1
    reason = re.sub(r"\s*\(at .*\)$", "", str(error))
    return (
        f"{path}, line {line}: not valid TOML ({reason}); put texts in double quotes, or move the "
        "file away, and the report makes a new one with an example"
    )


def _line_of(text: str, key: str) -> int:
    """Return the first line that names a key, 1 if none does."""
    lines = text.splitlines()
    hits = (k for k, line in enumerate(lines, 1) if key in line and line.lstrip()[:1] != "#")
    return next(hits, 1)
