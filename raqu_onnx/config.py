"""Settings of a run: one typed model for the command line, the configuration file and the Python API."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from raqu_onnx.data import PictureOptions
from raqu_onnx.errors import ConfigError
from raqu_onnx.search.result import Goal, SearchSettings

__all__ = ["BitRange", "OptimizeConfig", "load_config", "parse_bits", "to_toml"]

#: Points of accuracy that may be lost when neither a budget nor a drop is given.
DEFAULT_ACCURACY_DROP = 0.5


def parse_bits(value: object) -> tuple[int, int] | None:
    """Read ``4``, ``"2-8"`` or ``"float"``; a pair is taken as it is, and so is None, which is ``"float"``.

    Raises:
        ValueError: It is none of these, or not within 2 to 8.
    """
    if value is None or (isinstance(value, str) and value.strip() == "float"):
        return None
    match value:
        case int() if not isinstance(value, bool):
            low = high = value
        case [int() as low, int() as high]:
            pass
        case str() if found := re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", value):
            low = int(found[1])
            high = int(found[2] or found[1])
        case _:
            raise ValueError(f"{value!r} is no width: give a number such as 4 or a range such as 2-8")
    if not 2 <= low <= high <= 8:
        raise ValueError(f"{value!r} is out of range: widths are 2 to 8, the smaller one first")
    return low, high


def _weight_bits(value: object) -> tuple[int, int]:
    parsed = parse_bits(value)
    if parsed is None:
        raise ValueError("weights cannot stay float: give a number such as 4 or a range such as 2-8")
    return parsed


def _bits_text(value: tuple[int, int] | None) -> str | int:
    if value is None:
        return "float"
    return value[0] if value[0] == value[1] else f"{value[0]}-{value[1]}"


BitRange = Annotated[tuple[int, int], BeforeValidator(_weight_bits), PlainSerializer(_bits_text)]
OptionalBitRange = Annotated[tuple[int, int] | None, BeforeValidator(parse_bits), PlainSerializer(_bits_text)]


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
    fit_samples: int = Field(256, ge=1, strict=True, description="most calibration samples that weights are fitted on")
    max_crossbars: int | None = Field(None, ge=1, strict=True, description="most crossbars that may be used")
    max_accuracy_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        strict=True,
        description="most points of accuracy (or of agreement with float) that may be lost",
    )
    weight_bits: BitRange = Field((2, 8), description="width of weights: a range is searched")
    activation_bits: OptionalBitRange = Field((8, 8), description="width of activations: a range is searched")
    weight_method: Literal["nearest", "mse", "gptq", "sequential"] = Field(
        "sequential", description="how weight codes are chosen"
    )
    activation_range: Literal["min-max", "percentile", "mse"] = Field("mse", description="how ranges are chosen")
    evaluations: int = Field(24, ge=0, strict=True, description="candidates that the Bayesian stage judges")
    sensitivity_samples: int = Field(
        256, ge=1, strict=True, description="samples that each node's sensitivity is measured on"
    )
    batch_size: int = Field(64, ge=1, strict=True, description="samples per run")
    seed: int = Field(0, ge=0, lt=2**31, strict=True, description="seed of everything random")
    threads: int | None = Field(None, ge=1, strict=True, description="threads of onnxruntime, default all")
    cells: bool = Field(False, strict=True, description="also write the level of every programmed cell")
    passes: str | None = Field(None, description="pipeline to run instead of the default one")
    skip: tuple[str, ...] = Field((), description="passes of the pipeline to leave out")
    dump_after: tuple[str, ...] = Field((), description="passes after which the model is written to the dumps folder")

    @property
    def goal(self) -> Goal:
        """The budget and the drop allowed; with neither given, `DEFAULT_ACCURACY_DROP`."""
        if self.max_crossbars is None and self.max_accuracy_drop is None:
            return Goal(None, DEFAULT_ACCURACY_DROP)
        return Goal(self.max_crossbars, self.max_accuracy_drop)

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
    def search_settings(self) -> SearchSettings:
        """Settings of the search."""
        return SearchSettings(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            evaluations=self.evaluations,
            sensitivity_samples=self.sensitivity_samples,
            batch_size=self.batch_size,
            seed=self.seed,
            threads=self.threads,
        )


def load_config(path: str | Path | None, overrides: dict[str, Any]) -> OptimizeConfig:
    """Read a TOML file and lay given values over it.

    Args:
        path: The file, or None.
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
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, value in given.items():
        below = values.get(key)
        values[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    try:
        return OptimizeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(item, path, given) for item in error.errors())) from error


def _problem(item: Any, path: str | Path | None, given: dict[str, Any]) -> str:
    """One wrong value, named as its author wrote it: an option, or a key of the file."""
    loc = [str(part) for part in item["loc"]]
    key = ".".join(loc)
    place: Any = given
    for part in loc[:2]:
        place = place.get(part) if isinstance(place, dict) else place
    if item["type"] == "extra_forbidden":
        from difflib import get_close_matches

        known = [field.alias or name for name, field in OptimizeConfig.model_fields.items()]
        if len(loc) > 1:
            known = [f"{loc[0]}.{name}" for name in PictureOptions.model_fields]
        near = get_close_matches(key, known, 1)
        advice = f", did you mean {near[0]}?" if near else f"; settings are {', '.join(known)}"
        return f"{path or 'settings'}: {key} is no setting{advice}"
    where = f"{path or 'settings'}: {key}"
    if place is not None:
        where = "--" + "-".join(loc[:2] if loc[0] == "pictures" else loc[:1]).replace("pictures", "picture")
        where = where.replace("_", "-")
    message = item["msg"].removeprefix("Value error, ")
    found = "" if repr(item["input"]) in message else f", found {item['input']!r}"
    return f"{where}: {message}{found}"


def to_toml(config: OptimizeConfig) -> str:
    """The configuration as a TOML file that replays the run; settings without a value are left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(config.model_dump(mode="json", by_alias=True)))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    # Not pydantic's exclude_none, which would also drop a None that is written as a word: `activation_bits = "float"`.
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
