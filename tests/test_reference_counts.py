"""Crossbars of well-known networks, counted by hand and by other tools, found again to the last crossbar."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from raqu_onnx.annotations import MAPPED, mapped_nodes, unmapped_nodes
from raqu_onnx.hardware import Chip, Sharing
from raqu_onnx.layout import MappedNode
from raqu_onnx.model_io import load_model
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.placement import count_crossbars, geometries, place
from raqu_onnx.tiling import Matrix

#: Array size, weight bits, cell bits.
SETTINGS = ((128, 8, 2), (128, 8, 1), (256, 8, 2), (256, 8, 1), (512, 8, 2), (128, 4, 2))

#: Per network its nodes, its weights, and crossbars in the order of SETTINGS.
COUNTS = {
    "alexnet": (8, 61_090_496, (14948, 29864, 3741, 7482, 941, 7474)),
    "vgg16-imagenet": (16, 138_344_128, (33804, 67576, 8456, 16912, 2122, 16902)),
    "vgg16-cifar": (14, 14_715_584, (3600, 7196, 906, 1810, 235, 1802)),
    "vgg8-cifar": (8, 12_973_440, (3176, 6344, 800, 1596, 206, 1592)),
    "resnet18": (21, 11_678_912, (2864, 5724, 727, 1454, 199, 1432)),
    "resnet20-cifar": (20, 268_336, (87, 160, 36, 53, 25, 59)),
    "resnet20-projections": (22, 270_608, (90, None, 38, None, 27, None)),
    "resnet50": (54, 25_502_912, (6260, 12504, 1595, 3190, 452, 3130)),
    "mobilenetv2": (53, 3_469_760, (1529, 2526, 579, 866, 266, 1048)),
}

#: Cell utilization in percent, as published with the counts.
UTILIZATION = {
    "alexnet": (99.8, 99.9, 99.7, 99.7, 99.1, 99.8),
    "vgg16-imagenet": (99.9, None, None, None, 99.5, None),
    "vgg16-cifar": (99.8, None, 99.1, None, 95.5, None),
    "vgg8-cifar": (99.7, None, 99.0, None, 96.1, None),
    "resnet18": (99.6, None, 98.1, None, 89.6, None),
    "resnet20-cifar": (75.3, 81.9, 45.5, 61.8, 16.4, 55.5),
    "resnet20-projections": (None,) * 6,
    "resnet50": (99.5, None, 97.6, None, 86.1, None),
    "mobilenetv2": (None,) * 6,
}


class _UnreadWeights(np.ndarray):
    """An array that has a shape and a type, and no values to look at."""

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a weight was computed with")

    def __array_function__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a weight was looked at")


def _unread(tensor: ir.ExternalTensor) -> np.ndarray:
    zeros = np.broadcast_to(np.float32(0), tensor.shape.numpy())
    return zeros if zeros.ndim < 2 else zeros.view(_UnreadWeights)  # biases are short


def _forbidden(tensor: ir.ExternalTensor, *_: Any) -> None:
    raise AssertionError(f"{tensor.name} was read from disk")


@pytest.fixture(scope="module", params=sorted(COUNTS))
def network(
    request: pytest.FixtureRequest, reference_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[MappedNode]]:
    """A network's name and its mapped nodes, found without a look at any weight."""
    path = reference_models.write_reference_model(request.param, tmp_path_factory.mktemp("reference"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ir.ExternalTensor, "numpy", _unread)
        for method in ("tobytes", "tofile"):
            patch.setattr(ir.ExternalTensor, method, _forbidden)
        model = load_model(path, check_weights=False)
        model = AnnotateTilingPass()(TidyPass()(model).model).model
    assert unmapped_nodes(model) == []
    return request.param, [MAPPED.require(node) for node in mapped_nodes(model)]


def chip_of(size: int, cell_bits: int, sharing: Sharing = "exclusive") -> Chip:
    crossbar = {"name": "main", "rows": size, "cols": size, "cell_bits": cell_bits}
    return Chip.model_validate(
        {
            "schema_version": 1,
            "name": "reference",
            "encoding": "offset",
            "sharing": sharing,
            "dac_bits": 1,
            "crossbars": [crossbar],
        }
    )


def test_nodes_and_weights(network: tuple[str, list[MappedNode]]) -> None:
    name, nodes = network
    assert (len(nodes), sum(node.weights for node in nodes)) == COUNTS[name][:2]
    # The batch is open, and still every product per sample is known.
    assert all(node.mvms for node in nodes)


def test_crossbars_and_utilization(network: tuple[str, list[MappedNode]]) -> None:
    name, nodes = network
    for setting, expected, percent in zip(SETTINGS, COUNTS[name][2], UTILIZATION[name], strict=True):
        if expected is None:
            continue
        size, bits, cell_bits = setting
        chip = chip_of(size, cell_bits)
        matrices = [Matrix.of(node.layout, bits) for node in nodes]
        crossbars = sum(count_crossbars(matrix, chip) for matrix in matrices)
        assert crossbars == expected, setting
        if percent is not None:
            cells = sum(matrix.cells(geometries(chip)[0].encoding) for matrix in matrices)
            assert round(100 * cells / (crossbars * size * size), 1) == percent, setting


@pytest.mark.parametrize("network", ["resnet20-projections"], indirect=True)
@pytest.mark.parametrize(
    ("bits", "sharing", "crossbars"),
    [
        (8, "exclusive", 90),
        (8, "time", 67),
        (4, "exclusive", 61),
        (4, "time", 34),
        (2, "exclusive", 61),
        (2, "time", 17),
    ],
)
def test_packed(network: tuple[str, list[MappedNode]], bits: int, sharing: Sharing, crossbars: int) -> None:
    """ResNet-20 on 128 x 128 crossbars of 2-bit cells: packed in time it takes no more than its cells need."""
    matrices = {node.name: Matrix.of(node.layout, bits) for node in network[1]}
    placement = place(matrices, chip_of(128, 2, sharing))
    assert placement.crossbars == crossbars
    if sharing == "time":
        assert placement.lower_bound == crossbars


@pytest.mark.parametrize("name", ["resnet20-cifar", "resnet20-projections", "resnet50"])
def test_the_models_are_valid_and_take_no_disk(reference_models: ModuleType, tmp_path: Path, name: str) -> None:
    path = reference_models.write_reference_model(name, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    data = path.with_name(f"{name}.onnx.data").stat()
    assert data.st_size >= 4 * COUNTS[name][1]
    assert data.st_blocks == 0
    assert path.stat().st_size < 100_000
    # Even the check of all weights passes: they are zeros.
    load_model(path)


def test_every_network_is_counted(reference_models: ModuleType) -> None:
    assert sorted(reference_models.REFERENCE_MODELS) == sorted(COUNTS)
