"""Samples from Python code: a function in a file, or an onnxruntime `CalibrationDataReader`.

Both give feeds one after the other, so nothing is kept in memory but the feed in hand. The one exception is a reader
without a `rewind()` method: it can be read only once, so its feeds are kept, up to `MAX_KEPT_BYTES`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from raqu_onnx.data_base import Batch, Dataset, InputSpec
from raqu_onnx.data_checks import (
    as_array,
    check_feeds,
    check_labels,
    check_names,
    hash_array,
    one_line,
)
from raqu_onnx.errors import DataError, RaquError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "MAX_KEPT_BYTES",
    "CalibrationReader",
    "StreamDataset",
    "call_user",
    "load_function",
    "open_function",
    "open_reader",
]

_log = logging.getLogger(__name__)

MAX_KEPT_BYTES = 2 << 30
"""What a reader without `rewind()` may hold in all (2 GiB)."""

_END = object()


class CalibrationReader(Protocol):
    """What is used of onnxruntime's `CalibrationDataReader`; a `rewind()` is used where there is one."""

    def get_next(self) -> Any:
        """The next feeds by input name, or None at the end."""


class StreamDataset(Dataset):
    """Samples that come in order, from a source that can be started again.

    Opening reads the first item, to check it. The source must give the same items each time: the first item and the
    number of samples are compared on every pass.

    Args:
        name: Short name for messages and the manifest.
        digest: SHA-256 of the source.
        inputs: The model's inputs.
        start: Gives a fresh iterator over feeds (a dict of arrays by input name) or (feeds, labels) pairs.
        where: How messages name the source.

    Raises:
        DataError: The source gives nothing, or its first item does not fit the model.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        inputs: Sequence[InputSpec],
        start: Callable[[], Iterator[object]],
        *,
        where: str,
    ) -> None:
        super().__init__(name, digest, inputs, has_labels=False)
        self._where = where
        self._start = start
        self._size: int | None = None
        self._first: str | None = None
        stream = self._pieces()
        # Sets has_labels for good.
        self.has_labels = next(stream).labels is not None
        stream.close()

    @property
    def size(self) -> int | None:
        """Number of samples; None until the source was read to its end."""
        return self._size

    def read(self, most: int, indices: NDArray[np.intp] | None = None) -> Iterator[Batch]:
        """Yield the source's own feeds, or what is wanted of them."""
        del most  # The source decides how much comes at once.
        offset = 0
        for piece in self._pieces():
            if indices is None:
                yield piece
                continue
            low, high = np.searchsorted(indices, [offset, offset + piece.size])
            if high > low:
                yield piece.select(indices[low:high] - offset)
            if high == len(indices):
                return
            offset += piece.size

    def count(self) -> int:
        """Number of samples, by reading the source to its end where that was not done yet."""
        if self._size is None:
            for _ in self._pieces():
                pass
        if self._size is None:
            raise AssertionError("a pass to the end sets the size")
        return self._size

    def _pieces(self) -> Generator[Batch, None, None]:
        total = 0
        for number, item in enumerate(self._start()):
            batch = self._check_item(f"{self._where}, item {number}", item)
            if number == 0:
                self._check_same(batch)
            elif (batch.labels is not None) != self.has_labels:
                raise DataError(
                    f"{self._where}, item {number}: some items have labels and some do not; "
                    "give them with all or with none"
                )
            total += batch.size
            self._note_labels(batch.labels)
            yield batch
        if not total:
            raise DataError(
                f"{self._where}: gives no samples; each call must give fresh feeds, "
                "so return a list or a new generator, not a used one"
            )
        if self._size not in (None, total):
            raise DataError(
                f"{self._where}: gave {self._size} samples at first and {total} now; it must give the same each time"
            )
        self._size = total

    def _check_item(self, where: str, item: object) -> Batch:
        given, labels = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        if not isinstance(given, Mapping):
            raise DataError(
                f"{where}: is a {type(given).__name__}, expected a dict of arrays by input name, "
                "or a pair of such a dict and labels"
            )
        check_names(where, map(str, given), self.inputs)
        feeds = {spec.name: as_array(where, f"array {spec.name!r}", given[spec.name]) for spec in self.inputs}
        size = check_feeds(where, feeds, self.inputs)
        if labels is None:
            return Batch(feeds)
        return Batch(feeds, check_labels(where, np.atleast_1d(as_array(where, "labels", labels)), size))

    def _check_same(self, batch: Batch) -> None:
        digest = hashlib.sha256()
        for name, array in batch.feeds.items():
            hash_array(digest, name, array)
        if batch.labels is not None:
            hash_array(digest, "", batch.labels)
        if self._first not in (None, digest.hexdigest()):
            raise DataError(
                f"{self._where}: gives other samples each time it is read, so no result could be "
                "repeated; seed its random generator inside it"
            )
        self._first = digest.hexdigest()


def load_function(path: Path, function: str) -> tuple[Callable[..., object], str]:
    """A function in a Python file, which is run, and a digest of the file's bytes and the function's name.

    Raises:
        DataError: The file or function is missing, or the file raises.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    digest = hashlib.sha256(source + b"\0" + function.encode()).hexdigest()
    module = _run_file(path, source)
    call = getattr(module, function, None)
    if not callable(call):
        raise DataError(f"{path}: has no function {function!r}; {_offer(module)}")
    return call, digest


def call_user(where: str, path: Path, function: Callable[..., object], *arguments: object) -> object:
    """What a function of the user's returns.

    Args:
        where: What errors name.
        path: The function's file.
        function: The function.
        arguments: What it is called with.

    Raises:
        DataError: It raises; the message says what, and at which line of the file.
    """
    with _user_code(where, path):
        return function(*arguments)


def open_function(path: Path, function: str, inputs: Sequence[InputSpec]) -> StreamDataset:
    """Samples from a function in a Python file; the file is run, and the function called for every pass.

    The function takes no arguments and returns an iterable of feeds (a dict of arrays by input name) or of
    (feeds, labels) pairs; the first dimension of each array counts samples. The digest covers the file's bytes and the
    function's name.

    Raises:
        DataError: The file or function is missing, raises, or gives what does not fit the model.
    """
    call, digest = load_function(path, function)
    where = f"{path}:{function}"

    def start() -> Iterator[object]:
        return _iterate(where, path, call_user(where, path, call))

    return StreamDataset(f"{path.name}:{function}", digest, inputs, start, where=where)


def open_reader(reader: CalibrationReader, inputs: Sequence[InputSpec]) -> StreamDataset:
    """Samples from an onnxruntime `CalibrationDataReader`, or anything with its `get_next()`.

    The reader is read once in full on opening, to check and hash its feeds. With a `rewind()` method it is then rewound
    for each pass; without one, its feeds are kept in memory.

    Raises:
        DataError: The reader raises, is empty or used up, does not fit the model, or holds more than `MAX_KEPT_BYTES`
            and cannot be rewound.
    """
    where = type(reader).__name__
    rewind = getattr(reader, "rewind", None)
    start = _Rewindable(where, reader, rewind) if callable(rewind) else _Kept(_keep(where, _read_once(where, reader)))
    dataset = StreamDataset(where, "", inputs, start, where=where)
    digest = hashlib.sha256(b"reader\0")
    for batch in dataset.read(1):
        for name, array in batch.feeds.items():
            hash_array(digest, name, array)
    dataset.digest = digest.hexdigest()
    return dataset


class _Kept:
    """Feeds in memory."""

    def __init__(self, items: list[object]) -> None:
        self._items = items

    def __call__(self) -> Iterator[object]:
        return iter(self._items)


class _Rewindable:
    """A reader that starts anew for every pass; it has one position, so one pass at a time."""

    def __init__(self, where: str, reader: CalibrationReader, rewind: Callable[[], object]) -> None:
        self._where = where
        self._reader = reader
        self._rewind = rewind
        self._passes = 0

    def __call__(self) -> Iterator[object]:
        self._passes += 1
        current = self._passes
        with _user_code(self._where):
            self._rewind()
        for item in _read_once(self._where, self._reader):
            yield item
            if self._passes != current:
                raise DataError(
                    f"{self._where}: a reader has one position, and another pass was started before "
                    "this one ended; finish one first"
                )


def _read_once(where: str, reader: CalibrationReader) -> Iterator[Mapping[Any, Any]]:
    for number in itertools.count():
        with _user_code(where):
            item = reader.get_next()
        if item is None:
            return
        if not isinstance(item, Mapping):
            raise DataError(
                f"{where}, item {number}: get_next() returned a {type(item).__name__}, "
                "expected a dict of arrays by input name, or None at the end"
            )
        yield item


def _keep(where: str, items: Iterator[Mapping[Any, Any]]) -> list[object]:
    """Copies of all feeds, because a reader may fill the same arrays again."""
    kept: list[object] = []
    size = 0
    for number, item in enumerate(items):
        place = f"{where}, item {number}"
        feeds = {str(n): np.array(as_array(place, f"array {n!r}", v)) for n, v in item.items()}
        size += sum(array.nbytes for array in feeds.values())
        if size > MAX_KEPT_BYTES:
            raise DataError(
                f"{where}: has no rewind() method, and its feeds exceed {MAX_KEPT_BYTES} bytes, "
                "so they cannot be kept; give it a rewind() or fewer samples"
            )
        kept.append(feeds)
    if not kept:
        raise DataError(f"{where}: gives no samples and has no rewind() method; give a reader that was not read before")
    return kept


def _iterate(where: str, path: Path, result: object) -> Iterator[object]:
    if hasattr(result, "get_next"):
        yield from _read_once(where, result)
        return
    with _user_code(where, path):
        source = (
            None if isinstance(result, Mapping) or not _can_iterate(result) else iter(cast("Iterable[Any]", result))
        )
    if source is None:
        raise DataError(
            f"{where}: returned a {type(result).__name__}, expected an iterable of feeds, "
            "such as a list of dicts or a generator"
        )
    while True:
        with _user_code(where, path):
            item = next(source, _END)
        if item is _END:
            return
        yield item


def _can_iterate(value: object) -> bool:
    """Whether `iter` takes it; `__getitem__` is enough, as torch's datasets have it."""
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def _run_file(path: Path, source: bytes) -> ModuleType:
    # Compiled here and not imported, so that what runs is what was hashed, and no __pycache__ is written beside it.
    module = ModuleType(f"raqu_data_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = str(path)
    # Where dataclasses and pickle look for the module of what it defines.
    sys.modules[module.__name__] = module
    with _user_code(str(path), path):
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 - the user names this file to be run
    return module


def _offer(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return f"it has {', '.join(sorted(names))}" if names else "it defines none"


@contextmanager
def _user_code(where: str, path: Path | None = None) -> Iterator[None]:
    """Run the user's code with its folder importable, and report what it raises in one line."""
    folder = None if path is None else str(path.resolve().parent)
    if folder is not None:
        sys.path.insert(0, folder)
    try:
        yield
    except RaquError:
        raise
    except (Exception, SystemExit) as error:
        _log.debug("%s raised", where, exc_info=True)
        raise DataError(f"{where}: raised {type(error).__name__}{_line(error, path)}: {one_line(error)}") from error
    finally:
        if folder is not None and folder in sys.path:
            sys.path.remove(folder)


def _line(error: BaseException, path: Path | None) -> str:
    """Where in the user's own file it happened."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if path is not None and frame.filename == str(path)
    ]
    return f" at line {lines[-1]}" if lines else ""
