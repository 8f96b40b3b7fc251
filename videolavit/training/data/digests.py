"""Digests of single components, so that data can be told from data that other weights made."""

from __future__ import annotations

import hashlib

from videolavit.checkpoints import Checkpoint


def component_digest(checkpoint: Checkpoint, component: str) -> str:
    """SHA-256 over names, shapes and float32 values of a component's weights; the same however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in checkpoint.weights.tensors(component):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
