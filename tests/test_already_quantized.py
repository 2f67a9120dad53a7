"""Models that onnxruntime's own quantizer made, and what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import raqu_onnx
from raqu_onnx.annotations import PROTECTED
from raqu_onnx.errors import ModelError, RaquError
from raqu_onnx.model_io import load_model
from raqu_onnx.passes.tidy import TidyPass

Net = Callable[..., onnx.ModelProto]
Data = Callable[..., dict[str, np.ndarray]]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, small_net: Net, small_data: Data) -> Make:
    """Quantizes the small net with onnxruntime."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    folder = tmp_path_factory.mktemp("quantized")
    source = folder / "float.onnx"
    onnx.save(small_net(), source)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = iter([{"input": small_data(16, seed)["input"]} for seed in (1, 2)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    def build(kind: str, *excluded: str, unsigned: bool = False, **options: Any) -> Path:
        path = folder / f"{kind}-{'-'.join(excluded)}-{unsigned}.onnx"
        if kind == "dynamic":
            quantize_dynamic(source, path, nodes_to_exclude=list(excluded))
        else:
            quantize_static(
                source,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ if kind == "qdq" else QuantFormat.QOperator,
                nodes_to_exclude=list(excluded),
                activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
                **options,
            )
        return path

    return build


def run(model: Path, feeds: dict[str, NDArray[Any]], level: str = "ORT_ENABLE_ALL") -> NDArray[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def sqnr(reference: NDArray[Any], found: NDArray[Any]) -> float:
    return float(10 * np.log10(np.sum(reference**2) / max(np.sum((reference - found) ** 2), 1e-30)))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("qdq", ["input_QuantizeLinear, QuantizeLinear", "conv1 (Conv), conv2 (Conv), fc (Gemm)"]),
        ("qoperator", ["conv1_quant (QLinearConv)", "fc_quant (QGemm)"]),
        ("dynamic", ["DynamicQuantizeLinear", "conv1_quant (ConvInteger)", "MatMulInteger"]),
    ],
)
def test_a_quantized_model_is_refused_by_all_commands(
    cli: Callable[..., Any], make: Make, kind: str, said: list[str]
) -> None:
    path = make(kind)
    for command in (["inspect", path], ["optimize", path, "-q"], ["optimize", path, "-q", "--dry-run"]):
        ran = cli(*command)
        assert ran.code == 2
        assert ran.out == ""
        assert ran.err.startswith(f"error: {path}: the model is already quantized (node ")
        assert ran.err.endswith("give the float model that it was made from\n")
        assert ran.err.count("\n") == 1
        assert all(part in ran.err for part in said)
    assert not path.with_name(f"{path.stem}-raqu").exists()


def test_excluding_all_of_it_leaves_nothing_to_do(make: Make) -> None:
    with pytest.raises(ModelError, match=r"no node that crossbars can compute: conv1 \(Conv\): excluded by the user"):
        raqu_onnx.inspect(make("qdq"), exclude=[".*"])


@pytest.mark.parametrize(
    ("kind", "floating", "advice"),
    [
        ("qdq", ["conv2"], ["conv1", "fc"]),
        ("qdq", ["conv1", "fc"], ["conv2"]),
        ("qoperator", ["conv2"], ["conv1_quant", "fc_quant"]),
        ("dynamic", ["conv2"], ["conv1_quant", "fc_MatMul_quant"]),
    ],
)
@pytest.mark.parametrize("unsigned", [False, True])
def test_a_model_quantized_in_part_keeps_what_is_excluded(
    tmp_path: Path, make: Make, small_data: Data, kind: str, floating: list[str], advice: list[str], unsigned: bool
) -> None:
    path = make(kind, *floating, unsigned=unsigned)
    with pytest.raises(RaquError, match="already quantized in part") as caught:
        raqu_onnx.inspect(path)
    assert str(caught.value).endswith(" ".join(f"--exclude {name}" for name in advice))
    if len(advice) > 1:
        with pytest.raises(RaquError, match=f"in part .*--exclude {advice[1]}$"):
            raqu_onnx.inspect(path, exclude=advice[:1])

    result = raqu_onnx.optimize(
        path,
        tmp_path / "out",
        exclude=advice,
        weight_bits=8,
        threads=1,
        calibration={"input": small_data(64, 4)["input"]},
        selection={"input": small_data(48, 5)["input"]},
    )
    assert sorted(result.bits) == sorted(floating)
    before, after = onnx.load(path), onnx.load(tmp_path / "out" / "model.onnx")
    _assert_untouched(before, after, floating)
    feeds = {"input": small_data(64, 6)["input"]}
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        assert sqnr(run(path, feeds), run(tmp_path / "out" / "model.onnx", feeds, level)) > 25
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    listed = {item["name"]: item["reason"] for item in manifest["unmapped"]}
    assert listed == {name: f"excluded by the user ({name}), stays quantized as it was" for name in advice}
    assert {item.name for item in raqu_onnx.inspect(path, exclude=advice).unmapped} == set(advice)


def test_an_excluded_node_is_said_to_be_what_it_is(cli: Callable[..., Any], make: Make) -> None:
    ran = cli("inspect", make("qoperator", "conv1", "conv2"), "--exclude", "fc_quant", "--exclude", "conv2")
    assert ran.code == 0, ran.err
    assert "not on crossbars: fc_quant (QGemm): excluded by the user (fc_quant), stays quantized as it was\n" in ran.out
    assert "not on crossbars: conv2 (Conv): excluded by the user (conv2)\n" in ran.out
    assert "float" not in ran.out


def _assert_untouched(before: onnx.ModelProto, after: onnx.ModelProto, floating: list[str]) -> None:
    """Every node but those quantized now, and every constant that it reads, is there as it was."""
    nodes = {node.name: node for node in after.graph.node}
    constants = {item.name: numpy_helper.to_array(item) for item in after.graph.initializer}
    old = {item.name: numpy_helper.to_array(item) for item in before.graph.initializer}
    compared = 0
    for node in before.graph.node:
        # The bias of a dynamically quantized Conv is reshaped by a node, which folding replaces by its result.
        if node.name in floating or not node.name:
            continue
        found = nodes[node.name]
        assert (found.op_type, found.domain, list(found.attribute)) == (node.op_type, node.domain, list(node.attribute))
        assert list(found.output) == list(node.output)
        assert list(found.input) == list(node.input)
        for name in set(node.input) & set(old):
            assert constants[name].dtype == old[name].dtype
            assert np.array_equal(constants[name], old[name])
            compared += 1
    assert compared


def test_what_this_tool_wrote_is_recognized(tmp_path: Path, small_net: Net, small_data: Data) -> None:
    raqu_onnx.optimize(
        small_net(), tmp_path / "out", calibration={"input": small_data(16)["input"]}, weight_bits=4, activation_bits=4
    )
    with pytest.raises(ModelError, match=r"model.onnx: the model is already quantized \(node .*Linear\): conv1"):
        raqu_onnx.inspect(tmp_path / "out" / "model.onnx")


def compressed(small_net: Net) -> onnx.ModelProto:
    """The small net with the weights of both convolutions stored as INT8."""
    model = small_net()
    for index in (1, 2):
        tensor = next(item for item in model.graph.initializer if item.name == f"w{index}")
        array = numpy_helper.to_array(tensor)
        scale = np.float32(np.abs(array).max() / 127)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(numpy_helper.from_array(np.rint(array / scale).astype(np.int8), f"w{index}_q"))
        model.graph.initializer.append(numpy_helper.from_array(np.array(scale), f"w{index}_s"))
        node = helper.make_node("DequantizeLinear", [f"w{index}_q", f"w{index}_s"], [f"w{index}"], f"dequantize{index}")
        model.graph.node.insert(0, node)
    return model


def test_weights_stored_as_integers_are_no_quantized_model(small_net: Net) -> None:
    found = raqu_onnx.inspect(compressed(small_net))
    assert {"fc"} <= {item.node.name for item in found.nodes}


def test_weights_of_an_excluded_node_stay_as_they_are_stored(tmp_path: Path, small_net: Net, small_data: Data) -> None:
    raqu_onnx.optimize(
        compressed(small_net),
        tmp_path / "out",
        exclude="conv1",
        weight_bits=8,
        calibration={"input": small_data(32)["input"]},
    )
    after = onnx.load(tmp_path / "out" / "model.onnx")
    nodes = {node.name: node for node in after.graph.node}
    assert list(nodes["dequantize1"].input) == ["w1_q", "w1_s"]
    assert nodes["conv1"].input[1] == nodes["dequantize1"].output[0] == "w1"
    stored = next(item for item in after.graph.initializer if item.name == "w1_q")
    expected = next(item for item in compressed(small_net).graph.initializer if item.name == "w1_q")
    assert np.array_equal(numpy_helper.to_array(stored), numpy_helper.to_array(expected))


@pytest.mark.parametrize("nameless", [False, True])
def test_a_nameless_node_can_be_protected_by_the_name_that_inspect_shows(small_net: Net, nameless: bool) -> None:
    model = compressed(small_net)
    if nameless:
        for node in model.graph.node:
            node.name = ""
    tidied = TidyPass(exclude=("Conv_0" if nameless else "conv1",))(load_model(model)).model
    conv = next(node for node in tidied.graph if node.op_type == "Conv")
    weight = conv.inputs[1]
    assert weight is not None
    source = weight.producer()
    assert source is not None
    assert source.op_type == "DequantizeLinear"
    assert PROTECTED.get(source)


def test_float_attention_between_dequantized_values_needs_no_exclusion() -> None:
    """A product of two activations has no weight: it is float whatever its inputs went through."""
    scale, zero = (
        numpy_helper.from_array(np.array(0.1, np.float32), "s"),
        numpy_helper.from_array(np.array(0, np.int8), "z"),
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("Transpose", ["d"], ["t"], "turn"),
        helper.make_node("MatMul", ["d", "t"], ["a"], "attention"),
        helper.make_node("DequantizeLinear", ["w_q", "s", "z"], ["w"], "weight"),
        helper.make_node("MatMul", ["d", "w"], ["b"], "quantized"),
        helper.make_node("MatMul", ["b", "v"], ["y"], "float"),
    ]
    weights = [
        numpy_helper.from_array(np.ones((4, 4), np.int8), "w_q"),
        numpy_helper.from_array(np.ones((4, 2), np.float32), "v"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "y")],
        [scale, zero, *weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match=r"in part .*: quantized \(MatMul\) compute on integers.*--exclude quantized$"):
        raqu_onnx.inspect(model)
    found = raqu_onnx.inspect(model, exclude=["quantized"])
    assert [item.node.name for item in found.nodes] == ["float"]
    assert {item.name for item in found.unmapped} == {"attention", "quantized"}
