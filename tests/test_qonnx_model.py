"""The QONNX form of emitted models; `flows/test_qonnx.py` runs it with the qonnx package itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from result_folders import ISAAC, PAIRS

from raqu_onnx.errors import ManifestError
from raqu_onnx.evaluation import make_session
from raqu_onnx.manifest import read_manifest
from raqu_onnx.model_io import load_model, to_proto
from raqu_onnx.output import QONNX_FILE
from raqu_onnx.passes import WriteQonnxPass
from raqu_onnx.qonnx_model import QONNX_DOMAIN, qonnx_model
from raqu_onnx.validate_qonnx import check_qonnx
from raqu_onnx.validate_report import Check, Checklist

QUANT = onnx.parser.parse_function(
    """<opset_import: ["": 17], domain: "qonnx.custom_op.general">
    Quant <signed, narrow, rounding_mode>(x, scale, zeropt, bits) => (y) {
        two = Constant <value_float = 2.0>()
        one = Constant <value_float = 1.0>()
        signed_code = Constant <value_int: int = @signed>()
        s = Cast <to = 1> (signed_code)
        narrow_code = Constant <value_int: int = @narrow>()
        n = Cast <to = 1> (narrow_code)
        magnitude_bits = Sub (bits, s)
        size = Pow (two, magnitude_bits)
        high = Sub (size, one)
        below = Sub (n, size)
        low = Mul (s, below)
        steps = Div (x, scale)
        shifted = Add (steps, zeropt)
        bounded = Clip (shifted, low, high)
        codes = Round (bounded)
        centred = Sub (codes, zeropt)
        y = Mul (centred, scale)
    }"""
)
"""The operator as QONNX's own document defines it, for widths that are one number."""


def restated(folder: Path) -> ir.Model:
    return qonnx_model(load_model(folder / "model.onnx"), read_manifest(folder / "manifest.json"))


@pytest.mark.parametrize("kind", [ISAAC, PAIRS])
def test_it_computes_what_the_qdq_model_does(sound: dict[str, Path], kind: str) -> None:
    inputs = {"x": np.random.default_rng(3).normal(scale=2, size=(2, 3, 8, 8)).astype(np.float32)}
    expected = make_session(sound[kind] / "model.onnx", level="disable-all").run(None, inputs)
    model = to_proto(restated(sound[kind]))
    model.functions.append(QUANT)
    got = make_session(model.SerializeToString(), level="disable-all").run(None, inputs)
    for one, other in zip(got, expected, strict=True):
        # Zero points that are not 0 are added before rounding, so that a tie may go the other way: not here.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kind", "narrow"), [(ISAAC, 0), (PAIRS, 1)])
def test_every_width_stands_in_a_node_of_its_own(sound: dict[str, Path], kind: str, narrow: int) -> None:
    model, manifest = restated(sound[kind]), read_manifest(sound[kind] / "manifest.json")
    quants = {node.outputs[0]: node for node in model.graph if node.op_type == "Quant"}
    found = set()
    for node in quants.values():
        width = node.inputs[3]
        assert width is not None
        assert width.const_value is not None
        found.add((int(width.const_value.numpy()), node.attributes["signed"].as_int()))
        if node.attributes["signed"].as_int() and width.const_value.numpy() <= 8:
            assert node.attributes["narrow"].as_int() == narrow
    weights = {bits for entry in manifest.nodes for bits, _ in entry.bits}
    activations = {entry.activation.bits for entry in manifest.nodes if entry.activation is not None}
    assert 0 in weights
    assert found == {(bits, 1) for bits in weights - {0}} | {(bits, 0) for bits in activations} | {(32, 1)}


def test_nothing_of_the_qdq_form_is_left(sound: dict[str, Path]) -> None:
    left = {node.op_type for node in restated(sound[ISAAC]).graph}
    assert not left & {"QuantizeLinear", "DequantizeLinear", "Clip"}


def test_the_model_is_left_alone(sound: dict[str, Path]) -> None:
    model = load_model(sound[ISAAC] / "model.onnx")
    before = to_proto(model)
    qonnx_model(model, read_manifest(sound[ISAAC] / "manifest.json"))
    assert to_proto(model) == before


def test_a_manifest_of_another_model_is_refused(sound: dict[str, Path], small_net: Callable[..., Any]) -> None:
    with pytest.raises(ManifestError, match="the model has no node of this name"):
        qonnx_model(load_model(small_net()), read_manifest(sound[ISAAC] / "manifest.json"))


FAST = ("--hw", "chip.toml", "--calibration", "calibration.npz", "--weight-bits", "4", "--weight-method", "mse")


def test_optimize_writes_it_when_asked(workspace: Path, cli: Callable[..., Any]) -> None:
    ran = cli("optimize", "model.onnx", *FAST, "--emit", "qonnx", "-o", "out", "--evaluations", 0)
    assert ran.code == 0, ran.err
    domains = {item.domain for item in onnx.load(workspace / "out" / QONNX_FILE).opset_import}
    assert QONNX_DOMAIN in domains
    checks = json.loads(cli("validate", "out", "--format", "json").out)["checks"]
    assert "qonnx.model" in {check["name"] for check in checks if check["passed"]}
    # A later run without it takes the file away, which would belong to another model.
    assert cli("optimize", "model.onnx", *FAST, "-o", "out", "--evaluations", 0, "--force").code == 0
    assert not (workspace / "out" / QONNX_FILE).exists()


def _other_weight(model: onnx.ModelProto) -> None:
    weight = next(item for item in model.graph.initializer if len(item.dims) == 4)
    changed = numpy_helper.to_array(weight).copy()
    changed.reshape(-1)[0] += 0.5
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))


def _other_width(model: onnx.ModelProto) -> None:
    quant = next(node for node in model.graph.node if node.op_type == "Quant")
    width = next(item for item in model.graph.initializer if item.name == quant.input[3])
    width.CopyFrom(numpy_helper.from_array(np.array(7, np.float32), width.name))


def _other_attribute(model: onnx.ModelProto) -> None:
    quant = next(node for node in model.graph.node if node.op_type == "Quant")
    signed = next(item for item in quant.attribute if item.name == "signed")
    signed.i = 1 - signed.i


def _another_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Relu", [model.graph.input[0].name], ["more"], name="more"))


def _fewer_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.pop()


@pytest.fixture
def with_qonnx(sound: dict[str, Path], tmp_path: Path) -> Path:
    """A result with its QONNX form."""
    folder = Path(shutil.copytree(sound[ISAAC], tmp_path / "result"))
    WriteQonnxPass(folder)(load_model(folder / "model.onnx"))
    return folder


def found_in(folder: Path) -> Check:
    checklist = Checklist()
    check_qonnx(folder, load_model(folder / "model.onnx"), read_manifest(folder / "manifest.json"), checklist)
    return checklist.checks[0] if checklist.checks else Check("none", None, "")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_other_weight, "is not what model.onnx holds"),
        (_other_width, "is not what model.onnx holds"),
        (_other_attribute, "its nodes are not those of model.onnx, from node "),
        (_another_node, "its nodes are not those of model.onnx, from node the end on"),
        (_fewer_outputs, "its outputs are "),
        (lambda model: model.graph.initializer.pop(), "is not a valid ONNX model"),
    ],
)
def test_every_change_of_it_is_found(with_qonnx: Path, damage: Callable[[onnx.ModelProto], object], says: str) -> None:
    assert found_in(with_qonnx).passed is True
    model = onnx.load(with_qonnx / QONNX_FILE)
    damage(model)
    onnx.save(model, with_qonnx / QONNX_FILE)
    check = found_in(with_qonnx)
    assert check.passed is False
    assert says in check.detail
    assert "`optimize --emit qonnx` writes it anew" in check.detail


def test_a_result_without_it_is_no_worse(with_qonnx: Path) -> None:
    (with_qonnx / QONNX_FILE).unlink()
    # Nobody asked this folder's run for it; where somebody did, the check says that it was not made.
    assert found_in(with_qonnx).name == "none"
    manifest = read_manifest(with_qonnx / "manifest.json")
    asked = manifest.model_copy(update={"configuration": {"emit": ["qonnx"]}})
    checklist = Checklist()
    check_qonnx(with_qonnx, load_model(with_qonnx / "model.onnx"), asked, checklist)
    assert [check.passed for check in checklist.checks] == [None]


def test_an_unknown_form_is_refused(workspace: Path, refused: Callable[..., str]) -> None:
    refused(workspace, ("optimize", "model.onnx", *FAST, "--emit", "tflite", "-o", "out"), "--emit", "qonnx")


def test_a_pipeline_without_the_pass_is_refused(workspace: Path, refused: Callable[..., str]) -> None:
    passes = ("--passes", "tidy,annotate-tiling", "--emit", "qonnx")
    refused(workspace, ("optimize", "model.onnx", *FAST, *passes, "-o", "out"), "add write-qonnx after write-manifest")
