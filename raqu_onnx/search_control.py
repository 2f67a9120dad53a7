"""What stops and continues searches, as far as a whole run is concerned."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

from raqu_onnx.passes.search_bits import SearchBitsPass
from raqu_onnx.pipeline import pass_names
from raqu_onnx.search.journal import Journal

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.search import SearchResult

__all__ = ["open_journal", "timeout_warning"]

logger = logging.getLogger(__name__)


def open_journal(
    folder: Path | None, settings: OptimizeConfig, *, resume: bool, force: bool
) -> AbstractContextManager[Journal | None]:
    """The journal of a run; none where nothing is searched, or nothing is written.

    Args:
        folder: The result folder.
        settings: What is asked for.
        resume: Go on with an unfinished search, or make one that ended longer.
        force: What an unfinished run has judged may be thrown away.

    Raises:
        OutputError: There is an unfinished run and neither is asked for, or another run writes the same folder.
    """
    searching = not settings.search_settings.is_uniform and SearchBitsPass.name in pass_names(settings)
    if folder is not None and searching:
        return Journal(folder, resume=resume, force=force)
    if resume:
        logger.warning("--resume: nothing is searched here that could be gone on with")
    return nullcontext()


def timeout_warning(found: SearchResult | None, seconds: float | None) -> list[str]:
    """What a user must know of a search whose time was up; nothing where it was not.

    Args:
        found: What the search found.
        seconds: The time that it had.
    """
    if found is None or not found.timed_out:
        return []
    done = len(found.evaluations)
    text = f"the search came to its end after {seconds:g} seconds with {done} candidates judged; the same command with"
    return [f"{text} --resume and more time goes on"]
