"""The files of a snapshot against what belongs in them.

Contract: `Content` is one logical file as it was found; every difference from its table of tensors becomes a problem
with the file it concerns. What follows from a file that is missing or unreadable is not listed again, tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from videolavit.inventory import for_task
from videolavit.snapshot import layout
from videolavit.snapshot.files import TensorFile, TensorSet
from videolavit.snapshot.layout import Part, Shapes
from videolavit.snapshot.report import FileState, Problem

Place = tuple[TensorFile, str]  # the file and the tensor's name in it
Places = dict[str, dict[str, Place]]  # component -> tensor -> where it is


@dataclass(frozen=True)
class Content:
    """One logical file.

    Attributes:
        tensors: None when there is no such file.
        known: every tensor that may stand in it.
        names: official name -> name in the file, unknown tensors included.
    """

    part: Part
    tensors: TensorSet | None
    known: Shapes
    names: dict[str, str]

    @classmethod
    def of(cls, part: Part, tensors: TensorSet | None, known: Shapes) -> Content:
        names: dict[str, str] = {}
        # Of two spellings of one name the official one counts.
        for key in sorted(tensors.where, key=lambda key: key not in known) if tensors else ():
            name = layout.official_name(part, key, known)
            if name is not None:
                names.setdefault(name, key)
        return cls(part, tensors, known, names)

    @property
    def readable(self) -> bool:
        return self.tensors is not None and bool(self.tensors.where)

    @property
    def lost(self) -> set[str]:
        """Official names of tensors in shards that are missing or damaged."""
        keys = self.tensors.lost if self.tensors else ()
        return {name for key in keys if (name := layout.official_name(self.part, key, self.known)) is not None}

    def place_tensors(self, places: Places) -> tuple[str, ...]:
        """Note where tensors are that no file before this one had; returns the components that use this file."""
        if self.tensors is None:
            return ()
        used: dict[str, None] = {}
        served = {component for component, tensors in places.items() if tensors}
        for name, key in self.names.items():
            if name not in self.known or (self.part.only and not name.startswith(self.part.only)):
                continue
            component, inside = layout.belongs_to(self.part, name)
            if inside not in places[component] and not (self.part.spare and component in served):
                places[component][inside] = (self.tensors.where[key], key)
                used[component] = None
        return tuple(used)


def check_content(root: Path, content: Content, used: tuple[str, ...], problems: list[Problem]) -> FileState:
    """Add what is wrong with one logical file to `problems`; returns its state. `used`: components that read it."""
    part, tensors, known = content.part, content.tensors, content.known
    needed = {name: shape for name, shape in known.items() if not name.startswith(part.may_lack or ("\n",))}
    if tensors is None:
        expected = needed or known
        components = tuple(dict.fromkeys(layout.belongs_to(part, name)[0] for name in expected))
        optional = _can_be_absent(root, part)
        if not optional:
            names = f"no {part.names[0]}, {part.names[2]} or index of shards, " if part.names else ""
            without = " or remove the folder to do without it" if part.optional else ""
            detail = f"{names}{len(expected)} tensors; download it{without}"
            problems.append(Problem(part.path, "missing file", detail))
        size = sum(2 * torch.Size(shape).numel() for shape in expected.values())
        return FileState(part.path, part.path, False, len(expected), size, (), components)
    lost = content.lost
    if content.readable:
        missing = [name for name in needed if name not in content.names and name not in lost]
        problems.extend(Problem(tensors.path, "missing", name) for name in missing)
    for name, key in content.names.items():
        entry = tensors.where[key].entries[key]
        if name not in known:
            problems.append(Problem(tensors.path, "unexpected", name, fatal=part.strict))
        elif not entry.dtype.is_floating_point:
            detail = f"{name} is {_short(entry.dtype)}, must be floating point"
            problems.append(Problem(tensors.path, "wrong type", detail))
        elif entry.shape != known[name]:
            detail = f"{name} is {list(entry.shape)}, must be {list(known[name])}"
            problems.append(Problem(tensors.path, "wrong shape", detail))
    return FileState(
        tensors.path,
        part.path,
        content.readable,
        len(tensors.where),
        sum(entry.bytes for _, entry in tensors.entries),
        tuple(dict.fromkeys(_short(entry.dtype) for _, entry in tensors.entries)),
        used,
    )


def check_motion_encoder(
    contents: dict[str, Content], places: Places, expected: Shapes, problems: list[Problem]
) -> None:
    """It has no file of its own, and the reference would run with random numbers in its place."""
    sources = [contents[layout.VIDEO_UNET], contents[layout.VIDEO_3D_UNET]]
    present = [content for content in sources if content.tensors is not None]
    if not present or any(content.lost or not content.readable for content in present):
        return  # reported with the file that is missing or cannot be read
    missing = [name for name in expected if name not in places["motion_encoder"]]
    holder = next((c for c in present if any(name.startswith("motion_encoder.") for name in c.names)), None)
    if holder is None:
        detail = f"motion_encoder.* ({len(missing)} tensors), neither here nor in {layout.VIDEO_3D_UNET}"
        problems.append(Problem(layout.VIDEO_UNET_BIN, "missing", detail))
    elif holder.tensors is not None:
        problems.extend(Problem(holder.tensors.path, "missing", f"motion_encoder.{name}") for name in missing)


def complete_projection(
    contents: dict[str, Content], places: Places, problems: list[Problem], *, fine_tuned: bool
) -> None:
    """The projection to embeddings: the generation model never uses it, so its own files may lack it."""
    lender = contents[layout.FINE_TUNED_MODEL]
    reported = not contents[layout.VISUAL_TOKENIZER].readable or (fine_tuned and (lender.lost or not lender.readable))
    visual, lent = places["visual_tokenizer"], places[for_task("visual_tokenizer")]
    for name in ("vit_proj.weight", "vit_proj.bias"):
        if name not in visual and name in lent:
            visual[name] = lent[name]
        elif name not in visual and not reported:
            detail = f"{name}, neither here nor in {layout.FINE_TUNED_MODEL}"
            problems.append(Problem(layout.VISUAL_TOKENIZER, "missing", detail))


def _can_be_absent(root: Path, part: Part) -> bool:
    if part.path == layout.VIDEO_UNET:
        return (root / layout.VIDEO_3D_UNET).is_file()
    # A folder without its weights is a download that was cut off, not a wish to do without.
    return part.optional and not (part.names and (root / part.path).is_dir())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
