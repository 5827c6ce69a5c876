"""Copies of the input's window: short rows, by loads that leave lanes out."""

from itertools import islice
from math import prod

import pytest
import torch

from convt_tvm.compiler import build, lower_choice
from convt_tvm.layout import Window
from convt_tvm.space import choices
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

HOST = Target.parse("llvm")
SHORT = {
    "zeros on both sides": {"ci": 24, "ih": 14, "iw": 14, "k": 4, "s": 2, "p": 1},
    "few channels": {"ci": 3, "ih": 5, "iw": 9, "k": 3, "s": 2, "p": 1},
    "cropped": {"ci": 21, "ih": 14, "iw": 14, "k": 2, "s": 2, "p": 5},
    "one row": {"ci": 32, "ih": 1, "iw": 13, "k": 3, "s": 1, "p": 1},
    "no row left out": {"ci": 2, "ih": 3, "iw": 15, "k": 1, "s": 1, "p": 0},
    "three vectors": {"ci": 20, "ih": 4, "iw": 40, "k": 5, "s": 2, "p": 2},
    "seven half vectors": {"ci": 3, "ih": 4, "iw": 47, "k": 3, "s": 2, "p": 1},
}


def spec_of(case, dtype):
    sizes = dict(SHORT[case])
    kernel, stride, padding = (2 * (sizes.pop(name),) for name in "ksp")
    if sizes["ih"] == 1:
        kernel, stride, padding = (1, kernel[1]), (1, stride[1]), (0, padding[1])
    return ConvTranspose2dSpec(
        n=2, co=2, kernel_size=kernel, stride=stride, padding=padding, bias=False, dtype=dtype, **sizes
    )


def by_rows(spec, target):
    """Choices of all kinds of tiles with lanes along columns."""
    found = choices(spec, target, "llvm_columns")
    return {choice.layout.shape: choice for choice in islice(found, 40)}.values()


@pytest.mark.parametrize(
    ("dtype", "level"), [("float32", "x86-64-v3"), ("float32", "x86-64-v4"), ("float64", "x86-64-v4")]
)
@pytest.mark.parametrize("case", SHORT)
def test_short_rows_hold_the_image_and_zeros_and_nothing_around_it(case, dtype, level):
    target, spec = Target.parse(f"llvm:{level}"), spec_of(case, dtype)
    if not set(target.features) <= set(HOST.features):
        pytest.skip(f"this processor is no {level}")
    kinds = {Window.of(spec, choice.layout): choice for choice in by_rows(spec, target)}
    if dtype == "float32" and (level == "x86-64-v3" or case != "seven half vectors"):
        # In vectors of another length some of these rows are long.
        assert any("convt_some" in str(lower_choice(spec, target, choice)) for choice in kinds.values())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, spec.weight_shape, generator=generator).to(getattr(torch, dtype))
    around = torch.full((2 * 64 + prod(spec.input_shape),), float("nan"), dtype=weight.dtype)
    image = around[64:-64].view(spec.input_shape)
    image[:] = torch.randint(-3, 4, spec.input_shape, generator=generator)
    expected = torch.nn.functional.conv_transpose2d(image, weight, None, spec.stride, spec.padding)
    for choice in kinds.values():
        kernel = build(spec, target, choice=choice)
        assert torch.equal(kernel(image, kernel.pack(weight)), expected)
