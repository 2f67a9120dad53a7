"""Running a whole model on virtual crossbars, through the interface of an onnxruntime session."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raqu_onnx.backend.engines import RecombinedNode, SlicedNode, channel_axis
from raqu_onnx.backend.partition import activation_of, cut
from raqu_onnx.cell_errors import CellErrors, DisturbedCells
from raqu_onnx.converters import Adc
from raqu_onnx.errors import ConfigError
from raqu_onnx.evaluation import default_threads, make_session, run_feeds
from raqu_onnx.graph_edit import constant_array
from raqu_onnx.lossless import lossless_adc_bits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnxruntime as ort
    from numpy.typing import NDArray

    from raqu_onnx.backend.engines import Engine
    from raqu_onnx.backend.folder import MappedModel
    from raqu_onnx.backend.partition import Segment, Stage
    from raqu_onnx.hardware import Chip
    from raqu_onnx.manifest import NodeEntry
    from raqu_onnx.readout import LevelSource

__all__ = ["CrossbarSession", "NodeReport", "Plan", "Setting", "converters"]

# Each session has threads of its own; a model of hundreds of nodes must not start thousands.
_MOST_THREADS = 256


def converters(chip: Chip, bits: int | Literal["chip", "ideal"]) -> Adc:
    """The converters of a chip, or such with another resolution.

    Raises:
        ConfigError: The resolution is out of range.
    """
    if bits == "chip":
        return Adc.of(chip)
    if bits == "ideal":
        return Adc(None, chip.adc_signed)
    if not 1 <= bits <= 32:
        raise ConfigError(f"--adc-bits: must be 1 to 32, chip or ideal, found {bits}")
    return Adc(bits, chip.adc_signed)


@dataclass(frozen=True)
class Setting:
    """How crossbars behave.

    Attributes:
        adc: The converters.
        errors: What cells do.
        seed: Seed of all repeats.
        repeat: Which of them.
        sliced: Run slice by slice even where nothing can be lost.
    """

    adc: Adc = field(default_factory=lambda: Adc(None))
    errors: CellErrors = field(default_factory=CellErrors)
    seed: int = 0
    repeat: int = 0
    sliced: bool = False

    @property
    def ideal(self) -> bool:
        """Nothing between cell and sum can lose anything."""
        return self.adc.bits is None and not self.errors.any


@dataclass(frozen=True)
class NodeReport:
    """What the ADCs of one node did.

    Attributes:
        name: The node.
        lossless_bits: Fewest bits of an ADC that clips with no input.
        conversions: How many there were, over all samples; 0 where slices were recombined before the product.
        clipped: How many of them were clipped.
        seen_bits: Fewest bits that would have clipped none of them; None where there were none.
    """

    name: str
    lossless_bits: int
    conversions: int = 0
    clipped: int = 0
    seen_bits: int | None = None


class Plan:
    """A model cut at its mapped nodes, ready to be run with any number of settings.

    Args:
        mapped: The model with its manifest and cells.
        threads: Threads of onnxruntime, and of those that run slices; default all that this process may use.

    Raises:
        ModelError: onnxruntime cannot open what lies between mapped nodes.
    """

    def __init__(self, mapped: MappedModel, threads: int | None = None) -> None:
        self.mapped = mapped
        self.stages: tuple[Stage, ...] = cut(mapped.model, mapped.manifest.nodes)
        self.threads = max(1, min(threads or default_threads(), _MOST_THREADS // (2 * len(self.stages)) or 1))
        count = threads or default_threads()
        self.workers = ThreadPoolExecutor(count) if count > 1 else None
        self._sessions: dict[int, ort.InferenceSession] = {}
        self._lossless: dict[str, int] | None = None

    def session(self, segment: Segment) -> ort.InferenceSession:
        """A segment's session, whose Q/DQ pairs are left as they are."""
        key = id(segment)
        if key not in self._sessions:
            self._sessions[key] = make_session(segment.model, level="simulate", threads=self.threads)
        return self._sessions[key]

    def lossless_bits(self) -> dict[str, int]:
        """By node, the fewest bits of an ADC that clips with no input, from the cells as programmed."""
        if self._lossless is None:
            self._lossless = lossless_adc_bits(self.mapped.view, self.mapped.cells)
        return self._lossless


class CrossbarSession:
    """A model on virtual crossbars. `run` and `get_outputs` are those of an onnxruntime session.

    Args:
        plan: The model.
        setting: How its crossbars behave.
    """

    def __init__(self, plan: Plan, setting: Setting | None = None) -> None:
        self._plan, self._setting = plan, setting or Setting()
        self._outputs = tuple(plan.mapped.model.graph.outputs)
        self._rng = self._setting.errors.read_rng(self._setting.seed, self._setting.repeat)
        self._engines = {stage.node.name: self._engine(stage.node) for stage in plan.stages if stage.node is not None}
        self._digital = {stage.node.name: self._scales(stage.node) for stage in plan.stages if stage.node is not None}

    def _engine(self, entry: NodeEntry) -> Engine:
        mapped, setting = self._plan.mapped, self._setting
        if setting.ideal and not setting.sliced:
            return RecombinedNode(mapped.view, entry, mapped.cells, self._plan.threads)
        cells: LevelSource = mapped.cells
        if setting.errors.any:
            cells = DisturbedCells(mapped.cells, mapped.manifest, setting.errors, setting.seed, setting.repeat)
        return SlicedNode(
            mapped.view,
            entry,
            mapped.codes[entry.name],
            cells,
            adc=setting.adc,
            read_noise=setting.errors.read_noise,
            rng=self._rng,
            workers=self._plan.workers,
        )

    def _scales(self, entry: NodeEntry) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """What one step of each channel's sum is worth, and the bias in such steps."""
        channels = entry.matrix.groups * entry.matrix.kernels
        steps = np.array(entry.scales, np.float32).astype(np.float64)[np.arange(channels) % len(entry.scales)]
        steps = steps * float(np.float32(activation_of(entry).scale))
        if entry.bias is None:
            return steps, None
        bias = constant_array(self._plan.mapped.model.graph.initializers[entry.bias])
        return steps, None if bias is None else bias.astype(np.float64)

    def get_outputs(self) -> tuple[Any, ...]:
        """The model's outputs, which have names."""
        return self._outputs

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[Any]:
        """Run one batch.

        Args:
            output_names: Outputs to return; all where it is None.
            feeds: Array by input name.

        Raises:
            DataError: onnxruntime cannot run what lies between mapped nodes on it.
        """
        from threadpoolctl import threadpool_limits

        # Slices are divided among threads of their own: those of BLAS would fight with them for the same cores.
        with threadpool_limits(1, user_api="blas"):
            return self._run(output_names, feeds)

    def _run(self, output_names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[Any]:
        values: dict[str, Any] = dict(feeds)
        for stage in self._plan.stages:
            if stage.segment is not None:
                session = self._plan.session(stage.segment)
                needed = {name: values[name] for name in stage.segment.needs}
                found = run_feeds(session, list(stage.segment.gives), needed, self._plan.mapped.name)
                values.update(zip(stage.segment.gives, found, strict=True))
            if stage.node is not None:
                values[stage.node.output] = self._run_node(stage.node, values[activation_of(stage.node).tensor])
            for name in stage.spent:
                values.pop(name, None)
        names = [str(output.name) for output in self._outputs] if output_names is None else output_names
        return [values[name] if name in values else self._constant(name) for name in names]

    def _run_node(self, entry: NodeEntry, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The node's float output: sums of codes with the bias, times the step that they are counted in."""
        sums = self._engines[entry.name].sums(codes)
        steps, bias = self._digital[entry.name]
        along = [1] * sums.ndim
        along[channel_axis(entry)] = -1
        # Double precision: a bias may have 31 bits.
        result = sums.astype(np.float64)
        if bias is not None:
            result += bias.reshape(along)
        result *= steps.reshape(along)
        return np.ascontiguousarray(result, np.float32)

    def _constant(self, name: str) -> NDArray[Any] | None:
        """An output that is an initializer."""
        return constant_array(self._plan.mapped.model.graph.initializers[name])

    def reports(self) -> tuple[NodeReport, ...]:
        """What the ADCs did so far, node by node."""
        lossless = self._plan.lossless_bits()
        found = []
        for name, engine in self._engines.items():
            if isinstance(engine, SlicedNode):
                counted = engine.conversions
                found.append(NodeReport(name, lossless[name], counted.total, counted.clipped, engine.seen_bits()))
            else:
                found.append(NodeReport(name, lossless[name]))
        return tuple(found)
