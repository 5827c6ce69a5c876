"""Specs drawn by hypothesis, shared by the tests of declarations, schedules and kernels."""

import hypothesis
from hypothesis import strategies as st

from convt_tvm.errors import SpecError
from convt_tvm.fuzz import draw_spec


@st.composite
def drawn_specs(draw, **arguments):
    """What `draw_spec` makes of `arguments`; draws whose padding crops the whole output are rejected."""
    try:
        return draw_spec(lambda low, high: draw(st.integers(low, high)), **arguments)
    except SpecError:
        hypothesis.reject()
