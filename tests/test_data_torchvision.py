"""Data sets of torchvision's by name, each made small in the form that torchvision reads; nothing is downloaded."""

from __future__ import annotations

import bz2
import inspect
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import write_idx
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.data.naming import absolute_source, is_factory, require_source
from resvit_calibrate.data.sources import Pools, open_source
from resvit_calibrate.images.image_set import DataSpec
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.images.targets import AS_USUAL
from resvit_calibrate.readers.torchvision_sets import SETS
from resvit_calibrate.readers.user.torchvision_import import import_beside_torchvision
from resvit_engines.errors import ExitCode, ResvitError

datasets: Any = import_beside_torchvision("torchvision.datasets", "host")


def opened(data: str) -> Pools:
    require_source(data)
    pools = open_source(data, AS_USUAL)
    assert isinstance(pools, Pools)
    return pools


def idx(root: Path, name: str) -> None:
    """What MNIST's family looks for: unpacked files below NAME/raw."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        prefix = {"train": "train", "test": "t10k"}[split]
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes()
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def pictures(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng([root.name.encode()[0], *name.encode()]).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(image).save(root / name)


def food(root: Path) -> None:
    base = root / "food-101"
    names = [f"{kind}/{number}" for kind in ("soup", "cake") for number in range(6)]
    pictures(base / "images", [f"{name}.jpg" for name in names])
    (base / "meta").mkdir()
    for part, some in (("train", slice(0, 4)), ("test", slice(4, 6))):
        listed = {kind: [name for name in names if name.startswith(kind)][some] for kind in ("soup", "cake")}
        (base / "meta" / f"{part}.json").write_text(str(listed).replace("'", '"'))


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        names = [f"{kind}/{part}{number}.jpg" for kind in ("banded", "dotted") for number in range(3)]
        pictures(base / "images", names)
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names) + "\n")


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        names = [f"{kind}_{part}{number}" for kind in ("Sphynx", "beagle") for number in range(3)]
        pictures(base / "images", [f"{name}.jpg" for name in names])
        lines = [f"{name} {1 + name.startswith('b')} 1 1\n" for name in names]
        (base / "annotations" / f"{part}.txt").write_text("".join(lines))


def aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nA320\n")
    for part in ("train", "val", "test"):
        names = [f"{part}{number}" for number in range(4)]
        pictures(base / "images", [f"{name}.jpg" for name in names])
        lines = [f"{name} {('707-320', 'A320')[number % 2]}\n" for number, name in enumerate(names)]
        (base / f"images_variant_{part}.txt").write_text("".join(lines))


def usps(root: Path) -> None:
    for name, count in (("usps.bz2", 12), ("usps.t.bz2", 6)):
        random = np.random.default_rng(count)
        lines = [
            f"{number % 10 + 1} "
            + " ".join(f"{at + 1}:{value:.3f}" for at, value in enumerate(random.uniform(-1, 1, 256)))
            for number in range(count)
        ]
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))


def country(root: Path) -> None:
    for part in ("train", "valid", "test"):
        pictures(root / "country211" / part, [f"{kind}/{n}.jpg" for kind in ("AD", "FR") for n in range(3)])


def imagenette(root: Path) -> None:
    for part in ("train", "val"):
        names = [f"{kind}/{n}.jpeg" for kind in ("n01440764", "n02102040") for n in range(3)]
        pictures(root / "imagenette2" / part, names)


MADE = {
    "MNIST": (lambda root: idx(root, "MNIST"), "0 - zero", (20, 10)),
    "FashionMNIST": (lambda root: idx(root, "FashionMNIST"), "T-shirt/top", (20, 10)),
    "KMNIST": (lambda root: idx(root, "KMNIST"), "o", (20, 10)),
    "Food101": (food, "cake", (8, 4)),
    "DTD": (dtd, "banded", (6, 6)),
    "OxfordIIITPet": (pets, "Sphynx", (6, 6)),
    "FGVCAircraft": (aircraft, "707-320", (4, 4)),
    "USPS": (usps, "", (12, 6)),
    "Country211": (country, "AD", (6, 6)),
    "Imagenette": (imagenette, "", (6, 6)),
}


@pytest.mark.parametrize("name", MADE)
def test_both_parts_are_read_with_their_classes(name: str, tmp_path: Path) -> None:
    make, first, counts = MADE[name]
    make(tmp_path)
    pools = opened(f"torchvision:{name}:{tmp_path}")
    assert pools.validation is not None
    assert (len(pools.calibration), len(pools.validation)) == counts
    assert pools.calibration.class_names[:1] == ((first,) if first else ())
    assert sorted(set(pools.validation.labels.tolist())) == list(range(max(pools.validation.labels) + 1))  # type: ignore[union-attr, arg-type]
    channels = 1 if name in ("MNIST", "FashionMNIST", "KMNIST", "USPS") else 3
    assert pools.calibration.read(0).shape[2] == channels
    calibration, _ = open_image_sets(
        DataSpec(f"torchvision:{name}:{tmp_path}", calibration_images=3), Preprocess((8, 8), channels)
    )
    assert next(calibration.batches(3)).images.shape == (3, channels, 8, 8)


@pytest.mark.parametrize("name", SETS)
def test_each_is_a_class_of_torchvisions_that_takes_what_it_is_told(name: str, tmp_path: Path) -> None:
    parameters = inspect.signature(getattr(datasets, name)).parameters
    assert "download" in parameters
    assert parameters["download"].default is False
    for part, told in SETS[name].parts.items():
        assert set(told) <= set(parameters)
        with pytest.raises(ResvitError, match=f"torchvision does not read {name} .*in {tmp_path}") as caught:
            opened(f"torchvision:{name}:{tmp_path}:{part}")
        assert "download=True" not in str(caught.value)
        assert "not a valid" not in caught.value.problem
        assert "nothing is downloaded" in caught.value.fix


def test_a_part_is_named_and_others_are_told(tmp_path: Path) -> None:
    dtd(tmp_path)
    assert (
        "of DTD the parts train and val are read, test not" in opened(f"torchvision:DTD:{tmp_path}").calibration.notes
    )
    pools = opened(f"torchvision:DTD:{tmp_path}:test")
    assert pools.validation is None
    assert pools.calibration.name == "DTD (test)"
    data = absolute_source("torchvision:DTD:sub:test", tmp_path.parent / "x")
    assert data is None
    assert (
        absolute_source(f"torchvision:DTD:{tmp_path.name}:test", tmp_path.parent) == f"torchvision:DTD:{tmp_path}:test"
    )
    assert absolute_source(f"torchvision:DTD:{tmp_path.name}", tmp_path.parent) == f"torchvision:DTD:{tmp_path}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("torchvision:cifar10:{root}", "Did you mean torchvision:CIFAR10?"),
        ("torchvision:ImageFolder:{root}", "A folder of class folders is named without"),
        ("torchvision:CIFAR10", "does not say where the data set lies"),
        ("torchvision:CIFAR10:{root}/absent", "There is no folder .*absent with CIFAR10"),
        ("torchvision:LSUN:{root}", "is not among the data sets that are read by name"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_imported(data: str, said: str, tmp_path: Path) -> None:
    text = data.format(root=tmp_path)
    assert not is_factory(text)
    with pytest.raises(ResvitError, match=said):
        require_source(text)


@pytest.mark.parametrize("name", ["MNIST", "Food101", "DTD", "Country211"])
def test_a_root_without_its_prefix_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    MADE[name][0](tmp_path)
    for data in (tmp_path, tmp_path / SETS[name].inside):
        with pytest.raises(
            ResvitError, match=rf"holds {name} as torchvision keeps it.*\n.*torchvision:{name}:{tmp_path}\."
        ):
            require_source(str(data))


def test_what_is_not_cifar_is_not_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    (folder / "batches.meta").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ResvitError, match="not found or corrupted"):
        opened(f"torchvision:CIFAR10:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_end_in_a_sentence(tmp_path: Path) -> None:
    idx(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ResvitError, match=r"torchvision does not read MNIST \(train\)"):
        opened(f"torchvision:MNIST:{tmp_path}")
    food(tmp_path)
    (tmp_path / "food-101" / "images" / "soup" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(ResvitError, match=r"Item . of torchvision's Food101 failed: UnidentifiedImageError"):
        opened(f"torchvision:Food101:{tmp_path}")


def test_without_torchvision_the_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx(tmp_path, "MNIST")
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ResvitError, match=r"torchvision.datasets does not import") as caught:
        opened(f"torchvision:MNIST:{tmp_path}")
    assert caught.value.code is ExitCode.MISSING


def test_the_tools_own_reader_and_torchvisions_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    random = np.random.default_rng(0)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        write_idx(folder, split, random.integers(0, 256, (30, 28, 28), np.uint8), np.arange(30) % 10)
    for file in sorted(folder.glob("*.gz")):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
    monkeypatch.setenv("RESVIT_FASHION_MNIST", str(folder))
    own, theirs = opened("fashion-mnist"), opened(f"torchvision:FashionMNIST:{tmp_path}")
    for mine, other in ((own.calibration, theirs.calibration), (own.validation, theirs.validation)):
        assert mine is not None
        assert other is not None
        assert mine.labels.tolist() == other.labels.tolist()  # type: ignore[union-attr]
        assert (mine.look(3).content, len(mine)) == (other.look(3).content, len(other))


def test_a_users_own_file_may_import_torchvision(tmp_path: Path) -> None:
    file = tmp_path / "data.py"
    file.write_text(
        "from torchvision import datasets, transforms\n"
        "def data(split):\n"
        f"    return datasets.MNIST({str(tmp_path)!r}, train=split == 'calibration')\n"
        "def ready():\n"
        f"    return datasets.MNIST({str(tmp_path)!r}, transform=transforms.ToTensor())\n"
    )
    idx(tmp_path, "MNIST")
    pools = opened(f"{file}:data")
    assert pools.validation is not None
    assert (len(pools.calibration), len(pools.validation)) == (20, 10)
    calibration, _ = open_image_sets(DataSpec(f"{file}:ready", calibration_images=5), Preprocess((28, 28), 1))
    assert calibration.prepared
