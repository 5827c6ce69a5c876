"""The lab catches planted faults, and says which stage they belong to."""

import math
from dataclasses import replace

import pytest
import torch
from test_check import narrow_sums

from convt_tvm.determinism import confirm_repeats
from convt_tvm.errors import BuildError
from convt_tvm.examine import examine, first_failure
from convt_tvm.findings import STAGES
from convt_tvm.implementations import Implementation, RefusedError
from convt_tvm.peers import Refusal
from convt_tvm.reference import reference
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

SPEC = ConvTranspose2dSpec(
    n=2, ci=16, ih=5, iw=6, co=8, kernel_size=(4, 3), stride=2, padding=(1, 0), output_padding=(0, 1), groups=2
)
SPARSE = ConvTranspose2dSpec(n=2, ci=3, ih=4, iw=4, co=4, kernel_size=(2, 1), stride=3, padding=1, output_padding=2)


def with_dtype(spec, dtype):
    return ConvTranspose2dSpec(**{**spec.to_json(), "dtype": dtype})


def right(spec):
    return lambda input, weight, bias: reference(spec, input, weight, bias).to(input.dtype)


def on_inputs(change):
    """A fault that reads something else: `change` gives what is read instead of input, weight and bias."""
    return lambda spec: lambda *inputs: right(spec)(*change(spec, *inputs))


def on_output(change):
    """A fault that writes something else: `change` gives what is written instead of the right output."""
    return lambda spec: lambda *inputs: change(spec, right(spec)(*inputs), *inputs)


def with_spec(**changes):
    """A fault that computes another spec, as far as it has outputs of this one."""

    def make(spec):
        def run(input, weight, bias):
            other = ConvTranspose2dSpec(**{**spec.to_json(), **changes})
            output = torch.zeros(spec.output_shape, dtype=torch.float64)
            found = reference(other, input, weight, bias)[:, :, : spec.oh, : spec.ow]
            output[:, :, : found.shape[2], : found.shape[3]] = found
            return output.to(input.dtype)

        return run

    return make


def moved_tap(spec):
    """The last tap is gathered one input column too far."""

    def run(input, weight, bias):
        corner = torch.zeros_like(weight)
        corner[:, :, -1, -1] = weight[:, :, -1, -1]
        return (reference(spec, input, weight - corner, bias) + reference(spec, input.roll(1, 3), corner, None)).to(
            input.dtype
        )

    return run


def without(index):
    def change(spec, input, weight, bias):
        weight = weight.clone()
        weight[index] = 0
        return input, weight, bias

    return on_inputs(change)


def without_input(index):
    def change(spec, input, weight, bias):
        input = input.clone()
        input[index] = 0
        return input, weight, bias

    return on_inputs(change)


def bias_dropped_on_empty_phases(spec, output, input, weight, bias):
    reached = reference(spec, torch.ones_like(input), torch.ones_like(weight), None) != 0
    return torch.where(reached, output, 0.0)


def rounded_to(bits):
    """What goes into the multiplication keeps so many bits of its fraction, as in tf32 (10) or bfloat16 (7)."""

    def keep(tensor):
        mantissa, exponent = torch.frexp(tensor)
        return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)

    return on_inputs(lambda spec, input, weight, bias: (keep(input), keep(weight), bias))


def flushed(spec, input, weight, bias):
    tiny = torch.finfo(weight.dtype).smallest_normal
    return input, torch.where(weight.abs() < tiny, 0.0, weight), bias


def flushed_results(spec, output, input, weight, bias):
    return torch.where(output.abs() < torch.finfo(output.dtype).smallest_normal, 0.0, output)


def bias_after_rounding(spec):
    """The sum is rounded to the output's type before the bias is added, which rounds once more."""
    return lambda input, weight, bias: reference(spec, input, weight, None).to(input.dtype) + bias[None, :, None, None]


def multiplied_zeros(spec):
    """The text-book form: zeros between the inputs meet weights that are not finite, and inputs zeros of the weight."""

    def run(input, weight, bias):
        output = right(spec)(input, weight, bias)
        bad = ~weight.isfinite().all(dim=(0, 2, 3))
        output[:, : spec.co // spec.groups][:, bad] = math.nan
        return output

    return run


def spread_nan(spec, output, *inputs):
    """A vector of outputs becomes NaN where one is."""
    return torch.where(output.isnan().any(dim=3, keepdim=True), math.nan, output)


def clipped(spec, output, *inputs):
    limit = torch.finfo(output.dtype).max
    return output.clamp(-limit, limit)


def nan_lost(spec, output, *inputs):
    return output.nan_to_num(nan=0.0)


def inf_as_nan(spec, output, *inputs):
    return torch.where(output.isinf(), math.nan, output)


def racing(spec):
    calls = []

    def run(*inputs):
        output = right(spec)(*inputs)
        calls.append(1)
        real = not torch.equal(inputs[0], inputs[0].round())
        if real and output.numel() and len(calls) % 3 == 0:
            output.view(-1)[0] = torch.nextafter(output.view(-1)[0], torch.tensor(math.inf))
        return output

    return run


def summed_by_threads(spec):
    """The order of the sum depends on the number of threads."""

    def run(input, weight, bias):
        if torch.get_num_threads() == 1:
            return right(spec)(input, weight, bias)
        return torch.nn.functional.conv_transpose2d(
            input, weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation
        )

    return run


def last_item_otherwise(spec):
    """The last item of a batch is computed in another order than the others."""

    def run(input, weight, bias):
        output = right(spec)(input, weight, bias)
        if spec.n > 1:
            output[-1:] = torch.nn.functional.conv_transpose2d(
                input[-1:], weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation
            )
        return output

    return run


def other_dtype(spec, output, *inputs):
    return output.double()


def item(number, other):
    return lambda spec, output, *inputs: output[[other if n == number else n for n in range(spec.n)]]


def left_unwritten(spec, output, *inputs):
    output[-1, -1, -1, -1] = math.nan
    return output


def last_block_unfinished(spec, output, *inputs):
    output[:, -1:] = 0
    return output


def channel_order(spec, input, weight, bias):
    return input, weight, None if bias is None else bias.roll(1)


# Fault, stage that should name it, spec.
FAULTS = {
    "off-by-one gather": (moved_tap, "exactness", SPEC),
    "off by one everywhere": (on_inputs(lambda s, x, w, b: (x.roll(1, 3), w, b)), "exactness", SPEC),
    "swapped padding": (with_spec(padding=(0, 1)), "exactness", SPEC),
    "swapped axes": (on_inputs(lambda s, x, w, b: (x.transpose(2, 3).reshape(x.shape), w, b)), "exactness", SPEC),
    "flipped kernel": (on_inputs(lambda s, x, w, b: (x, w.flip(2, 3), b)), "exactness", SPEC),
    "missing tap": (without((slice(None), slice(None), -1, 0)), "exactness", SPEC),
    "missing tap of one channel": (without((3, 2, 1, 1)), "exactness", SPEC),
    "missing border row": (without_input((slice(None), slice(None), 0)), "exactness", SPEC),
    "missing border column": (without_input((..., -1)), "exactness", SPEC),
    "missing input channel": (without((-1,)), "exactness", SPEC),
    "wrong group offset": (on_inputs(lambda s, x, w, b: (x.roll(s.ci // s.groups, 1), w, b)), "exactness", SPEC),
    "groups ignored": (on_inputs(lambda s, x, w, b: (x, torch.cat([w[:8], w[:8]]), b)), "exactness", SPEC),
    "bias dropped": (on_inputs(lambda s, x, w, b: (x, w, None)), "exactness", SPEC),
    "bias of the neighbour": (on_inputs(channel_order), "exactness", SPEC),
    "bias dropped on empty phases": (on_output(bias_dropped_on_empty_phases), "exactness", SPARSE),
    "output padding left out": (with_spec(output_padding=0), "exactness", SPEC),
    "another dilation": (with_spec(dilation=(1, 2)), "exactness", SPEC),
    "an item for its neighbour": (on_output(item(1, 0)), "exactness", SPEC),
    "an output not written": (on_output(left_unwritten), "exactness", SPEC),
    "last channel block not written": (on_output(last_block_unfinished), "exactness", SPEC),
    "another dtype": (on_output(other_dtype), "exactness", SPEC),
    "sums in float16": (narrow_sums(torch.float16), "rounding", with_dtype(SPEC, "float16")),
    "sums in bfloat16": (narrow_sums(torch.bfloat16), "rounding", with_dtype(SPARSE, "bfloat16")),
    "sums in float32": (narrow_sums(torch.float32), "rounding", with_dtype(SPEC, "float64")),
    "tf32 products": (rounded_to(10), "rounding", SPEC),
    "bfloat16 products": (rounded_to(7), "rounding", SPEC),
    "bias added after rounding": (bias_after_rounding, "rounding", with_dtype(SPEC, "float16")),
    "subnormal weights flushed": (on_inputs(flushed), "rounding", SPEC),
    "subnormal results flushed": (on_output(flushed_results), "rounding", SPEC),
    "zeros of the dilated input multiplied": (multiplied_zeros, "special", SPEC),
    "NaN spread over a vector": (on_output(spread_nan), "special", SPEC),
    "NaN lost": (on_output(nan_lost), "special", SPEC),
    "infinity as NaN": (on_output(inf_as_nan), "special", SPEC),
    "overflow clipped": (on_output(clipped), "special", with_dtype(SPEC, "float16")),
    "a race": (racing, "determinism", SPEC),
    "sums by number of threads": (summed_by_threads, "determinism", SPEC),
    "sums by place in the batch": (last_item_otherwise, "determinism", SPEC),
}


def examined(spec, make, **options):
    return list(examine(spec, [Implementation("ours", make)], **options))


@pytest.fixture
def two_threads(monkeypatch):
    """Both pools obey, wherever the test may run."""
    monkeypatch.setattr("convt_tvm.runtime.set_num_threads", lambda n: None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named_by_its_stage(fault, two_threads):
    make, stage, spec = FAULTS[fault]
    found = first_failure(examined(spec, make, threads=(1, 2), runs=4))
    assert found is not None
    assert (found.stage, found.implementation, found.spec) == (stage, "ours", spec.name)
    assert found.reason


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("spec", [SPEC, SPARSE], ids=["dense", "sparse"])
def test_what_is_right_passes_every_stage(spec, dtype, two_threads):
    found = examined(with_dtype(spec, dtype), right, threads=(1, 2), runs=3)
    assert {finding.status for finding in found} == {"pass"}
    assert {finding.stage for finding in found} == set(STAGES)
    assert first_failure(found) is None


def test_an_index_error_is_located_by_position_phase_and_taps():
    def change(spec, output, *inputs):
        output[1, 3, 4, 2] += 1
        return output

    found = first_failure(examined(SPEC, on_output(change), stages=["exactness"]))
    assert found.worst.position == (1, 3, 4, 2)
    assert found.worst.phase == (0, 0)
    assert "1 of 2240 outputs are wrong; at (1, 3, 4, 2) it is " in found.reason
    assert "phase (0, 0), which sums w[1, 0]*x[2, 1], w[1, 2]*x[2, 0]" in found.reason
    assert [[cell > 0 for cell in row] for row in found.phases] == [[True, False], [False, False]]


def test_what_an_implementation_raises_is_its_finding():
    def broken(spec):
        raise BuildError("no linker\nwas found.")

    def refusing(spec):
        raise RefusedError(Refusal("unavailable", "no such package"))

    compared = [Implementation("ours", broken), Implementation("other", refusing), Implementation("torch", right)]
    found = list(examine(SPEC, compared, stages=["exactness", "determinism"], runs=2))
    assert [(each.implementation, each.status, each.reason) for each in found] == [
        ("ours", "fail", "no linker was found."),
        ("other", "unavailable", "no such package"),
        ("torch", "pass", ""),
        ("ours", "fail", "BuildError: no linker was found."),
    ]


def test_the_first_failure_is_of_the_first_stage():
    found = examined(SPEC, FAULTS["missing tap"][0])
    failed = [finding.stage for finding in found if finding.status == "fail"]
    assert set(failed) > {"exactness", "rounding"}
    assert first_failure(found[::-1]).stage == "exactness"
    assert first_failure([replace(finding, status="pass") for finding in found]) is None


def test_an_empty_batch_passes():
    found = examined(ConvTranspose2dSpec(**{**SPEC.to_json(), "n": 0}), right, runs=2)
    assert {finding.status for finding in found} == {"pass"}


class StandIn:
    """What `confirm_repeats` uses of a kernel."""

    def __init__(self, make, spec=SPEC):
        self.spec = spec
        self.operator = make(spec)

    def __call__(self, *inputs):
        return self.operator(*inputs)


def test_what_repeats_is_said_for_the_manifest(two_threads):
    assert confirm_repeats(StandIn(right), right, threads=(1, 2), runs=3) == {
        "runs": 3,
        "threads": [1, 2],
        "same_bits": ["3 runs", "1 and 2 threads", "2 items together and alone"],
    }


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (racing, r"does not repeat \(4 runs\): 1 of 2240 outputs have other bits in call 3"),
        (summed_by_threads, r"does not repeat \(1 and 2 threads\): \d+ of 2240 outputs have other bits in call 2"),
        (last_item_otherwise, r"does not repeat \(2 items together and alone\): \d+ of 1120 outputs of item 1 have"),
    ],
)
def test_what_does_not_repeat_is_no_artifact(make, complaint, two_threads):
    with pytest.raises(BuildError, match=complaint):
        confirm_repeats(StandIn(make), make, threads=(1, 2), runs=4)


def test_a_spec_for_any_batch_size_has_its_own_kernel_examined():
    asked = []

    def ours(spec):
        asked.append(spec.n)
        return right_for_any

    def right_for_any(input, weight, bias):
        return right(SPEC)(input, weight, bias)

    def one_image(spec):
        """Wrong from the second image on, as a kernel would be that takes the batch size for granted."""
        return lambda input, *others: right(SPEC)(input[:1].expand_as(input), *others)

    anyone = replace(SPEC, n=None)
    found = list(examine(anyone, [Implementation("ours", ours), Implementation("torch", right)], runs=2))
    assert {finding.status for finding in found} == {"pass"}
    assert {finding.spec for finding in found} == {anyone.name}
    assert set(asked) == {None}
    assert first_failure(list(examine(anyone, [Implementation("ours", one_image)], runs=2))).stage == "exactness"
