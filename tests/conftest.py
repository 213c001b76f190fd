from __future__ import annotations

import fcntl
import gzip
import os
import re
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from resvit_calibrate.readers.scenes import _items

ROOT = Path(__file__).parent.parent
CHECKPOINT = Path(__file__).parent / "assets" / "embed-nano.pt"
"""Trained by examples/fashion_mnist/train.py with its default seed."""

os.environ.setdefault("OMP_NUM_THREADS", "1")

# No limit of time in any test; the same examples in every run, so that a failure is there again.
settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")

# Each parallel worker keeps to a core of its own: thread pools that share cores spend their time waiting.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(worker.removeprefix("gw")) % len(_cores)]})


LONGEST = (
    "test_examples",
    "test_fusion_families",
    "test_pipeline",
    "test_export",
    "test_remote_job",
    "test_fleet_ssh",
    "test_last_mile",
    "test_fusion_models",
    "test_readme",
    "test_hugging_face",
    "test_pruning_pipeline",
    "test_searching",
    "test_task_pipeline",
    "test_robustness",
    "test_recover",
    "test_plugin_pipeline",
    "test_audit_command",
    "test_models_elsewhere",
    "test_install_faults",
    "test_models",
    "test_sensitivity",
)
"""The modules that take the longest, which go first, so that parallel workers end together.

While the first of them builds what many share (``finished_run``), those beside it need none of that: they would wait.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first, and leave the order within each as it is."""
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images uint8 [N, 28, 28] and labels [N] in the format that Fashion-MNIST comes in."""
    prefix = {"train": "train", "test": "t10k"}[split]
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">IIII", 2051, len(images), 28, 28) + images.tobytes())
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">II", 2049, len(labels)) + labels.astype(np.uint8).tobytes())


shortened = pytest.mark.parametrize(
    "limits",
    [["--validation-images", "600", "--max-drop", "3"], pytest.param([], marks=pytest.mark.slow)],
    ids=["short", "full"],
)
"""For builds whose verdict is not the subject: on as many images as a wider limit needs, and as a user would build."""


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder by name, filled by the first worker that asks for it and read by all of them; nobody writes there."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if worker else base

    def folder_of(name: str, fill: Callable[[Path], None]) -> Path:
        folder, partial = base / name, base / f"{name}.partial"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                fill(partial)
                partial.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def fashion_folder(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A small part of the real Fashion-MNIST: 1,000 training and 2,500 test images."""
    from resvit_calibrate.readers.fashion_mnist import read_split

    def fill(folder: Path) -> None:
        for split, count in (("train", 1000), ("test", 2500)):
            images, labels = read_split(split)
            write_idx(folder, split, images[:count], labels[:count])

    return made_once("fashion", fill)


DEMO = "--model resvit:embed-nano --checkpoint runs/demo/embed-nano.pt --data fashion-mnist"
"""The demo's network and its images, as the examples of every command name them."""


Stages = tuple[str, ...]
BEFORE_QUANTIZE = ("fold", "export", "calibrate", "baseline", "reference")
"""The stages that no precision changes."""


def copy_stages(run: Path, folder: Path, stages: Stages = ()) -> None:
    """Copy the finished stages of ``run``, or those named, into another run folder."""
    for finished in run.iterdir():
        if finished.is_dir() and (not stages or finished.name.partition("-")[0] in stages):
            shutil.copytree(finished, folder / finished.name, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def finished_run(made_once: Callable[[str, Callable[[Path], None]], Path], fashion_folder: Path) -> Callable[..., Path]:
    """The run folder of ``build`` for a target, with more arguments where there are any; to be read and copied only.

    With nothing but a target it is built from nothing. Otherwise what no precision changes is taken from there.
    """
    from resvit_export.cli.main import run

    def folder_of(target: str, *more: str) -> Path:
        def fill(folder: Path) -> None:
            demo_folder(folder)
            if more:
                for plain in ("jetson-orin", "rtx-4090"):
                    copy_stages(folder_of(plain), folder / "runs" / "embed-nano", BEFORE_QUANTIZE)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setenv("RESVIT_FASHION_MNIST", str(fashion_folder))
                _items.cache_clear()
                assert run(["build", "--quiet", "--target", target, *shlex.split(DEMO), *more]) == 0
                _items.cache_clear()

        return made_once(re.sub(r"\W+", "-", " ".join(("finished", target, *more))), fill) / "runs" / "embed-nano"

    return folder_of


@pytest.fixture
def seeded(finished_run: Callable[..., Path]) -> Callable[..., str]:
    """Copies finished stages of ``build`` into a run folder: what is unchanged there is not done again.

    Stages are keyed by content, so a stage whose settings differ is still done. A test that alters the code under a
    stage names those before it with ``stages``.
    """

    def seed(folder: str, *targets: str, stages: Stages = ()) -> str:
        for target in targets or ("jetson-orin",):
            copy_stages(finished_run(target), Path(folder), stages)
        return folder

    return seed


def demo_folder(folder: Path) -> None:
    """A working folder as ``make demo`` leaves it: a trained checkpoint."""
    (folder / "runs" / "demo").mkdir(parents=True)
    shutil.copy(CHECKPOINT, folder / "runs" / "demo" / "embed-nano.pt")


@pytest.fixture
def workspace(tmp_path: Path, fashion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder as ``make demo`` leaves it: a trained checkpoint, and Fashion-MNIST (a part of it)."""
    folder = tmp_path / "work space"
    demo_folder(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RESVIT_FASHION_MNIST", str(fashion_folder))
    # Scenes keep the items that they have read: those of the part are for these tests only, whatever ran before.
    _items.cache_clear()
    yield folder
    _items.cache_clear()


@pytest.fixture
def exported(workspace: Path, seeded: Callable[..., str]) -> None:
    """The run folders ``runs/embed-nano`` and ``runs/x`` in which the demo's network is folded and exported."""
    for folder in ("runs/embed-nano", "runs/x"):
        seeded(folder, "jetson-orin", "rtx-4090", stages=("fold", "export"))
