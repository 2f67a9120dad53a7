"""What a search has judged, written down as it ends, so that a run that was stopped can go on.

A search is deterministic given the numbers that judging gives: going on is to run it again while the journal answers
what was judged already. The file is JSON, one line for each answer, which is on disk before the search goes on; the
first line says what the answers depend on (`raqu_onnx.search.identity`). Of a run that is killed while it writes, the
last line may be torn; it is judged again.

    {"journal": 2, "identity": {"raqu-onnx": "0.1.0 (...)", "model": "9f2c...", ...}}
    {"kind": "quick", "weights": [8, 2, 8], "activations": [8, 8, 8], "value": 0.0123}
    {"kind": "score", "weights": ["88720", 4], "activations": [8, 8], "value": {"glance": 0.0047, "samples": 500, ...}}
    {"kind": "score", "weights": ["22220", 4], "activations": [8, 8], "value": {"glance": 0.0193}}

Weights are bits of a node, or one digit for every entry of its scale axis. A score with nothing but a glance is that of
a candidate which was not looked at further (`raqu_onnx.search.questions`). Python writes floats so that reading gives
the same bits back.

While a run lasts, its journal lies beside the result folder, `NAME.journal.jsonl`; the finished one is a file of the
result, `journal.jsonl`, from which a longer search goes on.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from raqu_onnx.errors import CheckError, OutputError, RaquError, WorkerError
from raqu_onnx.evaluation import Score
from raqu_onnx.file_lock import lock_file
from raqu_onnx.search.identity import differences
from raqu_onnx.search.questions import Verdict
from raqu_onnx.search.result import Bits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from raqu_onnx.search.identity import Identity
    from raqu_onnx.search.questions import Answer, Kind
    from raqu_onnx.search.result import NodeWidth

__all__ = ["JOURNAL_FILE", "Journal", "journal_lines", "read_answers"]

logger = logging.getLogger(__name__)

#: Name of the finished journal in the result folder.
JOURNAL_FILE = "journal.jsonl"
_VERSION = 2
# How often a file may vanish while it is opened.
_MOST_TRIES = 100
# What is no float in a score.
_NO_FLOATS = ("samples", "measured")
# In the result folder, where nothing can be written beside it.
_INSIDE = ".raqu-journal.jsonl"


class Journal:
    """The journal of one run; a context that keeps the file where the run does not come to its end.

    Args:
        folder: The result folder of the run.
        resume: Go on with an earlier run; without one, a new search starts.
        force: What an unfinished run has judged may be thrown away.

    Attributes:
        path: Where the journal lies while the run lasts.

    Raises:
        OutputError: There is an unfinished run, and neither going on nor starting anew was asked for; or another run
            that writes the same folder is going on.
    """

    def __init__(self, folder: Path, *, resume: bool = False, force: bool = False) -> None:
        self._folder = folder
        self._resume = resume
        self._force = force
        self._answers: dict[tuple[Kind, Bits], Answer] = {}
        self._fresh = True
        self._made: list[Path] = []
        self.path = _place(folder)
        self._stream = self._locked("r+b")
        if self._stream is not None:
            self._fresh = not self._stream.read(1)
            if not self._fresh and not resume and not force:
                self._stream.close()
                raise OutputError(
                    f"{self.path}: holds what an unfinished run for {folder} has judged; go on with --resume, or start "
                    "anew with --force"
                )

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def is_unfinished(self) -> bool:
        """A run that was stopped is gone on with: what it might replace, this one may."""
        return self._resume and not self._fresh

    @property
    def continues(self) -> bool:
        """An earlier run is gone on with."""
        return self._resume and (not self._fresh or (self._folder / JOURNAL_FILE).is_file())

    def _locked(self, mode: str) -> IO[bytes] | None:
        """The file of this run alone; None where there is none and the mode makes none."""
        for _ in range(_MOST_TRIES):
            stream = self._opened(mode)
            # The run that held it may have removed it between the opening and the lock.
            if stream is None or _is_at(stream, self.path):
                return stream
            stream.close()
        raise OutputError(f"{self.path}: others keep replacing the journal; name another folder with -o")

    def _opened(self, mode: str) -> IO[bytes] | None:
        try:
            stream = self.path.open(mode)
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and mode == "r+b":
                return None
            raise OutputError(
                f"{self.path}: the journal cannot be written: {error.strerror}; name another folder with -o"
            ) from error
        if lock_file(stream) is False:
            stream.close()
            raise OutputError(
                f"{self._folder}: another run is writing its results here; wait for it, or name another folder with -o"
            )
        return stream

    # --- answers ----------------------------------------------------------------------------------------------

    def begin(self, identity: Identity) -> None:
        """Read what an earlier run has judged, or start the file anew.

        Args:
            identity: What the answers of this run depend on.

        Raises:
            OutputError: The journal is of another search or damaged, or cannot be written.
        """
        earlier = self._earlier(identity) if self.continues else None
        if self._resume and earlier is None:
            logger.warning("%s: there is no unfinished search to go on with; it starts anew", self._folder)
        if self._stream is None:
            self._create()
        if self._stream is not None and (earlier is None or self._fresh):
            self._fresh = True
            self._stream.truncate(0)
            self._append(earlier or _line({"journal": _VERSION, "identity": identity}))
        elif self._stream is not None and earlier is not None:
            # What was torn goes.
            self._stream.truncate(len(earlier))

    def _earlier(self, identity: Identity) -> bytes | None:
        """Read the answers of an earlier run; returns its journal up to the last whole line, None for starting anew."""
        source = self._folder / JOURNAL_FILE if self._fresh else self.path
        try:
            content = _read(source)
            found, answers, end = _parse(content, source)
            wrong = "" if found is None else differences(identity, found)
            if wrong:
                raise OutputError(f"{source}: it is of another search: {wrong}; start anew with --force")
        except OutputError as error:
            if not self._force:
                raise
            logger.warning("%s", error)
            return None
        if found is None:
            return None
        self._answers = answers
        logger.info("going on with %s: %d answers", source, len(answers))
        return content[:end]

    def _create(self) -> None:
        missing = [path for path in (self.path.parent, *self.path.parent.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir()
            self._made.append(path)
        # Made by whoever comes first; the lock tells who may write.
        self._stream = self._locked("a+b")

    def get(self, kind: Kind, bits: Bits) -> Answer | None:
        """What an earlier run judged, None where it did not."""
        return self._answers.get((kind, bits))

    def put(self, kind: Kind, bits: Bits, value: Answer) -> None:
        """Write an answer down; it is on disk afterwards.

        Raises:
            OutputError: The file cannot be written.
        """
        self.put_all(kind, {bits: value})

    def put_all(self, kind: Kind, values: Mapping[Bits, Answer]) -> None:
        """The same for several answers at once.

        Raises:
            OutputError: The file cannot be written.
        """
        self._answers |= {(kind, bits): value for bits, value in values.items()}
        self._append(b"".join(_line(_entry(kind, bits, value)) for bits, value in values.items()))

    def _append(self, content: bytes) -> None:
        if self._stream is None:
            raise ValueError("the journal has not begun")
        try:
            self._stream.seek(0, os.SEEK_END)
            self._stream.write(content)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path}: the journal cannot be written: {error.strerror}; free some room, then go on with "
                "--resume"
            ) from error

    # --- the end ----------------------------------------------------------------------------------------------

    def finish(self, folder: Path) -> None:
        """Write the finished journal among the results, where the search has begun."""
        if self._stream is None or not self._answers:
            return
        try:
            # Not by its name: someone may have removed the file meanwhile.
            self._stream.seek(0)
            content = self._stream.read()
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be read: {error.strerror}; go on with --resume, or start anew with --force"
            ) from error
        (folder / JOURNAL_FILE).write_bytes(content)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the file, unless the run was stopped or failed without the user's doing after something was judged."""
        if self._stream is None:
            return
        # Without an end, and not refused: a full disk is no fault of what was asked for.
        stopped = error is not None and (
            not isinstance(error, RaquError) or isinstance(error, OutputError | CheckError | WorkerError)
        )
        kept = (stopped and bool(self._answers)) or (error is not None and not self._fresh)
        if not kept:
            # Before the lock goes, so that nobody takes a file that is about to vanish.
            if _is_at(self._stream, self.path):
                self.path.unlink(missing_ok=True)
            for path in reversed(self._made):
                with suppress(OSError):
                    path.rmdir()
        elif stopped and self._answers and error is not None:
            error.add_note(f"what was judged is in {self.path}; the same command with --resume goes on")
        # What could not be written is tried again here.
        with suppress(OSError):
            self._stream.close()
        self._stream = None


def read_answers(path: Path) -> tuple[Identity, dict[tuple[Kind, Bits], Answer]]:
    """What a journal says its answers depend on, and the answers, in the order in which they were written.

    Raises:
        OutputError: It cannot be read, or is damaged.
    """
    identity, answers, _ = _parse(_read(path), path)
    if identity is None:
        raise OutputError(f"{path}: it is not a journal of a search")
    return identity, answers


def journal_lines(identity: Identity, answers: Mapping[tuple[Kind, Bits], Answer]) -> bytes:
    """A whole journal, for `read_answers`."""
    lines = [_line({"journal": _VERSION, "identity": identity})]
    return b"".join([*lines, *(_line(_entry(*key, value)) for key, value in answers.items())])


def _place(folder: Path) -> Path:
    """Beside the folder; in it where it exists and nothing can be written beside it, as where a disk is mounted."""
    absolute = folder.resolve()
    inside = absolute / _INSIDE
    closed = not os.access(absolute.parent, os.W_OK | os.X_OK) and absolute.parent.is_dir()
    if inside.exists() or absolute.is_mount() or closed:
        return inside
    return absolute.parent / f"{absolute.name}.journal.jsonl"


def _is_at(stream: IO[bytes], path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:
        return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}; start anew with --force") from error


def _parse(content: bytes, source: Path) -> tuple[Identity | None, dict[tuple[Kind, Bits], Answer], int]:
    """The identity (None where not even the first line was finished), the answers, and where the last line ends.

    Raises:
        OutputError: A line that was finished cannot be read.
    """
    # What follows the last end of a line was being written when the run was killed.
    end = content.rfind(b"\n") + 1
    identity: Identity | None = None
    answers: dict[tuple[Kind, Bits], Answer] = {}
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            entry = json.loads(line)
            if identity is None:
                identity = _identity(entry)
            else:
                bits = Bits(tuple(map(_unpacked, entry["weights"])), _activations(entry["activations"]))
                answers[entry["kind"], bits] = _value(entry["kind"], entry["value"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise OutputError(
                f"{source}: line {number} cannot be read, so the journal is damaged; start anew with --force"
            ) from error
    return identity, answers, end


def _identity(entry: dict[str, Any]) -> Identity:
    if entry["journal"] != _VERSION:
        # Read as a difference: nothing else is known of another version.
        return {"version of the journal": str(entry["journal"])}
    return {str(name): str(value) for name, value in entry["identity"].items()}


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _entry(kind: Kind, bits: Bits, value: Answer) -> dict[str, Any]:
    return {
        "kind": kind,
        "weights": [_packed(width) for width in bits.weights],
        "activations": None if bits.activations is None else list(bits.activations),
        "value": _written(value) if isinstance(value, Verdict) else value,
    }


def _written(verdict: Verdict) -> dict[str, Any]:
    return {"glance": verdict.glance, **({} if verdict.score is None else asdict(verdict.score))}


def _packed(width: NodeWidth) -> int | str:
    return width if isinstance(width, int) else "".join(map(str, width))


def _unpacked(width: int | str) -> NodeWidth:
    return tuple(map(int, width)) if isinstance(width, str) else _whole(width)


def _activations(widths: list[int] | None) -> tuple[int, ...] | None:
    return None if widths is None else tuple(map(_whole, widths))


def _value(kind: str, value: Any) -> Answer:
    if kind == "quick":
        return _number(value)
    if kind != "score":
        raise ValueError(kind)
    glance, others = _number(value["glance"]), {name: held for name, held in value.items() if name != "glance"}
    return Verdict(glance, _score(others) if others else None)


def _score(value: dict[str, Any]) -> Score:
    measured = value.get("measured")
    if measured is not None and not isinstance(measured, str):
        raise TypeError(measured)
    others = {name: None if held is None else _number(held) for name, held in value.items() if name not in _NO_FLOATS}
    return Score(_whole(value["samples"]), measured=measured, **others)


def _whole(value: object) -> int:
    # To Python a bool is an int.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(value)
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(value)
    return float(value)
