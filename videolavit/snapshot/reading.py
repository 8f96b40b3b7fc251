"""A snapshot's folder -> configuration, tokenizer, where every tensor is, and the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from torch import Tensor

from videolavit.config import ModelConfig
from videolavit.inventory import FINE_TUNED, for_task
from videolavit.models.components import COMPONENTS
from videolavit.snapshot import layout
from videolavit.snapshot.checks import Content, Places, check_content, check_motion_encoder, complete_projection
from videolavit.snapshot.configs import choose_preset, read_configs
from videolavit.snapshot.files import TensorSet, open_set
from videolavit.snapshot.layout import PARTS, Part, Shapes
from videolavit.snapshot.report import Problem, SnapshotReport

TOKENIZER = "language_model/tokenizer.model"
FINE_TUNED_TOKENIZER = "language_model_sft/tokenizer.model"


class SnapshotWeights:
    """Weights from the files of a snapshot."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor as it is stored) pairs of one component in the order of their names."""
        for name, (file, key) in sorted(self._places[component].items()):
            yield name, file.get(key)

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) pairs of one component in the order of their names."""
        return ((name, tensor.float()) for name, tensor in self.stored(component))

    def stored_bytes(self, component: str) -> int:
        """Size of a component as it is stored."""
        return sum(file.entries[key].bytes for file, key in self._places[component].values())


@dataclass(frozen=True)
class Snapshot:
    """What was read. `components` lists those that exist, `tokenizer` is the SentencePiece file's content."""

    config: ModelConfig
    tokenizer: bytes
    components: tuple[str, ...]
    weights: SnapshotWeights
    report: SnapshotReport


def is_snapshot(folder: Path) -> bool:
    """Whether `folder` has at least one file or folder of the official layout."""
    return any((folder / part.path.partition("/")[0]).exists() for part in PARTS)


def read_snapshot(folder: Path, base: ModelConfig | None = None) -> Snapshot:
    """Open and check the snapshot in `folder`.

    Args:
        base: sizes of the parts that have no configuration file; None takes the preset whose vocabulary the
            language model has.
    """
    base = base or choose_preset(folder)
    problems: list[Problem] = []
    fine_tuned = (folder / layout.FINE_TUNED_MODEL).is_dir()
    config = read_configs(folder, base, fine_tuned=fine_tuned, problems=problems)
    config, shapes = _shapes(config, base, problems)
    tokenizer = _tokenizer(folder, config, problems)
    places: Places = {component: {} for component in shapes}
    contents: dict[str, Content] = {}
    files = []
    for part in PARTS:
        tensors = _open(folder, part, problems)
        content = contents[part.path] = Content.of(part, tensors, layout.tensors_of(part, shapes))
        used = content.place_tensors(places)
        if tensors is not None or not part.only:
            files.append(check_content(folder, content, used, problems))
    check_motion_encoder(contents, places, shapes["motion_encoder"], problems)
    complete_projection(contents, places, problems, fine_tuned=fine_tuned)
    components = (*COMPONENTS, *(for_task(name) for name in FINE_TUNED if fine_tuned))
    report = SnapshotReport(folder, tuple(files), tuple(problems))
    return Snapshot(config, tokenizer, components, SnapshotWeights(places), report)


def _shapes(config: ModelConfig, base: ModelConfig, problems: list[Problem]) -> tuple[ModelConfig, dict[str, Shapes]]:
    """The configuration and its inventory; the preset's when the libraries cannot build what the files say."""
    try:
        return config, layout.component_shapes(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError) as error:
        reason = (str(error).splitlines() or [""])[0]
        problems.append(Problem("*/config.json", "config", f"the sizes in these files make no model: {reason}"))
        return base, layout.component_shapes(base)


def _tokenizer(folder: Path, config: ModelConfig, problems: list[Problem]) -> bytes:
    path = folder / TOKENIZER
    if not path.is_file():
        problems.append(Problem(TOKENIZER, "missing file", "download it"))
        return b""
    content = path.read_bytes()
    try:
        pieces = SentencePieceProcessor(model_proto=content).get_piece_size()
    except RuntimeError as error:
        problems.append(Problem(TOKENIZER, "unreadable", f"is no SentencePiece model ({str(error).splitlines()[0]})"))
        return content
    if pieces != config.vocabulary.text_size:
        problems.append(Problem(TOKENIZER, "config", f"has {pieces} pieces, must be {config.vocabulary.text_size}"))
    other = folder / FINE_TUNED_TOKENIZER
    if other.is_file() and other.read_bytes() != content:
        detail = f"differs from {TOKENIZER}; one bundle has one tokenizer"
        problems.append(Problem(FINE_TUNED_TOKENIZER, "config", detail))
    return content


def _open(folder: Path, part: Part, problems: list[Problem]) -> TensorSet | None:
    if not part.names:
        parent, _, name = part.path.rpartition("/")
        return open_set(folder, parent, (name,), problems)
    found = open_set(folder, part.path, part.names, problems)
    if part.path == layout.VIDEO_UNET and found is not None and found.path != layout.VIDEO_UNET_BIN:
        # The reference reads the archive a second time, for everything that has a prefix.
        second = open_set(folder, part.path, (Path(layout.VIDEO_UNET_BIN).name,), problems)
        if second is not None:
            prefixes = tuple(owner.prefix for owner in part.owners)
            found.where.update({name: file for name, file in second.where.items() if name.startswith(prefixes)})
    return found
