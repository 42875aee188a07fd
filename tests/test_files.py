"""Files written whole, and what is said where they cannot be."""

import errno
import os

import pytest

from cellseg.errors import DataError, SettingsError
from cellseg.files import check_writable, open_atomically, read_json, read_text, tell_refusal


@pytest.mark.parametrize("folder", [False, True])
def test_what_can_be_written_need_not_exist_and_leaves_nothing(folder, tmp_path):
    check_writable(tmp_path / "a" / "b", folder=folder)
    assert list(tmp_path.iterdir()) == []
    check_writable(tmp_path, folder=True)


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="is a folder; name a file in it"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"b cannot be written \(.*file: Not a directory\); ch"):
        check_writable(tmp_path / "file" / "a" / "b")

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / "tmp123"))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SettingsError, match=r"x cannot be written .* denied\); choose another pl"):
        check_writable(tmp_path / "x")


@pytest.mark.parametrize("step", ["mkstemp", "fsync", "replace"])
def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(step, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        named = {"mkstemp": ["tmp123"], "fsync": [], "replace": list(arguments[:1])}[step]
        raise OSError(errno.ENOSPC, "No space left on device", *named)

    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(f"tempfile.{step}" if step == "mkstemp" else f"os.{step}", refuse)
    with pytest.raises(OSError) as caught, open_atomically(tmp_path / "x.json", "w") as file:
        file.write("new")
    assert tell_refusal(caught.value) == (
        f"{tmp_path / 'x.json'}: No space left on device; make space and run again"
    )
    assert os.listdir(tmp_path) == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"


def test_another_files_fault_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, open_atomically(tmp_path / "x.json"):
        (tmp_path / "other").read_bytes()
    assert tell_refusal(caught.value).startswith(f"{tmp_path / 'other'}: No such file")


def test_the_mark_that_windows_puts_before_utf_8_is_no_content(tmp_path):
    (tmp_path / "x.json").write_text('["é"]', encoding="utf-8-sig")
    assert read_text(tmp_path / "x.json") == '["é"]'
    assert read_json(tmp_path / "x.json") == ["é"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; check the path"),
        (b"\xff", r"is not UTF-8 text \(byte 0\); save it as UTF-8"),
        (b"[1", r"is not valid JSON \(line 1: .*\); write it anew"),
        (b"1" * 5000, r"holds a number that cannot be \(.*\); write it anew"),
    ],
    ids=["missing", "latin", "half", "digits"],
)
def test_what_is_no_json_is_named_with_the_remedy(content, message, tmp_path):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.json {message}"):
        read_json(tmp_path / "x.json")
