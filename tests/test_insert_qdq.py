"""What insert-qdq writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - a limit on threads holds for the libraries that are loaded
from qdq_models import CASES, as_vectors, assert_integer, case_model, emit

from raqu_onnx.annotations import EMITTED, MAPPED, QUANTIZED, NodeBits, mapped_nodes
from raqu_onnx.evaluation import make_session
from raqu_onnx.patches import input_vectors

if TYPE_CHECKING:
    pass


@pytest.mark.parametrize("activation", [8, 4])
@pytest.mark.parametrize("name", sorted(CASES))
def test_one_node_of_every_kind(name: str, activation: int) -> None:
    case = CASES[name]
    proto, x = case_model(case)
    mixed = (7, 4, 0, 2, 5, 3)[: case.kernels]
    emitted = emit(proto, x, bits={"m": NodeBits(mixed, activation)})
    takes_bias = "MatMul" not in case.text
    ops = emitted.ops()
    assert ops["QuantizeLinear"] == 1
    assert ops["Clip"] == (activation < 8)
    assert ops["DequantizeLinear"] == 2 + takes_bias
    assert (
        len(emitted.proto.graph.node) == len(proto.graph.node) + sum(ops[o] for o in ops if "Linear" in o) + ops["Clip"]
    )
    node = mapped_nodes(emitted.model)[0]
    quantizer = QUANTIZED.require(node).activation
    assert quantizer is not None
    assert quantizer.zero_point > 0
    assert "w" not in emitted.model.graph.initializers
    assert "b" not in emitted.model.graph.initializers
    codes, y = emitted.run([EMITTED.require(node).activation or "", "y"])
    np.testing.assert_array_equal(codes, quantizer.quantize(emitted.run([MAPPED.require(node).input_name])[0]))
    assert y.shape[0] == len(x["x"])
    assert_integer(emitted)
    plain, fused = emitted.levels(["y"])
    np.testing.assert_allclose(fused[0], plain[0], atol=1e-4 * np.abs(plain[0]).max())


@pytest.mark.parametrize("name", sorted(CASES))
def test_eight_bits_are_near_the_float_model(name: str) -> None:
    proto, x = case_model(CASES[name])
    emitted = emit(proto, x, weight=8)
    expected = make_session(proto.SerializeToString(), threads=1).run(None, x)[0]
    found = emitted.run(["y"])[0]
    assert np.abs(found - expected).mean() < 0.015 * np.abs(expected).mean()


def test_a_float_activation_quantizes_weights_only() -> None:
    proto, x = case_model(CASES["conv2d"])
    emitted = emit(proto, x, activation=None, bits={"m": NodeBits((4, 0, 8, 2), None)})
    assert emitted.ops() == {"Conv": 1, "DequantizeLinear": 1}
    names = EMITTED.require(emitted.node("Conv"))
    assert (names.activation, names.activation_scale, names.bias) == (None, None, None)
    y = emitted.run(["y"])[0]
    assert not y[:, 1].any()
    quantized = QUANTIZED.require(emitted.node("Conv"))
    matrices = quantized.node.layout.to_matrices(quantized.weight())
    expected = np.einsum("pgk,gkm->pgm", input_vectors(quantized.node, x["x"]), matrices) + quantized.float_bias
    np.testing.assert_allclose(as_vectors(quantized.node, y), expected, atol=1e-5)
