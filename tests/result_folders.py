"""Result folders made without a run, and ways to damage them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from raqu_onnx.cells import write_cells
from raqu_onnx.encodings import code_range
from raqu_onnx.graph_edit import infer_shapes
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.layout import MappedNode
from raqu_onnx.manifest import DataProvenance, digest_of
from raqu_onnx.manifest_build import ManifestContext, build_manifest
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.mapping import scan
from raqu_onnx.model_io import load_model, model_digest
from raqu_onnx.placement import place
from raqu_onnx.quantized import ActivationQuantizer, EmittedNames, QuantizedNode
from raqu_onnx.tiling import Matrix
from raqu_onnx.validate_phases import FolderChecks
from raqu_onnx.validate_report import Checklist, ValidationReport

Json = dict[str, Any]


@dataclass
class FloatModel:
    """A float model under construction."""

    nodes: list[onnx.NodeProto]
    weights: dict[str, np.ndarray]

    def add(self, op: str, x: str, shape: tuple[int, ...] | None = None, bias: int = 0, **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        inputs = [x]
        if shape is not None:
            self.weights[f"{name}_w"] = np.zeros(shape, np.float32)
            inputs.append(f"{name}_w")
        if bias:
            self.weights[f"{name}_b"] = np.zeros(bias, np.float32)
            inputs.append(f"{name}_b")
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_y"], name=name, **attributes))
        return f"{name}_y"


def picture_net() -> onnx.ModelProto:
    """Every mappable operator, grouped ones and one node that cannot be mapped."""
    m = FloatModel([], {})
    y = m.add("Conv", "x", (8, 3, 3, 3), bias=8, strides=[2, 2], pads=[1, 0, 1, 1])
    y = m.add("Relu", y)
    y = m.add("Conv", y, (8, 1, 3, 3), bias=8, group=8, auto_pad="SAME_UPPER")
    y = m.add("ConvTranspose", y, (8, 3, 2, 3), group=2, strides=[2, 1], pads=[0, 1, 0, 0], output_padding=[1, 0])
    y = m.add("Flatten", y)
    m.weights["skip_w"] = np.zeros((9, 6 * 9 * 5), np.float32)
    m.nodes.append(helper.make_node("Gemm", [y, "skip_w"], ["gemm_y"], name="gemm", transB=1))
    out = m.add("MatMul", "gemm_y", (9, 5))
    m.nodes.append(helper.make_node("Transpose", [out], ["turned"], name="turn"))
    m.nodes.append(helper.make_node("MatMul", [out, "turned"], ["gram"], name="gram"))
    return float_model(m, [2, 3, 8, 8], [out, "gram"])


def float_model(m: FloatModel, shape: list[int], outputs: list[str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        m.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in m.weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def quantize(
    node: MappedNode, encoding: str, rng: np.random.Generator, widths: tuple[int, ...], bits: int
) -> QuantizedNode:
    layout = node.layout
    channel_bits = rng.choice(widths, layout.channels)
    limits = np.array([code_range(encoding, int(b)) for b in channel_bits])  # type: ignore[arg-type]
    along = [1] * len(layout.shape)
    along[layout.scale_axis] = -1
    codes = rng.integers(limits[:, 0].reshape(along), limits[:, 1].reshape(along) + 1, layout.shape).astype(np.int8)
    bias = None
    if node.bias_name is not None:
        bias = rng.integers(-2000, 2001, layout.groups * layout.kernels).astype(np.int32)
        bias[channel_bits[layout.channel_index().reshape(-1)] == 0] = 0
    scales = (rng.uniform(0.5, 1.0, layout.channels) / np.maximum(1, limits[:, 1])).astype(np.float32)
    activation = ActivationQuantizer(bits, float(np.float32(6 / ((1 << bits) - 1))), (1 << bits) // 3)
    return QuantizedNode(node, channel_bits, codes, scales, bias, None, activation)


def emit(source: onnx.ModelProto, quantized: list[QuantizedNode]) -> tuple[onnx.ModelProto, dict[str, EmittedNames]]:
    """The QDQ model, and the names in it."""
    model = copy.deepcopy(source)
    graph, by_name = model.graph, {item.node.name: item for item in quantized}
    replaced = {name for item in quantized for name in (item.node.weight_name, item.node.bias_name)}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    nodes, names = [], {}

    def constant(name: str, array: np.ndarray) -> str:
        kept.append(numpy_helper.from_array(array, name))
        return name

    for node in graph.node:
        item = by_name.get(node.name)
        if item is not None:
            base, slot, act = node.name, 0 if item.node.constant_left else 1, item.activation
            assert act is not None
            sx = constant(f"{base}_sx", np.array(act.scale, np.float32))
            zx = constant(f"{base}_zx", np.array(act.zero_point, np.uint8))
            code = f"{base}_xq"
            nodes.append(helper.make_node("QuantizeLinear", [node.input[1 - slot], sx, zx], [code], f"{base}_q"))
            if act.bits < 8:
                low = constant(f"{base}_low", np.array(0, np.uint8))
                high = constant(f"{base}_high", np.array(act.levels, np.uint8))
                nodes.append(helper.make_node("Clip", [code, low, high], [f"{base}_xc"], f"{base}_clip"))
                code = f"{base}_xc"
            nodes.append(helper.make_node("DequantizeLinear", [code, sx, zx], [f"{base}_xd"], f"{base}_dq"))
            wq, sw = constant(f"{base}_wq", item.codes), constant(f"{base}_sw", item.scales)
            zw = constant(f"{base}_zw", np.zeros(item.scales.shape, np.int8))
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", [wq, sw, zw], [f"{base}_wd"], f"{base}_wdq", axis=item.node.layout.scale_axis
                )
            )
            node.input[1 - slot], node.input[slot] = f"{base}_xd", f"{base}_wd"
            bq = None
            if item.bias is not None:
                bq, sb = constant(f"{base}_bq", item.bias), constant(f"{base}_sb", item.bias_scales())
                nodes.append(helper.make_node("DequantizeLinear", [bq, sb], [f"{base}_bd"], f"{base}_bdq", axis=0))
                node.input[2] = f"{base}_bd"
            names[base] = EmittedNames(wq, sw, bq, code, sx, zx)
        nodes.append(node)
    copies = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model, names


def small_chip(encoding: str, *, rows: int = 48, cols: int = 32, cell_bits: int = 2, **settings_: Any) -> Chip:
    settings_.setdefault("sharing", "time")
    crossbars = (CrossbarType(name="main", rows=rows, cols=cols, cell_bits=cell_bits, count=4000),)
    return Chip(schema_version=1, name="test", encoding=encoding, dac_bits=1, crossbars=crossbars, **settings_)


def write_folder(
    folder: Path,
    chip: Chip,
    *,
    source: onnx.ModelProto | None = None,
    cells: bool = True,
    widths: tuple[int, ...] = (0, 2, 3, 4, 8),
    seed: int = 0,
) -> None:
    rng = np.random.default_rng(seed)
    proto = picture_net() if source is None else source
    model = load_model(proto)
    infer_shapes(model)
    mapped, unmapped = scan(model)
    order, predecessors = execution_order(model, [node.name for _, node in mapped])
    quantized = [
        quantize(node, chip.encoding, rng, widths, (8, 4, 5, 8, 3)[i % 5]) for i, (_, node) in enumerate(mapped)
    ]
    emitted, names = emit(proto, quantized)
    folder.mkdir(exist_ok=True)
    onnx.save(emitted, str(folder / "model.onnx"))
    onnx.save(proto, str(folder / "float.onnx"))
    matrices = {item.node.name: Matrix.of(item.node.layout, item.bits) for item in quantized}
    context = ManifestContext(
        quantized=tuple(quantized),
        emitted=names,
        placement=place(matrices, chip),
        unmapped=tuple(unmapped),
        model_sha256=model_digest(folder / "model.onnx"),
        source_sha256=model_digest(folder / "float.onnx"),
        configuration={"weight_bits": [2, 8], "nested": {"share": 0.5}},
        seed=7,
        order=order,
        predecessors=predecessors,
        calibration=DataProvenance(name="synthetic", digest="ab", samples=8, synthetic=True),
    )
    manifest = build_manifest(context)
    manifest.write(folder / "manifest.json")
    if cells:
        write_cells(folder / "cells.npz", manifest, {item.node.name: item.codes for item in quantized})


def failed(report: ValidationReport) -> set[str]:
    return {check.name for check in report.failures}


def failed_checks(folder: Path) -> set[str]:
    """What `validate` finds before it runs the model."""
    checklist = Checklist()
    FolderChecks(folder, checklist).run(load_model(folder / "model.onnx", check_weights=False))
    return failed(ValidationReport(tuple(checklist.checks)))


ISAAC = "offset, unit column, flipped, shared in time"


PAIRS = "differential, pairs of arrays"


def edit(path: Path, damage: Callable[[Json], object], *, seal: bool = True) -> None:
    """Change a manifest; sealed again, so that its digest does not give the damage away."""
    data = json.loads(path.read_text())
    before = copy.deepcopy(data)
    damage(data)
    assert data != before, "nothing was changed"
    if seal:
        data["digest"] = digest_of(data)
    path.write_text(json.dumps(data))


def bump(*path: str | int, by: float = 1) -> Callable[[Json], None]:
    """Add to one number."""

    def damage(data: Json) -> None:
        place_: Any = data
        for key in path[:-1]:
            place_ = place_[key]
        place_[path[-1]] += by

    return damage


def put(*path: str | int, value: object) -> Callable[[Json], None]:
    """Set one value."""

    def damage(data: Json) -> None:
        place_: Any = data
        for key in path[:-1]:
            place_ = place_[key]
        place_[path[-1]] = value

    return damage
