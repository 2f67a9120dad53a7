"""How well models are packed into crossbars, against the lower bound, and how long that takes.

    python tools/bench_mapping.py                                  # every network, size and sharing mode at 8 bits
    python tools/bench_mapping.py --networks resnet50 --arrays 128 --sharing time --bits 4 mixed
    python tools/bench_mapping.py --networks vgg16-imagenet --arrays 128 --sharing time --manifest

`--bits mixed` draws 0 or 2 to 8 bits for every kernel, seeded. Square arrays have 2-bit cells, offset encoding with the
sum made digitally, and no counts; `hetero` is the built-in chip of that name, its counts ignored. `alone` is one node
in each crossbar; the gap is that of allocated cells; the last column compares them with the best single size alone.
With `--manifest`, the manifest of each placement is built with drawn scales, and its size and time are printed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from reference_models import REFERENCE_MODELS, write_reference_model

from raqu_onnx.annotations import MAPPED, mapped_nodes
from raqu_onnx.bundled import bundled_model
from raqu_onnx.hardware import Chip, Sharing, load_chip
from raqu_onnx.manifest_build import ManifestContext, build_manifest
from raqu_onnx.model_io import load_model
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.placement import Placement, PlacementMethod, place
from raqu_onnx.quantized import ActivationQuantizer, EmittedNames, QuantizedNode
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.layout import MappedNode

_BUNDLED = ("resnet20", "mobilenetv2")
_NETWORKS = (
    *(f"bundled:{name}" for name in _BUNDLED),
    "alexnet",
    "vgg16-imagenet",
    "resnet18",
    "resnet50",
    "mobilenetv2",
)
_EMITTED = ("weight", "scale", "bias", "input", "input_scale", "input_zero_point")
_ARRAYS = ("128", "256", "512", "hetero")
_WIDTHS = np.array([0, 2, 3, 4, 5, 6, 7, 8])


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        alone: Crossbars with one node in each.
        placement: The packed placement.
        best_alone: On a chip with several types, fewest allocated cells with only one of them.
        seconds: Wall time of packing.
    """

    alone: int
    placement: Placement
    best_alone: int | None
    seconds: float


def main() -> None:
    """Print the table that the command line asks for."""
    options = _options()
    print(_line("network", "bits", "array", "sharing", *_HEADERS))
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            nodes = read_nodes(network, Path(folder))
            for bits in options.bits:
                matrices = matrices_of(nodes, bits, options.seed)
                for array in options.arrays:
                    for sharing in options.sharing:
                        row = measure(matrices, chip_of(array, sharing), options.placement)
                        print(_line(network, bits, array, sharing, *_cells(row)), flush=True)
                        if options.manifest:
                            started = time.perf_counter()
                            size = manifest_bytes(nodes, row.placement, options.seed, Path(folder))
                            seconds = time.perf_counter() - started
                            print(f"    manifest: {size / 1e6:.1f} MB in {seconds:.1f} s", flush=True)


def read_nodes(network: str, folder: Path) -> list[MappedNode]:
    """The mapped nodes of a reference network or of `bundled:NAME`."""
    if network.startswith("bundled:"):
        path = folder / "bundled.onnx"
        path.write_bytes(bundled_model(network.removeprefix("bundled:")))
    else:
        path = write_reference_model(network, folder)
    model = TidyPass()(load_model(path, check_weights=False)).model
    AnnotateTilingPass()(model)
    return [MAPPED.require(node) for node in mapped_nodes(model)]


def matrices_of(nodes: Sequence[MappedNode], bits: str, seed: int) -> dict[str, Matrix]:
    """Weights at one width, or at widths drawn for every kernel."""
    rng = np.random.default_rng(seed)
    return {
        node.name: Matrix.of(node.layout, rng.choice(_WIDTHS, node.layout.channels) if bits == "mixed" else int(bits))
        for node in nodes
    }


def chip_of(array: str, sharing: Sharing) -> Chip:
    """The generic chip with square arrays of a size and no count, or `hetero` without counts."""
    chip = load_chip("hetero" if array == "hetero" else "generic")
    kinds = [
        kind.model_copy(update={"count": None} if array == "hetero" else {"count": None, "rows": n, "cols": n})
        for kind in chip.crossbars
        for n in [kind.rows if array == "hetero" else int(array)]
    ]
    return chip.model_copy(update={"crossbars": tuple(kinds), "sharing": sharing})


def manifest_bytes(nodes: Sequence[MappedNode], placement: Placement, seed: int, folder: Path) -> int:
    """Size of the manifest of a placement with drawn scales, 8-bit activations and the codes left out."""
    rng = np.random.default_rng(seed)
    quantized, emitted = [], {}
    for node in nodes:
        bits = _channel_bits(node, placement.matrices[node.name])
        scales = rng.uniform(1e-4, 1e-2, node.layout.channels).astype(np.float32)
        nothing = np.zeros(0, np.int8)
        quantized.append(QuantizedNode(node, bits, nothing, scales, None, None, ActivationQuantizer(8, 0.02, 0)))
        emitted[node.name] = EmittedNames(*(f"{node.name}.{part}" for part in _EMITTED))
    names = tuple(node.name for node in nodes)
    context = ManifestContext(
        tuple(quantized), emitted, placement, (), "0" * 64, None, {}, seed, names, dict.fromkeys(names, ())
    )
    path = folder / "manifest.json"
    build_manifest(context).write(path)
    return path.stat().st_size


def _channel_bits(node: MappedNode, matrix: Matrix) -> NDArray[np.int64]:
    bits = np.zeros(node.layout.channels, np.int64)
    bits[node.layout.channel_index()] = matrix.bits
    return bits


def measure(matrices: Mapping[str, Matrix], chip: Chip, method: PlacementMethod) -> Row:
    """Pack once and compare."""
    started = time.perf_counter()
    placement = place(matrices, chip, method=method)
    seconds = time.perf_counter() - started
    best = None
    if len(chip.crossbars) > 1:
        singles = (chip.model_copy(update={"crossbars": (kind,)}) for kind in chip.crossbars)
        best = min(place(matrices, single).allocated_cells for single in singles)
    return Row(place(matrices, chip, sharing="exclusive").crossbars, placement, best, seconds)


_HEADERS = ("alone", "packed", "bound", "gap", "cells", "bits", "seconds", "against best single size")


def _cells(row: Row) -> tuple[str, ...]:
    placement = row.placement
    against = "" if row.best_alone is None else f"{placement.allocated_cells / row.best_alone - 1:+.2%} cells"
    return (
        str(row.alone),
        str(placement.crossbars),
        str(placement.lower_bound),
        f"{placement.gap:.2%}",
        f"{placement.cell_utilization:.1%}",
        f"{placement.bit_utilization:.1%}",
        f"{row.seconds:.2f}",
        against,
    )


def _line(*values: str) -> str:
    widths = (20, 6, 7, 10, 7, 7, 7, 8, 7, 7, 8, 12)
    return " ".join(
        value.ljust(width) if index < 4 else value.rjust(width)
        for index, (value, width) in enumerate(zip(values, widths, strict=True))
    ).rstrip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="pack networks into crossbars and compare with the lower bound")
    known = (*(f"bundled:{name}" for name in _BUNDLED), *REFERENCE_MODELS)
    widths = (*(str(bits) for bits in _WIDTHS[1:]), "mixed")
    parser.add_argument("--networks", nargs="+", choices=known, default=_NETWORKS)
    parser.add_argument("--arrays", nargs="+", choices=(*_ARRAYS, "64"), default=_ARRAYS)
    parser.add_argument("--sharing", nargs="+", choices=get_args(Sharing), default=get_args(Sharing))
    parser.add_argument("--bits", nargs="+", choices=widths, default=("8",))
    parser.add_argument("--placement", choices=get_args(PlacementMethod), default="fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--manifest", action="store_true", help="build the manifest too and print its size")
    return parser.parse_args()


if __name__ == "__main__":
    main()
