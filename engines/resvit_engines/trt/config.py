"""What a builder's configuration gets beside ``trt_api.configure``: who watches the build, and its timing cache."""

from __future__ import annotations

from typing import Any, Protocol


class Watcher(Protocol):
    """Who is told how far a build is."""

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, within ``parent`` where there is one."""
        ...

    def stepped(self, phase: str, step: int) -> bool:
        """Step ``step`` (from 0) of the phase is done; False stops the build."""
        ...

    def finished(self, phase: str) -> None:
        """The phase is over, with all its steps or without."""
        ...


def watch(trt: Any, config: Any, watcher: Watcher) -> None:
    """Have the builder report its phases and steps to ``watcher``, which may stop it (TensorRT's IProgressMonitor)."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watcher.started(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watcher.stepped(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watcher.finished(phase_name)

    config.progress_monitor = Monitor()


def use_timing_cache(config: Any, content: bytes) -> bool:
    """Start from a timing cache, b"" for an empty one; False where TensorRT rejects it and starts from an empty one."""
    if content and _set_cache(config, content):
        return True
    _set_cache(config, b"")
    return not content


def _set_cache(config: Any, content: bytes) -> bool:
    cache = config.create_timing_cache(content)
    # False: a cache of another TensorRT or device is refused rather than mixed in.
    return cache is not None and bool(config.set_timing_cache(cache, False))


def timing_cache_of(config: Any, other: bytes = b"") -> bytes:
    """What the builder has timed, serialised, together with ``other`` where the two go together."""
    cache = config.get_timing_cache()
    if other and (more := config.create_timing_cache(other)) is not None:
        cache.combine(more, False)
    return bytes(cache.serialize())
