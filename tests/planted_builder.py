"""A builder process in which one layout's gather is off by one column: ``python -m planted_builder LAYOUT build``."""

import json
import sys

from convt_tvm import compute, trials

PLANTED = json.loads(sys.argv[1])
accumulate = compute._accumulate


def off_by_one(spec, layout, band, window, packed, origin, columns):
    row, column = origin
    wrong = layout.to_json() == PLANTED
    return accumulate(spec, layout, band, window, packed, (row, column - 1) if wrong else origin, columns)


if __name__ == "__main__":
    compute._accumulate = off_by_one
    trials.main(sys.argv[2:])
