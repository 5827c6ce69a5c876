"""Which kernel taps reach which output positions, and what they read: integers in, integers out.

Along one axis a transposed convolution with stride ``s``, padding ``p`` and dilation ``d`` adds the product of input
``i`` and tap ``t`` to output ``o = s*i - p + d*t``. Read backwards, output ``o`` gathers every tap ``t`` for which
``o + p - d*t`` is a multiple of ``s``. That depends on ``o`` only through its residue modulo ``s``: outputs
``o = s*q + a`` with one residue ``a`` form a *phase*. With ``g = gcd(s, d)``:

- if ``a + p`` is no multiple of ``g``, the phase has no taps and its outputs are the bias alone;
- otherwise its taps are ``t0, t0 + s/g, t0 + 2*s/g, ...`` below the kernel size, where ``t0`` is the smallest tap with
  ``(a + p - d*t0) % s == 0``;
- tap number ``u`` of the phase reads input ``q + base - u*(d/g)``, where ``base = (a + p - d*t0) / s`` is an integer.

So ``base`` is a constant of the phase: the division by the stride happens here, on Python integers, and never in the
index of a tensor program. (TVM 0.27 simplifies ``(n % 4 + 2) // 4`` to 0, see ``compute.py``.) Every kernel tap belongs
to exactly one phase, so the phases together multiply each weight with each input it meets, and no zeros at all.
"""

from dataclasses import dataclass
from functools import cached_property
from math import gcd

__all__ = ["Axis", "Phase"]


@dataclass(frozen=True, slots=True)
class Phase:
    """Outputs ``o = stride*q + residue``, ``0 <= q < count``, of one axis, and the taps that reach them.

    Tap number ``u``, ``0 <= u < taps``, is kernel index ``first_tap + u*tap_step`` and reads input
    ``q + base - u*input_step``; where that lies outside the image it contributes nothing.
    """

    residue: int
    count: int
    taps: int
    first_tap: int
    tap_step: int
    base: int
    input_step: int

    @property
    def kernel_indices(self) -> range:
        """Kernel indices of this phase's taps, in the order ``u = 0, 1, ...``."""
        return range(self.first_tap, self.first_tap + self.taps * self.tap_step, self.tap_step)


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a transposed convolution.

    Parameters
    ----------
    input_size, kernel_size, stride, dilation
        At least 1.
    padding
        At least 0; may exceed ``dilation * (kernel_size - 1)``, which crops the image itself.
    output_padding
        At least 0 and below ``max(stride, dilation)``.
    """

    input_size: int
    kernel_size: int
    stride: int
    padding: int
    output_padding: int
    dilation: int

    @cached_property
    def output_size(self) -> int:
        """Number of outputs: ``(input-1)*stride - 2*padding + dilation*(kernel-1) + output_padding + 1``."""
        return (
            (self.input_size - 1) * self.stride
            - 2 * self.padding
            + self.dilation * (self.kernel_size - 1)
            + self.output_padding
            + 1
        )

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in the order of their residues, one for each residue that has an output.

        Kept, as what follows, since a cost rule asks for it for each layout it considers.
        """
        g = gcd(self.stride, self.dilation)
        tap_step, input_step = self.stride // g, self.dilation // g
        found = []
        for residue in range(min(self.stride, self.output_size)):
            reach = residue + self.padding
            candidates = range(min(tap_step, self.kernel_size))
            first = next((t for t in candidates if (reach - t * self.dilation) % self.stride == 0), None)
            found.append(
                Phase(
                    residue=residue,
                    count=-(-(self.output_size - residue) // self.stride),
                    taps=0 if first is None else -(-(self.kernel_size - first) // tap_step),
                    first_tap=first or 0,
                    tap_step=tap_step,
                    base=0 if first is None else (reach - first * self.dilation) // self.stride,
                    input_step=input_step,
                )
            )
        return tuple(found)

    @cached_property
    def widest(self) -> int:
        """Outputs of the phase that has most."""
        return max(phase.count for phase in self.phases)

    @cached_property
    def most_taps(self) -> int:
        """Taps of the phase that has most."""
        return max(phase.taps for phase in self.phases)

    @cached_property
    def all_taps(self) -> int:
        """Taps of all phases together."""
        return sum(phase.taps for phase in self.phases)

    @cached_property
    def products(self) -> int:
        """Number of (input, tap) pairs whose product reaches an output."""
        total = 0
        for tap in range(self.kernel_size):
            # 0 <= s*i - p + d*t < output_size, solved for i
            shift = self.dilation * tap - self.padding
            first = max(0, -(shift // self.stride))
            last = min(self.input_size - 1, (self.output_size - 1 - shift) // self.stride)
            total += max(0, last - first + 1)
        return total
