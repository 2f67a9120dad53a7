"""`RaquOnnxQuantization`, a pass for Microsoft Olive (`pip install 'raqu-onnx[olive]'`).

Olive knows the passes that its package configuration names. From Python::

    from olive.workflows import run
    from raqu_onnx.integrations.olive import package_config

    run("workflow.json", package_config=package_config())

On the command line::

    python -m raqu_onnx.integrations.olive > olive-with-raqu.json
    olive run --config workflow.json --package-config olive-with-raqu.json
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from olive.data.config import DataConfig
from olive.model import ONNXModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from raqu_onnx.config import OptimizeConfig
from raqu_onnx.errors import RaquError
from raqu_onnx.optimization import optimize
from raqu_onnx.passes.write_manifest import MODEL_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

__all__ = ["RaquOnnxQuantization", "package_config"]

_logger = logging.getLogger(__name__)

# What Olive gives in its own way: the model, where to write, and data.
_GIVEN = frozenset({"model", "output", "calibration", "selection", "evaluation", "pictures"})
_DATA = {
    "data_config": "inputs that ranges are measured on; labels in it are not looked at",
    "selection_data_config": "data that widths are chosen on, judged by its labels if it has any; "
    "default a part of the calibration data",
    "evaluation_data_config": "data that the result is reported on, likewise; default none",
}


class RaquOnnxQuantization(Pass):  # type: ignore[misc]
    """Choose bits for a chip of RRAM crossbars, write a QDQ model, and its mapping manifest beside it.

    Parameters are the fields of `raqu_onnx.OptimizeConfig` (`hw`, `max_crossbars`, `weight_bits`, ...) and the data
    configurations above. `manifest.json`, `report.json` and what else was asked for become additional files of the
    model, which Olive takes along. A pass after this one that changes the model breaks its agreement with the manifest.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: object) -> dict[str, PassConfigParam]:
        """The parameters, with defaults and what they mean."""
        del accelerator_spec
        defaults = OptimizeConfig().model_dump(mode="json")
        parameters = {
            name: PassConfigParam(type_=Any, default_value=defaults[name], description=field.description)
            for name, field in OptimizeConfig.model_fields.items()
            if name not in _GIVEN
        }
        for name, description in _DATA.items():
            parameters[name] = PassConfigParam(
                type_=DataConfig | dict, required=name == "data_config", description=description
            )
        return parameters

    @classmethod
    def validate_config(cls, config: Any, accelerator_spec: object) -> bool:
        """Whether the settings are ones that `optimize` takes; why not goes to the log."""
        del accelerator_spec
        try:
            _settings(config)
        except RaquError as error:
            _logger.error("%s: %s", cls.__name__, error)
            return False
        return True

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        """Run the whole pipeline on the model's file.

        Raises:
            RaquError: Model, chip, data or settings are not usable.
        """
        data = {name: _container(getattr(config, name)) for name in _DATA}
        path = Path(output_model_path)
        folder = path.parent if path.suffix == ".onnx" else path
        optimize(
            model.model_path,
            folder,
            calibration=data["data_config"].create_calibration_dataloader(),
            selection=_arrays(data["selection_data_config"]),
            evaluation=_arrays(data["evaluation_data_config"]),
            config=_settings(config),
            force=True,
        )
        files = sorted(str(item) for item in folder.iterdir() if not item.name.startswith(MODEL_FILE))
        return ONNXModelHandler(folder, onnx_file_name=MODEL_FILE, model_attributes={"additional_files": files})


def _settings(config: Any) -> OptimizeConfig:
    """What the pass's parameters say.

    Raises:
        ConfigError: One of them is wrong.
    """
    values = config.model_dump()
    return OptimizeConfig.model_validate({key: value for key, value in values.items() if key not in _DATA})


def _container(config: Any) -> Any:
    """The data container behind a data configuration, None without one."""
    if config is None:
        return None
    return (config if isinstance(config, DataConfig) else DataConfig.model_validate(config)).to_data_container()


def _arrays(container: Any) -> dict[str, NDArray[Any]] | None:
    """All batches of a container, with labels where it has them: feeds, or pairs of feeds and labels."""
    if container is None:
        return None
    batches: Iterable[Any] = container.create_dataloader()
    parts: dict[str, list[NDArray[Any]]] = {}
    for batch in batches:
        feeds, labels = batch if isinstance(batch, list | tuple) else (batch, None)
        named: Mapping[str, Any] = feeds if labels is None else {**feeds, "labels": labels}
        for name, values in named.items():
            parts.setdefault(name, []).append(np.asarray(values))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def package_config() -> dict[str, Any]:
    """Olive's own package configuration with `RaquOnnxQuantization` added, as JSON values."""
    known: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    known["passes"][RaquOnnxQuantization.__name__] = {
        "module_path": f"raqu_onnx.integrations.olive.{RaquOnnxQuantization.__name__}",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": ["qdq"],
        "dataset": "dataset_required",
    }
    return known


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=2))
