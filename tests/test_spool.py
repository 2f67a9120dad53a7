"""Arrays that are written once and read many times."""

from __future__ import annotations

import numpy as np
import pytest

from raqu_onnx.spool import Spool


def arrays(number: int) -> list[np.ndarray]:
    return [np.full((2, number), number, np.float32), np.arange(number)]


@pytest.mark.parametrize("room", [0, 60, 1 << 20])
def test_what_is_added_while_another_reads_comes_at_the_end(room: int) -> None:
    spool = Spool(room)
    for number in range(4):
        spool.append(arrays(number))
    reader = iter(spool)
    read = [next(reader), next(reader)]
    spool.append(arrays(4))
    read += reader
    assert len(spool) == len(read) == 5
    for number, (found, again) in enumerate(zip(read, spool, strict=True)):
        for one, other, expected in zip(found, again, arrays(number), strict=True):
            np.testing.assert_array_equal(one, expected)
            np.testing.assert_array_equal(other, expected)
