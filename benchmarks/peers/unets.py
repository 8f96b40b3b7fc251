"""Peers of the detokenizers' networks: torch compiled, and the video UNet that diffusers ships.

Contract: made by `PeerSpec` in the process of a stage; float32 on the CPU. `compiled` has the same weights and gives
the same results as torch eagerly. `stable_video` is Stable Video Diffusion's UNet at the widths of ours, with random
weights: it attends to one token of context where ours attends to the motion of each frame, so it has less to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from export.bench.source import Source
from export.graphs.registry import GRAPHS
from export.onnx import torch_module
from runtime.bench.peer import Call, Decoding
from runtime.bench.timing import Run
from runtime.requests import VideoRequest
from videolavit.config import VideoUNetConfig


def compiled(preset: str, *, threads: int) -> CompiledPeer:
    """The modules of random weights for `preset`, compiled for the sizes they are first called with."""
    torch.set_num_threads(threads)
    return CompiledPeer(Source(preset=preset))


def stable_video(preset: str, *, threads: int) -> StableVideoPeer:
    """diffusers' UNet at the widths of `preset`."""
    torch.set_num_threads(threads)
    return StableVideoPeer(Source(preset=preset).config().video_unet)


class _Networks:
    """A peer that has networks and no language model."""

    def prefill(self, prompt: np.ndarray) -> None:
        return None

    def decode(self, work: Decoding) -> None:
        return None

    def clip(self, request: VideoRequest, seed: int) -> None:
        return None


class CompiledPeer(_Networks):
    """torch.compile with its defaults."""

    name = "torch.compile"

    def __init__(self, source: Source) -> None:
        self._checkpoint = source.checkpoint()

    def calls(self, calls: Sequence[Call]) -> Run:
        modules: dict[str, Any] = {}
        prepared = []
        for call in calls:
            graph = GRAPHS[call.engine]
            if call.engine not in modules:
                modules[call.engine] = torch.compile(torch_module(self._checkpoint, graph), dynamic=False)
            names = graph.signature(self._checkpoint.config).inputs
            prepared.append((modules[call.engine], [torch.from_numpy(call.inputs[name]) for name in names]))

        def run() -> None:
            with torch.inference_mode():
                for module, tensors in prepared:
                    module(*tensors)

        return run


class StableVideoPeer(_Networks):
    """Does the video UNet's step and nothing else."""

    name = "diffusers SVD"

    def __init__(self, config: VideoUNetConfig) -> None:
        self._config = config

    def calls(self, calls: Sequence[Call]) -> Run | None:
        if [call.engine for call in calls] != ["video_unet"]:
            return None
        inputs = {name: torch.from_numpy(value) for name, value in calls[0].inputs.items()}
        sample = inputs["sample"]  # [B, T, C, h, w]
        unet = self._unet(frames=sample.shape[1]).eval()
        context = inputs["states"][:, 0, :1].contiguous()  # [B, 1, D]

        def run() -> None:
            with torch.inference_mode():
                unet(sample, inputs["timestep"], context, added_time_ids=inputs["time_ids"])

        return run

    def _unet(self, frames: int) -> Any:
        from diffusers import UNetSpatioTemporalConditionModel

        config = self._config
        attending = len(config.block_out_channels) - 1
        return UNetSpatioTemporalConditionModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * attending + ("DownBlockSpatioTemporal",),
            up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * attending,
            block_out_channels=config.block_out_channels,
            addition_time_embed_dim=config.time_id_dim,
            projection_class_embeddings_input_dim=3 * config.time_id_dim,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.cross_attention_dim,
            num_attention_heads=config.heads,
            num_frames=frames,
        )
