"""Pipelines: their order, their text form, and what is told when a pass fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from raqu_onnx.annotations import BITS, MAPPED, PLACEMENT, QUANTIZED, SEARCH, VALIDATION, mapped_nodes
from raqu_onnx.config import OptimizeConfig
from raqu_onnx.data import open_dataset
from raqu_onnx.errors import ConfigError, DataError, ModelError, RaquError
from raqu_onnx.hardware import load_chip
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.passes import (
    PASSES,
    AnnotateTilingPass,
    CalibratePass,
    CheckPass,
    FoldBatchNormPass,
    FoldConstantsPass,
    InsertQDQPass,
    NormalizeGemmPass,
    PlaceCrossbarsPass,
    QuantizeWeightsPass,
    SearchBitsPass,
    TidyPass,
    WriteManifestPass,
)
from raqu_onnx.pipeline import (
    DEFAULT_PIPELINE,
    Resources,
    build_pipeline,
    default_pipeline,
    pass_options,
    run_pipeline,
)
from raqu_onnx.search import Goal, SearchSettings
from raqu_onnx.validation import validate
from raqu_onnx.weights import FitPart, WeightMethod


@pytest.fixture
def model(workspace: Path) -> ir.Model:
    return load_model(workspace / "model.onnx")


@pytest.fixture
def resources(workspace: Path, model: ir.Model) -> Resources:
    inputs = model_inputs(model)
    return Resources(
        chip=load_chip(workspace / "chip.toml"),
        calibration=open_dataset("calibration.npz", inputs),
        selection=open_dataset("selection.npz", inputs),
        folder=workspace,
    )


def names(passes: list[ir.passes.PassBase]) -> list[str]:
    return [str(item.name) for item in passes]  # type: ignore[attr-defined]


def test_the_default_pipeline_is_what_its_names_say(resources: Resources) -> None:
    assert names(default_pipeline(OptimizeConfig(), resources)) == list(DEFAULT_PIPELINE)
    assert names(build_pipeline(OptimizeConfig(), resources)) == list(DEFAULT_PIPELINE)
    assert set(DEFAULT_PIPELINE) < set(PASSES)


def test_every_pass_goes_by_one_name_in_three_spellings() -> None:
    for name, item in PASSES.items():
        assert item.__module__ == f"raqu_onnx.passes.{name.replace('-', '_')}"
        assert item.__name__.lower() == f"{name.replace('-', '')}pass"
        assert dataclasses.is_dataclass(item)
        assert item.__doc__


def test_settings_reach_the_passes(resources: Resources) -> None:
    config = OptimizeConfig(
        weight_bits=(3, 5), activation_bits=(4, 6), weight_method="nearest", batch_size=9, threads=1, cells=True,
        max_crossbars=12, activation_range="percentile", seed=4, granularity="layer",
    )  # fmt: skip
    passes = {type(item): item for item in build_pipeline(config, resources)}
    calibrate: Any = passes[CalibratePass]
    assert (calibrate.batch_size, calibrate.threads, calibrate.moments) == (9, 1, False)
    search: Any = passes[SearchBitsPass]
    assert (search.goal, search.settings.seed, search.weight_method) == (Goal(12, None), 4, "nearest")
    quantize: Any = passes[QuantizeWeightsPass]
    assert (quantize.weight_bits, quantize.activation_bits, quantize.activation_range) == (5, 6, "percentile")
    write: Any = passes[WriteManifestPass]
    assert (write.cells, write.seed) == (True, 4)
    assert write.configuration["weight_bits"] == "3-5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tidy", ["tidy"]),
        (" tidy ,check", ["tidy", "check"]),
        ("tidy,tidy", ["tidy", "tidy"]),
        ("fold-constants{max_growth_bytes=5},tidy", ["fold-constants", "tidy"]),
        ("calibrate{batch_size=3, threads=none ; moments=false}", ["calibrate"]),
        ("tidy{}", ["tidy"]),
    ],
)
def test_pipelines_are_read_from_text(resources: Resources, text: str, expected: list[str]) -> None:
    assert names(build_pipeline(OptimizeConfig(passes=text), resources)) == expected


def test_options_are_read_as_their_types_say(resources: Resources) -> None:
    text = (
        "fold-constants{max_growth_bytes=5},calibrate{batch_size=3 threads=none moments=false},"
        "quantize-weights{activation_bits=none weight_method=mse}"
    )
    fold, calibrate, quantize = (vars(item) for item in build_pipeline(OptimizeConfig(passes=text), resources))
    assert fold == {"max_growth_bytes": 5}
    assert (calibrate["batch_size"], calibrate["threads"], calibrate["moments"]) == (3, None, False)
    assert calibrate["dataset"] is resources.calibration
    assert (quantize["activation_bits"], quantize["weight_method"], quantize["weight_bits"]) == (None, "mse", 8)


@pytest.mark.parametrize(
    "text",
    [
        "quantize-weights{weight_method=best}",
        "quantize-weights{weight_bits=8.5}",
        "quantize-weights{encoding=sign}",
        "calibrate{moments=perhaps}",
        "calibrate{dataset=x}",
        "write-manifest{folder=/tmp}",
        "tidy{minimum_opset=}",
        "tidy}",
        "tidy check",
        "tidy;check",
    ],
)
def test_a_wrong_text_is_refused(resources: Resources, text: str) -> None:
    with pytest.raises(ConfigError, match="--passes: "):
        build_pipeline(OptimizeConfig(passes=text), resources)


def test_a_setting_that_its_pipeline_ignores_is_refused(resources: Resources) -> None:
    with pytest.raises(ConfigError, match=r"--equalize: .* add equalize before calibrate"):
        build_pipeline(OptimizeConfig(passes="tidy,annotate-tiling,calibrate", equalize=True), resources)
    text = "tidy,annotate-tiling,equalize,calibrate"
    assert names(build_pipeline(OptimizeConfig(passes=text, equalize=True), resources)) == text.split(",")


@pytest.mark.parametrize(
    ("method", "part", "parts"),
    [
        ("nearest", "bias", "none"),
        ("mse", "polish", "bias"),
        ("gptq", "targets", "bias, scales, polish, refit"),
    ],
)
def test_a_part_that_the_weight_method_lacks_is_refused(
    resources: Resources, method: WeightMethod, part: FitPart, parts: str
) -> None:
    with pytest.raises(ConfigError, match=f"--fit-without: .* {method} has no part '{part}'; its parts are: {parts}$"):
        build_pipeline(OptimizeConfig(weight_method=method, fit_without=(part,)), resources)


def test_listed_options_are_those_that_text_may_set() -> None:
    assert pass_options(TidyPass)["maximum_opset"] == 27
    assert "folder" not in pass_options(WriteManifestPass)
    assert pass_options(InsertQDQPass) == {}


# ------------------------------------------------------------------------------------------------- alone, in onnx_ir


def test_each_pass_works_in_a_pipeline_of_onnx_ir(resources: Resources, model: ir.Model) -> None:
    """And the passes of onnx_ir work between ours."""
    from onnx_ir.passes import common

    chip, folder = resources.chip, resources.folder
    passes = ir.passes.Sequential(
        FoldConstantsPass(),
        NormalizeGemmPass(),
        FoldBatchNormPass(),
        common.ShapeInferencePass(),
        TidyPass(),
        common.CheckerPass(),
        AnnotateTilingPass(),
        CalibratePass(resources.calibration),
        SearchBitsPass(chip, resources.selection, Goal(30), SearchSettings(evaluations=1)),
        QuantizeWeightsPass(chip.encoding),
        InsertQDQPass(),
        common.CheckerPass(),
        PlaceCrossbarsPass(chip),
        WriteManifestPass(folder, cells=True),
        CheckPass(folder),
    )
    result = passes(model)
    assert result.modified
    assert result.model is model
    assert len(mapped_nodes(model)) == 3
    search = SEARCH.require(model)
    assert search.chosen.crossbars <= 30
    for node, bits in zip(mapped_nodes(model), search.chosen.bits.weights, strict=True):
        assert BITS.require(node).weight == bits
        assert set(QUANTIZED.require(node).bits.tolist()) == {bits}
        assert node.metadata_props["raqu.bits"]
        assert node.metadata_props["raqu.tiling"]
        assert MAPPED.require(node).mvms
    assert PLACEMENT.require(model).crossbars == search.chosen.crossbars
    assert VALIDATION.require(model).passed
    assert validate(folder, "eval.npz").passed


@pytest.mark.parametrize("name", [name for name in PASSES if name not in ("check",)])
def test_a_pass_says_what_it_needs_or_runs_alone(resources: Resources, model: ir.Model, name: str) -> None:
    passes = {
        str(item.name): item for item in default_pipeline(OptimizeConfig(equalize=True, emit=("qonnx",)), resources)
    }  # type: ignore[attr-defined]
    make: Callable[[], Any] = PASSES[name]  # type: ignore[assignment]
    item = passes[name] if name in passes else make()
    names = "fold-constants normalize-gemm fold-batchnorm widen-half fuse-matmul-bias tidy annotate-tiling"
    alone = set(names.split())
    if name in alone:
        ir.passes.Sequential(item)(model)
    else:
        with pytest.raises(ir.passes.PassError) as caught:
            ir.passes.Sequential(item)(model)
        assert isinstance(caught.value.__cause__, ir.passes.PreconditionError)
        with pytest.raises(ConfigError, match=rf"^pass {name} cannot run: .* run the pass [a-z-]+ first$"):
            run_pipeline(model, [item])


# ------------------------------------------------------------------------------------------------------------ errors


@dataclasses.dataclass(frozen=True)
class Failing(ir.passes.InPlacePass):
    """Fails where it is told to."""

    error: Exception
    where: str
    name = "failing"

    def _fail(self, where: str) -> None:
        if self.where == where:
            raise self.error

    def requires(self, model: ir.Model) -> None:
        del model
        self._fail("requires")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self._fail("call")
        return ir.passes.PassResult(model, modified=False)

    def ensures(self, model: ir.Model) -> None:
        del model
        self._fail("ensures")


class Wrapping(ir.passes.Sequential):
    """A pipeline of onnx_ir, which wraps every error once more."""

    name = "wrapping"


@pytest.mark.parametrize("where", ["requires", "call", "ensures"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("error", [ModelError("net.onnx: is odd"), DataError("data.npz: is odd")])
def test_our_errors_surface_from_wherever_they_are_raised(
    model: ir.Model, where: str, depth: int, error: RaquError
) -> None:
    item: ir.passes.PassBase = Failing(error, where)
    for _ in range(depth):
        item = Wrapping(item)
    with pytest.raises(type(error)) as caught:
        run_pipeline(model, [item])
    assert caught.value is error


@pytest.mark.parametrize(
    ("where", "expected"), [("requires", ConfigError), ("ensures", ModelError), ("wrapped", ModelError)]
)
def test_other_errors_of_passes_become_one_line(model: ir.Model, where: str, expected: type[RaquError]) -> None:
    item: ir.passes.PassBase = Failing(ValueError("two\nlines"), "call" if where == "wrapped" else where)
    if where == "wrapped":
        item = Wrapping(item)
    with pytest.raises(expected, match=r"^pass \w+ (cannot run|failed on this model): two lines$"):
        run_pipeline(model, [item])


def test_a_defect_is_not_hidden(model: ir.Model) -> None:
    with pytest.raises(ZeroDivisionError):
        run_pipeline(model, [Failing(ZeroDivisionError(), "call")])


# ------------------------------------------------------------------------------------------------- timing and dumps


def test_passes_are_timed_and_dumped(model: ir.Model, tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    _, timings = run_pipeline(model, [TidyPass(), AnnotateTilingPass()], dump_after=["annotate-tiling"], dumps=dumps)
    assert [item.name for item in timings] == ["tidy", "annotate-tiling"]
    assert all(item.seconds >= 0 for item in timings)
    assert [path.name for path in dumps.iterdir()] == ["01-annotate-tiling.onnx"]
    onnx.checker.check_model(onnx.load(dumps / "01-annotate-tiling.onnx"))


def test_unknown_dimensions_are_learnt_from_the_data(small_net: Callable[..., onnx.ModelProto]) -> None:
    model = load_model(small_net(size="S"))
    data = {"input": np.random.default_rng(0).normal(size=(4, 3, 8, 6)).astype(np.float32)}
    dataset = open_dataset(data, model_inputs(model))
    run_pipeline(model, [TidyPass(), AnnotateTilingPass()])
    assert [MAPPED.require(node).mvms for node in mapped_nodes(model)] == [None, None, 1]
    run_pipeline(model, [CalibratePass(dataset)])
    assert [MAPPED.require(node).mvms for node in mapped_nodes(model)] == [48, 12, 1]
