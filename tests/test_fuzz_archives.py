"""Hostile and broken archives: whole inside their folder, or not at all."""

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from hostile import FUZZ, bounded, cases, mutated
from hypothesis import given
from hypothesis import strategies as st

from cellseg.data.release import extract_archive
from cellseg.errors import DataError

pytestmark = FUZZ


FILES = {
    "train/s1/image.tif": b"pixels" * 30,
    "train/s1/class1.tif": b"ids",
    "test_release/a.tif": b"test",
    "test_image_name_to_ids.json": b"[]",
}


def make_tar(mode: str, extra: list[tarfile.TarInfo] = ()) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member, io.BytesIO(b"evil" * 200))
    return file.getvalue()


def make_zip(extra: list[zipfile.ZipInfo] = ()) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        for info in extra:
            archive.writestr(info, b"evil")
    return file.getvalue()


def survives_extraction(tmp_path: Path, data: bytes) -> None:
    """Extract an archive: whole inside its folder, or not at all."""
    project = tmp_path / "project"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    archive = project / "archive.x"
    archive.write_bytes(data)
    try:
        extract_archive(archive, project / "release", max_bytes=10**6, max_files=50)
    except DataError as error:
        assert "archive.x" in str(error)
        assert list(project.iterdir()) == [archive]
    else:
        assert {path.name for path in project.iterdir()} == {"archive.x", "release"}
        assert not [path for path in project.rglob("*") if path.is_symlink()]
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


ARCHIVES = [make_tar("w"), make_tar("w:gz"), make_tar("w:xz"), make_tar("w:bz2"), make_zip()]


@cases(450)
@given(data=mutated(ARCHIVES))
def test_damaged_archives(data, tmp_path):
    survives_extraction(tmp_path, data)


PARTS = st.sampled_from(
    ["..", "", ".", "a", "train", "~", "C:", "con", "x" * 300, "é", "\\", "a\nb", "image.tif"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)


@st.composite
def tar_members(draw) -> tarfile.TarInfo:
    member = tarfile.TarInfo(draw(NAMES))
    member.type = draw(st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S"]))
    member.linkname = draw(NAMES)
    member.size = draw(st.sampled_from([0, 4, 600])) if member.type in b"07" else 0
    member.mode = draw(st.sampled_from([0o644, 0o4777, 0]))
    return member


@cases(150)
@given(members=st.lists(tar_members(), min_size=1, max_size=3))
def test_tars_of_any_members(members, tmp_path):
    survives_extraction(tmp_path, make_tar("w", members))


@st.composite
def zip_members(draw) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = draw(NAMES)
    info.external_attr = draw(st.sampled_from([0o120777, 0o100644, 0o020666, 0])) << 16
    return info


@cases(150)
@given(members=st.lists(zip_members(), min_size=1, max_size=3))
def test_zips_of_any_members(members, tmp_path):
    survives_extraction(tmp_path, make_zip(members))


def test_archive_bombs_are_refused_before_they_unpack(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/s1/image.tif", bytes(10**8))
    with bounded(megabytes=50):
        survives_extraction(tmp_path, file.getvalue())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("train/s1/image.tif")
        member.size = 10**8
        tar.addfile(member, io.BytesIO(bytes(10**8)))
    with bounded(megabytes=50):
        survives_extraction(tmp_path, packed.getvalue())


def test_a_member_of_negative_size_does_not_lead_backwards(tmp_path):
    data = bytearray(make_tar("w"))
    data[124:136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    with bounded(), pytest.raises(DataError, match=r"a.tar is truncated or damaged .*-512 bytes"):
        extract_archive(tmp_path / "a.tar", tmp_path / "release")


def test_a_damaged_header_is_not_the_end_of_the_archive(tmp_path):
    data = bytearray(make_tar("w"))
    place = bytes(data).index(b"test_release/a.tif")
    data[place] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a.tar is truncated or damaged \(a damaged header"):
        extract_archive(tmp_path / "a.tar", tmp_path / "release")
