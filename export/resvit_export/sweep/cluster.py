"""Workers of a Ray cluster: how they are reached, and how parts of a run's work get to them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resvit_engines.errors import ExitCode, ResvitError, first_line
from resvit_engines.version import own_version
from resvit_export.sweep.divide import divide
from resvit_export.sweep.part import Part, Spread, T
from resvit_export.sweep.store import RunStore

if TYPE_CHECKING:
    from resvit_export.run import Run

LOCAL = "local"
AGAIN = 2
"""How often what a worker did that died is begun anew."""
_CLUSTER = re.compile(r"ray://[A-Za-z0-9._\[\]:-]+:([0-9]{1,5})")
_PORT_MOST = 65535
_LIBRARIES = ("torch", "onnxruntime", "numpy", "onnx")
"""What computes: of other versions, runs are not the same byte for byte."""


class UnlikeWorkerError(ResvitError):
    """A worker that must not work: it has other versions, or does not see the runs."""


@contextlib.contextmanager
def cluster_at(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address``, or to ``local`` workers, for the length of the block.

    Raises:
        ResvitError: MISSING without Ray or where no cluster answers, INPUT for an address that is none.
    """
    cluster = _CLUSTER.fullmatch(address)
    if address != LOCAL and not (cluster and 1 <= int(cluster[1]) <= _PORT_MOST):
        raise ResvitError(
            f"There is no Ray cluster {address!r}.", "Name it as ray://HOST:PORT, port 10001 as a rule, or say local."
        )
    if importlib.util.find_spec("ray") is None:
        raise ResvitError("Ray is not installed.", "pip install 'resvit-export[ray]'", ExitCode.MISSING)
    import ray

    settings: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said by what it raises
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        raise ResvitError(
            f"The Ray cluster {address} cannot be used: {first_line(error)}",
            "Begin one with 'ray start --head', with the same Python and Ray, and set RAY_AUTH_MODE=token where it "
            "asks for a token; or use --on local.",
            ExitCode.MISSING,
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def by_workers(run: Run, address: str) -> Iterator[None]:
    """Within the block parts of a run's work are done by the workers of a cluster that see its folder.

    Raises:
        ResvitError: as ``cluster_at``; INPUT where a worker has other versions or does not see the folder, MISSING
            where it cannot begin.
    """
    with cluster_at(address) as ray:
        folder, versions = run.folder.path.absolute(), versions_here()
        try:
            ray.get(ray.remote(num_cpus=1, max_retries=AGAIN)(require_same).remote(folder.parent, versions))
        except ray.exceptions.RayError as error:
            if isinstance(cause := getattr(error, "cause", None), UnlikeWorkerError):
                raise cause from error
            raise ResvitError(
                f"A worker of the Ray cluster {address} cannot begin: {first_line(error)}",
                "Install the same Python, Ray and resvit-export on all of its machines.",
                ExitCode.MISSING,
            ) from error
        divide(run, folder.name, spread_over(ray, folder.parent, versions), workers_of(ray))
        yield
    run.division = None


def workers_of(ray: Any) -> int:
    """Cores of the cluster: as many parts are worked on at once."""
    return max(int(ray.cluster_resources().get("CPU", 1)), 1)


def idle_of(ray: Any) -> int:
    """Cores that nothing works on."""
    return int(ray.available_resources().get("CPU", 0))


def spread_over(ray: Any, place: Path | RunStore, versions: Mapping[str, str]) -> Spread:
    """Has parts done by the cluster's workers, which see ``place``.

    What a worker did that died is begun anew, and what is lost all the same is left out, as is what failed: who asked
    does it again, and tells what is wrong. Raises ``UnlikeWorkerError``.
    """
    work = ray.remote(num_cpus=1, max_retries=AGAIN)(_part_on_a_worker)

    def spread(parts: Sequence[Part[T]]) -> Iterator[tuple[int, T]]:
        waiting = {work.remote(part, place, versions): index for index, part in enumerate(parts)}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            index = waiting.pop(ready)
            try:
                found = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UnlikeWorkerError):
                    raise error.cause from error
            except ray.exceptions.RayError:
                pass
            else:
                yield index, found

    return spread


def _part_on_a_worker(part: Part[T], place: Path | RunStore, versions: Mapping[str, str]) -> T:
    require_same(place, versions)
    return part.done(place)


def versions_here() -> dict[str, str]:
    """The versions of ours and of what computes, by name; empty of what is not installed."""
    found = {"resvit-export": own_version()}
    for name in _LIBRARIES:
        found[name] = ""
        for distribution in (name, f"{name}-gpu"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = found[name] or importlib.metadata.version(distribution)
    return found


def require_same(place: Path | RunStore, versions: Mapping[str, str]) -> None:
    """Refuse a worker with other versions, and one that does not see the folder of the runs."""
    for name, here in versions_here().items():
        if here != versions.get(name):
            raise UnlikeWorkerError(
                f"A worker has {name} {here or 'not at all'}, and this machine {versions.get(name) or 'not at all'}.",
                "Install the same on all of them.",
            )
    if isinstance(place, Path) and not place.is_dir():
        raise UnlikeWorkerError(
            f"A worker does not see the folder {place}.",
            "Name a folder that all machines share, or for a sweep a store: s3://BUCKET/FOLDER.",
        )
