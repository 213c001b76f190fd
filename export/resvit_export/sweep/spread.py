"""The tasks of a sweep one after another, or over the workers of a Ray cluster."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.version import own_version
from resvit_export.sweep.plan import Task
from resvit_export.sweep.work import Outcome, task_done

LOCAL = "local"
_CLUSTER = re.compile(r"ray://[A-Za-z0-9._\[\]:-]+:[0-9]{1,5}")
_AGAIN = 2
"""How often a task is begun anew whose worker died: what it had finished lies in its run folder."""


def outcomes_here(tasks: Sequence[Task], root: Path) -> Iterator[Outcome]:
    """Every task, one after another, in this process."""
    for task in tasks:
        yield task_done(task, root)


def outcomes_by_ray(tasks: Sequence[Task], root: Path, address: str) -> Iterator[Outcome]:
    """Every task as soon as it is done, by the workers of the Ray cluster at ``address``, or ``local`` ones.

    All workers see ``root`` under the same path. A worker that dies costs its task alone, which is begun again.

    Raises:
        ResvitError: MISSING without Ray or where no cluster answers, INPUT for an address that is none and for a
            cluster with another version of ours.
    """
    if address != LOCAL and not _CLUSTER.fullmatch(address):
        raise ResvitError(
            f"There is no Ray cluster {address!r}.", "Name it as ray://HOST:PORT, port 10001 as a rule, or say local."
        )
    if importlib.util.find_spec("ray") is None:
        raise ResvitError("Ray is not installed.", "pip install 'resvit-export[ray]'", ExitCode.MISSING)
    import ray

    settings: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        raise ResvitError(
            f"The Ray cluster {address} cannot be used: {_first_line(error)}.",
            "Begin one with 'ray start --head', with the same Python and Ray, and set RAY_AUTH_MODE=token where it "
            "asks for a token; or use --on local.",
            ExitCode.MISSING,
        ) from error
    try:
        work = ray.remote(num_cpus=1, max_retries=_AGAIN)(_on_a_worker)
        waiting = {work.remote(task, root, own_version()): task for task in tasks}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            yield _taken(ray, ready, waiting.pop(ready))
    finally:
        ray.shutdown()


def _taken(ray: Any, ready: Any, task: Task) -> Outcome:
    try:
        outcome: Outcome = ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ResvitError):
            raise cause from error
        return Outcome(task.name, (), 0.0, f"{type(cause).__name__}: {cause}")
    except ray.exceptions.RayError as error:
        return Outcome(task.name, (), 0.0, _first_line(error))
    return outcome


def _on_a_worker(task: Task, root: Path, version: str) -> Outcome:
    if version != own_version():
        raise ResvitError(
            f"A worker has resvit-export {own_version()}, and this machine {version}.",
            "Install the same on all of them.",
        )
    if not root.is_dir():
        raise ResvitError(
            f"A worker does not see the folder {root}.", "Name a folder with --out that all machines share."
        )
    return task_done(task, root)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
