"""TensorRT-RTX really builds every engine at the official widths, two layers deep, without a GPU."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from export.engine import write_engine
from export.graphs import registry
from export.graphs.registry import ENGINES, LANGUAGE_MODEL
from export.settings import Buckets, EngineSettings, Precision, default_precision
from export.tensorrt import build_plans
from runtime.vocabulary import Vocabulary
from videolavit.checkpoints import Checkpoint
from videolavit.config import PRESETS, ModelConfig, two_layers
from videolavit.inventory import inventory

TARGETS = ("8.6", "8.9", "12.0")
GIB = 2**30
# A plan is made for any size; tracing at a small one spares torch's convolutions at full width.
EXAMPLES = {
    "keyframe_unet": {"B": 2, "h": 8, "w": 8},
    "video_unet": {"B": 2, "h": 4, "w": 4},
    "keyframe_vae_encoder": {"B": 1, "H": 64, "W": 64},
    "keyframe_vae_decoder": {"B": 2, "h": 4, "w": 4},
    "video_vae_encoder": {"B": 1, "H": 64, "W": 64},
    "video_vae_decoder": {"N": 2, "h": 4, "w": 4},
}


def small_slice() -> ModelConfig:
    """Two layers, a vocabulary cut short, and the outer levels of the UNets: a build takes seconds, not minutes."""
    config = two_layers(PRESETS["video-lavit-7b"])
    keyframe, video = config.keyframe_unet, config.video_unet
    return replace(
        config,
        vocabulary=Vocabulary(text_size=512, visual_codes=512, motion_codes=256),
        keyframe_unet=replace(
            keyframe,
            block_out_channels=keyframe.block_out_channels[:2],
            transformer_layers=keyframe.transformer_layers[:2],
            heads=keyframe.heads[:2],
        ),
        video_unet=replace(video, block_out_channels=video.block_out_channels[:2], heads=video.heads[:2]),
    )


CONFIG = small_slice()


class Stretches:
    """Weights that are stretches of one row of random numbers: drawing as many as a real width has takes minutes."""

    def tensors(self, component: str) -> Iterator[tuple[str, torch.Tensor]]:
        pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).half().float() / 64
        for name, shape in inventory(CONFIG, component).items():
            if len(shape) == 1 and name.endswith("weight"):
                yield name, torch.ones(shape)
                continue
            size = torch.Size(shape).numel()
            start = zlib.crc32(name.encode()) % len(pool)
            yield name, pool.roll(start).repeat(-(-size // len(pool)))[:size].view(shape)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize(
    ("engine", "precision"), [*((name, "fp16") for name in ENGINES), (LANGUAGE_MODEL, "int8"), (LANGUAGE_MODEL, "int4")]
)
def test_every_engine_builds_at_official_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, precision: Precision
) -> None:
    if engine in EXAMPLES:
        monkeypatch.setitem(registry.GRAPHS, engine, replace(registry.GRAPHS[engine], example=EXAMPLES[engine]))
    settings = EngineSettings(
        backend="tensorrt-rtx",
        precision=default_precision(engine, precision, "tensorrt-rtx"),
        compute_capabilities=TARGETS,
        buckets=Buckets(cache_capacities=(1024,)),
    )
    checkpoint = Checkpoint(CONFIG, tokenizer=b"", weights=Stretches())
    model, *rest = write_engine(checkpoint, engine, tmp_path / f"{engine}.onnx", settings)
    written = sum(path.stat().st_size for path in (model, *rest))
    (built,) = build_plans(engine, model, tmp_path / "plans", CONFIG, settings)
    assert built.built_for.compute_capabilities == TARGETS
    assert built.path.stat().st_size > 0.9 * written, "the weights are in the plan"
    assert built.peak_rss < 6 * GIB
    for path in (model, *rest, built.path):
        path.unlink()  # the next ones need the room
