"""The tasks of a sweep one after another, or over the workers of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resvit_engines.errors import ResvitError, first_line
from resvit_engines.progress import SILENT, Reporter, working
from resvit_export.sweep.cluster import (
    AGAIN,
    cluster_at,
    idle_of,
    require_same,
    spread_over,
    versions_here,
    workers_of,
)
from resvit_export.sweep.divide import divide
from resvit_export.sweep.plan import Task
from resvit_export.sweep.ranges import LEAST
from resvit_export.sweep.store import RunStore
from resvit_export.sweep.work import Outcome, task_done

_LOOK = 1.0
"""Seconds after which is looked which tasks workers have begun."""


def outcomes_here(tasks: Sequence[Task], place: Path | RunStore, reporter: Reporter = SILENT) -> Iterator[Outcome]:
    """Every task, one after another, in this process; its run is below the folder ``place``, or in that store."""
    for number, task in enumerate(tasks, 1):
        reporter.say(f"{number} of {len(tasks)} begins: {task.name}")
        with working(reporter, task.name):
            outcome = task_done(task, place)
        yield outcome


def outcomes_by_ray(
    tasks: Sequence[Task], place: Path | RunStore, address: str, least: int = LEAST, reporter: Reporter = SILENT
) -> Iterator[Outcome]:
    """Every task as soon as it is done, by the workers of the Ray cluster at ``address``, or ``local`` ones.

    All workers see a folder under the same path. A worker that dies costs its task alone, which is begun again from the
    stages that lie in its run folder. Validation is divided over the workers, by ranges of ``least`` images or more,
    and searches try their next candidates on those that are idle. ``reporter`` is told which task begins.

    Raises:
        ResvitError: MISSING without Ray or where no cluster answers, INPUT for an address that is none and for a
            cluster with another version of ours or of what computes.
    """
    with cluster_at(address) as ray:
        from ray.util.queue import Queue

        begun = Queue(actor_options={"num_cpus": 0})
        work = ray.remote(num_cpus=1, max_retries=AGAIN)(_on_a_worker)
        waiting = {work.remote(task, place, versions_here(), least, begun): task for task in tasks}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK)
            with contextlib.suppress(ray.exceptions.RayError):  # what is lost with its machine is only told
                for name in begun.get_nowait_batch(begun.qsize()):
                    reporter.say(f"begins: {name}")
            if ready:
                yield _taken(ray, ready[0], waiting.pop(ready[0]))


def _taken(ray: Any, ready: Any, task: Task) -> Outcome:
    try:
        outcome: Outcome = ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ResvitError):
            raise cause from error
        return Outcome(task.name, (), 0.0, f"{type(cause).__name__}: {cause}")
    except ray.exceptions.RayError as error:
        return Outcome(task.name, (), 0.0, first_line(error).rstrip("."))
    return outcome


def _on_a_worker(task: Task, place: Path | RunStore, versions: Mapping[str, str], least: int, begun: Any) -> Outcome:
    require_same(place, versions)
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        begun.put(task.name)
    spread, workers = spread_over(ray, place, versions), workers_of(ray)

    def idle() -> int:
        return idle_of(ray) + 1  # this one waits while its parts are done

    return task_done(task, place, lambda run: divide(run, task.name, spread, workers, idle=idle, least=least))
