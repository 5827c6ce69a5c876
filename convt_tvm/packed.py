"""A layer's packed weights."""

from typing import Any

import torch
from torch import Tensor

from convt_tvm.plan import Plan

__all__ = ["PackedWeights"]

_PACKINGS_KEPT = 8
_PROBES = 4


class PackedWeights:
    """A weight in the orders that kernels wanted so far, and how to tell that the weight is still the same.

    The weight's memory is kept alive, so that no later weight can be found at its address. What is compared: the
    version that PyTorch counts up at each change, address, shape, strides and dtype, and, on the CPU, 16 of the values,
    because a change through ``weight.data`` is not counted; reading them from a GPU would wait for it.
    """

    def __init__(self, weight: Tensor) -> None:
        self._anchor = weight.detach()
        self._version = weight._version
        self._address = weight.data_ptr()
        self._layout = (weight.shape, weight.stride(), weight.dtype)
        self._probe: Any = None
        if weight.is_cpu:
            words = self._anchor.view(torch.int16) if weight.dtype == torch.bfloat16 else self._anchor
            rows, columns = (max(1, size // _PROBES) for size in weight.shape[:2])
            # A view of the weight's own memory: reading it takes a tenth of what an operator of torch takes.
            self._probe = words.numpy()[: rows * _PROBES : rows, : columns * _PROBES : columns, -1, -1]
            self._probed = self._probe.tobytes()
        self._packed: dict[str, Tensor] = {}

    def are_of(self, weight: Tensor) -> bool:
        """Whether this is the weight that was packed, and unchanged as far as can be told."""
        return (
            weight._version == self._version
            and weight.data_ptr() == self._address
            and (weight.shape, weight.stride(), weight.dtype) == self._layout
            and (self._probe is None or self._probe.tobytes() == self._probed)
        )

    def get(self, plan: Plan) -> Tensor:
        """Return the weight as the kernel of `plan` wants it; the plan has a kernel."""
        packed = self._packed.get(plan.packing)
        if packed is None:
            assert plan.kernel is not None
            packed = plan.kernel.pack(self._anchor)
            if len(self._packed) >= _PACKINGS_KEPT:
                self._packed.clear()
            self._packed[plan.packing] = packed
        return packed
