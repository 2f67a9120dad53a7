"""Writing and reading what tells of a run: `report.json` for programs, `report.html` for people."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from raqu_onnx.errors import DataError
from raqu_onnx.passes.write_manifest import MANIFEST_FILE
from raqu_onnx.report import VERSION, Report

__all__ = ["HTML_FILE", "REPORT_FILE", "read_report", "write_reports"]

REPORT_FILE = "report.json"
HTML_FILE = "report.html"


def write_reports(report: Report, folder: Path) -> None:
    """Write `report.json`, and where the folder has a manifest `report.html`.

    Equal reports give equal bytes.
    """
    text = json.dumps(report.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    if (folder / MANIFEST_FILE).exists():
        # Imported here: only what draws the page needs the plotting library.
        from raqu_onnx.html import write_html

        write_html(folder, folder / HTML_FILE)


def read_report(path: str | Path) -> Report:
    """Read `report.json`.

    Raises:
        DataError: The file cannot be read or is no report of this version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; give the folder that optimize wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON file: {error}") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != VERSION:
        raise DataError(
            f"{path}: schema_version: found {version!r}, this program reads {VERSION}; use the version that wrote it"
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise DataError(f"{path}: {where}: {first['msg']}; run optimize again to write it anew") from error
