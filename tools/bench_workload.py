"""Models and images that tools/bench_quantize.py measures on: networks with drawn weights, or a trained one."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper
from reference_models import write_reference_model

from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.data import InputSpec, synthetic_dataset
from raqu_onnx.errors import ConfigError
from raqu_onnx.evaluation import make_session
from raqu_onnx.model_io import load_model, model_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NETWORKS", "Workload", "make_workload"]

#: Networks that are given drawn weights.
NETWORKS = ("resnet18", "resnet50")
_BUNDLED = "bundled:"
_EPSILON = 1e-5
# Images that the folded BatchNormalization has its statistics from.
_NORMALIZED_ON = 4
# Logits that hardly differ from image to image would make any SQNR meaningless.
_LEAST_SPREAD = 0.05


@dataclass(frozen=True)
class Workload:
    """A float model with the inputs of all methods.

    Attributes:
        name: How tables call it.
        model: The ONNX file.
        input_name: Its one input.
        calibration: `.npy` file of calibration inputs, shape (N, ...).
        judged: Other inputs, on which results are compared with float.
        labels: Class of each judged input, or None.
        data: What the inputs are.
    """

    name: str
    model: Path
    input_name: str
    calibration: Path
    judged: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    data: str


def make_workload(name: str, folder: Path, *, images: int, judged: int, size: int, seed: int) -> Workload:
    """Write a model and its calibration inputs.

    Args:
        name: One of `NETWORKS`, `bundled:resnet20`, `bundled:mobilenetv2`, or the path of an ONNX file.
        folder: Where files go.
        images: Calibration inputs.
        judged: Inputs that results are judged on.
        size: Height and width where the model leaves them free.
        seed: Of weights and generated inputs.

    Raises:
        ConfigError: There is no such model, or it takes more than one input.
        RaquError: The model cannot be used.
    """
    path = folder / f"{name.removeprefix(_BUNDLED).replace('/', '_').removesuffix('.onnx')}.onnx"
    if name.startswith(_BUNDLED):
        return _bundled(name, path, images, judged)
    if name in NETWORKS:
        _write_network(name, path, size, seed)
    elif Path(name).is_file():
        path = Path(name)
    else:
        raise ConfigError(
            f"--model {name}: there is no such file; give {', '.join(NETWORKS)}, {_BUNDLED}NAME or a path"
        )
    inputs = model_inputs(load_model(path))
    if len(inputs) != 1:
        raise ConfigError(f"--model {name}: it has {len(inputs)} inputs; models with one can be compared")
    arrays = _generated(inputs[0], size, images + judged, seed)
    calibration = folder / "calibration.npy"
    np.save(calibration, arrays[:images])
    return Workload(name, path, inputs[0].name, calibration, arrays[images:], None, "generated")


def _bundled(name: str, path: Path, images: int, judged: int) -> Workload:
    try:
        path.write_bytes(bundled_model(name.removeprefix(_BUNDLED)))
    except OSError as error:
        raise ConfigError(f"--model {name}: no such model is bundled; give resnet20 or mobilenetv2") from error
    arrays, test = bundled_arrays("calibration"), bundled_arrays("test")
    calibration = path.with_name("calibration.npy")
    np.save(calibration, arrays["input"][:images])
    return Workload(
        name, path, "input", calibration, test["input"][:judged], test["labels"][:judged], "Fashion-MNIST test images"
    )


def _generated(spec: InputSpec, size: int, count: int, seed: int) -> NDArray[np.float32]:
    """Images with the spectrum of natural ones; the first dimension counts samples, free others are `size`."""
    shape = tuple(size if d is None else d for d in spec.fixed_shape[1:])
    batches = synthetic_dataset([InputSpec(spec.name, spec.dtype, ("N", *shape))], count, seed).batches(count)
    return np.concatenate([batch.feeds[spec.name] for batch in batches])


# ------------------------------------------------------------------------------------------------------------ weights


def _write_network(name: str, path: Path, size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = onnx.load(write_reference_model(name, scratch))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim in dims[2:]:
        dim.dim_value = size
    rng = np.random.default_rng(seed)
    weights = _draw(model, rng)
    shape = tuple(dim.dim_value for dim in dims[1:])
    images = _generated(InputSpec("input", np.dtype(np.float32), ("N", *shape)), size, _NORMALIZED_ON, seed + 1)
    _store(model, weights)
    _fold_statistics(model, weights, images, rng)
    _store(model, weights)
    onnx.save(model, path)
    logits = make_session(path).run(None, {model.graph.input[0].name: images})[0]
    spread = float(logits.std(0).mean() / logits.std())
    if not spread > _LEAST_SPREAD:
        raise ConfigError(f"--model {name}: logits spread by {spread:.3f} of their size over images; take another seed")


def _draw(model: onnx.ModelProto, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Weights by name: normal with the deviation that keeps power through ReLU (He et al., ICCV 2015, equation 10)."""
    weights: dict[str, NDArray[np.float32]] = {}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            shape = shapes[node.input[1]]
            deviation = math.sqrt(2 / math.prod(shape[1:]))
            weights[node.input[1]] = rng.standard_normal(shape, np.float32) * np.float32(deviation)
            weights[node.input[2]] = np.zeros(shape[0], np.float32)
    return weights


def _fold_statistics(
    model: onnx.ModelProto,
    weights: dict[str, NDArray[np.float32]],
    images: NDArray[np.float32],
    rng: np.random.Generator,
) -> None:
    """Give every convolution the scale and bias that a BatchNormalization behind it would have left.

    All statistics come from one run, in which every convolution is normalized before the next one reads it.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.node[:], probe.graph.output[:]
    affine: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for node in model.graph.node:
        if node.op_type != "Conv":
            probe.graph.node.append(node)
            continue
        channels = len(weights[node.input[2]])
        # Unequal kernels, as training leaves them.
        gamma = rng.uniform(0.4, 1.2, channels).astype(np.float32)
        beta = rng.normal(0, 0.3, channels).astype(np.float32)
        affine[node.name] = gamma, beta
        probe.graph.node.extend(_normalized(node))
        for key, value in (("gamma", gamma), ("beta", beta)):
            tensor = numpy_helper.from_array(value.reshape(1, -1, 1, 1), f"{node.name}.{key}")
            probe.graph.initializer.append(tensor)
        probe.graph.output.extend(onnx.ValueInfoProto(name=f"{node.name}.{key}") for key in ("mean", "variance"))
    probe.graph.initializer.append(numpy_helper.from_array(np.array(_EPSILON, np.float32), "epsilon"))
    session = make_session(probe.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {model.graph.input[0].name: images}), strict=True))
    for node in model.graph.node:
        if node.op_type == "Conv":
            gamma, beta = affine[node.name]
            mean, variance = (found[f"{node.name}.{key}"].reshape(-1) for key in ("mean", "variance"))
            scale = gamma / np.sqrt(variance + _EPSILON)
            weights[node.input[1]] = weights[node.input[1]] * scale[:, None, None, None]
            weights[node.input[2]] = beta - mean * scale


def _normalized(conv: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A convolution, and BatchNormalization by the statistics of the batch, in nodes that give those as well."""
    raw, name = onnx.NodeProto(), conv.name
    raw.CopyFrom(conv)
    raw.output[0] = f"{name}.raw"
    return [
        raw,
        helper.make_node("ReduceMean", [f"{name}.raw"], [f"{name}.mean"], axes=[0, 2, 3], keepdims=1),
        helper.make_node("Sub", [f"{name}.raw", f"{name}.mean"], [f"{name}.centred"]),
        helper.make_node("Mul", [f"{name}.centred"] * 2, [f"{name}.square"]),
        helper.make_node("ReduceMean", [f"{name}.square"], [f"{name}.variance"], axes=[0, 2, 3], keepdims=1),
        helper.make_node("Add", [f"{name}.variance", "epsilon"], [f"{name}.regular"]),
        helper.make_node("Sqrt", [f"{name}.regular"], [f"{name}.deviation"]),
        helper.make_node("Div", [f"{name}.centred", f"{name}.deviation"], [f"{name}.unit"]),
        helper.make_node("Mul", [f"{name}.unit", f"{name}.gamma"], [f"{name}.scaled"]),
        helper.make_node("Add", [f"{name}.scaled", f"{name}.beta"], [conv.output[0]]),
    ]


def _store(model: onnx.ModelProto, weights: dict[str, NDArray[np.float32]]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
