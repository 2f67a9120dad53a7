"""What the cells file holds, for a reader that knows the manifest and nothing else."""

from __future__ import annotations

from typing import Any

__all__ = ["ARRAY_NAME", "cells_format"]

#: Names of the arrays: the crossbar type's name and the number of the physical crossbar, of at least six digits.
ARRAY_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*/[0-9]{6,}$"


def cells_format() -> dict[str, Any]:
    """The description that `raqu-onnx manifest schema cells` prints, as JSON values."""
    return {
        "title": "cells.npz: the level of every cell of every crossbar in use",
        "schema_version": 1,
        "written_by": "raqu-onnx optimize --cells",
        "format": "NumPy .npz: a zip archive of .npy files of version 1.0; numpy.load reads it without pickle",
        "arrays": {
            "which": "one for each crossbar number that a placement of the manifest names, and no other; with several "
            "partitions, what an array holds in one of them has a number of its own (partitions[].crossbars)",
            "name": "TYPE/NUMBER: chip.crossbars[placement.type].name, a slash, and placement.crossbar in six digits "
            "or more, such as main/000012",
            "name_pattern": ARRAY_NAME,
            "dtype": "uint8",
            "shape": ["chip.crossbars[type].rows", "chip.crossbars[type].cols"],
            "axes": ["wordline", "bitline"],
            "values": "levels, 0 to 2**cell_bits - 1",
        },
        "cells": {
            "in_a_placement": "inside placement.rows x placement.cols lie the slices of the weights that "
            "weight_rows, columns and kernels name; encodings[].widths[].slices says by column and row which slice of "
            "a weight a cell is",
            "flipped": "bitlines that placement.flipped counts hold 2**cell_bits - 1 - level instead of level",
            "unit_column": "the bitline placement.unit_column holds 1 in each of the placement's rows",
            "elsewhere": "0",
        },
        "polarity": {
            "offset": "none: a cell holds bits of code + 2**(bits - 1), which is encodings[].widths[].offset too much",
            "differential-column": "slices of max(code, 0) have sign 1, those of max(-code, 0) sign -1. In one array "
            "(arrays_per_placement 1) they lie side by side; in a pair (2) at the same place in crossbar 2n, whose "
            "placements have polarity positive, and 2n + 1, negative",
            "differential-row": "of the two wordlines of a weight the first holds max(code, 0), the second "
            "max(-code, 0) and is driven with the negative input",
            "twos-complement": "the last slice is the sign bit, with sign -1 and shift bits - 1",
        },
        "a_code_from_its_cells": "sum over its slices of sign * 2**shift * level, minus offset; it equals the element "
        "of the ONNX initializer nodes[].weight",
        "see": "`raqu-onnx manifest schema` for the keys named here",
    }
