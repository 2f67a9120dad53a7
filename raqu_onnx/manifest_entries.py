"""The parts of a manifest, see `manifest`: typed models whose field descriptions stand in the JSON Schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raqu_onnx.encodings import Polarity, SignedEncoding
from raqu_onnx.placement_problem import ExactOutcome

__all__ = [
    "ActivationEntry",
    "CellSlice",
    "CostEntry",
    "CrossbarTotal",
    "DataProvenance",
    "EncodingEntry",
    "Entry",
    "MappedOp",
    "MatrixEntry",
    "ModelFile",
    "NodeEntry",
    "PartitionEntry",
    "PlacementEntry",
    "Ratio",
    "Sha256",
    "StageEntry",
    "Tool",
    "Totals",
    "UnmappedEntry",
    "Whole",
    "WidthEntry",
    "WindowEntry",
]

# JSON readers that keep numbers as doubles must not lose a digit.
Whole = Annotated[int, Field(ge=0, le=2**53 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**53 - 1)]
Signed = Annotated[int, Field(ge=-(2**53) + 1, le=2**53 - 1)]
Step = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = Annotated[tuple[Whole, Whole], Field(description="half-open range: first, last + 1")]
Energy = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MappedOp = Literal["Conv", "ConvTranspose", "Gemm", "MatMul"]
Bits = Annotated[int, Field(ge=0, le=8)]


class Entry(BaseModel):
    """A JSON object of the manifest: frozen, without unknown keys, without conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Tool(Entry):
    """What wrote the manifest."""

    name: str = Field(description="of the program")
    version: str = Field(description="of the program")
    libraries: dict[str, str] = Field(description="versions of the libraries that it ran on")


class ModelFile(Entry):
    """The emitted ONNX model."""

    file: str = Field(description="file name, beside the manifest")
    sha256: Sha256 = Field(description="of the file's bytes, followed by those of its external data files, if any")
    source_sha256: Sha256 | None = Field(description="of the float model that it was made from, likewise")


class DataProvenance(Entry):
    """A data set that was used."""

    name: str = Field(description="file name, without its folder, or what gave the samples")
    digest: str = Field(description="SHA-256 of the data")
    samples: Whole = Field(description="how many were used")
    synthetic: bool = Field(description="generated, not real data")


class CellSlice(Entry):
    """One cell of a stored weight; the weight is the sum of sign * 2**shift * level over its slices, minus offset."""

    column: Whole = Field(description="bitline, counted from the kernel's first")
    row: Whole = Field(description="wordline, counted from the weight's first")
    shift: Whole = Field(description="the level counts 2**shift")
    sign: Literal[1, -1] = Field(description="of what it adds to the weight")
    polarity: Polarity | None = Field(
        description="the half of a signed weight that the cell holds, and with arrays in pairs the array of the pair "
        "that it lies in; null where the encoding has no halves"
    )


class WidthEntry(Entry):
    """How weights of one bit-width are stored."""

    bits: Annotated[int, Field(ge=2, le=8)] = Field(description="width of the weights")
    columns: Positive = Field(description="bitlines that one kernel takes in each array")
    offset: Whole = Field(description="subtracted from every weight's read-out: times sum(x) from the kernel's result")
    codes: tuple[Signed, Signed] = Field(description="smallest and largest code, inclusive")
    slices: tuple[CellSlice, ...] = Field(description="least significant first within a polarity")


class EncodingEntry(Entry):
    """How signed weights are stored in one crossbar type."""

    crossbar_type: Whole = Field(description="index into chip.crossbars")
    scheme: SignedEncoding = Field(description="name of the signed encoding")
    cell_bits: Positive = Field(description="bits of one cell: levels reach from 0 to 2**cell_bits - 1")
    rows_per_weight: Positive = Field(
        description="wordlines per row of the matrix: row i of a placement starts at its wordline rows_per_weight * i"
    )
    input_signs: tuple[Literal[1, -1], ...] = Field(
        description="sign with which each of these wordlines is driven; a slice's own sign already contains it"
    )
    arrays_per_placement: Positive = Field(
        description="2: polarities lie at the same place in two arrays, crossbar 2n (positive) and 2n + 1 (negative)"
    )
    unit_column: bool = Field(description="each placement ends in one bitline of ones that reads sum(x)")
    widths: tuple[WidthEntry, ...]


class MatrixEntry(Entry):
    """The weight tensor read as matrices of stored rows by kernels."""

    kind: Literal["conv", "conv-transpose", "in-out", "out-in"] = Field(
        description="how the tensor is read; see row_order"
    )
    shape: tuple[Positive, ...] = Field(description="of the ONNX tensor")
    groups: Positive = Field(description="G")
    rows: Positive = Field(description="K, wordlines of one group's matrix")
    kernels: Positive = Field(description="M, kernels (output channels) of one group")
    row_order: str = Field(description="which element of the ONNX tensor (and of the input) a row is")
    scale_axis: Whole = Field(description="axis of the ONNX tensor that bits and scales run along")


class WindowEntry(Entry):
    """Sliding window of a Conv or ConvTranspose, as the ONNX attributes give it; one entry per spatial axis."""

    kernel: tuple[Positive, ...] = Field(description="size")
    strides: tuple[Positive, ...] = Field(description="step")
    dilations: tuple[Positive, ...] = Field(description="distance of neighbouring taps")
    pads: tuple[Signed, ...] = Field(description="all begins, then all ends")
    auto_pad: str = Field(description="NOTSET where pads count, else as ONNX defines it")
    transposed: bool = Field(description="true for ConvTranspose")
    output_padding: tuple[Whole, ...] = Field(description="of a ConvTranspose, else empty")
    output_shape: tuple[Positive, ...] | None = Field(description="of a ConvTranspose that gives it, else null")


class ActivationEntry(Entry):
    """The quantized input: an unsigned code c stands for (c - zero_point) * scale.

    Crossbars multiply codes, padding included (whose code is the zero point); a zero point other than 0 costs the
    digital correction -zero_point * sum(w) per kernel.
    """

    tensor: str = Field(description="UINT8 value in the ONNX graph that holds the codes")
    scale_name: str = Field(description="initializer with the scale")
    zero_point_name: str = Field(description="initializer with the zero point")
    scale: Step = Field(description="real value of one step of the code")
    zero_point: Whole = Field(description="code of 0.0")
    bits: Annotated[int, Field(ge=2, le=8)] = Field(description="codes reach from 0 to 2**bits - 1")


class PlacementEntry(Entry):
    """A rectangle of one group's matrix in one physical crossbar."""

    type: Whole = Field(description="index into chip.crossbars")
    crossbar: Whole = Field(
        description="number of the physical array among those of its type; with several partitions, "
        "partitions.crossbars says which array a number stands for"
    )
    polarity: Polarity | None = Field(description="with arrays in pairs: which of the pair; else null")
    group: Whole = Field(description="the group of the node whose matrix this is a part of")
    rows: Range = Field(description="wordlines of the crossbar")
    cols: Range = Field(description="bitlines of the crossbar, the unit column included")
    weight_rows: Range = Field(description="range in the sequence of the group's stored rows")
    columns: Range = Field(description="range in the group's columns, kernel after kernel in column order")
    kernels: Range = Field(description="positions in column order of the kernels that these columns belong to")
    first_slice: Whole = Field(description="column of the first kernel that the range starts at: 0 unless it is cut")
    unit_column: Whole | None = Field(description="bitline of the crossbar whose cells are all 1")
    replica: Whole = Field(description="each replica holds the whole matrix once")
    partial_sum: Whole = Field(
        description="placements of the node with the same number hold other rows of the same columns: their results "
        "are added, without shift. Numbered by first appearance"
    )
    turn: Whole = Field(
        description="blocks of the node that share rows or columns of a crossbar compute in different turns, each in "
        "the first that no earlier block of this list stands against"
    )
    flipped: tuple[Whole, ...] = Field(
        description="run lengths over the bitlines from the first on: as they are, stored as 2**cell_bits - 1 - level, "
        "as they are, ...; what is left is as it is"
    )


class NodeEntry(Entry):
    """A node that crossbars compute."""

    name: str = Field(description="of the ONNX node")
    op_type: MappedOp = Field(description="of the ONNX node")
    output: str = Field(description="the node's output value")
    weight: str = Field(description="initializer with the codes")
    weight_scale: str = Field(description="initializer with the scales")
    source_weight: str = Field(description="the float weight in the source model")
    bias: str | None = Field(description="INT32 initializer in steps of activation.scale * scales, added digitally")
    activation: ActivationEntry | None = Field(description="null: the input stays float, crossbars cannot run the node")
    constant_left: bool = Field(description="MatMul whose constant is the first operand")
    input_transposed: bool = Field(description="Gemm with transA")
    matrix: MatrixEntry
    window: WindowEntry | None = Field(description="null for Gemm and MatMul")
    mvms: Whole | None = Field(description="matrix-vector products per group and sample; null where shapes are open")
    bits: tuple[tuple[Bits, Positive], ...] = Field(
        description="run lengths [bits, count] along the scale axis; 0 is a dropped kernel"
    )
    scales: tuple[Step, ...] = Field(description="float32 scale of each entry of the scale axis")
    kernel_order: tuple[tuple[Range, ...], ...] | None = Field(
        description="per group the stored kernels in column order, as ascending ranges; null: all in ascending order"
    )
    dropped_kernels: tuple[Range, ...] = Field(description="ranges of the scale axis with 0 bits, stored nowhere")
    rows_not_stored: tuple[tuple[Whole, Whole, Whole], ...] = Field(
        description="[group, first, last + 1] of rows that are stored nowhere: their codes and inputs are always 0"
    )
    placements: tuple[PlacementEntry, ...]


class StageEntry(Entry):
    """When a node computes; stages are listed in a valid order."""

    node: str = Field(description="name of the mapped node")
    partition: Whole = Field(description="index into partitions: the node computes while that one is on the chip")
    after: tuple[str, ...] = Field(description="the nearest mapped nodes that it depends on")
    turns: Whole = Field(description="turns that one MVM takes because blocks of the node share rows or columns")
    shares_with: tuple[str, ...] = Field(
        description="other nodes with blocks in the same rows or columns: never in the same cycle as this one"
    )
    cycles: Whole | None = Field(description="of one inference; null where MVMs or activation bits are unknown")
    start: Whole | None = Field(
        description="cycle within every interval of the pipeline, see totals.cost, at which it starts; null likewise"
    )
    energy_pj: Energy | None = Field(description="of one inference in crossbars, DACs and ADCs; null where unknown")


class PartitionEntry(Entry):
    """Consecutive stages that are on the chip together; partitions are programmed one after the other."""

    nodes: tuple[str, ...] = Field(description="in the order of stages")
    crossbars: tuple[Range, ...] = Field(
        description="by crossbar type: the crossbar numbers of the partition's placements; number n stands for the "
        "physical array n - first"
    )
    latency_cycles: Whole | None = Field(description="one inference alone, from the first to the last of these stages")
    interval_cycles: Whole | None = Field(description="from one inference to the next through these stages")
    write_cells: Whole = Field(description="cells that are programmed")
    write_rows: Whole = Field(description="wordlines to program in the crossbar that has most of them")
    write_ns: Energy | None = Field(description="time for it, null where the chip gives no figure")
    write_energy_pj: Energy | None = Field(description="energy for it, null likewise")


class UnmappedEntry(Entry):
    """A node that could have been mapped and stays as it is: in float, or as another tool quantized it."""

    name: str = Field(description="of the ONNX node")
    op_type: str = Field(description="of the ONNX node")
    reason: str = Field(description="why it is not on crossbars")


class Ratio(Entry):
    """A share, not divided."""

    numerator: Whole = Field(description="what counts")
    denominator: Whole = Field(description="what it is a share of")


class CrossbarTotal(Entry):
    """Crossbars of one type."""

    name: str = Field(description="of the crossbar type")
    allocated: Whole = Field(description="physical arrays in use, numbered from 0; summed over partitions")
    count: Positive | None = Field(description="physical arrays on the chip; null: as many as needed")


class CostEntry(Entry):
    """What the crossbars with their DACs and ADCs cost; digital units, buffers and wires between them do not count.

    With several partitions, cycles and writes are sums over them: inferences pass through one partition after the
    other, and none of the cycles is spent on programming.
    """

    cycle: Literal["array-read", "column-turn"] = Field(
        description="what a cycle is: one read of an array with one input bit-slice, or one turn of its columns at the "
        "ADCs"
    )
    cycle_ns: Step | None = Field(description="its length; null where the chip gives none")
    latency_cycles: Whole | None = Field(
        description="one inference alone: stages after each other or in parallel, as data and shared crossbars allow"
    )
    critical_path: tuple[str, ...] = Field(
        description="stages that decide it, each waiting for the result or the crossbars of the one before"
    )
    interval_cycles: Whole | None = Field(
        description="from one inference to the next when they overlap: every stage computes once in it, at its start"
    )
    pipeline_latency_cycles: Whole | None = Field(description="one inference in that pipeline, from start to end")
    energy_pj: Energy | None = Field(description="of one inference")
    area_um2: Energy | None = Field(description="of all crossbars in use")
    write_cells: Whole = Field(description="cells that are programmed once before the first inference")
    write_rows: Whole = Field(description="wordlines to program in the crossbar that has most of them")
    write_ns: Energy | None = Field(description="time for it: wordline by wordline, all crossbars at once")
    write_energy_pj: Energy | None = Field(description="energy for it")
    missing: dict[Literal["cycles", "time", "energy", "area", "write_time", "write_energy"], tuple[str, ...]] = Field(
        description="for each figure that is null, what the chip or the model does not give"
    )


class Totals(Entry):
    """Figures of the whole model; padding, structural zeros and unit columns never count as used."""

    crossbars: tuple[CrossbarTotal, ...]
    cell_utilization: Ratio = Field(description="programmed weight cells over cells of all allocated crossbars")
    bit_utilization: Ratio = Field(description="weight bits over bits that all allocated crossbars can hold")
    lower_bound: Whole = Field(
        description="fewest crossbars that any placement of these weights could use under this sharing"
    )
    lower_bound_cells: Whole = Field(
        description="fewest cells of allocated crossbars, likewise; what is above it in cell_utilization.denominator "
        "is the gap"
    )
    exact: ExactOutcome | None = Field(
        None, description="what `--placement exact` proved of the placement, null where it was not asked for"
    )
    placements: Whole = Field(description="how many there are")
    dropped_kernels: Whole = Field(description="over all groups of all nodes")
    cost: CostEntry
