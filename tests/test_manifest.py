"""Building, writing and reading manifests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raqu_onnx.cli import main
from raqu_onnx.encodings import code_range
from raqu_onnx.errors import ManifestError, OutputError
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.layout import MappedNode, WeightLayout, Window
from raqu_onnx.manifest import DataProvenance, Manifest, SchemaError, digest_of, manifest_schema, read_manifest
from raqu_onnx.manifest_build import ManifestContext, build_manifest
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.mapping import UnmappedNode
from raqu_onnx.placement import place
from raqu_onnx.quantized import ActivationQuantizer, EmittedNames, QuantizedNode
from raqu_onnx.tiling import Matrix

Json = dict[str, Any]


def make_chip(rows: int = 64, cols: int = 32, **settings: Any) -> Chip:
    settings = {"encoding": "offset", "sharing": "time", **settings}
    crossbar = CrossbarType(name="main", rows=rows, cols=cols, cell_bits=2, count=5000)
    return Chip(schema_version=1, name="test", dac_bits=1, crossbars=(crossbar,), **settings)


def make_node(name: str, layout: WeightLayout, bits: list[int], encoding: str = "offset") -> QuantizedNode:
    limits = np.array([code_range(encoding, b) for b in bits])  # type: ignore[arg-type]
    along = [1] * len(layout.shape)
    along[layout.scale_axis] = -1
    codes = np.random.default_rng(len(name)).integers(
        limits[:, 0].reshape(along), limits[:, 1].reshape(along) + 1, layout.shape
    )
    window = None
    if layout.kind == "conv":
        rank = len(layout.shape) - 2
        window = Window(layout.shape[2:], (1,) * rank, (1,) * rank, (0,) * 2 * rank)
    node = MappedNode(
        name,
        "Conv" if window else "Gemm",
        f"{name}_x",
        f"{name}_w",
        None,
        f"{name}_y",
        layout,
        window,
        mvms=9,
    )
    scales = np.linspace(0.1, 0.7, layout.channels).astype(np.float32)
    return QuantizedNode(
        node, np.array(bits), codes.astype(np.int8), scales, None, None, ActivationQuantizer(8, 0.05, 3)
    )


def make_context(nodes: list[QuantizedNode], chip: Chip, **changes: Any) -> ManifestContext:
    matrices = {item.node.name: Matrix.of(item.node.layout, item.bits) for item in nodes}
    content: Json = {
        "quantized": tuple(nodes),
        "emitted": {n: EmittedNames(f"{n}_q", f"{n}_s", None, f"{n}_xq", f"{n}_sx", f"{n}_zx") for n in matrices},
        "placement": place(matrices, chip),
        "unmapped": (UnmappedNode("dyn", "MatMul", "neither operand is a constant"),),
        "model_sha256": "a" * 64,
        "source_sha256": "b" * 64,
        "configuration": {"seed": 3, "budget": {"crossbars": 4}, "share": 0.25},
        "seed": 3,
        "order": tuple(matrices),
        "predecessors": {later: (earlier,) for earlier, later in itertools.pairwise(matrices)},
        "calibration": DataProvenance(name="cal.npz", digest="c" * 64, samples=64, synthetic=False),
        "selection": None,
    }
    return ManifestContext(**{**content, **changes})


def sample(**changes: Any) -> Manifest:
    nodes = [
        make_node("conv", WeightLayout("conv", (6, 8, 3, 3)), [8, 0, 3, 3, 8, 2]),
        make_node("deep", WeightLayout("conv", (4, 1, 3, 3), 4), [4, 4, 0, 4]),
        make_node("fc", WeightLayout("out-in", (5, 150)), [4] * 5),
    ]
    return build_manifest(make_context(nodes, make_chip(), **changes))


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    manifest = sample()
    for name in ("one.json", "two.json"):
        sample().write(tmp_path / name)
    assert read_manifest(tmp_path / "one.json") == manifest
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    data = json.loads((tmp_path / "one.json").read_text())
    assert data["digest"] == digest_of(data) == manifest.digest


def test_node_by_hand() -> None:
    node = sample().nodes[0]
    assert (node.matrix.groups, node.matrix.rows, node.matrix.kernels) == (1, 72, 6)
    assert node.bits == ((8, 1), (0, 1), (3, 2), (8, 1), (2, 1))
    assert node.dropped_kernels == ((1, 2),)
    assert node.kernel_order == (((0, 1), (4, 5), (2, 4), (5, 6)),)
    # 4 + 4 + 2 + 2 + 1 columns in two row blocks of 64 and 8 wordlines.
    assert [(p.weight_rows, p.columns, p.kernels, p.partial_sum) for p in node.placements] == [
        ((0, 64), (0, 13), (0, 5), 0),
        ((64, 72), (0, 13), (0, 5), 0),
    ]
    assert node.window is not None
    assert node.window.kernel == (3, 3)
    assert sample().nodes[2].window is None
    assert sample().nodes[1].kernel_order == (((0, 1),), ((0, 1),), (), ((0, 1),))


def test_scales_read_back_as_the_same_float32() -> None:
    manifest = sample()
    expected = np.linspace(0.1, 0.7, 6).astype(np.float32)
    np.testing.assert_array_equal(np.array(manifest.nodes[0].scales, np.float32), expected)
    assert manifest.nodes[0].scales[0] == 0.1


def test_totals_agree_with_placement() -> None:
    nodes = [make_node("fc", WeightLayout("in-out", (100, 10)), [8] * 5 + [3] * 4 + [0])]
    manifest = build_manifest(make_context(nodes, make_chip()))
    totals = manifest.totals
    assert totals.cell_utilization.numerator == 100 * (5 * 4 + 4 * 2)
    assert totals.bit_utilization.numerator == 100 * (5 * 8 + 4 * 3)
    assert totals.cell_utilization.denominator == totals.crossbars[0].allocated * 64 * 32
    assert totals.bit_utilization.denominator == 2 * totals.cell_utilization.denominator
    assert totals.dropped_kernels == 1
    assert totals.lower_bound == 2


def test_turns_are_the_first_free_ones() -> None:
    """Depthwise blocks of 9 x 2 cells: those side by side share rows, those below each other share columns."""
    layout = WeightLayout("conv", (12, 1, 3, 3), 12)
    manifest = build_manifest(make_context([make_node("deep", layout, [4] * 12)], make_chip(rows=27, cols=8)))
    placements = manifest.nodes[0].placements
    assert {p.crossbar for p in placements} == {0}
    for i, one in enumerate(placements):
        rivals = {
            other.turn
            for other in placements[:i]
            if one.rows == other.rows or not (one.cols[1] <= other.cols[0] or other.cols[1] <= one.cols[0])
        }
        assert one.turn == next(turn for turn in itertools.count() if turn not in rivals)
    assert manifest.stages[0].turns == max(p.turn for p in placements) + 1 >= 4
    exclusive = build_manifest(
        make_context([make_node("deep", layout, [4] * 12)], make_chip(rows=27, cols=8, sharing="exclusive"))
    )
    assert exclusive.stages[0].turns == 1


def test_stages_name_rivals_and_dependencies() -> None:
    nodes = [make_node(f"fc{i}", WeightLayout("in-out", (20, 4)), [8] * 4) for i in range(3)]
    manifest = build_manifest(make_context(nodes, make_chip()))
    assert [stage.after for stage in manifest.stages] == [(), ("fc0",), ("fc1",)]
    one_crossbar = {p.crossbar for node in manifest.nodes for p in node.placements}
    assert one_crossbar == {0}
    assert manifest.stages[0].shares_with
    apart = build_manifest(make_context(nodes, make_chip(sharing="diagonal")))
    assert all(stage.shares_with == () for stage in apart.stages)


def test_split_kernels_say_where_they_start() -> None:
    nodes = [make_node("fc", WeightLayout("in-out", (3, 3)), [8] * 3)]
    manifest = build_manifest(make_context(nodes, make_chip(cols=5, split_slices=True)))
    assert [(p.columns, p.kernels, p.first_slice) for p in manifest.nodes[0].placements] == [
        ((0, 5), (0, 2), 0),
        ((5, 10), (1, 3), 1),
        ((10, 12), (2, 3), 2),
    ]


def test_float_activation_is_not_executable() -> None:
    item = make_node("fc", WeightLayout("in-out", (3, 3)), [8] * 3)
    item = QuantizedNode(item.node, item.bits, item.codes, item.scales, None, None, None)
    manifest = build_manifest(make_context([item], make_chip()))
    assert manifest.nodes[0].activation is None
    assert not manifest.executable
    assert sample().executable


def test_other_bits_than_placed_are_refused() -> None:
    item = make_node("fc", WeightLayout("in-out", (3, 3)), [8] * 3)
    other = make_node("fc", WeightLayout("in-out", (3, 3)), [8, 8, 4])
    placement = make_context([item], make_chip()).placement
    with pytest.raises(ValueError, match="fc: it was quantized to other bits"):
        build_manifest(make_context([other], make_chip(), placement=placement))


def test_execution_order_sees_through_float_nodes_and_bodies() -> None:
    import onnx
    import onnx_ir as ir

    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[2, 4] x, bool c) => (float[2, 4] y) {
      [a] ya = Relu(x)
      [b] yb = Relu(ya)
      [float] f = Add(ya, yb)
      [branch] z = If (c) <
        then_branch = t () => (float[2, 4] tz) { tz = Identity(f) },
        else_branch = e () => (float[2, 4] ez) { ez = Identity(x) }
      >
      [d] y = Relu(z)
    }
    """
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    assert execution_order(model, ["a", "b", "d"]) == (("a", "b", "d"), {"a": (), "b": ("a",), "d": ("a", "b")})


def test_schema_accepts_what_is_written_and_refuses_the_rest(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = manifest_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    sample().write(tmp_path / "m.json")
    data = json.loads((tmp_path / "m.json").read_text())
    assert list(checker.iter_errors(data)) == []
    data["nodes"][0]["placements"][0]["rows"][0] = -1
    data["surprise"] = 1
    assert len(list(checker.iter_errors(data))) == 2


def test_schema_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "half-open" in json.dumps(schema)


BROKEN = [
    ("not json", r"is not JSON"),
    ("[" * 100_000, r"is nested too deeply"),
    ('{"a": 1, "a": 2}', r"key 'a' stands twice"),
    ('{"a": NaN}', r"NaN is not a JSON number"),
    ("[]", r"no mapping manifest"),
    ('{"format": "raqu-onnx-manifest", "version": 99}', r"version: found 99"),
    ('{"format": "raqu-onnx-manifest", "version": 1}', r"digest: Field required.*more"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_files_give_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    sample().write(path)
    data = json.loads(path.read_text())
    data["nodes"][1]["placements"][2]["cols"][1] = 1.5
    path.write_text(json.dumps(data))
    with pytest.raises(SchemaError, match=r"nodes\.1\.placements\.2\.cols\.1: .*found 1\.5"):
        read_manifest(path)


def test_changed_content_and_absent_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    sample().write(path)
    path.write_text(path.read_text().replace('"seed":3,"configuration"', '"seed":4,"configuration"'))
    with pytest.raises(ManifestError, match="digest"):
        read_manifest(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(path)
    with pytest.raises(ManifestError, match=r"absent\.json: cannot be read"):
        read_manifest(tmp_path / "absent.json")
    with pytest.raises(OutputError, match="cannot be written"):
        sample().write(tmp_path / "no" / "manifest.json")


def test_large_model_stays_small(tmp_path: Path) -> None:
    """A fully connected layer of 25,088 x 4,096 weights at 8 bits: 25,088 placements in 128 x 128 arrays."""
    layout = WeightLayout("in-out", (25_088, 4_096))
    bits = np.full(4_096, 8)
    node = MappedNode("fc6", "Gemm", "x", "w", None, "y", layout, mvms=1)
    # Without flips no code is read: a view of one zero stands for 100 MB of them.
    codes = np.broadcast_to(np.int8(0), layout.shape)
    item = QuantizedNode(node, bits, codes, np.ones(4_096, np.float32), None, None, None)
    crossbar = CrossbarType(name="main", rows=128, cols=128, cell_bits=2)
    chip = Chip(
        schema_version=1, name="test", dac_bits=1, crossbars=(crossbar,), encoding="offset", sharing="exclusive"
    )
    manifest = build_manifest(make_context([item], chip))
    assert manifest.totals.placements == 196 * 128
    manifest.write(tmp_path / "manifest.json")
    assert (tmp_path / "manifest.json").stat().st_size < 300 * manifest.totals.placements
    assert read_manifest(tmp_path / "manifest.json").digest == manifest.digest
