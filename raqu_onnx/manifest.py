"""The mapping manifest: which weight sits in which cell, for a backend that knows nothing else.

One JSON file whose schema is generated from the models below. Ranges are half-open (`[first, last]` holds `first` up to
`last - 1`), so that large models stay small here: nothing is listed cell by cell.

How a backend runs a node from it: each vector of K input codes is cut into the `weight_rows` of a placement and drives
its `rows`; each bitline of `cols` gives a sum; the table in `encodings` says which slice of which kernel it is; slices
are shifted, signed and added, the offset times the sum of the inputs is subtracted, and the results of all placements
that hold a piece of the same kernel are added.

Each replica of a node holds the whole node, so that any one of them gives the result of an MVM. With several partitions
the chip is programmed for one after the other; crossbar numbers then go on from partition to partition.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, JsonValue, ValidationError

from raqu_onnx.errors import ManifestError, OutputError
from raqu_onnx.front import SearchEntry
from raqu_onnx.hardware import Chip, Sharing
from raqu_onnx.manifest_entries import (
    ActivationEntry,
    CellSlice,
    CostEntry,
    CrossbarTotal,
    DataProvenance,
    EncodingEntry,
    Entry,
    MatrixEntry,
    ModelFile,
    NodeEntry,
    PartitionEntry,
    PlacementEntry,
    Ratio,
    StageEntry,
    Tool,
    Totals,
    UnmappedEntry,
    Whole,
    WidthEntry,
    WindowEntry,
)

__all__ = [
    "FORMAT",
    "VERSION",
    "ActivationEntry",
    "CellSlice",
    "CostEntry",
    "CrossbarTotal",
    "DataProvenance",
    "EncodingEntry",
    "Manifest",
    "MatrixEntry",
    "ModelFile",
    "NodeEntry",
    "ParsedManifest",
    "PartitionEntry",
    "PlacementEntry",
    "Ratio",
    "SchemaError",
    "SearchEntry",
    "StageEntry",
    "Tool",
    "Totals",
    "UnmappedEntry",
    "WidthEntry",
    "WindowEntry",
    "digest_of",
    "manifest_schema",
    "parse_manifest",
    "read_manifest",
]

FORMAT: Final = "raqu-onnx-manifest"
VERSION: Final = 1


class SchemaError(ManifestError):
    """The file is JSON, but not a manifest of this version."""


class Manifest(Entry):
    """A model on a chip; what the cells file beside it holds, `raqu-onnx manifest schema cells` tells."""

    format: Literal["raqu-onnx-manifest"] = Field(description="says what kind of file this is")
    version: Literal[1] = Field(description="of the format: a reader of another version must stop here")
    digest: str = Field(description="SHA-256 of the canonical JSON (sorted keys, no spaces, ASCII) without this key")
    tool: Tool
    model: ModelFile
    seed: Whole = Field(description="seed of everything random in the run")
    configuration: dict[str, JsonValue] = Field(description="settings of the run")
    calibration: DataProvenance | None
    selection: DataProvenance | None
    executable: bool = Field(description="every mapped node has a quantized input")
    chip: Chip
    sharing: Sharing = Field(description="the rule by which placements share crossbars")
    encodings: tuple[EncodingEntry, ...] = Field(description="one for each crossbar type in use")
    nodes: tuple[NodeEntry, ...]
    stages: tuple[StageEntry, ...]
    partitions: Annotated[tuple[PartitionEntry, ...], Field(min_length=1)] = Field(
        description="one where all is on the chip at once"
    )
    unmapped: tuple[UnmappedEntry, ...]
    totals: Totals
    search: SearchEntry | None = Field(
        description="the Pareto front of the search that chose the bits, null without one; no backend needs it"
    )

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return self.model_dump(mode="json")

    def sealed(self) -> Manifest:
        """The same manifest with its digest computed."""
        return self.model_copy(update={"digest": digest_of(self.to_json())})

    def write(self, path: str | Path) -> None:
        """Write compact JSON; equal manifests give equal bytes.

        Raises:
            OutputError: The file cannot be written.
        """
        path = Path(path)
        text = json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class ParsedManifest:
    """A manifest as read from a file, with the digest that its content really has."""

    manifest: Manifest
    digest: str


def digest_of(data: dict[str, Any]) -> str:
    """SHA-256 of a manifest's JSON values without their own digest, see `Manifest.digest`."""
    content = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_manifest(path: str | Path) -> ParsedManifest:
    """Read a manifest without comparing its digest.

    Raises:
        ManifestError: The file cannot be read or is not JSON.
        SchemaError: It is not a manifest of this version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror or error}; give the folder that optimize wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: is not UTF-8 text; give the folder that optimize wrote, or its manifest"
        ) from error
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ManifestError(f"{path}: is nested too deeply for a manifest") from error
    except ValueError as error:
        raise ManifestError(f"{path}: is not JSON: {error}") from error
    _check_version(path, data)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise SchemaError(f"{path}: {_first_problem(error)}") from error
    return ParsedManifest(manifest, digest_of(data))


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest.

    Raises:
        ManifestError: The file cannot be read, is no manifest of this version, or was changed after it was written.
    """
    parsed = parse_manifest(path)
    if parsed.digest != parsed.manifest.digest:
        raise ManifestError(f"{path}: digest: the content was changed or damaged after it was written")
    return parsed.manifest


def manifest_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the manifest."""
    schema = Manifest.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_version(path: str | Path, data: object) -> None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SchemaError(f"{path}: format: is not {FORMAT!r}, so this is no mapping manifest")
    if data.get("version") != VERSION:
        raise SchemaError(
            f"{path}: version: found {data.get('version')!r}, this program reads {VERSION}; "
            "use the version of raqu-onnx that wrote it"
        )


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    key = ".".join(map(str, first["loc"])) or "top level"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    found = "" if isinstance(first["input"], dict | list) else f", found {first['input']!r}"
    return f"{key}: {first['msg']}{found}{more}"[:400].replace("\n", " ")
