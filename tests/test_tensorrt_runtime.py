"""The TensorRT backend on a library and a GPU made of numpy: everything but the kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_tensorrt import FakeDevice, Program, fake_library
from tensorrt_programs import FakeBundle, entry, multiplier, x

from runtime.backends import cuda, tensorrt, tensorrt_library
from runtime.backends.tensorrt import TensorRTEngine, TensorRTLanguageModel
from runtime.backends.tensorrt_plan import scratch_of
from runtime.bundle import BuiltFor
from runtime.errors import BundleError, EnvironmentProblem, UsageError

CACHE, WIDTH = (1, 1), 2  # heads and head width of the cache; width of an embedding


def language_model(length: int, aliased: bool, prompt: int = 4) -> Program:
    """Keeps what it is given in its cache; logits [B, 1] are the sum of a row's real positions.

    An unwritten position that is no number makes the sum none either, as a mask would.
    """

    def compute(arrays: dict[str, np.ndarray]) -> None:
        past, present = arrays["past_key_0"], arrays["present_key_0"]
        steps = arrays["inputs_embeds"].shape[1]
        present[...] = past
        for row, start in enumerate(arrays["past_lengths"]):
            present[row, 0, start : start + steps, 0] = arrays["inputs_embeds"][row, :, 0]
            end = start + arrays["new_lengths"][row]
            seen = np.arange(present.shape[2]) < end
            arrays["logits"][row] = (present[row, 0, :, 0].astype(np.float32) * seen).sum()

    profiles = []
    for low, high in ((1, 1), (2, prompt)):
        cache = ((1, *CACHE[:1], length if length > 0 else 1, 1), (4, *CACHE[:1], length if length > 0 else 64, 1))
        profiles.append(
            {
                "inputs_embeds": ((1, low, WIDTH), (1, low, WIDTH), (4, high, WIDTH)),
                "past_lengths": ((1,), (1,), (4,)),
                "new_lengths": ((1,), (1,), (4,)),
                "past_key_0": (cache[0], cache[0], cache[1]),
            }
        )
    return Program(
        inputs={
            "inputs_embeds": ("FLOAT", (-1, -1, WIDTH)),
            "past_lengths": ("INT32", (-1,)),
            "new_lengths": ("INT32", (-1,)),
            "past_key_0": ("HALF", (-1, 1, length, 1)),
        },
        outputs={"logits": "FLOAT", "present_key_0": "HALF"},
        output_shapes=lambda s: {"logits": (s["past_lengths"][0], 1), "present_key_0": s["past_key_0"]},
        compute=compute,
        profiles=profiles,
        aliases={"present_key_0": "past_key_0"} if aliased else {},
    )


PROGRAMS = {
    "multiplier": multiplier(),
    "hungry": multiplier(activations=4096),
    "unrecordable": multiplier(capturable=False),
    "free": language_model(-1, aliased=False),
    "short": language_model(8, aliased=True),
    "long": language_model(32, aliased=True),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """The GPU, with the fake library in the place of TensorRT-RTX; nothing may be left on it at the end."""
    device = FakeDevice()
    device.loaded = []  # type: ignore[attr-defined]
    module = fake_library(device, PROGRAMS, device.loaded)  # type: ignore[attr-defined]
    monkeypatch.setattr(tensorrt_library, "library", lambda backend: module)
    tensorrt_library.log.cache_clear()
    monkeypatch.setattr(cuda, "open_device", lambda: device)
    yield device
    tensorrt_library.log.cache_clear()
    assert not device.memory and not device.graphs


@pytest.fixture
def engine(tmp_path: Path, device: FakeDevice) -> Callable[[str], TensorRTEngine]:
    """Makes the engine of a program of `PROGRAMS`; closed at the end."""
    made = []

    def make(program: str) -> TensorRTEngine:
        path = tmp_path / f"{program}.plan"
        path.write_text(program)
        made.append(TensorRTEngine([path], entry(path.name), device))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_results_are_the_callers_own(engine: Callable[[str], TensorRTEngine]) -> None:
    double = engine("multiplier")
    first = double(x=x(2), by=np.float32([2]))["y"]
    double(x=x(2), by=np.float32([3]))
    np.testing.assert_array_equal(first, x(2) * 2)


def test_a_scalar_serves_as_one_element_and_strides_are_copied(engine: Callable[[str], TensorRTEngine]) -> None:
    y = engine("multiplier")(x=x(4, 2).T, by=np.array(2, np.float32))["y"]
    np.testing.assert_array_equal(y, x(4, 2).T * 2)


def test_held_inputs_stay_and_may_be_overridden_once(
    engine: Callable[[str], TensorRTEngine], device: FakeDevice
) -> None:
    scale = engine("multiplier")
    by = np.float32([2])
    scale.hold(by=by)
    by[0] = 9  # the engine has its own copy
    device.events.clear()
    np.testing.assert_array_equal(scale(x=x(1))["y"], x(1) * 2)
    assert device.events.count("upload") == 1
    np.testing.assert_array_equal(scale(x=x(1), by=np.float32([5]))["y"], x(1) * 5)
    np.testing.assert_array_equal(scale(x=x(1))["y"], x(1) * 2)


def test_a_repeated_call_is_recorded_once_and_then_launched(
    engine: Callable[[str], TensorRTEngine], device: FakeDevice
) -> None:
    scale = engine("multiplier")
    for factor in range(5):
        np.testing.assert_array_equal(scale(x=x(2), by=np.float32([factor]))["y"], x(2) * factor)
    work = [event for event in device.events if event in ("run", "capture", "launch")]
    assert work == ["run", "capture", "launch", "launch", "launch", "launch"]


def test_another_shape_ends_a_recording_and_buffers_only_grow(
    engine: Callable[[str], TensorRTEngine], device: FakeDevice
) -> None:
    scale = engine("multiplier")
    for rows in (2, 2, 1, 2, 2):
        np.testing.assert_array_equal(scale(x=x(rows), by=np.float32([2]))["y"], x(rows) * 2)
    assert device.events.count("allocate") == 4  # x, by, y and the shared activations
    work = [event for event in device.events if event in ("run", "capture", "launch")]
    assert work == ["run", "capture", "launch", "run", "run", "capture", "launch"]


def test_a_plan_that_cannot_be_recorded_still_runs(engine: Callable[[str], TensorRTEngine], device: FakeDevice) -> None:
    scale = engine("unrecordable")
    for factor in range(3):
        np.testing.assert_array_equal(scale(x=x(2), by=np.float32([factor]))["y"], x(2) * factor)
    assert device.events.count("run") == 3 and "capture" not in device.events


def test_engines_share_activation_memory_and_outlive_its_growth(
    engine: Callable[[str], TensorRTEngine], device: FakeDevice
) -> None:
    small, large = engine("multiplier"), engine("hungry")
    for _ in range(3):
        small(x=x(1), by=np.float32([1]))
    before = scratch_of(device).size
    large(x=x(1), by=np.float32([1]))
    assert (before, scratch_of(device).size) == (64, 4096)
    # The graph recorded before refers to memory that is gone; the next call may not launch it.
    np.testing.assert_array_equal(small(x=x(1), by=np.float32([3]))["y"], x(1) * 3)


def test_the_profile_that_covers_the_shapes_is_taken(
    engine: Callable[[str], TensorRTEngine], device: FakeDevice
) -> None:
    scale = engine("multiplier")
    scale(x=x(2, 4), by=np.float32([1]))
    scale(x=x(5, 8), by=np.float32([1]))
    scale(x=x(4, 8), by=np.float32([1]))
    assert [event for event in device.events if event.startswith("profile")] == ["profile 1"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": x(3)}, r"cannot run x \[3, 4\], by \[1\]; built for x \[1-2, 4\]; x \[1-8, 8\]"),
        ({"x": x(1).astype(np.float64)}, "input x is float64, it must be float32"),
        ({"x": x(1)[0]}, r"input x is \[4\], it must be \[B, n\]"),
        ({"x": x(1), "z": x(1)}, "has no input z, only x, by"),
        ({}, "input x is missing"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(
    engine: Callable[[str], TensorRTEngine], device: FakeDevice, inputs: dict[str, np.ndarray], words: str
) -> None:
    scale = engine("multiplier")
    with pytest.raises(UsageError, match=f"engine multiplier: {words}"):
        scale(by=np.float32([1]), **inputs)
    assert not {"run", "upload"} & set(device.events)


def test_an_engine_that_is_let_go_of_gives_back_its_memory(tmp_path: Path, device: FakeDevice) -> None:
    """As under a memory budget: nobody closes it, whoever holds it may go on using it."""
    for program in ("multiplier", "unrecordable"):
        path = tmp_path / f"{program}.plan"
        path.write_text(program)
        engine = TensorRTEngine([path], entry(path.name), device)
        engine.hold(by=np.float32([2]))
        for _ in range(3):
            engine(x=x(2))
        assert device.memory
        del engine
        assert not device.memory and not device.graphs
    model = model_of(tmp_path, device, llm="free")
    model.start(1, 8)
    for step in (1, 2, 3, 4):
        model.forward(embeds((step,)), np.array([1]))
    assert device.memory and device.graphs
    del model
    assert not device.memory and not device.graphs


# What a plan was built for


@pytest.mark.parametrize(
    ("built_for", "words"),
    [
        (None, "does not say what it was built for"),
        (
            BuiltFor(library="tensorrt-rtx 1.6.0", compute_capabilities=("8.9",)),
            "built with tensorrt-rtx 1.6.0, this machine has tensorrt-rtx 1.7.1; install that version",
        ),
        (
            BuiltFor(library="tensorrt-rtx 1.7.1", compute_capabilities=("8.6", "12.0")),
            "built for compute capability 8.6, 12.0, this GPU has 8.9",
        ),
    ],
)
def test_a_plan_for_another_machine_is_refused_unread(
    tmp_path: Path, device: FakeDevice, built_for: BuiltFor | None, words: str
) -> None:
    with pytest.raises(BundleError, match=f"engine multiplier: .*{words}") as caught:
        tensorrt.load_engine(FakeBundle(tmp_path), entry("multiplier.plan", built_for=built_for), None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert device.loaded == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(("capability", "fits"), [("7.5", False), ("8.0", True), ("12.0", True)])
def test_a_plan_for_no_gpu_in_particular_runs_from_ampere_on(
    tmp_path: Path, device: FakeDevice, capability: str, fits: bool
) -> None:
    device.compute_capability = capability
    (tmp_path / "multiplier.plan").write_text("multiplier")
    portable = entry("multiplier.plan", built_for=BuiltFor(library="tensorrt-rtx 1.7.1"))
    if fits:
        tensorrt.load_engine(FakeBundle(tmp_path), portable, None).close()  # type: ignore[arg-type]
    else:
        with pytest.raises(BundleError, match=r"8\.0 and later, this GPU has 7\.5"):
            tensorrt.load_engine(FakeBundle(tmp_path), portable, None)  # type: ignore[arg-type]


def test_an_unreadable_plan_is_one_line_with_the_librarys_reason(
    engine: Callable[[str], TensorRTEngine], device: FakeDevice
) -> None:
    with pytest.raises(
        BundleError, match=r"engine unheard-of: .* cannot read its plan: the magic number is wrong; export"
    ):
        engine("unheard-of")


def test_weights_are_put_into_a_plan_without_them(tmp_path: Path, device: FakeDevice) -> None:
    (tmp_path / "multiplier.plan").write_text("multiplier")
    loading = entry("multiplier.plan", "multiplier.onnx", "multiplier.onnx.data")
    tensorrt.load_engine(FakeBundle(tmp_path), loading, None).close()  # type: ignore[arg-type]
    assert device.loaded == ["multiplier", "refit multiplier.onnx"]  # type: ignore[attr-defined]


# Language model


def model_of(folder: Path, device: FakeDevice, **programs: str) -> TensorRTLanguageModel:
    """The language model whose plan files, by name, run these programs."""
    paths = []
    for name, program in programs.items():
        paths.append(folder / f"{name.replace('_c', '.c')}.plan")
        paths[-1].write_text(program)
    return TensorRTLanguageModel(paths, entry(*(path.name for path in paths)), device, max_positions=64)


def embeds(*rows: tuple[float, ...]) -> np.ndarray:
    values = np.array(rows, np.float32)
    return np.stack([values, np.zeros_like(values)], -1)  # [B, S, 2]


@pytest.mark.parametrize("program", ["free", "long"])
def test_the_cache_remembers_ragged_prompts_and_single_steps(tmp_path: Path, device: FakeDevice, program: str) -> None:
    name = "llm" if program == "free" else "llm_c32"
    model = model_of(tmp_path, device, **{name: program})
    model.start(2, 12)
    # Padding is written behind a row's end and must be overwritten before it counts.
    logits = model.forward(embeds((1, 2, 3), (10, 99, 99)), np.array([3, 1]))
    np.testing.assert_array_equal(logits, [[6], [10]])
    total = np.array([[6.0], [10.0]])
    for step in range(1, 6):
        total += step
        np.testing.assert_array_equal(model.forward(embeds((step,), (step,)), np.array([1, 1])), total)
    assert model.lengths.tolist() == [8, 6]
    assert device.events.count("launch") >= 3  # single steps are recorded, with two caches one graph for each turn
    model.start(1, 12)
    np.testing.assert_array_equal(model.forward(embeds((4, 5)), np.array([2])), [[9]])
    np.testing.assert_array_equal(model.forward(embeds((6, 7)), np.array([2])), [[22]])
    model.close()


def test_a_cache_updated_in_place_is_there_once(tmp_path: Path, device: FakeDevice) -> None:
    model = model_of(tmp_path, device, llm_c32="long")
    model.start(2, 20)
    once = sum(len(memory) for memory in device.memory.values())
    model.close()
    model = model_of(tmp_path, device, llm="free")
    model.start(2, 32)
    twice = sum(len(memory) for memory in device.memory.values())
    model.close()
    assert (once, twice) == (2 * 32 * 2, 2 * 2 * 32 * 2)  # rows x positions x bytes of float16


def test_the_shortest_cache_that_suffices_is_taken(tmp_path: Path, device: FakeDevice) -> None:
    model = model_of(tmp_path, device, llm_c8="short", llm_c32="long")
    for capacity in (8, 5, 9, 3):
        model.start(1, capacity)
        np.testing.assert_array_equal(model.forward(embeds((1, 2)), np.array([2])), [[3]])
    with pytest.raises(UsageError, match="33 positions are wanted, the model has 32"):
        model.start(1, 33)
    model.close()
    assert device.loaded == ["short", "long", "short"]  # type: ignore[attr-defined]


def test_a_plan_says_how_many_rows_it_takes(tmp_path: Path, device: FakeDevice) -> None:
    model = model_of(tmp_path, device, llm_c8="short")
    assert model.most_rows == 4
    model.start(model.most_rows, 8)
    rows = embeds(*[(1,)] * model.most_rows)
    np.testing.assert_array_equal(model.forward(rows, np.ones(model.most_rows, int)), [[1]] * model.most_rows)
    model.start(model.most_rows + 1, 8)
    with pytest.raises(UsageError, match="built for"):
        model.forward(embeds(*[(1,)] * 5), np.ones(5, int))


def test_calls_the_cache_cannot_take_are_refused(tmp_path: Path, device: FakeDevice) -> None:
    model = model_of(tmp_path, device, llm_c8="short")
    with pytest.raises(UsageError, match="start must come before forward"):
        model.forward(embeds((1,)), np.array([1]))
    model.start(2, 5)
    with pytest.raises(UsageError, match="counts"):
        model.forward(embeds((1, 2), (1, 2)), np.array([3, 1]))
    with pytest.raises(UsageError, match=r"inputs_embeds \[1-4, 2-4, 2\]"):
        model.forward(embeds((1,) * 5, (1,) * 5), np.array([5, 5]))
    model.forward(embeds((1, 2), (1, 2)), np.array([2, 1]))
    with pytest.raises(UsageError, match="2 rows with a past take one position each"):
        model.forward(embeds((1, 2), (1, 2)), np.array([2, 2]))
    for _ in range(3):
        model.forward(embeds((1,), (1,)), np.array([1, 1]))
    with pytest.raises(UsageError, match=r"5 \+ 1 positions do not fit the cache of 5"):
        model.forward(embeds((1,), (1,)), np.array([1, 1]))
    model.close()


@pytest.mark.parametrize("program", ["free", "long"])
def test_a_rewound_cache_goes_on_where_it_was_cut(tmp_path: Path, device: FakeDevice, program: str) -> None:
    model = model_of(tmp_path, device, **{"llm" if program == "free" else "llm_c32": program})
    model.start(2, 16)
    model.forward(embeds((1, 2, 3), (10, 20, 99)), np.array([3, 2]))
    for step in (4, 5, 6):  # recorded and launched by the last
        model.forward(embeds((step,), (step,)), np.array([1, 1]))
    assert model.lengths.tolist() == [6, 5]
    kept = np.array([4, 2])
    model.rewind(kept)
    kept[0] = 9  # the engine has its own copy
    assert model.lengths.tolist() == [4, 2] and model.lengths.dtype == np.int32
    # What was written behind the cut counts no more, and is overwritten.
    np.testing.assert_array_equal(model.forward(embeds((100,), (100,)), np.array([1, 1])), [[110], [130]])
    np.testing.assert_array_equal(model.forward(embeds((100,), (100,)), np.array([1, 1])), [[210], [230]])
    with pytest.raises(UsageError, match=r"rows of \[6, 4\] positions cannot be shortened to \[7, 4\]"):
        model.rewind(np.array([7, 4]))
    with pytest.raises(UsageError, match="one integer a row"):
        model.rewind(np.array([1]))
    model.close()


def test_a_rewound_row_takes_a_question_of_several_positions(tmp_path: Path, device: FakeDevice) -> None:
    """As one video is asked several questions: each goes on behind the video."""
    model = model_of(tmp_path, device, llm_c32="long")
    model.start(1, 16)
    model.forward(embeds((1, 2, 3)), np.array([3]))
    for question, total in (((10, 20), 36), ((5, 5, 5), 21), ((7,), 13)):
        model.rewind(np.array([3]))
        np.testing.assert_array_equal(model.forward(embeds(question), np.array([len(question)])), [[total]])
    model.rewind(np.array([0]))
    np.testing.assert_array_equal(model.forward(embeds((4, 5)), np.array([2])), [[9]])
    model.close()


# What is missing on this machine


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_library.library.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EnvironmentProblem, match=r'pip install "videolavit\[tensorrt-rtx\]"'):
        tensorrt_library.library("tensorrt-rtx")


def test_missing_cuda_bindings_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.open_device.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EnvironmentProblem, match=r"cuda-bindings cannot be imported .*pip install"):
        cuda.open_device()
