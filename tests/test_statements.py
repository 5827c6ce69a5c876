"""Statements of TIR: what is found in them."""

import tvm
from tvm import tirx

from convt_tvm.statements import ever


def test_a_condition_holds_ever_where_it_does_in_some_iteration():
    row, image, outer = (tirx.Var(name, "int32") for name in ("row", "image", "outer"))
    loops = [
        tirx.For(variable, 0, extent, tirx.ForKind.UNROLLED, tirx.Evaluate(0))
        for variable, extent in ((image, 2), (row, 3))
    ]
    found = ever(tirx.all(outer + row >= 4, outer - row < 3), loops)

    def value(number):
        analyzer = tvm.sym.Analyzer()
        analyzer.bind(outer, tirx.const(number, "int32"))
        return bool(analyzer.simplify(found))

    assert [value(number) for number in range(7)] == [False, False, True, True, True, False, False]
    assert bool(tvm.sym.Analyzer().simplify(ever(tirx.const(1, "bool"), loops)))
