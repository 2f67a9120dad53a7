"""What candidates cost and what they may cost, in users' terms: crossbars, latency, energy, average bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["OBJECTIVES", "Budget", "Cost", "Objective"]

Objective = Literal["crossbars", "latency", "energy", "edp"]
"""What is made small: crossbars, latency or energy of one inference, or the product of both."""

#: The objectives, as the command line names them.
OBJECTIVES: tuple[Objective, ...] = ("crossbars", "latency", "energy", "edp")

# Relative slack of comparisons between sums of floats that were added up in different orders.
_SLACK = 1e-9


@dataclass(frozen=True)
class Cost:
    """What a candidate costs, from the cost model that the manifest reports.

    Attributes:
        crossbars: Crossbars allocated.
        average_bits: Mean bits per weight; weights that are not stored count with 0 bits.
        latency_cycles: Cycles of one inference alone, None where MVMs or input bits are unknown.
        latency_ns: The same in ns, None where the chip gives no cycle time either.
        energy_pj: Energy of one inference, None where the chip lacks figures.
    """

    crossbars: int
    average_bits: float = 0.0
    latency_cycles: int | None = None
    latency_ns: float | None = None
    energy_pj: float | None = None

    @property
    def edp(self) -> float | None:
        """Energy times latency in pJ * ns, None where either is unknown."""
        return None if self.energy_pj is None or self.latency_ns is None else self.energy_pj * self.latency_ns

    def of(self, objective: Objective) -> float:
        """The value of an objective; infinite where it is unknown."""
        known = {
            "crossbars": self.crossbars,
            "latency": self.latency_cycles,
            "energy": self.energy_pj,
            "edp": self.edp,
        }[objective]
        return math.inf if known is None else float(known)


@dataclass(frozen=True)
class Budget:
    """Limits on what a candidate may cost; one that is infinite limits nothing.

    Attributes:
        crossbars: Most crossbars.
        average_bits: Most bits per weight on average.
        latency: Most cycles of one inference.
        energy: Most pJ of one inference.
        edp: Largest product of energy and latency in pJ * ns.
    """

    crossbars: float = math.inf
    average_bits: float = math.inf
    latency: float = math.inf
    energy: float = math.inf
    edp: float = math.inf

    @property
    def limits_latency(self) -> bool:
        """Whether the cycles of one inference are limited."""
        return min(self.latency, self.edp) < math.inf

    @property
    def limits_energy(self) -> bool:
        """Whether the energy of one inference is limited."""
        return min(self.energy, self.edp) < math.inf

    @property
    def limits_runs(self) -> bool:
        """Whether it limits what depends on placement and on activation bits."""
        return self.limits_latency or self.limits_energy

    @property
    def limits_crossbars_only(self) -> bool:
        """Whether nothing but crossbars is limited."""
        return not self.limits_runs and self.average_bits == math.inf

    @property
    def static(self) -> Budget:
        """What it says of weights alone: crossbars and average bits."""
        return Budget(self.crossbars, self.average_bits)

    def within(self, objective: Objective, most: float) -> Budget:
        """The same with an objective kept within a value."""
        return replace(self, **{objective: min(most, getattr(self, objective))})

    def allows(self, cost: Cost) -> bool:
        """Whether a candidate is within all limits."""
        pairs: tuple[tuple[float, float], ...] = (
            (cost.average_bits, self.average_bits),
            *((cost.of(kind), getattr(self, kind)) for kind in OBJECTIVES),
        )
        return all(value <= most * (1 + _SLACK) for value, most in pairs if most < math.inf)
