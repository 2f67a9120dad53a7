"""One random graph through the pipeline with given bits, and everything that must hold for what comes out."""

from __future__ import annotations

import functools
import gc
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from check_nodes import LEVELS, NodeFinding, check_nodes, run_model
from numpy.typing import NDArray
from random_graphs import RandomGraph, random_graph

from raqu_onnx.annotations import BITS, MAPPED, QUANTIZED, NodeBits, mapped_nodes
from raqu_onnx.config import OptimizeConfig
from raqu_onnx.data import Dataset, open_dataset
from raqu_onnx.encodings import MIN_BITS
from raqu_onnx.errors import RaquError
from raqu_onnx.hardware import Chip, CrossbarType, builtin_chips, load_chip
from raqu_onnx.model_io import load_model, model_inputs, to_proto
from raqu_onnx.passes.check import CheckPass
from raqu_onnx.passes.search_bits import SearchBitsPass
from raqu_onnx.pipeline import Resources, default_pipeline, run_pipeline
from raqu_onnx.simulation import Simulator
from raqu_onnx.validation import validate

__all__ = ["CaseResult", "has_vnni", "run_case"]

#: What may be refused, and why; anything else that is raised is a failure.
EXPECTED = {
    "no mapped node": re.compile(r"the model has no node that crossbars can compute"),
    "does not fit": re.compile(
        r"use fewer bits or a larger chip|cannot hold one weight|one kernel takes|is wider than every crossbar"
    ),
}
# Share of the range of an output that folding and other exact rewriting may change it by.
_REWRITING = 1e-4
# Onnxruntime's Sigmoid is off by so much at either end, however small its result is: a share of that is no measure.
_SIGMOID_ERROR = 1e-6


@dataclass
class CaseResult:
    """What came of one graph.

    Attributes:
        seed: Its seed.
        refused: Why it was refused as expected, or None.
        problems: What is wrong, one line each; empty where all is well.
        operators: Mapped nodes that were compared, by type.
        steps: Largest difference of a node in steps of the next quantizer, by level.
        share: Largest difference of a node in shares of its float output's range, by level.
        ends: Largest difference of a whole model's output in shares of its range: of the float model between the two
            levels (`float`), of the emitted model between them (`levels`), and between the simulation and the emitted
            model run node by node (`simulation`). Where onnxruntime gives other values for the float model already, it
            alone is listed.
        digests: SHA-256 of the files written, by name.
        validated: Whether the full validation was run.
    """

    seed: int
    refused: str | None = None
    problems: list[str] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    validated: bool = False


def has_vnni() -> bool:
    """Whether onnxruntime multiplies 8-bit weights without saturation here; taken as true where it cannot be known.

    On x86 without VNNI, onnxruntime adds pairs of products in 16 bits.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_vnni" in text or "avx_vnni" in text or not re.search(r"^flags\s*:.*\bsse2\b", text, re.MULTILINE)


def run_case(seed: int, folder: Path, *, full: bool = False, most_bits: int | None = None) -> CaseResult:
    """Make a graph, quantize and map it, and check the result; nothing is raised.

    Args:
        seed: The graph's seed.
        folder: An empty folder for the files.
        full: Also validate the files as `raqu-onnx validate` does.
        most_bits: Widest weights, None for what this processor multiplies exactly.
    """
    result = CaseResult(seed)
    from threadpoolctl import threadpool_limits

    _settle()
    try:
        with threadpool_limits(1, user_api="blas"):
            _Case(random_graph(seed), folder, most_bits or (8 if has_vnni() else 7), result).run(full)
    except RaquError as error:
        result.refused = next((name for name, text in EXPECTED.items() if text.search(str(error))), None)
        if result.refused is None:
            result.problems.append(f"refused: {type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        where = _where(error)
        text = " ".join(str(error).split())[:300]
        result.problems.append(f"crashed: {type(error).__name__} at {where}: {text}")
    return result


@functools.cache
def _settle() -> None:
    """Load what the pipeline loads later, and take it out of garbage collection.

    The limit on threads reaches only libraries that are in memory. The pipeline collects garbage before each pass; with
    the objects of all these modules among what is searched, that would take most of the time of a small graph.
    """
    import networkx  # noqa: F401
    import scipy.linalg
    import scipy.optimize  # noqa: F401

    gc.collect()
    gc.freeze()


def _where(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))


@dataclass
class _GiveBitsPass(ir.passes.InPlacePass):
    """Random widths for every mapped node, in the place of a search."""

    name: ClassVar[str] = "give-bits"

    rng: np.random.Generator
    most: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in mapped_nodes(model):
            channels = MAPPED.require(node).layout.channels
            low, high = sorted(int(bits) for bits in self.rng.integers(MIN_BITS, self.most + 1, 2))
            widths = self.rng.integers(low, high + 1, channels)
            if self.rng.random() < 0.15:
                widths[self.rng.random(channels) < 0.4] = 0
            activation = int(self.rng.choice([2, 3, 4, 5, 6, 7, 8, 8, 8, 8]))
            weight = tuple(int(bits) for bits in widths) if self.rng.random() < 0.6 else high
            BITS.set(node, NodeBits(weight, activation))
        return ir.passes.PassResult(model, modified=True)


class _Case:
    """One graph on its way."""

    def __init__(self, graph: RandomGraph, folder: Path, most_bits: int, result: CaseResult) -> None:
        self.graph, self.folder, self.most_bits, self.result = graph, folder, most_bits, result
        self.rng = np.random.default_rng([graph.seed, 1])

    def run(self, full: bool) -> None:
        model = load_model(self.graph.model)
        data = open_dataset(self.graph.feeds, model_inputs(model))
        # What one run of a model takes: all samples, or as many as the model's fixed first axis says.
        feeds = next(iter(data.batches(6))).feeds
        reference = self._float_outputs(feeds)
        passes = self._passes(data)
        model, _ = run_pipeline(model, passes[:3])
        self._compare(
            "rewriting", reference, run_model(to_proto(model), feeds, "disable-all", self._outputs()), _REWRITING
        )
        nodes = [MAPPED.require(node) for node in mapped_nodes(model)]
        simulator = Simulator(model, nodes, threads=1)
        model, _ = run_pipeline(model, passes[3:])
        for path in sorted(self.folder.iterdir()):
            self.result.digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        emitted = onnx.load(self.folder / "model.onnx")
        self._check_model(emitted)
        outputs = {level: run_model(emitted, feeds, level, self._outputs()) for level in LEVELS}
        self._compare("float", reference, run_model(self.graph.model, feeds, "enable-all", self._outputs()))
        if self.result.ends["float"] <= _REWRITING:
            self._compare("levels", outputs["disable-all"], outputs["enable-all"])
            quantized = {item.node.name: item for item in map(QUANTIZED.require, mapped_nodes(model))}
            simulated = simulator.run(quantized, [next(iter(data.batches(6)))])
            self._compare("simulation", outputs["disable-all"], list(simulated.outputs))
        self._check_nodes(emitted, feeds, len(nodes))
        if full:
            self._validate(data)

    def _float_outputs(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        onnx.checker.check_model(self.graph.model, full_check=True)
        return run_model(self.graph.model, feeds, "disable-all", self._outputs())

    def _outputs(self) -> list[str]:
        return [item.name for item in self.graph.model.graph.output]

    # --- settings ---------------------------------------------------------------------------------------------

    def _passes(self, data: Dataset) -> list[ir.passes.PassBase]:
        config = OptimizeConfig(
            weight_method=self.rng.choice(["nearest", "mse", "gptq", "sequential", "sequential"]),
            activation_range=self.rng.choice(["min-max", "percentile", "mse"]),
            batch_size=int(self.rng.choice([2, 4, 64])),
            threads=1,
            seed=self.graph.seed % 2**31,
            cells=True,
        )
        resources = Resources(self._chip(), data, data, self.folder)
        given = _GiveBitsPass(self.rng, self.most_bits)
        passes = default_pipeline(config, resources)
        return [
            given if isinstance(item, SearchBitsPass) else item for item in passes if not isinstance(item, CheckPass)
        ]

    def _chip(self) -> Chip:
        """A built-in chip, with another way of sharing, or one with small crossbars of odd sizes."""
        chip = load_chip(str(self.rng.choice(builtin_chips())))
        if self.rng.random() < 0.4:
            kinds = tuple(
                CrossbarType(
                    name=f"odd{index}",
                    rows=int(self.rng.integers(6, 40)),
                    cols=int(self.rng.integers(8, 60)),
                    cell_bits=int(self.rng.integers(1, 5)),
                )
                for index in range(int(self.rng.integers(1, 3)))
            )
            chip = chip.model_copy(
                update={"crossbars": kinds, "hierarchy": None, "column_turn_ns": None, "sources": {}}
            )
        return chip.model_copy(update={"sharing": str(self.rng.choice(["exclusive", "diagonal", "time"]))})

    # --- checks -----------------------------------------------------------------------------------------------

    def _check_model(self, emitted: onnx.ModelProto) -> None:
        onnx.checker.check_model(emitted, full_check=True)
        before, after = self.graph.model.graph, emitted.graph
        for kind in ("input", "output"):
            found, expected = ([_signature(item) for item in getattr(graph, kind)] for graph in (after, before))
            if found != expected:
                self.result.problems.append(f"graph {kind}s changed from {expected} to {found}")

    def _compare(
        self, what: str, one: list[NDArray[Any]], other: list[NDArray[Any]], most: float | None = None
    ) -> None:
        for name, expected, found in zip(self._outputs(), one, other, strict=True):
            if expected.shape != found.shape or not np.isfinite(found).all():
                shapes = f"shapes {expected.shape} and {found.shape}"
                self.result.problems.append(f"{what}: output {name}: {shapes}, finite: {np.isfinite(found).all()}")
                continue
            span = max(float(expected.max(initial=0)), 0.0) - min(float(expected.min(initial=0)), 0.0) or 1.0
            share = float(np.abs(expected.astype(np.float64) - found).max(initial=0)) / span
            if most is None:
                self.result.ends[what] = max(self.result.ends.get(what, 0.0), share)
            elif share > most and share * span > _SIGMOID_ERROR:
                self.result.problems.append(f"{what}: output {name} changed by {share:.3g} of its range")

    def _check_nodes(self, emitted: onnx.ModelProto, feeds: dict[str, NDArray[Any]], count: int) -> None:
        findings = check_nodes(emitted, feeds, np.random.default_rng([self.graph.seed, 2]))
        if len(findings) != count:
            self.result.problems.append(f"{count} nodes are mapped, {len(findings)} are quantized in the file")
        self.result.operators = dict(Counter(item.op_type for item in findings))
        for item in findings:
            self._add(item)

    def _add(self, item: NodeFinding) -> None:
        for level in LEVELS:
            if level in item.steps:
                self.result.steps[level] = max(self.result.steps.get(level, 0), item.steps[level])
            if level in item.share:
                self.result.share[level] = max(self.result.share.get(level, 0.0), item.share[level])
        self.result.problems.extend(f"node {item.node} ({item.op_type}): {text}" for text in item.problems)

    def _validate(self, data: Dataset) -> None:
        report = validate(self.folder, data, threads=1)
        self.result.validated = True
        self.result.problems.extend(f"validate: {check.name}: {check.detail}" for check in report.failures)


def _signature(item: onnx.ValueInfoProto) -> str:
    kind = item.type.tensor_type
    dims = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in kind.shape.dim]
    return f"{item.name}:{kind.elem_type}{dims}"
