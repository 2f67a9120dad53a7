"""Options of how a search is carried out: who judges, how long, and what is kept for later ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["add_effort"]


def add_effort(group: argparse._ArgumentGroup) -> None:
    """Add `--threads`, `--workers`, `--dask`, `--batch`, `--timeout` and `--no-cache`."""
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads of onnxruntime (default: as many as there are cores)"
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that judge candidates, each with its share of the threads (default: 1)",
    )
    group.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="judge on the workers of the Dask scheduler at this address; needs raqu-onnx[dask] (default: "
        "this machine judges)",
    )
    group.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="candidates that the Bayesian stage asks for at once; with the seed it decides the result, whoever judges "
        "(default: 1); give as many as there are workers to keep all of them busy",
    )
    group.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="seek no more candidates after so many seconds, and write the best so far (default: no limit)",
    )
    group.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        default=None,
        help="neither read nor keep sensitivities and error curves in the user's cache folder",
    )
