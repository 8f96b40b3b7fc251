"""The training loop with a toy stage: it learns, goes on after every kind of end, and says what is wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from toy_stage import ToyStage, toy_checkpoint

from runtime.errors import CheckpointError, EnvironmentProblem, UsageError
from videolavit import checkpoints, cli
from videolavit.config import LanguageModelConfig
from videolavit.models.language_model import build_language_model
from videolavit.training import states
from videolavit.training.errors import TrainingError
from videolavit.training.loop import Outcome, enable_gradient_checkpointing, learning_rate, train
from videolavit.training.metrics import MetricsFile
from videolavit.training.order import Batches
from videolavit.training.settings import DataSettings, TrainSettings, read_settings
from videolavit.training.stage import Stage

STAGE = "toy_stage:ToyStage"
SETTINGS = TrainSettings(
    stage=STAGE, steps=24, batch_size=4, learning_rate=0.01, save_every=5, log_every=2, data=DataSettings(size=30)
)
TIMES = {"seconds", "items_per_second"}  # columns that depend on the clock
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return toy_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 24 steps, with a running average, that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(toy_checkpoint(folder / "checkpoint"), folder / "run", ema=0.9)
    return folder / "run"


def run(checkpoint: Path, folder: Path, *, resume: bool = False, force: bool = False, **changes: Any) -> Outcome:
    settings = msgspec.structs.replace(SETTINGS, **changes)
    return train(settings, checkpoint, folder, resume=resume, force=force)


def rows(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as stream:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(stream)]


def assert_same_end(one: Path, other: Path, steps: int = 24) -> None:
    """Equal losses, and bit for bit the same weights, averages, moments and components."""
    assert rows(one) == rows(other)
    for name in (f"step-{steps:06d}/model", f"step-{steps:06d}/ema", "components/motion_encoder"):
        if not (one / f"{name}.safetensors").exists():
            assert name.endswith("ema") and not (other / f"{name}.safetensors").exists()
            continue
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    moments = [torch.load(f / f"step-{steps:06d}" / "optimizer.pt", weights_only=True)["state"] for f in (one, other)]
    assert str(moments[0]) == str(moments[1])


def write_recipe(path: Path, **changes: Any) -> Path:
    """`SETTINGS` with `changes` as a TOML file; numbers, words and lists are written as in JSON."""
    content = {**msgspec.to_builtins(SETTINGS), "data": {"size": 30}, **changes}
    tables = {name: content.pop(name) for name in ("data", "options")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in content.items()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    return path


def start(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    )


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return int(caught.value.code or 0)


# What a run does


def test_training_lowers_the_loss_and_publishes(checkpoint: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    notes: list[str] = []
    settings = msgspec.structs.replace(SETTINGS, steps=60, warmup_steps=5, validate_every=30)
    outcome = train(settings, checkpoint, tmp_path / "run", note=notes.append)
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert [row["step"] for row in rows(tmp_path / "run")] == [str(step) for step in range(2, 61, 2)]
    assert {"loss", "largest", "offset", "learning_rate", "grad_norm"} <= rows(tmp_path / "run")[0].keys()
    errors = [float(row["error"]) for row in rows(tmp_path / "run", "validation.csv")]
    assert len(errors) == 2 and errors[1] < errors[0] and outcome.validation == {"error": errors[1]}
    assert any("30 items, 60 steps of 4 items" in note for note in notes)
    after = checkpoints.load(checkpoint)
    assert "motion_encoder" not in after.untrained and "video_unet" in after.untrained
    published = load_file(tmp_path / "run" / "components" / "motion_encoder.safetensors")
    trained = load_file(tmp_path / "run" / "step-000060" / "model.safetensors")
    for name, tensor in after.weights.tensors("motion_encoder"):
        assert torch.equal(tensor, published[name]) and torch.equal(tensor, trained[f"encoder.{name}"]), name
    changed = {path.name for path in checkpoint.iterdir() if path.read_bytes() != before.get(path.name)}
    assert changed == {"config.json", "motion_encoder.safetensors"}
    assert states.saved_steps(tmp_path / "run") == [55, 60]
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["torch"] == torch.__version__


def test_the_average_is_what_is_published(unbroken: Path) -> None:
    published = load_file(unbroken / "components" / "motion_encoder.safetensors")
    average = load_file(unbroken / "step-000024" / "ema.safetensors")
    weights = load_file(unbroken / "step-000024" / "model.safetensors")
    assert all(torch.equal(tensor, average[f"encoder.{name}"]) for name, tensor in published.items())
    assert not torch.equal(average["encoder.in_proj.weight"], weights["encoder.in_proj.weight"])
    assert average["steps"] == weights["steps"] == 24  # buffers are not averaged


def test_the_average_is_the_textbook_one(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", steps=6, ema=0.5, save_every=1, keep=6)
    expected = torch.zeros(())
    for step in range(1, 7):
        weights = load_file(tmp_path / "run" / f"step-{step:06d}" / "model.safetensors")["head.weight"]
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * weights
    average = load_file(tmp_path / "run" / "step-000006" / "ema.safetensors")["head.weight"]
    torch.testing.assert_close(average, expected)


def test_accumulating_is_the_bigger_batch(checkpoint: Path, tmp_path: Path) -> None:
    quiet = {"noise": 0.0, "dropout": 0.0}
    run(checkpoint, tmp_path / "big", batch_size=8, steps=8, options=quiet)
    run(toy_checkpoint(tmp_path / "other"), tmp_path / "small", accumulation=2, steps=8, options=quiet)
    assert_close_rows(tmp_path / "big", tmp_path / "small")


def assert_close_rows(one: Path, other: Path) -> None:
    first, second = (
        torch.tensor([[float(value) for value in row.values()] for row in rows(folder)]) for folder in (one, other)
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_the_rate_rises_and_falls() -> None:
    settings = msgspec.structs.replace(SETTINGS, steps=100, warmup_steps=9, learning_rate=1.0, final_rate=0.2)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert learning_rate(msgspec.structs.replace(settings, schedule="constant"), 99) == 1.0


def test_every_epoch_sees_every_item_once_and_processes_share_a_batch() -> None:
    def indices(start: int, count: int, size: int, process: int = 0, processes: int = 1) -> list[list[int]]:
        made = Batches(10, seed=1, batch_size=size, start=start, count=count, process=process, processes=processes)
        return list(made)

    flat = [index for batch in indices(0, 15, 2) for index in batch]
    epochs = [flat[:10], flat[10:20], flat[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert indices(0, 15, 2)[7:] == indices(14, 8, 2)
    shared = zip(indices(0, 5, 2, 0, 2), indices(0, 5, 2, 1, 2), strict=True)
    assert [first + second for first, second in shared] == indices(0, 5, 4)


# Going on


def test_a_killed_run_goes_on_as_if_nothing_had_happened(unbroken: Path, checkpoint: Path, tmp_path: Path) -> None:
    recipe, folder = write_recipe(tmp_path / "toy.toml", ema=0.9), tmp_path / "run"
    command = ["-m", "videolavit", "train", STAGE, "--config", recipe, "--checkpoint", checkpoint, "-o", folder]
    process = start([str(part) for part in command])
    try:
        deadline = time.monotonic() + 300
        while not (folder / "metrics.csv").exists() or len(rows(folder)) < 6:
            assert process.poll() is None and time.monotonic() < deadline, "the run did not come so far"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "motion_encoder" in checkpoints.load(checkpoint).untrained  # nothing is published before the end
    assert exit_code(*map(str, command[2:]), "--resume") == 0
    assert_same_end(folder, unbroken)


def test_ctrl_c_saves_the_step_and_exits_130(unbroken: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = {"signal_at": 12}  # the odd step is in the middle of a row of metrics, and of two saved states
    recipe, folder = write_recipe(tmp_path / "toy.toml", ema=0.9, options=options), tmp_path / "run"
    command = ["train", STAGE, "--config", recipe, "--checkpoint", checkpoint, "-o", folder]
    assert exit_code(*map(str, command)) == 130
    assert states.saved_steps(folder) == [10, 13] and not (folder / "components").exists()
    assert exit_code(*map(str, command), "--resume") == 0
    assert_same_end(folder, unbroken)
    assert exit_code(*map(str, command), "--resume") == 0  # nothing is left to do
    assert_same_end(folder, unbroken)


@pytest.mark.parametrize("torn", ["", "12,0.5", "12,0.1,0.2,0.3,0.4,0.5,1.0,1.0\n14,"])
def test_rows_after_the_state_are_cut(unbroken: Path, checkpoint: Path, tmp_path: Path, torn: str) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingError):
        run(checkpoint, folder, ema=0.9, options={"broken_from": 13})
    assert rows(folder)[-1]["step"] == "12" and states.saved_steps(folder) == [5, 10]
    with (folder / "metrics.csv").open("a") as stream:
        stream.write(torn)
    settings = json.loads((folder / "settings.json").read_text())
    settings["options"]["broken_from"] = 10**9  # the fault is mended
    (folder / "settings.json").write_text(json.dumps(settings))
    run(checkpoint, folder, ema=0.9, resume=True)
    assert_same_end(folder, unbroken)


def test_resume_starts_a_run_that_has_no_state_yet(unbroken: Path, checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", ema=0.9, resume=True)
    assert_same_end(tmp_path / "run", unbroken)


def test_an_own_dataloader_process_changes_nothing(unbroken: Path, checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", ema=0.9, workers=1)
    assert_same_end(tmp_path / "run", unbroken)


def test_a_crash_while_saving_leaves_the_state_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(states.torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            run(checkpoint, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("*step*")) == []
    run(checkpoint, tmp_path / "run", resume=True)
    assert states.saved_steps(tmp_path / "run") == [20, 24]


def test_a_state_that_holds_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (os.system, ("touch executed",))

    run(checkpoint, tmp_path / "run", steps=5)
    torch.save({"state": Code()}, tmp_path / "run" / "step-000005" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        run(checkpoint, tmp_path / "run", resume=True)
    assert not Path("executed").exists()


def test_a_longer_run_goes_on_from_the_end(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", steps=6)
    assert run(checkpoint, tmp_path / "run", steps=10, resume=True).steps == 10
    with pytest.raises(UsageError, match="has done 10"):
        run(checkpoint, tmp_path / "run", steps=6, resume=True)


def test_orthogonal_steps_go_on_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"optimizer": "muon", "schedule": "constant", "ema": 0.9}
    run(checkpoint, tmp_path / "unbroken", **choices)
    other = toy_checkpoint(tmp_path / "other")
    run(other, tmp_path / "run", **choices, steps=14)
    run(other, tmp_path / "run", **choices, resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "unbroken")


def test_options_that_json_has_no_type_for_are_compared_as_well(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", steps=1, options={"scale": [1.0, 2.0]})
    assert run(checkpoint, tmp_path / "run", steps=2, options={"scale": (1.0, 2.0)}, resume=True).steps == 2
    with pytest.raises(UsageError, match="other settings: options"):
        run(checkpoint, tmp_path / "run", steps=3, options={"scale": [1.0, 3.0]}, resume=True)


# What is refused


def test_a_loss_that_is_no_number_publishes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(TrainingError, match=r"toy: step 8: the loss is nan"):
        run(checkpoint, tmp_path / "run", options={"broken_from": 7})
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert states.saved_steps(tmp_path / "run") == [5]


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (1e6, False)])
def test_published_weights_are_rounded_when_asked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, fits: bool
) -> None:
    real = ToyStage.components
    monkeypatch.setattr(
        ToyStage,
        "components",
        lambda self: {name: {k: scale * t for k, t in state.items()} for name, state in real(self).items()},
    )
    if not fits:
        with pytest.raises(TrainingError, match="too large for float16"):
            run(checkpoint, tmp_path / "run", steps=2, store="float16")
        assert "motion_encoder" in checkpoints.load(checkpoint).untrained
        run(checkpoint, tmp_path / "run", steps=2, store="float32", resume=True)
        return
    run(checkpoint, tmp_path / "run", steps=2, store="float16")
    stored = load_file(checkpoint / "motion_encoder.safetensors")
    weights = load_file(tmp_path / "run" / "step-000002" / "model.safetensors")
    assert all(torch.equal(tensor, weights[f"encoder.{name}"].half()) for name, tensor in stored.items())


def test_stages_may_leave_components_unfinished(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyStage, "completes", ())
    run(checkpoint, tmp_path / "run", steps=1)
    assert "motion_encoder" in checkpoints.load(checkpoint).untrained


def test_a_run_is_replaced_only_with_force(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", steps=2)
    with pytest.raises(UsageError, match="--resume to go on with it, or --force"):
        run(checkpoint, tmp_path / "run", steps=2)
    with pytest.raises(UsageError, match="other settings: batch_size, options"):
        run(checkpoint, tmp_path / "run", resume=True, batch_size=3, options={"noise": 0.3})
    run(checkpoint, tmp_path / "run", steps=3, batch_size=3, force=True)
    assert states.saved_steps(tmp_path / "run") == [3]
    with pytest.raises(UsageError, match="not a training run"):
        run(checkpoint, checkpoint, force=True)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.toml", "stage = 3", "stage: expected `str`"),
        ("a.toml", "stage = ", "nvalid value"),
        ("a.toml", 'stage = "toy"\nsteps = 5', "batch_size: is missing"),
        ("a.toml", 'stage = "t"\nsteps = 1\nbatch_size = 0\nlearning_rate = 1.0', "batch_size: expected `int` >= 1"),
        ("a.toml", 'stage = "t"\nsteps = 1\nbatch_size = 1\nlearning_rate = 1.0\nstesp = 1', "stesp: unknown key"),
        ("a.yaml", "stage: t\nsteps: 1\nbatch_size: 1\nlearning_rate: 1e-4\ndata: {sise: 3}", "data.sise: unknown key"),
        ("a.yaml", "stage: [", "a.yaml"),
        ("a.json", "{}", "stage: is missing"),
        ("a.txt", "", "unknown type .txt"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_file_and_key(tmp_path: Path, name: str, text: str, named: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_settings(tmp_path / name)
    assert named in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_reads_numbers_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("stage: t\nsteps: 10\nbatch_size: 1\nlearning_rate: 1e-4\nbetas: [0.9, 0.95]\n")
    settings = read_settings(tmp_path / "a.yaml")
    assert (settings.learning_rate, settings.betas) == (1e-4, (0.9, 0.95))


def test_the_stage_decides_its_options(checkpoint: Path, tmp_path: Path) -> None:
    for changes, named in [
        ({"options": {"nosie": 0.1}}, r"options\.nosie: unknown key"),
        ({"options": {"noise": "much"}}, r"options\.noise: expected `float`"),
        ({"stage": "keyframe-vea"}, "keyframe-vea.*keyframe-vae, video-vae"),
        ({"stage": "toy_stage:Options"}, "not a Stage"),
        ({"stage": "no_such_module:Stage"}, "no module no_such_module"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: the stage toy has no part"),
    ]:
        with pytest.raises(UsageError, match=named):
            run(checkpoint, tmp_path / "run", force=True, **changes)
    with pytest.raises(UsageError, match="not a checkpoint"):
        run(tmp_path, tmp_path / "run")
    recipe = write_recipe(tmp_path / "toy.toml")
    command = ["train", "vision", "--config", recipe, "--checkpoint", checkpoint, "-o", tmp_path / "new"]
    assert exit_code(*map(str, command)) == 2 and not (tmp_path / "new").exists()


def test_what_the_machine_has_not_is_said(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentProblem, match="precision 'fp16'"):
            run(checkpoint, tmp_path / "half", precision="fp16")
        AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'videolavit\[tensorboard\]'"):
        run(checkpoint, tmp_path / "board", tensorboard=True)


class TinyLlama(Stage):
    name = "tiny-llama"

    def __init__(self) -> None:
        config = LanguageModelConfig(hidden_size=8, intermediate_size=8, layers=2, heads=1, kv_heads=1)
        torch.manual_seed(0)
        self.module = torch.nn.ModuleDict({"inner": build_language_model(config, 16)}).train()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    stages, gradients, ids = (TinyLlama(), TinyLlama()), [], torch.arange(8).view(1, 8)
    enable_gradient_checkpointing(stages[1])
    for stage in stages:
        model = stage.module["inner"]
        calls: list[None] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert len(calls) == 1 + (stage is stages[1])  # once more in the backward pass
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_mixed_precision_trains(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "run", steps=2, precision="bf16")
    assert load_file(tmp_path / "run" / "step-000002" / "model.safetensors")["head.weight"].dtype == torch.float32


def test_a_new_figure_gets_a_column(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv", 0)
    file.write(1, {"loss": 0.1})
    file.write(2, {"loss": 1 / 3, "share": 0.5})
    assert rows(tmp_path) == [
        {"step": "1", "loss": "0.1", "share": ""},
        {"step": "2", "loss": repr(1 / 3), "share": "0.5"},
    ]


# Many processes


# What `accelerate launch` calls for several GPUs; on CPUs it would want MPI.
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one_with_double_batch(checkpoint: Path, tmp_path: Path) -> None:
    quiet = {"noise": 0.0, "dropout": 0.0}
    recipe = write_recipe(tmp_path / "toy.toml", steps=8, accumulation=2, ema=0.5, validate_every=4, options=quiet)
    command = ["-m", "videolavit", "train", STAGE, "--config", recipe, "--checkpoint", checkpoint]
    process = start([*TWO_PROCESSES, *map(str, [*command, "-o", tmp_path / "two"])], ACCELERATE_USE_CPU="true")
    assert process.wait(300) == 0
    run(
        toy_checkpoint(tmp_path / "other"),
        tmp_path / "one",
        steps=8,
        batch_size=8,
        accumulation=2,
        ema=0.5,
        validate_every=4,
        options=quiet,
    )
    assert_close_rows(tmp_path / "two", tmp_path / "one")
    weights = [load_file(tmp_path / name / "components" / "motion_encoder.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)
    assert "motion_encoder" not in checkpoints.load(checkpoint).untrained


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_the_state_of_a_model_in_shards_goes_on_to_the_bit(tmp_path: Path) -> None:
    process = start([*TWO_PROCESSES, str(ROOT / "tests" / "sharded_states.py"), str(tmp_path)])
    assert process.wait(300) == 0
    assert states.saved_steps(tmp_path) == [3]
