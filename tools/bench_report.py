"""How large the page of a large network is, how long it takes to draw, and how long a browser takes to open it.

    python tools/bench_report.py FOLDER                            # VGG16 for ImageNet, widths drawn for every kernel
    python tools/bench_report.py FOLDER --network resnet50 --bits 8

Into FOLDER go `manifest.json`, `report.json` and `report.html`. Shapes, placement and with it the floor plan are the
network's; widths, scales and sensitivities are drawn with a seed, as there is no training and no search. Where
Chromium is installed, the time until every plot is drawn is printed, and what the page wrote to the console.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from bench_mapping import chip_of, manifest_bytes, matrices_of, read_nodes
from reference_models import REFERENCE_MODELS

from raqu_onnx.html import write_html
from raqu_onnx.placement import place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from raqu_onnx.layout import MappedNode

_TIMES = 3
_WATCH = """<script>addEventListener("load", () => {
  const last = Object.keys(JSON.parse(document.getElementById("plots").textContent)).at(-1);
  const look = () => document.body.dataset.drawn === last
    ? requestAnimationFrame(() => console.info(`opened after ${Math.round(performance.now())} ms`))
    : setTimeout(look, 5);
  look();
});</script></body>"""


def main() -> None:
    """Write the files and print what they weigh."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as models:
        nodes = read_nodes(options.network, Path(models))
    placement = place(matrices_of(nodes, options.bits, options.seed), chip_of("128", options.sharing))
    manifest_bytes(nodes, placement, options.seed, options.folder)
    write_report(options.folder / "report.json", nodes, options.seed)
    started = time.perf_counter()
    page = options.folder / "report.html"
    write_html(options.folder, page)
    seconds = time.perf_counter() - started
    print(
        f"{options.network}: {placement.crossbars} crossbars, {len(nodes)} layers; "
        f"{page.name} {page.stat().st_size / 1e6:.2f} MB, drawn in {seconds:.1f} s"
    )
    if chromium := shutil.which("chromium") or shutil.which("google-chrome"):
        # The first time, the browser itself comes from the disk; other programs make any of them longer.
        for line in (line for _ in range(_TIMES) for line in open_in(chromium, page)):
            print(f"    {line}")


def write_report(path: Path, nodes: Sequence[MappedNode], seed: int) -> None:
    """What a run without data would report, with sensitivities that are drawn."""
    rng = np.random.default_rng(seed)
    falling = {node.name: np.sort(rng.lognormal(-7, 2, 7))[::-1] for node in nodes}
    values = {
        "schema_version": 1, "goal": None, "goal_met": None, "metric": None, "figures": [], "levels": {}, "data": {},
        "lower_bound": None, "gap": None, "nodes": [], "bits": {}, "dropped": {}, "replicas": {}, "partitions": [],
        "cycles": {}, "front": [], "kept": [], "unmapped": [], "checks_passed": None,
        "warnings": ["Widths and sensitivities are drawn: this page shows how large networks look."],
        "lossless_adc_bits": {node.name: int(rng.integers(6, 12)) for node in nodes},
        "sensitivity": {
            name: {"weights": dict(zip(range(2, 9), map(float, losses), strict=True)), "activations": None}
            for name, losses in falling.items()
        },
    }  # fmt: skip
    path.write_text(json.dumps(values), encoding="utf-8")


def open_in(chromium: str, page: Path) -> list[str]:
    """What the console says while the page opens, the time until the last plot among it."""
    # The browser's helpers may write a last word after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        watched = Path(folder) / "watched.html"
        text = page.read_text(encoding="utf-8")
        watched.write_text(_WATCH.join(text.rsplit("</body>", 1)), encoding="utf-8")
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--no-first-run",
            "--window-size=1280,900", f"--user-data-dir={folder}/profile", watched.as_uri(),
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
            ended = threading.Timer(60, browser.kill)
            ended.start()
            said = list(_console(browser.stderr or ()))
            ended.cancel()
            browser.terminate()
    return said


def _console(lines: Iterable[str]) -> Iterator[str]:
    """Lines of the console up to the one that says that the page is open."""
    for line in lines:
        found = re.search(r'CONSOLE.*?\] "(.*)", source', line)
        if found and "setting log level" not in found[1]:
            yield found[1]
            if found[1].startswith("opened after"):
                return


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="size of the page of a large network, and how long it takes to open")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=(*REFERENCE_MODELS, "bundled:resnet20"), default="vgg16-imagenet")
    parser.add_argument("--bits", default="mixed", choices=("mixed", *map(str, range(2, 9))))
    parser.add_argument("--sharing", default="time", choices=("exclusive", "diagonal", "time"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
