"""Options that name the data of a run, and say how pictures become inputs."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_data", "picture_settings"]


def add_data(group: argparse._ArgumentGroup) -> None:
    """Add the three sets of data and the options for folders of pictures."""
    group.add_argument("--calibration", metavar="DATA", help="inputs that ranges are measured on (default: synthetic)")
    group.add_argument(
        "--selection",
        metavar="DATA",
        help="data that bits are chosen on (default: half of the above, which calibration then does not see; with "
        "fixed widths nothing is set aside, and figures are of the calibration data)",
    )
    group.add_argument("--eval", metavar="DATA", help="data that the result is reported on (default: none)")
    group.add_argument(
        "--calibration-samples", type=int, metavar="N", help="most samples that ranges are measured on (default: 512)"
    )
    group.add_argument(
        "--picture-size", metavar="HxW", help="resize and crop pictures of folders to this (default: the model's)"
    )
    group.add_argument("--picture-mean", metavar="M[,M,M]", help="subtracted from pictures in 0..1 (default: 0)")
    group.add_argument("--picture-std", metavar="S[,S,S]", help="divides pictures after that (default: 1)")
    group.add_argument("--picture-layout", choices=["nchw", "nhwc"], help="axis order of the input (default: nchw)")


def picture_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the options for pictures say, None where none is given.

    Raises:
        ConfigError: One of them cannot be read.
    """
    pictures = {
        "size": _numbers(args.picture_size, "x", int, "--picture-size"),
        "mean": _numbers(args.picture_mean, ",", float, "--picture-mean"),
        "std": _numbers(args.picture_std, ",", float, "--picture-std"),
        "layout": args.picture_layout,
    }
    given = {key: value for key, value in pictures.items() if value is not None}
    return given or None


def _numbers(text: str | None, separator: str, kind: type, option: str) -> tuple[Any, ...] | None:
    from raqu_onnx.errors import ConfigError

    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(separator))
    except ValueError as error:
        raise ConfigError(f"{option}: {text!r} cannot be read; separate numbers with {separator!r}") from error
