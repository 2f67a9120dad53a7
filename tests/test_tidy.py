"""The whole tidying pass: what it must leave, and the same numbers out of it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import CheckerPass, TopologicalSortPass
from onnx_texts import BN, HEADER, applied, assert_same, model_of, ops, statistics, unchanged
from tensors import normal

from raqu_onnx.graph_edit import Names, name_nodes, weight_values
from raqu_onnx.passes.tidy import TidyPass


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
