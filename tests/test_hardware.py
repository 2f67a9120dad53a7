from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raqu_onnx.errors import ChipError
from raqu_onnx.hardware import (
    Chip,
    ChipFileError,
    CrossbarType,
    builtin_chips,
    chip_source_path,
    load_chip,
)
from raqu_onnx.hardware_errors import explain

SCHEMA = Chip.model_json_schema()
MAIN = {"name": "main", "rows": 128, "cols": 64, "cell_bits": 2}
SMALLEST: dict[str, Any] = {
    "schema_version": 1,
    "name": "mine",
    "encoding": "offset",
    "sharing": "time",
    "dac_bits": 1,
    "crossbars": [MAIN],
}
SMALLEST_TOML = """schema_version = 1
name = "mine"
encoding = "offset"
sharing = "time"
dac_bits = 1
{top}
[[crossbars]]
name = "main"
rows = 128
cols = 64
cell_bits = 2
{tables}
"""


def chip(**changes: Any) -> Chip:
    return Chip.model_validate({**SMALLEST, **changes})


def problems(tmp_path: Path, top: str = "", tables: str = "") -> list[str]:
    """What the loader says about the smallest chip with these lines added (a key of its own is replaced)."""
    path = tmp_path / "mine.toml"
    new = top.splitlines()
    keys = {line.partition("=")[0] for line in new}
    head, brackets, rest = SMALLEST_TOML.format(top="", tables=tables).partition("[[")
    kept = [line for line in head.splitlines() if line.partition("=")[0] not in keys]
    text = "\n".join([*new, *kept, brackets + rest])
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ChipFileError) as caught:
        load_chip(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert len(lines) == (1 if len(caught.value.problems) == 1 else len(caught.value.problems) + 1)
    return list(caught.value.problems)


# -- the built-in chips --------------------------------------------------------------------------


def test_builtin_chips_are_the_promised_ones() -> None:
    promised = "forms generic hermes hetero isaac mnsim neurosim neurram prime puma raella"
    assert builtin_chips() == promised.split()


@pytest.mark.parametrize("name", builtin_chips())
def test_builtin_chip_is_complete_and_sourced(name: str) -> None:
    loaded = load_chip(name)
    assert loaded.name == name
    assert loaded.title
    assert loaded.description
    assert loaded.unsourced_figures() == ()
    assert loaded.stray_sources() == ()
    assert loaded == load_chip(Path(str(chip_source_path(name))))
    assert chip_source_path(name).read_text(encoding="utf-8").isascii()  # prints on any terminal
    assumed = any("assumed:" in source for source in loaded.sources.values())
    assert not assumed or "assumed" in loaded.description


@pytest.mark.parametrize("name", builtin_chips())
def test_builtin_chip_survives_a_round_trip(name: str) -> None:
    loaded = load_chip(name)
    assert Chip.model_validate(loaded.model_dump()) == loaded
    assert Chip.model_validate_json(loaded.model_dump_json()) == loaded


@pytest.mark.parametrize(
    ("name", "crossbars", "cells"),
    [
        ("isaac", 168 * 12 * 8, 168 * 12 * 8 * 128 * 128),
        ("puma", 138 * 8 * 16, 138 * 8 * 16 * 128 * 128),
        ("neurram", 48, 48 * 256 * 256),
        ("hermes", 64, 64 * 256 * 256 * 2),  # two cells a unit cell
        ("mnsim", 64 * 64 * 2 * 2 * 2, 64 * 64 * 2 * 2 * 2 * 256 * 256),
        ("hetero", 128 + 64 + 32, 128 * 64**2 + 64 * 128**2 + 32 * 256**2),
    ],
)
def test_inventory(name: str, crossbars: int, cells: int) -> None:
    loaded = load_chip(name)
    assert sum(crossbar.count or 0 for crossbar in loaded.crossbars) == crossbars
    assert loaded.total_cells() == cells


def test_default_chip_is_plain() -> None:
    generic = load_chip("generic")
    main = generic.crossbars[0]
    assert (main.rows, main.cols, main.cell_bits, main.count) == (128, 128, 2, None)
    assert (generic.encoding, generic.offset_sum, generic.flip) == ("offset", "digital", False)
    assert (generic.sharing, generic.dac_bits, generic.adc_bits) == ("time", 1, None)
    assert generic.total_cells() is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("isaac", ("offset", "unit-column", True, "same", False)),
        ("prime", ("differential-column", "digital", False, "pair", False)),
        ("neurram", ("differential-row", "digital", False, "same", True)),
    ],
)
def test_signed_schemes(name: str, expected: tuple[object, ...]) -> None:
    it = load_chip(name)
    found = (it.encoding, it.offset_sum, it.flip, it.polarity_arrays, it.adc_signed)
    assert found == expected


def test_approximations_are_admitted() -> None:
    approximate = {n for n in builtin_chips() if load_chip(n).encoding_is_approximation}
    assert {"raella", "forms", "hermes", "neurram"} <= approximate
    assert not {"isaac", "prime", "generic", "hetero"} & approximate


def test_isaac_adc_reads_its_array_in_one_cycle() -> None:
    isaac = load_chip("isaac")
    rate = isaac.components.adc_rate_gsps
    assert rate is not None
    assert math.isclose((isaac.crossbars[0].columns_per_adc or 0) / rate, isaac.cycle_ns or 0)


# -- the models ----------------------------------------------------------------------------------


def test_cells() -> None:
    assert CrossbarType(name="a", rows=128, cols=64, cell_bits=2).cells == 8192


@given(st.lists(st.tuples(st.integers(1, 512), st.integers(1, 512), st.integers(1, 99)), min_size=1))
def test_total_cells(types: list[tuple[int, int, int]]) -> None:
    crossbars = [
        {"name": f"t{i}", "rows": rows, "cols": cols, "cell_bits": 1, "count": count}
        for i, (rows, cols, count) in enumerate(types)
    ]
    assert chip(crossbars=crossbars).total_cells() == sum(r * c * n for r, c, n in types)
    crossbars[-1].pop("count")
    assert chip(crossbars=crossbars).total_cells() is None


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        chip().dac_bits = 2  # type: ignore[misc]


def test_adc_of_differential_row_is_signed() -> None:
    assert chip(encoding="differential-row").adc_signed
    assert not chip().adc_signed
    with pytest.raises(ValidationError):
        chip(encoding="differential-row", adc_signed=False)


def test_sources_cover_downwards() -> None:
    it = chip(adc_bits=8, sources={"crossbars.main": "a paper", "crossbars.main.rows": "another"})
    assert it.source_of("crossbars.main.rows") == "another"
    assert it.source_of("crossbars.main.cols") == "a paper"
    assert it.unsourced_figures() == ("dac_bits", "adc_bits")


def test_sources_may_be_nested_tables() -> None:
    assert chip(sources={"crossbars": {"main": "x"}}).sources == {"crossbars.main": "x"}


def test_stray_sources() -> None:
    sources = {"crossbars.mian": "x", "cycle_ns": "x", "components": "x", "encoding": "x"}
    assert chip(sources=sources).stray_sources() == ("crossbars.mian", "cycle_ns", "components")


def test_json_schema_describes_the_chips() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = Chip.model_json_schema()
    for name in builtin_chips():
        jsonschema.validate(load_chip(name).model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**SMALLEST, "colour": 1}, schema)


# -- what the loader refuses ---------------------------------------------------------------------

MISTAKES = [
    ("schema_version = 2", "", "schema_version: found 2, allowed 1"),
    ('name = "a b"', "", 'name: found "a b", allowed a name of letters'),
    ('encoding = "offsets"', "", 'encoding: found "offsets", allowed "offset", "differential-column"'),
    ('sharing = "all"', "", 'sharing: found "all", allowed "exclusive", "diagonal", "time"'),
    ("dac_bits = 0", "", "dac_bits: found 0, allowed a whole number from 1 to 16"),
    ("dac_bits = 1.0", "", "dac_bits: found 1.0, allowed a whole number"),
    ("dac_bits = true", "", "dac_bits: found true, allowed a whole number"),
    ('dac_bits = "1"', "", 'dac_bits: found "1", allowed a whole number from 1 to 16 (write the bare'),
    ("split_slices = 1", "", "split_slices: found 1, allowed true or false"),
    (
        "cycle_ns = 10.0\ncolumn_turn_ns = 11.0",
        "",
        "column_turn_ns: found 11.0, allowed at most cycle_ns, which is 10: a turn is a part of a read",
    ),
    (
        "column_turn_ns = 5.0",
        "",
        "column_turn_ns: found 5.0, allowed nothing where a crossbar type has no columns_per_adc",
    ),
    ("cycle_ns = -1", "", "cycle_ns: found -1, allowed a number in ns above 0"),
    ("cycle_ns = inf", "", "cycle_ns: found inf, allowed a number in ns above 0"),
    ("cycle_ns = nan", "", "cycle_ns: found nan, allowed a number in ns above 0"),
    ('cycle_ns = "100 ns"', "", 'cycle_ns: found "100 ns", allowed a number in ns above 0 (write the'),
    ("cycle_us = 0.1", "", "cycle_us: found an unknown key, allowed cycle_ns, in ns (did you mean"),
    ("cycle = 100", "", "cycle: found an unknown key, allowed cycle_ns, in ns (did you mean"),
    ("dac-bits = 1", "", "dac-bits: found an unknown key, allowed dac_bits (did you mean"),
    ("colour = 1", "", "colour: found an unknown key, allowed schema_version, name, title"),
    ("rows = 1", "", "rows: found an unknown key, allowed rows in the table [[crossbars]]"),
    ("adc_area_um2 = 1", "", "adc_area_um2: found an unknown key, allowed adc_area_um2 in the table [comp"),
    ('"a\\nb" = 1', "", '"a\\nb": found an unknown key, allowed schema_version'),
    ("", "cycle_ns = 1", "crossbars.main.cycle_ns: found an unknown key, allowed cycle_ns at the top"),
    ("", "count = -4", "crossbars.main.count: found -4, allowed a whole number from 1 to"),
    ("", "rows_active = 129", "crossbars.main.rows_active: found 129, allowed at most rows, which is 128"),
    ("", "[[crossbars]]\nname = 'b'", "crossbars.b.rows: found nothing, allowed a whole number from"),
    ("", "[[crossbars]]\nrows = 1", "crossbars[1].name: found nothing, allowed a name of letters"),
    ("", "[components]\nadc_power_w = 1", "components.adc_power_w: found an unknown key, allowed adc_power_mw"),
    ("", "[hierarchy]\ntiles = 0", "hierarchy.tiles: found 0, allowed a whole number from 1"),
    ("", "[sources]\ndac_bits = 3", "sources.dac_bits: found 3, allowed a text in quotes"),
    ("sources = 3", "", "sources: found 3, allowed a table [sources]"),
    ("components = 3", "", "components: found 3, allowed a table [components] with any of adc_energy_pj"),
    (
        'encoding = "twos-complement"\nflip = true',
        "",
        'flip: found true, allowed false with encoding "twos-complement" (anything else needs "offset")',
    ),
    (
        'encoding = "differential-row"\noffset_sum = "unit-column"',
        "",
        'offset_sum: found "unit-column", allowed "digital" with encoding "differential-row"',
    ),
    (
        'polarity_arrays = "pair"',
        "",
        'polarity_arrays: found "pair", allowed "same" with encoding "offset" (anything else needs "diff',
    ),
    (
        'encoding = "differential-row"\nadc_signed = false',
        "",
        "adc_signed: found false, allowed true: differential-row",
    ),
    (
        'encoding = "differential-row"',
        "[[crossbars]]\nname = 'thin'\nrows = 1\ncols = 1\ncell_bits = 1",
        "crossbars: found thin.rows = 1, allowed at least 2 rows",
    ),
    (
        "",
        "[[crossbars]]\nname = 'main'\nrows = 1\ncols = 1\ncell_bits = 1",
        "crossbars: found main, main, allowed names that differ",
    ),
    (
        "",
        "count = 9\n[hierarchy]\ncrossbars_per_core = 2\ncores_per_tile = 2\ntiles = 2",
        "hierarchy: found a product of 8, allowed a product of all levels equal to the crossbars' count, 9",
    ),
]


@pytest.mark.parametrize(("top", "tables", "expected"), MISTAKES)
def test_mistake_is_named(tmp_path: Path, top: str, tables: str, expected: str) -> None:
    found = problems(tmp_path, top, tables)
    assert any(problem.startswith(expected) for problem in found), found
    # Nothing else is wrong with these files, apart from the keys that an unfinished table lacks.
    assert len(found) == 1 or tables.startswith("[[crossbars]]"), found


def test_every_error_is_reported_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        'encoding = "none"\nflip = 3\ncycle_us = 1\ndac_bits = 99',
        "count = -1\n[components]\nadc_power_mw = 0\n[hierarchy]\nfloors = 3",
    )
    keys = sorted(problem.partition(":")[0] for problem in found)
    assert keys == sorted(
        [
            "encoding",
            "flip",
            "cycle_us",
            "dac_bits",
            "crossbars.main.count",
            "components.adc_power_mw",
            "hierarchy.floors",
        ]
    )


@pytest.mark.parametrize("crossbars", ["[]", "3", "[3]", '{name = "main"}'])
def test_crossbars_must_be_tables(tmp_path: Path, crossbars: str) -> None:
    path = tmp_path / "c.toml"
    top = SMALLEST_TOML.partition("[[")[0].format(top=f"crossbars = {crossbars}")
    path.write_text(top, encoding="utf-8")
    with pytest.raises(ChipFileError) as caught:
        load_chip(path)
    assert [problem.startswith("crossbars") for problem in caught.value.problems] == [True]


def test_empty_file_lacks_every_required_key(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_bytes(b"")
    with pytest.raises(ChipFileError, match="6 errors in the chip description") as caught:
        load_chip(path)
    assert {problem.partition(":")[0] for problem in caught.value.problems} == set(SMALLEST)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"rows = ", "is not valid TOML: "),
        (b"a = 1\na = 2", "is not valid TOML: "),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b"a = " + b"[" * 5000, "is not valid TOML: "),
        (b"a = " + b"9" * 9999, "is not valid TOML: "),
        (b"name = 0x" + b"f" * 9999, "errors in the chip description"),
    ],
)
def test_broken_file(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ChipFileError) as caught:
        load_chip(path)
    assert expected in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("name", ["absent.toml", "", "a\0b.toml"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ChipFileError, match="cannot be read") as caught:
        load_chip(f"{tmp_path}/{name}")
    assert str(caught.value).isprintable()  # one line


def test_unknown_chip_gets_suggestions() -> None:
    with pytest.raises(ChipError, match=r"'ISAC' \(did you mean isaac\?\).*forms, generic, hermes"):
        load_chip("ISAC")
    with pytest.raises(ChipError, match=r"no built-in chip is called 'isaac\.toml'"):
        chip_source_path("isaac.toml")


def test_builtin_name_wins_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("isaac").write_text(SMALLEST_TOML.format(top="", tables=""), encoding="utf-8")
    Path("mine").write_text(SMALLEST_TOML.format(top="", tables=""), encoding="utf-8")
    assert load_chip("isaac").name == "isaac"
    assert [load_chip(p).name for p in ("./isaac", Path("isaac"), "mine")] == ["mine"] * 3


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none() | st.text())


@given(st.sampled_from(sorted(Chip.model_fields)), VALUES)
def test_no_value_breaks_the_report(key: str, value: Any) -> None:
    # Any value of any key is either taken or reported, never a traceback.
    document = {**SMALLEST, key: value}
    try:
        Chip.model_validate(document)
    except ValidationError as error:
        lines = explain(error, SCHEMA, document)
        assert lines
        assert all(line.startswith(key) and ": found " in line for line in lines)


def test_builtin_files_are_plain_toml() -> None:
    # Another tool that reads the files sees the same numbers.
    raw = tomllib.loads(chip_source_path("isaac").read_text(encoding="utf-8"))
    assert raw["crossbars"][0]["rows"] == load_chip("isaac").crossbars[0].rows
    assert json.loads(load_chip("isaac").model_dump_json())["cycle_ns"] == raw["cycle_ns"]
