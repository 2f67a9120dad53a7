"""The default pipeline, pipelines given as text, and how they are run."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import onnx_ir as ir

from raqu_onnx.data import take
from raqu_onnx.errors import ConfigError, ModelError, RaquError
from raqu_onnx.goals import goal_on, require_search
from raqu_onnx.manifest import DataProvenance
from raqu_onnx.memory import release_freed
from raqu_onnx.partitioning import require_parts
from raqu_onnx.passes import PASSES
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.calibrate import CalibratePass
from raqu_onnx.passes.check import CheckPass
from raqu_onnx.passes.equalize import EqualizePass
from raqu_onnx.passes.insert_qdq import InsertQDQPass
from raqu_onnx.passes.place_crossbars import PlaceCrossbarsPass
from raqu_onnx.passes.quantize_weights import QuantizeWeightsPass
from raqu_onnx.passes.search_bits import SearchBitsPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.passes.write_manifest import WriteManifestPass
from raqu_onnx.passes.write_qonnx import WriteQonnxPass
from raqu_onnx.replication import require_budget
from raqu_onnx.search import SearchRun, no_progress
from raqu_onnx.weights import FIT_PARTS, METHOD_PARTS

if TYPE_CHECKING:
    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.data import Dataset
    from raqu_onnx.hardware import Chip
    from raqu_onnx.search import ProgressCallback

__all__ = [
    "DEFAULT_PIPELINE",
    "PassTiming",
    "Resources",
    "build_pipeline",
    "default_pipeline",
    "pass_names",
    "pass_options",
    "run_pipeline",
]

logger = logging.getLogger(__name__)

# Selection samples that the emitted model is run on at both optimization levels.
_CHECKED_SAMPLES = 16

#: Names of the default pipeline's passes, in order.
DEFAULT_PIPELINE = (
    "tidy",
    "annotate-tiling",
    "calibrate",
    "search-bits",
    "quantize-weights",
    "insert-qdq",
    "place-crossbars",
    "write-manifest",
    "check",
)


@dataclass(frozen=True)
class Resources:
    """What passes work with, besides the model and the settings.

    Attributes:
        chip: The chip.
        calibration: Data that ranges are measured on.
        selection: Data that widths are chosen on.
        folder: Where files are written; published by the caller when all passes have succeeded.
        source_sha256: Digest of the source model.
        progress: Told of every step of long passes.
        search_run: How the search is carried out.
    """

    chip: Chip
    calibration: Dataset
    selection: Dataset
    folder: Path
    source_sha256: str | None = None
    progress: ProgressCallback = no_progress
    search_run: SearchRun = field(default_factory=SearchRun)


@dataclass(frozen=True)
class PassTiming:
    """Wall time of one pass in seconds."""

    name: str
    seconds: float


def default_pipeline(config: OptimizeConfig, resources: Resources) -> list[ir.passes.PassBase]:
    """Passes of a whole run, in order."""
    chip = resources.chip
    bits, activation_bits = config.search_settings.widest
    # What a kernel's own width costs is told by the second moments of what drives it.
    kernels = config.search_settings.group is not None and not config.search_settings.is_uniform
    return [
        # Constants folded, BatchNormalization gone, every node named, shapes known.
        TidyPass(exclude=config.exclude),
        # Which nodes crossbars compute, why others stay in float, and which keep 8 bits.
        AnnotateTilingPass(exclude=config.exclude, keep=config.keep, input_bits=config.input_bits[0]),
        # Channels scaled so that they use the codes of their activations equally.
        *([_equalize(config, resources)] if config.equalize else []),
        # Ranges and second moments of the inputs of those nodes.
        CalibratePass(
            resources.calibration,
            batch_size=config.batch_size,
            threads=config.threads,
            moments=config.weight_method != "nearest" or kernels,
            pairs=config.weight_method == "gptq" or (kernels and config.weight_method == "sequential"),
        ),
        # Bits of every node, judged on data that calibration has not seen.
        SearchBitsPass(
            chip,
            resources.selection,
            goal_on(config, chip),
            config.search_settings,
            weight_method=config.weight_method,
            activation_range=config.activation_range,
            fit_samples=config.fit_samples,
            fit_without=frozenset(config.fit_without),
            partitions=config.partitions,
            progress=resources.progress,
            run=resources.search_run,
        ),
        # Integer codes, scales and biases at those bits.
        QuantizeWeightsPass(
            chip.encoding,
            weight_bits=bits,
            activation_bits=activation_bits,
            weight_method=config.weight_method,
            activation_range=config.activation_range,
            fit_samples=config.fit_samples,
            fit_without=frozenset(config.fit_without),
            threads=config.threads,
            kept_weight_bits=config.search_settings.kept_weight_bits,
            input_bits=config.input_bits[1],
        ),
        # The integers written into the graph.
        InsertQDQPass(),
        # A place for every block of weights.
        PlaceCrossbarsPass(
            chip,
            replicate=config.replicate,
            partitions=config.partitions,
            method=config.placement,
            max_crossbars=config.max_crossbars,
        ),
        # Model, manifest and cells as files.
        WriteManifestPass(
            resources.folder,
            configuration=config.recorded,
            seed=config.seed,
            cells=config.cells,
            source_sha256=resources.source_sha256,
            calibration=_provenance(resources.calibration),
            selection=_provenance(resources.selection),
        ),
        # The same model for tools that read QONNX.
        *([WriteQonnxPass(resources.folder)] if "qonnx" in config.emit else []),
        # The files read back as a stranger would, every invariant, both optimization levels.
        CheckPass(resources.folder, take(resources.selection, _CHECKED_SAMPLES), threads=config.threads),
    ]


def _equalize(config: OptimizeConfig, resources: Resources) -> EqualizePass:
    return EqualizePass(resources.calibration, threads=config.threads)


def _provenance(dataset: Dataset) -> DataProvenance:
    samples = dataset.size
    if samples is None:
        # A stream tells its size only to those who read it.
        samples = sum(batch.size for batch in dataset.batches(64))
    return DataProvenance(name=dataset.name, digest=dataset.digest, samples=samples, synthetic=dataset.synthetic)


def pass_names(config: OptimizeConfig) -> list[str]:
    """Names of the passes that the configuration asks for, in order, whether they exist or not.

    Raises:
        ConfigError: ``config.passes`` cannot be read.
    """
    names = _default_names(config) if config.passes is None else [name for name, _ in _parse(config.passes)]
    return [name for name in names if name not in config.skip]


def _default_names(config: OptimizeConfig) -> list[str]:
    """Names of `default_pipeline`: those of `DEFAULT_PIPELINE`, and what the configuration adds."""
    names = list(DEFAULT_PIPELINE)
    if config.equalize:
        names.insert(names.index(CalibratePass.name), EqualizePass.name)
    if "qonnx" in config.emit:
        names.insert(names.index(CheckPass.name), WriteQonnxPass.name)
    return names


def build_pipeline(config: OptimizeConfig, resources: Resources) -> list[ir.passes.PassBase]:
    """The pipeline that the configuration asks for.

    ``config.passes`` lists passes as ``name`` or ``name{option=value option=value}``, separated by commas.

    Raises:
        ConfigError: A pass or an option is unknown, a value has the wrong type, or settings contradict each other.
    """
    _require_parts(config)
    _require_effect(config)
    require_budget(config.replicate, resources.chip, float_inputs=config.activation_bits is None)
    require_parts(config.partitions, config.replicate)
    chosen = default_pipeline(config, resources)
    if config.passes is not None:
        extra = (_equalize(config, resources), WriteQonnxPass(resources.folder))
        defaults = {_name(item): item for item in (*extra, *chosen)}
        chosen = [_configured(name, options, defaults) for name, options in _parse(config.passes)]
        if config.equalize:
            _require_run("--equalize", EqualizePass.name, f"before {CalibratePass.name}", chosen)
        if "qonnx" in config.emit:
            _require_run("--emit qonnx", WriteQonnxPass.name, f"after {WriteManifestPass.name}", chosen)
    _require_known("skip", config.skip, chosen)
    chosen = [item for item in chosen if _name(item) not in config.skip]
    _require_known("dump-after", config.dump_after, chosen)
    return chosen


def _require_run(option: str, name: str, place: str, chosen: Iterable[ir.passes.PassBase]) -> None:
    """Make sure that a pipeline given as text runs the pass that an option asks for."""
    if name not in [_name(item) for item in chosen]:
        raise ConfigError(f"{option}: the pipeline given with --passes does not run it; add {name} {place}")


def _require_parts(config: OptimizeConfig) -> None:
    """Make sure that the weight method has the parts that are to be left out of it."""
    known = METHOD_PARTS[config.weight_method]
    for part in config.fit_without:
        if part not in known:
            named = ", ".join(item for item in FIT_PARTS if item in known) or "none"
            raise ConfigError(
                f"--fit-without: weight method {config.weight_method} has no part {part!r}; its parts are: {named}"
            )


def _require_effect(config: OptimizeConfig) -> None:
    """Make sure that no setting is given that another one leaves without effect.

    A value that is the default cannot be told from none: configurations that were written down give all of them.
    """
    defaults = type(config).model_fields
    if config.weight_method != "sequential" and config.fit_samples != defaults["fit_samples"].default:
        on = "no samples" if config.weight_method == "nearest" else "statistics of all calibration samples"
        raise ConfigError(
            f"--fit-samples: weight method {config.weight_method} fits on {on}; leave it out, or use `--weight-method "
            "sequential`"
        )
    require_search(config)
    if config.activation_bits is None and config.input_bits != defaults["input_bits"].default:
        raise ConfigError(
            "--input-bits: with `--activation-bits float` the model's own inputs stay float too; leave one of them out"
        )


def _require_known(option: str, wanted: Iterable[str], passes: Iterable[ir.passes.PassBase]) -> None:
    names = [_name(item) for item in passes]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"--{option}: pass {name!r} is not in the pipeline; it runs {', '.join(names)}")


_ITEM = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def _parse(text: str) -> Iterable[tuple[str, str]]:
    position = 0
    if not text.strip():
        raise ConfigError("--passes: it names no pass; `raqu-onnx passes` lists them")
    while position < len(text):
        found = _ITEM.match(text, position)
        if found is None:
            raise ConfigError(
                f"--passes: cannot read {text[position:]!r}; write NAME or NAME{{option=value}}, separated by commas"
            )
        yield found[1], found[2] or ""
        position = found.end()


def _configured(name: str, options: str, defaults: dict[str, ir.passes.PassBase]) -> ir.passes.PassBase:
    if name not in PASSES:
        raise ConfigError(f"--passes: there is no pass {name!r}; passes are {', '.join(PASSES)}")
    # Passes that are not in the default pipeline need nothing but their options.
    make = typing.cast("Callable[[], ir.passes.PassBase]", PASSES[name])
    base = defaults[name] if name in defaults else make()
    known = pass_options(PASSES[name])
    changes: dict[str, Any] = {}
    for item in re.split(r"[\s,;]+", options.strip()) if options.strip() else ():
        key, separator, value = item.partition("=")
        if not separator or key not in known:
            raise ConfigError(f"--passes: {name} has no option {key!r}; options are {', '.join(known) or 'none'}")
        changes[key] = _value(PASSES[name], key, value)
    return dataclasses.replace(base, **changes) if changes else base  # type: ignore[type-var]


def _value(pass_type: Callable[..., ir.passes.PassBase], key: str, text: str) -> object:
    """Read an option as its annotation says."""
    from pydantic import TypeAdapter, ValidationError

    # The annotation alone: those of other fields may name types that are imported for type checkers only.
    annotation = next(item.type for item in dataclasses.fields(pass_type) if item.name == key)  # type: ignore[arg-type]
    holder = type("Option", (), {"__annotations__": {key: annotation}, "__module__": pass_type.__module__})
    hint = typing.get_type_hints(holder)[key]
    try:
        return TypeAdapter(hint).validate_python(None if text == "none" else text)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"--passes: {pass_type.name}{{{key}={text}}}: {message}") from error  # type: ignore[attr-defined]


def pass_options(pass_type: Callable[..., ir.passes.PassBase]) -> dict[str, object]:
    """Options of a pass that can be given as text, with their defaults."""
    fields = dataclasses.fields(pass_type)  # type: ignore[arg-type]
    return {
        item.name: item.default
        for item in fields
        if item.default is not dataclasses.MISSING
        and (item.default is None or isinstance(item.default, int | float | str))
    }


def _name(item: ir.passes.PassBase) -> str:
    return str(getattr(item, "name", type(item).__name__))


def run_pipeline(
    model: ir.Model,
    passes: Iterable[ir.passes.PassBase],
    *,
    dump_after: Iterable[str] = (),
    dumps: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> tuple[ir.Model, list[PassTiming]]:
    """Run passes one after the other.

    Args:
        model: The model, changed in place.
        passes: The passes.
        dump_after: Names of passes after which the model is written to `dumps`.
        dumps: A folder for those models, made when first needed.
        progress: Told of the start of every pass.

    Raises:
        ConfigError: A pass needs one that has not run.
        RaquError: A pass failed.
    """
    from raqu_onnx.model_io import save_model

    wanted = set(dump_after)
    timings: list[PassTiming] = []
    for index, item in enumerate(items := list(passes)):
        name = _name(item)
        logger.info("pass %s", name)
        progress(f"pass {name}", index, len(items))
        # What was freed before is not held beside what this pass takes.
        release_freed()
        start = time.perf_counter()
        try:
            model = item(model).model
        except (ir.passes.InvariantError, ir.passes.PassError) as error:
            _surface(name, error)
        timings.append(PassTiming(name, time.perf_counter() - start))
        if name in wanted and dumps is not None:
            dumps.mkdir(exist_ok=True)
            save_model(model, dumps / f"{index:02d}-{name}.onnx")
    return model, timings


def _surface(name: str, error: Exception) -> NoReturn:
    """Raise what a user is told where onnx_ir wraps errors: the one inside if it is ours, else why the pass failed."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RaquError):
            raise inner from inner.__cause__
        inner = inner.__cause__
    reason = " ".join(str(error.__cause__ or error).split())
    if isinstance(error, ir.passes.PreconditionError):
        raise ConfigError(f"pass {name} cannot run: {reason}") from error
    raise ModelError(f"pass {name} failed on this model: {reason}") from error
