"""Settings of a run: one typed model for the command line, the configuration file and the Python API."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from raqu_onnx.config_errors import explain
from raqu_onnx.config_paths import resolve_paths
from raqu_onnx.config_values import (
    bits_text,
    check_granularity,
    kept_as_written,
    parse_bits,
    parse_crossbars,
    parse_parts,
    parse_weight_bits,
    pattern_list,
    patterns,
)
from raqu_onnx.cpu import SAFE_WEIGHT_BITS
from raqu_onnx.data import PictureOptions
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.errors import ConfigError
from raqu_onnx.goals import goal_of, goal_on
from raqu_onnx.hardware import load_chip
from raqu_onnx.metrics import parse_metric
from raqu_onnx.placement import PlacementMethod
from raqu_onnx.quantities import parse_energy, parse_latency
from raqu_onnx.quantizer import QuantizerSettings
from raqu_onnx.ranges import RangeMethod
from raqu_onnx.scoring import Task
from raqu_onnx.search.budget import Objective
from raqu_onnx.search.result import Goal, SearchSettings
from raqu_onnx.weights import FitPart, WeightMethod

__all__ = [
    "BitRange",
    "OptimizeConfig",
    "default_output",
    "effective_toml",
    "load_config",
    "parse_bits",
    "to_toml",
]

# Settings that change no byte of the result, unless the time runs out.
_UNRECORDED = ("output", "threads", "workers", "dask", "timeout", "cache", "choose", "earlier")

# Kernels of a layer that share a width.
_GROUPS = {"layer": None, "kernel": 1}


BitRange = Annotated[tuple[int, int], BeforeValidator(parse_weight_bits), PlainSerializer(bits_text)]
CrossbarBudget = Annotated[int | Literal["chip"] | None, BeforeValidator(parse_crossbars)]
PartCount = Annotated[int | Literal["auto"] | None, BeforeValidator(parse_parts)]
Latency = Annotated[str | float | None, BeforeValidator(kept_as_written(parse_latency))]
Energy = Annotated[str | float | None, BeforeValidator(kept_as_written(parse_energy))]
OptionalBitRange = Annotated[tuple[int, int] | None, BeforeValidator(parse_bits), PlainSerializer(bits_text)]


class OptimizeConfig(BaseModel):
    """Everything that decides the result of `optimize`; the same configuration gives the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="ONNX model to optimize")
    output: str | None = Field(None, description="folder for the results, default MODEL-raqu beside the model")
    hw: str = Field("generic", description="built-in chip or TOML file")
    calibration: str | None = Field(None, description="inputs that ranges are measured on")
    selection: str | None = Field(None, description="data that widths are chosen on, default a part of the calibration")
    evaluation: str | None = Field(None, description="data that the result is reported on", alias="eval")
    pictures: PictureOptions | None = Field(None, description="how pictures of a folder become inputs")
    calibration_samples: int = Field(512, ge=1, strict=True, description="most samples to calibrate on")
    fit_samples: int = Field(
        QuantizerSettings.fit_samples,
        ge=1,
        strict=True,
        description="most calibration samples that weights are fitted on",
    )
    max_crossbars: int | None = Field(None, ge=1, strict=True, description="most crossbars that may be used")
    max_accuracy_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        strict=True,
        description="most points of accuracy (or of agreement with float) that may be lost",
    )
    max_latency: Latency = Field(
        None, description="most time of one inference alone, such as 2.5us (a number is ns), or cycles: 40000cycles"
    )
    max_energy: Energy = Field(None, description="most energy of one inference, such as 0.5uJ (a number is pJ)")
    max_average_bits: float | None = Field(
        None, gt=0, le=8, strict=True, description="most bits per weight on average, dropped ones counted with 0"
    )
    objective: Objective | None = Field(
        None, description="what is minimized within the limits; default the loss where there are any, else crossbars"
    )
    fit_chip: bool | None = Field(
        None, strict=True, description="lose least on the whole chip; default where it has counts and no goal is given"
    )
    replicate: CrossbarBudget = Field(
        None, description="most crossbars that copies of the slowest nodes may fill, chip for all that it has"
    )
    partitions: PartCount = Field(
        None, description="most parts that are programmed one after the other, auto for as few as will do"
    )
    weight_bits: BitRange = Field(SearchSettings.weight_bits, description="width of weights: a range is searched")
    reduce_range: bool = Field(
        False, strict=True, description="limit weights to 7 bits, exact in onnxruntime on CPUs without VNNI too"
    )
    activation_bits: OptionalBitRange = Field(
        SearchSettings.activation_bits, description="width of activations: a range is searched"
    )
    input_bits: BitRange = Field(
        SearchSettings.input_bits, description="width of the model's own inputs: a range is searched"
    )
    granularity: Annotated[str, BeforeValidator(check_granularity)] = Field(
        "kernel", description="what has a width of its own: layer, kernel, or group:N for groups of N kernels"
    )
    drop: bool = Field(True, strict=True, description="kernels may get 0 bits, where a layer has no single width")
    task: Task = Field("auto", description="what the outputs are: class scores, or values that all count")
    metric: Annotated[str, BeforeValidator(kept_as_written(parse_metric))] = Field(
        "auto",
        description="what quality is: top1, topk:K, kl, agreement, sqnr or FILE.py:FUNCTION; auto: as `task` says",
    )
    exclude: Annotated[tuple[str, ...], BeforeValidator(patterns)] = Field(
        (), description="nodes that stay as they are: names, operator types or regular expressions"
    )
    keep: Annotated[tuple[str, ...], BeforeValidator(pattern_list)] = Field(
        (), description="nodes that keep 8 bits: first, last, names, operator types or regular expressions"
    )
    weight_method: WeightMethod = Field(QuantizerSettings.weight_method, description="how weight codes are chosen")
    fit_without: Annotated[tuple[FitPart, ...], BeforeValidator(pattern_list)] = Field(
        (), description="parts of the weight method to leave out"
    )
    equalize: bool = Field(
        False, strict=True, description="scale channels so that those of an activation use its codes more equally"
    )
    activation_range: RangeMethod = Field(QuantizerSettings.activation_range, description="how ranges are chosen")
    evaluations: int = Field(
        SearchSettings.evaluations,
        ge=0,
        strict=True,
        description="candidates that a Bayesian stage judges, those dismissed after a quarter of the data too",
    )
    sensitivity_samples: int = Field(
        SearchSettings.sensitivity_samples,
        ge=1,
        strict=True,
        description="samples that each node's sensitivity is measured on",
    )
    batch_size: int = Field(SearchSettings.batch_size, ge=1, strict=True, description="samples per run")
    seed: int = Field(SearchSettings.seed, ge=0, lt=2**31, strict=True, description="seed of everything random")
    threads: int | None = Field(None, ge=1, strict=True, description="threads of onnxruntime, default all")
    workers: int = Field(1, ge=1, strict=True, description="processes of this machine that judge candidates")
    dask: str | None = Field(None, description="scheduler of a Dask cluster whose workers judge candidates")
    batch: int = Field(SearchSettings.batch, ge=1, strict=True, description="candidates that are asked for at once")
    timeout: float | None = Field(
        None, ge=0, strict=True, description="seconds after which the search comes to its end with what it has"
    )
    cache: bool = Field(
        True,
        strict=True,
        description="keep sensitivities and error curves on disk for later searches of the same model",
    )
    placement: PlacementMethod = Field(
        "fast", description="fast: constructive; exact: improved by an integer program where a gap is left"
    )
    choose: int | None = Field(None, ge=1, strict=True, description="point of an earlier search's front to write")
    earlier: str | None = Field(None, description="result folder of that search")
    cells: bool = Field(False, strict=True, description="also write the level of every programmed cell")
    emit: Annotated[tuple[Literal["qonnx"], ...], BeforeValidator(pattern_list)] = Field(
        (), description="further forms of the emitted model to write: qonnx"
    )
    passes: str | None = Field(None, description="pipeline to run instead of the default one")
    skip: tuple[str, ...] = Field((), description="passes of the pipeline to leave out")
    dump_after: tuple[str, ...] = Field((), description="passes after which the model is written to the dumps folder")

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(
        cls, data: object, handler: ModelWrapValidatorHandler[OptimizeConfig], info: ValidationInfo
    ) -> OptimizeConfig:
        """Name every wrong value as its author wrote it.

        Raises:
            ConfigError: A key or value is wrong.
        """
        try:
            return handler(data)
        except ValidationError as error:
            context: dict[str, Any] = info.context or {}
            known = {field.alias or name: None for name, field in cls.model_fields.items()}
            tables = {**known, "pictures": list(PictureOptions.model_fields)}
            raise ConfigError(explain(error, tables, context.get("path"), context.get("given", {}))) from error

    @property
    def goal(self) -> Goal:
        """What is asked for, whatever the chip; see `raqu_onnx.goals`."""
        return goal_of(self)

    def given(self, **arguments: object) -> OptimizeConfig:
        """These settings with what was given as arguments instead, so that what is recorded is what was run.

        Args:
            arguments: By field name. A text or a path is taken as it is, None changes nothing, and any other object
                has no name that could be recorded: its field becomes None.
        """
        changes = {
            key: str(value) if isinstance(value, str | Path) else None
            for key, value in arguments.items()
            if value is not None
        }
        return self.model_copy(update=changes)

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest says of the settings: all that decide its bytes, unless the time runs out."""
        return self.model_dump(mode="json", by_alias=True, exclude=set(_UNRECORDED))

    @property
    def method(self) -> tuple[str, ...]:
        """Settings of the method that are not the default, as options of the command line."""
        options = []
        for name in ("weight_method", "fit_without", "fit_samples", "equalize", "activation_range", "reduce_range"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                text = "" if value is True else f" {','.join(value) if isinstance(value, tuple) else value}"
                options.append(f"--{name.replace('_', '-')}{text}")
        return tuple(options)

    @property
    def search_settings(self) -> SearchSettings:
        """Settings of the search."""
        most = SAFE_WEIGHT_BITS if self.reduce_range else MAX_BITS
        low, high = self.weight_bits
        return SearchSettings(
            weight_bits=(min(low, most), min(high, most)),
            activation_bits=self.activation_bits,
            evaluations=self.evaluations,
            group=_GROUPS[self.granularity] if self.granularity in _GROUPS else int(self.granularity.split(":")[1]),
            drop=self.drop,
            sensitivity_samples=self.sensitivity_samples,
            batch_size=self.batch_size,
            seed=self.seed,
            batch=self.batch,
            threads=self.threads,
            task=self.task,
            metric=self.metric,
            kept_weight_bits=most,
            input_bits=self.input_bits,
        )


def load_config(path: str | Path | None, overrides: dict[str, Any]) -> OptimizeConfig:
    """Read a TOML file and lay given values over it.

    Args:
        path: The file, or None. Relative paths in it are relative to its folder.
        overrides: Values that win over the file, by key; those that are None are ignored. Keys of a table, such as
            `pictures`, win one by one.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong; every problem is named.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a TOML file: {error}") from error
        if "crossbars" in values and "encoding" in values:
            raise ConfigError(f"{path}: it describes a chip and holds no settings; give it with --hw")
        values = resolve_paths(values, path)
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, value in given.items():
        below = values.get(key)
        values[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return OptimizeConfig.model_validate(values, context={"path": path, "given": given})


def to_toml(config: OptimizeConfig) -> str:
    """The configuration as a TOML file that replays the run; settings without a value are left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(config.model_dump(mode="json", by_alias=True)))


def effective_toml(config: OptimizeConfig) -> str:
    """Like `to_toml`, with the defaults that depend on other settings filled in, and a word on those without a value.

    The goal that applies on the chip stands among the settings; where widths are fixed and none is given, a comment
    says so.

    Raises:
        ChipError: The chip cannot be read.
        ConfigError: It gives no figures for the goal.
    """
    goal = goal_on(config, load_chip(config.hw))
    applied = {"max_accuracy_drop": goal.max_accuracy_drop, "fit_chip": goal.fit_chip or config.fit_chip}
    filled = config.model_copy(update={"output": default_output(config), **applied})
    unset = {
        "model": "none, an argument of the command",
        "calibration": "synthetic inputs",
        "selection": "the calibration data, as the widths are fixed, or synthetic inputs"
        if config.search_settings.is_uniform
        else "half of the calibration data, or synthetic inputs",
        "eval": "none",
        **dict.fromkeys(("max_crossbars", "max_latency", "max_energy", "max_average_bits"), "no limit"),
        "fit_chip": "a chip with counts and no other goal",
        "objective": f"the {goal.minimized or 'loss'}",
        "max_accuracy_drop": "no limit" if goal else "none: the widths are fixed and no goal is given",
        "threads": "all",
        "dask": "none, this machine judges",
        "timeout": "none, the evaluations bound the search",
        "passes": "the default pipeline",
        "replicate": "one copy of each node",
        "partitions": "all on the chip at once",
        "choose": "a new search",
        "earlier": "a new search",
    }
    values = filled.model_dump(mode="json", by_alias=True)
    comments = [f"# {key}: {words}\n" for key, words in unset.items() if values[key] is None]
    return "".join([*comments, to_toml(filled)])


def default_output(config: OptimizeConfig) -> str | None:
    """The folder for the results: the one given, else a folder beside the model; None without a model."""
    if config.output is not None or config.model is None:
        return config.output
    model = Path(config.model)
    return str(model.parent / f"{model.stem}-raqu")


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    # Not pydantic's exclude_none, which would also drop a None that is written as a word: `activation_bits = "float"`.
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
