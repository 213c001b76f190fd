"""A kernel as attributes of a node, and back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin_kernels import kernel_for
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.kernels.launch import Extent, Kernel, Launch, Result, Term
from resvit_engines.plugins.fields import DATA_TYPES, LISTS, NAMES, fields_from_kernel, kernel_from_fields
from resvit_engines.plugins.names import OP_TYPES


def test_every_kind_of_node_is_named_once_with_its_tensors() -> None:
    assert len(OP_TYPES) == 8 + 6 + 2
    tensors = {name: (op.inputs, op.outputs) for name, op in OP_TYPES.items()}
    assert tensors["ResvitAttention"] == (("packed",), ("output",))
    assert tensors["ResvitAttentionSplitBiasQ"] == (("q", "k", "v", "bias"), ("output",))
    assert tensors["ResvitBridgeW8NormQ"] == (
        ("map", "weight", "weight_scale", "table", "gamma", "beta"),
        ("tokens", "normalised"),
    )
    assert tensors["ResvitBridge"] == (("map", "weight", "table"), ("tokens",))
    assert tensors["ResvitAttentionBiasQ"] == (("packed", "bias"), ("output",))
    assert "ResvitBridgeQ" not in tensors


def test_the_lists_are_those_that_the_plugins_read() -> None:
    fields = fields_from_kernel(kernel_for("ResvitBridgeNormQ"))
    assert tuple(fields) == NAMES
    assert fields["kernel_entry"] == "resvitbridgenormq_kernel"
    assert fields["kernel_block"] == [128, 4096]
    assert fields["kernel_grid"] == [1, 1, 0, 1, 64, 3, 1, 0, 0, 1, 1, 0]
    assert fields["kernel_scalars"] == [2, 1, 1, 0, 1, 1, 2, 2, 0, 0, 1, 4, 2, 1]
    assert fields["kernel_inputs"] == [1, 1, 1, 1, 1]
    assert fields["kernel_outputs"] == [2, 3, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 2, 3, 1, 2, 1, 1, 0, 0, 1, 7, 0]


extents = st.builds(
    Extent,
    st.integers(0, 1 << 20),
    st.lists(st.builds(Term, st.integers(0, 1), st.integers(0, 7), st.integers(1, 4096)), max_size=4).map(tuple),
)
types = st.sampled_from(sorted(DATA_TYPES))
launches = st.builds(
    Launch,
    st.tuples(types, types),
    st.lists(extents, max_size=4).map(tuple),
    st.lists(st.builds(Result, types, st.lists(extents, max_size=5).map(tuple)), min_size=1, max_size=2).map(tuple),
    st.tuples(extents, extents, extents),
)


@pytest.mark.whole
@given(launches, st.booleans())
def test_what_is_written_is_read(launch: Launch, as_arrays: bool) -> None:
    kernel = dataclasses.replace(kernel_for("ResvitAttentionBias"), launch=launch)
    fields = fields_from_kernel(kernel)
    assert all(len(fields[name]) > 0 for name in NAMES)
    if as_arrays:
        fields |= {name: np.array(fields[name], np.int32) for name in LISTS}
    read = kernel_from_fields({**fields, "heads": 3})
    assert (read.entry, read.ptx, read.threads, read.shared_bytes) == (kernel.entry, kernel.ptx, 128, 4096)
    assert read.launch == launch
    numbers = [extent.factor for extent in (*read.launch.grid, *read.launch.scalars)]
    assert all(type(number) is int for number in numbers)


def broken(**changes: object) -> dict[str, object]:
    return {**fields_from_kernel(kernel_for("ResvitAttention")), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel_entry": ""}, "kernel_entry"),
        ({"kernel_entry": "another"}, "no kernel of that name"),
        ({"kernel_ptx": 3}, "kernel_ptx"),
        ({"kernel_block": [128]}, "instead of 2"),
        ({"kernel_block": [2048, 0]}, "cannot be"),
        ({"kernel_block": ["x", 0]}, "whole numbers"),
        ({"kernel_grid": [1, 0, 1, 0]}, "too early"),
        ({"kernel_grid": [1, 0, 1, 0, 1, 0, 1]}, "left over"),
        ({"kernel_grid": [-1, 0, 1, 0, 1, 0]}, "kernel_grid"),
        ({"kernel_grid": [1, 1, 4, 0, 1, 1, 0, 1, 0]}, "input 4"),
        ({"kernel_grid": [1, 1, 0, 0, 0, 1, 0, 1, 0]}, "over 0"),
        ({"kernel_scalars": [2, 1, 0]}, "too early"),
        ({"kernel_inputs": []}, "none"),
        ({"kernel_inputs": [4]}, "data type"),
        ({"kernel_outputs": []}, "none"),
        ({"kernel_outputs": [1, 9]}, "rank"),
    ],
)
def test_malformed_attributes_are_named(changes, words) -> None:
    with pytest.raises(ResvitError, match=words) as caught:
        kernel_from_fields(broken(**changes))
    assert caught.value.code is ExitCode.INPUT
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_attribute_is_named(name) -> None:
    fields = broken()
    del fields[name]
    with pytest.raises(ResvitError, match=name):
        kernel_from_fields(fields)


def impossible(kernel: Kernel) -> ResvitError:
    with pytest.raises(ResvitError) as caught:
        fields_from_kernel(kernel)
    assert caught.value.code is ExitCode.IMPOSSIBLE
    return caught.value


def test_what_tensorrt_gives_to_no_plugin_is_declined() -> None:
    kernel = kernel_for("ResvitAttentionBias")
    masked = dataclasses.replace(kernel, launch=dataclasses.replace(kernel.launch, inputs=("fp16", "bool")))
    assert "bool" in impossible(masked).problem
    assert "49153" in impossible(dataclasses.replace(kernel, shared_bytes=49153)).problem
