import itertools
from fractions import Fraction

import pytest
import torch

from convt_tvm import reference as module
from convt_tvm.errors import SpecError
from convt_tvm.reference import error_bound, integer_inputs, longest_reduction, normal_inputs, reference
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

SPECS = [
    ConvTranspose2dSpec(n=2, ci=3, ih=4, iw=5, co=2, kernel_size=3, stride=2, padding=1, output_padding=1),
    ConvTranspose2dSpec(n=1, ci=4, ih=3, iw=2, co=6, kernel_size=(2, 3), stride=(3, 2), groups=2, bias=False),
    ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=2, kernel_size=2, stride=4, padding=1, output_padding=3),
    ConvTranspose2dSpec(
        n=1, ci=2, ih=4, iw=3, co=1, kernel_size=3, stride=(2, 1), dilation=(2, 3), output_padding=(1, 2)
    ),
    ConvTranspose2dSpec(n=1, ci=1, ih=5, iw=6, co=1, kernel_size=2, stride=2, padding=3),
]


def scatter(spec, input, weight, bias):
    """The definition, on exact fractions: every input times every tap, added where it lands; and how many."""
    per_group = spec.co // spec.groups
    total = {}
    count = {}
    for n, co, y, x in itertools.product(*map(range, spec.output_shape)):
        total[n, co, y, x] = Fraction(bias[co].item()) if bias is not None else Fraction(0)
        count[n, co, y, x] = 0
    for n, ci, i, j in itertools.product(*map(range, spec.input_shape)):
        group = ci // (spec.ci // spec.groups)
        for local, kh, kw in itertools.product(range(per_group), *map(range, spec.kernel_size)):
            y = i * spec.stride[0] - spec.padding[0] + kh * spec.dilation[0]
            x = j * spec.stride[1] - spec.padding[1] + kw * spec.dilation[1]
            at = n, group * per_group + local, y, x
            if at in total:
                total[at] += Fraction(input[n, ci, i, j].item()) * Fraction(weight[ci, local, kh, kw].item())
                count[at] += 1
    return total, count


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_reference_is_the_definition(spec):
    input, weight, bias = integer_inputs(spec, seed=1)
    answer = reference(spec, input, weight, bias)
    total, count = scatter(spec, input, weight, bias)
    assert answer.dtype == torch.float64
    assert answer.shape == spec.output_shape
    assert {at: Fraction(answer[at].item()) for at in total} == total
    assert longest_reduction(spec) == max(count.values())


def test_reference_of_an_empty_batch_is_empty():
    spec = ConvTranspose2dSpec(n=0, ci=2, ih=3, iw=3, co=4, kernel_size=3)
    inputs = integer_inputs(spec, seed=0)
    assert reference(spec, *inputs).shape == (0, 4, 5, 5)
    assert error_bound(spec, *inputs).shape == (0, 4, 5, 5)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("channels", [1, 3, 256, 4096])
def test_integer_inputs_are_dense_signed_and_exact(dtype, channels):
    spec = ConvTranspose2dSpec(n=2, ci=channels, ih=4, iw=4, co=4, kernel_size=4, stride=2, padding=1, dtype=dtype)
    input, weight, bias = integer_inputs(spec, seed=0)
    largest = int(max(tensor.abs().max() for tensor in (input, weight, bias)))
    density = float((weight != 0).double().mean())
    assert input.dtype == weight.dtype == bias.dtype == getattr(torch, dtype)
    assert input.shape == spec.input_shape and weight.shape == spec.weight_shape and bias.shape == spec.bias_shape
    for tensor in (input, weight, bias):
        assert torch.equal(tensor, tensor.round())
    assert (input != 0).all() and (bias != 0).all()
    assert density == 1 if (dtype, channels) != ("bfloat16", 4096) else 0.2 < density < 0.3
    assert abs(float(input.double().mean())) < largest / 2
    held = 2**53 if dtype == "float64" else 2**24
    assert longest_reduction(spec) * largest**2 + largest <= held
    answer = reference(spec, input, weight, bias)
    assert torch.equal(answer.to(input.dtype).double(), answer)


def test_integer_inputs_use_the_largest_magnitudes_that_fit():
    def largest(dtype, channels):
        spec = ConvTranspose2dSpec(n=1, ci=channels, ih=2, iw=2, co=2, kernel_size=1, dtype=dtype)
        return int(integer_inputs(spec, seed=0)[0].abs().max())

    assert largest("float32", 2048) == 8
    assert largest("float16", 2048) == 4
    assert largest("bfloat16", 2048) == 1


def test_weights_thin_out_until_every_output_is_exact():
    # 4000 products of +-1 deviate by 63, so 256 is 4 deviations away: a few of 65,536 outputs are beyond it.
    spec = ConvTranspose2dSpec(n=1, ci=4000, ih=32, iw=32, co=64, kernel_size=1, bias=False, dtype="bfloat16")
    input, weight, _ = integer_inputs(spec, seed=0)
    answer = reference(spec, input, weight, None)
    assert torch.equal(answer.to(torch.bfloat16).double(), answer)
    assert 0.45 < float((weight != 0).double().mean()) < 0.55


def test_integer_magnitudes_shrink_before_a_partial_sum_could_round(monkeypatch):
    spec = ConvTranspose2dSpec(n=1, ci=4, ih=8, iw=8, co=2, kernel_size=1)
    monkeypatch.setattr(module, "longest_reduction", lambda spec: 2**24 // 64)
    assert int(integer_inputs(spec, seed=0)[0].abs().max()) == 4
    monkeypatch.setattr(module, "longest_reduction", lambda spec: 2**24)
    with pytest.raises(SpecError, match="an output sums 16777216 products, and the accumulator \\(float32\\)"):
        integer_inputs(spec, seed=0)


@pytest.mark.parametrize("draw", [integer_inputs, normal_inputs])
def test_inputs_follow_the_seed(draw):
    spec = SPECS[0]
    first, again, other = draw(spec, 3), draw(spec, 3), draw(spec, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert draw(SPECS[1], 0)[2] is None


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_normal_inputs_give_outputs_of_order_one(dtype):
    spec = ConvTranspose2dSpec(
        n=1, ci=256, ih=8, iw=8, co=32, kernel_size=4, stride=2, padding=1, bias=False, dtype=dtype
    )
    inputs = normal_inputs(spec, 0)
    assert inputs[0].dtype == getattr(torch, dtype)
    assert 0.8 < float(reference(spec, *inputs).std()) < 1.1


def test_bound_is_gamma_times_the_magnitudes_for_each_output():
    spec = SPECS[0]
    inputs = normal_inputs(spec, 5)
    bound = error_bound(spec, *inputs)
    magnitude, count = scatter(spec, *(tensor.abs() for tensor in inputs))
    assert len(set(count.values())) > 2
    for at, total in magnitude.items():
        terms = count[at] + 1
        unit, exact_unit = Fraction(1, 2**24), Fraction(1, 2**53)
        expected = sum(terms * u / (1 - terms * u) for u in (unit, exact_unit)) * total + count[at] * Fraction(
            1, 2**149
        )
        assert bound[at].item() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bound_adds_one_rounding_to_a_narrow_output(dtype):
    spec = ConvTranspose2dSpec(n=1, ci=1, ih=1, iw=1, co=1, kernel_size=1, bias=False, dtype=dtype)
    info = torch.finfo(getattr(torch, dtype))
    one = torch.ones((1, 1, 1, 1), dtype=getattr(torch, dtype))
    bound = error_bound(spec, one * 3, one, None).item()
    assert bound == pytest.approx(3 * info.eps / 2, rel=1e-3)
    assert bound > 3 * info.eps / 2
    nothing = error_bound(spec, one * 0, one, None).item()
    assert nothing == pytest.approx(info.smallest_normal * info.eps / 2, rel=1e-3)


def test_bound_is_zero_where_the_output_is_the_bias_alone():
    spec = SPECS[2]
    inputs = normal_inputs(spec, 0)
    bound = error_bound(spec, *inputs)
    _, count = scatter(spec, *inputs)
    untouched = torch.zeros(spec.output_shape, dtype=torch.bool)
    for at, products in count.items():
        untouched[at] = products == 0
    assert untouched.any() and (bound[untouched] == 0).all() and (bound[~untouched] > 0).all()


def test_float32_sums_in_any_order_stay_within_the_bound_and_float16_sums_do_not():
    spec = ConvTranspose2dSpec(n=1, ci=512, ih=4, iw=4, co=64, kernel_size=1)
    input, weight, bias = normal_inputs(spec, 0)
    exact, bound = reference(spec, input, weight, bias), error_bound(spec, input, weight, bias)

    def sequential(order, dtype):
        total = bias.to(dtype)[None, :, None, None].expand(spec.output_shape).clone()
        for channel in order:
            total += input[:, channel : channel + 1].to(dtype) * weight[channel, :, 0, 0].to(dtype)[None, :, None, None]
        return total.double()

    def worst(order, dtype=torch.float32):
        return float(((sequential(order, dtype) - exact).abs() / bound).max())

    assert 0.001 < worst(range(512)) < 1
    assert 0.001 < worst(reversed(range(512))) < 1
    assert worst(range(512), torch.float16) > 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_bias_alone_is_exact_but_for_subnormals_in_bfloat16(dtype):
    spec = ConvTranspose2dSpec(n=1, ci=1, ih=1, iw=1, co=2, kernel_size=1, stride=2, output_padding=1, dtype=dtype)
    of_dtype = getattr(torch, dtype)
    tiny = torch.finfo(of_dtype).smallest_normal
    bias = torch.tensor([tiny / 2, 1], dtype=of_dtype)
    inputs = torch.ones(1, 1, 1, 1, dtype=of_dtype), torch.ones(1, 2, 1, 1, dtype=of_dtype), bias
    bound = error_bound(spec, *inputs)[0, :, 1, 1]
    assert bound.tolist() == [tiny / 2 if dtype == "bfloat16" else 0, 0]
