"""Corpora out of packages: which files, and what is said where the package is another."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis.routes import sources


def package(root: Path, version: str) -> SimpleNamespace:
    return SimpleNamespace(version=version, locate_file=lambda name: root / name)


def test_headers_are_those_that_somebody_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"c10/core/Device.h": "int a;\n", "torch/csrc/api.hpp": "// é\n"}
    left = ("ATen/ops/add.h", "torch/csrc/generated/All.h", "google/any.h", "c10/notes.txt")
    large = {"ATen/All.h": "x" * (sources.LARGEST + 1)}
    for name, text in (kept | dict.fromkeys(left, "no") | large).items():
        path = tmp_path / "torch/include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "distribution", lambda name: package(tmp_path, "2.13.0+cpu"))
    monkeypatch.setattr("sys.argv", ["sources", "headers", str(tmp_path / "out")])
    sources.main()
    out = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_text(encoding="utf-8")
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert out == kept
    assert capsys.readouterr().out.startswith("2 files, 13 bytes in ")


def test_another_version_is_refused_and_a_missing_package_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "distribution", lambda name: package(tmp_path, "0.12.0"))
    with pytest.raises(ValueError, match=r"zig: expected ziglang 0\.13\.0; got 0\.12\.0"):
        sources.chosen("zig")

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(sources, "distribution", missing)
    with pytest.raises(ValueError, match=r"run: pip install --no-deps ziglang==0\.13\.0"):
        sources.chosen("zig")
