"""What a validation found, check by check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raqu_onnx.json_values import finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from raqu_onnx.evaluation import Score
    from raqu_onnx.search import ProgressCallback

__all__ = ["Check", "Checklist", "ValidationReport"]

# A damaged file may break a rule for each of thousands of placements; the first ones say what is wrong.
_MOST_FINDINGS = 20


@dataclass(frozen=True)
class Check:
    """One rule, or one violation of it.

    Attributes:
        name: The rule, such as `placement.overlap`.
        passed: True; False for a violation; None where the rule could not be tried, with the reason in `detail`.
        detail: What was looked at, or what is wrong and where.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class ValidationReport:
    """All checks of an output folder.

    Attributes:
        checks: In the order they ran; a rule that is broken in several places appears once for each.
        scores: By onnxruntime optimization level, where data was given.
        synthetic: The model ran on generated inputs only.
        warnings: What a user must know of a folder with which nothing is wrong.
    """

    checks: tuple[Check, ...]
    scores: Mapping[str, Score] = field(default_factory=dict)
    synthetic: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No rule is broken."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The broken rules."""
        return tuple(check for check in self.checks if check.passed is False)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; null stands for what JSON does not know, such as an infinite SQNR."""
        from dataclasses import asdict

        content = {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "scores": {level: asdict(score) for level, score in self.scores.items()},
            "synthetic": self.synthetic,
            "warnings": list(self.warnings),
        }
        found: dict[str, Any] = finite(content)
        return found


class Checklist:
    """Collects checks.

    Args:
        progress: Told of every rule before it is tried.
    """

    def __init__(self, progress: ProgressCallback | None = None) -> None:
        self.checks: list[Check] = []
        self._progress = progress

    def tell(self, what: str, done: int = 0, total: int = 1) -> None:
        """Say what is being done; rules tell their names themselves."""
        if self._progress is not None:
            self._progress(what, done, total)

    def run(self, name: str, findings: Iterable[str], detail: str = "") -> bool:
        """Record one check.

        Args:
            name: The rule.
            findings: Every violation; none means that the rule holds.
            detail: What was looked at.

        Returns:
            Whether the rule holds.
        """
        self.tell(f"checking {name}")
        found = list(findings)
        self.checks.extend(Check(name, False, text) for text in found[:_MOST_FINDINGS])
        if len(found) > _MOST_FINDINGS:
            self.checks.append(Check(name, False, f"and {len(found) - _MOST_FINDINGS} more"))
        if not found:
            self.checks.append(Check(name, True, detail))
        return not found

    def skip(self, name: str, reason: str) -> None:
        """Record a check that could not be tried."""
        self.checks.append(Check(name, None, reason))
