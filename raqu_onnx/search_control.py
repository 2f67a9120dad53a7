"""What stops and continues searches, as far as a whole run is concerned."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from raqu_onnx.errors import ConfigError
from raqu_onnx.evaluation import default_threads
from raqu_onnx.passes.search_bits import SearchBitsPass
from raqu_onnx.pipeline import pass_names
from raqu_onnx.search.dask_pool import dask_pool
from raqu_onnx.search.journal import Journal
from raqu_onnx.search.pools import LocalPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.search import SearchResult, SearchRun
    from raqu_onnx.search.pools import Pool

__all__ = ["open_journal", "open_pool", "search_warnings"]

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
    if folder is not None and _searches(settings):
        return Journal(folder, resume=resume, force=force)
    if resume:
        logger.warning("--resume: nothing is searched here that could be gone on with")
    return nullcontext()


def _searches(settings: OptimizeConfig) -> bool:
    if settings.choose is not None or settings.search_settings.is_uniform:
        return False
    return SearchBitsPass.name in pass_names(settings)


@contextmanager
def open_pool(settings: OptimizeConfig, scratch: Path) -> Iterator[tuple[OptimizeConfig, Pool | None]]:
    """Workers, and the settings with what depends on them: threads of each evaluation.

    All of the run has these threads, not workers alone: what is emitted has the floats of what was judged.

    Args:
        settings: What is asked for.
        scratch: A folder that may be made for what workers of this machine are made of.

    Raises:
        ConfigError: Both kinds of workers are asked for.
        WorkerError: A cluster cannot be reached, or does not run what runs here.
    """
    if settings.dask is not None and settings.workers > 1:
        raise ConfigError("--workers: --dask has workers of its own; leave one of them out")
    if settings.dask is not None and _searches(settings):
        with dask_pool(settings.dask, settings.threads) as pool:
            yield _with(settings, pool), pool
    elif settings.workers > 1 and _searches(settings):
        threads = settings.threads or max(1, default_threads() // settings.workers)
        local = LocalPool(settings.workers, threads, scratch)
        try:
            yield _with(settings, local), local
        finally:
            local.close()
    else:
        yield settings, None


def _with(settings: OptimizeConfig, pool: Pool) -> OptimizeConfig:
    return settings.model_copy(update={"threads": pool.threads})


def search_warnings(found: SearchResult | None, run: SearchRun) -> list[str]:
    """What a user must know of how a search was carried out.

    Args:
        found: What the search found.
        run: How it was carried out.
    """
    warnings = []
    if found is not None and found.timed_out:
        done = len(found.evaluations)
        warnings.append(
            f"the search came to its end after {run.timeout:g} seconds with {done} candidates judged in full; the same "
            "command with --resume --force and more time goes on"
        )
    if run.pool is not None and len(run.pool.processors) > 1:
        kinds = ", ".join(run.pool.processors)
        warnings.append(f"workers run on different processors ({kinds}), so the result depends on who judged what")
    return warnings
