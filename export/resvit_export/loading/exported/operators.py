"""What a graph may call: ATen operators by their schemas, arithmetic on sizes, and regions of a graph."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._export.serde.serialize import _SYM_OPS

from resvit_export.loading.exported.errors import NotAllowedError, quoted

_TARGET = re.compile(r"torch\.ops\.(aten|prims)\.(\w{1,100})\.(\w{1,100})", re.ASCII)
_TYPES = re.compile(
    r"(Optional\[)?(List\[)?(Optional\[)?"
    r"(Tensor|int|float|bool|number|complex|str|ScalarType|Layout|Device|MemoryFormat|Generator)\]*"
)
_TEXTS = frozenset(
    {"ord", "p", "norm", "rounding_mode", "driver", "padding", "UPLO", "approximate", "mode", "reduce", "interpolation"}
    | {"assert_msg", "pad_mode", "side", "equation", "padding_side", "indexing"}
)
"""Arguments that are words; another text could be the name of a file."""
_LEFT_OUT = re.compile(
    r"(sparse|nested|quantized|mkldnn|cudnn|miopen|mps|cslt|test)_|.*_sparse|resize|set_|swap|from_file"
)
"""What hands out memory that no tensor of the graph has, and what no engine computes."""
_PRIVATE = frozenset(
    {
        *("__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "__iand__", "__ior__", "__ixor__"),
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_aminmax", "_conj", "_conj_copy", "_conj_physical"),
        *("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_functional_assert_async"),
        *("_functional_assert_scalar", "_functional_sym_constrain_range", "_functional_sym_constrain_range_for_size"),
        *("_batch_norm_impl_index", "_batch_norm_no_update", "_batch_norm_with_update", "_cdist_forward"),
        *("_convolution", "_convolution_mode", "_embedding_bag", "_embedding_bag_forward_only", "_euclidean_dist"),
        *("_fft_c2c", "_fft_c2r", "_fft_r2c", "_fused_rms_norm", "_is_all_true", "_is_any_true", "_lazy_clone"),
        *("_linalg_det", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "_local_scalar_dense"),
        *(
            "_log_softmax",
            "_logcumsumexp",
            "_masked_softmax",
            "_native_batch_norm_legit",
            "_neg_view",
            "_neg_view_copy",
        ),
        *(
            "_native_batch_norm_legit_functional",
            "_native_batch_norm_legit_no_training",
            "_native_multi_head_attention",
        ),
        *("_pad_circular", "_pad_enum", "_pdist_forward", "_prelu_kernel", "_reshape_alias", "_reshape_alias_copy"),
        *("_reshape_copy", "_safe_softmax", "_scaled_dot_product_attention_math", "_shape_as_tensor", "_softmax"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention", "_stack", "_to_copy"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_transformer_encoder_layer_fwd", "_trilinear"),
        *("_transform_bias_rescale_qkv", "_unique", "_unique2", "_unsafe_index", "_unsafe_masked_index"),
        *("_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_lanczos2d_aa"),
        *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
        *("_weight_norm", "_weight_norm_interface"),
    }
)
"""Of the operators whose name begins with an underscore: those that public ones are traced or decomposed into."""
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint", "cond")
_SIZES: Mapping[str, Callable[..., Any]] = {
    f"{function.__module__}.{function.__name__}": function for function in (*_SYM_OPS, math.ceil, math.floor)
}


@functools.cache
def _registered() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


@functools.lru_cache(maxsize=4096)
def arguments_of(target: str) -> frozenset[str] | None:
    """The names of an operator's arguments, None where it has no schema; raises ``NotAllowedError`` for all others."""
    if target in _SIZES or target.removeprefix("torch.ops.higher_order.") in _REGIONS:
        return None
    if (parts := _TARGET.fullmatch(target)) is None:
        raise NotAllowedError(f"it calls {quoted(target)}")
    namespace, name, overload = parts.groups()
    registered = f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")
    if registered not in _registered():
        raise NotAllowedError(f"it calls {quoted(target)}, and torch {torch.__version__} has no such operator")
    schema = torch._C._get_schema(f"{namespace}::{name}", "" if overload == "default" else overload)
    plain = all(_TYPES.fullmatch(str(value.type)) for value in (*schema.arguments, *schema.returns))
    words = all(value.name in _TEXTS for value in schema.arguments if "str" in str(value.type))
    public = name in _PRIVATE or not name.startswith("_")
    if not (plain and words and public) or _LEFT_OUT.match(name) is not None:
        raise NotAllowedError(f"it calls {quoted(target)}, which networks have no use for")
    return frozenset(value.name for value in schema.arguments)


def is_on_sizes(target: str) -> bool:
    """Whether a target is arithmetic on sizes, such as ``_operator.mul``."""
    return target in _SIZES


def is_allowed(function: object) -> bool:
    """Whether a node of a graph that was read may call ``function``: one of the above, or the choice of an output."""
    if isinstance(function, torch._ops.OpOverload):
        namespace, _, name = str(function._schema.name).partition("::")
        arguments_of(f"torch.ops.{namespace}.{name}.{function._overloadname}")
        return True
    if isinstance(function, torch._ops.HigherOrderOperator):
        return function._name in _REGIONS
    return function in _SIZES.values() or function is operator.getitem
