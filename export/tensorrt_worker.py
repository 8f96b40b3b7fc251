"""Build one TensorRT plan in a process of its own: `python -m export.tensorrt_worker < request.json`.

Contract: reads a `Request` from standard input and writes a `Report` to standard output, both JSON; exits 0 in either
case, so that any other end means the process was killed. Loads no torch, and of the ONNX file only what is in the file
itself: external weights are read by the library. The plan appears under its name when it is whole.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import onnx
from onnx import TensorProto, helper

from runtime.backends import tensorrt_library
from runtime.errors import EnvironmentProblem, UsageError, VideoLavitError
from runtime.files import published, writing
from runtime.memory import peak_rss

Shape = tuple[int, ...]
Spans = tuple[Shape, Shape, Shape]  # smallest, best and largest


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to build.

    Attributes:
        profiles: per profile and input, the smallest, best and largest shape.
        fixed: free dimensions that have one size, which TensorRT is told before it reads the graph.
        workspace: bytes, or None for the library's own limit.
        compute_capabilities: like "8.9"; empty for the library's default.
        without_weights: leave the weights out of the plan.
        tf32: let float32 products be computed in TF32.
        timing_cache: file that measurements of kernels are kept in; None keeps none.
    """

    backend: str
    model: str
    target: str
    profiles: tuple[dict[str, Spans], ...]
    fixed: dict[str, int]
    workspace: int | None
    compute_capabilities: tuple[str, ...]
    without_weights: bool
    tf32: bool
    timing_cache: str | None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What came of it: when the plan is not there, `problem` is the line of an error and `exit_code` its kind."""

    problem: str | None = None
    exit_code: int = 0
    layers: int = 0
    seconds: float = 0.0
    peak_rss: int = 0


def main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    # The library's native code writes where it likes; the report has the descriptor to itself.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        try:
            report = build(request)
        except VideoLavitError as error:
            report = Report(problem=str(error), exit_code=error.exit_code)
        answer.write(msgspec.json.encode(report))


def build(request: Request) -> Report:
    """Parse, build, write. Raises UsageError for what TensorRT does not take, and EnvironmentProblem."""
    started = time.perf_counter()
    trt, log = tensorrt_library.library(request.backend), tensorrt_library.log(request.backend)
    version = tensorrt_library.version(request.backend)
    builder = trt.Builder(log)
    # Types are as the graph says; the builder chooses none of its own.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    model = onnx.load(request.model, load_external_data=False)
    prepare(model, request.fixed)
    if not parser.parse(model.SerializeToString(), request.model):
        raise UsageError(f"{version}: {_parser_problem(parser)}; build it with --backend onnx")
    del model
    config = builder.create_builder_config()
    cache = _configure(trt, builder, config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = tensorrt_library.last_error(request.backend)
        raise UsageError(f"{version}: cannot build it: {reason}; build it with --backend onnx")
    _write(Path(request.target), plan)
    if request.timing_cache:
        _write(Path(request.timing_cache), cache.serialize())
    seconds = time.perf_counter() - started
    return Report(layers=network.num_layers, seconds=seconds, peak_rss=peak_rss())


def prepare(model: onnx.ModelProto, fixed: dict[str, int]) -> None:
    """Change a graph in place into what TensorRT takes.

    Dimensions with one size become numbers: a cache whose length is free is refused, and known sizes fold away most of
    the arithmetic on shapes. Attention in float32 has no kernel of its own and must be allowed to fall into parts.
    """
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]
    if fixed:
        del model.graph.value_info[:]
    wide = any(
        value.name.startswith("past_key") and value.type.tensor_type.elem_type == TensorProto.FLOAT
        for value in model.graph.input
    )
    for node in model.graph.node:
        if wide and node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))


def _configure(trt: Any, builder: Any, config: Any, request: Request) -> Any:
    """Fill the builder's configuration; returns the timing cache when one is asked for."""
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    if request.without_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.compute_capabilities:
        config.num_compute_capabilities = len(request.compute_capabilities)
        for i, capability in enumerate(request.compute_capabilities):
            member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
            if member is None:
                known = [name[2:-1] + "." + name[-1] for name in trt.ComputeCapability.__members__ if name[:2] == "SM"]
                raise EnvironmentProblem(
                    f"compute capability {capability}: {tensorrt_library.version(request.backend)} cannot build for it "
                    f"from here; choose from {', '.join(known)}, or name none"
                )
            config.set_compute_capability(member, i)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, ranges in shapes.items():
            profile.set_shape(name, *ranges)
        config.add_optimization_profile(profile)
    return _timing_cache(config, Path(request.timing_cache)) if request.timing_cache else None


def _timing_cache(config: Any, path: Path) -> Any:
    """The cache in a file, or an empty one when it is not there or does not fit this library and GPU; in use."""
    for content in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    raise EnvironmentProblem("TensorRT refused an empty timing cache")


def _parser_problem(parser: Any) -> str:
    """The parser's first error with its node."""
    error = parser.get_error(0)
    reason = " ".join(error.desc().split())
    return f"node {error.node_name() or error.node()} ({error.node_operator()}) is not taken: {reason}"


def _write(path: Path, content: Any) -> None:
    with published(path) as staging, writing(path):
        staging.write_bytes(content)


if __name__ == "__main__":
    main()
