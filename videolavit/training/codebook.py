"""Codebooks that are trained by moving averages, for both tokenizers.

Contract: inputs and rows have unit length, so the look-up of `VectorQuantizer` (nearest row to the unit-length input,
reference semantics §3) is the cosine look-up of the training recipe. Rows start from k-means over the first batch,
follow the running mean of the inputs that chose them, and are put on a current input when hardly any input chooses
them. No gradient reaches a row; the encoder gets its gradient straight through, and a commitment loss.

The rows are a buffer, not a parameter: they are saved and resumed with the module, are never sharded, and are equal in
all processes because statistics are summed over processes before they are used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from videolavit.models.quantizer import VectorQuantizer

KMEANS_ROUNDS = 10
KMEANS_INPUTS = 16  # per row and process, at most


class Quantised(NamedTuple):
    """What a code look-up gives."""

    vectors: Tensor  # [.., d] code rows; the gradient goes straight through to the input
    ids: Tensor  # [..] int64
    commitment: Tensor  # scalar: mean squared distance of the unit-length inputs to their rows


class Codebook(nn.Module):
    """Trains the rows of a `VectorQuantizer`.

    `forward` quantises and collects statistics, `update` (once per optimiser step) applies them. `table` holds the
    rows; publish it under the quantiser's parameter name.
    """

    table: Tensor  # [n, d] unit rows
    counts: Tensor  # [n] running mean of the inputs per step that chose a row
    sums: Tensor  # [n, d] running mean of the sum of those inputs
    started: Tensor  # [] bool

    def __init__(self, quantizer: VectorQuantizer, *, decay: float = 0.99, dead_share: float = 0.1) -> None:
        """
        Args:
            quantizer: gives the initial rows; it is frozen, for its parameter is not what is trained.
            decay: of the running means, per update.
            dead_share: a row is dead when fewer inputs choose it than this share of an even distribution.
        """
        super().__init__()
        quantizer.requires_grad_(False)
        rows = quantizer.embedding.weight.detach().float()
        self.decay = decay
        self.dead_share = dead_share
        self.register_buffer("table", F.normalize(rows, dim=-1))
        self.register_buffer("counts", torch.zeros(len(rows), device=rows.device))
        self.register_buffer("sums", torch.zeros_like(rows))
        self.register_buffer("started", torch.tensor(False, device=rows.device))
        self._inputs: list[Tensor] = []  # unit-length inputs since the last update, [n_i, d] each
        self._ids: list[Tensor] = []

    def forward(self, z: Tensor, generator: torch.Generator) -> Quantised:
        """Quantise `z` [.., d] of any length; in train mode at least one. `generator` draws the k-means start."""
        unit = F.normalize(z.float(), dim=-1)  # [.., d]
        inputs = unit.detach().flatten(0, -2)  # [m, d]
        if self.training and not self.started:
            self._start(inputs, generator)
        ids = nearest(unit.detach(), self.table)  # [..]
        rows = F.embedding(ids, self.table)  # [.., d]
        if self.training:
            self._inputs.append(inputs)
            self._ids.append(ids.flatten())
        commitment = (unit - rows).square().sum(-1).mean()
        return Quantised(unit + (rows - unit).detach(), ids, commitment)

    @torch.no_grad()
    def update(self, generator: torch.Generator, *, revive: bool = True) -> None:
        """Apply what `forward` collected since the last call; `generator` must be seeded alike in all processes.

        Args:
            generator: draws the inputs that dead rows are put on; on the CPU.
            revive: put dead rows on current inputs.
        """
        if not self._inputs:
            return
        inputs, ids = torch.cat(self._inputs), torch.cat(self._ids)
        self._inputs, self._ids = [], []
        counts = torch.bincount(ids, minlength=len(self.table)).to(self.counts.dtype)  # [n]
        sums = torch.zeros_like(self.sums).index_add_(0, ids, inputs)  # [n, d]
        _sum_over_processes(counts)
        _sum_over_processes(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        used = self.sums.norm(dim=-1) > 1e-6
        self.table[used] = F.normalize(self.sums[used], dim=-1)
        if revive:
            self._revive(inputs, generator)

    @property
    def perplexity(self) -> float:
        """Rows in use: the exponential of the entropy of the running counts."""
        share = self.counts / self.counts.sum().clamp_min(1e-12)
        return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))

    @torch.no_grad()
    def _start(self, inputs: Tensor, generator: torch.Generator) -> None:
        inputs = _gather(inputs, KMEANS_INPUTS * len(self.table))
        rows, sizes = spherical_kmeans(inputs, len(self.table), generator)
        if _distributed():  # the generators of processes differ
            dist.broadcast(rows, 0)
            dist.broadcast(sizes, 0)
        self.table.copy_(rows)
        self.counts.copy_(sizes)
        self.sums.copy_(rows * sizes[:, None])
        self.started.fill_(True)

    def _revive(self, inputs: Tensor, generator: torch.Generator) -> None:
        even = self.counts.mean()
        dead = (self.counts < self.dead_share * even).nonzero()[:, 0]  # alike in all processes
        if len(dead) == 0:
            return
        inputs = _gather(inputs, len(self.table))
        pick = torch.randint(len(inputs), (len(dead),), generator=generator).to(inputs.device)
        self.table[dead] = inputs[pick]
        # Credit, so that a row has time to be chosen before it is looked at again.
        self.counts[dead] = even
        self.sums[dead] = inputs[pick] * self.counts[dead, None]


def crowding(unit: Tensor, counted: Tensor) -> Tensor:
    """How far the unit-length vectors of each set are from an even spread over all directions: scalar, 0..1.

    As a penalty it keeps the tokens of one picture from all saying the same: an encoder whose inputs know of each other
    finds that easiest, and a picture then has no more codes to itself than one.

    Args:
        unit: [B, L, d], B sets.
        counted: [B, L] of 0 and 1: members of the sets, at least one each.
    """
    size = unit.shape[-1]
    members = unit * counted[..., None]  # [B, L, d]
    moments = members.mT @ members / counted.sum(1)[:, None, None]  # [B, d, d]
    return (moments - torch.eye(size, device=unit.device) / size).square().sum((1, 2)).mean()


def nearest(unit: Tensor, table: Tensor) -> Tensor:
    """Ids [..] of the rows of `table` [n, d] nearest to unit-length `unit` [.., d], as `VectorQuantizer` chooses."""
    return (table.square().sum(-1) - 2 * unit @ table.t()).argmin(-1)


def spherical_kmeans(
    points: Tensor, clusters: int, generator: torch.Generator, rounds: int = KMEANS_ROUNDS
) -> tuple[Tensor, Tensor]:
    """Centres [clusters, d] of unit length and their sizes [clusters] for unit-length `points` [m, d].

    Starts from random points (repeated when there are too few); an empty cluster keeps its centre.
    """
    order = torch.randperm(len(points), generator=generator, device=generator.device).to(points.device)
    centres = points[order.repeat(-(-clusters // len(points)))[:clusters]].clone()
    for _ in range(rounds):
        ids = nearest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, ids, points)
        filled = sums.norm(dim=-1) > 1e-6
        centres[filled] = F.normalize(sums[filled], dim=-1)
    sizes = torch.bincount(nearest(points, centres), minlength=clusters).to(points.dtype)
    return centres, sizes


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(tensor: Tensor) -> None:
    if _distributed():
        dist.all_reduce(tensor)


def _gather(inputs: Tensor, most: int) -> Tensor:
    """Inputs of all processes; with several, an equal part of each, as collectives want equal shapes."""
    if not _distributed():
        return inputs
    size = torch.tensor(len(inputs), device=inputs.device)
    dist.all_reduce(size, dist.ReduceOp.MIN)
    part = inputs[: min(int(size), most)].contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)
