"""Video UNet against the reference's numbers, at two sizes."""

from __future__ import annotations

import pytest
import torch
from golden import Golden, assert_close, load

from videolavit.config import PRESETS, VideoUNetConfig
from videolavit.models.components import build
from videolavit.models.video_unet import VideoUNet
from videolavit.models.video_unet_blocks import motion_cells

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load("g_video_unet")


@pytest.fixture(scope="module")
def unet(golden: Golden) -> VideoUNet:
    c = golden.meta["config"]
    config = VideoUNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        block_out_channels=tuple(c["block_out_channels"]),
        heads=tuple(c["num_attention_heads"]),
        layers_per_block=c["layers_per_block"],
        cross_attention_dim=c["cross_attention_dim"],
        time_id_dim=c["addition_time_embed_dim"],
    )
    unet = VideoUNet(config).eval().requires_grad_(False)
    unet.load_state_dict({key: torch.from_numpy(value) for key, value in golden.weights.items()}, strict=True)
    return unet


def _arguments(golden: Golden, case: str) -> tuple[torch.Tensor, ...]:
    names = (f"{case}/sample", f"{case}/timestep", "encoder_hidden_states", "added_time_ids")
    return tuple(torch.from_numpy(golden.inputs[name]) for name in names)


@pytest.mark.parametrize("case", ["sq", "rect"])
def test_video_unet_matches_reference(golden: Golden, unet: VideoUNet, case: str) -> None:
    taps = {
        "tap_down0_res0_frame0": unet.get_submodule("down_blocks.0.resnets.0"),
        "tap_down0_attn0_frame0": unet.get_submodule("down_blocks.0.attentions.0"),
        "tap_mid_frame0": unet.get_submodule("mid_block"),
    }
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out[:1]}))
        for name, module in taps.items()
    ]
    try:
        out = unet(*_arguments(golden, case))
    finally:
        for hook in hooks:
            hook.remove()
    for name, tap in seen.items():
        assert_close(tap, golden.outputs[f"{case}/{name}"], TOLERANCE)
    assert seen.keys() == taps.keys()
    assert_close(out, golden.outputs[f"{case}/out"], TOLERANCE)


def test_videos_of_a_batch_do_not_mix(golden: Golden, unet: VideoUNet) -> None:
    sample, timestep, states, time_ids = _arguments(golden, "sq")
    together = unet(sample, timestep.reshape(1), states, time_ids)
    alone = unet(sample[1:], timestep, states[1:], time_ids[1:])
    assert_close(together[1:], alone, TOLERANCE)


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (40, 72), (20, 36), (5, 9), (12, 20)])
def test_motion_cells_are_a_nearest_resize(size: tuple[int, int]) -> None:
    grid = torch.arange(256.0).reshape(1, 1, 16, 16)
    factors = (size[0] / 16, size[1] / 16)
    expected = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="nearest").flatten()
    assert motion_cells(*size, torch.device("cpu")).tolist() == expected.long().tolist()


def test_gradients_reach_every_parameter() -> None:
    config = PRESETS["tiny"].video_unet
    unet = VideoUNet(config)
    sample, states = torch.randn(1, 2, 10, 8, 8), torch.randn(1, 2, 256, config.cross_attention_dim)
    unet(sample, torch.ones(1), states, torch.ones(1, 3)).square().sum().backward()
    without = [name for name, parameter in unet.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize(("preset", "groups"), [("shapes", 8), ("video-lavit-7b", 32)])
@pytest.mark.parametrize("component", ["keyframe_unet", "keyframe_vae", "video_unet", "video_vae"])
def test_group_norms_have_the_configured_groups(preset: str, groups: int, component: str) -> None:
    with torch.device("meta"):
        module = build(PRESETS[preset], component)
    norms = [part for part in module.modules() if isinstance(part, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}
    assert torch.nn.GroupNorm(4, 8).num_groups == 4, "what the library's class was given is taken back"
