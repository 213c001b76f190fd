from __future__ import annotations

import difflib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resvit_calibrate.gate.gate import VerdictKind, judge
from resvit_calibrate.images.targets import MaskTarget, TextTarget
from resvit_calibrate.tasks.kinds import kind_of, task_named, with_files_read
from resvit_calibrate.tasks.text import edits_between
from resvit_engines.errors import ResvitError
from task_images import Images, network

ALPHABET = "abcdefgh"
POSITIONS = 12


def lines(count: int, random: np.random.Generator) -> list[str]:
    return ["".join(random.choice(list(ALPHABET), random.integers(1, 5))) for _ in range(count)]


def spelled(text: str, kind: str, silent: int) -> np.ndarray:
    """Class numbers of every position that decode to ``text``."""
    numbers = [ALPHABET.index(letter) + (ALPHABET.index(letter) >= silent) for letter in text]
    if kind == "positions":
        return np.array([*numbers, *[silent] * (POSITIONS - len(numbers))])
    row: list[int] = []
    for number in numbers:
        row += [silent, number] if row and row[-1] == number else [number]
    return np.array([*row, *[silent] * (POSITIONS - len(row))])


def scores(rows: list[np.ndarray], classes: int = len(ALPHABET) + 1, noise: float = 0.1) -> np.ndarray:
    random = np.random.default_rng(1)
    hot = np.eye(classes)[np.stack(rows)]
    return (hot + noise * random.normal(size=hot.shape)).astype(np.float32)


def read(texts: list[str], answers: np.ndarray, **options: object):
    images = Images([TextTarget(text) for text in texts])
    return task_named("text", {"characters": ALPHABET, **options}).answers(network(output=answers), images, 16)


@pytest.mark.parametrize("kind", ["ctc", "positions"])
@pytest.mark.parametrize("silent", [0, len(ALPHABET)])
@pytest.mark.parametrize("told", [True, False])
def test_lines_are_read_by_either_decoder(kind, silent, told):
    texts = lines(80, np.random.default_rng(0))
    options = {"decoder": kind, "blank" if kind == "ctc" else "end": silent} if told else {}
    task = task_named("text", {"characters": ALPHABET, **options})
    mine = read(texts, scores([spelled(text, kind, silent) for text in texts]), **options)
    got = task.compare(mine, mine)
    assert got.reference == {"lines right": 1.0, "CER": 0.0}
    assert got.said == ("" if told else f"read with decoder={kind} {'blank' if kind == 'ctc' else 'end'}={silent}, by "
                        "which the float network reads most")  # fmt: skip
    assert judge(got, 1.0).kind is VerdictKind.UNDECIDED  # 80 lines do not show that 1 of 100 is not lost
    assert judge(got, 6.0).kind is VerdictKind.ACCEPTED


def test_one_wrong_character_is_one_line_and_one_edit(tmp_path):
    texts = lines(200, np.random.default_rng(0))
    rows = [spelled(text, "ctc", 0) for text in texts]
    wrong = [row.copy() for row in rows]
    for index in range(0, 200, 10):
        wrong[index][0] = 1 + wrong[index][0] % len(ALPHABET)
    task = task_named("text", {"characters": ALPHABET, "decoder": "ctc", "blank": 0})
    first, second = (read(texts, scores(each)) for each in (rows, wrong))
    got = task.compare(first, second)
    assert got.candidate["lines right"] == pytest.approx(0.9)
    assert got.candidate["CER"] == pytest.approx(20 / sum(map(len, texts)), rel=0.1)
    assert got.agreement == pytest.approx(0.9)
    assert judge(got, 1.0).kind is VerdictKind.REJECTED
    changed = task.changed(first, second)
    assert len(changed) == 20
    assert changed[0]["float"] == repr(texts[changed[0]["index"]])
    first.save(tmp_path / "a.npz")
    again = task.load((tmp_path / "a.npz").read_bytes(), "a.npz")
    assert again.texts == first.texts
    assert task.compare(again, second).to_json() == got.to_json()


def test_classes_on_the_second_axis_and_a_space_at_the_end():
    texts = ["a b", "c d e", "f g"] * 20
    classes = len(ALPHABET) + 2

    def row(text: str) -> np.ndarray:
        numbers = [classes - 1 if letter == " " else 1 + ALPHABET.index(letter) for letter in text]
        return np.array([*numbers, *[0] * (POSITIONS - len(numbers))])

    task = task_named("text", {"characters": ALPHABET})
    mine = read(texts, scores([row(text) for text in texts], classes).transpose(0, 2, 1).copy())
    assert task.compare(mine, mine).reference["lines right"] == 1.0


def test_a_network_that_reads_nothing_is_no_baseline():
    texts = lines(60, np.random.default_rng(0))
    mine = read(texts, np.random.default_rng(3).normal(size=(60, POSITIONS, 9)).astype(np.float32))
    verdict = judge(task_named("text", {"characters": ALPHABET}).compare(mine, mine), 5.0)
    assert verdict.kind is VerdictKind.UNDECIDED
    assert "reads 0 of 60 lines" in verdict.reason


def test_characters_that_the_network_does_not_know_are_named():
    texts = ["abc"] * 40 + ["aé", ""]
    rows = [spelled(text.replace("é", ""), "ctc", 0) for text in texts]
    task = task_named("text", {"characters": ALPHABET, "decoder": "ctc", "blank": 0})
    mine = read(texts, scores(rows))
    got = task.compare(mine, mine)
    assert "1 lines hold characters that the network does not know, and count as misread: 'é'" in got.measured(
        (0, 0), 0.9
    )
    assert got.reference["lines right"] == pytest.approx(41 / 42)


def test_outputs_that_are_not_finite_read_nothing():
    texts = lines(40, np.random.default_rng(0))
    clean = scores([spelled(text, "ctc", 0) for text in texts])
    broken = clean.copy()
    broken[5, 2, 1] = np.inf
    task = task_named("text", {"characters": ALPHABET, "decoder": "ctc", "blank": 0})
    got = task.compare(read(texts, clean), read(texts, broken))
    assert got.not_finite == 1
    assert got.candidate["lines right"] == pytest.approx(39 / 40)
    assert judge(got, 50.0).kind is VerdictKind.REJECTED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "answers with class numbers"),
        ({"characters": "abc"}, "chooses from 9 classes, and there are 3 characters"),
        ({"characters": "aab"}, "'a' more than once"),
        ({"characters": ALPHABET, "decoder": "beam"}, "decoder = 'beam'"),
        ({"characters": ALPHABET, "decoder": "ctc", "end": 1}, "`blank` is CTC's"),
        ({"characters": ALPHABET, "output": "logits"}, "called logits"),
        ({"characters": ALPHABET, "alphabet": "ab"}, "has no option alphabet"),
    ],
)
def test_options_that_cannot_be_used(options, said):
    texts = lines(10, np.random.default_rng(0))
    answers = scores([spelled(text, "ctc", 0) for text in texts])

    def compare() -> None:
        task = task_named("text", options)
        mine = task.answers(network(output=answers), Images([TextTarget(text) for text in texts]), 4)
        task.compare(mine, mine)

    with pytest.raises(ResvitError, match=said):
        compare()


def test_masks_are_no_texts():
    images = Images([MaskTarget(np.zeros((48, 64), np.int16))])
    with pytest.raises(ResvitError, match="Text needs texts for every image, and the data has masks"):
        task_named("text", {"characters": ALPHABET}).answers(network(o=np.zeros((1, 4, 9), np.float32)), images, 1)


def test_the_data_tells_the_task_and_a_file_the_characters(tmp_path):
    assert kind_of([{"name": "output", "shape": [1, 12, 9]}], "text") == "text"
    file = tmp_path / "dict.txt"
    file.write_text("a\nb\n \n", encoding="utf-8")
    assert with_files_read({"characters": str(file)}) == {"characters": "a\nb\n \n"}
    assert with_files_read({"characters": "0123"}) == {"characters": "0123"}
    assert task_named("text", with_files_read({"characters": str(file)})).options.alphabet == ("a", "b", " ")
    file.write_bytes("é".encode("latin-1"))
    with pytest.raises(ResvitError, match="is not UTF-8"):
        with_files_read({"characters": str(file)})


@given(st.text("abc", max_size=8), st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edits_are_a_distance(one, two, three):
    assert edits_between(one, two) == edits_between(two, one)
    assert (edits_between(one, two) == 0) == (one == two)
    assert edits_between(one, three) <= edits_between(one, two) + edits_between(two, three)
    matched = sum(block.size for block in difflib.SequenceMatcher(None, one, two, autojunk=False).get_matching_blocks())
    assert edits_between(one, two) <= max(len(one), len(two)) + min(len(one), len(two)) - matched


@pytest.mark.parametrize("text", ["{}\n\n", "{}\n", "{}", "{}\r\n\r\n"])
@pytest.mark.parametrize("mark", ["\n", "\r\n", "\r"])
def test_a_dictionary_ends_at_its_last_character_however_its_lines_do(text, mark):
    written = text.format(mark.join(ALPHABET))
    assert task_named("text", {"characters": written}).options.alphabet == tuple(ALPHABET)


@pytest.mark.parametrize("named", ["keys.txt", "/data/dict.txt", "data/dict", "charset.KEYS"])
def test_a_file_of_characters_that_is_not_there_is_told(named):
    with pytest.raises(ResvitError, match=f"There is no file {named}"):
        with_files_read({"characters": named})


@pytest.mark.parametrize("said", ["0123456789ABC", "0123456789./-", "abc.txt\nd", ".", "/"])
def test_characters_themselves_are_no_files(said):
    assert with_files_read({"characters": said}) == {"characters": said}


def test_a_blank_that_the_network_does_not_have_is_refused_and_one_in_the_middle_named():
    texts = lines(40, np.random.default_rng(0))
    answers = scores([spelled(text, "ctc", 4) for text in texts])
    count = len(ALPHABET) + 1
    for option in ("blank", "end"):
        for value in (count, count + 4):
            task = task_named("text", {"characters": ALPHABET, option: value})
            with pytest.raises(ResvitError, match=f"{option} = {value} of text is out of range: .* {count} classes"):
                task.require_outputs({"output": answers})
    last = task_named("text", {"characters": ALPHABET, "decoder": "ctc", "blank": -1})
    last.require_outputs({"output": answers})
    mine, task = read(texts, answers), task_named("text", {"characters": ALPHABET})
    assert (
        "blank=NUMBER where it is neither the first class nor the last" in judge(task.compare(mine, mine), 1.0).reason
    )
