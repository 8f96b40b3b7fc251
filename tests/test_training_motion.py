"""Training of the motion tokenizer and of the video detokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from runtime.errors import UsageError
from runtime.geometry import Geometry
from videolavit.checkpoints import Checkpoint, RandomWeights, load
from videolavit.config import (
    PRESETS,
    ModelConfig,
    MotionConditionConfig,
    MotionTokenizerConfig,
    VideoUNetConfig,
    VideoVaeConfig,
)
from videolavit.models.motion_tokenizer import MotionTokenizer
from videolavit.reference import clips as reference
from videolavit.training.data.errors import DataError
from videolavit.training.data.tokenizing import Plan, tokenize
from videolavit.training.loop import _Trainer, train
from videolavit.training.settings import DataSettings, TrainSettings
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages.clips import Mixed, More, check_shares
from videolavit.training.stages.motion_tokenizer import (
    MotionTokenizerOptions,
    MotionTokenizerStage,
    direction_of,
    main_vector,
    mirrored,
    weighted_error,
)
from videolavit.training.stages.video_detokenizer import (
    FIELDS,
    REBUILT,
    VideoDetokenizerOptions,
    VideoDetokenizerStage,
    moved,
    noised,
)

FRAMES, SIDE = 24, 8  # of motion and of latents


def tiny() -> ModelConfig:
    shapes = PRESETS["shapes"]
    geometry = {name: getattr(shapes.geometry, name) for name in Geometry.__struct_fields__}
    return replace(
        shapes,
        geometry=Geometry(**(geometry | {"motion_grid": (8, 8), "video_size": (64, 64), "keyframe_size": (64, 64)})),
        motion_tokenizer=MotionTokenizerConfig(grid=(8, 8), dim=8, heads=1, stages=(1, 1, 1, 1), codes=16, code_dim=4),
        motion_encoder=MotionConditionConfig(dim=8, heads=1, depth=1, out_dim=8),
        video_unet=VideoUNetConfig(
            block_out_channels=(32, 32), heads=(1, 1), layers_per_block=1, cross_attention_dim=8, time_id_dim=4,
            norm_groups=8,
        ),
        video_vae=VideoVaeConfig(block_out_channels=(32, 32, 32, 32), norm_groups=8, sample_size=64),
    )  # fmt: skip


def checkpoint(*untrained: str) -> Checkpoint:
    config = tiny()
    return Checkpoint(config, tokenizer=b"", weights=RandomWeights(config, 0), untrained=untrained)


def context(*untrained: str, data: DataSettings | None = None) -> StageContext:
    return StageContext(
        checkpoint=checkpoint(*untrained), data=data or DataSettings(), seed=3, device=torch.device("cpu")
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fields(count: int) -> torch.Tensor:
    """Squares that move to one of four sides: [N, 2, T, 8, 8]."""
    motion = torch.zeros(count, 2, FRAMES, SIDE, SIDE)
    for index in range(count):
        way = torch.tensor([(1.5, 0.0), (-1.5, 0.0), (0.0, 1.5), (0.0, -1.5)][index % 4])
        motion[index, :, 1:, 2:6, 1 + index % 3 : 5 + index % 3] = way[:, None, None, None]
    return motion


def losses(stage: Stage, batch: dict[str, Any], steps: int, rate: float, *, same: bool) -> list[float]:
    """Losses of `steps` steps on one batch; `same` draws the same each time."""
    optimizer = torch.optim.AdamW([p for p in stage.module.parameters() if p.requires_grad], lr=rate)
    found = []
    for step in range(steps):
        draws = generator(0 if same else step)
        with torch.no_grad():
            prepared = stage.prepare(batch, draws)
        loss = stage.module(prepared, draws, step)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stage.after_step(step)
        found.append(loss.item())
    return found


# Motion tokenizer


def tokenizer_stage(**options: Any) -> MotionTokenizerStage:
    return MotionTokenizerStage(context("motion_tokenizer"), MotionTokenizerOptions(**options))


def test_the_motion_tokenizer_learns_one_batch() -> None:
    motion = fields(4)
    stage = tokenizer_stage(continuous=10, moving_weight=2.0)
    found = losses(stage, {"motion": motion}, 50, 5e-3, same=True)
    assert np.mean(found[-5:]) < 0.4 * np.mean(found[:5])
    stage.module.eval()
    with torch.no_grad():
        after, _ = stage.module.round_trip(motion)
    assert (after - motion).square().mean() < 0.6 * motion.square().mean()  # zeros would be 1
    assert [direction_of(main_vector(m)) for m in after.numpy()] == ["right", "left", "down", "up"]
    published = MotionTokenizer(stage.module.tokenizer.config).eval()
    published.load_state_dict(stage.components()["motion_tokenizer"])  # strict
    assert torch.equal(published.decode_codes(published.encode(motion)), after)


def test_the_motion_tokenizer_starts_over_only_if_it_was_never_trained() -> None:
    name = "encoder.pos_embed"
    weights = checkpoint().component("motion_tokenizer").state_dict()[name]
    fresh, going = (
        MotionTokenizerStage(context(*untrained), MotionTokenizerOptions()).module.tokenizer.state_dict()[name]
        for untrained in (["motion_tokenizer"], [])
    )
    assert torch.equal(going, weights)
    assert 0 < fresh.std() < 0.03 < weights.std()  # the module's own start is small


def test_weighted_error() -> None:
    motion = torch.zeros(1, 2, 1, 1, 3)
    motion[0, 0, 0, 0, 0] = 1.0  # moves
    motion[0, 1, 0, 0, 1] = 9.0  # moves, far
    said = torch.full_like(motion, 0.5)
    plain = weighted_error(said, motion, MotionTokenizerOptions())
    assert plain.item() == pytest.approx((5 * 0.25 + 8.5**2) / 6)
    cut = weighted_error(said, motion, MotionTokenizerOptions(limit=2.0, moving_weight=3.0))
    assert cut.item() == pytest.approx((3 * 0.25 + 3 * 0.25 + 3 * 0.25 + 3 * 1.5**2 + 2 * 0.25) / 6)


def test_a_mirrored_field_moves_where_its_cells_go() -> None:
    motion = torch.zeros(64, 2, 2, 4, 4)
    motion[:, 0, :, :, 3] = 1.0  # to the right, at the right edge
    found = mirrored(motion, generator())
    for field in found:
        vector = field.sum((1, 2, 3)) / 8
        place = field.abs().sum((0, 1))  # [4, 4]: the edge where the motion is
        edge = {(1.0, 0.0): place[:, 3], (-1.0, 0.0): place[:, 0], (0.0, 1.0): place[3], (0.0, -1.0): place[0]}
        assert edge[tuple(vector.tolist())].min() == 2.0 and place.sum() == 8.0
    assert len({tuple(field.sum((1, 2, 3)).tolist()) for field in found}) == 4
    assert mirrored(torch.ones(3, 2, 2, 4, 6), generator()).shape == (3, 2, 2, 4, 6)


def test_directions() -> None:
    assert direction_of(np.array([0.7, -0.7])) == "up and to the right"
    assert direction_of(np.array([0.05, 0.0])) is None
    assert main_vector(np.zeros((2, 3, 4, 4))).tolist() == [0.0, 0.0]


def test_motion_of_the_world_of_shapes_is_an_item() -> None:
    stage = tokenizer_stage()
    dataset = stage.dataset()
    first, again = dataset[5]["motion"], dataset[5]["motion"]
    assert (
        first.shape == (2, FRAMES, 8, 8) and torch.equal(first, again) and not torch.equal(first, dataset[6]["motion"])
    )


def test_figures_of_a_motion_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("videolavit.training.stages.motion_tokenizer.PROBES", 12)
    stage = tokenizer_stage()
    stage.module.eval()
    with torch.no_grad():
        silly = stage.validate(generator())
        stage.module.round_trip = lambda motion: (motion, torch.arange(12).expand(len(motion), 12))
        perfect = stage.validate(generator())
    assert perfect["error"] == 0 and perfect["direction"] == perfect["direction_before"] > 0.8
    assert perfect["speed"] == 1 and perfect["perplexity"] == pytest.approx(12)
    assert silly["direction"] < perfect["direction"] and silly["error_of_zero"] == perfect["error_of_zero"] > 0


# Video detokenizer


def plain_v(clean: float, noise: float, sigma: float) -> float:
    """From the definition of the sampler: x = c_skip y + c_out v with c_skip = 1 / (s^2 + 1), c_out = -s / sqrt(..)."""
    noisy = clean + sigma * noise
    return (clean - noisy / (sigma**2 + 1)) / (-sigma / (sigma**2 + 1) ** 0.5)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 20.0, 700.0])
def test_what_the_network_is_to_say(sigma: float) -> None:
    clean, noise = torch.randn(2, 50, generator=generator(), dtype=torch.float64)
    read, v = noised(clean[None], noise[None], torch.tensor([sigma], dtype=torch.float64))
    torch.testing.assert_close(v[0], plain_v(clean, noise, sigma))  # type: ignore[arg-type]
    torch.testing.assert_close(read[0], (clean + sigma * noise) / (sigma**2 + 1) ** 0.5)


def test_the_target_leads_the_sampler_to_the_clean_latents() -> None:
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    )  # fmt: skip
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=generator())
    for index, time in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        assert time.item() == pytest.approx(0.25 * sigma.log().item(), abs=1e-5)
        read, v = noised(clean, noise, sigma.reshape(1))
        noisy = clean + sigma * noise
        torch.testing.assert_close(scheduler.scale_model_input(noisy, time), read)
        found = scheduler.step(v, time, noisy).pred_original_sample
        torch.testing.assert_close(found, clean, atol=2e-3, rtol=1e-3)  # float32 at sigma 700


def detokenizer(**options: Any) -> VideoDetokenizerStage:
    return VideoDetokenizerStage(context("video_unet", "motion_encoder"), VideoDetokenizerOptions(**options))


def video_batch(count: int = 2) -> dict[str, torch.Tensor]:
    draw = generator(7)
    codes = torch.randint(16, (count, 12), generator=draw)
    return {
        "latents": torch.randn(count, FRAMES, 4, SIDE, SIDE, generator=draw) * 5,
        "keyframe": torch.randint(256, (count, 64, 64, 3), generator=draw, dtype=torch.uint8),
        "motion_latent": fields(count) / 10,
        "motion_ids": codes + tiny().vocabulary.first_motion,
    }


class Recorder(torch.nn.Module):
    """A UNet that says zero and remembers what it was asked."""

    def forward(self, *asked: torch.Tensor) -> torch.Tensor:
        self.asked = asked
        return torch.zeros_like(asked[0][:, :, :4])


def test_conditions_are_those_of_the_sampler_and_go_together() -> None:
    stage = detokenizer(drop=0.5, tokenized_motion=0.0, augmentation_mean=-30.0)
    batch = video_batch(64)
    batch["latents"] = batch["latents"][:1].expand(64, -1, -1, -1, -1)
    prepared = stage.prepare(batch, generator())
    stage.module.unet = recorder = Recorder()
    with torch.no_grad():
        stage.module(prepared, generator(), 0)
    sample, _, states, time_ids = recorder.asked
    dropped = states.flatten(1).abs().amax(1) == 0
    assert 16 < dropped.sum() < 48
    assert torch.equal(dropped, sample[:, :, 4:8].flatten(1).abs().amax(1) == 0)
    assert torch.equal(dropped, sample[:, :, 8:].flatten(1).abs().amax(1) == 0)
    kept = ~dropped
    picture = batch["keyframe"][kept].float().permute(0, 3, 1, 2) / 127.5 - 1
    encoded = reference.encode(stage.vae, picture)
    torch.testing.assert_close(sample[kept][:, 5, 4:8], encoded, atol=1e-4, rtol=1e-4)  # not scaled, every frame
    torch.testing.assert_close(sample[kept][:, :, 8:], batch["motion_latent"][kept].transpose(1, 2))
    expected = stage.module.motion_encoder.encode(batch["motion_latent"][kept])
    torch.testing.assert_close(states[kept], expected, atol=1e-5, rtol=1e-4)
    assert time_ids[0].tolist() == pytest.approx([6.0, 127.0, 0.0])
    torch.testing.assert_close(prepared["latents"], batch["latents"] * tiny().video_vae.scaling_factor)


def test_a_share_of_clips_starts_from_the_rebuilt_key_frame() -> None:
    batch = video_batch(64)
    batch[REBUILT] = 255 - batch["keyframe"]
    plain = {"tokenized_motion": 0.0, "augmentation_mean": -30.0}
    true, rebuilt = (
        detokenizer(**plain).prepare({**batch, "keyframe": batch[name]}, generator())["pictures"]
        for name in ("keyframe", REBUILT)
    )
    pictures = detokenizer(rebuilt=0.5, **plain).prepare(batch, generator())["pictures"]
    of = [
        [torch.allclose(found, expected, atol=1e-4) for found, expected in zip(pictures, given, strict=True)]
        for given in (true, rebuilt)
    ]
    assert all(one != other for one, other in zip(*of, strict=True)) and 16 < sum(of[1]) < 48


def test_noise_and_its_weighting() -> None:
    stage = detokenizer(noise_mean=0.3, noise_deviation=1.1, drop=0.0)
    stage.module.unet = recorder = Recorder()
    stage.module.motion_encoder = StubEncoder()
    batch = {
        "latents": torch.zeros(4000, 2, 4, 2, 2),
        "pictures": torch.zeros(4000, 4, 2, 2),
        "motion": torch.zeros(4000, 2, 2, 2, 2),
        "weight": torch.ones(4000, 2, 2, 2),
        "time_ids": torch.zeros(4000, 3),
    }
    scalars = stage.module(batch, generator(), 0)
    logs = 4 * recorder.asked[1]
    assert logs.mean().item() == pytest.approx(0.3, abs=0.06) and logs.std().item() == pytest.approx(1.1, abs=0.05)
    # Clean latents are zero and nothing is said: the error is the mean of n^2 / (sigma^2 + 1).
    assert scalars["loss"].item() == pytest.approx((1 / ((2 * logs).exp() + 1)).mean().item(), rel=0.02)


class StubEncoder(torch.nn.Module):
    grid = (2, 2)

    def forward(self, motion: torch.Tensor) -> torch.Tensor:
        return motion.new_zeros(len(motion), motion.shape[2], 4, 1)


def test_where_something_has_moved() -> None:
    motion = torch.zeros(1, 2, 3, 6, 6)
    motion[0, 1, 1, 2, 2] = -0.2
    found = moved(motion)[0]
    assert found[0].sum() == 0 and found[1].sum() == 9 and torch.equal(found[1], found[2]) and found[2, 1:4, 1:4].all()


def test_other_folders_take_their_share_of_clips() -> None:
    first, other = ([{"clip": torch.tensor(sign * n)} for n in range(1, 401)] for sign in (1, -1))
    mixed = Mixed(first, [(other[:7], 0.25)], seed=0)  # type: ignore[arg-type,list-item]
    drawn = [int(mixed[index]["clip"]) for index in range(400)]
    assert drawn == [int(mixed[index]["clip"]) for index in range(400)]
    assert all(value == index + 1 or -8 < value < 0 for index, value in enumerate(drawn))
    assert np.mean(np.array(drawn) < 0) == pytest.approx(0.25, abs=0.06) and len({v for v in drawn if v < 0}) == 7
    with pytest.raises(UsageError, match="more than 1 in all"):
        check_shares([More(path="a", share=0.6), More(path="b", share=0.6)])


def test_scattered_frames_keep_what_belongs_to_them() -> None:
    batch = video_batch(16)
    whole = detokenizer(tokenized_motion=0.0, moving_weight=3.0).prepare(batch, generator())
    few = detokenizer(tokenized_motion=0.0, moving_weight=3.0, scattered=2).prepare(batch, generator())
    pairs = set()
    for clip in range(16):
        frames = [
            next(t for t in range(FRAMES) if torch.equal(latents, whole["latents"][clip, t]))
            for latents in few["latents"][clip]
        ]
        assert frames == sorted(set(frames)) and len(frames) == 2
        assert torch.equal(few["motion"][clip], whole["motion"][clip][:, frames])
        assert torch.equal(few["weight"][clip], whole["weight"][clip, frames])
        pairs.add(tuple(frames))
    assert len(pairs) > 3


def test_motion_from_tokens_is_what_generation_decodes() -> None:
    batch = video_batch()
    stage = detokenizer(tokenized_motion=1.0)
    spoken = stage.prepare(batch, generator())["motion"]
    codes = batch["motion_ids"] - tiny().vocabulary.first_motion
    assert torch.equal(spoken, stage.tokenizer.reconstruct_from_codes(codes, SIDE, SIDE))
    assert torch.equal(detokenizer(tokenized_motion=0.0).prepare(batch, generator())["motion"], batch["motion_latent"])


def test_a_new_network_says_nothing_and_hears_all_inputs_alike() -> None:
    stage = detokenizer()
    unet = stage.module.unet
    count = 40  # as large as in use: noisy latents, a key frame's unscaled ones, and motion
    sizes = torch.tensor([1.0] * 4 + [1 / stage.scaling] * 4 + [0.1] * 2)[:, None, None]
    x = torch.randn(count, 10, 8, 8, generator=generator()) * sizes
    parts = [
        x * torch.tensor([float(low <= c < high) for c in range(10)])[:, None, None]
        for low, high in ((0, 4), (4, 8), (8, 10))
    ]
    heard = [torch.nn.functional.conv2d(part, unet.conv_in.weight, padding=1).std().item() for part in parts]
    assert max(heard) < 3 * min(heard)
    said = unet(x[None, :2], torch.zeros(1), torch.zeros(1, 2, 256, 8), torch.zeros(1, 3))
    assert not said.any()


def test_the_video_detokenizer_learns_one_batch() -> None:
    stage = detokenizer(frames=2, drop=0.0)
    found = losses(stage, video_batch(), 30, 5e-3, same=True)
    assert found[-1] < 0.5 * found[0]


def test_a_few_steps_lower_the_loss() -> None:
    stage = detokenizer(frames=2, moving_weight=2.0)
    found = losses(stage, video_batch(), 60, 5e-3, same=False)
    assert np.mean(found[-16:]) < 0.9 * np.mean(found[:16])


def test_the_video_detokenizer_needs_what_it_builds_on() -> None:
    with pytest.raises(UsageError, match=r"video_vae and motion_tokenizer .* trained first"):
        VideoDetokenizerStage(context("video_vae", "motion_tokenizer"), VideoDetokenizerOptions())
    VideoDetokenizerStage(context("motion_tokenizer"), VideoDetokenizerOptions(tokenized_motion=0.0))
    with pytest.raises(UsageError, match="frames 25"):
        detokenizer(frames=25)
    with pytest.raises(UsageError, match="scattered 9: they are drawn from 8 frames"):
        detokenizer(frames=8, scattered=9)
    with pytest.raises(UsageError, match="videolavit tokenize"):
        detokenizer().dataset()


def test_figures_of_a_video_detokenizer() -> None:
    stage = detokenizer(probes=1, probe_steps=2, probe_guidance=2.0)
    stage.module.eval()
    with torch.no_grad():
        figures = stage.validate(generator())
        again = stage.validate(generator())
    assert figures == again and set(figures) == {"psnr", "gain", "motion_gain"}
    assert all(np.isfinite(value) for value in figures.values()) and figures["gain"] != 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A checkpoint folder and clips tokenised with it."""
    root = tmp_path_factory.mktemp("motion")
    saved = checkpoint("video_unet", "motion_encoder")
    saved.save(root / "checkpoint")
    plan = Plan(
        data=DataSettings(source="shapes"),
        count=4,
        checkpoint=root / "checkpoint",
        fields=(*FIELDS, "motion"),
    )
    tokenize(plan, root / "clips")
    yield root / "checkpoint", root / "clips"


def test_further_folders_may_lack_the_rebuilt_key_frame(folder: tuple[Path, Path], tmp_path: Path) -> None:
    saved, lacking = folder
    plan = Plan(data=DataSettings(source="shapes"), count=2, checkpoint=saved, fields=(*FIELDS, REBUILT))
    tokenize(plan, tmp_path / "rebuilt")

    def first(path: Path, *more: More) -> dict[str, torch.Tensor]:
        data = DataSettings(source="tokenized", path=str(path))
        chosen = replace(context("video_unet", "motion_encoder", data=data), checkpoint=load(saved))
        return VideoDetokenizerStage(chosen, VideoDetokenizerOptions(rebuilt=0.5, more=list(more))).dataset()[0]

    item = first(tmp_path / "rebuilt")
    assert not torch.equal(item[REBUILT], item["keyframe"])
    item = first(tmp_path / "rebuilt", More(path=str(lacking), share=1.0))
    assert torch.equal(item[REBUILT], item["keyframe"])
    with pytest.raises(DataError, match=REBUILT):
        first(lacking)


def settings(stage: str, clips: Path, steps: int, **options: Any) -> TrainSettings:
    return TrainSettings(
        stage=stage,
        steps=steps,
        batch_size=2,
        learning_rate=1e-3,
        save_every=2,
        log_every=1,
        ema=0.9 if stage == "video-detokenizer" else 0.0,
        data=DataSettings(source="tokenized", path=str(clips)),
        options=options,
    )


@pytest.mark.parametrize(
    "stage, options",
    [("motion-tokenizer", {"mirror": True, "continuous": 1}), ("video-detokenizer", {"frames": 3, "probes": 0})],
)
def test_a_run_that_was_killed_goes_on_as_if_it_was_not(
    stage: str, options: dict[str, Any], folder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, clips = folder
    wanted = settings(stage, clips, 4, **options)
    for name in ("one", "two"):  # a run puts its weights into its checkpoint
        shutil.copytree(saved, tmp_path / name)
    train(wanted, tmp_path / "one", tmp_path / "whole")
    step, calls = _Trainer._step, []

    def killed(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return step(self, *args)

    monkeypatch.setattr(_Trainer, "_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(wanted, tmp_path / "two", tmp_path / "broken")
    train(wanted, tmp_path / "two", tmp_path / "broken", resume=True)
    for file in (tmp_path / "whole" / "components").iterdir():
        assert file.read_bytes() == (tmp_path / "broken" / "components" / file.name).read_bytes(), file.name
