"""The goal of a run: what is asked for, on a chip that may be unable to tell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from raqu_onnx.cost import cycle_ns, missing_energy
from raqu_onnx.errors import ConfigError
from raqu_onnx.quantities import parse_energy, parse_latency
from raqu_onnx.search.result import Goal

if TYPE_CHECKING:
    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.hardware import Chip

__all__ = ["DEFAULT_ACCURACY_DROP", "goal_of", "goal_on", "require_search"]

#: Points of accuracy that may be lost when neither a limit nor a drop is given.
DEFAULT_ACCURACY_DROP = 0.5


def goal_of(config: OptimizeConfig) -> Goal:
    """What the settings ask for, whatever the chip.

    Without any limit or drop, `DEFAULT_ACCURACY_DROP`; nothing at fixed widths. An objective goes with a drop.
    """
    nanoseconds, cycles = (None, None) if config.max_latency is None else parse_latency(config.max_latency)
    goal = Goal(
        max_crossbars=config.max_crossbars,
        max_accuracy_drop=config.max_accuracy_drop,
        max_latency_ns=nanoseconds,
        max_latency_cycles=cycles,
        max_energy_pj=None if config.max_energy is None else parse_energy(config.max_energy),
        max_average_bits=config.max_average_bits,
        objective=config.objective,
        fit_chip=config.fit_chip is True,
    )
    if goal.max_accuracy_drop is not None or (goal.has_limits and goal.objective is None):
        return goal
    if config.search_settings.is_uniform:
        return goal
    return replace(goal, max_accuracy_drop=DEFAULT_ACCURACY_DROP)


def goal_on(config: OptimizeConfig, chip: Chip) -> Goal:
    """What the settings ask for on a chip; where it has counts and nothing else is asked for, its whole room.

    Raises:
        ConfigError: The chip gives no figures for what is asked for, or another setting stands against it.
    """
    goal = goal_of(config)
    has_counts = all(kind.count is not None for kind in chip.crossbars)
    if goal.fit_chip and not has_counts:
        raise ConfigError(
            f"--fit-chip: chip {chip.name} has as many crossbars as are asked for; give a number with --max-crossbars, "
            "or a chip with counts"
        )
    asked = config.max_accuracy_drop is not None or config.objective is not None or goal.has_limits
    if config.fit_chip is None and has_counts and config.partitions is None and not asked and goal:
        return Goal(max_accuracy_drop=None, fit_chip=True)
    _require_figures(goal, config, chip)
    return goal


def require_search(config: OptimizeConfig) -> None:
    """Make sure that there is a search for what says how it is carried out.

    Raises:
        ConfigError: The widths are fixed, and nothing is left to be sought.
    """
    given = {
        "--workers": config.workers > 1, "--dask": config.dask is not None, "--timeout": config.timeout is not None
    }  # fmt: skip
    if config.search_settings.is_uniform:
        for option in (name for name, is_given in given.items() if is_given):
            raise ConfigError(
                f"{option}: the widths are fixed, so that there is no search for it to act on; leave it out, or give a "
                "range such as `--weight-bits 2-8`"
            )


def _require_figures(goal: Goal, config: OptimizeConfig, chip: Chip) -> None:
    """Make sure that latency and energy can be told where they are limited or made small."""
    of_time = goal.max_latency_ns is not None or goal.max_latency_cycles is not None
    latency = "--max-latency" if of_time else "--objective latency" if goal.objective == "latency" else None
    energy = "--max-energy" if goal.max_energy_pj is not None else None
    energy = energy or (f"--objective {goal.objective}" if goal.objective in ("energy", "edp") else None)
    if goal.max_latency_ns is not None and cycle_ns(chip) is None:
        raise ConfigError(
            f"--max-latency {config.max_latency}: chip {chip.name} does not give cycle_ns, the length of a cycle; give "
            "it in a chip file, or the latency in cycles, such as 40000cycles"
        )
    if energy is not None and (missing := missing_energy(chip)):
        raise ConfigError(f"{energy}: chip {chip.name} does not give {', '.join(missing)}; give them in a chip file")
    option = latency or energy
    if option is None:
        return
    if config.activation_bits is None:
        raise ConfigError(f"{option}: with `--activation-bits float` nothing runs on crossbars; give a width")
    others = {
        "--replicate": config.replicate is not None,
        "--partitions": config.partitions is not None,
        "--placement exact": config.placement == "exact",
    }
    for other, given in others.items():
        if given:
            raise ConfigError(
                f"{option}: candidates are judged by one copy of each node in a fast placement, which {other} changes; "
                "leave one of them out"
            )
