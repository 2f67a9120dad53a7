"""Times and energies as users write them."""

from __future__ import annotations

import math
import re

__all__ = ["parse_energy", "parse_latency"]

_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
_NANOSECONDS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}
_PICOJOULES = {"pj": 1.0, "nj": 1e3, "uj": 1e6, "mj": 1e9}
_CYCLES = ("cycle", "cycles")


def parse_latency(value: object) -> tuple[float | None, int | None]:
    """Read ``"2500ns"``, ``"2.5us"``, ``"1ms"`` or ``"40000cycles"``, or a number, which is in ns.

    Returns:
        Nanoseconds and cycles, one of which is None.

    Raises:
        ValueError: It is none of these, or not above 0.
    """
    number, unit = _split(value, "latency", "ns", "2500ns, 2.5us, 1ms or 40000cycles")
    if unit in _CYCLES:
        if number != int(number):
            raise ValueError(f"{value!r} is no number of cycles: give a whole one, such as 40000cycles")
        return None, int(number)
    if unit not in _NANOSECONDS:
        raise ValueError(f"{value!r} is no latency: units are ns, us, ms, s and cycles")
    return number * _NANOSECONDS[unit], None


def parse_energy(value: object) -> float:
    """Read ``"300pJ"``, ``"12nJ"``, ``"0.5uJ"`` or ``"1mJ"`` as pJ, or a number, which is in pJ.

    Raises:
        ValueError: It is none of these, or not above 0.
    """
    number, unit = _split(value, "energy", "pj", "300pJ, 12nJ, 0.5uJ or 1mJ")
    if unit not in _PICOJOULES:
        raise ValueError(f"{value!r} is no energy: units are pJ, nJ, uJ and mJ")
    return number * _PICOJOULES[unit]


def _split(value: object, what: str, unit_of_numbers: str, examples: str) -> tuple[float, str]:
    """A number above 0 and its unit in small letters."""
    found = _TEXT.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not (found or isinstance(value, int | float)):
        raise ValueError(f"{value!r} is no {what}: give one such as {examples}")
    number, unit = (float(found[1]), found[2].lower()) if found else (float(value), unit_of_numbers)  # type: ignore[arg-type]
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r} is no {what}: give one above 0, such as {examples}")
    if not unit:
        raise ValueError(f"{value!r} is no {what}, since it has no unit: give one such as {examples}")
    return number, unit
