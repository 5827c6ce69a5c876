"""What the tests of emulated CUDA kernels share: whether there is a toolkit, how one is run, and how one is spoiled."""

import pytest
import torch

from convt_tvm import emulator
from convt_tvm.cuda_toolkit import find_toolkit
from convt_tvm.errors import BuildError
from convt_tvm.reference import integer_inputs, reference
from convt_tvm.space import choices

try:
    find_toolkit()
    MISSING = ""
except BuildError as error:
    MISSING = str(error)

needs_toolkit = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def cheapest(spec, target, name):
    """The cheapest choice of one schedule space."""
    return choices(spec, target, name)[0]


def is_exact(kernel):
    """Whether a kernel gives the reference's integers."""
    inputs = integer_inputs(kernel.spec, seed=0)
    return torch.equal(kernel(*inputs).double(), reference(kernel.spec, *inputs))


def plant(monkeypatch, before, after):
    """Change the C++ of every emulated kernel."""
    honest = emulator._translate

    def translate(code):
        head, device, body = honest(code).partition('extern "C" __global__ void __launch_bounds__')
        assert before in body
        return head + device + body.replace(before, after)

    monkeypatch.setattr(emulator, "_translate", translate)
