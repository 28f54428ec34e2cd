"""Fetching and caching, as all examples do it; pip finds its wheel in a folder."""

import importlib
import zipfile

from example_modules import EXAMPLES


def test_a_wheel_is_fetched_once_and_not_installed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "shelved-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("shelved/data.txt", "text")
        wheel.writestr("shelved-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: shelved\nVersion: 1.0\n")
        wheel.writestr("shelved-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("shelved-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    packages, made = importlib.import_module("packages"), []

    def fetch(scratch):
        made.append(scratch)
        return packages.fetch_wheel("shelved==1.0", scratch, "1 kB", "pass --data")

    for _ in range(2):
        path = packages.cached("shelved.whl", fetch)
    assert path == tmp_path / "cache/fusedloss/shelved.whl" and len(made) == 1 and not made[0].exists()
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read("shelved/data.txt") == b"text"
