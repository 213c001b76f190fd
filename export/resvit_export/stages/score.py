"""The stages ``reference``, ``baseline`` and ``score``: what each network answers on the validation images.

The original network in PyTorch, the float ONNX and the ONNX that ships are asked together, batch by batch, so that each
image is decoded once; what is there already, from another target or another limit of the gate, is not asked again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from resvit_engines.bundle.parts import GoldenFiles
from resvit_engines.files import pretty_json
from resvit_engines.pictures.sizes import SizeRange
from resvit_engines.progress import Reporter
from resvit_engines.records import Record
from resvit_export.loading.source import NetworkSource
from resvit_export.run import Run
from resvit_export.stage import Artifact, File, Stage
from resvit_export.stages.export import Exported
from resvit_export.stages.prune import Pruned
from resvit_export.task_choice import Questions, TaskChoice

if TYPE_CHECKING:
    from resvit_calibrate.answers.base import Answers
    from resvit_calibrate.answers.parts import Parts
    from resvit_calibrate.runtime.runner import OnnxRunner, Runner
    from resvit_calibrate.runtime.sessions import Arrays

ANSWERS = "answers.npz"
READS = "reads.json"
GOLDEN = "golden.json"
_OF_EACH_SIZE = 8
"""Validation images of each size beside the usual one, of which golden ones are chosen."""
_WORSE_DB = 6.0
_CHECKED_IMAGES = 4
"""Images on which ONNX Runtime's optimised graph is held against the graph as written."""


@dataclass(frozen=True)
class Answered(Artifact):
    """``answers.npz``: all that is kept of one network's answers; ``reads.json``: what the user's metric read."""

    def outdated(self) -> str | None:
        """A file, folder or variable that the metric read and that is not the same now."""
        from resvit_calibrate.readers.user.code import changed_since

        return changed_since(self.json(READS)) if self.has(READS) else None

    def answers(self, task: TaskChoice) -> Answers:
        """Read them."""
        return self.file(ANSWERS).read(task.task().load)


@dataclass(frozen=True)
class Asked(Stage[Answered]):
    """One network that is asked. ``title`` is what people read of it."""

    questions: Questions

    @property
    def title(self) -> str:
        """What people read of it."""
        return self.name

    def asks(self, reporter: Reporter) -> Runner:
        """The network as a function from arrays to arrays."""
        raise NotImplementedError

    def runner(self, folder: Path, reporter: Reporter) -> Runner:
        """The same; it may write more into the stage's folder."""
        del folder
        return self.asks(reporter)

    def fill(self, folder: Path, reporter: Reporter) -> None:
        """Ask this network alone."""
        ask_together([(self, folder)], reporter, {})


def ask_together(
    missing: Sequence[tuple[Stage[Answered], Path]], reporter: Reporter, stores: Mapping[str, Parts]
) -> None:
    """Ask several networks the same questions, each batch decoded once; write each one's answers into its folder.

    ``stores`` by title hold what was answered before a kill, and get what is answered now.
    """
    asked = [(stage, folder) for stage, folder in missing if isinstance(stage, Asked)]
    questions = asked[0][0].questions
    runners = {stage.title: stage.runner(folder, reporter) for stage, folder in asked}
    task = questions.task.task()
    answers = task.answers_of(runners, questions.images, questions.batch_size, reporter, stores)
    for stage, folder in asked:
        answers[stage.title].save(folder / ANSWERS)
        if task.reads is not None:
            (folder / READS).write_bytes(pretty_json(task.reads.digests))
    if task.reads is not None and task.reads.unseen:
        reporter.warn(
            f"The metric {task.metric} {' and '.join(sorted(task.reads.unseen))}: what is read there is not seen, and "
            "its scores are used again while the metric's own code, files and environment stay the same"
        )


@dataclass(frozen=True)
class AskReference(Asked):
    """What the original network predicts in PyTorch; the same for all targets."""

    name: ClassVar[str] = "reference"
    artifact: ClassVar[type[Artifact]] = Answered
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    source: NetworkSource

    @property
    def title(self) -> str:
        """What people read of it."""
        return "PyTorch"

    def asks(self, reporter: Reporter) -> Runner:
        """The original network."""
        return self.source.network(reporter).runner()


@dataclass(frozen=True)
class AskPruned(Asked):
    """What the pruned network predicts before anything is trained behind it."""

    name: ClassVar[str] = "pruned"
    artifact: ClassVar[type[Artifact]] = Answered
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    program: File

    def asks(self, reporter: Reporter) -> Runner:
        """The pruned program."""
        del reporter
        from resvit_export.loading.program.run import runner_from_program
        from resvit_export.loading.pt2 import program_from_pt2

        return runner_from_program(program_from_pt2(self.program.path))


@dataclass(frozen=True)
class AskFloat(Asked):
    """What the float ONNX predicts."""

    name: ClassVar[str] = "baseline"
    artifact: ClassVar[type[Artifact]] = Answered
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    model: File

    @property
    def title(self) -> str:
        """What people read of it."""
        return "ONNX float"

    def asks(self, reporter: Reporter) -> Runner:
        """The float ONNX."""
        del reporter
        from resvit_calibrate.runtime.runner import onnx_runner

        return onnx_runner(self.model.path)


@dataclass(frozen=True)
class Scored(Answered):
    """The answers of the ONNX that ships, and golden images with its outputs."""

    @functools.cached_property
    def golden(self) -> GoldenFiles:
        """Which file holds which golden array."""
        return GoldenFiles.from_json(self._record().record("files"))

    @property
    def runtime_note(self) -> str:
        """What is to be said of the runtime that computed the answers."""
        return self._record().text("note")

    def _record(self) -> Record:
        return Record(self.json(GOLDEN), GOLDEN)


@dataclass(frozen=True)
class AskQuantized(Asked):
    """What the ONNX that ships predicts. ``sets`` says that the graph selects its answers.

    ``floating`` is what was quantised: how far the two are apart tells how near an engine must come.
    """

    name: ClassVar[str] = "score"
    artifact: ClassVar[type[Artifact]] = Scored
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    model: File
    floating: File
    label: str
    sets: bool
    sizes: SizeRange | None
    """Those that the image may have: golden images are of all of them."""

    @property
    def title(self) -> str:
        """What people read of it."""
        return self.label

    def asks(self, reporter: Reporter) -> Runner:
        """The ONNX that ships, once the runtime has proven on known numbers that it quantises rightly."""
        return self._checked(reporter)[0]

    def _checked(self, reporter: Reporter) -> tuple[OnnxRunner, str, Arrays]:
        """What ``asks`` gives, what is to be said of it, and the first images."""
        from resvit_calibrate.answers.classes import INPUT
        from resvit_calibrate.runtime.runner import checked_runner
        from resvit_calibrate.runtime.selftest import self_test
        from resvit_export.golden_choice import CHOSEN_AMONG

        self_test()
        feeds = next(self.questions.images.batches(CHOSEN_AMONG)).feeds(INPUT)
        few = {name: value[:_CHECKED_IMAGES] for name, value in feeds.items()}
        runner, remark = checked_runner(self.model.path, few, sets=self.sets)
        if remark:
            reporter.warn(remark)
        return runner, remark, feeds

    def runner(self, folder: Path, reporter: Reporter) -> Runner:
        """The same; golden images and outputs are written on the way."""
        from resvit_calibrate.runtime.runner import onnx_runner
        from resvit_calibrate.runtime.selftest import runtime_note
        from resvit_export.golden_choice import choose_golden

        runner, remark, feeds = self._checked(reporter)
        floating = onnx_runner(self.floating.path)
        feeds, least = choose_golden(feeds, runner, floating, sets=self.sets)
        golden = write_golden(folder, runner.fed(feeds), answers_singly(runner, feeds), self.sets)
        golden = dataclasses.replace(golden, least_db=least)
        golden, said = self._of_other_sizes(folder, golden, feeds, runner, floating, reporter)
        document = {"files": golden.to_json(), "note": " ".join(filter(None, (runtime_note(), remark, said)))}
        (folder / GOLDEN).write_bytes(pretty_json(document))
        return runner

    def _of_other_sizes(
        self, folder: Path, golden: GoldenFiles, usual: Arrays, runner: OnnxRunner, floating: Runner, reporter: Reporter
    ) -> tuple[GoldenFiles, str]:
        """Add golden images of the other sizes, and say how near the float network all of them are."""
        from resvit_calibrate.answers.classes import INPUT
        from resvit_engines.rows import paired_rows
        from resvit_engines.run.golden_files import sqnr_db
        from resvit_export.golden_choice import choose_golden

        if self.sizes is None:
            return golden, ""
        others: list[GoldenFiles] = []
        near: dict[str, float] = {}
        for size in self.sizes.all:
            height, width = size
            feeds = usual
            if size != self.sizes.usual:
                images = self.questions.images.batches_in_sizes([size], _OF_EACH_SIZE)
                feeds, least = choose_golden(next(images).feeds(INPUT), runner, floating, sets=self.sets)
                named = f"golden_{height}x{width}"
                files = write_golden(folder, runner.fed(feeds), answers_singly(runner, feeds), self.sets, named)
                others.append(dataclasses.replace(files, least_db=least))
            expected, found = floating(feeds), runner(feeds)
            found = paired_rows(expected, found) if self.sets else found
            pairs = zip(expected.values(), found.values(), strict=True)
            ratios = [sqnr_db(true, value) for true, value in pairs if value.dtype.kind == "f"]
            near[f"{height}x{width}"] = min([math.inf, *(ratio for ratio in ratios if ratio is not None)])
        told = ", ".join(f"{ratio:.1f} dB at {size}" for size, ratio in near.items())
        first, *rest = near.values()
        if any(ratio < first - _WORSE_DB for ratio in rest):
            reporter.warn(f"quantisation costs more at one size than at the usual one: golden images have {told}")
        return dataclasses.replace(golden, at_sizes=tuple(others)), f"Golden images against the float ONNX: {told}."


def answers_singly(runner: Runner, feeds: Arrays) -> Arrays:
    """What ``runner`` answers to each image alone: an engine's batches must say the same of all of theirs."""
    count = len(next(iter(feeds.values())))
    found = [runner({name: value[index : index + 1] for name, value in feeds.items()}) for index in range(count)]
    return {
        name: np.concatenate([answer[name] for answer in found]) if first.shape[:1] == (1,) else first
        for name, first in found[0].items()
    }


def write_golden(
    folder: Path, feeds: Arrays, outputs: Arrays, sets: bool = False, named: str = "golden"
) -> GoldenFiles:
    """Write golden images and outputs as ``golden_input.npy``, ``golden_output.npy``, and ``…_1.npy`` and so on.

    ``named`` is what the files' names begin with.
    """
    from resvit_calibrate.answers.classes import INPUT

    first = "logits" if "logits" in outputs else next(iter(outputs))
    files = {first: f"{named}_output.npy"}
    files |= {name: f"{named}_output_{i}.npy" for i, name in enumerate((n for n in outputs if n != first), 1)}
    beside = {name: f"{named}_input_{i}.npy" for i, name in enumerate((n for n in feeds if n != INPUT), 1)}
    np.save(folder / f"{named}_input.npy", feeds[INPUT])
    for name, file in beside.items():
        np.save(folder / file, feeds[name])
    for name, file in files.items():
        value = outputs[name]
        np.save(folder / file, value.astype(np.float32) if value.dtype.kind == "f" else value)
    several = files if len(files) > 1 else {}
    return GoldenFiles(f"{named}_input.npy", f"{named}_output.npy", beside, several, sets)


def answers_of(
    run: Run,
    questions: Questions,
    exported: Exported,
    pruned: Pruned | None,
    model: File,
    floating: File,
    label: str,
) -> dict[str, Answered]:
    """What every network of a run answers, by stage: what is there is read, the rest is asked together.

    ``label`` is what people read of ``model``, which ships.
    """
    from resvit_calibrate.answers.parts import Parts

    asked: list[Asked] = [AskFloat(questions, exported.model)]
    asked += [] if run.network.from_onnx else [AskReference(questions, run.network)]
    asked += [AskPruned(questions, pruned.program)] if pruned else []
    how = (label, exported.report.selects_rows, exported.network.sizes)
    asked.append(AskQuantized(questions, model, floating, *how))
    stores = {stage.title: Parts(*run.folder.unfinished(stage)) for stage in asked}
    missing = [stage for stage in asked if not run.folder.has(stage)]
    if missing and run.division is not None and not run.folder.looks_only:
        run.division.answer(run, missing, stores)
    artifacts = run.folder.do_together(asked, lambda missing: ask_together(missing, run.reporter, stores))
    for store in stores.values():
        store.remove()
    return {artifact.stage: artifact for artifact in artifacts}


def shipped_in(answered: Mapping[str, Answered]) -> Scored:
    """Of all answers, those of the ONNX that ships."""
    scored = answered[AskQuantized.name]
    assert isinstance(scored, Scored)
    return scored
