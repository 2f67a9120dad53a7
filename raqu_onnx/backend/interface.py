"""`onnx.backend.base` on virtual crossbars: `prepare`, `run`, `run_model`, `supports_device`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto
from onnx.backend.base import Backend, BackendRep, namedtupledict

from raqu_onnx.backend.folder import map_model, open_folder
from raqu_onnx.backend.session import CrossbarSession, Plan, Setting, converters
from raqu_onnx.cell_errors import CellErrors
from raqu_onnx.errors import ConfigError, DataError, RaquError
from raqu_onnx.manifest import Manifest, read_manifest
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.validate_phases import MODEL_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.backend.folder import MappedModel

__all__ = [
    "CrossbarBackend",
    "CrossbarBackendRep",
    "is_compatible",
    "prepare",
    "run_model",
    "run_node",
    "supports_device",
]

Source = str | os.PathLike[str] | ModelProto
"""A folder that `optimize` wrote, its `model.onnx`, or with `manifest` any emitted model as a file or in memory."""


class CrossbarBackendRep(BackendRep):
    """A model that is ready to run.

    Args:
        mapped: The model with its manifest and cells.
        setting: How its crossbars behave.
        threads: Threads of onnxruntime.
    """

    def __init__(self, mapped: MappedModel, setting: Setting, threads: int | None = None) -> None:
        self._inputs = [item.name for item in model_inputs(mapped.model)]
        self._session = CrossbarSession(Plan(mapped, threads), setting)
        self._outputs = namedtupledict("Outputs", [str(output.name) for output in mapped.model.graph.outputs])

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run one batch.

        Args:
            inputs: Arrays in the order of the model's inputs, or by name; for a single input the array itself.
            kwargs: None are known.

        Returns:
            The outputs in the model's order; also by name, as `outputs["logits"]`.

        Raises:
            DataError: The inputs do not fit the model.
            ConfigError: An option is given.
        """
        if kwargs:
            raise ConfigError(f"run: there is no option {next(iter(kwargs))!r}; options are given to prepare")
        return self._outputs(*self._session.run(None, self._feeds(inputs)))

    def _feeds(self, inputs: NDArray[Any] | Sequence[Any] | Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        if isinstance(inputs, dict):
            feeds = {str(name): np.asarray(array) for name, array in inputs.items()}
        else:
            arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
            if len(arrays) != len(self._inputs):
                raise DataError(f"inputs: {len(arrays)} given, the model has {len(self._inputs)}")
            feeds = {name: np.asarray(array) for name, array in zip(self._inputs, arrays, strict=True)}
        if feeds.keys() != set(self._inputs):
            given, known = (", ".join(sorted(names)) for names in (feeds, self._inputs))
            raise DataError(f"inputs: {given} given, the model has {known}")
        return feeds

    @property
    def session(self) -> CrossbarSession:
        """The session behind, which tells what the ADCs did."""
        return self._session


class CrossbarBackend(Backend):
    """Virtual crossbars; floating-point operators between mapped nodes run in onnxruntime on the CPU."""

    @classmethod
    def is_compatible(cls, model: Source, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether `prepare` takes a model."""
        if not cls.supports_device(device):
            return False
        try:
            cls.prepare(model, device, **kwargs)
        except RaquError:
            return False
        return True

    @classmethod
    def prepare(  # type: ignore[override]  # a folder is what carries the manifest; options have names
        cls,
        model: Source,
        device: str = "CPU",
        *,
        manifest: str | os.PathLike[str] | Manifest | None = None,
        cells: str | os.PathLike[str] | None = None,
        adc_bits: int | Literal["chip", "ideal"] = "chip",
        errors: CellErrors | None = None,
        seed: int = 0,
        sliced: bool = False,
        threads: int | None = None,
    ) -> CrossbarBackendRep:
        """Make a model ready to run.

        Args:
            model: See `Source`.
            device: `CPU` is the only one.
            manifest: The manifest, for a model that does not lie in the folder that `optimize` wrote.
            cells: Its cells file; without one the cells are programmed from the model's codes.
            adc_bits: Resolution of the converters: the chip's, ideal, or another one.
            errors: What cells do.
            seed: Seed of these errors.
            sliced: Run slice by slice even where nothing can be lost.
            threads: Threads of onnxruntime, default all that this process may use.

        Raises:
            RaquError: The files cannot be read, contradict each other, or cannot be run.
        """
        if not cls.supports_device(device):
            raise ConfigError(f"device {device}: the backend runs on the CPU only")
        mapped = _open(model, manifest, cells)
        setting = Setting(
            converters(mapped.manifest.chip, adc_bits), errors or CellErrors(), seed=seed, repeat=0, sliced=sliced
        )
        return CrossbarBackendRep(mapped, setting, threads)

    @classmethod
    def run_model(cls, model: Source, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """Prepare a model and run one batch."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(cls, node: NodeProto, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Not possible: a node alone is on no crossbar.

        Raises:
            ConfigError: Always, whatever else is given.
        """
        del args, kwargs
        raise ConfigError(f"node {node.name}: a single node has no manifest; run the whole model")

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether a device, such as `CPU` or `CPU:0`, is the CPU."""
        return device.partition(":")[0] == "CPU"


def _open(
    model: Source, manifest: str | os.PathLike[str] | Manifest | None, cells: str | os.PathLike[str] | None
) -> MappedModel:
    if manifest is not None:
        name = "model" if isinstance(model, ModelProto) else os.fspath(model)
        found = manifest if isinstance(manifest, Manifest) else read_manifest(os.fspath(manifest))
        source = model if isinstance(model, ModelProto) else os.fspath(model)
        return map_model(load_model(source), found, None if cells is None else Path(cells), name=name)
    if isinstance(model, ModelProto):
        raise ConfigError("prepare: a model in memory needs its manifest: give manifest=, or the folder of optimize")
    path = Path(model)
    if cells is not None:
        raise ConfigError("prepare: cells goes with manifest; the folder of optimize has its own")
    return open_folder(path.parent if path.name == MODEL_FILE and path.is_file() else path)


is_compatible = CrossbarBackend.is_compatible
prepare = CrossbarBackend.prepare
run_model = CrossbarBackend.run_model
run_node = CrossbarBackend.run_node
supports_device = CrossbarBackend.supports_device
