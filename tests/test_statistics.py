"""One pass measures every activation exactly, in bounded memory, and refuses what cannot be measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resvit_calibrate.images.image_set import Batch
from resvit_calibrate.observe.meter import coprime_step
from resvit_calibrate.observe.observers import observed_model
from resvit_calibrate.ranges.collect import collect_statistics
from resvit_calibrate.ranges.statistics import save_statistics, statistics_from_npz
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ResvitError


def batch_of(images: np.ndarray) -> Batch:
    return Batch(images, None)


def small_hybrid(path: Path, *, batch=None, opset=20, extra=(), external=False, half=False) -> Path:
    """Conv, Relu, residual Add, tokens, Softmax, Gemm: every kind of tensor that is treated differently."""
    rng = np.random.default_rng(0)
    real = np.float16 if half else np.float32

    def weight(name, *shape):
        return numpy_helper.from_array((rng.standard_normal(shape) / 3).astype(real), name)

    nodes = [
        *([helper.make_node("Cast", ["input"], ["x"], to=TensorProto.FLOAT16)] if half else []),
        helper.make_node("Conv", ["x" if half else "input", "w1"], ["c1"], pads=[1, 1, 1, 1], name="stem"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], name="conv2"),
        helper.make_node("Add", ["c2", "r1"], ["a1"], name="add"),
        helper.make_node("Pad", ["a1", "pads", "minus_infinity"], ["p1"], name="pad"),
        helper.make_node("MaxPool", ["p1"], ["m1"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        helper.make_node("Shape", ["m1"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["shape_float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["m1", "to_tokens"], ["t0"], name="tokens"),
        helper.make_node("Transpose", ["t0"], ["t1"], perm=[0, 2, 1], name="turn"),
        helper.make_node("MatMul", ["t1", "w3"], ["t2"], name="mlp"),
        helper.make_node("Softmax", ["t2"], ["s1"], axis=-1, name="softmax"),
        *extra,
        helper.make_node("Flatten", ["s1"], ["f1"], name="flat"),
        helper.make_node("Gemm", ["f1", "w4"], ["logits" if not half else "l16"], name="head"),
        *([helper.make_node("Cast", ["l16"], ["logits"], to=TensorProto.FLOAT)] if half else []),
    ]
    graph = helper.make_graph(
        nodes,
        "hybrid",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 10, 10])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [
            weight("w1", 6, 3, 3, 3),
            weight("w2", 6, 6, 3, 3),
            weight("w3", 6, 7),
            weight("w4", 252, 5),
            numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads"),
            numpy_helper.from_array(np.array(-np.inf, real), "minus_infinity"),
            numpy_helper.from_array(np.array([0, 6, 36]), "to_tokens"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path, save_as_external_data=external, location="w.bin", size_threshold=200)
    return path


FLOATS = ["input", "c1", "r1", "c2", "a1", "m1", "t0", "t1", "t2", "s1", "f1", "logits"]


def everything(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    model = onnx.shape_inference.infer_shapes(model)
    kinds = {v.name: v for v in model.graph.value_info}
    model.graph.output.extend(kinds[name] for name in FLOATS if name in kinds)
    return {"input": images, **onnx_runner(model.SerializeToString())({"input": images})}


def images(count, seed=0, size=1.0):
    return (np.random.default_rng(seed).standard_normal((count, 3, 10, 10)) * size).astype(np.float32)


@pytest.mark.parametrize(
    "form", [{}, {"batch": 4}, {"opset": 13}, {"external": True}, {"half": True}], ids=lambda f: str(f or "plain")
)
def test_extremes_are_exact_for_every_tensor(tmp_path, form):
    path = small_hybrid(tmp_path / "model.onnx", **form)
    x = images(11)
    statistics = collect_statistics(path, [batch_of(x[:4]), batch_of(x[4:8]), batch_of(x[8:])], total=11)
    assert statistics.images == 11
    truth = everything(path, x)
    assert "shape_float" not in statistics.tensors
    for name in FLOATS:
        entry = statistics.tensors[name]
        tolerance = 2e-3 if form.get("half") else 1e-6
        assert entry.minimum == pytest.approx(truth[name].min(), rel=tolerance, abs=tolerance), name
        assert entry.maximum == pytest.approx(truth[name].max(), rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("batch", [None, 4])
def test_histograms_are_kept_where_quantisation_can_go_and_count_no_padding(tmp_path, batch):
    path = small_hybrid(tmp_path / "model.onnx", batch=batch)
    x = images(11)
    statistics = collect_statistics(path, [{"input": x[:5]}, {"input": x[5:]}])
    kept = {name for name, entry in statistics.tensors.items() if entry.histogram is not None}
    assert kept == {"input", "r1", "c2", "m1", "t0", "t1", "s1", "f1"}
    truth = everything(path, x)
    for name in kept:  # small tensors are sampled whole, so the counts are exact
        entry, values = statistics.tensors[name], np.abs(truth[name]).ravel()
        assert entry.count == values.size, name
        assert entry.histogram.sum() == np.count_nonzero(values), name
        assert math.log2(entry.bin_width).is_integer()
        edges = np.arange(2049) * entry.bin_width
        expected = np.histogram(values[values > 0], edges)[0]
        assert np.abs(entry.histogram - expected).sum() <= values.size * 1e-3, name


def test_large_tensors_are_sampled_evenly(tmp_path):
    # 64 channels of very different sizes: a stride that divides 64 would see one of them only.
    weights = np.zeros((64, 64), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 512, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 512, 64])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    x = np.broadcast_to(np.arange(1, 65, dtype=np.float32), (16, 512, 64)).copy()
    entry = collect_statistics(tmp_path / "m.onnx", [{"input": x}] * 3).tensors["input"]
    assert 3 * 12_000 < entry.count <= 3 * 16_384
    counts = entry.histogram[entry.histogram > 0]
    assert counts.size == 64
    assert counts.min() > 0.9 * counts.mean()


@pytest.mark.parametrize("size", [1, 16_384, 16_385, 8 * 197 * 384, 32 * 64 * 112 * 112, 11 * 13 * 17 * 19 * 23 * 29])
def test_steps_share_no_factor_and_keep_the_sample_small(size):
    step = coprime_step(size)
    assert math.gcd(step, size) == 1
    assert -(-size // step) <= 16_384
    assert size / step > 8_000 or size <= 16_384


def test_result_is_the_same_every_time_and_survives_the_file(tmp_path):
    path = small_hybrid(tmp_path / "model.onnx")
    first, second = (collect_statistics(path, [batch_of(images(6))]) for _ in range(2))
    save_statistics(first, tmp_path / "s.npz")
    loaded = statistics_from_npz((tmp_path / "s.npz").read_bytes(), "s.npz")
    assert loaded.images == 6
    for other in (second, loaded):
        assert other.tensors.keys() == first.tensors.keys()
        for name, entry in first.tensors.items():
            twin = other.tensors[name]
            assert (twin.count, twin.minimum, twin.maximum, twin.bin_width) == (
                entry.count,
                entry.minimum,
                entry.maximum,
                entry.bin_width,
            )
            assert np.array_equal(twin.histogram, entry.histogram)
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ResvitError, match="does not hold"):
        statistics_from_npz((tmp_path / "s.npz").read_bytes(), "s.npz")


def test_no_image_is_refused_never_invented(tmp_path):
    path = small_hybrid(tmp_path / "model.onnx")
    for nothing in ([], [batch_of(np.zeros((0, 3, 10, 10), np.float32))]):
        with pytest.raises(ResvitError, match="never invented"):
            collect_statistics(path, nothing)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_image_is_named(tmp_path, bad):
    x = images(9)
    x[6, 1, 2, 3] = bad
    with pytest.raises(ResvitError, match="image 6 "):
        collect_statistics(small_hybrid(tmp_path / "model.onnx"), [batch_of(x[:4]), batch_of(x[4:])])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("weight", "tensor", "node"),
    [("w1", "c1", "stem"), ("w2", "c2", "conv2"), ("w3", "t2", "mlp"), ("w4", "logits", "head")],
)
def test_the_first_bad_tensor_is_named(tmp_path, weight, tensor, node, bad):
    path = small_hybrid(tmp_path / "model.onnx")
    model = onnx.load(path)
    for initializer in model.graph.initializer:
        if initializer.name == weight:
            values = numpy_helper.to_array(initializer).copy()
            values.ravel()[1] = bad
            initializer.CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, path)
    with pytest.raises(ResvitError, match=f"tensor '{tensor}', written by node {node} "):
        collect_statistics(path, [batch_of(images(4))])


def test_a_single_nan_in_front_of_a_relu_is_found(tmp_path):
    """Log of a negative number in one pixel: Relu turns it into zero, and nothing behind shows it."""
    graph = helper.make_graph(
        [
            helper.make_node("Log", ["input"], ["l"], name="log"),
            helper.make_node("Relu", ["l"], ["r"], name="relu"),
            helper.make_node("ReduceMean", ["r"], ["y"], keepdims=0),
        ],
        "log",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 40, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    x = np.full((2, 1, 40, 40), 2.0, np.float32)
    assert collect_statistics(tmp_path / "m.onnx", [batch_of(x)]).tensors["l"].maximum == pytest.approx(math.log(2))
    x[1, 0, 7, 9] = -1.0
    with pytest.raises(ResvitError, match="NaN in tensor 'l', written by node log "):
        collect_statistics(tmp_path / "m.onnx", [batch_of(x)])


def graph_of(path: Path, text: str, **constants: np.ndarray) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.save(model, path)
    return path


SEEN = "g (float[2, 3, 4, 4] input) => (float[2, 3, 4, 4] o) { seen = Greater (input, none)"


@pytest.mark.parametrize(
    "way",
    [
        "b = Add (s, m)",
        "e = Expand (m, shape)\nb = Add (e, s)",
        "c = Identity (m)\nd = Where (seen, s, c)\nb = Add (d, c)",
    ],
)
def test_a_mask_on_its_way_to_the_softmax_may_be_minus_infinity(tmp_path: Path, way: str) -> None:
    low, shape = np.array(-np.inf, np.float32), np.array([2, 3, 4, 4])
    constants = {"none": np.array(0, np.float32), "low": low, "shape": shape, "w": np.eye(4, dtype=np.float32)}
    text = f"{SEEN}\n s = MatMul (input, w)\n m = Where (seen, none, low)\n {way}\n o = Softmax <axis = -1> (b) }}"
    path = graph_of(tmp_path / "masked.onnx", text, **constants)
    image = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
    image[..., 0] = 10.0  # no row is hidden wholly, and 10 times 3e38 is infinite
    found = collect_statistics(path, [batch_of(image)])
    assert found.tensors["m"].minimum == found.tensors["m"].maximum == 0.0
    assert np.isfinite([found.tensors["b"].minimum, found.tensors["b"].maximum]).all()
    # Scores that are infinite themselves are a fault, mask or not.
    broken = {**constants, "w": np.diag(np.array([3e38, 1, 1, 1], np.float32))}
    with pytest.raises(ResvitError, match="infinite values in tensor 's'"):
        collect_statistics(graph_of(tmp_path / "broken.onnx", text, **broken), [batch_of(image)])


def test_the_largest_number_may_stand_for_none(tmp_path: Path) -> None:
    text = f"{SEEN}\n far = Where (seen, input, most)\n least = ReduceMin <axes = [3]> (far)\n o = Mul (least, none) }}"
    text = text.replace("float[2, 3, 4, 4] o", "float[2, 3, 4, 1] o")
    constants = {"none": np.array(0, np.float32), "most": np.array(np.finfo(np.float32).max, np.float32)}
    image = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
    found = collect_statistics(graph_of(tmp_path / "far.onnx", text, **constants), [batch_of(image)])
    assert found.tensors["far"].maximum == np.finfo(np.float32).max


def test_the_wrong_shape_and_the_wrong_file_are_explained(tmp_path):
    path = small_hybrid(tmp_path / "model.onnx")
    with pytest.raises(ResvitError, match=r"(?s)float32\[1, 1, 10, 10\]: .*input tensor\(float\)\[None, 3, 10, 10\];"):
        collect_statistics(path, [batch_of(np.zeros((2, 1, 10, 10), np.float32))])
    with pytest.raises(ResvitError, match="go into 'input'"):
        collect_statistics(path, [{"pixels": images(1)}])
    with pytest.raises(ResvitError, match="no model file"):
        collect_statistics(tmp_path / "absent.onnx", [])
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ResvitError, match="cannot be read"):
        collect_statistics(tmp_path / "bad.onnx", [])


def test_values_are_checked_where_nan_could_vanish_and_measured_once(tmp_path):
    observed = observed_model(small_hybrid(tmp_path / "model.onnx"))
    assert observed.derived == {
        "r1": ("c1", True),
        "t0": ("m1", False),
        "t1": ("m1", False),
        "f1": ("s1", False),
    }
    assert observed.masked == {"p1", "t2"}
    assert set(observed.summed) == {"c1", "a1", "p1", "t2", "logits"}


def test_what_a_branch_makes_of_captured_activations_is_measured(tmp_path):
    value = helper.make_tensor_value_info
    branches = [
        helper.make_graph([helper.make_node(op, ["double"], [op])], op, [], [value(op, TensorProto.FLOAT, ["n", 3])])
        for op in ("Neg", "Relu")
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["input", "input"], ["double"]),
            helper.make_node("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1]),
        ],
        "branch",
        [value("input", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.array(True), "yes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    tensors = collect_statistics(tmp_path / "m.onnx", [{"input": np.array([[1, 2, -3]], np.float32)}]).tensors
    assert (tensors["y"].minimum, tensors["y"].maximum) == (-4.0, 6.0)
