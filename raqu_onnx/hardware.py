"""Chip descriptions: crossbar inventory, converters, timing and energies, each figure with its source.

A chip is a TOML file (the built-in ones are installed as `raqu_onnx.hw_models`) that `load_chip` reads into frozen
typed models. A reader learns about every mistake in a file at once: `FILE: key: found X, allowed Y`.

Units stand in the key names: `_ns` nanoseconds, `_pj` picojoules, `_mw` milliwatts, `_um2` square micrometres, `_gsps`
10^9 samples per second, `_bits` bits. An unknown figure is left out of the file, never guessed.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from raqu_onnx.errors import ChipError
from raqu_onnx.hardware_errors import ChipFileError, constraint, explain, flatten

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = [
    "Chip",
    "ChipFileError",
    "Components",
    "CrossbarType",
    "Hierarchy",
    "Sharing",
    "SignedEncoding",
    "builtin_chips",
    "chip_source_path",
    "is_builtin_chip",
    "load_chip",
]

SignedEncoding = Literal["offset", "differential-column", "differential-row", "twos-complement"]
Sharing = Literal["exclusive", "diagonal", "time"]

# Strict: 2.0, "2" and true are not whole numbers. The upper bounds keep cell counts inside 64 bits.
Whole = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Lines = Annotated[int, Field(strict=True, ge=1, le=2**16)]
Figure = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
# No dots, so that `crossbars.NAME.rows` names one figure; safe in file names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


# One of these keys stands in every chip file, even in an unfinished one; one of the others in most configurations.
_TELLING = frozenset({"schema_version", "name", "crossbars", "encoding", "dac_bits", "sharing"})
_SETTINGS = frozenset({"model", "hw", "calibration", "selection", "eval", "weight_bits", "activation_bits", "seed"})


class _Table(BaseModel):
    """One table of a chip file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CrossbarType(_Table):
    """One kind of crossbar.

    Attributes:
        name: Unique among the chip's types.
        rows: Wordlines R.
        cols: Bitlines C.
        cell_bits: Bits c that one cell holds.
        count: Physical arrays of this type on the chip; None for as many as needed. Where the chip keeps the two
            polarities in a pair of arrays, both arrays count.
        rows_active: Wordlines driven at once; None for all.
        columns_per_adc: Bitlines that take turns at one ADC; None where unknown.
    """

    name: Name
    rows: Lines
    cols: Lines
    cell_bits: Annotated[int, Field(strict=True, ge=1, le=8)]
    count: Whole | None = None
    rows_active: Lines | None = None
    columns_per_adc: Lines | None = None

    @field_validator("rows_active")
    @classmethod
    def _no_more_than_there_are(cls, value: int | None, info: ValidationInfo) -> int | None:
        rows = info.data.get("rows")
        if value is not None and rows is not None and value > rows:
            raise constraint(f"at most rows, which is {rows}")
        return value

    @property
    def cells(self) -> int:
        """Cells of one crossbar, rows times cols."""
        return self.rows * self.cols


class Hierarchy(_Table):
    """How crossbars are grouped; where all three are known, their product is the chip's count of crossbars.

    Attributes:
        crossbars_per_core: Arrays in the smallest group with its own control (ISAAC's IMA, MNSIM's PE).
        cores_per_tile: Such groups in a tile.
        tiles: Tiles on the chip.
    """

    crossbars_per_core: Whole | None = None
    cores_per_tile: Whole | None = None
    tiles: Whole | None = None


class Components(_Table):
    """Energy, power and area per component; what is absent is unknown and gets no estimate.

    Attributes:
        adc_energy_pj: One conversion. Where absent, `adc_power_mw / adc_rate_gsps` is the same figure.
        adc_power_mw: One ADC while it converts.
        adc_area_um2: One ADC.
        adc_rate_gsps: Conversions of one ADC, in 10^9 per second.
        dac_power_mw: One wordline's DAC while it drives.
        dac_area_um2: One wordline's DAC.
        crossbar_read_energy_pj: One read of a whole array with one input bit-slice, without ADCs and DACs.
        crossbar_area_um2: The cells of one array.
        cell_write_energy_pj: Programming one cell once.
        cell_write_ns: Programming one cell once.
    """

    adc_energy_pj: Figure | None = None
    adc_power_mw: Figure | None = None
    adc_area_um2: Figure | None = None
    adc_rate_gsps: Figure | None = None
    dac_power_mw: Figure | None = None
    dac_area_um2: Figure | None = None
    crossbar_read_energy_pj: Figure | None = None
    crossbar_area_um2: Figure | None = None
    cell_write_energy_pj: Figure | None = None
    cell_write_ns: Figure | None = None


class Chip(_Table):
    """A crossbar chip.

    Attributes:
        schema_version: Version of the file format.
        name: What `--hw` takes for a built-in chip.
        title: One short line.
        description: What the chip is, and what was assumed.
        encoding: How a signed weight is stored in cells.
        encoding_is_approximation: Why the encoding (or the cell bits of an analog cell) only comes near to the
            published chip's own scheme; None where it is the chip's own.
        offset_sum: Where `offset` gets the sum of inputs from: the digital side, or one extra unit column per
            crossbar region.
        flip: `offset` may store a column inverted to keep its sum inside the ADC's range.
        polarity_arrays: Whether `differential-column` keeps both polarities in the same array or in a pair of arrays.
        split_slices: The slices of one weight may lie in different crossbars.
        sharing: Which blocks may share a crossbar: `exclusive` (one node each), `diagonal` (disjoint rows and
            columns), `time` (anything that does not overlap).
        dac_bits: Input bits driven at once; an a-bit input takes `ceil(a / dac_bits)` slices.
        adc_bits: Resolution of the ADC; None for an ideal one that never clips.
        adc_signed: The ADC reads negative sums; always so for `differential-row`, and its default there.
        cycle_ns: Time of one array read with one input bit-slice, the turns of all columns at their ADCs included;
            None where unknown.
        crossbars: The crossbar types, with unique names.
        column_turn_ns: Time of one turn of the columns at their ADCs, DAC and array included, on a chip where a read
            takes only as many turns as its bitlines need; None where a read takes `cycle_ns` whatever it reads.
        hierarchy: How crossbars are grouped; None where unknown.
        components: Figures per component.
        sources: Where figures come from, by dotted key (`crossbars.main.rows`) or by a table above it
            (`crossbars.main`, `components`). One that begins with `assumed:` marks an assumption.
    """

    schema_version: Literal[1]
    name: Name
    title: str = ""
    description: str = ""
    encoding: SignedEncoding
    encoding_is_approximation: str | None = None
    offset_sum: Literal["digital", "unit-column"] = "digital"
    flip: Switch = False
    polarity_arrays: Literal["same", "pair"] = "same"
    split_slices: Switch = False
    sharing: Sharing
    dac_bits: Annotated[int, Field(strict=True, ge=1, le=16)]
    adc_bits: Annotated[int, Field(strict=True, ge=1, le=32)] | None = None
    adc_signed: Switch = Field(default_factory=lambda data: data.get("encoding") == "differential-row")
    cycle_ns: Figure | None = None
    crossbars: Annotated[tuple[CrossbarType, ...], Field(min_length=1)]
    column_turn_ns: Figure | None = None
    hierarchy: Hierarchy | None = None
    components: Components = Components()
    sources: dict[str, str] = {}

    @field_validator("offset_sum", "flip", "polarity_arrays", "adc_signed")
    @classmethod
    def _fits_encoding(cls, value: object, info: ValidationInfo) -> object:
        encoding = info.data.get("encoding")
        if encoding is None:  # reported already
            return value
        if info.field_name == "adc_signed":
            if encoding == "differential-row" and value is False:
                raise constraint("true: differential-row subtracts on the bitline")
            return value
        default = cls.model_fields[str(info.field_name)].default
        home = "differential-column" if info.field_name == "polarity_arrays" else "offset"
        if value != default and encoding != home:
            shown = str(default).lower() if isinstance(default, bool) else f'"{default}"'
            raise constraint(f'{shown} with encoding "{encoding}" (anything else needs "{home}")')
        return value

    @field_validator("crossbars")
    @classmethod
    def _crossbars_agree(cls, value: tuple[CrossbarType, ...], info: ValidationInfo) -> tuple[CrossbarType, ...]:
        names = [crossbar.name for crossbar in value]
        if len(set(names)) < len(names):
            raise constraint("names that differ", found=", ".join(names))
        if info.data.get("encoding") == "differential-row":
            short = [f"{crossbar.name}.rows = {crossbar.rows}" for crossbar in value if crossbar.rows < 2]
            if short:
                raise constraint("at least 2 rows: differential-row stores a weight in two", found=", ".join(short))
        return value

    @field_validator("column_turn_ns")
    @classmethod
    def _turns_are_counted(cls, value: float | None, info: ValidationInfo) -> float | None:
        cycle = info.data.get("cycle_ns")
        if value is not None and cycle is not None and value > cycle:
            raise constraint(f"at most cycle_ns, which is {cycle:g}: a turn is a part of a read")
        if value is not None and any(kind.columns_per_adc is None for kind in info.data.get("crossbars", ())):
            raise constraint("nothing where a crossbar type has no columns_per_adc")
        return value

    @field_validator("hierarchy")
    @classmethod
    def _hierarchy_multiplies_to_count(cls, value: Hierarchy | None, info: ValidationInfo) -> Hierarchy | None:
        counts = [crossbar.count for crossbar in info.data.get("crossbars", ())]
        known = [count for count in counts if count is not None]
        levels = [] if value is None else [*value.model_dump().values()]
        if not counts or len(known) < len(counts) or not levels or None in levels:
            return value
        product = levels[0] * levels[1] * levels[2]
        if product != sum(known):
            raise constraint(
                f"a product of all levels equal to the crossbars' count, {sum(known)}",
                found=f"a product of {product}",
            )
        return value

    @field_validator("sources", mode="before")
    @classmethod
    def _dotted(cls, value: object) -> object:
        # TOML reads `crossbars.main = "..."` without quotes as nested tables: the same is meant.
        return dict(flatten(value)) if isinstance(value, Mapping) else value

    def total_cells(self) -> int | None:
        """Cells of all crossbars on the chip; None if the count of any type is open."""
        total = 0
        for crossbar in self.crossbars:
            if crossbar.count is None:
                return None
            total += crossbar.count * crossbar.cells
        return total

    def settings(self) -> dict[str, Any]:
        """Every value by dotted key, in the order of the file; crossbar types by their name.

        Values that are left out of the file are None here. Texts (title, description, sources) are not included.
        """
        return dict(self._settings())

    def _settings(self) -> Iterator[tuple[str, Any]]:
        texts = {"schema_version", "name", "title", "description", "sources"}
        for key in (key for key in type(self).model_fields if key not in texts):
            value = getattr(self, key)
            if key == "crossbars":
                for crossbar in value:
                    figures = crossbar.model_dump(exclude={"name"})
                    yield from ((f"{key}.{crossbar.name}.{k}", v) for k, v in figures.items())
            elif isinstance(value, BaseModel):
                yield from ((f"{key}.{k}", v) for k, v in value.model_dump().items())
            else:
                yield key, value

    def source_of(self, key: str) -> str | None:
        """Where the figure at a dotted key comes from: its own source, or that of the nearest table above it."""
        while key:
            if key in self.sources:
                return self.sources[key]
            key = key.rpartition(".")[0]
        return None

    def unsourced_figures(self) -> tuple[str, ...]:
        """Dotted keys of the numbers that no source covers."""
        return tuple(
            key
            for key, value in self.settings().items()
            if isinstance(value, int | float) and not isinstance(value, bool) and not self.source_of(key)
        )

    def stray_sources(self) -> tuple[str, ...]:
        """Keys of `sources` that name no value of this chip, such as a misspelt or an absent one."""
        present = [f"{key}." for key, value in self.settings().items() if value is not None]
        return tuple(key for key in self.sources if not any(p.startswith(f"{key}.") for p in present))


def load_chip(name_or_path: str | os.PathLike[str]) -> Chip:
    """Read a chip description.

    Args:
        name_or_path: A built-in chip's name (`isaac`), or the path of a TOML file. A text that is a built-in name is
            never looked up as a file (write `./isaac` for that); a path object always is.

    Returns:
        The validated chip.

    Raises:
        ChipFileError: The file cannot be read, is not TOML, or does not describe a chip. Names every error.
        ChipError: No built-in chip has that name.
    """
    if isinstance(name_or_path, str):
        if name_or_path in builtin_chips():
            data = chip_source_path(name_or_path).read_bytes()
            return _parse(data, f"{name_or_path}.toml")
        if not _looks_like_path(name_or_path):
            raise _unknown_chip(name_or_path)
    path = os.fspath(name_or_path)
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        name = Path(path).name.removesuffix(".toml")
        hint = f"; did you mean the built-in chip {name}?" if is_builtin_chip(name) else ""
        raise ChipFileError(path, [f"cannot be read: {reason}{hint}"]) from error
    return _parse(data, path)


def builtin_chips() -> list[str]:
    """Names of the built-in chips, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in files("raqu_onnx.hw_models").iterdir()
        if entry.name.endswith(".toml")
    )


def is_builtin_chip(name: str) -> bool:
    """Whether a built-in chip has that name."""
    return name in builtin_chips()


def chip_source_path(name: str) -> Traversable:
    """The TOML file of a built-in chip.

    Raises:
        ChipError: No built-in chip has that name.
    """
    if name not in builtin_chips():
        raise _unknown_chip(name)
    return files("raqu_onnx.hw_models").joinpath(f"{name}.toml")


def _looks_like_path(text: str) -> bool:
    separators = {os.sep, os.altsep or os.sep}
    return text.endswith(".toml") or any(s in text for s in separators) or Path(text).is_file()


def _unknown_chip(name: str) -> ChipError:
    known = builtin_chips()
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return ChipError(
        f"no built-in chip is called {name!r}{hint}: give the path of a .toml file, or one of {', '.join(known)}"
    )


def _parse(data: bytes, label: str) -> Chip:
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start}): a chip is a TOML text file"
        raise ChipFileError(label, [problem]) from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise ChipFileError(label, [f"is not valid TOML: {error}"]) from error
    if document and not document.keys() & _TELLING:
        problem = "is no chip description: it has neither crossbars nor an encoding"
        hint = "; settings of a run are given with --config" if document.keys() & _SETTINGS else ""
        raise ChipFileError(label, [f"{problem}{hint}"])
    try:
        return Chip.model_validate(document)
    except ValidationError as error:
        problems = explain(error, Chip.model_json_schema(), document)
        raise ChipFileError(label, problems) from error
