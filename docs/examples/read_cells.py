"""Rebuild the weight codes of every layer from the cells: numpy and the standard library, nothing else."""

import json
import sys
from pathlib import Path

import numpy as np


def spread(ranges):
    """[[0, 3], [5, 6]] -> 0 1 2 5."""
    return np.concatenate([np.arange(0), *(np.arange(first, end) for first, end in ranges)])


def expand(runs):
    """[[4, 2], [3, 1]] -> 4 4 3."""
    return np.repeat([value for value, _ in runs], [count for _, count in runs])


def matrices(node, manifest, cells):
    """One node's codes as integers of shape (groups, rows, kernels), from its first copy."""
    groups, rows, kernels = (node["matrix"][key] for key in ("groups", "rows", "kernels"))
    codes, bits = np.zeros((groups, rows, kernels), int), expand(node["bits"])
    for place in node["placements"]:
        if place["replica"]:  # every replica holds the whole node
            continue
        encoding = next(item for item in manifest["encodings"] if item["crossbar_type"] == place["type"])
        widths = {width["bits"]: width for width in encoding["widths"]}
        kind = manifest["chip"]["crossbars"][place["type"]]
        levels = cells[f"{kind['name']}/{place['crossbar']:06d}"].astype(int)
        levels = levels[slice(*place["rows"]), slice(*place["cols"])]
        flipped = expand([[index % 2, run] for index, run in enumerate(place["flipped"])]) if place["flipped"] else []
        for column in np.flatnonzero(flipped):  # stored inverted, so that the ADC does not clip
            levels[:, column] = 2 ** kind["cell_bits"] - 1 - levels[:, column]
        group, step = place["group"], encoding["rows_per_weight"]
        skipped = spread([span[1:] for span in node["rows_not_stored"] if span[0] == group])
        stored_rows = np.setdiff1d(np.arange(rows), skipped)[slice(*place["weight_rows"])]
        order = np.arange(kernels) if node["kernel_order"] is None else spread(node["kernel_order"][group])
        column = -place["first_slice"]  # bitline of the placement at which the kernel's first slice lies
        for kernel in order[slice(*place["kernels"])]:
            width = widths[bits[(group * kernels + kernel) % len(bits)]]
            if column >= 0:  # the offset belongs to the first slice
                codes[group, stored_rows, kernel] -= width["offset"]
            for part in width["slices"]:
                at = column + part["column"]
                own_array = place["polarity"] in (None, part["polarity"])
                if own_array and 0 <= at < place["columns"][1] - place["columns"][0]:
                    level = levels[part["row"] :: step, at]
                    codes[group, stored_rows, kernel] += part["sign"] * level * 2 ** part["shift"]
            column += width["columns"]
    return codes


def tensor(node, codes):
    """The codes in the shape of the ONNX initializer `node["weight"]`; see matrix.row_order."""
    shape, kind = node["matrix"]["shape"], node["matrix"]["kind"]
    if kind == "conv":
        return codes.transpose(0, 2, 1).reshape(shape)
    if kind == "conv-transpose":  # the kernel is flipped
        taps = codes.reshape(node["matrix"]["groups"], -1, int(np.prod(shape[2:])), shape[1])
        return np.flip(taps.transpose(0, 1, 3, 2).reshape(shape), tuple(range(2, len(shape))))
    return codes[0] if kind == "in-out" else codes[0].T


def rebuild(folder):
    """Codes by the name of the ONNX initializer; times the node's scales they are the weights."""
    manifest = json.loads(Path(folder, "manifest.json").read_text())
    with np.load(Path(folder, "cells.npz")) as cells:
        return {node["weight"]: tensor(node, matrices(node, manifest, cells)) for node in manifest["nodes"]}


if __name__ == "__main__":
    for name, codes in rebuild(sys.argv[1]).items():
        print(f"{name}: {codes.shape}, codes {codes.min()} to {codes.max()}")
