"""Bundles: what is refused, with which words, and that publishing is all or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runtime.bundle import MANIFEST, Bundle, find, publish
from runtime.errors import BundleError, UsageError

SHIPPED = Path(__file__).parent.parent / "engines" / "shapes"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))


def edit(bundle: Path, change) -> None:
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_shipped_bundle_opens_and_is_trained() -> None:
    bundle = Bundle.open(SHIPPED)
    assert bundle.manifest.name == "shapes"
    assert bundle.manifest.trained


def test_what_is_shipped_is_small_enough_for_git() -> None:
    checkpoint = SHIPPED.parents[1] / "checkpoints" / "shapes"
    assert (checkpoint / "config.json").is_file()
    assert sum(file.stat().st_size for folder in (SHIPPED, checkpoint) for file in folder.rglob("*")) <= 48 << 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(surprise=1), "unknown field `surprise`"),
        (lambda d: d["geometry"].update(frames="24"), "Expected `int`"),
        (lambda d: d.pop("vocabulary"), "missing required field `vocabulary`"),
        (lambda d: d.update(format=99), "format is 99"),
        (lambda d: d["tokenizer"].update(path="../secret"), "leaves the bundle"),
        (lambda d: d["tokenizer"].update(path="/etc/passwd"), "leaves the bundle"),
        (lambda d: d["tokenizer"].update(bytes=1), "says 1"),
    ],
)
def test_bad_manifest_is_one_clear_error(copy: Path, change, words: str) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=words.replace("`", "`")) as caught:
        Bundle.open(copy)
    assert "\n" not in str(caught.value)


def test_every_file_is_covered_by_a_hash(copy: Path) -> None:
    for file in sorted(copy.rglob("*")):
        if file.name == MANIFEST or file.is_dir():
            continue
        original = file.read_bytes()
        flipped = bytearray(original)
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(bytes(flipped))
        with pytest.raises(BundleError, match=file.name):
            Bundle.open(copy)
        file.write_bytes(original)
    Bundle.open(copy)


def test_missing_file_and_broken_json(copy: Path) -> None:
    (copy / Bundle.open(copy).manifest.tokenizer.path).unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.open(copy)


def test_unknown_bundle_names_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDEOLAVIT_BUNDLE", raising=False)
    with pytest.raises(BundleError, match="engines/nowhere"):
        find("nowhere")


def test_publish_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt), publish(target, replace=False) as staging:
        (staging / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []

    with publish(target, replace=False) as staging:
        (staging / MANIFEST).write_text("1")
    with pytest.raises(UsageError, match="--force"), publish(target, replace=False):
        pass
    with pytest.raises(RuntimeError), publish(target, replace=True):
        raise RuntimeError
    assert (target / MANIFEST).read_text() == "1"
    with publish(target, replace=True) as staging:
        (staging / MANIFEST).write_text("2")
    assert (target / MANIFEST).read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_publish_never_replaces_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(UsageError, match="not an engine bundle"), publish(tmp_path / "precious", replace=True):
        pass
