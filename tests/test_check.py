import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from convt_tvm import check as module
from convt_tvm.check import check, compare, torch_eager
from convt_tvm.errors import BuildError, TargetError
from convt_tvm.reference import reference
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

SPEC = ConvTranspose2dSpec(
    n=2, ci=16, ih=5, iw=6, co=8, kernel_size=(4, 3), stride=2, padding=1, output_padding=(0, 1), groups=2
)
SQUARE = ConvTranspose2dSpec(n=1, ci=64, ih=5, iw=5, co=8, kernel_size=3, stride=2, padding=1)


def right(spec):
    """A kernel as it should be: sums in float64, one rounding."""
    return lambda *inputs: reference(spec, *inputs).to(inputs[0].dtype)


def with_dtype(spec, dtype):
    return ConvTranspose2dSpec(**{**spec.to_json(), "dtype": dtype})


def changed(spec, change):
    """The right kernel with its answer changed afterwards."""

    def run(*inputs):
        output = right(spec)(*inputs)
        change(output)
        return output

    return run


def off_by_one_in_one_tap(spec):
    """The tap in the upper left corner goes one column to the right."""

    def run(input, weight, bias):
        corner = torch.zeros_like(weight)
        corner[:, :, 0, 0] = weight[:, :, 0, 0]
        output = reference(spec, input, weight - corner, bias)
        moved = reference(spec, input, corner, None)
        return (output + moved.roll(1, dims=3)).to(input.dtype)

    return run


def swapped_axes(spec):
    return lambda input, weight, bias: right(spec)(input.transpose(2, 3).contiguous(), weight, bias)


def swapped_taps(spec):
    return lambda input, weight, bias: right(spec)(input, weight.transpose(2, 3), bias)


def missing_bias(spec):
    return lambda input, weight, bias: right(spec)(input, weight, None)


def wrong_group(spec):
    return lambda input, weight, bias: right(spec)(input.roll(spec.ci // spec.groups, dims=1), weight, bias)


def narrow_sums(dtype):
    """Taps and channels are added one after the other in a narrow type."""

    def make(spec):
        def run(input, weight, bias):
            total = torch.zeros(spec.output_shape, dtype=dtype) if bias is None else bias.to(dtype)[None, :, None, None]
            for channel in range(spec.ci):
                one = torch.zeros_like(weight)
                one[channel] = weight[channel]
                total = total + reference(spec, input, one, None).to(dtype)
            return total.to(input.dtype)

        return run

    return make


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("spec", [SPEC, SQUARE], ids=["grouped", "square"])
def test_a_right_operator_passes(spec, dtype):
    spec = with_dtype(spec, dtype)
    found = compare(spec, right(spec))
    assert found.exact
    assert found.reason == ""
    assert 0 <= found.error_over_bound < 1
    assert found.max_error <= found.max_error_torch


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_itself_passes(dtype):
    spec = with_dtype(SPEC, dtype)
    found = compare(spec, torch_eager(spec))
    assert (found.exact, found.reason) == (True, "")
    assert found.max_error == found.max_error_torch


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("mistake", [off_by_one_in_one_tap, swapped_axes, swapped_taps, missing_bias])
def test_a_wrong_operator_is_rejected_by_its_integers(mistake, dtype):
    spec = with_dtype(SQUARE, dtype)
    found = compare(spec, mistake(spec))
    assert not found.exact
    assert found.error_over_bound > 10
    assert found.reason.startswith("integer inputs: ")
    assert "outputs are wrong" in found.reason


def test_the_wrong_group_is_rejected():
    assert not compare(SPEC, wrong_group(SPEC)).exact


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        ("float32", torch.float16),
        ("float32", torch.bfloat16),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float64", torch.float32),
    ],
)
@pytest.mark.parametrize("spec", [SPEC, SQUARE], ids=["grouped", "square"])
def test_sums_in_too_narrow_a_type_are_rejected_by_the_bound(spec, dtype, sums):
    spec = with_dtype(spec, dtype)
    found = compare(spec, narrow_sums(sums)(spec))
    assert found.error_over_bound > 1
    assert "outputs are wrong" in found.reason
    if found.exact:
        assert found.reason.startswith("normally distributed inputs: ")
        assert found.reason.endswith(f"beyond the error bound of {dtype}")


def test_sums_in_float32_are_accepted_for_float16():
    spec = with_dtype(SQUARE, "float16")
    assert compare(spec, narrow_sums(torch.float32)(spec)).reason == ""


def test_a_single_wrong_output_is_named():
    def change(output):
        output[1, 3, 4, 2] += 1

    found = compare(SPEC, changed(SPEC, change))
    assert not found.exact
    assert "integer inputs: 1 of 1920 outputs are wrong; at (1, 3, 4, 2) it is " in found.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_was_not_written_is_rejected(value):
    def change(output):
        output[0, 0, 0, 0] = value

    found = compare(SPEC, changed(SPEC, change))
    assert (found.exact, found.max_error, found.error_over_bound) == (False, math.inf, math.inf)
    assert f"at (0, 0, 0, 0) it is {value} instead of" in found.reason


def test_a_nan_that_only_real_numbers_bring_is_rejected():
    def run(*inputs):
        output = right(SPEC)(*inputs)
        if not torch.equal(inputs[0], inputs[0].round()):
            output[0, 1, 2, 3] = math.nan
        return output

    found = compare(SPEC, run)
    assert found.exact
    assert found.error_over_bound == math.inf
    assert "normally distributed inputs: 1 of 1920 outputs are wrong; at (0, 1, 2, 3) it is nan" in found.reason


def test_a_position_without_taps_has_to_be_the_bias_exactly():
    spec = ConvTranspose2dSpec(n=1, ci=2, ih=2, iw=2, co=1, kernel_size=1, stride=2, output_padding=1)

    def run(*inputs):
        output = right(spec)(*inputs)
        if not torch.equal(inputs[0], inputs[0].round()):
            output[0, 0, 1, 1] *= 1 + torch.finfo(torch.float32).eps
        return output

    found = compare(spec, run)
    assert (found.exact, found.error_over_bound) == (True, math.inf)
    assert "1 of 16 outputs are wrong; at (0, 0, 1, 1)" in found.reason


def test_a_wrong_shape_or_dtype_is_rejected():
    wrong = compare(SPEC, lambda *inputs: right(SPEC)(*inputs).transpose(2, 3))
    assert not wrong.exact
    assert wrong.reason == "integer inputs: the output has shape (2, 8, 12, 10) instead of (2, 8, 10, 12)"
    assert math.isnan(wrong.error_over_bound)
    wrong = compare(SPEC, lambda *inputs: reference(SPEC, *inputs))
    assert wrong.reason == "integer inputs: the output has dtype float64 instead of float32"


def test_every_operator_has_to_be_right():
    assert compare(SPEC, right(SPEC), missing_bias(SPEC)).reason
    assert compare(SPEC, missing_bias(SPEC), right(SPEC)).reason
    assert compare(SPEC, right(SPEC), right(SPEC)).reason == ""


def test_an_empty_batch_passes():
    spec = ConvTranspose2dSpec(**{**SPEC.to_json(), "n": 0})
    found = compare(spec, right(spec))
    assert (found.exact, found.max_error, found.error_over_bound, found.reason) == (True, 0.0, 0.0, "")


class StandIn:
    """What `check` uses of a kernel, computed by an operator; packing adds an axis and reverses the taps."""

    def __init__(self, spec, operator, packed_operator=None):
        self.spec = spec
        self.operator = operator
        self.packed_operator = packed_operator or operator
        self.target = Target.parse("llvm")
        self.manifest = SimpleNamespace(schedule="stand-in")
        self.saved = []
        self.threads = []

    def pack(self, weight):
        return weight.flip(3)[None]

    def save(self, directory):
        assert directory.parent.is_dir() and not directory.exists()
        self.saved.append(directory)

    def __call__(self, input, weight, bias=None, *, out=None):
        self.threads.append(torch.get_num_threads())
        if weight.ndim == 5:
            answer = self.packed_operator(input, weight[0].flip(3), bias)
        else:
            answer = self.operator(input, weight, bias)
        return answer if out is None else out.copy_(answer)


@pytest.fixture
def standing_in(monkeypatch):
    """Makes `check` build and load a stand-in; returns the thread counts that TVM's pool was given."""
    threads = []

    def use(kernel):
        def build(spec, target):
            if isinstance(kernel, Exception):
                raise kernel
            return kernel

        monkeypatch.setitem(__import__("sys").modules, "convt_tvm.compiler", SimpleNamespace(build=build))
        monkeypatch.setattr(module.runtime, "load", lambda directory: kernel if directory in kernel.saved else None)
        monkeypatch.setattr(module.runtime, "get_num_threads", lambda: 7)
        monkeypatch.setattr(module.runtime, "set_num_threads", threads.append)
        return threads

    return use


def test_check_of_a_right_kernel_is_good_and_timed(standing_in):
    kernel = StandIn(SPEC, right(SPEC))
    pool = standing_in(kernel)
    before = torch.get_num_threads()
    row = check(Workload("suite/1", "nowhere", SPEC), "llvm:x86-64-v3", seed=5, threads=1)
    assert (row.verdict, row.reason, row.exact, row.schedule) == ("good", "", True, "stand-in")
    assert (row.workload, row.spec, row.output_shape, row.seed) == ("suite/1", SPEC.name, (2, 8, 10, 12), 5)
    assert row.build_secs < 1
    assert row.latency_us > 0 and row.torch_latency_us > 0
    assert row.speedup == row.torch_latency_us / row.latency_us
    assert row.spread >= 1
    assert pool == [1, 7]
    assert set(kernel.threads) == {1}
    assert torch.get_num_threads() == before
    assert not kernel.saved[0].parent.exists()
    stored = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert stored["output_shape"] == [2, 8, 10, 12]
    assert stored["target"].startswith("llvm:x86_64+")


def test_quick_skips_the_timing(standing_in):
    standing_in(StandIn(SPEC, right(SPEC)))
    row = check(Workload("suite/1", "nowhere", SPEC), quick=True)
    assert (row.verdict, row.latency_us, row.torch_latency_us, row.speedup) == ("good", None, None, None)


@pytest.mark.parametrize("plain_is_wrong", [True, False])
def test_check_of_a_wrong_kernel_is_bad_and_not_timed(standing_in, plain_is_wrong):
    operators = [missing_bias(SPEC), right(SPEC)]
    standing_in(StandIn(SPEC, *(operators if plain_is_wrong else reversed(operators))))
    row = check(Workload("suite/1", "nowhere", SPEC))
    assert (row.verdict, row.exact, row.latency_us) == ("bad", False, None)
    assert row.reason.startswith("integer inputs: 1920 of 1920 outputs are wrong")


def test_infinities_become_null_in_json(standing_in):
    standing_in(StandIn(SPEC, changed(SPEC, lambda output: output.fill_(math.nan))))
    row = check(Workload("suite/1", "nowhere", SPEC))
    assert row.max_error == math.inf
    stored = row.to_json()
    assert (stored["max_error"], stored["error_over_bound"], stored["verdict"]) == (None, None, "bad")
    json.dumps(stored, allow_nan=False)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BuildError("no linker was found;\n install gcc."), "no linker was found; install gcc."),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
    ],
)
def test_an_exception_is_the_verdict_of_its_row(standing_in, error, reason):
    standing_in(error)
    row = check(Workload("suite/1", "nowhere", SPEC))
    assert (row.verdict, row.reason, row.exact, row.schedule) == ("bad", reason, None, None)


def test_an_interrupt_is_not_a_verdict(standing_in):
    def interrupt(*inputs):
        raise KeyboardInterrupt

    pool = standing_in(StandIn(SPEC, interrupt))
    with pytest.raises(KeyboardInterrupt):
        check(Workload("suite/1", "nowhere", SPEC))
    assert pool[-1] == 7


def test_an_unknown_target_is_no_row():
    with pytest.raises(TargetError, match="quantum"):
        check(Workload("suite/1", "nowhere", SPEC), "quantum")


def test_a_row_prints_as_the_call_that_rebuilds_it(standing_in):
    standing_in(StandIn(SPEC, right(SPEC)))
    row = check(Workload("suite/1", "nowhere", SPEC), quick=True)
    assert eval(repr(row), {"CheckRow": module.CheckRow}) == row
    assert replace(row, verdict="bad") != row
