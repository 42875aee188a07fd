"""The release: found, unpacked safely and whole, downloaded or explained."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import gdown
import pytest

from cellseg.data.archive import is_archive, unpack
from cellseg.data.release import (
    DEFAULT_RELEASE_ID,
    TestImage,
    download_release,
    extract_archive,
    find_class_names,
    find_release,
    read_test_index,
)
from cellseg.errors import DataError

INDEX = [{"file_name": "a.tif", "id": 1, "height": 3, "width": 5}]
FILES = {
    "train/s1/image.tif": b"pixels",
    "train/s1/class1.tif": b"ids",
    "test_release/a.tif": b"test",
    "test_image_name_to_ids.json": json.dumps(INDEX).encode(),
}


def write_tar(path: Path, files: dict[str, bytes], extra=(), mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member)
    return path


def write_zip(path: Path, files: dict[str, bytes], extra=()) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
        for info, data in extra:
            file.writestr(info, data)
    return path


def below(files: dict[str, bytes], top: str) -> dict[str, bytes]:
    return {top + name: data for name, data in files.items()}


def write_folder(root: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.mark.parametrize("top", ["hw3-data-release/", "x/hw3-data-release/", "", "./", "other/"])
@pytest.mark.parametrize("kind", [".tar.gz", ".tgz", ".tar", ".zip"])
def test_archive_beside_is_extracted_whatever_its_top_folder(project, top, kind):
    archive = project / f"hw3-data-release{kind}"
    if kind == ".zip":
        write_zip(archive, below(FILES, top))
    else:
        write_tar(archive, below(FILES, top), mode="w" if kind == ".tar" else "w:gz")
    release = find_release(project, extra_places=[])
    assert release.root == project / "hw3-data-release"
    assert listing(release.root) == {*FILES, ".extracted"}
    assert release.index_path.read_bytes() == FILES["test_image_name_to_ids.json"]
    assert {p.name for p in project.iterdir()} == {archive.name, "hw3-data-release"}


def test_second_run_does_nothing(project):
    archive = write_tar(project / "hw3-data-release.tar.gz", FILES)
    first = find_release(project, extra_places=[])
    (first.train_dir / "s1" / "mine.txt").write_text("kept")
    archive.write_bytes(b"damaged since")
    assert find_release(project, extra_places=[]) == first
    assert extract_archive(archive, first.root) == first
    assert (first.train_dir / "s1" / "mine.txt").read_text() == "kept"


def test_marker_or_all_three_parts_count_as_extracted(project):
    root = write_folder(project / "hw3-data-release")
    assert find_release(project, extra_places=[]).test_dir == root / "test_release"
    (root / "test_image_name_to_ids.json").unlink()
    with pytest.raises(DataError, match=r"not test_image_name_to_ids.json.*release_dir"):
        find_release(project, extra_places=[])
    (root / ".extracted").touch()
    assert find_release(project, extra_places=[]).index_path is None


def test_broken_extraction_is_made_good_and_nothing_is_lost(project):
    write_folder(project / "hw3-data-release", {"train/s1/half.tif": b"half"})
    (project / "hw3-data-release" / "README.md").write_text("stays")
    write_tar(project / "hw3-data-release.tar.gz", FILES)
    release = find_release(project, extra_places=[])
    assert listing(release.root) == {*FILES, ".extracted", "README.md", "train.old/s1/half.tif"}


@pytest.mark.parametrize("where", ["in", "in/a", "in/a/b/hw3-data-release", "in/a/b/c/release"])
def test_extracted_release_is_found_in_other_places_and_left_there(project, tmp_path, where):
    root = write_folder(tmp_path / where)
    assert find_release(project, extra_places=[tmp_path / "in"]).root == root
    assert list(project.iterdir()) == []


def test_archive_elsewhere_is_extracted_into_the_project(project, tmp_path):
    place = tmp_path / "drive" / "course"
    place.mkdir(parents=True)
    write_zip(place / "my_hw3.zip", FILES)
    release = find_release(project, extra_places=[tmp_path / "drive", tmp_path / "missing"])
    assert release.root == project / "hw3-data-release"
    assert {p.name for p in place.iterdir()} == {"my_hw3.zip"}


def test_other_archives_of_the_homework_are_passed_over(project):
    write_zip(project / "hw3_report.zip", {"report.pdf": b"pages"})
    assert find_release(project, extra_places=[]) is None
    assert {p.name for p in project.iterdir()} == {"hw3_report.zip"}
    write_zip(project / "hw3-data-release.zip", {"train/s1/image.tif": b""})
    with pytest.raises(DataError, match="does not hold train/, test_release/"):
        find_release(project, extra_places=[])


def test_release_dir_is_the_only_place_and_train_is_enough(project, tmp_path):
    write_folder(project / "hw3-data-release")
    lab = write_folder(tmp_path / "lab", {"train/s1/image.tif": b""})
    release = find_release(project, release_dir=lab)
    assert (release.root, release.test_dir, release.index_path) == (lab, None, None)
    nested = write_folder(tmp_path / "outer" / "inner")
    assert find_release(project, release_dir=tmp_path / "outer").root == nested
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_release(project, release_dir=tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare holds no train/.*; set it to the folder that"):
        find_release(project, release_dir=tmp_path / "bare")


def test_release_dir_may_be_an_archive(project, tmp_path):
    archive = write_tar(tmp_path / "any-name.tgz", FILES)
    assert find_release(project, release_dir=archive).root == project / "hw3-data-release"


def test_another_archive_than_the_folder_came_from_is_told_and_not_passed_over(project, tmp_path):
    first = write_tar(project / "hw3-data-release.tar.gz", FILES)
    release = find_release(project, extra_places=[])
    assert find_release(project, release_dir=first) == release
    (tmp_path / "new").mkdir()
    newer = write_tar(tmp_path / "new" / "hw3-new.tgz", FILES | {"train/s2/image.tif": b"more"})
    for named in (newer, newer.parent):
        with pytest.raises(DataError, match=r"another archive than .*hw3-new\.tgz; rename that"):
            find_release(project, release_dir=named)
    (release.root / ".extracted").write_text("extracted whole\n")  # as it was written before
    assert find_release(project, release_dir=newer) == release


def test_junk_of_macos_is_left_out(project):
    junk = {"__MACOSX/train/._s1": b"", "train/s1/._image.tif": b"", "train/.DS_Store": b""}
    archive = write_zip(project / "hw3.zip", FILES | junk)
    release = extract_archive(archive, project / "hw3-data-release")
    assert listing(release.root) == {*FILES, ".extracted"}


def tar_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_member(name: str, mode: int) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info, b"train/s1"


UNSAFE_NAMES = {
    "/etc/evil": "absolute",
    "C:/evil": "absolute",
    "train/../../evil": "leads outside",
    "train\\evil": "backslash",
}


@pytest.mark.parametrize("name", UNSAFE_NAMES)
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_unsafe_names_are_refused_before_anything_is_written(project, write, name):
    archive = write(project / "hw3-data-release.x", FILES | {name: b"evil"})
    with pytest.raises(DataError, match=f"not safe to unpack: .*{UNSAFE_NAMES[name]}"):
        extract_archive(archive, project / "hw3-data-release")
    assert list(project.iterdir()) == [archive]


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        (tar_member("train/link", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (tar_member("train/hard", tarfile.LNKTYPE, "train/s1/image.tif"), "is a link"),
        (tar_member("train/pipe", tarfile.FIFOTYPE), "is a device"),
        (tar_member("train/dev", tarfile.CHRTYPE), "is a device"),
        (tar_member("train/s1/image.tif", tarfile.REGTYPE), "comes twice"),
    ],
)
def test_unsafe_members_of_a_tar_are_refused(project, member, fault):
    archive = write_tar(project / "a.tar.gz", FILES, [member])
    with pytest.raises(DataError, match=fault):
        extract_archive(archive, project / "hw3-data-release")
    assert list(project.iterdir()) == [archive]


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        (zip_member("train/link", 0o120777), "is a link"),
        (zip_member("train/dev", 0o020666), "is a device"),
        (zip_member("TRAIN/s1/Image.tif", 0o100644), "comes twice"),
    ],
)
def test_unsafe_members_of_a_zip_are_refused(project, member, fault):
    archive = write_zip(project / "a.zip", FILES, [member])
    with pytest.raises(DataError, match=fault):
        extract_archive(archive, project / "hw3-data-release")
    assert list(project.iterdir()) == [archive]


def test_limits_and_full_disk(project, monkeypatch):
    archive = write_zip(project / "a.zip", FILES)
    total = sum(map(len, FILES.values()))
    with pytest.raises(DataError, match="more than 3 files"):
        unpack(archive, project, max_files=3)
    with pytest.raises(DataError, match="raise the limit"):
        unpack(archive, project, max_bytes=total - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": total - 1}))
    with pytest.raises(DataError, match="make room"):
        unpack(archive, project, max_bytes=total)
    assert list(project.iterdir()) == [archive]


@pytest.mark.parametrize("kind", ["w:gz", "w", "zip"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])  # a tar ends in padding
def test_truncated_archive_is_one_error(project, kind, share):
    big = FILES | {"test_release/b.tif": bytes(range(256)) * 200}
    archive = project / "hw3-data-release.tar"
    whole = write_zip(archive, big) if kind == "zip" else write_tar(archive, big, mode=kind)
    data = whole.read_bytes()
    archive.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="download it again"):
        find_release(project, extra_places=[])
    assert list(project.iterdir()) == [archive]


def test_tar_cut_between_two_members_is_noticed(project):
    data = write_tar(project / "a.tar", FILES, mode="w").read_bytes()
    (project / "a.tar").write_bytes(data[: 1024 * len(FILES)])  # header and one block a member
    with pytest.raises(DataError, match="no end mark"):
        extract_archive(project / "a.tar", project / "hw3-data-release")


def test_damaged_zip_is_one_error(project):
    archive = write_zip(project / "a.zip", FILES | {"train/s1/x": bytes(range(256)) * 40})
    data = bytearray(archive.read_bytes())
    place = data.index(b"train/s1/x") + 60
    data[place : place + 20] = bytes(20)
    archive.write_bytes(data)
    with pytest.raises(DataError, match="truncated or damaged"):
        extract_archive(archive, project / "hw3-data-release")
    assert list(project.iterdir()) == [archive]


def test_download_extracts_and_leaves_only_the_release(project, monkeypatch):
    asked = []

    def fetch(url, output):
        asked.append(url)
        write_tar(Path(output), below(FILES, "hw3-data-release/"))

    monkeypatch.setattr(gdown, "download", fetch)
    release = download_release(project)
    assert download_release(project) == release
    assert asked == [f"https://drive.google.com/uc?id={DEFAULT_RELEASE_ID}"]
    assert {p.name for p in project.iterdir()} == {"hw3-data-release"}


def quota_page(url, output):
    Path(output).write_text("<!DOCTYPE html><html>Quota exceeded</html>", encoding="utf-8")


def no_network(url, output):
    raise ConnectionError("name resolution failed")


def refused(url, output):
    raise gdown.exceptions.FileURLRetrievalError("Cannot retrieve the public link")


def cut_short(url, output):
    data = write_tar(Path(output), FILES).read_bytes()
    Path(output).write_bytes(data[:-30])


@pytest.mark.parametrize(
    ("fetch", "reason"),
    [
        (quota_page, "a web page came instead of an archive"),
        (no_network, "name resolution failed"),
        (refused, "Cannot retrieve the public link"),
        (cut_short, "truncated or damaged"),
        (lambda url, output: None, "no file came"),
    ],
)
def test_failed_download_says_what_to_fetch_and_leaves_nothing(project, monkeypatch, fetch, reason):
    monkeypatch.setattr(gdown, "download", fetch)
    with pytest.raises(DataError, match=reason) as caught:
        download_release(project, file_id="abc")
    for part in ("uc?id=abc", str(project), "hw3-data-release.tar.gz"):
        assert part in str(caught.value)
    assert list(project.iterdir()) == []


def test_index_keeps_its_order(tmp_path):
    rows = [*INDEX, {"file_name": "b.tif", "id": 0, "height": 2, "width": 1, "note": "more"}]
    (tmp_path / "index.json").write_text(json.dumps(rows), encoding="utf-8")
    assert read_test_index(tmp_path / "index.json") == [
        TestImage("a.tif", 1, 3, 5),
        TestImage("b.tif", 0, 2, 1),
    ]


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ({"a.tif": 1}, "holds a dict.*; extract it again"),
        ([[1]], "row 0 is a list"),
        ([INDEX[0] | {"file_name": "../a.tif"}], "no plain file name"),
        ([INDEX[0] | {"file_name": "x\\a.tif"}], "no plain file name"),
        ([INDEX[0] | {"file_name": None}], "no plain file name"),
        ([INDEX[0] | {"id": True}], "has id True"),
        ([INDEX[0] | {"height": 0}], "has height 0"),
        ([INDEX[0] | {"width": 5.0}], "has width 5.0"),
        ([{"file_name": "a.tif", "id": 1, "height": 3}], "has width None"),
        ([INDEX[0], INDEX[0] | {"id": 2}], "row 1 repeats the name 'a.tif'"),
        ([INDEX[0], INDEX[0] | {"file_name": "b.tif"}], "or the id 1"),
    ],
)
def test_faulty_index_is_refused(tmp_path, rows, fault):
    (tmp_path / "index.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match=fault):
        read_test_index(tmp_path / "index.json")


def test_names_of_classes_are_told_by_the_release_and_beside_its_parts(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    assert find_class_names(tmp_path / "train") is None
    (tmp_path / "class_names.json").write_text('["spindle", "round"]')
    for place in (tmp_path, tmp_path / "train", tmp_path / "result.json", str(tmp_path)):
        assert find_class_names(place) == ("spindle", "round")
    assert find_class_names(tmp_path / "train" / "a") is None
    (tmp_path / "class_names.json").write_text('{"1": "spindle"}')
    with pytest.raises(DataError, match=r"class_names\.json is no list of class names; correct it"):
        find_class_names(tmp_path / "train")


def test_is_archive_goes_by_content(tmp_path):
    assert is_archive(write_tar(tmp_path / "page.html", FILES))
    (tmp_path / "a.zip").write_text("<html>")
    assert not is_archive(tmp_path / "a.zip")
    assert not is_archive(tmp_path)
