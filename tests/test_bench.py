"""`videolavit bench`: what it measures is there and adds up, and every mistake is one clear line. No time is judged."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from runtime.apart import apart
from runtime.bench import report
from runtime.bench.context import Bench
from runtime.bench.language import decode
from runtime.bench.networks import contenders
from runtime.bench.nodes import single_node
from runtime.bench.peer import Call, Decoding, PeerSpec
from runtime.bench.roofs import Roofs, measure_roofs
from runtime.bench.run import machine
from runtime.bench.settings import OURS, BenchSettings, Row, StageResult
from runtime.bench.stages import STAGES, parse_stages
from runtime.bench.timing import Times, Turn, take_turns
from runtime.bench.work import Work, count, count_call, count_language_model
from runtime.bundle import Bundle
from runtime.engines import EngineOptions
from runtime.errors import EnvironmentProblem, ParityError, UsageError
from runtime.memory import peak_rss
from videolavit.cli import main

ONE = EngineOptions(threads=1)
QUICK = ["--repeats", 2, "--warm-up", 1, "--threads", 1, "--tokens", 3, "--contexts", 8, "--keyframe-steps", 2]


@dataclass(frozen=True)
class Outcome:
    """Of one command."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDEOLAVIT_BUNDLE", raising=False)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["bench", *map(str, arguments)])
        found = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), found.out, found.err)

    return call


# --- the command -------------------------------------------------------------------------------------------------


def test_json_ends_in_one_object_with_every_figure(bench, tiny_bundle: Path) -> None:
    done = bench(tiny_bundle, "--stages", "decode,prefill,keyframe-unet", "--json", *QUICK)
    assert done.code == 0, done.err
    *events, result = done.events
    assert result["event"] == "result"
    assert [event["stage"] for event in events if event["event"] == "stage"] == ["prefill", "decode", "keyframe-unet"]
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert list(stages) == ["prefill", "decode", "keyframe-unet"]
    for stage in stages.values():
        assert stage["peak_rss"] > 10 * 2**20
        for row in stage["rows"]:
            assert len(row["seconds"]) == 2
            assert row["mean"] > 0 and row["median"] > 0 and row["spread"] >= 0
            assert row["share_of_roof"] > 0
    unguided, guided = stages["decode"]["rows"]
    assert guided["ratio"] == pytest.approx(guided["median"] / unguided["median"])
    assert guided["bytes"] > unguided["bytes"] and guided["roof"] == unguided["roof"] == "bandwidth"
    assert stages["prefill"]["rows"][0]["roof"] == stages["keyframe-unet"]["rows"][0]["roof"] == "matmul"
    assert result["roofs"]["bandwidth"] > 0 and result["roofs"]["matmul"] > 0
    assert result["machine"]["threads"] == 1 and "onnxruntime" in result["machine"]["versions"]
    assert result["settings"]["contexts"] == [8]


def test_guided_tokens_are_measured_where_the_model_guides_nothing(bench, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "unguided"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["defaults"]["motion_guidance"] = 1.0
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    done = bench(bundle, "--stages", "decode", "--json", *QUICK)
    assert done.code == 0, done.err
    unguided, guided = done.events[-1]["stages"][0]["rows"]
    assert guided["bytes"] > unguided["bytes"] and guided["ratio_to"] == "unguided"


def test_every_stage_runs_and_the_table_has_them(bench, tiny_bundle: Path, tmp_path: Path) -> None:
    document = tmp_path / "bench.md"
    small = ("--size", "64x64", "--keyframe-size", "64x64", "--video-steps", 2, "--candidates", 2)
    done = bench(tiny_bundle, "--no-roofs", "--markdown", document, *small, *QUICK, "--repeats", 1)
    assert done.code == 0, done.err
    text = document.read_text()
    for stage in STAGES:
        assert any(line.startswith(stage) for line in done.out.splitlines()), stage
        assert f"| {stage} |" in text
    assert "of it choosing" in text and "2 candidates" in text
    assert "of it video decode" in text and "Made by `videolavit" in text and "untrained" in text
    assert list(tmp_path.iterdir()) == [document]  # no staging file is left


def test_a_document_that_cannot_be_finished_is_not_begun(
    bench, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "bench.md"
    document.write_text("before")

    def fail(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "markdown", fail)
    done = bench(tiny_bundle, "--stages", "motion-decode", "--no-roofs", "--markdown", document, *QUICK)
    assert done.code == 2
    assert "No space left" in done.err
    assert document.read_text() == "before"
    assert list(tmp_path.iterdir()) == [document]


def test_torch_takes_turns(bench, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    arguments = ("--stages", "decode,motion-decode", "--no-roofs", "--json", "--against", "torch")
    done = bench(tiny_bundle, *arguments, "--checkpoint", tiny_checkpoint, *QUICK)
    assert done.code == 0, done.err
    for stage in done.events[-1]["stages"]:
        rows = stage["rows"]
        assert [row["contender"] for row in rows] == [OURS, "torch"] * (len(rows) // 2)
        for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
            assert theirs["ratio"] == pytest.approx(theirs["median"] / ours["median"])
            assert theirs["ratio_to"] == OURS
        assert stage["peak_rss"] < 200 * 2**20  # torch alone would take more


def test_genai_takes_turns_where_tokens_are_written(bench, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    if find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed (benchmarks/requirements-peers.txt)")
    arguments = ("--stages", "prefill,decode,motion-decode", "--no-roofs", "--json", "--against", "genai")
    done = bench(tiny_bundle, *arguments, "--checkpoint", tiny_checkpoint, *QUICK)
    assert done.code == 0, done.err
    stages = {stage["stage"]: stage for stage in done.events[-1]["stages"]}
    assert {name: [row["contender"] for row in stage["rows"]] for name, stage in stages.items()} == {
        "prefill": [OURS, "genai"],
        "decode": [OURS, "genai", OURS],  # the last is guided
        "motion-decode": [OURS],
    }
    assert stages["decode"]["notes"] == ["genai does not do guided tokens"]


def test_genai_is_measured_where_it_can_compute_the_same() -> None:
    from export.bench.genai_peer import make

    for device, precision, words in (("cuda", "fp32", "--provider cpu"), ("cpu", "fp16", "fp32, int8, int4")):
        with pytest.raises(UsageError, match=words):
            make(None, "tiny", None, device, precision, threads=1)


def test_genai_is_asked_for_where_it_is_missing() -> None:
    if find_spec("onnxruntime_genai") is not None:
        pytest.skip("onnxruntime-genai is installed, so it cannot be missing")
    with pytest.raises(EnvironmentProblem, match=r"--against genai: onnxruntime_genai is not installed; run: pip"):
        PeerSpec("genai", "export.bench.genai_peer:make", (None, "tiny", None, "cpu", "fp32"), "pip install it").make(1)


def test_a_preset_is_measured_without_any_weights(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.bench import run
    from videolavit.config import PRESETS

    # The machine's own roofs take long to measure, and work is counted only beside some.
    some = Roofs(device="cpu", threads=1, read=1e10, copy=1e10, matmul=1e11, dtype="float32")
    monkeypatch.setattr(run, "apart", lambda what, *call: some if what == "roofs" else apart(what, *call))
    done = bench("--preset", "tiny", "--random-weights", "--layers", 1, "--precision", "int4", "--json", *QUICK)
    assert done.code == 0, done.err
    result = done.events[-1]
    config, llm = PRESETS["tiny"], PRESETS["tiny"].language_model
    layer = 4 * llm.hidden_size**2 + 3 * llm.hidden_size * llm.intermediate_size
    head = llm.hidden_size * config.vocabulary.size
    decode = result["stages"][1]["rows"][0]
    # Half a byte a weight, the head's a whole one, a scale for at most 64 of them; and the cache.
    assert layer / 2 + head < decode["bytes"] < (layer / 2 + head) * 1.3
    assert result["precisions"] == {"language_model": "int4", "token_embedding": "fp32"}
    assert [stage["stage"] for stage in result["stages"]] == ["prefill", "decode"]
    assert any("GiB of disk" in event.get("text", "") for event in done.events)
    assert not list(tmp_path.iterdir())


def test_a_preset_that_does_not_fit_is_refused_before_anything_is_written(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.bench import random_bundle

    monkeypatch.setattr(random_bundle, "available_memory", lambda: 2**30)
    monkeypatch.setattr(random_bundle, "write", lambda *arguments: pytest.fail("written"))
    done = bench("--preset", "video-lavit-7b", "--random-weights", "--stages", "decode", *QUICK)
    assert done.code == 3
    assert "takes about" in done.err and "--layers" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "dekode"], "--stages dekode"),
        (["--stages", ","], "no stage"),
        (["--against", "torch"], "--checkpoint"),
        (["--against", "torch", "--checkpoint", "nowhere"], "--checkpoint nowhere"),
        (["--contexts", "9999"], "--contexts 9999"),
        (["--contexts", "many"], "64,1024"),
        (["--contexts", "0"], "64,1024"),
        (["--size", "100x100"], "--size 100x100"),
        (["--video-steps", "1"], "--video-steps 1"),
        (["--layers", "2"], "--preset"),
        (["--random-weights"], "--preset"),
        (["--markdown", "bench.txt"], "bench.txt"),
        (["--video", "nowhere.mp4", "--stages", "motion-vectors"], "nowhere.mp4"),
    ],
)
def test_a_mistake_is_one_line(bench, tiny_bundle: Path, arguments: list[str], words: str) -> None:
    done = bench(tiny_bundle, "--no-roofs", *arguments)
    assert done.code == (6 if "--video" in arguments else 2)
    assert words in done.err and "Traceback" not in done.err
    assert len([line for line in done.err.splitlines() if line.lower().startswith("error")]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "none", "--random-weights"], "--preset none"),
        (["--preset", "tiny", "--random-weights", "--layers", "99"], "--layers 99"),
        (["--preset", "tiny"], "--random-weights"),
    ],
)
def test_a_preset_has_its_own_mistakes(bench, arguments: list[str], words: str) -> None:
    done = bench(*arguments)
    assert done.code == 2
    assert words in done.err


def test_a_checkpoint_of_other_weights_is_refused(bench, tiny_bundle: Path, tmp_path: Path) -> None:
    from videolavit.checkpoints import initialise

    initialise("tiny", seed=1).save(tmp_path / "other")
    done = bench(tiny_bundle, "--against", "torch", "--checkpoint", tmp_path / "other")
    assert done.code == 4
    assert "not made from the weights" in done.err


# --- its parts ---------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_blocks_are_warmed_up() -> None:
    log: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    turns = [Turn({"a": note("a"), "b": note("b")}), Turn({"c": note("c")})]
    found = take_turns(turns, repeats=3, warm_up=1, blocks=2)
    assert "".join(log) == "ab" + "abab" + "c" + "cc" + "ab" + "ab" + "c" + "c"
    assert {name: len(times.seconds) for turn in found for name, times in turn.items()} == {"a": 3, "b": 3, "c": 3}


def test_times() -> None:
    times = Times((1.0, 2.0, 6.0))
    assert (times.mean, times.median) == (3.0, 2.0)
    assert times.spread == pytest.approx(math.sqrt(7))
    assert times.per(2).seconds == (0.5, 1.0, 3.0)
    assert Times((1.0,)).spread == 0


def test_the_models_of_one_operator_compute_it() -> None:
    import onnxruntime

    rows, columns = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 200), np.float32)
    session = onnxruntime.InferenceSession(single_node("MatMul", ("a", "b"), np.dtype(np.float32)))
    np.testing.assert_array_equal(session.run(None, {"a": rows, "b": columns})[0], rows @ columns)


def test_roofs_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.bench import roofs

    monkeypatch.setattr(roofs, "CPU_BYTES", 1 << 22)
    monkeypatch.setattr(roofs, "CPU_SIDE", 64)
    found = measure_roofs(ONE)
    assert found.device == "cpu" and found.threads == 1
    assert found.read and found.read > 0 and found.copy > 0 and found.matmul > 0
    assert found.bandwidth == max(found.read, found.copy)
    better = roofs.higher(found, replace(found, copy=found.copy * 2, matmul=1.0))
    assert (better.copy, better.matmul) == (found.copy * 2, found.matmul)


def test_operations_are_counted() -> None:
    def node(op: str, given: list[list[int]], made: list[int], kind: str = "float") -> dict:
        inputs = [{kind if i else "float": shape} for i, shape in enumerate(given)]
        return {"op_name": op, "input_type_shape": inputs, "output_type_shape": [{"float": made}]}

    assert count([node("MatMul", [[2, 3, 4], [4, 5]], [2, 3, 5])]) == Work(2 * 2 * 3 * 4 * 5, 4 * 5 * 4)
    assert count([node("MatMul", [[6, 3, 4], [6, 4, 5]], [6, 3, 5])]) == Work(2 * 6 * 3 * 4 * 5, 0)
    assert count([node("Gemm", [[4, 3], [5, 4]], [3, 5], "float16")]) == Work(2 * 3 * 4 * 5, 4 * 5 * 2)
    assert count([node("Conv", [[1, 8, 6, 6], [16, 4, 3, 3]], [1, 16, 6, 6])]).flops == 2 * 16 * 36 * 4 * 9
    coded = [{"float": [1, 1, 64]}, {"uint8": [8, 2, 16]}, {"float": [16]}]
    product = {"op_name": "MatMulNBits", "input_type_shape": coded, "output_type_shape": [{"float": [1, 1, 8]}]}
    assert count([product]) == Work(2 * 64 * 8, 64 * 8 / 2 + 16 * 4)


def test_the_language_models_work_is_that_of_its_sizes(tiny_bundle: Path) -> None:
    from videolavit.config import PRESETS

    bundle, config = Bundle.open(tiny_bundle), PRESETS["tiny"]
    entry, llm = bundle.manifest.engines["language_model"], config.language_model
    positions = 5
    found = count_language_model(bundle.file(entry.files[0]), entry, 1, positions, ONE)
    layer = 4 * llm.hidden_size**2 + 3 * llm.hidden_size * llm.intermediate_size
    head = llm.hidden_size * config.vocabulary.size
    attention = 4 * llm.hidden_size * positions * (positions + 1) / 2
    assert found.weight_bytes == 4 * (llm.layers * layer + head)
    assert found.flops == 2 * (llm.layers * layer * positions + head) + llm.layers * attention


def test_work_is_counted_where_weights_are_plain_float32(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    entry = bundle.manifest.engines["visual_encoder"]
    side = bundle.manifest.geometry.image_size
    once, twice = (
        count_call(bundle.file(entry.files[0]), {"pixels": np.zeros((rows, 3, side, side), np.float32)}, ONE)
        for rows in (1, 2)
    )
    assert twice.flops == pytest.approx(2 * once.flops, rel=1e-3)


class _Watching:
    """A peer that notes what it is asked for."""

    name = "watching"

    def __init__(self) -> None:
        self.works: list[Decoding] = []

    def decode(self, work: Decoding) -> Callable[[], None]:
        self.works.append(work)
        return lambda: None

    def calls(self, calls: list[Call]) -> None:
        return None


def test_decode_writes_after_as_many_positions_as_it_says(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BenchSettings(repeats=2, warm_up=1, contexts=(7,), tokens=3, threads=1, count_work=False)
    bench = Bench(Bundle.open(tiny_bundle), settings, [])
    watching = _Watching()
    monkeypatch.setattr(Bench, "peers", (watching,))
    with bench.engines:
        model = bench.engines.language_model()
        seen: list[tuple[list[int], int]] = []
        forward = model.forward

        def watched(embeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
            seen.append((model.lengths.tolist(), embeds.shape[1]))
            return forward(embeds, counts)

        monkeypatch.setattr(model, "forward", watched)
        rows = decode(bench)
    # The last run of each kind: three forwards of one position, the first over seven positions with its own.
    assert [lengths for lengths, steps in seen if steps == 1][-3:] == [[6, 0], [7, 1], [8, 2]]
    assert ([6], 1) in seen and ([8], 1) in seen and ([9], 1) not in seen
    assert [row.contender for row in rows] == [OURS, "watching"] * 2
    assert [len(work.prompt) for work in watching.works] == [7, 7]
    assert [work.guidance == 1 for work in watching.works] == [True, False]


def test_a_peer_that_lacks_a_stage_is_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BenchSettings(repeats=1, warm_up=1, threads=1, count_work=False)
    bench = Bench(Bundle.open(tiny_bundle), settings, [])
    monkeypatch.setattr(Bench, "peers", (_Watching(),))
    with bench.engines:
        rows = STAGES["motion-decode"].measure(bench)
    assert [row.contender for row in rows] == [OURS]
    assert bench.notes == ["watching does not do this stage"]


def test_a_peer_whose_library_is_missing_is_one_line() -> None:
    spec = PeerSpec("nobody", "no_such_library.peer:make", (), "pip install nobody")
    with pytest.raises(EnvironmentProblem, match="--against nobody: no_such_library is not installed; run: pip"):
        spec.make(threads=1)


def test_torch_and_the_runtime_write_the_same_tokens(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """The peer does the same work: its scores are the runtime's."""
    import torch

    from export.bench.torch_peer import _cache, _forward, make

    peer = make(str(tiny_checkpoint), "", None, "cpu", "float32", threads=1)
    bench = Bench(Bundle.open(tiny_bundle), BenchSettings(threads=1), [])
    prompt = bench.normal(9, bench.manifest.language_model.hidden_size)
    with bench.engines, torch.inference_mode():
        model = bench.engines.language_model()
        model.start(1, 9)
        ours = model.forward(prompt[None], np.array([9]))
        theirs = _forward(peer._language_model(), torch.from_numpy(prompt)[None], _cache()).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    start = prompt[:1]
    codes = range(4, 20)
    for guidance in (1.0, 3.0):
        run = peer.decode(Decoding(prompt, start, codes, 2, guidance))
        run()
        run()  # the cache is as it was


def test_stages_keep_the_tables_order() -> None:
    assert parse_stages("decode, prefill,decode") == ("prefill", "decode")
    with pytest.raises(UsageError, match="choose from"):
        parse_stages("none")


def test_a_process_of_its_own_gives_back_results_and_errors() -> None:
    assert apart("sum", sum, [1, 2]) == 3
    assert apart("memory", peak_rss) < peak_rss() + 2**30
    with pytest.raises(UsageError, match="stages"):
        apart("stages", parse_stages, "none")
    with pytest.raises(ParityError) as raised:
        apart("parity", _disagree)
    assert raised.value.component == "unet" and raised.value.measured == 2.0
    with pytest.raises(EnvironmentProblem, match="end: its process was ended"):
        apart("end", _end)
    with pytest.raises(RuntimeError, match=r"crash failed:(.|\n)*ZeroDivisionError"):
        apart("crash", divmod, 1, 0)


def test_whoever_ends_a_benchmark_ends_its_process_and_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import signal, sys\n"
        "from runtime.apart import apart\n"
        "from test_bench import _wait_in_a_folder\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "if __name__ == '__main__': apart('wait', _wait_in_a_folder, sys.argv[1])\n"
    )
    program = tmp_path / "program.py"
    program.write_text(script)
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    where = tmp_path / "work"
    where.mkdir()
    process = subprocess.Popen([sys.executable, program, where], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not list(where.glob("*/pid")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        child = int(next(where.glob("*/pid")).read_text())
        process.terminate()
        assert process.wait(timeout=300) != 0
    finally:
        process.kill()
        process.wait()
    assert not list(where.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _wait_in_a_folder(where: str) -> None:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        staging = Path(folder) / "pid.tmp"
        staging.write_text(str(os.getpid()))
        staging.rename(Path(folder) / "pid")
        time.sleep(600)


def _disagree() -> None:
    raise ParityError("unet", 2.0, 1.0)


def _end() -> None:
    os._exit(9)


def test_shares_of_the_roofs() -> None:
    from runtime.bench.roofs import Roofs

    roofs = Roofs(device="cpu", threads=1, read=30.0, copy=20.0, matmul=100.0, dtype="float32")
    times = {OURS: Times((2.0,)), "other": Times((4.0,))}
    ours, other = contenders("decode", "", "token", times, bytes=30.0, of="tokens")
    assert report.share(ours, roofs) == ("bandwidth", 0.5)
    assert report.share(other, roofs) is None  # its weights may have another form
    assert report.rate(ours) == 0.5 and other.ratio == 2.0
    assert report.share(replace(ours, bytes=None, flops=50.0), roofs) == ("matmul", 0.25)
    assert report.share(Row(stage="s", detail="", contender=OURS, times=times[OURS], unit="step"), roofs) is None


def test_cells_of_a_document_cannot_break_its_table(tiny_bundle: Path) -> None:
    from runtime.bench.run import Measurement

    settings = BenchSettings(threads=1)
    row = Row(stage="motion-vectors", detail="a|b.mp4", contender=OURS, times=Times((1e-7, 3e-7)), unit="video")
    found = Measurement(
        bundle="b",
        model="tiny",
        trained=True,
        precisions={"language_model": "int4", "video_unet": "fp16"},
        settings=settings,
        machine=machine(settings),
        roofs=None,
        stages=(StageResult(stage="motion-vectors", rows=(row,), peak_rss=1 << 20, load_seconds=0.0),),
    )
    text = report.markdown(found, "videolavit bench")
    assert "a\\|b.mp4" in text and "0.2 µs/video" in text and "untrained" not in text
    assert "language_model in int4; video_unet in fp16" in text
    assert report.figures(found)["roofs"] is None
    assert sys.version.split()[0] in text
