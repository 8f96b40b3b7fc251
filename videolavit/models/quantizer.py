"""Vector quantiser of both tokenizers.

Contract: codes are chosen by squared Euclidean distance between the unit-length input and the *raw* codebook rows,
in float32 whatever the input's type, because near ties flip in half precision (reference semantics §3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VectorQuantizer(nn.Module):
    """A codebook [codes, dim] under the parameter name `embedding.weight`."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        # Inputs have unit length; default initial rows would be longer than any of them and mostly stay unused.
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def tokenize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [.., d] -> (code rows [N, d], ids [N] int64), N being the product of the leading sizes.

        The rows carry no gradient to `z`: the training loss adds its own straight-through term.
        """
        unit = F.normalize(z.float(), dim=-1, eps=1e-12).flatten(0, -2)  # [N, d]
        codes = self.embedding.weight.float()  # [n, d]
        squares = unit.square().sum(-1, keepdim=True) + codes.square().sum(-1)  # [N, n]
        ids = (squares - 2 * unit @ codes.t()).argmin(-1)  # [N]
        return self.embedding(ids), ids

    def lookup(self, ids: Tensor) -> Tensor:
        """ids [..] int64 -> code rows [.., d]."""
        return self.embedding(ids)
