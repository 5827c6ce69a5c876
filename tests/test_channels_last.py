"""Kernels whose input and output are channels_last in memory."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from machine_code import disassemble

from convt_tvm import build, load
from convt_tvm.check import bits
from convt_tvm.compiler import build_artifact, lower_choice
from convt_tvm.dot_layout import reads_pairs
from convt_tvm.errors import BuildError
from convt_tvm.functional import conv_transpose2d
from convt_tvm.layout import reads_input
from convt_tvm.plan import find_plan
from convt_tvm.processor import host_architecture
from convt_tvm.reference import integer_inputs, normal_inputs, reference
from convt_tvm.space import choices, default_choice
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

HOST = Target.parse("llvm")
V4 = Target.parse("llvm:x86-64-v4")


def last(**changes):
    sizes = {"n": 2, "ci": 6, "ih": 5, "iw": 9, "co": 20, "kernel_size": 3, "stride": 2, "padding": 1}
    return ConvTranspose2dSpec(**{**sizes, "memory_format": "channels_last", **changes})


SPECS = {
    "channels fill no vector": last(),
    "groups": last(ci=8, co=6, kernel_size=4, stride=3, groups=2),
    "groups of one channel": last(ci=5, co=5, groups=5),
    "depthwise": last(ci=48, co=48, groups=48, kernel_size=4),
    "depthwise, the input itself is read": last(ci=16, co=16, groups=16, kernel_size=2, padding=0, iw=8),
    "one output channel": last(co=1, iw=20),
    "one input channel": last(ci=1),
    "nothing but the bias in two of three rows": last(kernel_size=1, stride=3, padding=0),
    "zeros alone in two of three rows": last(kernel_size=1, stride=3, padding=0, bias=False),
    "the input itself is read": last(ci=16, co=32, kernel_size=2, padding=0),
    "many phases": last(kernel_size=9, stride=9, iw=17, padding=0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_every_space_is_exact_and_writes_nothing_else(name, dtype, tmp_path):
    spec = replace(SPECS[name], dtype=dtype)
    inputs = integer_inputs(spec, seed=2)
    found = choices(spec, HOST.for_dtype(dtype))
    for space in {choice.space.name for choice in found}:
        of_space = [choice for choice in found if choice.space.name == space]
        for number in (0, len(of_space) // 2, len(of_space) - 1):
            directory = tmp_path / f"{space}{number}"
            build_artifact(spec, HOST, directory, choice=of_space[number])
            kernel = load(directory)
            assert torch.equal(kernel(*inputs).double(), reference(spec, *inputs)), of_space[number].layout
            count = math.prod(spec.output_shape)
            whole = torch.full((count + 256,), 77, dtype=inputs[0].dtype)
            output = whole[128 : 128 + count].view(spec.n, spec.oh, spec.ow, spec.co).movedim(-1, 1)
            kernel(inputs[0], kernel.pack(inputs[1]), *inputs[2:], out=output)
            assert torch.equal(output.double(), reference(spec, *inputs))
            assert (whole[:128] == 77).all()
            assert (whole[128 + count :] == 77).all()


def test_the_input_itself_is_read_where_it_can_be():
    def layouts_of(spec):
        return [choice.layout for choice in choices(spec, V4)]

    def reading(spec):
        return [layout for layout in layouts_of(spec) if reads_input(spec, layout)]

    whole = last(ci=16, co=32, kernel_size=2, padding=0)
    assert {layout.lanes for layout in reading(whole)} == {"co"}
    # Tiles and taps that reach beyond the image leave the border out, but for tiles of several rows.
    assert {layout.row_block for layout in reading(whole)} == {1, whole.ih}
    assert any(whole.iw % layout.column_block for layout in reading(whole))
    assert {layout.row_block for layout in reading(last(ci=16, co=32))} == {1}
    many = last(ci=16, co=64, kernel_size=9, iw=27)
    assert {layout.skips_columns(many) for layout in reading(many)} == {True}
    assert any(layout.row_block == 1 and not layout.skips_columns(many) for layout in layouts_of(many))
    assert not reading(replace(whole, dtype="bfloat16"))
    assert {layout.lanes for layout in reading(replace(whole, memory_format="contiguous_format"))} <= {"ow"}
    # Positions 4,096 bytes apart fall into one set of the first cache.
    far = replace(whole, ci=1024, iw=16)
    assert {layout.row_block * layout.column_block for layout in reading(far)} == {1, 2, 3, 4}
    assert max(layout.row_block * layout.column_block for layout in reading(replace(far, ci=1008))) > 4


@pytest.mark.parametrize("ci", [16, 15])
def test_pairs_of_the_input_itself_are_read_where_they_are_side_by_side(ci, tmp_path):
    spec = last(ci=ci, iw=8, co=32, kernel_size=2, padding=0, dtype="bfloat16")
    found = choices(spec, HOST, "llvm_dot")
    reading = [choice for choice in found if reads_pairs(spec, choice.layout)]
    assert bool(reading) is (bool(found) and ci == 16)
    inputs = integer_inputs(spec, seed=2)
    memory = torch.zeros(inputs[0].numel() + 1, dtype=torch.bfloat16)
    for number, choice in enumerate(reading[:2]):
        build_artifact(spec, HOST, tmp_path / str(number), choice=choice)
        kernel = load(tmp_path / str(number))
        # An odd number of elements from where pairs would be aligned.
        odd = memory[1:].view(spec.n, spec.ih, spec.iw, ci).movedim(-1, 1).copy_(inputs[0])
        assert torch.equal(kernel(odd, *inputs[1:]).double(), reference(spec, *inputs))


@pytest.fixture(scope="module")
def kernel():
    return build(last())


def test_tensors_of_its_own_format_pass_without_copies(kernel, monkeypatch):
    monkeypatch.setattr(kernel.__class__, "_call_checked", lambda *_: pytest.fail("a call took the long way"))
    input, weight, bias = normal_inputs(kernel.spec, 0)
    assert input.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.undo()
    packed = kernel.pack(weight)
    monkeypatch.setattr(kernel.__class__, "_call_checked", lambda *_: pytest.fail("a call took the long way"))
    output = kernel(input, packed, bias)
    assert output.shape == kernel.spec.output_shape
    assert output.is_contiguous(memory_format=torch.channels_last)
    written = torch.empty_like(output)
    assert kernel(input, packed, bias, out=written) is written
    assert torch.equal(bits(written), bits(output))


def test_other_strides_give_the_same_bits(kernel):
    input, weight, bias = normal_inputs(kernel.spec, 0)
    expected = kernel(input, weight, bias)
    contiguous = replace(kernel.spec, memory_format="contiguous_format")
    order = default_choice(kernel.spec, HOST).layout.sum_order
    same = next(choice for choice in choices(contiguous, HOST) if choice.layout.sum_order == order)
    assert torch.equal(bits(expected), bits(build(contiguous, choice=same)(input, weight, bias)))
    for given in (input.contiguous(), input.expand(2, 6, 5, 9), torch.cat([input, input], 1)[:, :6]):
        for out in (None, torch.empty(kernel.spec.output_shape), torch.empty_like(expected)[:, :, :, :]):
            assert torch.equal(bits(kernel(given, weight, bias, out=out)), bits(expected))
    arrays = [tensor.numpy() for tensor in (input, weight, bias)]
    for given in (arrays[0], np.ascontiguousarray(arrays[0])):
        found = kernel(given, *arrays[1:])
        assert found.strides == tuple(4 * stride for stride in expected.stride())
        assert np.array_equal(found, expected.numpy())
        out = np.empty(kernel.spec.output_shape, np.float32)
        assert kernel(given, *arrays[1:], out=out) is out
        assert np.array_equal(out, expected.numpy())


def test_an_output_that_overlaps_the_input_is_written_by_way_of_another(kernel):
    input, weight, bias = normal_inputs(kernel.spec, 0)
    expected = kernel(input, weight, bias)
    memory = torch.zeros(expected.numel())
    shared = memory[: input.numel()].view(2, 5, 9, 6).movedim(-1, 1).copy_(input)
    out = memory.view(2, *(expected.shape[axis] for axis in (2, 3, 1))).movedim(-1, 1)
    assert kernel(shared, kernel.pack(weight), bias, out=out) is out
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_any_batch_size_goes(n):
    kernel = build(last(n=None))
    input, weight, bias = normal_inputs(last(n=n), 0)
    for given in (weight, kernel.pack(weight)):
        output = kernel(input, given, bias)
        assert output.shape == last(n=n).output_shape
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(output.double(), reference(last(n=n), input, weight, bias), atol=1e-5)


@pytest.mark.parametrize("of_weight", [False, True])
def test_the_function_takes_a_kernel_for_channels_last(of_weight):
    # Integers: the kernel for NCHW may be one that sums in another order.
    input, weight, bias = integer_inputs(last(), 0)
    if of_weight:
        input, weight = input.contiguous(), weight.contiguous(memory_format=torch.channels_last)
    parameters = (2, 2), (1, 1), (0, 0), 1, (1, 1)
    native = HOST.for_dtype("float32").keeps_channels_last
    assert find_plan(input, weight, bias, parameters).kernel.spec.is_channels_last is native
    output = conv_transpose2d(input, weight, bias, stride=2, padding=1)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(output), bits(conv_transpose2d(input.contiguous(), weight.contiguous(), bias, 2, 1)))


ONE_LONG_ROW = {"ih": 1, "iw": 2000, "kernel_size": (1, 8), "stride": (1, 4), "padding": 0}


@pytest.mark.parametrize("changes", [{"kernel_size": 4}, {"kernel_size": 15}, ONE_LONG_ROW])
def test_lanes_along_groups_sum_to_the_bits_of_others(changes):
    spec = last(**{"ci": 32, "co": 32, "groups": 32, "iw": 20, "ih": 20, "stride": 1, "padding": 3, **changes})
    assert default_choice(spec, HOST).space.name == "llvm_depthwise"
    found = choices(spec, HOST, "llvm_depthwise")
    assert bool(found[0].layout.column_chunk) is (changes is ONE_LONG_ROW)
    inputs = normal_inputs(spec, 0)
    expected = build(replace(spec, memory_format="contiguous_format"))(*inputs)
    for choice in (found[0], found[-1]):
        assert torch.equal(bits(build(spec, choice=choice)(*inputs)), bits(expected))


@pytest.mark.parametrize(
    "changes",
    [{"groups": 1}, {"ci": 40, "co": 80, "groups": 40}, {"memory_format": "contiguous_format"}, {"kernel_size": 1}],
)
def test_lanes_run_along_groups_of_one_channel_only(changes):
    spec = last(**{"ci": 40, "co": 40, "groups": 40, **changes})
    assert bool(choices(spec, V4, "llvm_depthwise")) is (changes == {"kernel_size": 1})


def test_gpus_have_no_such_kernels(tmp_path):
    with pytest.raises(
        BuildError, match="kernels for cuda read and write NCHW; give memory_format='contiguous_format'"
    ):
        build_artifact(last(), "cuda:sm_90", tmp_path / "kernel")
    assert not (tmp_path / "kernel").exists()


def test_a_last_channel_beside_full_vectors_overwrites_no_neighbour(tmp_path):
    # LLVM masked the store of 9 channels, and wrote four bytes for the last one.
    spec = ConvTranspose2dSpec(
        n=3, ci=2, ih=5, iw=7, co=9, kernel_size=(5, 6), stride=(1, 2), padding=(1, 4), output_padding=(1, 0),
        dilation=(3, 2), dtype="bfloat16", memory_format="channels_last",
    )  # fmt: skip
    target = HOST.for_dtype("bfloat16")
    inputs = integer_inputs(spec, 0)
    exact = reference(spec, *inputs).bfloat16()
    whole = [choice for choice in choices(spec, target, "llvm_columns") if choice.layout.co_block == spec.co]
    for number, choice in enumerate(whole[:2]):
        build_artifact(spec, target, tmp_path / str(number), choice=choice)
        kernel = load(tmp_path / str(number))
        assert torch.equal(kernel(inputs[0], kernel.pack(inputs[1]), inputs[2]), exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["channels fill no vector", "groups"])
def test_columns_are_transposed_and_a_block_that_is_not_full_overwrites_no_neighbour(name, dtype, tmp_path):
    spec = replace(SPECS[name], dtype=dtype)
    target, inputs = HOST.for_dtype(dtype), integer_inputs(spec, seed=2)
    found = [choice for choice in choices(spec, target) if choice.layout.lanes == "ow"]
    by_block = {choice.layout.co_block: choice for choice in reversed(found)}
    partial = {block: choice for block, choice in by_block.items() if spec.co // spec.groups % block}
    assert partial
    for block, choice in partial.items():
        build_artifact(spec, HOST, tmp_path / str(block), choice=choice)
        assert torch.equal(load(tmp_path / str(block))(*inputs).double(), reference(spec, *inputs)), choice.layout
        assert "T.Shuffle" in lower_choice(spec, target, choice).module.script(), choice.layout


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
@pytest.mark.parametrize("co", [64, 16])
def test_rows_of_the_bias_alone_are_not_scattered(co, tmp_path):
    """A vector holds channels of one place, which are side by side in memory; not the places of a channel."""
    spec = last(ci=32, ih=8, iw=16, co=co, stride=5, dilation=2)
    for choice in (choices(spec, V4, name)[0] for name in ("llvm_channels", "llvm_columns")):
        build_artifact(spec, V4, tmp_path / choice.space.name, choice=choice)
        code = disassemble(tmp_path / choice.space.name / "kernel.so")
        functions = re.findall(r"<(\w+)>:\n(.*?)(?=\n\n)", code, re.DOTALL)
        assert [name for name, body in functions if "vscatter" in body and "pack" not in name] == []
