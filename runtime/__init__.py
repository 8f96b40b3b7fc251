"""The runtime: everything that goes onto the device, and nothing that needs torch.

Contract: importing this package, or any module in it, imports no torch, transformers or diffusers, and no
inference library until an engine is loaded. `Pipeline` is the door for Python users.
"""

__all__ = ["Pipeline"]


def __getattr__(name: str) -> object:
    if name == "Pipeline":  # lazy: `import runtime` stays instant
        from runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
