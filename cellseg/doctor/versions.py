"""The libraries: there, new enough, of versions that go together, and able to be imported."""

import importlib
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cellseg
from cellseg.doctor.findings import Finding


@dataclass(frozen=True)
class Library:
    """A library by the name it is installed by, the module to try, and whether all need it."""

    name: str
    module: str
    essential: bool = True


LIBRARIES = (
    Library("numpy", "numpy"),
    Library("torch", "torch"),
    Library("torchvision", "torchvision"),
    Library("scipy", "scipy.ndimage"),
    Library("scikit-image", "skimage"),
    Library("pillow", "PIL.Image"),
    Library("tifffile", "tifffile"),
    Library("imagecodecs", "imagecodecs"),
    Library("pycocotools", "pycocotools.mask"),
    Library("matplotlib", "matplotlib.figure"),
    Library("tqdm", "tqdm"),
    Library("typer", "typer"),
    Library("typst", "typst"),
    Library("jupyter", "nbclient", essential=False),
    Library("gdown", "gdown", essential=False),
)
_NO_INFO = "its loadRes fails on a truth of other tools without `info`"
NOTES = {  # faults of versions that do no harm here; the text says whom they may harm
    ("pycocotools", "2.0.9"): _NO_INFO,
    ("pycocotools", "2.0.10"): _NO_INFO,
    ("pycocotools", "2.0.11"): "its area() fails for more than 255 masks at once; not used here",
}
GDOWN_RESUMES = (6, 5)


def examine_library(library: Library) -> Finding:
    """Return the finding on a library, which is imported."""
    try:
        version = metadata.version(library.name)
    except metadata.PackageNotFoundError:
        version = None
    wrong = judge_version(library.name, version)
    try:
        importlib.import_module(library.module)
    except Exception as error:  # whatever a broken installation raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        found = f"{version or 'not installed'}, cannot be imported ({reason[0]})"
        remedy = wrong or f'python -m pip install --force-reinstall "{_wanted(library.name)}"'
        return Finding(library.name, found, remedy, library.essential)
    note = known_note(library.name, version)
    return Finding(library.name, f"{version or 'of unknown version'}{note}", wrong or "")


def judge_version(name: str, version: str | None) -> str | None:
    """Return what to do about a version, None if nothing; None as version: not installed."""
    wanted = _wanted(name)
    if version is None or not satisfies(version, wanted):
        return f'python -m pip install --upgrade "{wanted}"'
    if name == "torchvision" and (pin := mismatched_torch()):
        return (
            f"it was built for {pin}, and torch is {metadata.version('torch')}: python -m pip "
            "install --upgrade torch torchvision, both in one command"
        )
    return None


def known_note(name: str, version: str | None) -> str:
    """Return what to know of a version, as a remark behind it."""
    text = NOTES.get((name, version or ""))
    if name == "gdown" and version and _numbers(version) < GDOWN_RESUMES:
        text = "before 6.5 a download that broke off starts anew"
    return f" ({text})" if text else ""


def mismatched_torch() -> str | None:
    """Return the torch that torchvision asks for, if the one installed is another.

    torchvision's compiled operators fit the torch they were built with; its metadata names it.
    """
    try:
        torch, needs = metadata.version("torch"), metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return None
    pins = [need.split(";")[0].strip() for need in needs if re.match(r"torch\b(?!\w)", need)]
    return next((pin for pin in pins if not satisfies(torch, pin)), None)


def satisfies(version: str, requirement: str) -> bool:
    """Tell whether a version is what "name>=1.2" or "name (==1.2)" asks for.

    Only these two relations are judged; what follows a plus sign in a version does not count.
    """
    own = _numbers(version)
    for relation, text in re.findall(r"(==|>=)\s*([\w.]+)", requirement):
        wanted = _numbers(text)
        same = own + (0,) * (len(wanted) - len(own))  # 2.6 is 2.6.0
        if same < wanted if relation == ">=" else same[: len(wanted)] != wanted:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 6, 0) of "2.6.0+cu124", (2, 15) of "2.15rc1"."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release.group().split("."))) if release else ()


def _wanted(name: str) -> str:
    """Return the requirement on a library, its bare name if none is known."""
    for line in _requirements():
        found = re.match(r"[\w.-]+", line)
        if found and found.group().lower().replace("_", "-") == name and "extra ==" not in line:
            return line
    return name


def _requirements() -> list[str]:
    """Return this package's requirements: as installed, or from the file beside the package."""
    try:
        return metadata.requires("cellseg") or []
    except metadata.PackageNotFoundError:
        file = Path(cellseg.__file__).resolve().parents[1] / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line.split("#")[0].strip() for line in lines]
