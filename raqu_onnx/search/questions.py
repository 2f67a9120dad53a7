"""What a search asks about candidates, and what it is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from raqu_onnx.evaluation import Score

__all__ = ["QUICK", "SCORE", "Answer", "Kind", "Question", "Verdict"]

Kind = Literal["score", "quick"]
"""A verdict on the selection set, or a loss on the sensitivity samples."""


@dataclass(frozen=True)
class Verdict:
    """What a candidate is worth, quantized as it would be emitted.

    Attributes:
        glance: Loss on a quarter of the selection set, which is looked at first; on all of it where it is small.
        score: Score on all of it; None where the glance was enough.
    """

    glance: float
    score: Score | None


Answer = Verdict | float
"""A verdict, or a loss on the sensitivity samples."""


class Question(NamedTuple):
    """What is asked about a candidate.

    Attributes:
        kind: What is asked.
        most: For a verdict: a glance above this is enough.
    """

    kind: Kind
    most: float = math.inf

    def is_answered_by(self, answer: Answer | None) -> bool:
        """Whether it need not be asked again."""
        if isinstance(answer, Verdict):
            return answer.score is not None or answer.glance > self.most
        return answer is not None


#: The loss on the sensitivity samples.
QUICK = Question("quick")
#: The score on the whole selection set.
SCORE = Question("score")
