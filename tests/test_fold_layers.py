"""BatchNormalization and the factors of Gemm go into weights, and the same numbers come out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_texts import BN, applied, assert_same, model_of, ops, statistics, unchanged
from tensors import normal

from raqu_onnx.graph_edit import infer_shapes
from raqu_onnx.passes.fold_batchnorm import FoldBatchNormPass
from raqu_onnx.passes.normalize_gemm import NormalizeGemmPass


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
