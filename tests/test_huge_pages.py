"""Where packed weights live."""

import gc
import mmap

import numpy as np
import pytest
import torch

import convt_tvm
from convt_tvm.huge_pages import HUGE_PAGE_BYTES, anonymous_memory

LARGE = convt_tvm.ConvTranspose2dSpec(n=1, ci=512, ih=1, iw=1, co=256, kernel_size=2, bias=False)
"""Its packed weight has 2 MiB in every layout."""


def test_memory_of_a_page_or_more_begins_with_a_page_and_can_be_written():
    memory = anonymous_memory(HUGE_PAGE_BYTES)
    values = np.frombuffer(memory, np.float32)
    values[:] = 1
    assert values.nbytes == HUGE_PAGE_BYTES
    assert values.ctypes.data % mmap.PAGESIZE == 0
    assert anonymous_memory(HUGE_PAGE_BYTES - 1) is None


@pytest.mark.parametrize("pages", ["huge", "refused", "unknown"])
def test_packed_weights_give_the_same_whatever_pages_they_have(pages, monkeypatch):
    if pages == "refused":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    elif pages == "unknown":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    kernel = convt_tvm.build(LARGE, tuned=False)
    generator = torch.Generator().manual_seed(0)
    input, weight = (
        torch.randint(-4, 5, shape, generator=generator).float() for shape in (LARGE.input_shape, LARGE.weight_shape)
    )
    expected = torch.nn.functional.conv_transpose2d(input, weight)
    packed = kernel.pack(weight), torch.from_numpy(kernel.pack(weight.numpy()))
    gc.collect()
    for each in packed:
        assert each.data_ptr() % mmap.PAGESIZE == 0 or pages == "unknown"
        assert torch.equal(kernel(input, each), expected)
