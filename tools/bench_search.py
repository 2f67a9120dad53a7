"""The search against simpler methods at the same budgets and evaluations, on the bundled models.

    python tools/bench_search.py --model resnet20
    python tools/bench_search.py --model mobilenetv2 --budgets 6,7
    python tools/bench_search.py --model resnet20 --rank 30

Every method picks bits for every kernel within a number of crossbars, judged as they would be emitted on the bundled
selection images:

    uniform   one price per cell for the whole model, no node weighed above another
    greedy    widths of nodes, one bit after the other off where it loses least per cell
    integer   the integer program's widths of nodes, or where no widths of nodes fit, the optimal widths of kernels
    random    random factors on the losses of nodes and dropped kernels, brought into the budget
    cold      scikit-optimize over the same factors, from nowhere
    ours      `raqu_onnx.search`

The first three compute one candidate; the others judge as many as `--evaluations` says, `ours` what its starts take
included. KL divergences are in nats; accuracy and the second KL divergence are of Fashion-MNIST's 10,000 test images.
Calibration images are drawn by seed. `--rank N` judges N random candidates within each budget instead, and prints the
rank correlation (Spearman) of the search's objective with the KL divergence on the test images.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import onnx

from raqu_onnx.annotations import INPUT, mapped_nodes
from raqu_onnx.bundled import bundled_arrays, bundled_model
from raqu_onnx.data import open_dataset
from raqu_onnx.hardware import load_chip
from raqu_onnx.model_io import load_model, model_inputs
from raqu_onnx.passes import AnnotateTilingPass, CalibratePass, TidyPass
from raqu_onnx.passes.quantize_weights import build_quantizer
from raqu_onnx.quantizer import QuantizerSettings
from raqu_onnx.search import Goal, Problem, SearchSettings, search
from raqu_onnx.search.allocation import fit_to_budget
from raqu_onnx.search.budget import Budget
from raqu_onnx.search.judge import Judge
from raqu_onnx.search.kernel_stage import KernelStage
from raqu_onnx.search.result import Bits
from raqu_onnx.search.sensitivity import measure_sensitivity
from raqu_onnx.search.stages import LayerStage, widest_activations

if TYPE_CHECKING:
    import onnx_ir as ir

    from raqu_onnx.evaluation import Score
    from raqu_onnx.search.sensitivity import Sensitivity

_BUDGETS = {"resnet20": "18,14,11", "mobilenetv2": "7,6,4"}
_CALIBRATION_IMAGES = 512
# Largest exponents of the factors that random and cold draw, and those on dropping, the last of which drops nothing.
_REACH = 8
_DROPPING = (*range(-_REACH, _REACH + 1), 40)
_MOST_TRIES = 50
_UNSEEN = 9173

Method = Callable[["Case"], Bits | None]


@dataclass(frozen=True)
class Found:
    """What a method picked: scores on the selection and on the test images."""

    selection: Score
    test: Score


class Case:
    """One model, calibrated on the images of one seed."""

    def __init__(self, name: str, seed: int, given: argparse.Namespace) -> None:
        self.seed, self.evaluations = seed, given.evaluations
        pool = bundled_arrays("calibration")["input"]
        chosen = np.random.default_rng(seed).permutation(len(pool))[:_CALIBRATION_IMAGES]
        self.model = _tidied(name)
        inputs = model_inputs(self.model)
        calibration = open_dataset({"input": pool[chosen]}, inputs)
        CalibratePass(calibration, threads=given.threads, moments=True, pairs=True)(self.model)
        self.chip = load_chip("generic")
        self.quantizer = build_quantizer(self.model, self.chip.encoding, QuantizerSettings(threads=given.threads))
        nodes = mapped_nodes(self.model)
        self.settings = SearchSettings(
            evaluations=given.evaluations,
            seed=seed,
            threads=given.threads,
            inputs=frozenset(index for index, node in enumerate(nodes) if INPUT.get(node)),
        )
        self._selection = open_dataset(bundled_arrays("selection"), inputs)
        test = {key: values[: given.images] for key, values in bundled_arrays("test").items()}
        self._test = Judge(self.model, self.quantizer, open_dataset(test, inputs), self.settings)
        self.float = self._test.reference
        self.problem = self.fresh(None)
        self.sensitivity = measure_sensitivity(self.problem)
        self.budget = Budget()

    def fresh(self, crossbars: int | None) -> Problem:
        """The problem with nothing judged yet."""
        return Problem(self.model, self.quantizer, self.chip, self._selection, self.settings, max_crossbars=crossbars)

    def test(self, bits: Bits) -> Score:
        """Score on the test images."""
        return self._test.score(bits)

    def stage(self) -> KernelStage:
        """Allocation of bits to kernels."""
        return KernelStage(self.problem, self.sensitivity)


def _tidied(name: str) -> ir.Model:
    model = TidyPass()(load_model(onnx.load_from_string(bundled_model(name)))).model
    AnnotateTilingPass()(model)
    return model


# --- methods --------------------------------------------------------------------------------------------------------


def uniform(case: Case) -> Bits | None:
    """Every node counts the same: equal losses of nodes, and the allocation for them."""
    shape = case.sensitivity.weights.shape
    flat: Sensitivity = replace(
        case.sensitivity, weights=np.broadcast_to(case.sensitivity.weights.mean(axis=0), shape).copy()
    )
    return KernelStage(case.problem, flat).allocate(_neutral(case), case.budget)


def greedy(case: Case) -> Bits | None:
    """From the widest widths down, where a bit costs least; kernels where no widths of nodes fit."""
    widest = (case.settings.widest[0],) * len(case.problem.nodes)
    weights = fit_to_budget(case.problem, widest, case.sensitivity.weights, case.budget)
    return case.stage().allocate(_neutral(case), case.budget) if weights is None else _with_activations(case, weights)


def integer(case: Case) -> Bits | None:
    """The integer program over nodes, else the optimum over kernels."""
    found = LayerStage(case.problem, case.sensitivity).widths_within(case.budget)
    return case.stage().allocate(_neutral(case), case.budget) if found is None else found


def random(case: Case) -> Bits | None:
    """The best of random factors."""
    return _best(case, _drawn(case, case.evaluations))


def _drawn(case: Case, count: int) -> list[Bits]:
    """Candidates of random factors, all different, fewer where hardly any are."""
    stage, generator = case.stage(), np.random.default_rng([case.seed, _UNSEEN])
    found: dict[Bits, None] = {}
    for _ in range(_MOST_TRIES * count):
        if len(found) == count:
            break
        nodes = generator.integers(-_REACH, _REACH + 1, len(case.problem.nodes) + 1).tolist()
        bits = stage.allocate([*nodes, int(generator.choice(_DROPPING))], case.budget)
        if bits is not None:
            found[bits] = None
    return list(found)


def cold(case: Case) -> Bits | None:
    """The best that scikit-optimize finds from nowhere over the same factors."""
    from skopt import Optimizer

    stage = case.stage()
    optimizer = Optimizer(
        [*[(-_REACH, _REACH)] * (len(case.problem.nodes) + 1), (0, len(_DROPPING) - 1)],
        base_estimator="ET",
        random_state=case.seed,
    )
    judged: dict[Bits, None] = {}
    for _ in range(_MOST_TRIES * case.evaluations):
        if len(judged) == case.evaluations:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vector = [int(value) for value in optimizer.ask()]
            bits = stage.allocate([*vector[:-1], _DROPPING[vector[-1]]], case.budget)
            if bits is not None:
                judged[bits] = None
            optimizer.tell(vector, 10.0 if bits is None else case.problem.score(bits).loss)
    return _best(case, list(judged))


def ours(case: Case) -> Bits | None:
    """The search, whose starts count among its evaluations."""
    crossbars = int(case.budget.crossbars)
    problem = case.fresh(crossbars)
    starts = _starts(problem, case)
    problem = case.fresh(crossbars)
    problem.settings = replace(problem.settings, evaluations=max(0, case.evaluations - starts))
    return search(problem, Goal(crossbars, None)).chosen.bits


def _starts(problem: Problem, case: Case) -> int:
    """Candidates that the search judges before its Bayesian stage, uniform widths that fit not among them."""
    KernelStage(problem, case.sensitivity).start(case.budget)
    return len(problem.evaluations)


METHODS: dict[str, Method] = {
    "uniform": uniform,
    "greedy": greedy,
    "integer": integer,
    "random": random,
    "cold": cold,
    "ours": ours,
}


def _neutral(case: Case) -> list[int]:
    return [0] * (len(case.problem.nodes) + 2)


def _with_activations(case: Case, weights: tuple[int, ...]) -> Bits:
    return Bits(weights, widest_activations(case.problem))


def _best(case: Case, candidates: list[Bits]) -> Bits | None:
    return min(candidates, key=lambda bits: case.problem.score(bits).loss, default=None)


# --- command line ---------------------------------------------------------------------------------------------------


def compare(case: Case, methods: list[str]) -> dict[str, Found]:
    """What every method finds within the case's budget; those that find nothing are absent."""
    found = {}
    for name in methods:
        started = time.perf_counter()
        bits = METHODS[name](case)
        if bits is None:
            print(f"  seed {case.seed} {name:8} nothing fits", flush=True)
            continue
        found[name] = Found(case.problem.score(bits), case.test(bits))
        seconds = time.perf_counter() - started
        print(f"  seed {case.seed} {name:8} {_figures([found[name]], case.float)}  [{seconds:.0f} s]", flush=True)
    return found


def _figures(found: list[Found], reference: Score) -> str:
    drops = [100 * (reference.quality - item.test.quality) for item in found]
    test = mean(item.test.kl or math.nan for item in found)
    selection = [item.selection.kl or math.nan for item in found]
    spread = f" ({max(drops) - min(drops):.2f} apart)" if len(found) > 1 else ""
    return f"KL {mean(selection):.5f}, test KL {test:.5f}, {mean(drops):6.3f} points below float{spread}"


def correlation(case: Case, count: int) -> float:
    """Spearman's correlation of objective and test KL over random candidates within the budget."""
    from scipy.stats import spearmanr

    pairs = [(case.problem.score(bits).loss, case.test(bits).kl or math.nan) for bits in _drawn(case, count)]
    return float(spearmanr(np.array(pairs)).statistic)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(_BUDGETS), default="resnet20")
    parser.add_argument("--budgets", help="crossbars, separated by commas (default: those of the comparison)")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=24, help="candidates judged (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10000, help="test images (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of onnxruntime (default: all)")
    parser.add_argument("--rank", type=int, help="candidates whose rank correlation is printed instead")
    given = parser.parse_args()
    methods = given.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    budgets = [int(text) for text in (given.budgets or _BUDGETS[given.model]).split(",")]
    collected: dict[tuple[int, str], list[Found]] = {}
    reference: Score | None = None
    for seed in range(given.seeds):
        case = Case(given.model, seed, given)
        reference = case.float
        for crossbars in budgets:
            case.budget = Budget(crossbars)
            print(f"{given.model}, {crossbars} crossbars, float {case.float.quality:.2%}", flush=True)
            if given.rank:
                print(f"  seed {seed}: rank correlation {correlation(case, given.rank):.3f}", flush=True)
                continue
            for name, found in compare(case, methods).items():
                collected.setdefault((crossbars, name), []).append(found)
    for (crossbars, name), results in sorted(collected.items()):
        if reference is not None:
            print(f"{crossbars:3} crossbars {name:8} {_figures(results, reference)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
