"""What is constant is folded, and local functions are inlined, while the numbers stay."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx_texts import applied, assert_same, model_of, ops, run, unchanged
from tensors import normal

from raqu_onnx.errors import ModelError
from raqu_onnx.opset import inline_functions
from raqu_onnx.passes.fold_constants import FoldConstantsPass
from raqu_onnx.passes.tidy import TidyPass


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
