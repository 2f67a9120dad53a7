"""Putting the page together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raqu_onnx.errors import OutputError
from raqu_onnx.html import outcome
from raqu_onnx.html.command import changed_settings, chosen_earlier, command_of, given_in_memory
from raqu_onnx.html.content import candidates, front_points, layers_of, uniform_points
from raqu_onnx.html.floor_plan import floor_plan
from raqu_onnx.html.palette import BITS, layer_colours
from raqu_onnx.manifest import read_manifest
from raqu_onnx.node_names import printable
from raqu_onnx.passes.write_manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from raqu_onnx.html.content import Layer
    from raqu_onnx.html.floor_plan import FloorPlan
    from raqu_onnx.manifest import Manifest
    from raqu_onnx.report import Report

__all__ = ["render_page", "write_html"]

# Commands and options in messages.
_CODE = re.compile(r"(`[^`]+`|(?<![\w-])--[a-z][a-z-]+)")
_REPORT_FILE = "report.json"
_METRIC_LABELS = {"top-1": "accuracy", "agreement": "agreement", "1 - noise/signal": "SQNR"}


def write_html(folder: str | Path, path: str | Path) -> None:
    """Draw the page of a result folder; equal folders give equal bytes.

    Args:
        folder: A folder with `manifest.json` and `report.json`.
        path: Where the page goes.

    Raises:
        ManifestError: The manifest is missing or damaged.
        DataError: The report is.
        OutputError: The page cannot be written.
    """
    from raqu_onnx.report_files import read_report

    manifest = read_manifest(Path(folder) / MANIFEST_FILE)
    text = render_page(manifest, read_report(Path(folder) / _REPORT_FILE))
    try:
        # A name in a manifest may hold half of a surrogate pair, which UTF-8 has no bytes for.
        Path(path).write_bytes(text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}; name another file with -o") from error


def render_page(manifest: Manifest, report: Report) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("raqu_onnx.html"),
        autoescape=True,
        # Names stand in sentences too, which they must not turn around.
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _with_code
    layers = layers_of(manifest, report)
    plan = floor_plan(manifest)
    plots = dict(_plots(manifest, report, layers, plan))
    template = environment.get_template("report.html.j2")
    return template.render(
        manifest=manifest,
        report=report,
        layers=layers,
        plan=plan,
        plots=plots,
        plots_json=_script_json(_items(plots)),
        bokeh_js=_bokeh_js(),
        cards=list(outcome.cards(report, manifest)),
        rows=outcome.rows(report),
        unseen=outcome.evaluation_metric(report),
        goal=outcome.goal_sentence(report),
        data=outcome.data_sentence(report),
        loss=outcome.loss_sentence(report),
        fewest=outcome.fewest_bits_sentence(layers),
        dropped=outcome.dropped_sentence(layers),
        front=list(zip(report.front, front_points(report), strict=True)),
        adc=outcome.adc_sentence(layers, manifest.chip.adc_bits),
        colours=dict(zip([node.name for node in manifest.nodes], layer_colours(len(layers)), strict=True)),
        bit_colours=list(enumerate(BITS)),
        command=command_of(manifest.configuration, chosen_earlier(report)),
        chosen=chosen_earlier(report),
        in_memory=given_in_memory(manifest.configuration, report, manifest.chip),
        changed=changed_settings(manifest.configuration),
        title=_title(manifest),
    )


def _title(manifest: Manifest) -> str:
    model = manifest.configuration.get("model")
    return Path(model).name if isinstance(model, str) else "model"


def _plots(manifest: Manifest, report: Report, layers: Sequence[Layer], plan: FloorPlan) -> Iterator[tuple[str, Any]]:
    from raqu_onnx.html.floor_plot import floor_plot
    from raqu_onnx.html.layer_plots import adc_plot, kernels_plot, sensitivity_plot, shares_plot
    from raqu_onnx.html.search_plots import cost_plot, front_plot, progress_plot

    if layers:
        yield "shares", shares_plot(layers)
        yield "kernels", kernels_plot(layers)
    if len(plan.blocks):
        by_node = {layer.node: layer for layer in layers}
        kinds = [kind.name for kind in manifest.chip.crossbars]
        yield "floor", floor_plot(plan, [by_node[node.name] for node in manifest.nodes], kinds)
    tried, metric = candidates(report), _METRIC_LABELS.get(report.metric or "agreement", report.metric or "")
    if len(tried) > 1:
        front, uniform = front_points(report), uniform_points(report)
        chosen = next((point for point in tried if point.chosen), None)
        for y, label in (("loss", "loss"), ("points", "points below float")):
            yield f"front-{y}", front_plot(front, tried, uniform, chosen, y=y, label=label, metric=metric)
        for x, label in outcome.costs_of_goal(report, front):
            yield f"front-{x}", cost_plot(front, x=x, label=label, metric=metric)
        for y in ("crossbars", "loss"):
            yield f"progress-{y}", progress_plot(tried, y=y, label=y, metric=metric)
    more = {
        "sensitivity": sensitivity_plot(layers),
        "sensitivity-inputs": sensitivity_plot(layers, of_inputs=True),
        "adc": adc_plot(layers, manifest.chip.adc_bits),
    }
    for name, plot in more.items():
        if plot is not None:
            yield name, plot


def _with_code(text: str) -> Any:
    """Text whose options, and whose parts between backticks, are set as code, so that no line breaks in them."""
    from markupsafe import Markup

    # Every second part is what the group holds.
    parts = _CODE.split(printable(text))
    tagged = (
        Markup("<code>{}</code>").format(part.strip("`")) if index % 2 else part for index, part in enumerate(parts)
    )
    return Markup().join(tagged)


def _items(plots: Mapping[str, Any]) -> dict[str, Any]:
    """What `Bokeh.embed.embed_item` takes, by plot, with numbers in the place of ids that differ from run to run.

    All plots are encoded as one document, which takes a third less time, and then told apart: they share no model.
    """
    from bokeh.document import Document

    document = Document()
    for plot in plots.values():
        document.add_root(plot, setter=None)
    encoded = document.to_json(deferred=False)
    found = {}
    for (name, plot), root in zip(plots.items(), encoded["roots"], strict=True):
        numbers: dict[str, str] = {}
        own = {"version": encoded["version"], "title": "", "roots": [_renumbered(root, name, numbers)]}
        found[name] = {"target_id": f"plot-{name}", "root_id": numbers[plot.id], "doc": own}
    return found


def _renumbered(value: Any, prefix: str, numbers: dict[str, str]) -> Any:
    """The same JSON with every model's `id`, where it is defined and where it is meant, numbered by appearance."""
    if isinstance(value, list | tuple):
        return [_renumbered(part, prefix, numbers) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: numbers.setdefault(part, f"{prefix}-{len(numbers)}")
        if key == "id" and isinstance(part, str)
        else _renumbered(part, prefix, numbers)
        for key, part in value.items()
    }


def _script_json(values: Any) -> Any:
    """JSON that can stand in a script element: no `<` can end it, no `&` be taken for an entity."""
    from markupsafe import Markup

    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Not markup of ours only: every character that means something in HTML is gone.
    return Markup(text)  # noqa: S704


def _bokeh_js() -> Any:
    """Bokeh's script, as its package ships it."""
    from bokeh.resources import Resources
    from markupsafe import Markup

    text = "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)
    return Markup(text)  # noqa: S704 - a constant of the library, which no `</script` is in
