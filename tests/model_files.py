"""Models as files, and the one line that a refused one gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from raqu_onnx.errors import ModelError
from raqu_onnx.model_io import load_model, to_proto

TEXT = """
<ir_version: 10, opset_import: ["": 18], metadata_props: ["key": "value"]>
g (float[batch, 4] x) => (float[batch, 3] y) { [layer] h = MatMul (x, w)  y = Add (h, b) }
"""


def proto_of(text: str = TEXT, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    given = weights or {"w": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(3, np.float32)}
    for name, array in given.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def refused(source: Path | onnx.ModelProto | ir.Model, *, check_weights: bool = True) -> str:
    """The one line that a refused model gives."""
    with pytest.raises(ModelError) as caught:
        load_model(source, check_weights=check_weights)
    message = str(caught.value)
    assert "\n" not in message
    if isinstance(source, Path):
        assert message.startswith(f"{source}: ")
    return message


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(to_proto(model).SerializeToString())
    return session.run(None, {"x": np.ones((2, 4), np.float32)})[0]


def external(folder: Path, location: str, *, length: int | None = None, offset: int | None = None) -> Path:
    """A model whose weight `w` (48 bytes) is said to lie at `location`."""
    proto = proto_of()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path
