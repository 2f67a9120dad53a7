"""Whole crossbars as the cost: budgets kept, nothing left that would be free, and thresholds of rows found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest

from raqu_onnx.channel_flow import ChannelFlow, Reader
from raqu_onnx.dropping import DropRules
from raqu_onnx.encodings import Encoding
from raqu_onnx.exclusive_allocation import ExclusiveAllocator
from raqu_onnx.kernel_allocation import KernelAllocator, KernelBits, Taste
from raqu_onnx.kernel_losses import NodeLosses, grouped
from raqu_onnx.layout import MappedNode, WeightLayout
from raqu_onnx.tiling import ArrayGeometry, Matrix, tile

ENCODING = Encoding("offset", 2)
GEOMETRY = ArrayGeometry(20, 8, ENCODING)
WIDTHS = (2, 4, 6, 8)
NO_DROP = Taste(dropping=math.inf)


class Case:
    """Two convolutions, the second of which reads the first: 6 kernels of 18 rows, 4 of 54."""

    def __init__(self, seed: int) -> None:
        self.nodes = [
            MappedNode(name, "Conv", f"{name}.x", f"{name}.w", None, f"{name}.y", WeightLayout("conv", shape))
            for name, shape in (("one", (6, 2, 3, 3)), ("two", (4, 6, 3, 3)))
        ]
        reader = Reader("two", np.repeat(np.arange(6), 9)[None], keeps_zero=True)
        flows = {
            "one": ChannelFlow("one", (reader,), (), reaches_output=False),
            "two": ChannelFlow("two", (), ("an output",), reaches_output=True),
        }
        self.rules = DropRules(self.nodes, flows)
        rng = np.random.default_rng(seed)
        self.losses = {}
        for name, channels in (("one", 6), ("two", 4)):
            table = np.full((channels, 9), np.inf)
            scale = rng.lognormal(0, 2, channels)
            table[:, WIDTHS] = scale[:, None] * 4.0 ** -np.array(WIDTHS)
            if name == "one":
                table[:, 0] = 0.01 * scale
            self.losses[name] = NodeLosses(name, table, {})
        self.allocator = KernelAllocator(self.nodes, self.losses, self.rules, ENCODING)
        self.exclusive = ExclusiveAllocator(self.allocator, self.rules, GEOMETRY, self.counts)

    def counts(self, bits: KernelBits) -> Mapping[str, int]:
        pruned = self.rules.apply(bits)
        matrices = {n.name: Matrix.of(n.layout, pruned.bits[n.name], pruned.row_counts(n)) for n in self.nodes}
        return {name: len(tile(matrix, GEOMETRY)) for name, matrix in matrices.items()}

    def total(self, bits: KernelBits) -> int:
        return sum(self.counts(bits).values())


def columns(bits: Iterable[int]) -> int:
    return sum(ENCODING.columns(b) for b in bits)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [4, 5, 6, 8, 9, 12])
def test_budgets_are_kept_and_what_is_free_is_taken(seed: int, budget: int) -> None:
    case = Case(seed)
    bits = case.exclusive.within(budget, NO_DROP)
    # 6 kernels of 1 column fit one crossbar; 4 of 54 rows take three row blocks.
    assert bits is not None
    counts = case.counts(bits)
    assert sum(counts.values()) <= budget
    for name, found in bits.items():
        table = case.allocator.table(name, NO_DROP)
        choices = [
            (sum(table[k, b] for k, b in enumerate(choice)), choice)
            for choice in itertools.product(WIDTHS, repeat=len(found))
        ]
        reached = sum(table[k, b] for k, b in enumerate(found.tolist()))
        allowed = [item for item in choices if case.counts({**bits, name: np.array(item[1])})[name] <= counts[name]]
        # Kernels are whole, so that each block may end up to three columns early.
        blocks = -(-columns(found.tolist()) // GEOMETRY.cols)
        sure = [item for item in choices if columns(item[1]) <= blocks * (GEOMETRY.cols - 3)]
        assert min(allowed)[0] - 1e-9 <= reached <= min(sure, default=(math.inf, ()))[0] + 1e-9


def test_no_widths_fit_less_than_one_block_each() -> None:
    assert Case(0).exclusive.within(3, NO_DROP) is None


@pytest.mark.parametrize("seed", range(4))
def test_kernels_are_dropped_where_that_saves_blocks_of_rows(seed: int) -> None:
    case = Case(seed)
    bits = case.exclusive.within(3, Taste())
    assert bits is not None
    assert case.total(bits) <= 3
    # 54 rows in blocks of 20: two kernels less leave 36 and two blocks, one less still three. The cheapest go first.
    dropped = np.flatnonzero(bits["one"] == 0)
    order = np.argsort(case.losses["one"].loss[:, 0])
    assert len(dropped) >= 2
    assert set(dropped) == set(order[: len(dropped)].tolist())
    plain = {"one": np.full(6, 2), "two": np.full(4, 4)}
    plain["one"][order[:2]] = 0
    assert case.total(plain) <= 3
    assert case.allocator.loss(bits, Taste()) <= case.allocator.loss(plain, Taste())


@pytest.mark.parametrize("size", [2, 4, 5])
def test_kernels_of_a_group_are_dropped_and_fitted_together(size: int) -> None:
    for seed in range(8):
        case = Case(seed)
        groups = {name: grouped(losses, size) for name, losses in case.losses.items()}
        allocator = KernelAllocator(case.nodes, case.losses, case.rules, ENCODING, groups)
        exclusive = ExclusiveAllocator(allocator, case.rules, GEOMETRY, case.counts)
        for budget in range(4, 16):
            bits = exclusive.within(budget, Taste())
            assert bits is not None, (seed, budget)
            assert case.total(bits) <= budget
            for name, found in bits.items():
                assert all(len(set(found[groups[name] == group])) == 1 for group in groups[name]), (seed, budget)
