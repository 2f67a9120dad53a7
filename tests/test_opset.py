"""Older and newer opsets become one that the pipeline knows, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_texts import applied, assert_same, model_of, run
from tensors import normal

from raqu_onnx.errors import ModelError
from raqu_onnx.opset import ensure_opset
from raqu_onnx.passes.tidy import TidyPass


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
