"""What needs libraries: done in a child process, which writes each finding as soon as it is known.

The libraries are imported within the functions: where one is missing, the others go on.
"""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cellseg.doctor.findings import Finding
from cellseg.doctor.versions import LIBRARIES, examine_library


@dataclass(frozen=True)
class Settings:
    """What the probes are told: the folder to find data in, and the device to train on."""

    project_dir: str = "."
    device: str = "auto"


def probe_codecs(settings: Settings) -> Iterator[Finding]:
    """Write and read an image as the release's are: TIFF, LZW, horizontal predictor."""
    import numpy as np
    import tifffile

    pixels = np.arange(6 * 8 * 4, dtype=np.uint8).reshape(6, 8, 4)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", compression="lzw", predictor=True)
    file.seek(0)
    if np.array_equal(tifffile.imread(file), pixels):
        yield Finding("codecs", "TIFF with LZW and predictor is read as it was written")
    else:
        remedy = 'python -m pip install --upgrade "tifffile" "imagecodecs"'
        yield Finding("codecs", "TIFF with LZW comes back changed", remedy, essential=True)


def probe_fonts(settings: Settings) -> Iterator[Finding]:
    """Look for a font with Chinese characters, as the report does."""
    import typst

    from cellseg.report.glyphs import pick_fonts

    chinese = pick_fonts(typst.Fonts(include_system_fonts=True))[1:]
    if chinese:
        yield Finding("fonts", f"{chinese[0]} for Chinese in the report")
    else:
        remedy = (
            "for a name in Chinese on the report install one, on Debian, Ubuntu and Colab: "
            "apt-get install fonts-noto-cjk"
        )
        yield Finding("fonts", "none with Chinese characters", remedy)


def probe_data(settings: Settings) -> Iterator[Finding]:
    """Look for the release, without unpacking anything."""
    from cellseg.data import find_release, read_test_index
    from cellseg.data.dataset import list_sample_ids
    from cellseg.errors import DataError

    try:
        release = find_release(settings.project_dir, extract=False)
        if release is None:
            remedy = (
                f"put hw3-data-release.tar.gz into {Path(settings.project_dir).resolve()} (it is "
                "unpacked at first use) or set download = True; until then made tissue stands in"
            )
            yield Finding("data", "no unpacked release is found", remedy)
            return
        samples = len(list_sample_ids(release.train_dir))
        tests = 0 if release.index_path is None else len(read_test_index(release.index_path))
    except DataError as error:
        yield Finding("data", "a release that cannot be used", str(error), essential=True)
        return
    yield Finding("data", f"{release.root}, {samples} samples, {tests} test images")


def probe_weights(settings: Settings) -> Iterator[Finding]:
    """Look for the pretrained weights of the presets where torchvision keeps them."""
    import torch
    from torchvision.models import MobileNet_V2_Weights
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for preset, entry in (
        ("laptop", MobileNet_V2_Weights.IMAGENET1K_V2),
        ("gpu", MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1),
    ):
        yield weights_finding(f"weights ({preset})", entry.url, folder)


def weights_finding(name: str, url: str, folder: Path) -> Finding:
    """Judge a file of weights by the start of its SHA-256, which its name ends in."""
    path = folder / url.rsplit("/", 1)[-1]
    if not path.is_file():
        remedy = (
            f"it is fetched at first use; without network fetch {url} elsewhere and put it into "
            f"{folder}, or set weights = None"
        )
        return Finding(name, f"{path.name} is not there yet", remedy)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.startswith(path.stem.rsplit("-", 1)[-1]):
        return Finding(name, str(path))
    return Finding(name, f"{path} is damaged", "remove it, so that it is fetched anew")


def probe_device(settings: Settings) -> Iterator[Finding]:
    """Take one training step of a small model on two cells, on the device of the training."""
    import torch

    from cellseg.errors import SettingsError
    from cellseg.training import pick_device
    from cellseg.training.precision import pick_precision

    try:
        device = pick_device(settings.device)
    except SettingsError as error:
        yield Finding("training step", f"not on {settings.device}", str(error), essential=True)
        return
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        remedy = "install a torch with CUDA as pytorch.org shows, or mend the driver"
        yield Finding("GPU", f"torch {torch.__version__} cannot use the one that is here", remedy)
    precision = pick_precision(device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    what = f"on {named} in {str(precision).removeprefix('torch.')}"
    if device.type == "cpu" and precision == torch.float32:
        what += " (this CPU does not multiply bfloat16, which halves the time of a step)"
    start = time.perf_counter()
    loss = train_step(device, precision)
    seconds = time.perf_counter() - start
    if loss == loss and abs(loss) < float("inf"):
        yield Finding("training step", f"{what}, {seconds:.1f} s")
    else:
        remedy = "train with precision = 'float32', or on another device"
        yield Finding("training step", f"{what}: the loss is {loss}", remedy, essential=True)


def train_step(device: "torch.device", precision: "torch.dtype") -> float:  # noqa: F821
    """Return the loss after a step of SGD on an image of 64 x 96 with two cells."""
    import torch

    from cellseg.models import get_model_mobilenetv2
    from cellseg.training import to_device
    from cellseg.training.precision import autocast

    small = {"fpn_channels": 16, "head_width": 32, "train_proposals": 50, "rois_per_image": 16}
    model = get_model_mobilenetv2(3, weights=None, seed=0, **small).to(device).train()
    instance_map = torch.zeros((1, 64, 96), dtype=torch.int32)
    instance_map[0, 8:28, 10:34], instance_map[0, 30:58, 50:80] = 1, 2
    target = {
        "boxes": torch.tensor([[10.0, 8, 34, 28], [50, 30, 80, 58]]),
        "labels": torch.tensor([1, 2]),
        "instance_map": instance_map,
        "image_id": 1,
    }
    image = (instance_map.clamp(max=1) * 120).to(torch.uint8).expand(3, -1, -1)
    images, targets = to_device([image], [target], device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with autocast(device, precision):
        loss = sum(model(images, targets).values())
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@dataclass(frozen=True)
class Probe:
    """A thing to do in the child, whether the workflow needs it, and what to do if it fails."""

    do: Callable[[Settings], Iterator[Finding]]
    essential: bool
    remedy: str


def _library_probes() -> dict[str, Probe]:
    """Return a probe for each library: to import it may end the process."""
    return {
        library.name: Probe(
            lambda settings, library=library: iter([examine_library(library)]),
            library.essential,
            f'python -m pip install --force-reinstall "{library.name}"',
        )
        for library in LIBRARIES
    }


PROBES = _library_probes() | {
    "codecs": Probe(probe_codecs, True, "mend tifffile and imagecodecs first"),
    "fonts": Probe(probe_fonts, False, "mend typst and matplotlib first"),
    "data": Probe(probe_data, False, "mend the libraries above first"),
    "weights": Probe(probe_weights, False, "mend torch and torchvision first"),
    "training step": Probe(
        probe_device, True, "mend the libraries above first, then try device = 'cpu'"
    ),
}


def do_probes(file: str | Path, names: list[str], settings: Settings) -> None:
    """Do probes one after the other, and write down what they find and that they have ended.

    Args:
        file: one JSON object a line is added to it: a finding, or `{"ended": name}`.
        names: of `PROBES`.
        settings: for all of them.
    """
    with Path(file).open("a", encoding="utf-8") as output:
        for name in names:
            for finding in _do(name, settings):
                output.write(json.dumps(asdict(finding)) + "\n")
                output.flush()
            output.write(json.dumps({"ended": name}) + "\n")
            output.flush()


def _do(name: str, settings: Settings) -> Iterator[Finding]:
    """Yield what a probe finds; what it raises becomes a finding."""
    probe = PROBES[name]
    try:
        yield from probe.do(settings)
    except Exception as error:  # whatever a broken library raises
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        yield Finding(name, f"failed ({reason})", probe.remedy, probe.essential)
