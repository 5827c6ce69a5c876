"""Where the kernels of a target run: the memory of their tensors, and whose clock times them.

All that checks, compares, times and tunes is the same for processors and GPUs but for this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch

from convt_tvm.errors import TargetError
from convt_tvm.gpu import describe_gpu
from convt_tvm.measure import TimeCalls
from convt_tvm.reference import Inputs
from convt_tvm.target import Target

__all__ = ["GpuStopwatch", "Place"]

GRAPH_CALLS = 1000
"""A graph holds at most so many calls, and is replayed for more."""


@dataclass(frozen=True, slots=True)
class Place:
    """The processor, or torch's current GPU.

    Parameters
    ----------
    device
        Torch's name of the kind of device.
    cold
        Time GPUs with their second cache overwritten before each call. Otherwise calls follow each other, as they do on
        processors, and find what fits into caches there.
    """

    device: Literal["cpu", "cuda"]
    cold: bool = False

    @classmethod
    def of(cls, target: Target, *, cold: bool = False) -> "Place":
        """Where kernels for `target` run; raises TargetError for a processor whose caches are to be cold."""
        if target.kind == "cuda":
            return cls("cuda", cold)
        if cold:
            raise TargetError(f"caches are emptied on GPUs only, not for {target.name}; leave out --cold.")
        return cls("cpu")

    def put(self, inputs: Inputs) -> Inputs:
        """The same tensors there, themselves where they are there already."""
        input, weight, bias = inputs
        return input.to(self.device), weight.to(self.device), None if bias is None else bias.to(self.device)

    def on_cpu_tensors(self, operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """An operator of tensors there as one that takes and gives those of the processor."""

        def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return operator(*self.put((input, weight, bias))).cpu()

        return operator if self.device == "cpu" else run

    def time_calls(self) -> TimeCalls | None:
        """What `convt_tvm.measure.interleaved` takes the time with; None is its own clock."""
        return GpuStopwatch(cold=self.cold) if self.device == "cuda" else None

    def settle_secs(self, processor: float) -> float:
        """How long a contender runs untimed before each sample: once on a GPU, whose calls return before they end."""
        return processor if self.device == "cpu" else 0.0

    def describe(self) -> dict[str, Any]:
        """What rows say about the place besides `convt_tvm.machine.Machine`: the GPU, its driver and its clocks now."""
        return {"gpu": describe_gpu()} if self.device == "cuda" else {}


class GpuStopwatch:
    """Seconds that calls take on torch's current GPU, between two of its events.

    Calls are captured in a CUDA graph and replayed, so that what launching costs the processor does not count, neither
    for ours nor for others. With cold caches each call has two events of its own, and before the first of them a buffer
    twice the size of the second cache is written; that takes long enough for the launches of the call to be queued.
    """

    def __init__(self, *, cold: bool = False) -> None:
        self._graphs: dict[tuple[Callable[[], object], int], Any] = {}
        self._buffer: torch.Tensor | None = None
        if cold:
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self._buffer = torch.empty(2 * size, dtype=torch.int8, device="cuda")

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        """Seconds of so many calls."""
        return self._replay(function, calls) if self._buffer is None else self._call(function, calls, self._buffer)

    def _replay(self, function: Callable[[], object], calls: int) -> float:
        held = min(calls, GRAPH_CALLS)
        if (function, held) not in self._graphs:
            # Whatever a library does once, it does outside of the graph.
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(held):
                    function()
            graph.replay()
            self._graphs[function, held] = graph
        graph, replays = self._graphs[function, held], ceil(calls / held)
        start, end = _event(), _event()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 * calls / (replays * held)

    def _call(self, function: Callable[[], object], calls: int, buffer: torch.Tensor) -> float:
        events = [(_event(), _event()) for _ in range(min(calls, GRAPH_CALLS))]
        for start, end in events:
            buffer.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in events) / 1e3 * calls / len(events)


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make(enable_timing=True)
