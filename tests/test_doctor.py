"""The doctor: each remedy seen once, and a report whatever is missing, crashes or hangs."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

import cellseg.doctor
from cellseg import cli, models
from cellseg.doctor import Finding, examine, machine, probes, versions
from cellseg.doctor.examination import run_probes
from cellseg.doctor.probes import PROBES, Settings
from cellseg.errors import WeightsError
from cellseg.models import builders
from cellseg.report import glyphs

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "torchvision", "numpy", "scipy", "skimage", "PIL", "tifffile", "imagecodecs",
         "pycocotools", "matplotlib", "typst", "nbclient", "gdown"]  # fmt: skip
BLOCKED = "raise ImportError('blocked by the test')"


def replace_modules(folder, monkeypatch, **sources):
    """Let children find these modules before the installed ones."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))


def found(name, **settings):
    """Return the findings of a probe done in this process."""
    return list(probes._do(name, Settings(**settings)))


def test_nothing_heavy_is_imported_before_the_children():
    code = "import sys, cellseg.cli, cellseg.doctor; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not set(HEAVY) & set(done.stdout.split())


def test_it_reports_to_the_end_where_no_library_can_be_imported(tmp_path, monkeypatch):
    replace_modules(tmp_path, monkeypatch, **dict.fromkeys(HEAVY, BLOCKED))
    done = subprocess.run(
        [sys.executable, "-m", "cellseg", "doctor"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert all(re.match(r"(OK   |MEND |NOTE ) \S", line) for line in lines[:-1])
    assert {line[6:].split(":")[0] for line in lines} >= {*PROBES, "Python", "memory", "disk"}
    broken = [line[6:].split(":")[0] for line in lines if line.startswith("MEND")]
    assert {"torch", "numpy", "codecs", "training step"} <= set(broken)
    assert "tqdm" not in broken and "gdown" not in broken
    assert lines[-1] == f"to mend before anything works: {len(broken)}"


def test_a_library_that_takes_the_process_down_is_reported_and_the_rest_goes_on(
    tmp_path, monkeypatch
):
    says = "import os, sys; print('no such GPU', file=sys.stderr, flush=True); os.abort()"
    replace_modules(tmp_path, monkeypatch, numpy=says, torch="raise SystemExit(7)")
    numpy, torch, tqdm = run_probes(["numpy", "torch", "tqdm"], Settings(), seconds=30)
    assert numpy.broken and re.search(r"took its process down \(SIGABRT: no such GPU", numpy.detail)
    assert torch.broken and "exit code 7" in torch.detail
    assert not tqdm.remedy


def test_a_probe_that_hangs_is_ended_and_the_rest_goes_on(tmp_path, monkeypatch):
    replace_modules(tmp_path, monkeypatch, numpy="import time; time.sleep(60)")
    start = time.monotonic()
    numpy, tqdm = run_probes(["numpy", "tqdm"], Settings(), seconds=30, probe_seconds=2)
    assert numpy.broken and "did not end within 2 s" in numpy.detail
    assert not tqdm.remedy and time.monotonic() - start < 20


def test_probes_that_the_time_is_too_short_for_are_named(tmp_path, monkeypatch):
    replace_modules(tmp_path, monkeypatch, numpy="import time; time.sleep(60)")
    numpy, tqdm, fonts = run_probes(["numpy", "tqdm", "fonts"], Settings(), seconds=1)
    assert numpy.broken
    assert tqdm.broken and fonts.remedy and not fonts.broken
    assert tqdm.detail == fonts.detail == "not looked at: the time was up"


@pytest.mark.slow
def test_on_this_machine_all_is_well_within_a_minute(tmp_path):
    start = time.monotonic()
    findings = list(examine(tmp_path, runs_dir=tmp_path / "runs", device="cpu"))
    assert time.monotonic() - start < 60
    assert not [finding.line() for finding in findings if finding.broken]
    assert {finding.name for finding in findings} >= {*PROBES} - {"weights"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "finding, start",
    [
        (Finding("disk", "9 GB"), "OK    disk: 9 GB"),
        (Finding("disk", "2 GB", "make room"), "NOTE  disk: 2 GB; make room"),
        (Finding("disk", "0 GB", "make room", essential=True), "MEND  disk: 0 GB; make room"),
    ],
)
def test_the_command_prints_a_line_each_and_fails_if_something_essential_is_broken(
    monkeypatch, finding, start
):
    told = {}
    monkeypatch.setattr(
        cellseg.doctor, "examine", lambda **given: [told.update(given), finding][1:]
    )
    options = ["--runs-dir", "elsewhere", "--predictions-dir", "there", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, ["doctor", *options])
    assert done.output.splitlines()[0] == start
    assert done.exit_code == (1 if start.startswith("MEND") else 0)
    given = {"runs_dir": Path("elsewhere"), "predictions_dir": Path("there"), "device": "cpu"}
    assert told == given


@pytest.mark.parametrize(
    "version, requirement, fits",
    [
        ("2.6.0+cu124", "torch>=2.6", True),  # what follows the plus is a build
        ("2.10", "torch>=2.9.1", True),  # numbers, not text
        ("2.5.1", "torch>=2.6", False),
        ("2.6.1", "torch (==2.6.0)", False),  # as torchvision wrote it for years
        ("2.6.0+cpu", "torch==2.6.0", True),
        ("2.14.1", "torch (>=2.14.0)", True),
        ("2.15.0rc1", "torch>=2.15", True),
        ("2.6", "torch>=2.6.0", True),
        ("2.6", "torch==2.6.0", True),
        ("1.0", "jupyter", True),
        ("8.4", "pillow (!=8.3.*,>=5.3.0)", True),
    ],
)
def test_versions_are_compared_as_numbers(version, requirement, fits):
    assert versions.satisfies(version, requirement) is fits


def test_every_requirement_is_looked_at():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {re.match(r"[\w-]+", line).group() for line in lines} == {
        library.name for library in versions.LIBRARIES
    }


def pretend(monkeypatch, needs=(), **installed):
    """Let these versions seem to be installed, and torchvision to ask for this."""
    monkeypatch.setattr(versions.metadata, "version", installed.__getitem__)
    ours = versions.metadata.requires("cellseg") or (ROOT / "requirements.txt").read_text().split(
        "\n"
    )
    monkeypatch.setattr(
        versions.metadata, "requires", lambda name: list(needs) if name == "torchvision" else ours
    )


def test_an_old_version_and_a_missing_library_get_the_command():
    assert versions.judge_version("numpy", "1.25.2") == (
        'python -m pip install --upgrade "numpy>=1.26"'
    )
    assert versions.judge_version("gdown", None) == 'python -m pip install --upgrade "gdown>=6"'
    assert versions.judge_version("gdown", "5.2.0") and not versions.judge_version("gdown", "6.0")


def test_torchvision_built_for_another_torch_is_told(monkeypatch):
    pretend(monkeypatch, ["numpy", "torch==2.13.0"], torch="2.14.1", torchvision="0.28.0")
    remedy = versions.judge_version("torchvision", "0.28.0")
    assert "built for torch==2.13.0, and torch is 2.14.1" in remedy
    pretend(monkeypatch, ["numpy", "torch (==2.14.1)"], torch="2.14.1+cu130", torchvision="0.29.1")
    assert versions.judge_version("torchvision", "0.29.1") is None


@pytest.mark.parametrize(
    "name, version, words",
    [
        ("pycocotools", "2.0.9", "without `info`"),
        ("pycocotools", "2.0.10", "without `info`"),
        ("pycocotools", "2.0.11", "more than 255 masks"),
        ("pycocotools", "2.0.8", ""),
        ("gdown", "6.4.1", "starts anew"),
        ("gdown", "6.5.0", ""),
        ("numpy", None, ""),
    ],
)
def test_known_faults_of_versions_are_remarked(name, version, words):
    note = versions.known_note(name, version)
    assert words in note and bool(words) == bool(note)


def test_a_library_that_cannot_be_imported_gets_its_reason(monkeypatch):
    def fail(name):
        raise OSError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(versions.importlib, "import_module", fail)
    finding = versions.examine_library(versions.Library("torch", "torch"))
    assert finding.broken and "(libcudart.so.13: cannot open" in finding.detail
    assert "more" not in finding.detail and "--force-reinstall" in finding.remedy


def test_python_memory_disk_and_shared_memory_are_judged(tmp_path):
    assert machine.python_finding((3, 10)).broken
    assert not machine.python_finding((3, 11)).remedy and not machine.python_finding((3, 13)).remedy
    newer = machine.python_finding((3, 14))
    assert newer.remedy and not newer.broken
    assert not machine.memory_finding(5 * 10**9).remedy and not machine.memory_finding(None).remedy
    assert "batch_size" in machine.memory_finding(3 * 10**9).remedy
    assert not machine.disk_finding(tmp_path, 6 * 10**9).remedy
    assert machine.disk_finding(tmp_path, 4 * 10**9).remedy
    assert machine.disk_finding(tmp_path, 10**8).broken
    assert not machine.shared_finding(tmp_path / "none").remedy


def test_small_shared_memory_gets_a_remedy(tmp_path, monkeypatch):
    usage = type("Usage", (), {"total": 64 * 2**20})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert "--shm-size" in machine.shared_finding(tmp_path).remedy


def test_a_containers_limit_counts_and_files_in_memory_do_not(tmp_path):
    assert machine.free_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 1500\n")
    assert machine.free_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("4000\n")
    assert machine.free_in_container(tmp_path) == 4000 - 3000 + 1500


def test_a_folder_that_cannot_be_written_is_told_and_none_is_made(tmp_path):
    assert not machine.permission_finding("runs", tmp_path / "runs" / "deep").remedy
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    finding = machine.permission_finding("runs", tmp_path / "file" / "runs")
    assert finding.broken and "runs_dir" in finding.remedy


def test_a_folder_that_may_not_be_looked_into_is_no_end_of_the_examination(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    finding = machine.permission_finding("runs", tmp_path / "shut" / "runs")
    assert finding.line() == f"OK    writing runs: {tmp_path / 'shut' / 'runs'} can be written"


def test_codecs_are_tried_on_the_releases_kind_of_image(monkeypatch):
    (fine,) = found("codecs")
    assert not fine.remedy
    monkeypatch.setattr(tifffile, "imread", lambda file: np.zeros((6, 8, 4), np.uint8))
    (changed,) = found("codecs")
    assert changed.broken and "imagecodecs" in changed.remedy

    def fail(*arguments, **options):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile, "imwrite", fail)
    (failed,) = found("codecs")
    assert failed.broken and "requires the 'imagecodecs' package" in failed.detail


def test_a_chinese_font_is_looked_for_as_the_report_does(monkeypatch):
    monkeypatch.setattr(glyphs, "pick_fonts", lambda fonts: ["Libertinus Serif", "Songti TC"])
    assert found("fonts")[0].line() == "OK    fonts: Songti TC for Chinese in the report"
    monkeypatch.setattr(glyphs, "pick_fonts", lambda fonts: ["Libertinus Serif"])
    (finding,) = found("fonts")
    assert "fonts-noto-cjk" in finding.remedy and not finding.broken


def test_the_release_is_told_in_a_line_and_not_unpacked(tmp_path):
    (finding,) = found("data", project_dir=str(tmp_path))
    assert "hw3-data-release.tar.gz" in finding.remedy and not finding.broken
    (tmp_path / "hw3-data-release.zip").write_bytes(b"PK")
    assert found("data", project_dir=str(tmp_path)) == [finding]
    release = tmp_path / "hw3-data-release"
    (release / "train" / "a").mkdir(parents=True)
    (partial,) = found("data", project_dir=str(tmp_path))
    assert partial.broken and "extract the archive again" in partial.remedy
    (release / "test_release").mkdir()
    row = {"file_name": "t.tif", "id": 1, "height": 2, "width": 3}
    (release / "test_image_name_to_ids.json").write_text(json.dumps([row]))
    (whole,) = found("data", project_dir=str(tmp_path))
    assert whole.line() == f"OK    data: {release}, 1 samples, 1 test images"


def test_weights_are_there_whole_or_told_how_to_get(tmp_path):
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    url = f"https://download.pytorch.org/models/{name}"
    missing = probes.weights_finding("weights", url, tmp_path)
    assert url in missing.remedy and str(tmp_path) in missing.remedy and not missing.broken
    (tmp_path / name).write_bytes(content)
    assert not probes.weights_finding("weights", url, tmp_path).remedy
    (tmp_path / name).write_bytes(content[:-1])
    assert "remove it" in probes.weights_finding("weights", url, tmp_path).remedy


def test_the_weights_looked_for_are_those_that_the_builders_fetch(monkeypatch):
    fetched = []

    def note(entry):
        fetched.append(entry.url)
        raise WeightsError("no network in tests")

    monkeypatch.setattr(builders, "download_weights", note)
    for build in (models.get_model_mobilenetv2, models.get_model_resnet50v2):
        with pytest.raises(WeightsError):
            build(5)
    looked = []
    monkeypatch.setattr(
        probes, "weights_finding", lambda name, url, folder: looked.append(url) or Finding(name, "")
    )
    found("weights")
    assert looked == fetched


@pytest.mark.parametrize(
    ("can_do", "what"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx2": True}, r"float32 \(this CPU does not multiply bfloat16, .*\)"),
    ],
)
def test_a_training_step_is_taken(monkeypatch, can_do, what):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can_do, raising=False)
    (finding,) = found("training step", device="cpu")
    assert re.fullmatch(rf"OK    training step: on cpu in {what}, \d+\.\d s", finding.line())


def test_a_training_step_without_a_finite_loss_is_told(monkeypatch):
    monkeypatch.setattr(probes, "train_step", lambda device, precision: float("nan"))
    (finding,) = found("training step", device="cpu")
    assert finding.broken and "the loss is nan" in finding.detail


def test_a_device_that_is_not_here_is_told():
    (finding,) = found("training step", device="abacus")
    assert finding.broken and "use auto, cuda, mps or cpu" in finding.remedy


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch):
    monkeypatch.setattr(probes.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(probes, "train_step", lambda device, precision: 1.0)
    gpu, step = found("training step", device="cpu")
    assert gpu.name == "GPU" and "install a torch with CUDA" in gpu.remedy and not gpu.broken
    assert not step.remedy
