"""What choices answer, by bits: with one thread and two, for a batch and for one of its images alone."""

from dataclasses import replace

import torch

from convt_tvm.check import bits
from convt_tvm.compiler import build
from convt_tvm.reference import normal_inputs
from convt_tvm.threads import get_num_threads, set_num_threads


def different_answers(spec, found):
    """How many there are for a batch of five images and more; the fifth has to have the same bits alone."""
    image, weight, bias = normal_inputs(spec, 0)
    threads, seen = get_num_threads(), set()
    try:
        for choice in found:
            kernel, alone = build(spec, choice=choice), build(replace(spec, n=None), choice=choice)
            for count in (1, 2):
                set_num_threads(count)
                output = kernel(image, kernel.pack(weight), bias)
                seen.add(bits(output).numpy().tobytes())
                one = alone(image[4:5].contiguous(), alone.pack(weight), bias)
                assert torch.equal(bits(one[0]), bits(output[4])), choice.layout
    finally:
        set_num_threads(threads)
    return len(seen)
