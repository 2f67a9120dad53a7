from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.hardware import Sharing
from raqu_onnx.packing import DiagonalPacker, GuillotinePacker, Packer, new_packer

ROWS, COLS = 12, 10
SHARINGS: tuple[Sharing, ...] = ("exclusive", "diagonal", "time")

#: Height, width and owner of one block after another.
jobs = st.lists(st.tuples(st.integers(1, ROWS), st.integers(1, COLS), st.integers(0, 2)), max_size=25)
limits = st.one_of(st.none(), st.integers(0, 6))


def occupied(row: int, col: int, height: int, width: int) -> np.ndarray:
    assert 0 <= row <= row + height <= ROWS
    assert 0 <= col <= col + width <= COLS
    cells = np.zeros((ROWS, COLS), int)
    cells[row : row + height, col : col + width] = 1
    return cells


def filled(packer: Packer, blocks: list[tuple[int, int, int]]) -> list[tuple[int, int, np.ndarray]]:
    """Crossbar, owner and cells of every block that found a place."""
    placed = []
    for height, width, owner in blocks:
        spot = packer.place(height, width, owner)
        if spot is None:
            assert packer.limit is not None
            assert packer.opened == packer.limit
            continue
        placed.append((spot[0], owner, occupied(*spot[1:], height, width)))
    return placed


@given(blocks=jobs, sharing=st.sampled_from(SHARINGS), limit=limits)
def test_blocks_share_a_crossbar_only_as_the_mode_allows(
    blocks: list[tuple[int, int, int]], sharing: Sharing, limit: int | None
) -> None:
    packer = new_packer(sharing, ROWS, COLS, limit)
    placed = filled(packer, blocks)
    assert {crossbar for crossbar, _, _ in placed} == set(range(packer.opened))
    assert limit is None or packer.opened <= limit
    for crossbar in range(packer.opened):
        owners = {owner for index, owner, _ in placed if index == crossbar}
        cells = [c for index, _, c in placed if index == crossbar]
        assert sum(cells).max() == 1
        if sharing != "time":
            assert sum(c.any(axis=1).astype(int) for c in cells).max() == 1
            assert sum(c.any(axis=0).astype(int) for c in cells).max() == 1
        if sharing == "exclusive":
            assert len(owners) == 1


@given(blocks=jobs, sharing=st.sampled_from(SHARINGS))
def test_a_block_opens_a_crossbar_only_where_none_has_room(
    blocks: list[tuple[int, int, int]], sharing: Sharing
) -> None:
    packer = new_packer(sharing, ROWS, COLS)
    for height, width, owner in blocks:
        before = packer.opened
        packer.begin()
        packer.limit = before
        room = packer.place(height, width, owner)
        packer.limit = None
        packer.rollback()
        spot = packer.place(height, width, owner)
        assert (packer.opened == before) == (room is not None)
        assert room is None or spot == room


@given(blocks=jobs, more=jobs, sharing=st.sampled_from(SHARINGS), limit=limits)
@settings(max_examples=50)
def test_what_is_tried_can_be_taken_back(
    blocks: list[tuple[int, int, int]], more: list[tuple[int, int, int]], sharing: Sharing, limit: int | None
) -> None:
    packer, untouched = (new_packer(sharing, ROWS, COLS, limit) for _ in range(2))
    filled(packer, blocks)
    filled(untouched, blocks)
    for part in (more, more[::-1], blocks):
        packer.begin()
        for block in part:
            packer.place(*block)
        packer.rollback()
        assert packer.opened == untouched.opened
    # What is placed after a rollback can be taken back too, up to the same point.
    for block in more:
        packer.place(*block)
    packer.rollback()
    assert [packer.place(*block) for block in more] == [untouched.place(*block) for block in more]
    # What was placed before the next trial stays.
    packer.begin()
    packer.rollback()
    assert [packer.place(*block) for block in blocks] == [untouched.place(*block) for block in blocks]


def test_many_free_places_outgrow_the_first_table() -> None:
    packer = GuillotinePacker(ROWS, COLS)
    spots = [packer.place(ROWS - 1, COLS - 1, 0) for _ in range(200)]
    assert spots == [(crossbar, 0, 0) for crossbar in range(200)]
    # Each left a row and a column, which single cells fill to the last one.
    cells = {packer.place(1, 1, 0) for _ in range(200 * (ROWS + COLS - 1))}
    assert len(cells) == 200 * (ROWS + COLS - 1)
    assert packer.opened == 200
    assert packer.place(1, 1, 0) == (200, 0, 0)


def test_quarters_fill_one_crossbar_in_time() -> None:
    packer = GuillotinePacker(ROWS, COLS)
    spots = [packer.place(ROWS // 2, COLS // 2, owner) for owner in range(4)]
    assert sorted(spots) == [(0, 0, 0), (0, 0, 5), (0, 6, 0), (0, 6, 5)]
    assert packer.place(1, 1, 9) == (1, 0, 0)


@pytest.mark.parametrize(("first", "second"), [((4, 8), (8, COLS)), ((10, 3), (ROWS, 7))])
def test_the_larger_leftover_stays_whole(first: tuple[int, int], second: tuple[int, int]) -> None:
    packer = GuillotinePacker(ROWS, COLS)
    packer.place(*first, 0)
    packer.place(*second, 0)
    assert packer.opened == 1


def test_two_corners_fill_one_crossbar_on_the_diagonal() -> None:
    packer = DiagonalPacker(ROWS, COLS)
    assert [packer.place(4, 5, owner) for owner in range(3)] == [(0, 0, 0), (0, 4, 5), (1, 0, 0)]


def test_an_exclusive_crossbar_takes_more_of_its_own_node() -> None:
    packer = new_packer("exclusive", ROWS, COLS)
    assert packer.place(4, 4, 0) == (0, 0, 0)
    assert packer.place(4, 4, 1) == (1, 0, 0)
    assert packer.place(4, 4, 1) == (1, 4, 4)
    assert packer.place(4, 4, 0) == (0, 4, 4)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_no_crossbar_at_all(sharing: Sharing) -> None:
    packer = new_packer(sharing, ROWS, COLS, 0)
    assert packer.place(1, 1, 0) is None
    assert packer.opened == 0
