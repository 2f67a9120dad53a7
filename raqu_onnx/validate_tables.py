"""Rules that one node's entry and the encoding tables of a manifest obey by themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.layout import WeightLayout
from raqu_onnx.manifest_build import ROW_ORDERS, encoding_entry
from raqu_onnx.tiling import ArrayGeometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raqu_onnx.manifest import Manifest

__all__ = [
    "activation_findings",
    "bits_findings",
    "encoding_findings",
    "kernel_order_findings",
    "matrix_findings",
    "name_findings",
    "rows_not_stored_findings",
]


def name_findings(manifest: Manifest) -> Iterator[str]:
    """Each mapped node stands once in `nodes`."""
    names = [node.name for node in manifest.nodes]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"node {name}: stands {names.count(name)} times in nodes"


def matrix_findings(manifest: Manifest) -> Iterator[str]:
    """G, K, M, the scale axis and the row order follow from the tensor's shape and the kind of layout."""
    for node in manifest.nodes:
        matrix, where = node.matrix, f"node {node.name}: matrix"
        least = {"conv": 3, "conv-transpose": 3}.get(matrix.kind, 2)
        if len(matrix.shape) < least or (least == 2 and (len(matrix.shape) > 2 or matrix.groups > 1)):
            yield f"{where}: {list(matrix.shape)} in {matrix.groups} groups is no {matrix.kind} weight"
            continue
        if least == 3 and matrix.shape[0] % matrix.groups:
            yield f"{where}.groups: {matrix.groups} does not divide {matrix.shape[0]}"
            continue
        if math.prod(matrix.shape) >= 2**40:
            yield f"{where}.shape: {list(matrix.shape)} is larger than any ONNX tensor"
            continue
        layout = WeightLayout(matrix.kind, matrix.shape, matrix.groups)
        for key, expected in (("rows", layout.rows), ("kernels", layout.kernels), ("scale_axis", layout.scale_axis)):
            if getattr(matrix, key) != expected:
                yield f"{where}.{key}: is {getattr(matrix, key)}, the shape {list(matrix.shape)} gives {expected}"
        if matrix.row_order != ROW_ORDERS[matrix.kind]:
            yield f"{where}.row_order: is not that of {matrix.kind}"


def bits_findings(manifest: Manifest) -> Iterator[str]:
    """Bits and scales cover the scale axis; dropped kernels are those with 0 bits. Needs `matrix_findings` to pass."""
    for node in manifest.nodes:
        where = f"node {node.name}"
        channels = node.matrix.shape[node.matrix.scale_axis]
        total = sum(count for _, count in node.bits)
        if total != channels:
            yield f"{where}: bits: run lengths add up to {total}, the scale axis has {channels}"
            continue
        if len(node.scales) != channels:
            yield f"{where}: scales: {len(node.scales)} of them, the scale axis has {channels}"
        dropped: set[int] = set()
        position = 0
        for bits, count in node.bits:
            if bits == 1:
                yield f"{where}: bits: a kernel of 1 bit at {position}; allowed are 0 and 2 to 8"
            if bits == 0:
                dropped.update(range(position, position + count))
            position += count
        listed = [range(first, min(last, channels + 1)) for first, last in node.dropped_kernels]
        numbers = [k for part in listed for k in part]
        if len(set(numbers)) < len(numbers) or set(numbers) != dropped or not all(listed):
            yield f"{where}: dropped_kernels: {_texts(node.dropped_kernels)} are not the kernels with 0 bits"


def activation_findings(manifest: Manifest) -> Iterator[str]:
    """The zero point is a code; the manifest is executable when every input is quantized."""
    for node in manifest.nodes:
        act = node.activation
        if act is not None and act.zero_point >= 1 << act.bits:
            yield f"node {node.name}: activation.zero_point: {act.zero_point} is no code of {act.bits} bits"
    executable = all(node.activation is not None for node in manifest.nodes)
    if executable != manifest.executable:
        yield f"executable: is {manifest.executable}, {'every' if executable else 'not every'} input is quantized"


def kernel_order_findings(manifest: Manifest) -> Iterator[str]:
    """The column order of each group is a permutation of its stored kernels. Needs `bits_findings` to pass."""
    for node in manifest.nodes:
        where = f"node {node.name}: kernel_order"
        layout = WeightLayout(node.matrix.kind, node.matrix.shape, node.matrix.groups)
        per_channel = np.repeat([bits for bits, _ in node.bits], [count for _, count in node.bits])
        bits = per_channel[layout.channel_index()]
        if node.kernel_order is None:
            if not bits.all():
                yield f"{where}: is null (all kernels), but some are dropped"
            continue
        if len(node.kernel_order) != layout.groups:
            yield f"{where}: {len(node.kernel_order)} groups, the matrix has {layout.groups}"
            continue
        for group, ranges in enumerate(node.kernel_order):
            if any(not first < last <= layout.kernels for first, last in ranges):
                yield f"{where}: group {group}: {_texts(ranges)} leave the {layout.kernels} kernels"
                continue
            counts = np.zeros(layout.kernels, np.int64)
            for first, last in ranges:
                counts[first:last] += 1
            wrong = np.flatnonzero(counts != (bits[group] > 0))
            if wrong.size:
                k = int(wrong[0])
                yield f"{where}: group {group}: kernel {k} of {bits[group, k]} bits stands {counts[k]} times"


def rows_not_stored_findings(manifest: Manifest) -> Iterator[str]:
    """Ranges of rows that are not stored lie in the matrix and do not overlap. Needs `matrix_findings` to pass."""
    for node in manifest.nodes:
        ends: dict[int, int] = {}
        for group, first, last in sorted(node.rows_not_stored):
            inside = group < node.matrix.groups and first < last <= node.matrix.rows
            if not inside or first < ends.get(group, 0):
                yield f"node {node.name}: rows_not_stored: [{group}, {first}, {last}] leaves the matrix or overlaps"
            ends[group] = last


def encoding_findings(manifest: Manifest) -> Iterator[str]:
    """There is one table for each crossbar type in use, and it is that of the chip's encoding."""
    chip = manifest.chip
    used: dict[int, set[int]] = {}
    for node in manifest.nodes:
        widths = {bits for bits, _ in node.bits if bits}
        for kind in {placement.type for placement in node.placements}:
            used.setdefault(kind, set()).update(widths)
    listed = [entry.crossbar_type for entry in manifest.encodings]
    if sorted(listed) != sorted(used):
        yield f"encodings: are for crossbar types {listed}, placements use {sorted(used)}"
    for entry in manifest.encodings:
        kind, where = entry.crossbar_type, f"encodings: crossbar type {entry.crossbar_type}"
        if kind >= len(chip.crossbars):
            yield f"{where}: chip.crossbars has {len(chip.crossbars)} types"
            continue
        own = sorted(used.get(kind, ()))
        expected = encoding_entry(kind, ArrayGeometry.of(chip, chip.crossbars[kind]), [b for b in own if b > 1])
        for key in type(entry).model_fields:
            if key != "widths" and getattr(entry, key) != getattr(expected, key):
                yield f"{where}: {key} is {getattr(entry, key)}, the chip's encoding has {getattr(expected, key)}"
        if [w.bits for w in entry.widths] != [w.bits for w in expected.widths]:
            yield f"{where}: widths are {[w.bits for w in entry.widths]}, its nodes use {own}"
            continue
        for got, want in zip(entry.widths, expected.widths, strict=True):
            if got != want:
                yield f"{where}: the table of {got.bits} bits is not that of {entry.scheme}"


def _texts(ranges: tuple[tuple[int, int], ...]) -> str:
    shown = [list(part) for part in ranges[:8]]
    return str(shown) + (f" and {len(ranges) - 8} more" if len(ranges) > 8 else "")
