"""A validation that is killed goes on where it stopped, and ends with the very bytes of one that was not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resvit_calibrate.answers import base
from resvit_calibrate.answers.parts import FOLDERS_MOST, Parts
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import DepthTarget, MaskTarget, TextTarget
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.errors import ResvitError
from resvit_engines.progress import Lines, Silent
from resvit_export.cli.main import run
from task_images import SIZE, Images, detector, network, scenes
from test_robustness import MODEL

COUNT, BATCH = 70, 8
KEY = "0" * 64


def cases() -> dict[str, Callable[[], tuple]]:
    random = np.random.default_rng(0)

    def detection():
        known = scenes(random, COUNT)
        return task_named("detection", {}), Images(known, classes=4), detector(random, known)

    def segmentation():
        masks = [MaskTarget(random.integers(-1, 3 + i // 30, SIZE).astype(np.int16)) for i in range(COUNT)]
        return task_named("segmentation", {}), Images(masks), {"m": random.normal(size=(COUNT, 5, *SIZE)).astype("f4")}

    def class_maps():
        masks = [MaskTarget(random.integers(0, 3 + i // 30, SIZE).astype(np.int16)) for i in range(COUNT)]
        return task_named("segmentation", {}), Images(masks, classes=5), {"m": random.integers(0, 5, (COUNT, *SIZE))}

    def depth():
        known = [DepthTarget(random.uniform(0, 9, SIZE).astype(np.float32)) for _ in range(COUNT)]
        return task_named("depth", {}), Images(known), {"d": random.uniform(1, 9, (COUNT, *SIZE)).astype(np.float32)}

    def text():
        known = [TextTarget("".join(random.choice(list("abcdefgh"), 4))) for _ in range(COUNT)]
        outputs = {"t": random.normal(size=(COUNT, 12, 9)).astype(np.float32)}
        return task_named("text", {"characters": "abcdefgh"}), Images(known), outputs

    def labelled(task, **outputs):
        return task_named(task, {}), Images(None, labels=np.arange(COUNT) % 6), outputs

    return {
        "classification": lambda: labelled("classification", logits=random.normal(size=(COUNT, 6)).astype("f4")),
        "embedding": lambda: labelled("embedding", e=random.normal(size=(COUNT, 16)).astype("f4")),
        "other": lambda: labelled("other", a=random.normal(size=(COUNT, 5, 7)), b=random.normal(size=(COUNT, 3))),
        "detection": detection,
        "segmentation": segmentation,
        "class maps": class_maps,
        "depth": depth,
        "text": text,
    }


def saved(answers, path: Path) -> bytes:
    answers.save(path)
    return path.read_bytes()


def stores(folder: Path, *names: str) -> dict[str, Parts]:
    return {name: Parts(folder / name, KEY) for name in names}


def counted(runner, after: int | None = None, at_death: Callable[[], object] = lambda: None):
    """The network, interrupted when it is asked about more than ``after`` batches; and how many images it was asked."""
    asked: list[int] = []

    def run_it(arrays):
        if len(asked) == after:
            at_death()
            raise KeyboardInterrupt
        asked.append(len(arrays["input"]))
        return runner(arrays)

    return run_it, asked


@pytest.mark.parametrize("kind", cases())
@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["killed", "interrupted"])
def test_every_task_goes_on_to_the_same_bytes(kind, seconds, tmp_path, monkeypatch) -> None:
    task, images, outputs = cases()[kind]()
    runner = network(**outputs)
    whole = saved(task.answers(runner, images, BATCH), tmp_path / "whole.npz")
    monkeypatch.setattr(base, "PART_SECONDS", seconds)
    place, left = tmp_path / "parts", tmp_path / "left"
    # What lies there when it is killed; what an interrupted one writes at its end comes after that.
    dies, asked = counted(runner, 3, lambda: shutil.copytree(place, left) if seconds == 0 else None)
    with pytest.raises(KeyboardInterrupt):
        task.answers_of({"net": dies}, images, BATCH, stores=stores(place, "net"))
    assert sum(asked) == 3 * BATCH
    rest, again = counted(runner)
    found = task.answers_of({"net": rest}, images, BATCH, stores=stores(left if seconds == 0 else place, "net"))["net"]
    assert sum(again) == COUNT - 3 * BATCH
    assert saved(found, tmp_path / "resumed.npz") == whole


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.began: list[int] = []

    def track(self, items, what, total, weight=1, before=0):
        self.began.append(before)
        yield from items

    def say(self, text: str) -> None:
        self.lines.append(text)


def classified() -> tuple:
    task, images, outputs = cases()["classification"]()
    return task, images, network(**outputs)


def begun(task, images, runners, place: Path, after: int = 3) -> None:
    """Ask ``runners`` about the first ``after`` batches, and be interrupted."""
    first, *rest = runners
    dies = {first: counted(runners[first], after)[0], **{name: runners[name] for name in rest}}
    with pytest.raises(KeyboardInterrupt):
        task.answers_of(dies, images, BATCH, stores=stores(place, *runners))


def test_it_says_where_it_goes_on_and_the_bar_starts_there(tmp_path) -> None:
    task, images, runner = classified()
    begun(task, images, {"net": runner}, tmp_path)
    heard = Heard()
    task.answers_of({"net": runner}, images, BATCH, heard, stores(tmp_path, "net"))
    assert heard.began == [24]
    assert heard.lines == ["validate goes on where it was stopped: 24 of 70 images are answered"]


def test_a_line_of_progress_counts_what_was_done_before_and_not_its_rate(capsys, monkeypatch) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    assert list(Lines().track(range(3), "validate", 80, 10, 40)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "validate: 50/80, 0.5/s, 60 s left"
    assert lines[-1].startswith("validate: 70/80 in")


def test_a_network_that_comes_later_is_asked_alone(tmp_path) -> None:
    """Another quantisation after a kill: the float networks keep what they have answered."""
    task, images, runner = classified()
    begun(task, images, {"float": runner}, tmp_path)
    before, asked = counted(runner)
    fresh, all_of_it = counted(runner)
    found = task.answers_of({"float": before, "new": fresh}, images, BATCH, stores=stores(tmp_path, "float", "new"))
    assert (sum(asked), sum(all_of_it)) == (COUNT - 24, COUNT)
    assert np.array_equal(found["float"].logits, found["new"].logits)


def test_networks_killed_between_two_writes(tmp_path) -> None:
    task, images, runner = classified()
    begun(task, images, {"a": runner, "b": runner}, tmp_path)
    shutil.rmtree(tmp_path / "b")
    one, asked = counted(runner)
    two, others = counted(runner)
    task.answers_of({"a": one, "b": two}, images, BATCH, stores=stores(tmp_path, "a", "b"))
    assert (sum(asked), sum(others)) == (COUNT - 24, COUNT)


def record(place: Path, **changes) -> None:
    path = place / "net" / "000000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "answers are cut": lambda place: (place / "net" / "000000000.npz").write_bytes(b"PK"),
    "answers are gone": lambda place: (place / "net" / "000000000.npz").unlink(),
    "a record that is no JSON": lambda place: (place / "net" / "000000000.json").write_text("{"),
    "another key": lambda place: record(place, key="1" * 64),
    "more images than answers": lambda place: record(place, last=32),
    "an end before its begin": lambda place: record(place, last=0),
    "another digest": lambda place: record(place, sha256="2" * 64),
    "a place that is none": lambda place: record(place, left_out={"-1": "broken"}),
    "a file that the metric read": lambda place: record(place, reads={"file:/nowhere/x": "3" * 64}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_parts_that_cannot_be_trusted_are_asked_again(damage, tmp_path) -> None:
    task, images, runner = classified()
    begun(task, images, {"net": runner}, tmp_path)
    DAMAGE[damage](tmp_path)
    again, asked = counted(runner)
    found = task.answers_of({"net": again}, images, BATCH, stores=stores(tmp_path, "net"))["net"]
    assert sum(asked) == COUNT
    assert np.array_equal(found.logits, task.answers(runner, images, BATCH).logits)


def test_a_part_in_the_middle_that_is_damaged_loses_only_what_is_behind_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(base, "PART_SECONDS", 0.0)
    task, images, runner = classified()
    begun(task, images, {"net": runner}, tmp_path, after=5)
    (tmp_path / "net" / "000000016.npz").write_bytes(b"")
    again, asked = counted(runner)
    task.answers_of({"net": again}, images, BATCH, stores=stores(tmp_path, "net"))
    assert sum(asked) == COUNT - 16


def test_the_users_metric_keeps_its_scores_and_what_it_read(tmp_path) -> None:
    table = tmp_path / "table.txt"
    table.write_text("0.5")
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        f"def near(outputs, labels):\n    return np.full(len(labels), float(Path({str(table)!r}).read_text()))\n"
    )
    _, images, runner = classified()

    def own():
        return task_named("other", {}, f"{tmp_path / 'own.py'}:near")

    begun(own(), images, {"net": runner}, tmp_path)
    task = own()
    again, asked = counted(runner)
    task.answers_of({"net": again}, images, BATCH, stores=stores(tmp_path, "net"))
    assert sum(asked) == COUNT - 24
    assert f"file:{table}" in task.reads.digests
    table.write_text("0.7")
    again, asked = counted(runner)
    found = own().answers_of({"net": again}, images, BATCH, stores=stores(tmp_path, "net"))["net"]
    assert sum(asked) == COUNT
    assert set(found.scores) == {0.7}


def test_pictures_that_break_while_they_are_decoded_are_left_out_again(tmp_path) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(120):
            image = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
            image.save(tmp_path / "data" / name / f"{number:03}.png")
    cut = tmp_path / "data" / "a" / "003.png"
    cut.write_bytes(cut.read_bytes()[:400])

    def opened():
        spec = DataSpec(str(tmp_path / "data"), calibration_images=4)
        return open_image_sets(spec, Preprocess((16, 16), 3))[1]

    def runner(arrays):
        return {"logits": arrays["input"].mean(axis=(2, 3))}

    task, images = task_named("classification", {}), opened()
    assert images.contents == opened().contents
    broken = next((i for i in range(len(images)) if images._pixels.title(list(images._looks)[i]) == "a/003.png"), None)
    assert broken is not None  # of 240 pictures 236 are for validation; the seed leaves this one there
    whole = saved(task.answers(runner, images, BATCH), tmp_path / "whole.npz")
    begun(task, opened(), {"net": runner}, tmp_path / "parts", after=20)
    images = opened()
    again, asked = counted(runner)
    found = task.answers_of({"net": again}, images, BATCH, stores=stores(tmp_path / "parts", "net"))["net"]
    assert sum(asked) == 235 - 160
    assert saved(found, tmp_path / "resumed.npz") == whole
    assert len(images.skipped) == 1
    assert images.left_out == {broken: images.left_out[broken]}


def test_no_more_than_some_unfinished_validations_are_kept(tmp_path) -> None:
    task, images, runner = classified()
    for number in range(FOLDERS_MOST + 3):
        begun(task, images, {f"net{number}": runner}, tmp_path, after=1)
    assert len(list(tmp_path.iterdir())) == FOLDERS_MOST
    assert (tmp_path / f"net{FOLDERS_MOST + 2}").exists()


def test_a_full_disk_does_not_hide_what_ended_it(tmp_path) -> None:
    task, images, runner = classified()
    (tmp_path / "net").write_text("no folder")
    dies, _ = counted(runner, 2)
    with pytest.raises(KeyboardInterrupt):
        task.answers_of({"net": dies}, images, BATCH, stores=stores(tmp_path, "net"))


SOON = """
import sys
from resvit_calibrate.answers import base
base.PART_SECONDS = 0.0
from resvit_export.cli.main import main
sys.argv[0] = "resvit-export"
main()
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_verdict(workspace: Path, seeded: Callable[..., str]) -> None:
    before = ("fold", "export", "preprocessing", "estimate", "calibrate", "quantize")
    seeded("runs/killed", "jetson-orin", stages=before)
    command = ["validate", *MODEL, "--target", "jetson-orin", "--data", "fashion-mnist", "--run", "runs/killed"]
    process = subprocess.Popen([sys.executable, "-c", SOON, *command], stderr=subprocess.PIPE)
    place = Path("runs/killed/unfinished")
    while process.poll() is None and len(list(place.glob("*/*.json"))) < 9:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(list(place.iterdir())) == 3
    again = [sys.executable, "-m", "resvit_export", *command]
    done = subprocess.run(again, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "validate goes on where it was stopped: " in done.stderr
    assert not place.exists()
    seeded("runs/whole", "jetson-orin", stages=before)
    assert run([*command[:-1], "runs/whole", "--quiet"]) == 0
    verdicts = [
        next(Path(folder).glob("validate-*/verdict.json")).read_bytes() for folder in ("runs/killed", "runs/whole")
    ]
    assert verdicts[0] == verdicts[1]
    for name in ("reference", "baseline", "score"):
        answers = [next(Path(f"runs/{run}").glob(f"{name}-*/answers.npz")).read_bytes() for run in ("killed", "whole")]
        assert answers[0] == answers[1]


def test_what_cannot_be_judged_is_said_at_the_end_not_in_the_middle(tmp_path, monkeypatch) -> None:
    """The first part of an embedding's images may show each class once."""
    monkeypatch.setattr(base, "PART_SECONDS", 0.0)
    vectors = network(e=np.eye(16, dtype=np.float32))
    task = task_named("embedding", {})
    task.answers_of({"net": vectors}, Images(None, labels=np.arange(16) // 2), 1, stores=stores(tmp_path, "net"))
    with pytest.raises(ResvitError, match="No class has two images"):
        task.answers_of({"net": vectors}, Images(None, labels=np.arange(16)), 1)
