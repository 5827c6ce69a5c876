"""Kernels for any batch size of small images, of which tiles take in several."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import tvm
from tvm import te

from convt_tvm import compiler
from convt_tvm.batches import join_kernels
from convt_tvm.compiler import build, build_artifact
from convt_tvm.errors import ArgumentError
from convt_tvm.lower import flatten_blocks
from convt_tvm.reference import integer_inputs, normal_inputs, reference
from convt_tvm.runtime import load
from convt_tvm.space import choices, default_choice, ranked_choices, rest_choices
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import resolve

HOST = Target.parse("llvm")
V4 = Target.parse("llvm:x86-64-v4").for_dtype("float32")
ONE = ConvTranspose2dSpec(n=None, ci=40, ih=1, iw=1, co=48, kernel_size=4)
LAYERS = {
    "one position": ONE,
    "one position, channels_last": replace(ONE, memory_format="channels_last"),
    "odd": ConvTranspose2dSpec(n=None, ci=21, ih=2, iw=3, co=19, kernel_size=(3, 4), stride=2, padding=1),
    "odd, channels_last": ConvTranspose2dSpec(
        n=None, ci=21, ih=2, iw=3, co=19, kernel_size=(3, 4), stride=2, padding=1, memory_format="channels_last"
    ),
    "groups": ConvTranspose2dSpec(n=None, ci=32, ih=2, iw=2, co=32, kernel_size=3, groups=2, bias=False),
    "float64": ConvTranspose2dSpec(n=None, ci=24, ih=2, iw=2, co=24, kernel_size=2, stride=2, dtype="float64"),
    "float16": ConvTranspose2dSpec(n=None, ci=24, ih=2, iw=2, co=24, kernel_size=2, stride=2, dtype="float16"),
    "bfloat16": ConvTranspose2dSpec(n=None, ci=24, ih=2, iw=2, co=24, kernel_size=2, stride=2, dtype="bfloat16"),
}


def several(spec, target=HOST):
    """The best of the choices that take more than three images in a tile, or None."""
    found = choices(spec.with_batch(8), target.for_dtype(spec.dtype))
    return next((choice for choice in found if choice.layout.image_block > 3), None)


@pytest.mark.parametrize("name", LAYERS)
def test_every_batch_size_is_exact_and_nothing_around_it_is_read_or_written(name, tmp_path):
    spec = LAYERS[name]
    target, choice = HOST, several(spec)
    if choice is None:
        # Units that multiply pairs have no such tiles, and sum in another order.
        assert spec.dtype == "bfloat16" and HOST.for_dtype("bfloat16").multiplies_pairs
        target = Target.parse("llvm:x86-64-v3").for_dtype("bfloat16")
        choice = several(spec, target)
    if not set(target.features) <= set(HOST.features):
        pytest.skip(f"this processor is no {target.name}")
    build_artifact(spec, target, tmp_path / "kernel", choice=choice)
    kernel = load(tmp_path / "kernel")
    for n in range(2 * choice.layout.image_block + 3):
        sized = spec.with_batch(n)
        inputs, weight, *bias = integer_inputs(sized, seed=n)
        around = torch.full((inputs.numel() + 128,), math.nan, dtype=inputs.dtype)
        x = around[64 : 64 + inputs.numel()].view_as(inputs)
        out_around = torch.full((math.prod(sized.output_shape) + 128,), 77.0, dtype=inputs.dtype)
        out = out_around[64:-64].view(sized.output_shape)
        if spec.is_channels_last:
            x = x.view(n, spec.ih, spec.iw, spec.ci).permute(0, 3, 1, 2)
            out = out.view(n, spec.oh, spec.ow, spec.co).permute(0, 3, 1, 2)
        x.copy_(inputs)
        kernel(x, kernel.pack(weight), *bias, out=out)
        assert torch.equal(out.double(), reference(sized, inputs, weight, *bias)), n
        assert (out_around[:64] == 77).all() and (out_around[-64:] == 77).all()


@pytest.mark.parametrize("name", ["one position", "odd, channels_last"])
def test_any_batch_size_sums_to_the_bits_of_a_certain_one(name):
    spec = LAYERS[name]
    kernel = build(spec, choice=several(spec))
    for n in (1, 3, 8, 13):
        inputs = normal_inputs(spec.with_batch(n), seed=n)
        assert torch.equal(kernel(*inputs), build(spec.with_batch(n), tuned=False)(*inputs))
        assert torch.equal(kernel(*inputs)[-1:], kernel(inputs[0][-1:], *inputs[1:]))


def counting(size):
    """A kernel that adds the number of images in its tiles to the input."""
    data = te.placeholder((te.var("n"), 1), "float32", name="input")
    packed = te.placeholder((1,), "float32", name="packed")
    output = te.compute(data.shape, lambda n, c: data[n, c] + packed[0] * size, name="output")
    function = flatten_blocks(te.create_prim_func([data, packed, output]))
    return tvm.IRModule({"convt": function.with_attr("global_symbol", "convt")})


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        (
            (8, 4, 2, 1),
            {
                1: [1],
                2: [2, 2],
                3: [4, 4, 4],
                4: [4] * 4,
                5: [8] * 5,
                8: [8] * 8,
                9: [8] * 8 + [1],
                11: [8] * 8 + [4] * 3,
                13: [8] * 13,
                18: [8] * 16 + [2] * 2,
            },
        ),
        ((3, 1), {1: [1], 2: [3, 3], 3: [3] * 3, 4: [3] * 3 + [1], 5: [3] * 5}),
    ],
)
def test_a_batch_goes_to_the_largest_tiles_and_the_rest_to_the_smallest_that_takes_it_in(sizes, shares, tmp_path):
    module = join_kernels({size: counting(size) for size in sizes})
    run = tvm.compile(module, target="llvm")["convt"]
    for n, expected in shares.items():
        x, out = torch.arange(n, dtype=torch.float32)[:, None], torch.zeros(n, 1)
        run(x, torch.ones(1), out)
        assert (out - x)[:, 0].tolist() == expected, n


def test_smaller_tiles_take_the_same_packed_weight():
    for spec in (ONE, LAYERS["odd"], LAYERS["groups"]):
        choice = default_choice(spec, V4)
        rest = rest_choices(spec, V4, choice)
        sizes = [choice.layout.image_block, *(each.layout.image_block for each in rest)]
        assert len(sizes) > 1 and sizes[-1] == 1 and all(more // 2 == fewer for more, fewer in pairwise(sizes))
        assert {each.layout.co_block for each in rest} == {choice.layout.co_block}
    assert rest_choices(ONE.with_batch(8), V4, default_choice(ONE.with_batch(8), V4)) == []


def test_of_what_suits_one_image_the_best_for_several_comes_first():
    for spec in (ONE, LAYERS["odd"], resolve(["dcgan/2"])[0].spec):
        one, found = choices(spec.with_batch(1), V4), ranked_choices(replace(spec, n=None), V4)
        blocks = {choice.layout.co_block for choice in one if choice.cycles <= 1.01 * one[0].cycles}
        several = [choice for choice in choices(spec.with_batch(8), V4) if choice.layout.co_block in blocks]
        assert found[0] == next(choice for choice in several if choice.layout.image_block > 1)
        assert [each.layout for each in found if each.layout.image_block == 1] == [each.layout for each in one]
        assert found[0].cycles < 8 * one[0].cycles
    large = replace(ONE, ih=5, iw=4)
    assert ranked_choices(large, V4) == choices(large.sized, V4)


def test_a_batch_whose_last_tile_indices_cannot_count_is_refused(monkeypatch, tmp_path):
    spec = replace(ONE, ci=2)
    choice = several(spec)
    image, most = math.prod(spec.with_batch(1).output_shape), 2 * choice.layout.image_block
    monkeypatch.setattr(compiler, "MAX_ELEMENTS", image * (most + 1))
    build_artifact(spec, "llvm", tmp_path / "kernel", choice=choice)
    kernel = load(tmp_path / "kernel")
    x, w, b = normal_inputs(spec.with_batch(most + 1), seed=0)
    assert kernel(x[:most], w, b).shape[0] == most
    with pytest.raises(ArgumentError, match=f"the batch has more than {most} images; split it"):
        kernel(x, w, b)
