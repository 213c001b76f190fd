"""The stages ``timings`` and ``tune``: variants of the placement timed where they will run, and the choice.

The search asks for times through one interface (``region_search.Ways``). It is answered by this machine, where it
is the target, or by a device over SSH; both build an engine of every variant and time all of them in turns.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from resvit_engines.bench.bench import BenchSettings
from resvit_engines.bench.compare import Ratio
from resvit_engines.bench.variants import Opening, VariantTimes, time_variants
from resvit_engines.builder.builder import build_engine, builds_here
from resvit_engines.builder.settings import BuildSettings
from resvit_engines.bundle.bundle import write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import pretty_json
from resvit_engines.keys.own import own_key
from resvit_engines.machine import this_machine
from resvit_engines.progress import SILENT, Reporter
from resvit_engines.records import Record
from resvit_engines.run.runner import open_built, why_not_here
from resvit_engines.targets.table import Target
from resvit_export.records.place import Place
from resvit_export.run_folder import RunFolder, read_record
from resvit_export.stage import Artifact, File, Stage, plain
from resvit_export.to_tensorrt.copy import onnx_for_tensorrt

RESULT = "timings.json"
CHOICE = "tune.json"
MEASURED = "measured-times.json"
_WARM_UP = 0.1


@dataclass(frozen=True)
class Timings(Artifact):
    """``timings.json``: ms a call of every variant round by round, and how the machine stood.

    ``layers-N.json`` is TensorRT's own list of the layers of variant N, where the engine was built by it.
    """

    @functools.cached_property
    def times(self) -> VariantTimes:
        """What was measured, by the variants' names."""
        record = Record(self.json(RESULT), RESULT)
        return VariantTimes.from_json(record.record("times")).renamed(
            {f"v{number}": name for number, name in enumerate(record.texts("names"))}
        )

    def layers_of(self, name: str) -> File | None:
        """TensorRT's list of a variant's layers; None where there is none."""
        number = Record(self.json(RESULT), RESULT).texts("names").index(name)
        return self.file(f"layers-{number}.json") if self.has(f"layers-{number}.json") else None

    def ratio(self, slower: str, faster: str) -> Ratio:
        """How many times as fast ``faster`` is, with its interval of 95%."""
        return self.times.ratio(slower, faster)

    def median_ms(self, name: str) -> float:
        """The median over rounds."""
        return self.times.median_ms(name)

    @property
    def remarks(self) -> tuple[str, ...]:
        """How clocks stood, where anything tells, and what speaks against trusting the times."""
        clocks = self.times.before
        said = (f"Clocks: {clocks.sentence}.",) if clocks.sm_mhz or clocks.locked is not None else ()
        return (*said, *self.times.remarks)


@dataclass(frozen=True)
class Candidate:
    """One variant: the ONNX that would ship, and how its engine is built."""

    model: File
    settings: BuildSettings


@dataclass(frozen=True)
class TimeVariants(Stage[Timings]):
    """Time variants of a network in turns, the first the baseline.

    ``place`` is where, ``rounds`` how often, and ``seconds`` how long each is timed in all rounds together.
    """

    name: ClassVar[str] = "timings"
    artifact: ClassVar[type[Artifact]] = Timings

    variants: Mapping[str, Candidate]
    target: Target
    place: Place
    rounds: int
    seconds: float

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Build an engine of every variant, time all of them, and keep the numbers alone."""
        # Within the run: what a kill leaves behind, the next command in the run removes.
        with tempfile.TemporaryDirectory(prefix="engines-", dir=folder) as scratch:
            models = dict(self._models(Path(scratch)))
            if self.place.address is None:
                times = self._timed_here(models, Path(scratch), folder, reporter)
            else:
                times = self._timed_there(models, Path(scratch), folder, reporter)
        document = {"names": list(self.variants), "times": times.to_json()}
        (folder / RESULT).write_bytes(pretty_json(document))

    def _models(self, scratch: Path) -> Iterator[tuple[str, tuple[Path, BuildSettings]]]:
        """What the builder reads of each variant, by number."""
        for number, variant in enumerate(self.variants.values()):
            variant.model.require_unchanged()
            model, copy, plugins = variant.model.path, scratch / f"v{number}.onnx", variant.settings.plugins
            if not self.target.on_cpu and onnx_for_tensorrt(model, copy, self.target, plugins):
                model = copy
            yield f"v{number}", (model, variant.settings)

    def _timed_here(
        self, models: Mapping[str, tuple[Path, BuildSettings]], scratch: Path, folder: Path, reporter: Reporter
    ) -> VariantTimes:
        openings: dict[str, Opening] = {}
        for number, (name, (model, settings)) in enumerate(models.items()):
            engine = scratch / f"{name}.plan"
            if not self.target.on_cpu:
                reporter.say(f"Variant {number + 1} of {len(models)}")
            report = build_engine(model, engine, self.target, settings, SILENT if self.target.on_cpu else reporter)
            openings[name] = functools.partial(open_built, engine, report.sha256, report, model)
            if report.layers is not None:
                (folder / f"layers-{number}.json").write_bytes((scratch / report.layers).read_bytes())
        return time_variants(openings, self._bench(), self.rounds, reporter, on_gpu=not self.target.on_cpu)

    def _timed_there(
        self, models: Mapping[str, tuple[Path, BuildSettings]], scratch: Path, folder: Path, reporter: Reporter
    ) -> VariantTimes:
        """Send every variant as a bundle that this machine's own key signs, for this one job."""
        from resvit_engines.remote.device import Device, RemoteTiming
        from resvit_engines.remote.ssh import Connection, address_from

        key, bundles = own_key(), []
        for name, (model, settings) in models.items():
            bundles.append(scratch / f"{name}.resvit")
            write_bundle(bundles[-1], Manifest(name, target=self.target, build=settings), {"model.onnx": model}, key)
        job = RemoteTiming(bundles, key.public.to_text(), self.rounds, self.seconds, self.place.rehearse)
        with Connection(address_from(str(self.place.address)), reporter) as connection:
            device = Device(connection, reporter)
            result = device.time(job)
            for file in device.fetch_layers(job, scratch):
                (folder / f"layers-{file.stem.removeprefix('v')}.json").write_bytes(file.read_bytes())
            device.forget(job)
        if set(result.times.names) != set(models):
            raise ResvitError(
                f"{self.place.address} timed {len(result.times.names)} of {len(models)} variants.",
                "Nothing of it was used. Run the same command again.",
            )
        return result.times

    def _bench(self) -> BenchSettings:
        batch = next(iter(self.variants.values())).settings.batch[1]
        return BenchSettings(batch=batch, seconds=self.seconds, warmup=_WARM_UP)


@dataclass(frozen=True)
class Tuned(Artifact):
    """``tune.json``, and ``measured-times.json`` where the device told the time of every layer."""

    @property
    def precisions(self) -> Mapping[str, str]:
        """What the chosen variant computes otherwise than the plain placement, by product."""
        return self._choice.texts_by_name("precisions")

    @property
    def lines(self) -> tuple[str, ...]:
        """What was found, for people."""
        return self._choice.texts("sentences")

    @property
    def speed(self) -> tuple[Ratio, float, float] | None:
        """How many times as fast as in floats it was measured to be, and the ms of both; None where it is in floats."""
        return _ratio_and_ms(self._choice.optional("faster", self._choice.record), self._choice)

    @property
    def best(self) -> tuple[Ratio, float, float] | None:
        """The same of the fastest placement that was tried, where none is faster than floats; None elsewhere."""
        best = self._choice.optional("best", self._choice.record)
        return _ratio_and_ms(best, best)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What speaks against trusting the times, and how clocks stood."""
        record = self._choice
        return record.optional("remarks", record.texts) or ()

    @property
    def _choice(self) -> Record:
        """``tune.json``, read anew: a file that was damaged since is not believed."""
        return Record(self.json(CHOICE), CHOICE)

    @property
    def measured_times(self) -> File | None:
        """Layer times, as ``--measured-times`` takes them; None where none were told."""
        return self.file(MEASURED) if self.has(MEASURED) else None


def _ratio_and_ms(ratio: Record | None, times: Record | None) -> tuple[Ratio, float, float] | None:
    """A ratio, and the two times that ``times`` holds, in ms; None without them."""
    if ratio is None or times is None:
        return None
    one, floats = times.numbers("ms", 0)
    return Ratio.from_json(ratio), one, floats


@dataclass(frozen=True)
class Tune(Stage[Tuned]):
    """Write down what was chosen for the ``plain`` placement, and what it rests on; ``sentences`` are for people.

    ``faster`` is how many times as fast as in floats it is, and ``ms`` what both take; None where it is in floats.
    ``best`` is then the same of the fastest that was tried: ``value``, ``low``, ``high`` and ``ms``. ``remarks`` are
    the sentences that speak of how it was measured. ``layer_times`` are microseconds by layer and precision, empty
    where the runtime tells none.
    """

    name: ClassVar[str] = "tune"
    artifact: ClassVar[type[Artifact]] = Tuned

    plain: File
    effort: str
    place: Place
    regions: tuple[Mapping[str, Any], ...]
    precisions: Mapping[str, str]
    sentences: tuple[str, ...]
    faster: Mapping[str, float] | None
    ms: tuple[float, float] | None
    best: Mapping[str, Any] | None
    remarks: tuple[str, ...]
    layer_times: Mapping[str, Mapping[str, float]]

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Write ``tune.json``, and the times of layers."""
        del reporter
        document: dict[str, Any] = {
            "regions": list(self.regions),
            "precisions": dict(self.precisions),
            "place": self.place.facts,
            "faster": self.faster,
            "ms": self.ms,
            "best": self.best,
            "remarks": list(self.remarks),
            "sentences": list(self.sentences),
        }
        (folder / CHOICE).write_bytes(pretty_json(document))
        if self.layer_times:
            measured = {"device": self.place.title, "layers": self.layer_times}
            (folder / MEASURED).write_bytes(pretty_json(measured))


def finished_tuning(run: RunFolder, model: File, effort: str, place: Place | None) -> Tuned | None:
    """The newest choice for a plain placement, by this effort; at ``place``, or wherever it was made where None."""
    for folder in sorted(run.path.glob("tune-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ResvitError):
            record = read_record(folder)
            wanted = {"plain": plain(model), "effort": effort}
            if place is not None:
                wanted["place"] = plain(place)
            if {name: record.value.get(name) for name in wanted} == wanted:
                found = Tuned(folder, record, reused=True)
                found.content(CHOICE)  # one that was changed since is none
                return found
    return None


def place_here(target: Target) -> Place | None:
    """This machine, where it is the target and can run its engines; None elsewhere."""
    if not builds_here(target) or why_not_here(target.builder, target.sm) is not None:
        return None
    return Place.of(this_machine(), target)


def place_there(address: str, target: Target, reporter: Reporter, *, rehearse: bool) -> Place:
    """The device at ``address``, with what it takes to build and time engines there installed.

    Raises:
        ResvitError: as connecting and installing do.
    """
    from resvit_engines.remote.device import Device
    from resvit_engines.remote.ssh import Connection, address_from
    from resvit_engines.remote.wheelhouse import chosen_wheels

    with Connection(address_from(address), reporter) as connection:
        device = Device(connection, reporter)
        device.prepare(device.machine(), chosen_wheels(), on_cpu=target.on_cpu)
        return Place.of(device.machine(installed=True), target, address, rehearse=rehearse)


def not_measurable(target: Target) -> ResvitError:
    """Why nothing is tuned where nothing can be timed."""
    return ResvitError(
        f"--tune times variants of the engine on the {target.title} itself, and this machine is none.",
        "Say --device ssh://USER@HOST, or leave --tune out.",
        ExitCode.IMPOSSIBLE,
    )
