import importlib
import sys
import time

import pytest
import torch

from convt_tvm import peers
from convt_tvm.check import torch_eager
from convt_tvm.peers import PEERS, Refusal, prepare
from convt_tvm.reference import error_bound, normal_inputs, reference
from convt_tvm.spec import ConvTranspose2dSpec

BASE = {"n": 2, "ci": 4, "ih": 5, "iw": 3, "co": 6, "kernel_size": (3, 2), "stride": 2, "padding": (1, 0), "groups": 2}
SPECS = [
    ConvTranspose2dSpec(**BASE),
    ConvTranspose2dSpec(**BASE, bias=False, output_padding=1),
    ConvTranspose2dSpec(**BASE, dilation=(2, 3), output_padding=(0, 2)),
]
QUICK = ["torch", "torch_channels_last", "onnxruntime", "openvino"]


def require(name):
    if name in ("onnxruntime", "openvino"):
        pytest.importorskip("onnx")
        pytest.importorskip(name)


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_answers_are_right_or_refused_in_words(name, spec):
    require(name)
    inputs = normal_inputs(spec, 1)
    contender = prepare(name, spec, inputs, 1)
    if isinstance(contender, Refusal):
        # Both take ONNX's rule, output_padding below the stride.
        assert max(spec.output_padding) >= 2 and name in ("onnxruntime", "openvino")
        assert contender.status == "rejected" and contender.reason
        return
    for _ in range(2):
        output = contender()
        assert tuple(output.shape) == spec.output_shape and output.dtype == torch.float32
        assert bool(((output.double() - reference(spec, *inputs)).abs() <= error_bound(spec, *inputs)).all())


def test_channels_last_is_what_it_says():
    output = prepare("torch_channels_last", SPECS[0], normal_inputs(SPECS[0], 0), 1)()
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_never_crash(name, dtype):
    require(name)
    spec = ConvTranspose2dSpec(n=1, ci=4, ih=5, iw=3, co=2, kernel_size=2, stride=2, dtype=dtype)
    inputs = normal_inputs(spec, 0)
    contender = prepare(name, spec, inputs, 1)
    if isinstance(contender, Refusal):
        assert contender.status == "rejected" and contender.reason
    else:
        assert torch.allclose(contender().double(), reference(spec, *inputs), atol=0.05)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_peer_that_is_not_installed_is_unavailable(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    refusal = prepare(name, SPECS[0], normal_inputs(SPECS[0], 0), 1)
    assert refusal.status == "unavailable"
    assert refusal.reason.endswith("pip install 'convt-tvm[peers]'")


def test_a_refusal_is_one_short_line(monkeypatch):
    def refuse(spec, inputs, threads):
        raise ValueError("no\n such " + 1000 * "x")

    monkeypatch.setitem(PEERS, "torch", refuse)
    refusal = prepare("torch", SPECS[0], normal_inputs(SPECS[0], 0), 1)
    assert refusal == Refusal("rejected", ("ValueError: no such " + 1000 * "x")[: len("ValueError: ") + 400])


def test_a_peer_that_fails_when_it_runs_is_rejected(monkeypatch):
    def prepare_broken(spec, inputs, threads):
        def run():
            raise RuntimeError("output_padding too large")

        return run

    monkeypatch.setitem(PEERS, "torch", prepare_broken)
    refusal = prepare("torch", SPECS[0], normal_inputs(SPECS[0], 0), 1)
    assert refusal == Refusal("rejected", "RuntimeError: output_padding too large")


def test_torch_compile_gets_a_frozen_layer_with_our_weights(monkeypatch):
    """The inductor itself takes many seconds; what it is given is the layer, under freezing."""
    config = importlib.import_module("torch._inductor.config")
    seen = []

    def compile(layer, **options):
        seen.append(options)

        def run(input):
            seen.append(config.freezing)
            return layer(input)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    for spec in SPECS[:2]:
        seen.clear()
        inputs = normal_inputs(spec, 3)
        output = prepare("torch_compile", spec, inputs, 1)()
        assert torch.equal(output, torch_eager(spec)(*inputs))
        assert seen == [{"fullgraph": True, "dynamic": False}, True, False, False]


def test_torch_compile_is_given_up_after_its_limit(monkeypatch):
    monkeypatch.setattr(peers, "COMPILE_LIMIT_SECS", 0.05)
    monkeypatch.setattr(torch, "compile", lambda layer, **options: lambda input: time.sleep(10))
    start = time.perf_counter()
    refusal = prepare("torch_compile", SPECS[0], normal_inputs(SPECS[0], 0), 1)
    assert refusal == Refusal("rejected", "TimeoutError: torch.compile took more than 0.05 s")
    assert time.perf_counter() - start < 5


@pytest.mark.slow
def test_torch_compile_for_real(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = normal_inputs(SPECS[0], 1)
    output = prepare("torch_compile", SPECS[0], inputs, 1)()
    assert torch.allclose(output, torch_eager(SPECS[0])(*inputs), atol=1e-5)
