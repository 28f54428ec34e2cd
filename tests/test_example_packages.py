"""Fetching and caching, as all examples do it; pip finds its wheel in a folder."""

import importlib
import zipfile

import pytest
from example_modules import EXAMPLES


@pytest.fixture
def packages(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return importlib.import_module("packages")


def test_a_file_and_a_folder_are_made_once_and_whole(packages, tmp_path):
    made = []

    def file(scratch):
        made.append(scratch)
        (scratch / "anything").write_text("text")
        return scratch / "anything"

    def folder(scratch):
        (scratch / "a" / "b").mkdir(parents=True)
        (scratch / "a" / "b" / "c").write_text("text")
        return scratch / "a"

    for _ in range(2):
        assert packages.cached("one.txt", file) == tmp_path / "cache/fusedloss/one.txt"
        assert (packages.cached("two", folder) / "b" / "c").read_text() == "text"
    assert len(made) == 1 and not made[0].exists()


def test_a_wheel_is_fetched_and_not_installed(packages, monkeypatch, tmp_path):
    shelf, folder = tmp_path / "shelf", tmp_path / "into"
    shelf.mkdir(), folder.mkdir()
    with zipfile.ZipFile(shelf / "shelved-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("shelved/data.txt", "text")
        wheel.writestr("shelved-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: shelved\nVersion: 1.0\n")
        wheel.writestr("shelved-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("shelved-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    found = packages.fetch_wheel("shelved==1.0", folder, "1 kB", "pass --data")
    with zipfile.ZipFile(found) as wheel:
        assert found.parent == folder and wheel.read("shelved/data.txt") == b"text"
