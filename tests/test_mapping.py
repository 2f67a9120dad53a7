"""Which nodes crossbars take, in what form, and why they leave the others."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from raqu_onnx.annotations import MAPPED, UNMAPPED, MissingAnnotationError, mapped_nodes, unmapped_nodes
from raqu_onnx.errors import ModelError
from raqu_onnx.layout import MappedNode, WeightLayout, Window
from raqu_onnx.mapping import UnmappedNode, scan
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.tidy import TidyPass

HEADER = '<ir_version: 10, opset_import: ["": 18, "custom": 1]>'


def model_of(text: str, **weights: np.ndarray | tuple[int, ...]) -> ir.Model:
    """A model from ONNX text with inferred shapes; weights are arrays, or shapes of float zeros."""
    proto = onnx.parser.parse_model(f"{HEADER} {text}")
    for name, weight in weights.items():
        array = np.zeros(weight, np.float32) if isinstance(weight, tuple) else weight
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def the_node(model: ir.Model) -> MappedNode:
    mapped, unmapped = scan(model)
    assert unmapped == []
    assert len(mapped) == 1
    assert mapped[0][0].name == mapped[0][1].name
    return mapped[0][1]


def the_reason(model: ir.Model) -> str:
    mapped, unmapped = scan(model)
    assert mapped == []
    assert len(unmapped) == 1
    return unmapped[0].reason


def test_conv() -> None:
    model = model_of(
        """g (float[N,4,9,8] x) => (float[N,6,M,K] y) {
            [stem] y = Conv <group = 2, strides = [2, 1], dilations = [1, 2], pads = [1, 0, 1, 2]> (x, w, b)
        }""",
        w=(6, 2, 3, 3),
        b=(6,),
    )
    assert the_node(model) == MappedNode(
        name="stem",
        op_type="Conv",
        input_name="x",
        weight_name="w",
        bias_name="b",
        output_name="y",
        layout=WeightLayout("conv", (6, 2, 3, 3), 2),
        window=Window((3, 3), (2, 1), (1, 2), (1, 0, 1, 2)),
        mvms=5 * 6,
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_of_any_rank_has_the_defaults_of_onnx(rank: int) -> None:
    sizes = ",".join(["5"] * rank)
    model = model_of(f"g (float[1,2,{sizes}] x) => (float[] y) {{ [n] y = Conv (x, w) }}", w=(3, 2, *[2] * rank))
    node = the_node(model)
    assert node.window == Window((2,) * rank, (1,) * rank, (1,) * rank, (0,) * (2 * rank))
    assert node.bias_name is None
    assert node.mvms == 4**rank


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_conv_with_auto_pad(auto_pad: str) -> None:
    text = f'g (float[1,2,5,5] x) => (float[] y) {{ [n] y = Conv <auto_pad = "{auto_pad}"> (x, w) }}'
    window = the_node(model_of(text, w=(3, 2, 3, 3))).window
    assert window is not None
    assert window.auto_pad == auto_pad


def test_conv_transpose() -> None:
    model = model_of(
        """g (float[1,4,3,3] x) => (float[] y) {
            [up] y = ConvTranspose <group = 2, strides = [2, 2], pads = [1, 1, 0, 0], output_padding = [1, 0]> (x, w, b)
        }""",
        w=(4, 3, 2, 2),
        b=(6,),
    )
    node = the_node(model)
    assert node.op_type == "ConvTranspose"
    assert node.bias_name == "b"
    assert node.layout == WeightLayout("conv-transpose", (4, 3, 2, 2), 2)
    assert node.window == Window(
        (2, 2), (2, 2), (1, 1), (1, 1, 0, 0), output_padding=(1, 0), output_shape=None, transposed=True
    )
    assert node.mvms == 6 * 5


@pytest.mark.parametrize("shape", ["[7, 6]", "[1, 3, 7, 6]"])
def test_conv_transpose_with_an_output_shape(shape: str) -> None:
    call = f"ConvTranspose <strides = [2, 2], output_shape = {shape}> (x, w)"
    node = the_node(model_of(f"g (float[1,4,3,3] x) => (float[] y) {{ [n] y = {call} }}", w=(4, 3, 2, 2)))
    assert node.window is not None
    assert node.window.output_shape == tuple(int(size) for size in shape.strip("[]").split(","))
    assert node.mvms == 7 * 6


@pytest.mark.parametrize(("transposed", "kind"), [(0, "in-out"), (1, "out-in")])
def test_gemm(transposed: int, kind: str) -> None:
    text = f"g (float[N,4] x) => (float[N,4] y) {{ [fc] y = Gemm <transB = {transposed}> (x, w, b) }}"
    node = the_node(model_of(text, w=(4, 4), b=(4,)))
    assert node.layout == WeightLayout(kind, (4, 4))
    assert (node.op_type, node.bias_name, node.window, node.input_transposed) == ("Gemm", "b", None, False)
    assert node.mvms == 1


def test_gemm_of_a_transposed_activation() -> None:
    node = the_node(model_of("g (float[4,N] x) => (float[N,5] y) { [fc] y = Gemm <transA = 1> (x, w) }", w=(4, 5)))
    assert node.input_transposed
    assert node.bias_name is None


def test_matmul_with_the_constant_on_the_right() -> None:
    node = the_node(model_of("g (float[N,7,4] x) => (float[N,7,5] y) { [m] y = MatMul (x, w) }", w=(4, 5)))
    assert (node.input_name, node.weight_name, node.constant_left) == ("x", "w", False)
    assert node.layout == WeightLayout("in-out", (4, 5))
    assert node.mvms == 7


@pytest.mark.parametrize(("shape", "mvms"), [("N,4,7", 7), ("N,3,4,7", 21), ("4,7", 7)])
def test_matmul_with_the_constant_on_the_left(shape: str, mvms: int) -> None:
    node = the_node(model_of(f"g (float[{shape}] x) => (float[] y) {{ [m] y = MatMul (w, x) }}", w=(5, 4)))
    assert (node.input_name, node.weight_name, node.constant_left) == ("x", "w", True)
    assert node.layout == WeightLayout("out-in", (5, 4))
    assert node.mvms == mvms


@pytest.mark.parametrize(
    ("shape", "text", "weight"),
    [
        ("N,2,H,8", "Conv (x, w)", (3, 2, 3, 3)),
        ("N,T,4", "MatMul (x, w)", (4, 5)),
        ("N,4,T", "MatMul (w, x)", (5, 4)),
    ],
)
def test_mvms_are_unknown_where_a_size_is(shape: str, text: str, weight: tuple[int, ...]) -> None:
    assert the_node(model_of(f"g (float[{shape}] x) => (float[] y) {{ [n] y = {text} }}", w=weight)).mvms is None


CONV = "g (float[1,2,5,5] x) => (float[] y) { [n] y = Conv (x, w) }"
GEMM = "g (float[N,4] x) => (float[] y) { [n] y = Gemm (x, w, c) }"
MATMUL = "g (float[N,4] x) => (float[] y) { [n] y = MatMul (x, w) }"


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (
            "g (float[1,2,5,5] x, float[3,2,3,3] w) => (float[] y) { [n] y = Conv (x, w) }",
            {},
            "its weight is not a constant",
        ),
        (
            "g (float[1,2,5,5] x, float[3,2,3,3] w) => (float[] y) { [n] y = Conv (x, w) }",
            {"w": (3, 2, 3, 3)},  # a default that the caller may override
            "its weight is not a constant",
        ),
        (
            "g (float[1,2,5,5] x, float[3] b) => (float[] y) { [n] y = Conv (x, w, b) }",
            {"w": (3, 2, 3, 3)},
            "its bias is not a constant",
        ),
        (
            "g (float16[1,2,5,5] x) => (float16[] y) { [n] y = Conv (x, w) }",
            {"w": np.zeros((3, 2, 3, 3), np.float16)},
            "its weight is float16, only float (32 bits) is mapped",
        ),
        (CONV, {"w": (0, 2, 3, 3)}, "its weight is empty"),
        (
            "g (float[1,3,5,5] x) => (float[] y) { [n] y = ConvTranspose <group = 2> (x, w) }",
            {"w": (3, 2, 3, 3)},
            "its 3 channels do not divide into 2 groups",
        ),
        (
            "g (float[N,4] x, float[4,5] w) => (float[] y) { [n] y = Gemm (x, w) }",
            {},
            "its operand B is not a constant",
        ),
        (
            "g (double[N,4] x) => (double[] y) { [n] y = Gemm (x, w) }",
            {"w": np.zeros((4, 5))},
            "its operand B is double, only float (32 bits) is mapped",
        ),
        (
            "g (float[4,N] x) => (float[] y) { [n] y = Gemm (w, x) }",
            {"w": (5, 4)},
            "its operand B is not a constant",
        ),
        (
            "g (float[N,4] x) => (float[] y) { [n] y = Gemm <alpha = 0.5> (x, w) }",
            {"w": (4, 5)},
            "its alpha is not folded into the constants: run normalize-gemm first",
        ),
        (
            "g (float[N,4] x) => (float[] y) { [n] y = Gemm <beta = 2.0> (x, w, c) }",
            {"w": (4, 5), "c": (5,)},
            "its beta is not folded into the constants: run normalize-gemm first",
        ),
        (
            "g (float[N,4] x, float[5] c) => (float[] y) { [n] y = Gemm (x, w, c) }",
            {"w": (4, 5)},
            "its operand C is not a constant: run normalize-gemm first",
        ),
        (GEMM, {"w": (4, 5), "c": (1, 5)}, "its operand C is not a vector: run normalize-gemm first"),
        (GEMM, {"w": (4, 5), "c": ()}, "its operand C is not a vector: run normalize-gemm first"),
        # Broadcast to five outputs by ONNX.
        (GEMM, {"w": (4, 5), "c": (1,)}, "its operand C is not a vector: run normalize-gemm first"),
        (
            "g (float[N,4] x, float[4,5] w) => (float[] y) { [n] y = MatMul (x, w) }",
            {},
            "its second operand is not a constant",
        ),
        (
            "g (float[N,4] x) => (float[] y) { [n] y = MatMul (v, w) }",
            {"v": (3, 4), "w": (4, 5)},
            "both operands are constants",
        ),
        (
            "g (float[2,3,4] x) => (float[] y) { [n] y = MatMul (x, w) }",
            {"w": (2, 4, 5)},
            "its constant has batch dimensions (3 dimensions)",
        ),
        (
            "g (float[2,4,3] x) => (float[] y) { [n] y = MatMul (w, x) }",
            {"w": (2, 5, 4)},
            "its constant has batch dimensions (3 dimensions)",
        ),
        (MATMUL, {"w": (4,)}, "its constant is a vector"),
        ("g (float[4] x) => (float[] y) { [n] y = MatMul (x, w) }", {"w": (4, 5)}, "its activation is a vector"),
        (
            "g (float16[N,4] x) => (float16[] y) { [n] y = MatMul (x, w) }",
            {"w": np.zeros((4, 5), np.float16)},
            "its second operand is float16, only float (32 bits) is mapped",
        ),
        (
            "g (float16[4,N] x) => (float16[] y) { [n] y = MatMul (w, x) }",
            {"w": np.zeros((5, 4), np.float16)},
            "its first operand is float16, only float (32 bits) is mapped",
        ),
    ],
)
def test_what_stays_in_float(text: str, weights: dict[str, np.ndarray | tuple[int, ...]], reason: str) -> None:
    assert the_reason(model_of(text, **weights)) == reason


def test_a_convolution_without_spatial_dimensions() -> None:
    text = "g (float[1,2] x) => (float[] y) { [n] y = Conv (x, w) }"
    proto = onnx.parser.parse_model(f"{HEADER} {text}")  # shape inference would refuse it
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((3, 2), np.float32), "w"))
    assert the_reason(ir.from_proto(proto)) == "its weight has 2 dimensions, a convolution has at least 3"


def test_bodies_of_control_flow_stay_in_float() -> None:
    model = model_of(
        """g (bool c, float[N,4] x) => (float[N,5] y) {
            [choice] y = If (c) <
                then_branch = t () => (float[N,5] a) { [inside] a = MatMul (x, w) },
                else_branch = e () => (float[N,5] b) { [other] b = Gemm (x, w) }
            >
        }""",
        w=(4, 5),
    )
    mapped, unmapped = scan(model)
    reason = "it lies in the body of a control-flow node"
    assert mapped == []
    assert unmapped == [UnmappedNode("inside", "MatMul", reason), UnmappedNode("other", "Gemm", reason)]


def test_other_operators_and_other_domains_are_passed_over() -> None:
    model = model_of("g (float[N,4] x) => (float[] y) { z = Relu (x) y = custom.MatMul (z, w) }", w=(4, 5))
    assert scan(model) == ([], [])


MIXED = """g (float[N,4] x, float[5,6] v) => (float[N,7] y) {
    [first] a = MatMul (x, w)
    [middle] b = MatMul (a, v)
    [last] y = MatMul (b, u)
}"""


def test_other_operators_with_weights_have_a_reason_too() -> None:
    text = """g (float[N,4] x, float[T,N,4] z) => (float[] y, float[] h, float[] s)
        { [e] y = Einsum <equation = "nk,km->nm"> (x, w) [r] h, t = RNN <hidden_size = 3> (z, wr, rr)
          [free] s = Einsum <equation = "nk,mk->nm"> (x, x) }"""
    mapped, unmapped = scan(model_of(text, w=(4, 5), wr=(1, 3, 4), rr=(1, 3, 3)))
    assert not mapped
    reasons = {item.name: item.reason for item in unmapped}
    assert set(reasons) == {"e", "r"}
    assert "export it as MatMul" in reasons["e"]
    assert "state" in reasons["r"]


def test_the_pass_annotates_both_kinds_in_graph_order() -> None:
    model = model_of(MIXED, w=(4, 5), u=(6, 7))
    before = ir.to_proto(model).graph.node
    result = AnnotateTilingPass()(model)
    assert [node.name for node in mapped_nodes(result.model)] == ["first", "last"]
    assert [MAPPED.require(node).weight_name for node in mapped_nodes(result.model)] == ["w", "u"]
    reason = "its second operand is not a constant"
    assert unmapped_nodes(result.model) == [UnmappedNode("middle", "MatMul", reason)]
    props = {node.name: dict(node.metadata_props) for node in result.model.graph}
    assert props == {"first": {}, "middle": {"raqu.unmapped": reason}, "last": {}}
    after = ir.to_proto(result.model).graph.node
    assert [(n.op_type, n.input, n.output) for n in after] == [(n.op_type, n.input, n.output) for n in before]
    assert all((MAPPED.get(node) is None) != (UNMAPPED.get(node) is None) for node in result.model.graph)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }",
            "the model has no node that crossbars can compute: it has no Conv, ConvTranspose, Gemm, MatMul",
        ),
        (
            "g (float[N,4] x, float[4,4] v) => (float[N,4] y) { [only] y = MatMul (x, v) }",
            r"the model has no node that crossbars can compute: only \(MatMul\): its second operand is not a constant",
        ),
    ],
)
def test_a_model_with_nothing_to_map(text: str, message: str) -> None:
    model = model_of(text)
    with pytest.raises(ModelError, match=f"^{message}$"):
        AnnotateTilingPass()(model)
    with pytest.raises(MissingAnnotationError, match="run the pass annotate-tiling first"):
        mapped_nodes(model)


@pytest.mark.parametrize(("text", "mvms"), [("MatMul (w, x)", None), ("MatMul (x, w)", 4), ("Conv (x, k)", None)])
def test_a_declared_output_of_the_wrong_rank_is_no_crash(text: str, mvms: int | None) -> None:
    """Shape inference keeps what the file declares, even where it is wrong."""
    proto = onnx.parser.parse_model(f"{HEADER} g (float[1,4,4] x) => (float y) {{ [n] y = {text} }}")
    for name, shape in (("w", (4, 4)), ("k", (4, 4, 1))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    assert the_node(ir.from_proto(proto)).mvms == mvms


def test_tidy_leads_to_mapped_nodes() -> None:
    """What stays in float for its form only is mapped after the tidying passes."""
    model = model_of(
        """g (float[N,4] x) => (float[N,5] y) {
            t = Transpose <perm = [1, 0]> (w)
            a = Gemm <alpha = 0.5, beta = 2.0> (x, t, c)
            y = MatMul (a, v)
        }""",
        w=(5, 4),
        c=(1,),
        v=(5, 5),
    )
    tidied = AnnotateTilingPass()(TidyPass()(model).model).model
    nodes = [MAPPED.require(node) for node in mapped_nodes(tidied)]
    assert [(node.op_type, node.layout.rows, node.layout.kernels) for node in nodes] == [
        ("Gemm", 4, 5),
        ("MatMul", 5, 5),
    ]
    assert unmapped_nodes(tidied) == []
    bias = tidied.graph.initializers[nodes[0].bias_name]
    assert tuple(bias.shape) == (5,)
