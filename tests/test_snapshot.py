"""An official snapshot is a checkpoint: the same values, however its files are written; and convert keeps them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snapshot_factory import State, Style, save_bin, write_snapshot

from runtime.errors import CheckpointError, EnvironmentProblem, UsageError
from videolavit.checkpoints import Checkpoint, RandomWeights, load
from videolavit.commands import convert
from videolavit.config import PRESETS, ModelConfig
from videolavit.inventory import FINE_TUNED, for_task
from videolavit.models.components import COMPONENTS
from videolavit.snapshot import SnapshotError, is_snapshot, read_snapshot

SHAPES = PRESETS["tiny"]
WEIGHTS = RandomWeights(SHAPES, 0)  # every value is exact in float16
OWN = tuple(for_task(name) for name in FINE_TUNED)
UNET_BIN = "video_detokenizer/unet/diffusion_pytorch_model.bin"


@pytest.fixture(scope="module")
def weights() -> Cached:
    return Cached()


class Cached:
    """The random weights, drawn once."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def tensors(self, component: str) -> Iterator[tuple[str, torch.Tensor]]:
        if component not in self._states:
            self._states[component] = dict(WEIGHTS.tensors(component))
        return iter(self._states[component].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, weights: Cached) -> Path:
    """A snapshot with everything; not to be changed."""
    return write_snapshot(tmp_path_factory.mktemp("snapshot") / "v1", SHAPES, weights, Style())


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A snapshot that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "v1"))


def assert_equal(checkpoint: Checkpoint, weights: Cached, *components: str) -> None:
    for component in components:
        expected = dict(weights.tensors(component))
        actual = dict(checkpoint.weights.tensors(component))
        assert list(actual) == sorted(expected), component
        for name, tensor in actual.items():
            assert tensor.dtype == torch.float32
            if not (component == "visual_tokenizer" and name.startswith("vit_proj.")):
                assert torch.equal(tensor, expected[name]), f"{component}/{name}"


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_snapshot_loads_as_a_checkpoint(whole: Path, weights: Cached) -> None:
    checkpoint = load(whole)
    assert checkpoint.config == replace(SHAPES, keyframe_scheduler=checkpoint.config.keyframe_scheduler)
    assert (checkpoint.config.keyframe_scheduler.kind, checkpoint.trained) == ("ddim", True)
    assert checkpoint.components == (*COMPONENTS, *OWN)
    assert_equal(checkpoint, weights, *checkpoint.components)
    # tokenizer_encoder.bin has no projection: the generation model does not use it, the fine-tuned one lends its own.
    shared = dict(checkpoint.weights.tensors("visual_tokenizer"))["vit_proj.weight"]
    assert torch.equal(shared, dict(weights.tensors(OWN[1]))["vit_proj.weight"])


@pytest.mark.parametrize(
    "style",
    [
        Style(fine_tuned=False, bare_tokenizer=False, llm="bin", shards=2),
        Style(llm="bin", shards=1, video="prefixed"),
        Style(shards=1, video="both", bare_tokenizer=False, dtype=torch.bfloat16),
        Style(fine_tuned=False, bare_tokenizer=False, video="3d"),
    ],
    ids=["bin shards, no fine-tuned model", "one bin, prefixes", "one safetensors, UNet twice, bfloat16", "3d file"],
)
def test_every_way_of_writing_it_gives_the_same_values(style: Style, weights: Cached, tmp_path: Path) -> None:
    checkpoint = load(write_snapshot(tmp_path / "v1", SHAPES, weights, style))
    own = OWN if style.fine_tuned else ()
    assert checkpoint.components == (*COMPONENTS, *own)
    if style.dtype is torch.float16:
        assert_equal(checkpoint, weights, *COMPONENTS, *own)
    else:
        head = dict(weights.tensors("language_model"))["lm_head.weight"].bfloat16()
        stored = dict(read_snapshot(tmp_path / "v1").weights.stored("language_model"))["lm_head.weight"]
        assert stored.dtype == torch.bfloat16 and torch.equal(stored, head)
        assert_equal(checkpoint, weights, "motion_tokenizer", "keyframe_decoder", "visual_tokenizer")


def test_components_run_with_the_values_of_the_files(whole: Path, weights: Cached) -> None:
    checkpoint = load(whole)
    module = checkpoint.component("motion_encoder")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, dict(weights.tensors("motion_encoder"))[name]), name
    llm = checkpoint.component(for_task("language_model"))
    assert not any(p.requires_grad or p.is_meta for p in llm.parameters())
    assert all(buffer.isfinite().all() for buffer in llm.buffers())
    seen = checkpoint.for_task("understanding")
    assert seen.component("language_model") is llm
    assert seen.component("motion_encoder") is module
    assert checkpoint.component("language_model") is not llm
    checkpoint.release("motion_encoder")
    assert checkpoint.component("motion_encoder") is module
    assert checkpoint.component(for_task("language_model")) is not llm


def test_files_that_override_others(copy: Path, weights: Cached) -> None:
    """tokenizer_encoder.bin over the vision transformer's file; prefixed tensors over the UNet's and VAE's own."""
    changed = torch.full((1, 65, 64), 0.5)
    path = copy / "visual_tokenizer" / "tokenizer_encoder.bin"
    save_bin({**torch.load(path, weights_only=True), "encoder.pos_embed": changed}, path)
    unet = copy / UNET_BIN
    bias = torch.full((32,), 0.25)
    extra = {"unet.conv_in.bias": bias, "vae.encoder.conv_in.bias": bias}
    save_bin({**torch.load(unet, weights_only=True), **extra}, unet)
    checkpoint = load(copy)
    assert torch.equal(dict(checkpoint.weights.tensors("visual_tokenizer"))["encoder.pos_embed"], changed)
    assert torch.equal(dict(checkpoint.weights.tensors("video_unet"))["conv_in.bias"], bias)
    assert torch.equal(dict(checkpoint.weights.tensors("video_vae"))["encoder.conv_in.bias"], bias)


def test_the_first_video_file_wins_over_the_spare_one(copy: Path, weights: Cached) -> None:
    unet, encoder = dict(weights.tensors("video_unet")), dict(weights.tensors("motion_encoder"))
    other = {f"unet.{name}": tensor + 1 for name, tensor in unet.items()}
    other |= {f"motion_encoder.{name}": tensor + 1 for name, tensor in encoder.items()}
    save_bin(other, copy / "video_3d_unet.bin")
    assert_equal(load(copy), weights, "video_unet", "motion_encoder")
    spare = next(state for state in read_snapshot(copy).report.files if state.path == "video_3d_unet.bin")
    assert (spare.found, spare.components) == (True, ())
    bare = {
        name: t
        for name, t in torch.load(copy / UNET_BIN, weights_only=True).items()
        if not name.startswith("motion_encoder.")
    }
    save_bin(bare, copy / UNET_BIN)
    checkpoint = load(copy)  # the motion encoder alone comes from the other file
    assert_equal(checkpoint, weights, "video_unet")
    bias = dict(checkpoint.weights.tensors("motion_encoder"))["norm.bias"]
    assert torch.equal(bias, encoder["norm.bias"] + 1)


def test_older_names_and_buffers_are_understood(copy: Path, weights: Cached) -> None:
    path = copy / "image_detokenizer" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert any("proj_attn" in key for key in state)
    save_file(state, path)
    folder = copy / "language_model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["lm_head.weight"]
    save_file(load_file(shard) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, shard)
    report = read_snapshot(copy).report
    assert report.problems == ()
    assert_equal(load(copy), weights, "keyframe_vae", "language_model")


def test_the_projection_may_come_with_the_language_model(tmp_path: Path, weights: Cached) -> None:
    folder = write_snapshot(tmp_path / "v1", SHAPES, weights, Style(fine_tuned=False))
    with pytest.raises(SnapshotError, match=r"tokenizer_encoder\.bin: 2 missing: vit_proj\.weight"):
        load(folder)
    visual = dict(weights.tensors("visual_tokenizer"))
    lent = {name: visual[name] for name in ("vit_proj.weight", "vit_proj.bias")}
    save_bin({**lent, "quantize.embedding.weight": torch.zeros(512, 16)}, folder / "language_model/visual_weight.bin")
    checkpoint = load(folder)
    assert torch.equal(dict(checkpoint.weights.tensors("visual_tokenizer"))["vit_proj.weight"], lent["vit_proj.weight"])
    assert_equal(checkpoint, weights, "visual_tokenizer")  # nothing else is taken from there


# --- one report for everything --------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def edit(path: Path, change: Callable[[State], State]) -> None:
    if path.suffix == ".bin":
        save_bin(change(torch.load(path, weights_only=True)), path)
    else:
        save_file(change(load_file(path)), path)


def problems_of(folder: Path) -> list[tuple[str, str, str]]:
    return [(problem.file, problem.kind, problem.detail) for problem in read_snapshot(folder).report.fatal]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


class Trap:
    """Removes the snapshot's folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return shutil.rmtree, (str(self.folder),)


def spring(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "trap": Trap(path.parent)}, path)


MOTION = "motion_tokenizer.bin"
VAE = "video_detokenizer/vae/diffusion_pytorch_model.safetensors"
DAMAGE: list[tuple[str, Callable[[Path], object], tuple[str, str, str]]] = [
    ("missing file", lambda f: (f / MOTION).unlink(), (MOTION, "missing file", "195 tensors")),
    (
        "missing shard",
        lambda f: (f / "language_model_sft/model-00002-of-00003.safetensors").unlink(),
        ("language_model_sft/model-00002-of-00003.safetensors", "missing file", "112 tensors"),
    ),
    (
        "folder without weights",
        lambda f: [path.unlink() for path in (f / "language_model_sft").glob("model*")],
        ("language_model_sft", "missing file", "remove the folder"),
    ),
    (
        "missing tensor",
        lambda f: edit(f / MOTION, drop("quantize.embedding.weight")),
        (MOTION, "missing", "quantize.embedding.weight"),
    ),
    (
        "missing tensor of the vision transformer",
        lambda f: edit(f / "visual_tokenizer/eva_vitg_psz14.bin", drop("head.bias")),
        ("visual_tokenizer/eva_vitg_psz14.bin", "missing", "head.bias"),
    ),
    (
        "extra tensor",
        lambda f: edit(f / MOTION, lambda s: s | {"stray": torch.zeros(1)}),
        (MOTION, "unexpected", "stray"),
    ),
    (
        "wrong shape",
        lambda f: edit(f / VAE, lambda s: s | {"quant_conv.bias": torch.zeros(9)}),
        (VAE, "wrong shape", "quant_conv.bias is [9], must be [8]"),
    ),
    (
        "wrong type",
        lambda f: edit(f / VAE, lambda s: s | {"quant_conv.bias": torch.zeros(8, dtype=torch.int32)}),
        (VAE, "wrong type", "quant_conv.bias is"),
    ),
    (
        "no motion encoder",
        lambda f: edit(f / UNET_BIN, lambda s: {k: t for k, t in s.items() if not k.startswith("motion_encoder.")}),
        (UNET_BIN, "missing", "motion_encoder.* (47 tensors), neither here nor in video_3d_unet.bin"),
    ),
    (
        "half a motion encoder",
        lambda f: edit(f / UNET_BIN, drop("motion_encoder.norm.bias")),
        (UNET_BIN, "missing", "motion_encoder.norm.bias"),
    ),
    ("truncated file", lambda f: cut(f / UNET_BIN), (UNET_BIN, "unreadable", "cut off or damaged")),
    ("truncated safetensors", lambda f: cut(f / VAE), (VAE, "unreadable", "cut off or damaged")),
    ("wrong magic", lambda f: (f / MOTION).write_bytes(b"<html>"), (MOTION, "unreadable", "not a torch archive")),
    ("malicious archive", lambda f: spring(f / MOTION), (MOTION, "unreadable", "holds code")),
    (
        "missing tokenizer",
        lambda f: (f / "language_model/tokenizer.model").unlink(),
        ("language_model/tokenizer.model", "missing file", "download"),
    ),
    (
        "damaged tokenizer",
        lambda f: (f / "language_model/tokenizer.model").write_bytes(b"nothing"),
        ("language_model/tokenizer.model", "unreadable", "SentencePiece"),
    ),
    (
        "two tokenizers",
        lambda f: (f / "language_model_sft/tokenizer.model").write_bytes(b"other"),
        ("language_model_sft/tokenizer.model", "config", "differs"),
    ),
    (
        "missing configuration",
        lambda f: (f / "video_detokenizer/vae/config.json").unlink(),
        ("video_detokenizer/vae/config.json", "missing file", "download"),
    ),
]


@pytest.mark.parametrize(("damage", "expected"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damage_is_reported_once(damage: Callable[[Path], object], expected: tuple[str, str, str], copy: Path) -> None:
    damage(copy)
    found = problems_of(copy)
    assert [problem[:2] for problem in found] == [expected[:2]]
    assert expected[2] in found[0][2]
    with pytest.raises(SnapshotError) as caught:
        load(copy)
    message = str(caught.value)
    assert expected[0] in message and "--check" in message and "\n" not in message
    assert expected[0] in caught.value.report.text()
    assert copy.is_dir()


def test_all_files_are_in_one_report(copy: Path) -> None:
    (copy / "visual_tokenizer" / "eva_vitg_psz14.bin").unlink()
    edit(copy / MOTION, lambda s: drop("quantize.embedding.weight")(s) | {"stray\nname": torch.zeros(1)})
    edit(copy / VAE, lambda s: s | {"quant_conv.bias": torch.zeros(9)})
    config = copy / "image_detokenizer" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"act_fn": "gelu"}))
    with pytest.raises(SnapshotError) as caught:
        load(copy)
    assert "and 2 more" in str(caught.value) and "\n" not in str(caught.value)
    text = caught.value.report.text()
    for part in ("5 problems", "eva_vitg_psz14.bin", ": quantize.embedding.weight", ": stray?name", "must be [8]"):
        assert part in text
    assert 'act_fn is "gelu", must be "silu"' in text


def test_what_the_reference_puts_up_with_is_a_note(copy: Path, weights: Cached) -> None:
    edit(copy / "visual_tokenizer" / "tokenizer_encoder.bin", lambda s: s | {"decoder.stray": torch.zeros(1)})
    report = read_snapshot(copy).report
    assert [(p.kind, p.detail, p.fatal) for p in report.problems] == [("unexpected", "decoder.stray", False)]
    assert "decoder.stray" in report.text() and report.usable
    assert_equal(load(copy), weights, "visual_tokenizer")


def test_half_a_download_is_still_recognised(tmp_path: Path) -> None:
    assert not is_snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="official snapshot"):
        load(tmp_path)
    (tmp_path / "image_detokenizer").mkdir()
    assert is_snapshot(tmp_path)
    report = read_snapshot(tmp_path).report
    missing = {problem.file for problem in report.fatal if problem.kind == "missing file"}
    assert {"language_model", "motion_tokenizer.bin", "language_model/tokenizer.model"} <= missing
    assert all(problem.kind == "missing file" for problem in report.fatal)


# --- convert --------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(convert, [str(argument) for argument in arguments])


def test_convert_keeps_values_and_types(weights: Cached, tmp_path: Path) -> None:
    source = write_snapshot(tmp_path / "v1", SHAPES, weights, Style(dtype=torch.bfloat16))
    result = run(source, "-o", tmp_path / "made")
    assert result.exit_code == 0, result.output
    assert "understanding/language_model" in result.output
    before, after = load(source), load(tmp_path / "made")
    assert (after.config, after.trained, after.components) == (before.config, True, before.components)
    assert after.tokenizer == before.tokenizer
    assert after.digest == before.digest
    for component, dtype in [("language_model", "BF16"), ("understanding/motion_tokenizer", "BF16"), (MOTION, "F16")]:
        with safe_open(tmp_path / "made" / f"{component.removesuffix('.bin')}.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {dtype}, component  # noqa: SIM118
    again = run(source, "-o", tmp_path / "made")
    assert isinstance(again.exception, UsageError) and "--force" in str(again.exception)
    assert run(source, "-o", tmp_path / "made", "--force", "--json").exit_code == 0


def test_values_that_need_float32_stay_float32(copy: Path, tmp_path: Path) -> None:
    third = torch.full((512, 16), 1 / 3)
    path = copy / "visual_tokenizer" / "tokenizer_encoder.bin"
    edit(path, lambda s: s | {"quantize.embedding.weight": third})
    load(copy).save(tmp_path / "made")
    stored = load_file(tmp_path / "made" / "visual_tokenizer.safetensors")
    assert torch.equal(stored["quantize.embedding.weight"], third)


def test_a_converted_checkpoint_must_be_whole(whole: Path, tmp_path: Path) -> None:
    load(whole).save(tmp_path / "made")
    (tmp_path / "made" / "understanding" / "motion_tokenizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"understanding/motion_tokenizer\.safetensors missing"):
        load(tmp_path / "made")


def test_check_only_reports(copy: Path, tmp_path: Path) -> None:
    result = run(copy, "--check")
    assert result.exit_code == 0, result.output
    assert "11 tensors" not in result.output and ": complete" in result.output
    (copy / MOTION).unlink()
    broken = run(copy, "--check", "-o", tmp_path / "made", "--json")
    assert isinstance(broken.exception, CheckpointError)
    document = json.loads(broken.stdout.splitlines()[-1])
    assert not document["usable"] and document["problems"][0]["file"] == MOTION
    assert not (tmp_path / "made").exists()
    assert isinstance(run(copy, "-o", tmp_path / "made").exception, SnapshotError)
    assert not (tmp_path / "made").exists()


def test_convert_names_its_mistakes(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(run(whole).exception, UsageError)
    assert isinstance(run(tmp_path / "nowhere", "--check").exception, CheckpointError)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    full = run(whole, "-o", tmp_path / "made").exception
    assert isinstance(full, EnvironmentProblem) and "GiB are free" in str(full)


def test_sizes_no_preset_has(tmp_path: Path) -> None:
    """A model of one's own is read with its own configuration as the base."""
    own = replace(SHAPES, name="own", motion_encoder=replace(SHAPES.motion_encoder, depth=1))
    source = write_snapshot(tmp_path / "v1", own, RandomWeights(own, 1), Style(fine_tuned=False, bare_tokenizer=False))
    assert not read_snapshot(source).report.usable
    found = read_snapshot(source, own)
    assert found.report.usable
    assert isinstance(found.config, ModelConfig) and found.config.name == "own"
