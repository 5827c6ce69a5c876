"""Other implementations of the operator, each prepared with constant weights for one spec and number of threads.

Each is set up as its documentation advises for low latency on a CPU: weights known beforehand, input and output in
place, all of a library's optimizations on, as many threads as our kernel gets. What is not installed, or refuses a
spec, is said in words.
"""

import importlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from convt_tvm.reference import Inputs
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["DISTRIBUTIONS", "GPU_PEERS", "PEERS", "Contender", "Refusal", "prepare"]

DISTRIBUTIONS = ("torch", "onnx", "onnxruntime", "openvino")
"""Packages whose versions belong beside the times."""

COMPILE_LIMIT_SECS = 120
_OPSET, _IR_VERSION = 17, 8


Contender: TypeAlias = Callable[[], torch.Tensor]
"""Something to time: each call computes the output, NCHW in whatever memory format, and may overwrite the last one."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no contender: its package is not installed, or it does not take the spec."""

    status: Literal["unavailable", "rejected"]
    reason: str


Prepare: TypeAlias = Callable[[ConvTranspose2dSpec, Inputs, int], Contender]


def prepare(name: str, spec: ConvTranspose2dSpec, inputs: Inputs, threads: int) -> Contender | Refusal:
    """The peer `name` of `PEERS`, ready to compute `spec` of these inputs; a refusal instead of any exception.

    torch's number of threads is process-wide and is left as it is: the caller sets it. To be called, and the contender
    to be run, under `torch.inference_mode`.
    """
    make = PEERS[name]
    try:
        contender = make(spec, inputs, threads)
        contender()
    except ImportError as error:
        return Refusal("unavailable", f"{_one_line(error)}; pip install 'convt-tvm[peers]'")
    except Exception as error:  # recorded as this peer's status: what a library refuses, and how, is its own affair
        return Refusal("rejected", f"{type(error).__name__}: {_one_line(error)}")
    return contender


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _torch_like(
    spec: ConvTranspose2dSpec, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Contender:
    def run() -> torch.Tensor:
        return torch.nn.functional.conv_transpose2d(
            input, weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation
        )

    return run


def _torch(spec: ConvTranspose2dSpec, inputs: Inputs, threads: int) -> Contender:
    """PyTorch eager, tensors as they are."""
    return _torch_like(spec, *inputs)


def _torch_channels_last(spec: ConvTranspose2dSpec, inputs: Inputs, threads: int) -> Contender:
    """PyTorch eager, input and weight in channels_last; so is the output."""
    input, weight, bias = inputs
    return _torch_like(
        spec,
        input.contiguous(memory_format=torch.channels_last),
        weight.contiguous(memory_format=torch.channels_last),
        bias,
    )


@contextmanager
def _time_limit(secs: float, what: str) -> Iterator[None]:
    """Raise TimeoutError if the body takes longer; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"{what} took more than {secs:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, secs)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _torch_compile(spec: ConvTranspose2dSpec, inputs: Inputs, threads: int) -> Contender:
    """torch.compile with frozen weights, which lets the inductor pack them; on a GPU with its autotuning."""
    config: Any = importlib.import_module("torch._inductor.config")
    input, weight, bias = inputs
    layer = torch.nn.ConvTranspose2d(
        spec.ci,
        spec.co,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.output_padding,
        spec.groups,
        spec.bias,
        spec.dilation,
        device=weight.device,
        dtype=weight.dtype,
    ).eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    # Otherwise the ninth layer is refused: what was compiled before counts against a limit.
    torch.compiler.reset()
    # Whoever times on a GPU captures graphs; one graph cannot hold another.
    mode: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if weight.is_cuda else {}
    compiled: Any = torch.compile(layer, fullgraph=True, dynamic=False, **mode)
    # One compile thread is this process: a pool of workers would still be busy when times count.
    with (
        torch.inference_mode(),
        config.patch(freezing=True, compile_threads=1),
        _time_limit(COMPILE_LIMIT_SECS, "torch.compile"),
    ):
        compiled(input)

    def run() -> torch.Tensor:
        output: torch.Tensor = compiled(input)
        return output

    return run


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _onnx_model(spec: ConvTranspose2dSpec, inputs: Inputs) -> bytes:
    """One ConvTranspose node with constant weights, serialized."""
    import onnx

    _, weight, bias = inputs
    element = getattr(onnx.TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(spec.dtype, spec.dtype.upper()))

    def constant(name: str, tensor: torch.Tensor) -> Any:
        return onnx.helper.make_tensor(name, element, tuple(tensor.shape), _raw(tensor), raw=True)

    constants = [constant("weight", weight)] + ([] if bias is None else [constant("bias", bias)])
    node = onnx.helper.make_node(
        "ConvTranspose",
        ["input", *(tensor.name for tensor in constants)],
        ["output"],
        kernel_shape=spec.kernel_size,
        strides=spec.stride,
        pads=[*spec.padding, *spec.padding],
        output_padding=spec.output_padding,
        dilations=spec.dilation,
        group=spec.groups,
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [value("input", element, spec.input_shape)],
        [value("output", element, spec.output_shape)],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)])
    model.ir_version = _IR_VERSION
    serialized: bytes = model.SerializeToString()
    return serialized


def _onnxruntime(spec: ConvTranspose2dSpec, inputs: Inputs, threads: int) -> Contender:
    """ONNX Runtime's CPU provider, input and output bound beforehand.

    Its workers spin as they do by default, within a call and for some 50 ms after the last; whoever times others after
    it has to wait that long.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_onnx_model(spec, inputs), options, providers=["CPUExecutionProvider"])
    if spec.dtype == "bfloat16":
        raise TypeError("numpy, through which tensors are bound, has no bfloat16")
    # Kept by `run`: the binding holds their addresses only.
    input, output = kept = inputs[0].contiguous(), torch.full(spec.output_shape, math.nan, dtype=inputs[0].dtype)
    binding = session.io_binding()
    binding.bind_input("input", "cpu", 0, np.dtype(spec.dtype).type, spec.input_shape, input.data_ptr())
    binding.bind_output("output", "cpu", 0, np.dtype(spec.dtype).type, spec.output_shape, output.data_ptr())

    def run() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return kept[1]

    return run


def _openvino(spec: ConvTranspose2dSpec, inputs: Inputs, threads: int) -> Contender:
    """OpenVINO's CPU plugin, one stream, precision as in the spec, input and output shared."""
    import openvino

    core = openvino.Core()
    element = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}[spec.dtype]
    compiled = core.compile_model(
        core.read_model(_onnx_model(spec, inputs)),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32" if spec.dtype == "float64" else element,
            # Pinned workers, and with them the calling thread, would stay where the next contender does not want them.
            "ENABLE_CPU_PINNING": False,
        },
    )
    request = compiled.create_infer_request()
    input, output = kept = inputs[0].contiguous(), torch.full(spec.output_shape, math.nan, dtype=inputs[0].dtype)

    def share(tensor: torch.Tensor) -> Any:
        if spec.dtype == "bfloat16":
            type_ = openvino.Type.bf16
            return openvino.Tensor(tensor.view(torch.uint16).numpy(), tuple(tensor.shape), type_)
        return openvino.Tensor(tensor.numpy(), shared_memory=True)

    request.set_input_tensor(share(input))
    request.set_output_tensor(share(output))

    def run() -> torch.Tensor:
        request.infer()
        return kept[1]

    return run


PEERS: dict[str, Prepare] = {
    "torch": _torch,
    "torch_channels_last": _torch_channels_last,
    "torch_compile": _torch_compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""Every peer by name."""

GPU_PEERS = ("torch", "torch_channels_last", "torch_compile")
"""Those that compute on a GPU, with cuDNN, where their inputs are there."""
