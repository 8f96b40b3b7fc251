"""The stages on pictures: losses fall, one batch can be learnt, a run that was stopped goes on the same way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image

from runtime.errors import UsageError
from runtime.settings import SchedulerSettings
from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import PRESETS, KeyframeVaeConfig, ModelConfig, VideoVaeConfig
from videolavit.models.components import COMPONENTS, build
from videolavit.models.visual_tokenizer import keep_decision
from videolavit.reference.schedulers import build_scheduler
from videolavit.tokenizer_training import SHAPES_TOKENIZER
from videolavit.training.data import open_source
from videolavit.training.loop import train
from videolavit.training.settings import DataSettings, TrainSettings, read_options, read_settings
from videolavit.training.stage import STAGES as ALL_STAGES
from videolavit.training.stage import Stage, StageContext, find_stage
from videolavit.training.stages.keyframe_detokenizer import signal_shares
from videolavit.training.stages.keyframe_vae import quiet, standardise
from videolavit.training.stages.pictures import FrameRuns, psnr, signed
from videolavit.training.stages.video_vae import decode, video_name
from videolavit.training.stages.visual_tokenizer import at_least_one, gumbel

RECIPES = Path(__file__).parents[1] / "videolavit" / "training" / "recipes" / "shapes"
STAGES = ("keyframe-vae", "video-vae", "keyframe-detokenizer")
SIDE = 16  # pixels of pictures and frames


def _tiny() -> ModelConfig:
    """Small pictures and the smallest networks that can still learn."""
    base = PRESETS["tiny"]
    sizes = {"keyframe_size": (SIDE, SIDE), "video_size": (SIDE, SIDE), "image_size": SIDE, "patch_size": 8}
    vae: dict[str, Any] = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 2}
    eva = replace(base.visual_tokenizer.eva, image_size=SIDE, patch_size=8, layers=1)
    return replace(
        base,
        geometry=msgspec.structs.replace(base.geometry, **sizes),
        visual_tokenizer=replace(base.visual_tokenizer, eva=eva, layers=1),
        keyframe_decoder=replace(base.keyframe_decoder, patches=4, depth=1),
        keyframe_vae=KeyframeVaeConfig(**vae, norm_groups=8),
        video_vae=VideoVaeConfig(**vae, norm_groups=8),
        keyframe_unet=replace(base.keyframe_unet, block_out_channels=(32, 32), heads=(2, 2)),
    )


TINY = _tiny()


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    tokenizer = SHAPES_TOKENIZER.read_bytes()
    return Checkpoint(TINY, tokenizer=tokenizer, weights=RandomWeights(TINY, 0), untrained=tuple(COMPONENTS))


def make(name: str, checkpoint: Checkpoint, **options: Any) -> Stage:
    kind = find_stage(name)
    small = {"keyframe-vae": {"crop": 0}, "video-vae": {"crop": 0, "frames": 2}, "keyframe-detokenizer": {"repeats": 2}}
    given = {**small[name], **options}
    context = StageContext(checkpoint=checkpoint, data=DataSettings(size=64), seed=5, device=torch.device("cpu"))
    torch.manual_seed(0)
    return kind(context, kind.Options(**given))


def losses(stage: Stage, steps: int, *, same: bool = False, rate: float = 2e-3) -> list[float]:
    dataset, batch_size, found = stage.dataset(), 2, []
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=rate, weight_decay=0, betas=(0.9, 0.99))
    for step in range(steps):
        first = 0 if same else step * batch_size
        batch = stage.collate([dataset[(first + index) % 64] for index in range(batch_size)])
        generator = torch.Generator().manual_seed(0 if same else step)
        with torch.no_grad():
            batch = stage.prepare(batch, generator)
        loss = stage.module(batch, generator, step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", STAGES)
def test_training_lowers_the_loss(name: str, checkpoint: Checkpoint) -> None:
    found = losses(make(name, checkpoint), 24)
    assert sum(found[-6:]) < 0.85 * sum(found[:6])


@pytest.mark.parametrize("name", STAGES)
def test_one_batch_can_be_learnt(name: str, checkpoint: Checkpoint) -> None:
    found = losses(make(name, checkpoint), 40, same=True)
    assert found[-1] < 0.4 * found[0]


@pytest.mark.parametrize("name", STAGES)
def test_a_stopped_run_goes_on_the_same(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "whole")
    checkpoint.save(tmp_path / "parts")
    options = {"crop": 8, "whole": 0.5} if name.endswith("vae") else {}

    def settings(steps: int) -> TrainSettings:
        return TrainSettings(
            stage=name,
            steps=steps,
            batch_size=2,
            learning_rate=1e-3,
            schedule="constant",
            ema=0.9,
            save_every=2,
            log_every=1,
            options=options,
            data=DataSettings(size=16),
        )

    train(settings(4), tmp_path / "whole", tmp_path / "run-whole")
    train(settings(2), tmp_path / "parts", tmp_path / "run-parts")
    checkpoint.save(tmp_path / "parts", force=True)  # frozen components and the start are those of the first part
    train(settings(4), tmp_path / "parts", tmp_path / "run-parts", resume=True)

    def column(run: str) -> list[str]:
        rows = (tmp_path / run / "metrics.csv").read_text().split()[1:]
        return [row.split(",")[1] for row in rows]

    assert column("run-parts") == column("run-whole")
    for component in find_stage(name).trains:
        file = f"{component}.safetensors"
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("name", STAGES)
def test_what_is_published_fits_and_validation_is_finite(name: str, checkpoint: Checkpoint) -> None:
    stage = make(name, checkpoint)
    stage.module.eval()
    with torch.no_grad():
        figures = stage.validate(torch.Generator().manual_seed(0))
    assert figures
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
    states = stage.components()
    assert tuple(states) == stage.trains
    for component, state in states.items():
        build(TINY, component).load_state_dict(state)


@pytest.mark.parametrize("name", ALL_STAGES)
def test_every_stage_has_a_valid_recipe(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    settings = read_settings(path)
    assert settings.stage == name
    read_options(settings, find_stage(name).Options, str(path))


# The autoencoder


def test_published_latents_have_unit_size_once_scaled(checkpoint: Checkpoint) -> None:
    stage = make("keyframe-vae", checkpoint)
    losses(stage, 3)
    vae = build(TINY, "keyframe_vae").eval()
    vae.load_state_dict(stage.components()["keyframe_vae"])
    sample = stage._sample  # type: ignore[attr-defined]
    with torch.no_grad():
        latents = vae.encode(signed(sample)).latent_dist.mode() * TINY.keyframe_vae.scaling_factor
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_standardising_changes_no_picture(checkpoint: Checkpoint) -> None:
    vae = build(TINY, "keyframe_vae").eval()
    vae.load_state_dict(checkpoint.component("keyframe_vae").state_dict())
    quiet(vae, 0.3)
    pictures = torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, SIDE // 8, SIDE // 8)

    def through() -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(signed(pictures)).latent_dist
        return posterior.mean, vae.decode(posterior.mean + posterior.std * noise).sample

    with torch.no_grad():
        latents, before = through()
        standardise(vae, pictures, 7.0)
        renamed, after = through()
    assert (renamed - latents).abs().max() > 1
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


# The video autoencoder


def test_video_autoencoder_starts_as_the_image_one(checkpoint: Checkpoint) -> None:
    image = checkpoint.component("keyframe_vae")
    stage = make("video-vae", checkpoint)
    frames = signed(torch.stack([stage.dataset()[index]["frames"] for index in range(2)]))  # [2, T, 3, H, W]
    vae = stage.frozen  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = image.encode(frames.flatten(0, 1)).latent_dist
        latents = vae.encode(frames.flatten(0, 1)).latent_dist
        ratio = TINY.keyframe_vae.scaling_factor / TINY.video_vae.scaling_factor
        torch.testing.assert_close(latents.mean, expected.mean * ratio, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(latents.std, expected.std * ratio, atol=1e-5, rtol=1e-4)
        image.post_quant_conv.bias.zero_()  # padding comes after it in one, before it in the other
        stage = make("video-vae", checkpoint)
        decoded = decode(stage.module.decoder, latents.mean.unflatten(0, frames.shape[:2]))
        torch.testing.assert_close(decoded.flatten(0, 1), image.decode(expected.mean).sample, atol=1e-4, rtol=1e-3)


def test_frames_of_other_videos_do_not_mix(checkpoint: Checkpoint) -> None:
    stage = make("video-vae", checkpoint)
    losses(stage, 2)
    latents = torch.randn(2, 3, 4, 4, 4)
    with torch.no_grad():
        both = decode(stage.module.decoder, latents)
        torch.testing.assert_close(both[1:], decode(stage.module.decoder, latents[1:]), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(both[0, 1], decode(stage.module.decoder, latents[:1, 1:2])[0, 0], atol=1e-4)


def test_the_encoder_stays_as_it_is(checkpoint: Checkpoint) -> None:
    stage = make("video-vae", checkpoint)
    before = {name: tensor.clone() for name, tensor in stage.components()["video_vae"].items()}
    losses(stage, 2)
    changed = {
        name for name, tensor in stage.components()["video_vae"].items() if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_other_widths_are_an_error_that_says_what_to_do(checkpoint: Checkpoint) -> None:
    config = replace(TINY, video_vae=replace(TINY.video_vae, block_out_channels=(32, 32, 32, 64)))
    other = Checkpoint(config, tokenizer=checkpoint.tokenizer, weights=RandomWeights(config, 0))
    with pytest.raises(UsageError, match='start = "checkpoint"'):
        make("video-vae", other)
    make("video-vae", other, start="checkpoint")


def test_official_autoencoders_fit_each_other() -> None:
    official = PRESETS["video-lavit-7b"]
    with torch.device("meta"):
        image, video = (build(official, name).state_dict() for name in ("keyframe_vae", "video_vae"))
    taken = {video_name(name, video): tensor.shape for name, tensor in image.items() if "post_quant" not in name}
    assert all(video[name].shape == shape for name, shape in taken.items())
    assert all(name in taken or "temporal" in name or "time_" in name for name in video)


def test_activations_can_be_computed_again(checkpoint: Checkpoint) -> None:
    plain, again = make("video-vae", checkpoint), make("video-vae", checkpoint)
    again.module.enable_gradient_checkpointing()  # type: ignore[operator]
    assert losses(again, 2) == pytest.approx(losses(plain, 2), rel=1e-5)


# The detokenizer


def test_noise_is_that_of_the_sampler() -> None:
    for settings in (SchedulerSettings(kind="ddim"), SchedulerSettings(kind="ddim", beta_end=0.02)):
        scheduler = build_scheduler(settings, 10, torch.device("cpu"))
        torch.testing.assert_close(signal_shares(settings), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_zero_for_the_right_answer(prediction: str, checkpoint: Checkpoint) -> None:
    stage = make("keyframe-detokenizer", checkpoint, features=0.0)
    module = stage.module
    module.prediction = prediction  # type: ignore[assignment]
    batch = stage.collate([stage.dataset()[0], stage.dataset()[1]])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        batch = stage.prepare(batch, generator)
        clean = batch["latents"].repeat_interleave(2, 0)

        class Oracle(torch.nn.Module):
            def forward(self, noisy: Any, timesteps: Any, **conditions: Any) -> Any:
                signal = module.signal[timesteps][:, None, None, None]  # type: ignore[index]
                noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
                velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
                sample = velocity if prediction == "v_prediction" else noise
                return type("Output", (), {"sample": sample})

        module.unet = Oracle()
        assert module(batch, generator, 0)["error"] < 1e-6
        batch["latents"] = batch["latents"] + 1
        assert module(batch, generator, 0)["error"] > 1e-2


def test_conditions_are_dropped_to_zeros(checkpoint: Checkpoint) -> None:
    stage = make("keyframe-detokenizer", checkpoint, drop=1.0)
    seen = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)

    stage.module.unet.register_forward_pre_hook(note, with_kwargs=True)  # type: ignore[union-attr]
    losses(stage, 1)
    assert seen["encoder_hidden_states"].abs().max() == 0
    assert seen["added_cond_kwargs"]["text_embeds"].abs().max() == 0
    assert seen["added_cond_kwargs"]["time_ids"][0].tolist() == [SIDE, SIDE, 0, 0, SIDE, SIDE]


def test_codes_are_kept_tokens_in_raster_order(checkpoint: Checkpoint) -> None:
    stage = make("keyframe-detokenizer", checkpoint)
    batch = stage.collate([stage.dataset()[index] for index in range(6)])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        prepared = stage.prepare(batch, generator)
        counts, vectors = prepared["counts"], prepared["vectors"]
        assert vectors.shape[:2] == (6, int(counts.max()))
        assert int(counts.min()) >= 1
        assert int(counts.max()) <= TINY.geometry.patches
        # The same decision again, through the tokenizer's own way of writing a picture down.
        tokenizer = checkpoint.component("visual_tokenizer")
        logits = tokenizer.keep_logits(tokenizer.features(batch["pixels"]))
        noise = gumbel(logits.shape, torch.Generator().manual_seed(3))
        keep = at_least_one(keep_decision(logits, noise), logits[..., 0])
        spans = tokenizer.tokenize(batch["pixels"], keep, TINY.vocabulary, add_special=False)
    for row, count, span in zip(vectors, counts.tolist(), spans, strict=True):
        codes = torch.tensor(span) - TINY.vocabulary.first_visual
        torch.testing.assert_close(row[:count], tokenizer.quantize.lookup(codes))


# Items


def test_items_depend_on_seed_and_index_alone() -> None:
    source = open_source(DataSettings(), TINY.geometry, seed=1)
    one, other = (FrameRuns(source, (128, 128), 1, frames=3, crop=64) for _ in range(2))
    other[4]
    assert torch.equal(one[3]["frames"], other[3]["frames"])
    assert torch.equal(one[3]["corner"], other[3]["corner"])
    assert not torch.equal(one[3]["frames"], one[4]["frames"])
    assert one[3]["frames"].shape == (3, 3, 128, 128)
    assert int(one[3]["corner"].max()) <= 64


def test_a_folder_of_pictures_serves_as_well(checkpoint: Checkpoint, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    Image.new("RGB", (30, 60), "blue").save(tmp_path / "b.png")
    source = open_source(DataSettings(source="folder", path=str(tmp_path)), TINY.geometry)
    item = FrameRuns(source, (SIDE, SIDE), 0, frames=2, tokenizer=48)[1]
    assert item["frames"].shape == (2, 3, SIDE, SIDE)
    assert item["frames"][0, :, 5, 5].tolist() == [0, 0, 255]
    assert item["pixels"].shape == (3, 48, 48)


def test_window_sizes_that_do_not_fit_are_refused() -> None:
    source = open_source(DataSettings(), TINY.geometry)
    for crop in (12, 136, -8):
        with pytest.raises(UsageError, match="crop"):
            FrameRuns(source, (128, 128), 0, crop=crop)


def test_psnr_of_a_known_error() -> None:
    expected = torch.zeros(2, 3, 8, 8)
    actual = expected + torch.tensor([0.2, 0.02])[:, None, None, None]
    torch.testing.assert_close(psnr(actual, expected), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
