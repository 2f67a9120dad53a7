"""Datasets from a Python function and from onnxruntime's calibration data readers."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader

from raqu_onnx import data_python
from raqu_onnx.data import InputSpec, open_dataset, split, take
from raqu_onnx.errors import DataError

X = (InputSpec("x", np.dtype(np.float32), ("n", 2)),)

FEEDS = """
import numpy as np

def feeds():
    for start in range(0, 10, 4):
        rows = np.arange(start, min(start + 4, 10), dtype=np.float32)
        yield {"x": np.stack([rows, rows], axis=1)}

def labelled():
    return [(feed, feed["x"][:, 0].astype(np.int32)) for feed in feeds()]
"""


def write(folder, text):
    path = folder / "calib.py"
    path.write_text(textwrap.dedent(text))
    return path


def ids(dataset, batch_size=3):
    return [int(v) for batch in dataset.batches(batch_size) for v in batch.feeds["x"][:, 0]]


def refused(source, **options):
    def read_twice():
        dataset = open_dataset(source, X, **options)
        return [list(dataset.batches(4)) for _ in range(2)]

    with pytest.raises(DataError) as info:
        read_twice()
    text = str(info.value)
    assert "\n" not in text
    return text


# Functions ----------------------------------------------------------------------------------------------------------


def test_a_function_is_called_for_each_pass(tmp_path):
    path = write(tmp_path, FEEDS)
    dataset = open_dataset(f"{path}:feeds", X)
    assert (dataset.name, dataset.size, dataset.has_labels) == ("calib.py:feeds", None, False)
    for _ in range(2):
        assert [b.size for b in dataset.batches(3)] == [3, 3, 3, 1]
        assert ids(dataset) == list(range(10))
    assert dataset.size == 10
    assert not (tmp_path / "__pycache__").exists()


def test_a_function_may_give_labels(tmp_path):
    dataset = open_dataset(f"{write(tmp_path, FEEDS)}:labelled", X)
    assert dataset.has_labels
    assert [b.labels.tolist() for b in dataset.batches(6)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]


def test_the_digest_covers_the_file_and_the_name(tmp_path):
    path = write(tmp_path, FEEDS)
    digests = [open_dataset(f"{path}:{name}", X).digest for name in ("feeds", "feeds", "labelled")]
    write(tmp_path, FEEDS + "\n# changed")
    digests.append(open_dataset(f"{path}:feeds", X).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_streams_split_disjointly_without_being_kept(tmp_path):
    dataset = open_dataset(f"{write(tmp_path, FEEDS)}:labelled", X)
    low, high = split(dataset, 0.3, seed=4)
    assert (low.size, high.size) == (3, 7)
    assert sorted(ids(low) + ids(high)) == list(range(10))
    assert [b.labels.tolist() for b in low.batches(9)] == [ids(low)]
    # How long it is was found out by splitting it.
    assert set(ids(take(high, 2))) < set(ids(high))


def test_take_stops_an_endless_stream_and_ends_with_a_short_one(tmp_path):
    path = write(
        tmp_path,
        """
        import itertools
        import numpy as np
        def feeds():
            return ({"x": np.full((1, 2), i, np.float32)} for i in itertools.count())
        """,
    )
    assert ids(take(open_dataset(f"{path}:feeds", X), 5)) == [0, 1, 2, 3, 4]
    short = take(open_dataset(f"{write(tmp_path, FEEDS)}:feeds", X), 50)
    assert short.size is None
    assert ids(short) == list(range(10))
    assert short.size == 10
    assert sorted(i for side in split(short, 0.5, 0) for i in ids(side)) == list(range(10))


def test_what_is_taken_of_a_stream_is_the_same_before_and_after_it_was_read(tmp_path):
    dataset = open_dataset(f"{write(tmp_path, FEEDS)}:feeds", X)
    before = take(dataset, 3)
    assert len(ids(dataset)) == 10
    after = take(dataset, 3)
    assert ids(before) == ids(after) == [0, 1, 2]
    assert before.digest == after.digest


def test_a_split_of_a_view_of_a_stream_counts_the_view(tmp_path):
    dataset = open_dataset(f"{write(tmp_path, FEEDS)}:feeds", X)
    low, high = split(take(dataset, 6), 0.5, seed=0)
    assert sorted(ids(low) + ids(high)) == list(range(6))


def test_the_files_folder_is_importable_while_its_code_runs(tmp_path):
    (tmp_path / "sibling_of_calib.py").write_text("ROWS = 3\n")
    path = write(
        tmp_path,
        """
        import numpy as np
        def feeds():
            from sibling_of_calib import ROWS
            yield {"x": np.zeros((ROWS, 2), np.float32)}
        """,
    )
    before = list(sys.path)
    assert len(ids(open_dataset(f"{path}:feeds", X))) == 3
    assert sys.path == before


def test_a_reader_class_in_a_file_serves_as_the_function(tmp_path):
    path = write(
        tmp_path,
        """
        import numpy as np
        class Reader:
            def __init__(self):
                self.left = 3
            def get_next(self):
                self.left -= 1
                return {"x": np.full((1, 2), self.left, np.float32)} if self.left >= 0 else None
        """,
    )
    dataset = open_dataset(f"{path}:Reader", X)
    assert ids(dataset) == ids(dataset) == [2, 1, 0]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return 3", "calib.py:feeds: returned a int, expected an iterable of feeds"),
        ("return {'x': ok}", "calib.py:feeds: returned a dict, expected an iterable of feeds"),
        ("return [ok]", "calib.py:feeds, item 0: is a ndarray, expected a dict of arrays by input name"),
        ("return []", "calib.py:feeds: gives no samples"),
        ("return SHARED", "calib.py:feeds: gives no samples; each call must give fresh feeds"),
        ("return [{'y': ok}]", "item 0: array 'y' matches no model input; the model takes 'x' float32[n, 2]"),
        ("return [{}]", "item 0: no array for model input 'x'"),
        ("return [{'x': ok}, {'x': ok.astype(float)}]", "item 1: array 'x' is float64, the model takes float32"),
        ("return [{'x': ok[0]}]", "item 0: array 'x' has shape [2], the model takes [n, 2]"),
        ("return [{'x': ok[:0]}]", "item 0: array 'x' is empty"),
        ("return [{'x': ok}, {'x': ok * np.float32('nan')}]", "item 1: array 'x' holds NaN or infinity"),
        ("return [{'x': Odd()}]", "item 0: array 'x' is a Odd that makes no array (no way)"),
        ("return [({'x': ok}, [1, 2]), ({'x': ok}, [1])]", "item 1: 1 labels for 2 samples"),
        ("return [({'x': ok}, [1, 2]), {'x': ok}]", "item 1: some items have labels and some do not"),
        ("return [({'x': ok}, [.1, .2])]", "item 0: labels are float64, expected integers"),
        ("return [{'x': np.random.rand(1, 2).astype('f')}]", "gives other samples each time it is read"),
        ("SEEN.append(1); return [{'x': ok}] * len(SEEN)", "gave 4 samples at first and 6 now"),
        ("raise KeyError('a\\nb')", "calib.py:feeds: raised KeyError at line 13: 'a\\nb'"),
        ("return 1 / 0", "raised ZeroDivisionError at line 13: division by zero"),
        ("raise ValueError('a\\n  b')", "raised ValueError at line 13: a b"),
        ("yield {'x': ok}\n    raise OSError('disk')", "raised OSError at line 14: disk"),
        ("import sys; sys.exit(3)", "raised SystemExit at line 13: 3"),
        ("raise StopIteration", "raised StopIteration at line 13: StopIteration"),
    ],
)
def test_functions_that_misbehave_are_reported(tmp_path, body, text):
    path = write(tmp_path, "")
    path.write_text(
        "import numpy as np\n"
        "ok = np.ones((2, 2), np.float32)\n"
        "SHARED = iter([{'x': ok}])\n"
        "next(SHARED)\n"
        "SEEN = []\n"
        "\n"
        "class Odd:\n"
        "    def __array__(self, dtype=None, copy=None):\n"
        "        raise RuntimeError('no way')\n"
        "\n"
        "def feeds():\n"
        "    # the body\n"
        f"    {body}\n"
    )
    assert text in refused(f"{path}:feeds")


def test_a_used_up_generator_is_reported_on_the_second_pass(tmp_path):
    path = write(
        tmp_path,
        """
        import numpy as np
        SHARED = ({"x": np.ones((1, 2), np.float32)} for _ in range(1))
        def feeds():
            return SHARED
        """,
    )
    assert "return a list or a new generator, not a used one" in refused(f"{path}:feeds")


def test_files_and_functions_that_are_missing_are_reported(tmp_path):
    path = write(tmp_path, FEEDS)
    assert f"{path}: has no function 'nope'; it has feeds, labelled" in refused(f"{path}:nope")
    assert f"{path}: has no function 'np.zeros'" in refused(f"{path}:np.zeros")
    assert "say which function to call" in refused(path)
    assert "missing.py: cannot be read (No such file or directory)" in refused(f"{tmp_path / 'missing.py'}:feeds")
    assert "labels from the source itself" in refused(f"{path}:feeds", labels=np.arange(10))
    write(tmp_path, "x = = 1")
    assert f"{path}: raised SyntaxError" in refused(f"{path}:feeds")
    write(tmp_path, "import not_a_module_at_all")
    assert "raised ModuleNotFoundError at line 1" in refused(f"{path}:feeds")
    write(tmp_path, "x = 1")
    assert "has no function 'x'; it defines none" in refused(f"{path}:x")


# Calibration data readers -------------------------------------------------------------------------------------------


class Once(CalibrationDataReader):
    """As onnxruntime's examples have it; fills the same array again for each feed."""

    def __init__(self, count=5):
        self.next = 0
        self.count = count
        self.buffer = np.zeros((1, 2), np.float32)

    def get_next(self):
        if self.next == self.count:
            return None
        self.buffer[:] = self.next
        self.next += 1
        return {"x": self.buffer}


class Rewindable(Once):
    def rewind(self):
        self.next = 0


@pytest.mark.parametrize("kind", [Once, Rewindable])
def test_readers_can_be_read_again_and_split(kind):
    dataset = open_dataset(kind(), X)
    assert (dataset.name, dataset.size, dataset.has_labels) == (kind.__name__, 5, False)
    assert ids(dataset) == ids(dataset) == [0, 1, 2, 3, 4]
    assert sorted(i for side in split(dataset, 0.5, 0) for i in ids(side)) == [0, 1, 2, 3, 4]
    assert open_dataset(kind(), X).digest == dataset.digest
    assert open_dataset(kind(4), X).digest != dataset.digest


def test_a_rewindable_reader_may_have_been_used_and_is_not_kept(monkeypatch):
    monkeypatch.setattr(data_python, "MAX_KEPT_BYTES", 8)
    reader = Rewindable()
    reader.get_next()
    assert ids(open_dataset(reader, X)) == [0, 1, 2, 3, 4]
    assert "has no rewind() method, and its feeds exceed 8 bytes" in refused(Once())


def test_two_passes_over_one_reader_at_a_time_are_refused():
    dataset = open_dataset(Rewindable(), X)
    first, second = dataset.batches(1), dataset.batches(1)
    next(first)
    next(second)
    with pytest.raises(DataError, match="another pass was started"):
        list(first)


def test_readers_that_misbehave_are_reported():
    used = Once(2)
    while used.get_next() is not None:
        pass
    assert "Once: gives no samples and has no rewind() method" in refused(used)
    assert "Rewindable: gives no samples" in refused(Rewindable(0))

    class Wrong(Rewindable):
        def get_next(self):
            feed = super().get_next()
            return feed and {"x": feed["x"].astype(np.float64)}

    assert "Wrong, item 0: array 'x' is float64" in refused(Wrong())

    class Tuples(Rewindable):
        def get_next(self):
            return super().get_next() and (1, 2)

    assert "Tuples, item 0: get_next() returned a tuple" in refused(Tuples())

    class Broken(Rewindable):
        def get_next(self):
            raise RuntimeError("no camera")

    assert refused(Broken()) == "Broken: raised RuntimeError: no camera"


def test_a_fixed_batch_of_one_takes_feeds_of_any_size():
    fixed = (InputSpec("x", np.dtype(np.float32), (1, 2)),)
    assert [b.size for b in open_dataset(Rewindable(), fixed).batches(8)] == [1] * 5
