"""Whether a kernel gives the same bits on every run, for any number of threads and at any place in a batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch

from convt_tvm import runtime
from convt_tvm.check import Operator, bits, thread_count
from convt_tvm.errors import BuildError
from convt_tvm.reference import Inputs, normal_inputs
from convt_tvm.runtime import Kernel
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["RUNS", "Make", "compare_repeats", "confirm_repeats"]

Make: TypeAlias = Callable[[ConvTranspose2dSpec], Operator]
"""What gives an implementation for a spec."""

RUNS = 10
"""Calls on the same data unless told otherwise; enough for a race that shows once in two calls to escape once in a
thousand times."""


def compare_repeats(
    spec: ConvTranspose2dSpec, make: Make, *, seed: int, threads: Sequence[int], runs: int = RUNS
) -> Iterator[tuple[str, str]]:
    """Pairs of what was repeated and how it differed, in words; the words are empty for the same bits.

    Parameters
    ----------
    make
        Called with the spec and with specs that differ in ``n``.
    threads
        Sizes for the thread pools.
    runs
        Calls with each number of threads.
    """
    operator, inputs = make(spec), normal_inputs(spec, seed)
    with thread_count(threads[0]):
        first = bits(operator(*inputs)).clone()
        yield f"{runs} runs", _differing(first, operator, inputs, runs - 1)
    for count in threads[1:]:
        with thread_count(count):
            yield f"{threads[0]} and {count} threads", _differing(first, operator, inputs, runs)
    if isinstance(operator, Kernel):
        with TemporaryDirectory(prefix="convt-tvm-check-") as directory, thread_count(threads[0]):
            operator.save(Path(directory) / "kernel")
            yield "loaded and built", _differing(first, runtime.load(Path(directory) / "kernel"), inputs, 1)
    if spec.n:
        with thread_count(threads[0]):
            yield from _compare_batch(spec, make, seed)


def _differing(first: torch.Tensor, operator: Operator, inputs: Inputs, runs: int) -> str:
    """What the first differing call gave, in words; empty if none differed."""
    for run in range(runs):
        other = bits(operator(*inputs))
        if not torch.equal(first, other):
            return f"{int((first != other).sum())} of {first.numel()} outputs have other bits in call {run + 2}"
    return ""


def _compare_batch(spec: ConvTranspose2dSpec, make: Make, seed: int) -> Iterator[tuple[str, str]]:
    """Each item of a batch of two or more with the same item in a batch of one."""
    many, one = replace(spec, n=max(2, spec.n or 0)), replace(spec, n=1)
    input, weight, bias = normal_inputs(many, seed)
    together, alone = make(many)(input, weight, bias).clone(), make(one)
    problem = ""
    for item in range(len(input)):
        single = alone(input[item : item + 1], weight, bias)
        if (wrong := bits(single) != bits(together[item : item + 1])).any():
            problem = (
                f"{int(wrong.sum())} of {wrong.numel()} outputs of item {item} have other bits than the item alone"
            )
            break
    yield f"{many.n} items together and alone", problem


def confirm_repeats(
    kernel: Kernel, make: Make, *, threads: Sequence[int], seed: int = 0, runs: int = RUNS
) -> dict[str, Any]:
    """What an artifact's manifest says of a kernel whose bits repeat: ``runs``, ``threads`` and ``same_bits``.

    Parameters
    ----------
    make
        Gives kernels for specs that differ in ``n``.

    Raises
    ------
    BuildError
        if they do not repeat.
    """

    def own_or_made(spec: ConvTranspose2dSpec) -> Operator:
        return kernel if spec == kernel.spec else make(spec)

    same = []
    for what, problem in compare_repeats(kernel.spec, own_or_made, seed=seed, threads=threads, runs=runs):
        if problem:
            raise BuildError(f"{kernel.spec.name} does not repeat ({what}): {problem}.")
        same.append(what)
    return {"runs": runs, "threads": list(threads), "same_bits": same}
