"""The Pareto front of a search in typed form, as `report.json` and the manifest hold it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FrontReport", "GoalReport", "ScoreReport", "SearchEntry"]

Widths = Annotated[str, Field(pattern=r"^[02-8]+$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScoreReport(_Part):
    """How good a model is on a dataset."""

    samples: int = Field(description="samples scored")
    top1: float | None = Field(description="share of samples whose largest output is the label, null without labels")
    agreement: float | None = Field(description="share of samples whose largest output is the float model's")
    kl: float | None = Field(
        description="mean KL divergence from the float model's class probabilities to this model's, in nats, from 0; "
        "null where it is infinite or there are no class scores"
    )
    sqnr_db: float | None = Field(
        description="power of the float model's outputs over power of the difference, in dB; null where it is infinite"
    )
    measured: str | None = Field(description="the metric that was named, null for none")
    value: float | None = Field(description="its value, the higher the better; of KL its negative")


class GoalReport(_Part):
    """What was asked for."""

    max_crossbars: int | None = Field(description="most crossbars that may be used")
    max_accuracy_drop: float | None = Field(
        description="most points (hundredths) below float: of top-1 accuracy; without labels of agreement with float; "
        "without class scores of noise power over signal power"
    )
    max_latency_ns: float | None = Field(description="most ns of one inference alone")
    max_latency_cycles: int | None = Field(description="most cycles of one inference alone")
    max_energy_pj: float | None = Field(description="most energy of one inference")
    max_average_bits: float | None = Field(description="most bits per weight on average")
    objective: Literal["crossbars", "latency", "energy", "edp"] | None = Field(
        description="what is minimized within the limits; null: the loss where there are any, else crossbars"
    )
    fit_chip: bool = Field(description="the loss is minimized on the whole chip")


class FrontReport(_Part):
    """A candidate that no other beats in loss, crossbars and what else the goal speaks of."""

    k: int = Field(description="its number, which `raqu-onnx optimize --choose` takes", ge=1)
    crossbars: int = Field(description="crossbars that it takes")
    average_bits: float | None = Field(description="mean bits per weight, weights that are not stored with 0")
    latency_cycles: int | None = Field(description="cycles of one inference alone, null where unknown")
    latency_ns: float | None = Field(description="the same in ns, null where the chip gives no cycle time")
    energy_pj: float | None = Field(description="energy of one inference, null where the chip lacks figures")
    loss: float | None = Field(
        description="what the search minimizes: KL or noise over signal, plus a tenth of what another metric lacks"
    )
    score: ScoreReport = Field(description="on the selection data")
    weights: list[float] = Field(description="mean weight bits per kernel, in the order of `nodes`")
    widths: list[Widths] = Field(
        description="weight bits by node, in the same order: one digit for all its kernels, or one for each"
    )
    activations: list[int] | None = Field(description="activation bits, in the same order")
    origin: str = Field(description="what proposed it")


class SearchEntry(_Part):
    """What the search found beside what the manifest describes."""

    goal: GoalReport | None = Field(description="what was asked for, null where widths were fixed and nothing was")
    chosen: int = Field(description="`k` of the point that the manifest describes", ge=1)
    front: list[FrontReport] = Field(description="by rising crossbars; widths and bits in the order of the nodes")
