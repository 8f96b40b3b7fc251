"""Training of the visual stages, and codebooks that follow averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from videolavit.checkpoints import Checkpoint, RandomWeights
from videolavit.config import PRESETS, KeyframeDecoderConfig, ModelConfig
from videolavit.inventory import inventory
from videolavit.models.components import COMPONENTS
from videolavit.models.quantizer import VectorQuantizer
from videolavit.shapes import COLOURS, KINDS, sample_scene
from videolavit.training.codebook import Codebook, crowding, spherical_kmeans
from videolavit.training.patches import Reader, labels
from videolavit.training.settings import DataSettings
from videolavit.training.stage import Stage, StageContext
from videolavit.training.stages.vision import VisionOptions, VisionStage, patch_content, soft_bins
from videolavit.training.stages.visual_tokenizer import (
    VisualTokenizerModule,
    VisualTokenizerOptions,
    VisualTokenizerStage,
    at_least_one,
    unlike_the_rest,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Codebook


def clustered(centres: torch.Tensor, each: int, noise: float = 0.02) -> torch.Tensor:
    points = centres.repeat_interleave(each, 0)
    return F.normalize(points + noise * torch.randn(points.shape, generator=generator(5)), dim=-1)


def test_kmeans_finds_clusters() -> None:
    centres = torch.eye(4)
    found, sizes = spherical_kmeans(clustered(centres, 50), 8, generator())
    assert (found @ centres.t()).amax(0).min() > 0.99  # every cluster has a centre on it
    assert sizes.sum() == 200 and found.norm(dim=-1).allclose(torch.ones(8))


def test_kmeans_of_fewer_points_than_clusters() -> None:
    points = torch.eye(3)
    found, sizes = spherical_kmeans(points, 7, generator())
    assert found.shape == (7, 3) and sizes.sum() == 3 and torch.isfinite(found).all()


def test_codebook_starts_from_the_first_batch_and_chooses_as_the_quantizer() -> None:
    quantizer = VectorQuantizer(6, 4)
    codebook = Codebook(quantizer)
    z = 3 * clustered(torch.eye(4), 10)
    quantised = codebook(z.reshape(2, 20, 4), generator())
    assert bool(codebook.started) and (codebook.table @ torch.eye(4)).amax(0).min() > 0.99
    quantizer.embedding.weight.data.copy_(codebook.table)
    rows, ids = quantizer.tokenize(z)
    assert torch.equal(quantised.ids.flatten(), ids) and torch.allclose(quantised.vectors.flatten(0, 1), rows)
    assert quantised.ids.shape == (2, 20)


def test_codebook_follows_the_plain_formula() -> None:
    torch.manual_seed(0)
    codebook = Codebook(VectorQuantizer(5, 3), decay=0.9, dead_share=0.0)
    codebook(torch.randn(40, 3), generator())
    codebook.update(generator())
    counts, sums = codebook.counts.clone(), codebook.sums.clone()
    table = codebook.table.clone()
    parts = [torch.randn(30, 3), torch.randn(10, 3)]  # two forward passes make one step
    for part in parts:
        codebook(part, generator())
    codebook.update(generator())
    unit = F.normalize(torch.cat(parts), dim=-1)
    for row in range(5):
        mine = unit[(unit @ table.t()).argmax(-1) == row]
        counts[row] = 0.9 * counts[row] + 0.1 * len(mine)
        sums[row] = 0.9 * sums[row] + 0.1 * mine.sum(0)
    assert torch.allclose(codebook.counts, counts) and torch.allclose(codebook.sums, sums, atol=1e-6)
    assert torch.allclose(codebook.table, F.normalize(sums, dim=-1), atol=1e-6)


def test_codebook_gradient_goes_straight_through() -> None:
    codebook = Codebook(VectorQuantizer(4, 3))
    unit = F.normalize(torch.randn(8, 3, generator=generator()), dim=-1).requires_grad_()
    weight = torch.randn(8, 3, generator=generator(1))
    vectors = codebook(unit, generator()).vectors
    (vectors * weight).sum().backward()
    along = (weight * unit).sum(-1, keepdim=True) * unit  # only what changes the direction arrives
    assert unit.grad is not None and torch.allclose(unit.grad, weight - along, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in codebook.parameters())


def test_commitment_is_the_squared_distance_to_the_code() -> None:
    codebook = Codebook(VectorQuantizer(4, 3))
    z = torch.randn(2, 5, 3, generator=generator())
    quantised = codebook(z, generator())
    distance = (F.normalize(z, dim=-1) - codebook.table[quantised.ids]).square().sum(-1).mean()
    assert torch.allclose(quantised.commitment, distance)


def test_dead_codes_are_put_on_inputs() -> None:
    torch.manual_seed(0)
    codebook = Codebook(VectorQuantizer(16, 4), decay=0.5, dead_share=0.1)
    codebook(clustered(torch.eye(4)[:1], 64), generator())  # k-means sees one cluster only
    codebook.update(generator())
    used = []
    for step in range(40):
        ids = codebook(clustered(torch.eye(4), 32, noise=0.3), generator(step)).ids
        codebook.update(generator(step))
        used.append(len(ids.unique()))
    assert (codebook.table @ torch.eye(4)).amax(0).min() > 0.8  # all clusters are served
    assert used[-1] > used[0] and codebook.perplexity > 10


def test_crowding_tells_a_cone_from_an_even_spread() -> None:
    cone = torch.tensor([1.0, 0, 0, 0]) + 0.05 * torch.randn(1, 200, 4, generator=generator())
    even = torch.randn(1, 200, 4, generator=generator())
    both = F.normalize(torch.cat([cone, even]), dim=-1)
    everyone = torch.ones(1, 200)
    assert crowding(both[:1], everyone) > 0.6 and crowding(both[1:], everyone) < 0.02
    assert crowding(both[:1].flip(0), everyone * (torch.arange(200) < 1)) == pytest.approx(0.75)  # one vector
    assert crowding(both, everyone.expand(2, -1)) == pytest.approx(
        (crowding(both[:1], everyone) + crowding(both[1:], everyone)).item() / 2, abs=1e-6
    )


def test_codebook_at_rest_does_not_change() -> None:
    codebook = Codebook(VectorQuantizer(4, 3)).eval()
    table = codebook.table.clone()
    codebook(torch.randn(8, 3), generator())
    codebook.update(generator())
    assert torch.equal(codebook.table, table) and not bool(codebook.started)


# Labels and the reader


def test_labels_say_what_is_drawn() -> None:
    scene = sample_scene(3, shapes=2)
    said = labels(scene, 5, 8)
    for number, shape in enumerate(scene.shapes):
        x, y = shape.centre_at(5)
        patch = int(y * 8) * 8 + int(x * 8)
        assert said["cover"][patch] > 0.2 and said["shape"][patch] == number
        assert COLOURS[said["colour"][patch]] == shape.colour and KINDS[said["kind"][patch]] == shape.kind
        assert said["centre"][patch].tolist() == pytest.approx([x, y])
        assert said["diameter"][patch].item() == pytest.approx(shape.diameter_at(5))
    assert (said["cover"] == 0).any()


def test_reader_reads_what_features_carry_and_nothing_else() -> None:
    many = [labels(sample_scene(seed), 0, 8) for seed in range(60)]
    batch = {name: torch.stack([said[name] for said in many]) for name in many[0]}
    features = torch.cat(
        [
            F.one_hot(batch["colour"], 8),
            F.one_hot(batch["kind"], 4),
            batch["centre"],
            batch["diameter"][..., None],
            (batch["cover"][..., None] > 0.5).float(),
        ],
        dim=-1,
    ).float()
    figures = Reader.fit(features, batch).judge(features, batch)
    assert figures["colour"] == figures["kind"] == figures["cover_iou"] == 1 and figures["shapes_right"] > 0.95
    blind = Reader.fit(features, batch).judge(torch.zeros_like(features), batch)
    assert blind["colour"] < 0.5 and blind["shapes_right"] < 0.1


def test_soft_bins_peak_at_the_value() -> None:
    bins = soft_bins(torch.tensor([0.1, 0.9]), 10)
    assert bins.sum(-1).allclose(torch.ones(2)) and bins.argmax(-1).tolist()[1] in (8, 9)
    assert (bins * (torch.arange(10) + 0.5) / 10).sum(-1)[0].item() == pytest.approx(0.1, abs=0.02)


def test_patch_content_is_in_raster_order() -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, 1, :16, 16:] = 1.0  # green in the second of four patches
    content = patch_content(pixels, 2)
    assert content.shape == (1, 4, 48) and content[0, 1].unflatten(0, (3, 16)).mean(-1).tolist() == [0, 1, 0]
    assert content[0, [0, 2, 3]].abs().max() == 0


# Stages


def tiny() -> ModelConfig:
    base = PRESETS["shapes"]
    eva = replace(base.visual_tokenizer.eva, image_size=64, width=32, layers=2, heads=2)
    return replace(
        base,
        visual_tokenizer=replace(base.visual_tokenizer, eva=eva, layers=1, heads=2, codes=32, code_dim=8),
        keyframe_decoder=KeyframeDecoderConfig(
            patches=16, code_dim=8, width=32, depth=1, heads=2, out_dim=32, projections=(8, 8), pooled_dim=8
        ),
    )


def context(**data: object) -> StageContext:
    config = tiny()
    checkpoint = Checkpoint(config, tokenizer=b"", weights=RandomWeights(config, 1), untrained=tuple(COMPONENTS))
    settings = DataSettings(**{"source": "shapes", **data})  # type: ignore[arg-type]
    return StageContext(checkpoint=checkpoint, data=settings, seed=0, device=torch.device("cpu"))


def vision(**data: object) -> Stage:
    torch.manual_seed(0)  # as the loop does
    return VisionStage(context(**data), VisionOptions())


def tokenizer(**options: object) -> Stage:
    torch.manual_seed(0)
    quick = {"fixed_share_steps": 5, "plain_steps": 5, "cooling_steps": 20, **options}
    return VisualTokenizerStage(context(), VisualTokenizerOptions(**quick))  # type: ignore[arg-type]


def optimiser(stage: Stage) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in stage.module.parameters() if p.requires_grad], lr=3e-3)


def batch_of(stage: Stage, first: int, size: int = 8) -> dict[str, torch.Tensor]:
    data = stage.dataset()
    return stage.collate([data[index] for index in range(first, first + size)])


def steps(stage: Stage, optimise: torch.optim.Optimizer, span: range, fixed: bool = False) -> list[dict[str, float]]:
    rows = []
    stage.module.train()
    for step in span:
        draw = generator(step)
        with torch.no_grad():
            batch = stage.prepare(batch_of(stage, 0 if fixed else 8 * step), draw)
        said = stage.module(batch, draw, step)
        optimise.zero_grad()
        said["loss"].backward()
        optimise.step()
        stage.after_step(step)
        rows.append({name: value.detach().item() for name, value in said.items()})
    return rows


@pytest.mark.parametrize(("make", "figure"), [(vision, "loss"), (vision, "pixels"), (tokenizer, "distance")])
def test_a_few_steps_lower_the_loss(make: Callable[[], Stage], figure: str) -> None:
    stage = make()
    rows = [row[figure] for row in steps(stage, optimiser(stage), range(25))]
    assert np.mean(rows[-5:]) < 0.9 * np.mean(rows[:5])


@pytest.mark.parametrize(("make", "figure", "bound"), [(vision, "colour", 0.3), (tokenizer, "distance", 0.25)])
def test_one_batch_is_learnt_by_heart(make: Callable[[], Stage], figure: str, bound: float) -> None:
    stage = make()
    rows = steps(stage, optimiser(stage), range(70), fixed=True)
    assert rows[-1][figure] < bound < rows[0][figure]


@pytest.mark.parametrize("make", [vision, tokenizer])
def test_resuming_continues_to_the_bit(make: Callable[[], Stage]) -> None:
    whole = make()
    expected = steps(whole, optimiser(whole), range(10))
    first = make()
    optimise = optimiser(first)
    rows = steps(first, optimise, range(6))
    saved, state = copy.deepcopy(first.module.state_dict()), copy.deepcopy(optimise.state_dict())
    second = make()
    second.module.load_state_dict(saved)
    optimise = optimiser(second)
    optimise.load_state_dict(state)
    rows += steps(second, optimise, range(6, 10))
    assert rows == expected
    for name, value in whole.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value), name


def test_vision_changes_the_eye_only() -> None:
    stage = vision()
    steps(stage, optimiser(stage), range(2))
    state, before = stage.components()["visual_tokenizer"], stage.context.checkpoint.component("visual_tokenizer")
    assert {name: tuple(value.shape) for name, value in state.items()} == inventory(tiny(), "visual_tokenizer")
    for name, value in before.state_dict().items():
        if not name.startswith("encoder."):
            assert torch.equal(state[name], value), name
    assert not torch.equal(state["encoder.cls_token"], before.state_dict()["encoder.cls_token"])


def test_visual_tokenizer_publishes_what_it_trained_and_keeps_the_rest() -> None:
    stage = tokenizer()
    steps(stage, optimiser(stage), range(8))
    states = stage.components()
    assert set(states) == set(stage.trains)
    kept = ("encoder.", "vit_proj.", "unet_proj_1.", "unet_proj_2.", "unet_attnpool.")
    for component, state in states.items():
        before = stage.context.checkpoint.component(component).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == inventory(tiny(), component)
        for name, value in state.items():
            if name.startswith(kept):
                assert torch.equal(value, before[name]), name
            elif not name.endswith("key.bias"):  # a bias of all keys alike cancels in the softmax
                assert not torch.equal(value, before[name]), name


def test_published_tokenizer_gives_the_codes_that_training_saw() -> None:
    from videolavit.models.visual_tokenizer import DynamicVisualTokenizer

    stage = tokenizer()
    steps(stage, optimiser(stage), range(12))
    published = DynamicVisualTokenizer(tiny().visual_tokenizer)
    published.load_state_dict(stage.components()["visual_tokenizer"])
    with torch.no_grad():
        features = stage.prepare(batch_of(stage, 500, 3), generator())["features"]
        keep = (torch.rand(3, 16, generator=generator()) < 0.5).float()
        keep[:, 0] = 1.0
        module = stage.module.eval()
        assert isinstance(module, VisualTokenizerModule)
        ids = module.rebuild(features, keep, generator())[1].ids
        codes = published.codes(published.merge(features, keep))
    assert torch.equal(codes[keep > 0.5], ids)


def test_the_share_of_kept_patches_is_pulled_to_rho() -> None:
    for rho in (0.25, 0.75):
        stage = tokenizer(rho=rho, rate=20.0, doubt=0.0, fixed_share_steps=0)
        rows = steps(stage, optimiser(stage), range(40), fixed=True)
        assert np.mean([row["kept"] for row in rows[-10:]]) == pytest.approx(rho, abs=0.2)


def test_a_fixed_share_is_kept_at_first() -> None:
    stage = tokenizer(rho=0.25, fixed_share_steps=3)
    rows = steps(stage, optimiser(stage), range(3))
    assert all(row["kept"] == 0.25 and row["kept_spread"] == 0 for row in rows)


def test_patches_unlike_the_rest_are_those_with_a_shape_on_them() -> None:
    pictures = torch.full((2, 32, 32, 3), 60, dtype=torch.uint8)
    pictures[0, 8:16, 16:24] = torch.tensor([250, 20, 20], dtype=torch.uint8)  # patch (1, 2) of a 4 x 4 grid
    pictures[1, :, ::2] = 90  # stripes alone: every patch is like every other
    score = unlike_the_rest(pictures, 8)
    assert score.shape == (2, 16)
    assert score[0].argmax() == 6 and score[0, 6] > 0.3
    assert score[0, torch.arange(16) != 6].max() < 1e-3 and score[1].max() < 1e-3


def test_a_guide_teaches_which_patches_to_keep() -> None:
    stage = tokenizer(guide=1.0, fixed_share_steps=0, doubt=0.0)
    rows = steps(stage, optimiser(stage), range(60), fixed=True)
    assert np.mean([row["guide"] for row in rows[-5:]]) < 0.5 * np.mean([row["guide"] for row in rows[:5]])
    batch = stage.prepare(batch_of(stage, 0), generator())
    stage.module.eval()
    chances = stage.module(batch, generator(), 0)["chances"]
    wanted = batch["unlike"] > stage.options.contrast  # type: ignore[attr-defined]
    assert chances[wanted].mean() > chances[~wanted].mean() + 0.2


def test_decisions_are_exact_whatever_the_gradient() -> None:
    stage = tokenizer(fixed_share_steps=0)
    module = stage.module
    assert isinstance(module, VisualTokenizerModule)
    logits = torch.randn(64, 100, 2, generator=generator()).log_softmax(-1).requires_grad_()
    keep = module._decide(logits, generator(), 1)
    assert ((keep == 0) | (keep == 1)).all() and keep.requires_grad


def test_a_picture_keeps_at_least_one_patch() -> None:
    margin = torch.tensor([[-3.0, -1.0, -2.0], [1.0, -1.0, 1.0]])
    assert at_least_one((margin > 0).float(), margin).tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("make", [vision, tokenizer])
def test_validation_figures(make: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vision", "visual_tokenizer"):
        for name in ("FITTED", "HELD_OUT"):
            monkeypatch.setattr(f"videolavit.training.stages.{module}.{name}", 24)
    stage = make()
    stage.module.eval()
    with torch.no_grad():
        figures = stage.validate(generator())
        assert figures and figures == stage.validate(generator())
    assert {"colour", "kind", "cover_iou", "shapes_right"} <= figures.keys()
    assert all(np.isfinite(value) for value in figures.values())


def test_other_pictures_are_learnt_without_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        colour = rng.integers(0, 255, 3)
        Image.fromarray(np.full((40, 60, 3), colour, np.uint8)).save(tmp_path / f"{number}.png")
    stage = vision(source="folder", path=str(tmp_path))
    rows = steps(stage, optimiser(stage), range(25), fixed=True)
    assert rows[-1]["pixels"] < 0.6 * rows[0]["pixels"]
    assert stage.module.eval() and stage.validate(generator()) == {}


def one_process(rank: int, place: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    points = F.normalize(torch.randn(2, 3, 20, 4, generator=generator(1)), dim=-1)  # [process, step, m, d]
    torch.manual_seed(0)
    codebook = Codebook(VectorQuantizer(8, 4), decay=0.5, dead_share=0.2)
    for step in range(3):
        codebook(points[rank, step], generator(10 * rank + step))
        codebook.update(generator(step))
    torch.save(codebook.state_dict(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_one_codebook(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Both processes' 20 inputs count, at the start and in every step; revival adds credit.
    assert first["counts"].sum() >= 40 - 1e-3
