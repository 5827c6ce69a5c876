"""A builder process in which one layout's gather is off by one column: ``python -m planted_builder LAYOUT build``."""

import json
import sys
from dataclasses import replace

from convt_tvm import compute, trials

sum_products = compute.sum_products


def plant(planted):
    def off_by_one(spec, layout, band, source, *others):
        row, column = source.origin
        if layout.to_json() == planted:
            source = replace(source, origin=(row, column - 1))
        return sum_products(spec, layout, band, source, *others)

    compute.sum_products = off_by_one


if __name__ == "__main__":
    plant(json.loads(sys.argv[1]))
    trials.main(sys.argv[2:])
