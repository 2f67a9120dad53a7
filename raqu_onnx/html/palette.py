"""Colours that read on a light and on a dark page."""

from __future__ import annotations

from colorsys import hls_to_rgb
from typing import Final

__all__ = ["ACCENT", "BITS", "MUTED", "OTHERS", "TEXT", "UNUSED", "layer_colours"]

#: By bits, 0 to 8: grey for none, then matplotlib's viridis, which stays ordered in grey and for colour-blind eyes.
BITS: Final = (
    "#9aa3ad", "#9aa3ad", "#482878", "#3e4a89", "#31688e", "#26828e", "#35b779", "#6ece58", "#d8d219",
)  # fmt: skip
#: Cells that hold no weight.
UNUSED: Final = "#8a93a033"
#: What was chosen, what stands beside it, and what is only context (Okabe and Ito's set).
ACCENT: Final = "#d55e00"
OTHERS: Final = ("#0072b2", "#009e73", "#cc79a7", "#e69f00")
MUTED: Final = "#8a93a0"
#: Text of legends, which do not take the page's colours.
TEXT: Final = "#7b8592"


def layer_colours(count: int) -> list[str]:
    """Hues in the order of the network, light and dark in turn so that neighbours differ."""
    found = []
    for index in range(count):
        hue = 0.80 * index / max(1, count - 1)
        shade = hls_to_rgb(hue, (0.44, 0.60, 0.72)[index % 3], (0.62, 0.60, 0.62)[index % 3])
        found.append("#" + "".join(f"{round(255 * part):02x}" for part in shade))
    return found
