"""Weights that are held once, and memory that goes back to the system."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from raqu_onnx.data import InputSpec, open_dataset
from raqu_onnx.evaluation import make_session
from raqu_onnx.memory import leave_message
from raqu_onnx.model_io import load_model, model_digest, to_proto
from raqu_onnx.session_model import session_model

if TYPE_CHECKING:
    from collections.abc import Callable


def constants() -> onnx.ModelProto:
    """Tensors of several kinds, as initializers and in a node."""
    tensors = {
        "f": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "h": np.ones(3, np.float16),
        "i": np.arange(2, dtype=np.int64),
    }
    packed = helper.make_tensor("p", onnx.TensorProto.INT4, [3], [-8, 0, 7])
    words = helper.make_tensor("s", onnx.TensorProto.STRING, [1], [b"word"])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([2, 3]), "value")),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    initializers = [*(numpy_helper.from_array(array, name) for name, array in tensors.items()), packed, words]
    initializers[0].doc_string = "said of f"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_tensors_leave_their_message_and_stay_what_they_are() -> None:
    model = ir.serde.deserialize_model(constants())
    before = to_proto(model)
    leave_message(model)
    after = to_proto(model)
    assert [type(v.const_value).__name__ for v in model.graph.initializers.values()].count("Tensor") == 4
    for one, other in zip(before.graph.initializer, after.graph.initializer, strict=True):
        assert (one.name, one.data_type, one.dims, one.doc_string) == (
            other.name,
            other.data_type,
            other.dims,
            other.doc_string,
        )
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    constant = after.graph.node[0].attribute[0].t
    np.testing.assert_array_equal(numpy_helper.to_array(constant), [2, 3])


def test_reading_a_weight_copies_nothing() -> None:
    model = load_model(constants())
    tensor = model.graph.initializers["f"].const_value
    assert tensor is not None
    assert np.shares_memory(tensor.numpy(), tensor.numpy())


def test_a_model_at_hand_has_the_digest_of_its_file(small_net: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(small_net(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert model_digest(path, load_model(path)) == model_digest(path)


def test_weights_live_until_their_session_is_open() -> None:
    weight = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [300, 300])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [300, 300])],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    # A message gives a new copy of its bytes whenever they are read.
    session = make_session(session_model(ir.serde.deserialize_model(proto)), threads=1)
    gc.collect()
    overwriting = [np.full(weight.shape, 7, np.float32) for _ in range(50)]
    found = session.run(None, {"x": np.zeros_like(weight)})[0]
    assert len(overwriting) == 50
    np.testing.assert_array_equal(found, weight)


# Once 30 MB were freed, arrays of that size come from the heap; small ones between them keep it from shrinking.
HOLES = """
import gc
import numpy as np
from raqu_onnx.memory import release_freed

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

np.ones(30_000_000, np.uint8).sum()
pairs = [(np.ones(20_000_000, np.uint8), np.ones(5_000, np.uint8)) for _ in range(4)]
small = [pair[1] for pair in pairs]
del pairs
gc.collect()
before = resident()
release_freed()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 5_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_all_of_a_mapped_file_takes_the_memory_of_a_part(tmp_path: Path) -> None:
    def mapped() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:")) * 1024

    values = np.random.default_rng(0).normal(size=(500, 20_000)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    before = mapped()
    inputs = [InputSpec("x", np.dtype(np.float32), ("n", 20_000))]
    dataset = open_dataset(tmp_path / "x.npy", inputs)
    held = [mapped() - before]
    for number, batch in enumerate(dataset.batches(50)):
        np.testing.assert_array_equal(batch.feeds["x"], values[50 * number : 50 * number + 50])
        held.append(mapped() - before)
    # 40 MB in ten batches.
    assert len(held) == 11
    assert max(held) < 15_000_000
