"""onnxruntime-genai: its own builder's graph of a language model, loaded to compute on the CPU.

Contract: integer weights are in blocks of 32, of the vocabulary's matrix too. Threads are pinned in the configuration
that the builder writes, or the library takes more than it is told to.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

PACKAGE, MODULE = "onnxruntime-genai", "onnxruntime_genai"
PRECISIONS = ("fp32", "int8", "int4")


def build(source: Path, folder: Path, precision: str) -> None:
    """The Llama in `source` as the builder writes it in `precision`, into `folder`; nothing where it is there."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    if (folder / "done").is_file():
        return
    options = ["int4_block_size=32", "int4_accuracy_level=4"] if precision == "int4" else []
    where = ("", str(source), str(folder), precision, "cpu", str(folder / "cache"))
    talk = io.StringIO()  # the builder's; what goes wrong is raised
    with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
        create_model(*where, **parse_extra_options(*where, options))
    (folder / "done").touch()


def load(folder: Path, threads: int) -> Any:
    """The library's model of what `build` wrote. Raises ModuleNotFoundError without the library."""
    import onnxruntime_genai

    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))
    return onnxruntime_genai.Model(str(folder))


def generator(model: Any, capacity: int) -> Any:
    """A greedy generator over an empty cache of `capacity` positions that writes until they are full."""
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=capacity, min_length=capacity)
    return onnxruntime_genai.Generator(model, parameters)
