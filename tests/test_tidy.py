"""Specifications of the tidying passes: a model before, what it must be after, and the same numbers out of both."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import CheckerPass, TopologicalSortPass
from tensors import normal

from raqu_onnx.errors import ModelError
from raqu_onnx.graph_edit import Names, infer_shapes, name_nodes, weight_values
from raqu_onnx.opset import ensure_opset, inline_functions
from raqu_onnx.passes.fold_batchnorm import FoldBatchNormPass
from raqu_onnx.passes.fold_constants import FoldConstantsPass
from raqu_onnx.passes.normalize_gemm import NormalizeGemmPass
from raqu_onnx.passes.tidy import TidyPass

HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def model_of(text: str, *, header: str = HEADER, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text; initializers of a few hundred numbers come as arrays."""
    proto = onnx.parser.parse_model(f"{header} {text}")
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, feeds)


def assert_same(before: ir.Model, after: ir.Model, *, seed: int = 0, tolerance: float = 1e-5) -> None:
    """Both models compute the same from random inputs (free dimensions are 3) and pass the checker."""
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in before.graph.inputs:
        if not value.is_initializer():
            shape = [d if isinstance(d, int) else 3 for d in value.shape]
            feeds[value.name] = rng.normal(size=shape).astype(value.dtype.numpy())
    assert [o.name for o in after.graph.outputs] == [o.name for o in before.graph.outputs]
    for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def applied(model: ir.Model, *passes: ir.passes.PassBase) -> ir.Model:
    """The model after passes; the one given stays as it was."""
    result = ir.passes.Sequential(*passes)(model.clone())
    assert result.modified
    return result.model


def unchanged(model: ir.Model, pass_: ir.passes.PassBase) -> bool:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    modified = pass_(model).modified
    same = ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert modified is not same
    return same


def statistics(channels: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "scale": rng.normal(size=channels).astype(dtype),
        "shift": rng.normal(size=channels).astype(dtype),
        "mean": rng.normal(size=channels).astype(dtype),
        "var": rng.uniform(0.5, 2, size=channels).astype(dtype),
    }


# ------------------------------------------------------------------------------------------------------ FoldConstants


class TestFoldConstants:
    def test_weight_behind_constant_cast_transpose_and_mul(self) -> None:
        model = model_of(
            """
            g (float[n, 6] x) => (float[n, 4] y) {
              q = Constant <value = int8[4, 6] {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                                -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12}> ()
              f = Cast <to = 1> (q)
              s = Constant <value_float = 0.125> ()
              w = Mul (f, s)
              t = Transpose <perm = [1, 0]> (w)
              [layer] y = MatMul (x, t)
            }"""
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["MatMul"]
        assert list(after.graph.initializers) == ["t"]
        assert after.graph.initializers["t"].const_value.numpy()[2, 1] == 9 * 0.125
        assert_same(model, after)

    def test_float16_weight_behind_cast(self) -> None:
        model = model_of(
            "g (float[n, 6] x) => (float[n, 4] y) { w = Cast <to = 1> (h)  y = MatMul (x, w) }",
            h=normal(6, 4).astype(np.float16),
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["MatMul"]
        assert after.graph.initializers["w"].dtype == ir.DataType.FLOAT
        assert_same(model, after)

    def test_bfloat16_weight_behind_cast(self) -> None:
        model = model_of(
            "g (float[n, 2] x) => (float[n, 2] y) <bfloat16[2, 2] h> { w = Cast <to = 1> (h)  y = MatMul (x, w) }"
        )
        array = np.array([[1, 2], [3, 4]], np.float32).astype(ir.DataType.BFLOAT16.numpy())
        model = ir.from_proto(ir.to_proto(model))
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == "h")
        value.const_value = ir.tensor(array, name="h")
        model.graph.register_initializer(value)
        after = applied(model, FoldConstantsPass())
        np.testing.assert_array_equal(after.graph.initializers["w"].const_value.numpy(), [[1, 2], [3, 4]])

    @pytest.mark.parametrize("kind", ["value_ints = [3, 4]", "value = int64[2] {3, 4}"])
    def test_constants_of_every_form_become_initializers(self, kind: str) -> None:
        model = model_of(f"g (float[12] x) => (float[3, 4] y) {{ s = Constant <{kind}> ()  y = Reshape (x, s) }}")
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["Reshape"]
        assert after.graph.initializers["s"].const_value.numpy().tolist() == [3, 4]
        assert_same(model, after)

    def test_shape_of_a_static_value_is_folded_and_its_dead_producer_removed(self) -> None:
        model = model_of(
            """
            g (float[2, 3, 4] x) => (float[2, 12] y) <int64 i = {0}, int64[1] minus = {-1}, int64[1] zero = {0}> {
              h = Relu (x)
              s = Shape (h)
              b = Gather (s, i)
              u = Unsqueeze (b, zero)
              t = Concat <axis = 0> (u, minus)
              y = Reshape (x, t)
            }"""
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["Reshape"]
        assert_same(model, after)

    def test_shape_of_a_dynamic_value_stays(self) -> None:
        model = model_of("g (float[n, 3] x) => (int64[2] y, float[n, 3] z) { y = Shape (x)  z = Relu (x) }")
        assert unchanged(model, FoldConstantsPass())

    def test_shape_slice_of_opset_15(self) -> None:
        model = model_of(
            "g (float[2, 3, 4] x) => (float[3, 8] y) { s = Shape <start = -2, end = -1> (x) "
            " m = Constant <value_ints = [-1]> ()  t = Concat <axis = 0> (s, m)  y = Reshape (x, t) }"
        )
        after = applied(model, FoldConstantsPass())
        assert after.graph.initializers["t"].const_value.numpy().tolist() == [3, -1]
        assert_same(model, after)

    def test_quantizers_and_random_numbers_stay(self) -> None:
        model = model_of(
            """
            g (float[n, 2] x) => (float[n, 2] y) <int8[2] q = {1, 2}, float s = {0.5}> {
              w = DequantizeLinear (q, s)
              r = RandomNormal <shape = [2]> ()
              r2 = RandomUniformLike (s)
              a = Add (r, r2)
              h = Mul (x, w)
              y = Add (h, a)
            }"""
        )
        assert unchanged(model, FoldConstantsPass())

    @pytest.mark.parametrize("kind", [np.int8, ml_dtypes.int4])
    def test_weights_stored_as_integers_become_float(self, kind: type) -> None:
        model = model_of(
            """
            g (float[n, 2] x) => (float[n, 2] y) <float[2] s = {0.5, 2.0}> {
              w = DequantizeLinear <axis = 0> (q, s)
              y = MatMul (x, w)
            }""",
            header='<ir_version: 10, opset_import: ["": 21]>',
            q=np.array([[1, -2], [3, 4]], kind),
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["MatMul"]
        assert after.graph.initializers["w"].const_value.numpy().tolist() == [[0.5, -1.0], [6.0, 8.0]]

    def test_weights_of_a_quantized_layer_stay_integers(self) -> None:
        model = model_of(
            """
            g (float[n, 2] x) => (float[n, 2] y) <int8[2, 2] q = {1, 2, 3, 4}, float s = {0.5}> {
              xq = QuantizeLinear (x, s)
              xd = DequantizeLinear (xq, s)
              w = DequantizeLinear (q, s)
              y = MatMul (xd, w)
            }"""
        )
        assert unchanged(model, FoldConstantsPass())

    def test_other_domains_and_inputs_with_defaults_are_not_constants(self) -> None:
        model = model_of(
            "g (float[2] x, float[2] d) => (float[2] y) { c = com.acme.Twice (k)  e = Neg (d) "
            " a = Add (c, e)  y = Add (a, x) }",
            header='<ir_version: 10, opset_import: ["": 18, "com.acme": 1]>',
            k=normal(2),
            d=normal(2),
        )
        assert unchanged(model, FoldConstantsPass())

    def test_constant_graph_output_keeps_its_node_and_its_name(self) -> None:
        model = model_of(
            "g (float[n, 3] x) => (float[n, 2] y, float[3, 2] t) { [tr] t = Transpose (w)  y = MatMul (x, t) }",
            w=normal(2, 3),
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["Transpose", "MatMul"]
        assert after.graph[1].inputs[1].is_initializer()
        assert_same(model, after)
        assert unchanged(after, FoldConstantsPass())

    def test_identity_of_a_weight_shares_it(self) -> None:
        model = model_of(
            "g (float[n, 3] x) => (float[n, 3] y) { v = Identity (w)  a = MatMul (x, w)  y = MatMul (a, v) }",
            w=normal(3, 3),
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["MatMul", "MatMul"]
        assert list(after.graph.initializers) == ["w"]
        assert_same(model, after)

    def test_nothing_grows_but_weights(self) -> None:
        text = """
            g (float[2048, 2048] x) => (float[2048, 2048] y) <float one = {1}, int64[2] s = {2048, 2048}> {
              e = Expand (one, s)
              y = %s (x, e)
            }"""
        assert unchanged(model_of(text % "Add"), FoldConstantsPass())
        assert ops(applied(model_of(text % "MatMul"), FoldConstantsPass())) == ["MatMul"]
        assert ops(applied(model_of(text % "Add"), FoldConstantsPass(max_growth_bytes=1 << 25))) == ["Add"]

    def test_large_weights_are_folded_once(self) -> None:
        model = model_of(
            "g (float[n, 512] x) => (float[n, 1024] y) { t = Transpose (w)  y = MatMul (x, t) }",
            w=normal(1024, 512),
        )
        after = applied(model, FoldConstantsPass(max_growth_bytes=0))
        assert ops(after) == ["MatMul"]
        assert list(after.graph.initializers) == ["t"]

    def test_bodies_of_control_flow_are_folded_in_place(self) -> None:
        model = model_of(
            """
            g (bool c, float[n, 3] x) => (float[n, 2] y) {
              y = If (c) <then_branch = a () => (float[n, 2] p) {
                            k = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()
                            t = Transpose (k)
                            p = MatMul (x, t) },
                          else_branch = b () => (float[n, 2] q) { u = Transpose (w)  q = MatMul (x, u) }>
            }""",
            w=normal(2, 3),
        )
        after = applied(model, FoldConstantsPass())
        branches = [attribute.as_graph() for attribute in after.graph[0].attributes.values()]
        assert [[node.op_type for node in branch] for branch in branches] == [["MatMul"], ["MatMul"]]
        for choice in (True, False):
            feeds = {"c": np.array(choice), "x": normal(4, 3)}
            np.testing.assert_allclose(run(after, feeds)[0], run(model, feeds)[0], rtol=1e-6)

    def test_unused_initializers_and_other_nodes_are_left_alone(self) -> None:
        model = model_of(
            "g (float[n] x) => (float[n] y) { c = Constant <value_float = 2.0> ()  [keep] y = Mul (x, c) }",
            spare=normal(3),
        )
        model.graph[1].metadata_props["note"] = "mine"
        after = applied(model, FoldConstantsPass())
        assert set(after.graph.initializers) == {"spare", "c"}
        assert after.graph[0].name == "keep"
        assert after.graph[0].metadata_props == {"note": "mine"}

    def test_nodes_that_the_runtime_cannot_compute_stay(self) -> None:
        model = model_of(
            "g (float[3] x) => (float[3] y) <int64[2] bad = {7, 7}> { "
            " c = Constant <value_floats = [1.0, 2.0, 3.0]> ()  r = Reshape (c, bad)  y = Add (x, r) }"
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["Reshape", "Add"]


class TestFunctions:
    FUNCTION = '<domain: "loc", opset_import: ["": %s]> f (a, w) => (b) { t = Transpose (w)  b = MatMul (a, t) }'
    HEADER = '<ir_version: 10, opset_import: ["": 18, "loc": 1]>'

    def test_inlined_and_folded(self) -> None:
        model = model_of(
            "g (float[n, 3] x) => (float[n, 2] y) { h = loc.f (x, v)  y = loc.f (h, w) } " + self.FUNCTION % 18,
            header=self.HEADER,
            v=normal(3, 3),
            w=normal(2, 3),
        )
        after = applied(model, FoldConstantsPass())
        assert ops(after) == ["MatMul", "MatMul"]
        assert not after.functions
        assert_same(model, after)

    def test_older_opset_in_a_function_is_fine_where_nothing_changed(self) -> None:
        model = model_of(
            "g (float[n, 3] x) => (float[n, 2] y) { y = loc.f (x, w) } " + self.FUNCTION % 17,
            header=self.HEADER,
            w=normal(2, 3),
        )
        assert ops(applied(model, FoldConstantsPass())) == ["MatMul"]

    def test_older_opset_in_a_function_is_refused_where_an_operator_changed(self) -> None:
        model = model_of(
            "g (float[n, 3] x) => (float[n, 1] y) { y = loc.f (x) } "
            '<domain: "loc", opset_import: ["": 17]> f (a) => (b) { b = ReduceSum (a) c = ReduceMax <axes = [1]> (a) }',
            header=self.HEADER,
        )
        with pytest.raises(ModelError, match=r"'f' is of opset 17 and the model of opset 18.*ReduceMax") as caught:
            inline_functions(model)
        assert "\n" not in str(caught.value)

    def test_function_that_hands_its_input_through(self) -> None:
        model = model_of(
            "g (float[n] x) => (float[n] y, float[n] z) { y, z = loc.f (x) } "
            '<domain: "loc", opset_import: ["": 18]> f (a) => (a, b) { b = Relu (a) }',
            header=self.HEADER,
        )
        after = applied(model, TidyPass())
        assert [v.name for v in (*after.graph.inputs, *after.graph.outputs)] == ["x", "y", "z"]
        x = normal(4)
        np.testing.assert_array_equal(run(after, {"x": x}), [x, np.maximum(x, 0)])

    def test_circle_of_calls_is_one_line(self) -> None:
        model = model_of(
            "g (float[n] x) => (float[n] y) { y = loc.f (x) } "
            '<domain: "loc", opset_import: ["": 18, "loc": 1]> f (a) => (b) { b = loc.h (a) } '
            '<domain: "loc", opset_import: ["": 18, "loc": 1]> h (a) => (b) { b = loc.f (a) }',
            header=self.HEADER,
        )
        with pytest.raises(ModelError, match="cannot be inlined: Cyclic"):
            TidyPass()(model)


# ------------------------------------------------------------------------------------------------------ FoldBatchNorm


BN = "BatchNormalization <epsilon = 0.01> (%s, scale, shift, mean, var)"


class TestFoldBatchNorm:
    @pytest.mark.parametrize(("space", "groups"), [(1, 1), (2, 1), (2, 2), (2, 4), (3, 2)])
    @pytest.mark.parametrize("bias", [False, True])
    def test_conv(self, space: int, groups: int, bias: bool) -> None:
        dims = ", ".join(["8"] * space)
        weights = {"w": normal(8, 4 // groups, *[3] * space)} | ({"b": normal(8)} if bias else {})
        model = model_of(
            f"g (float[n, 4, {dims}] x) => (y) {{"
            f" [conv] c = Conv <group = {groups}, strides = [{', '.join(['2'] * space)}]> (x, w{', b' if bias else ''})"
            f" [bn] y = {BN % 'c'} }}",
            **weights,
            **statistics(8),
        )
        infer_shapes(model)
        model.graph[0].metadata_props["note"] = "mine"
        after = applied(model, FoldBatchNormPass())
        assert ops(after) == ["Conv"]
        node = after.graph[0]
        assert (node.name, node.outputs[0].name, node.metadata_props) == ("conv", "y", {"note": "mine"})
        assert [v.name for v in node.inputs] == ["x", "w", "b" if bias else "conv.bias"]
        assert set(after.graph.initializers) == {"w", "b" if bias else "conv.bias"}
        assert_same(model, after)

    @pytest.mark.parametrize(("space", "groups"), [(1, 1), (2, 1), (2, 2), (2, 4), (3, 2)])
    def test_conv_transpose(self, space: int, groups: int) -> None:
        dims = ", ".join(["5"] * space)
        model = model_of(
            f"g (float[n, 8, {dims}] x) => (y) {{ c = ConvTranspose <group = {groups}> (x, w, b)  y = {BN % 'c'} }}",
            w=normal(8, 12 // groups, *[2] * space),
            b=normal(12),
            **statistics(12),
        )
        infer_shapes(model)
        after = applied(model, FoldBatchNormPass())
        assert ops(after) == ["ConvTranspose"]
        assert_same(model, after, tolerance=1e-4)

    @pytest.mark.parametrize("transposed", [0, 1])
    @pytest.mark.parametrize("addend", [None, (), (5,), (1, 5), (3, 1), (3, 5)])
    def test_gemm(self, transposed: int, addend: tuple[int, ...] | None) -> None:
        weights = {"w": normal(5, 4) if transposed else normal(4, 5)}
        if addend is not None:
            weights["c"] = normal(*addend)
        model = model_of(
            f"g (float[3, 4] x) => (float[3, 5] y) {{"
            f" h = Gemm <transB = {transposed}, alpha = 2.0, beta = 3.0> (x, w{', c' if addend is not None else ''})"
            f" y = {BN % 'h'} }}",
            **weights,
            **statistics(5),
        )
        after = applied(model, FoldBatchNormPass())
        assert ops(after) == ["Gemm"]
        assert_same(model, after)

    @pytest.mark.parametrize("dtype", ["float16", "double"])
    def test_weights_keep_their_type(self, dtype: str) -> None:
        kind = np.dtype("float64" if dtype == "double" else dtype).type
        model = model_of(
            f"g ({dtype}[n, 2, 6] x) => ({dtype}[n, 4, 4] y) {{ c = Conv (x, w)  y = {BN % 'c'} }}",
            w=normal(4, 2, 3).astype(kind),
            **statistics(4, kind),
        )
        after = applied(model, FoldBatchNormPass())
        assert {v.const_value.dtype for v in after.graph.initializers.values()} == {
            ir.DataType.from_numpy(np.dtype(kind))
        }
        if dtype == "float16":
            assert_same(model, after, tolerance=2e-2)
        else:  # onnxruntime's CPU provider has no Conv of doubles
            feeds = {"x": np.random.default_rng(0).normal(size=(3, 2, 6))}
            both = (ReferenceEvaluator(ir.to_proto(m)).run(None, feeds)[0] for m in (model, after))
            np.testing.assert_allclose(*both, rtol=1e-12, atol=1e-12)

    def test_several_in_a_row(self) -> None:
        model = model_of(
            f"g (float[n, 2, 6] x) => (float[n, 4, 4] y) {{ c = Conv (x, w)  d = {BN % 'c'}  y = {BN % 'd'} }}",
            w=normal(4, 2, 3),
            **statistics(4),
        )
        after = applied(model, FoldBatchNormPass())
        assert ops(after) == ["Conv"]
        assert_same(model, after)

    def test_shared_weight_is_copied(self) -> None:
        model = model_of(
            f"g (float[n, 4, 6, 6] x) => (y, z) {{ [a] c = Conv (x, w)  y = {BN % 'c'}  [b] z = Conv (x, w) }}",
            w=normal(4, 4, 3, 3),
            **statistics(4),
        )
        infer_shapes(model)
        after = applied(model, FoldBatchNormPass())
        assert [node.inputs[1].name for node in after.graph] == ["a.weight", "w"]
        assert_same(model, after)

    @pytest.mark.parametrize(
        "body",
        [
            f"c = Conv (x, w)  r = Relu (c)  y = {BN % 'r'}  z = Neg (y)",
            f"c = Conv (x, w)  y = {BN % 'c'}  z = Neg (c)",
            f"z = Conv (x, w)  y = {BN % 'z'}",
            f"v = Mul (w, x0)  c = Conv (x, v)  y = {BN % 'c'}  z = Neg (y)",
            f"c = Conv (x, w, x1)  y = {BN % 'c'}  z = Neg (y)",
            f"c = Conv (x, w)  y, m, v = {BN.replace('<', '<training_mode = 1, ') % 'c'}  z = Neg (y)",
            "c = Conv (x, w)  y = BatchNormalization (c, scale, shift, mean, x1)  z = Neg (y)",
        ],
        ids=["relu between", "two readers", "graph output", "weight varies", "bias varies", "training", "var varies"],
    )
    def test_stays(self, body: str) -> None:
        model = model_of(
            f"g (float[n, 4, 6, 6] x, float x0, float[4] x1) => (y, z) {{ {body} }}",
            w=normal(4, 4, 3, 3),
            **statistics(4),
        )
        assert unchanged(model, FoldBatchNormPass())

    @pytest.mark.parametrize("var", [-1.0, -0.01, np.nan])
    def test_variance_that_has_no_root_stays(self, var: float) -> None:
        weights = statistics(4) | {"var": np.array([1, 1, var, 1], np.float32)}
        model = model_of(
            "g (float[n, 4, 6] x) => (y) { c = Conv (x, w) "
            " y = BatchNormalization <epsilon = 0.009999999776482582> (c, scale, shift, mean, var) }",
            w=normal(4, 4, 3),
            **weights,
        )
        assert unchanged(model, FoldBatchNormPass())

    def test_result_beyond_float16_stays(self) -> None:
        weights = statistics(4, np.float16) | {"scale": np.full(4, 6e4, np.float16)}
        model = model_of(
            f"g (float16[n, 4, 6] x) => (y) {{ c = Conv (x, w)  y = {BN % 'c'} }}",
            w=np.full((4, 4, 3), 100, np.float16),
            **weights,
        )
        assert unchanged(model, FoldBatchNormPass())

    def test_opset_before_9_is_refused(self) -> None:
        model = model_of("g (float[n] x) => (y) { y = Relu (x) }", header='<ir_version: 4, opset_import: ["": 8]>')
        with pytest.raises(ir.passes.PreconditionError, match="opset 9"):
            FoldBatchNormPass()(model)


# ------------------------------------------------------------------------------------------------------ NormalizeGemm


class TestNormalizeGemm:
    @pytest.mark.parametrize("shape", [None, (), (1,), (5,), (1, 1), (1, 5), (3, 1), (3, 5)])
    @pytest.mark.parametrize("transposed", [0, 1])
    def test_constant_right(self, shape: tuple[int, ...] | None, transposed: int) -> None:
        weights = {"w": normal(5, 4) if transposed else normal(4, 5)}
        if shape is not None:
            weights["c"] = normal(*shape)
        model = model_of(
            f"g (float[4, 3] x) => (float[3, 5] y) {{ [fc] y = Gemm <transA = 1, transB = {transposed}, alpha = 2.0,"
            f" beta = 0.5> (x, w{'' if shape is None else ', c'}) }}",
            **weights,
        )
        model.graph[0].metadata_props["note"] = "mine"
        after = applied(model, NormalizeGemmPass())
        gemm = after.graph[0]
        assert (gemm.op_type, gemm.name, gemm.metadata_props) == ("Gemm", "fc", {"note": "mine"})
        assert set(gemm.attributes) <= {"transA", "transB"}
        per_row = shape is not None and len(shape) == 2 and shape[0] > 1
        assert ops(after) == (["Gemm", "Add"] if per_row else ["Gemm"])
        if shape is not None and not per_row:
            assert gemm.inputs[2].const_value.numpy().shape == (5,)
        assert_same(model, after)
        assert unchanged(after, NormalizeGemmPass())

    @pytest.mark.parametrize(
        ("beta", "expected"), [(1.0, ["Gemm", "Add"]), (0.5, ["Gemm", "Mul", "Add"]), (0.0, ["Gemm"])]
    )
    def test_addend_that_varies(self, beta: float, expected: list[str]) -> None:
        model = model_of(
            f"g (float[n, 4] x, float[5] c) => (float[n, 5] y) {{ h = Relu (c)  p = Gemm <beta = {beta}> (x, w, h)"
            "  y = Relu (p) }",
            w=normal(4, 5),
        )
        after = applied(model, NormalizeGemmPass())
        assert ops(after) == ["Relu", *expected, "Relu"]
        assert len(after.graph[1].inputs) == 2
        assert_same(model, after)

    @pytest.mark.parametrize("shape", [None, (5,), (3, 1), "varies"])
    @pytest.mark.parametrize("flags", ["transA = 0", "transA = 1, transB = 1, alpha = 3.0, beta = 0.5", "beta = 0.0"])
    def test_constant_left_becomes_matmul(self, shape: tuple[int, ...] | str | None, flags: str) -> None:
        swapped = "transA = 1" in flags
        weights = {"w": normal(4, 3) if swapped else normal(3, 4)}
        if isinstance(shape, tuple):
            weights["c"] = normal(*shape)
        model = model_of(
            f"g (float[{'5, 4' if swapped else '4, 5'}] x{', float[5] c' if shape == 'varies' else ''})"
            f" => (float[3, 5] y) {{ [fc] y = Gemm <{flags}> (w, x{'' if shape is None else ', c'}) }}",
            **weights,
        )
        model.graph[0].metadata_props["note"] = "mine"
        after = applied(model, NormalizeGemmPass())
        assert "Gemm" not in ops(after)
        node = next(node for node in after.graph if node.op_type == "MatMul")
        assert (node.name, node.metadata_props, dict(node.attributes)) == ("fc", {"note": "mine"}, {})
        assert node.inputs[0].is_initializer()
        assert_same(model, after)

    def test_shared_weight_is_copied(self) -> None:
        model = model_of(
            "g (float[n, 4] x) => (float[n, 4] y) { [a] h = Gemm <alpha = 2.0> (x, w)  [b] y = Gemm (h, w) }",
            w=normal(4, 4),
        )
        after = applied(model, NormalizeGemmPass())
        assert [node.inputs[1].name for node in after.graph] == ["a.weight", "w"]
        assert_same(model, after)

    def test_normal_form_and_two_variables_stay(self) -> None:
        model = model_of(
            "g (float[n, 4] x, float[5, 2] v) => (float[n, 2] y)"
            " { h = Gemm <alpha = 1.0> (x, w, c)  y = Gemm <alpha = 2.0, beta = 3.0> (h, v) }",
            w=normal(4, 5),
            c=normal(5),
        )
        assert unchanged(model, NormalizeGemmPass())

    def test_weight_beyond_float16_stays(self) -> None:
        model = model_of(
            "g (float16[n, 4] x) => (float16[n, 4] y) { y = Gemm <alpha = 1000.0> (x, w) }",
            w=np.full((4, 4), 100, np.float16),
        )
        assert unchanged(model, NormalizeGemmPass())


# ------------------------------------------------------------------------------------------------------------ opsets


class TestOpset:
    OLD = """
        g (float[batch, 3, 8, 8] x) => (float[batch, classes] y, float[batch, 4] z) {
          [conv] c = Conv <pads = [1, 1, 1, 1]> (x, w)
          [clip] r = Clip (c, lo, hi)
          [drop] d = Dropout <ratio = 0.3> (r)
          [pool] p = GlobalAveragePool (d)
          [squeeze] z = Squeeze <axes = [2, 3]> (p)
          [soft] s = Softmax <axis = 1> (d)
          y = Reshape (s, shape)
        }"""

    def old_model(self) -> ir.Model:
        model = model_of(
            self.OLD,
            header='<ir_version: 6, opset_import: ["": 11, "com.acme": 3], producer_name: "maker", '
            'doc_string: "about", metadata_props: ["key": "value"]>',
            w=normal(4, 3, 3, 3),
            lo=np.float32(0.0),
            hi=np.float32(6.0),
            shape=np.array([0, -1], np.int64),
        )
        for node in model.graph:
            node.metadata_props["node"] = node.name or ""
            node.doc_string = f"about {node.name}"
        model.graph.metadata_props["graph"] = "data"
        model.graph.doc_string = "about the graph"
        model.graph.inputs[0].metadata_props["input"] = "data"
        model.graph[0].outputs[0].metadata_props["value"] = "data"
        return model

    def test_11_becomes_13_and_nothing_is_lost(self) -> None:
        before = self.old_model()
        after = self.old_model()
        assert ensure_opset(after)
        assert after.opset_imports == {"": 13, "com.acme": 3}
        assert after.metadata_props == {"key": "value"}
        assert (after.producer_name, after.doc_string) == ("maker", "about")
        graph = after.graph
        assert (graph.name, graph.doc_string, graph.metadata_props) == ("g", "about the graph", {"graph": "data"})
        assert [str(v.shape) for v in (*graph.inputs, *graph.outputs)] == [
            "[batch,3,8,8]",
            "[batch,classes]",
            "[batch,4]",
        ]
        assert graph.inputs[0].metadata_props == {"input": "data"}
        assert set(graph.initializers) >= {"w", "lo", "hi", "shape"}
        nodes = {node.name: node for node in graph}
        assert {"conv", "clip", "drop", "pool", "squeeze", "soft"} <= set(nodes)
        for name in ("conv", "clip", "drop", "pool", "squeeze", "soft"):
            assert nodes[name].metadata_props == {"node": name}
            assert nodes[name].doc_string == f"about {name}"
        assert nodes["conv"].outputs[0].metadata_props == {"value": "data"}
        assert_same(before, after)
        assert not ensure_opset(after)

    def test_bodies_are_raised_too(self) -> None:
        def model() -> ir.Model:
            return model_of(
                "g (float[1, 3] x, bool c) => (float[q] y) { y = If (c) <"
                "then_branch = t () => (float[q] a) { [inner] a = Squeeze <axes = [0]> (x) },"
                "else_branch = e () => (float[q] b) { m = Neg (x)  b = Squeeze <axes = [0]> (m) }> }",
                header='<ir_version: 6, opset_import: ["": 11]>',
            )

        after = applied(model(), TidyPass())
        feeds = {"x": normal(1, 3), "c": np.array(False)}
        np.testing.assert_array_equal(run(after, feeds)[0], run(model(), feeds)[0])

    def test_weights_as_inputs_of_ir_version_3(self) -> None:
        model = model_of(
            "g (float[n, 4] x, float[4, 5] w, float[5] b) => (float[n, 5] y) { h = MatMul (x, w)  y = Add (h, b) }",
            header='<ir_version: 3, opset_import: ["": 7]>',
            w=normal(4, 5),
            b=normal(5),
        )
        after = applied(model, TidyPass())
        assert [v.name for v in after.graph.inputs] == ["x"]
        assert set(after.graph.initializers) == {"w", "b"}
        assert_same(model, after)

    def test_weights_that_may_be_overridden_are_fixed_and_other_defaults_stay(self) -> None:
        model = model_of(
            "g (float[n, 4] x, float[4, 5] w, float gain) => (float[n, 5] y) { h = MatMul (x, w)  y = Mul (h, gain) }",
            w=normal(4, 5),
            gain=np.float32(2),
        )
        after = applied(model, TidyPass())
        assert [v.name for v in after.graph.inputs] == ["x", "gain"]
        assert_same(model, after)

    def test_large_defaults_and_external_weights_survive(self, tmp_path: Path) -> None:
        text = "g (float[n, 4] x, float[400] gain) => (float[n, 400] y) { h = MatMul (x, w)  y = Mul (h, gain) }"
        weights = {"w": normal(4, 400), "gain": normal(400), "spare": normal(400)}
        before = model_of(text, header='<ir_version: 6, opset_import: ["": 11]>', **weights)
        ir.save(before, tmp_path / "m.onnx", external_data="m.data")
        after = ir.load(tmp_path / "m.onnx")
        assert ensure_opset(after)
        assert [v.name for v in after.graph.inputs] == ["x", "gain"]
        assert set(after.graph.initializers) == {"w", "gain", "spare"}
        assert isinstance(after.graph.initializers["w"].const_value, ir.ExternalTensor)
        ir.external_data.load_to_model(after)
        assert_same(before, after)

    def test_28_becomes_27_where_nothing_needs_28(self) -> None:
        model = model_of(
            "g (float[n] x) => (float[n] y) { y = Relu (x) }", header='<ir_version: 13, opset_import: ["": 28]>'
        )
        assert ensure_opset(model)
        assert model.opset_imports[""] == 27

    def test_28_becomes_27_where_an_operator_changed_but_not_for_this_use_of_it(self) -> None:
        model = model_of(
            "g (float16[n] x) => (float[n] y) { [cast] c = Cast <to = 1> (x)  y = Mul (c, w) }",
            header='<ir_version: 13, opset_import: ["": 28]>',
            w=normal(400),
        )
        model.graph[0].metadata_props["note"] = "mine"
        assert ensure_opset(model)
        assert model.opset_imports[""] == 27
        assert (model.graph[0].name, model.graph[0].metadata_props) == ("cast", {"note": "mine"})
        np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), normal(400))

    @pytest.mark.parametrize(
        "body",
        [
            "[remainder] y = Mod (x, x)",
            (
                "c = Constant <value_int = 1> ()  b = Cast <to = 9> (c)  y = If (b) <"
                "then_branch = t () => (float[n] p) { [remainder] p = Mod (x, x) },"
                "else_branch = e () => (float[n] q) { q = Relu (x) }>"
            ),
        ],
    )
    def test_28_is_refused_where_an_operator_needs_it(self, body: str) -> None:
        model = model_of(
            f"g (float[n] x) => (float[n] y) {{ {body} }}", header='<ir_version: 13, opset_import: ["": 28]>'
        )
        with pytest.raises(ModelError, match=r"of opset 28 and cannot be brought to 27: .*with opset 27$") as caught:
            ensure_opset(model)
        assert "\n" not in str(caught.value)

    def test_what_the_converter_cannot_raise_is_one_line(self) -> None:
        model = model_of(
            "g (float[n, 3] x) => (float[n, 3] y) { y = Scan9 (x) }", header='<ir_version: 4, opset_import: ["": 8]>'
        )
        with pytest.raises(ModelError, match="opset 8 and cannot be brought to 13") as caught:
            ensure_opset(model)
        assert "\n" not in str(caught.value)

    def test_scan_of_opset_8_is_refused(self) -> None:
        model = model_of(
            "g (float[1, 2] i, float[1, 3, 2] x) => (float[1, 2] y) { y = Scan <num_scan_inputs = 1, "
            'body = b (float[2] p, float[2] q) => (float[2] s) { s = Add (p, q) }> ("", i, x) }',
            header='<ir_version: 3, opset_import: ["": 8]>',
        )
        with pytest.raises(ModelError, match="opset 8, whose Scan"):
            ensure_opset(model)

    def test_no_default_domain(self) -> None:
        model = model_of(
            "g (float[n] x) => (float[n] y) { y = com.acme.F (x) }",
            header='<ir_version: 10, opset_import: ["com.acme": 1]>',
        )
        assert ensure_opset(model)
        assert model.opset_imports == {"com.acme": 1, "": 21}


# -------------------------------------------------------------------------------------------------------------- tidy


class TestTidy:
    NETWORK = f"""
        g (float[n, 3, 8, 8] x) => (float[n, 5] y) {{
          k = Constant <value_float = 0.5> ()
          w2 = Mul (w, k)
          c = Conv <pads = [1, 1, 1, 1]> (x, w2)
          i = Identity (c)
          b = {BN % "i"}
          r = Relu (b)
          p = GlobalAveragePool (r)
          f = Flatten (p)
          t = Transpose <perm = [1, 0]> (v)
          y = Gemm <alpha = 2.0> (f, t, bias)
        }}"""

    def network(self, header: str = HEADER) -> ir.Model:
        weights = {"w": normal(4, 3, 3, 3), "v": normal(5, 4), "bias": normal(5)}
        return model_of(self.NETWORK, header=header, **weights, **statistics(4))

    @pytest.mark.parametrize("opset", [9, 11, 13, 18, 24, 27])
    def test_whole_network(self, opset: int) -> None:
        header = f'<ir_version: {10 if opset >= 21 else 8}, opset_import: ["": {opset}]>'
        text = self.NETWORK.replace("Constant <value_float = 0.5>", "Constant <value = float {0.5}>")
        weights = {"w": normal(4, 3, 3, 3), "v": normal(5, 4), "bias": normal(5)}
        model = model_of(text, header=header, **weights, **statistics(4))
        after = applied(model, TidyPass())
        assert ops(after) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
        assert after.opset_imports[""] == max(opset, 13)
        assert str(after.graph.outputs[0].shape) == "[n,5]"
        assert_same(model, after)

    def test_composes_with_stock_passes(self) -> None:
        model = self.network()
        after = applied(model, TidyPass(), CheckerPass(), TopologicalSortPass())
        assert_same(model, after)

    def test_a_second_time_changes_nothing(self) -> None:
        model = TidyPass()(self.network()).model
        assert unchanged(model, TidyPass())

    def test_same_bytes_every_time(self) -> None:
        first, second = (ir.to_proto(TidyPass()(self.network()).model) for _ in range(2))
        assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)

    def test_names_are_unique_and_given_ones_stay(self) -> None:
        model = model_of(
            "g (float[n] x) => (float[n] y) { [a] p = Relu (x)  [a] q = Neg (p)  [a_1] r = Abs (q)  y = Relu (r) }"
        )
        after = applied(model, TidyPass())
        assert [node.name for node in after.graph] == ["a", "a_2", "a_1", "Relu_0"]
        assert not name_nodes(after)

    def test_identity_at_both_ends_keeps_both_names(self) -> None:
        model = model_of(
            "g (float[n] x) => (float[n] y, float[n] z, float[n] u) { y = Relu (x)  z = Identity (y) "
            " i = Identity (x)  u = Identity (i) }"
        )
        after = applied(model, TidyPass())
        assert ops(after) == ["Relu", "Identity", "Identity"]
        assert_same(model, after)

    def test_shapes_are_known_behind_other_domains(self) -> None:
        model = model_of(
            "g (float[n, 3] x) => (float[n, m] y) { h = Relu (x)  c = com.acme.F (h)  y = Neg (c) }",
            header='<ir_version: 10, opset_import: ["": 18, "com.acme": 1]>',
        )
        after = applied(model, TidyPass())
        assert str(after.graph[0].outputs[0].shape) == "[n,3]"
        assert after.graph[1].outputs[0].shape is None

    def test_declared_dimensions_of_outputs_stay(self) -> None:
        model = model_of("g (float[n, 3] x) => (float[n, m] y) { h = Relu (x)  y = Neg (h) }")
        after = applied(model, TidyPass())
        assert str(after.graph.outputs[0].shape) == "[n,m]"


class TestGraphEdit:
    def test_weight_values_are_followed_backwards(self) -> None:
        model = model_of(
            "g (float[n, 2] x) => (float[n, 2] y) { t = Transpose (w)  h = MatMul (x, t)  y = Add (h, b) }",
            w=normal(2, 2),
            b=normal(2),
        )
        assert {value.name for value in weight_values(model)} == {"t", "w"}

    def test_fresh_names_avoid_values_nodes_and_each_other(self) -> None:
        names = Names(model_of("g (float[n] x) => (float[n] y) { [node] y = Relu (x) }"))
        assert [names.fresh(n) for n in ("x", "node", "y", "free", "free")] == [
            "x_1",
            "node_1",
            "y_1",
            "free",
            "free_1",
        ]
