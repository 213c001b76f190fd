"""Every name of TensorRT's Python module that this project touches, and where it exists.

Tests hold this table against the bindings of every version named in ``VERSIONS``, and against our own source, so that
neither can run ahead of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

VERSIONS = ("10.3", "10.13", "10.16", "11.4")
"""The TensorRT versions that are served: those of JetPack 6.1 to 7.2, and the newest."""


class Where(NamedTuple):
    """Whether TensorRT has a name, from which of ``VERSIONS`` on, and whether TensorRT for RTX (1.7) has it."""

    tensorrt: bool
    rtx: bool
    since: str = VERSIONS[0]


EVERYWHERE = Where(tensorrt=True, rtx=True)
RTX_ONLY = Where(tensorrt=False, rtx=True)
AHEAD_OF_TIME = Where(tensorrt=True, rtx=False, since="10.13")
"""Plugins in Python; in TensorRT's documentation since 10.9."""


def _names(where: Where, owner: str, members: str) -> dict[str, Where]:
    return {f"{owner}.{member}" if owner else member: where for member in members.split()}


NAMES: Mapping[str, Where] = {
    **_names(EVERYWHERE, "", "__version__ ILogger IProgressMonitor Builder OnnxParser OnnxParserRefitter Refitter"),
    **_names(EVERYWHERE, "", "Runtime NetworkDefinitionCreationFlag MemoryPoolType ProfilingVerbosity BuilderFlag"),
    **_names(EVERYWHERE, "", "HardwareCompatibilityLevel LayerInformationFormat SerializationFlag"),
    **_names(EVERYWHERE, "ILogger", "__init__ log"),
    **_names(EVERYWHERE, "ILogger.Severity", "name"),
    **_names(EVERYWHERE, "IProgressMonitor", "__init__ phase_start step_complete phase_finish"),
    **_names(EVERYWHERE, "NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
    **_names(EVERYWHERE, "MemoryPoolType", "WORKSPACE"),
    **_names(EVERYWHERE, "ProfilingVerbosity", "DETAILED"),
    **_names(EVERYWHERE, "BuilderFlag", "SPARSE_WEIGHTS VERSION_COMPATIBLE STRIP_PLAN REFIT_IDENTICAL"),
    **_names(EVERYWHERE, "HardwareCompatibilityLevel", "AMPERE_PLUS"),
    **_names(EVERYWHERE, "LayerInformationFormat", "JSON"),
    **_names(EVERYWHERE, "SerializationFlag", "EXCLUDE_WEIGHTS"),
    **_names(EVERYWHERE, "DataType", "name"),
    **_names(EVERYWHERE, "Builder", "create_network create_builder_config create_optimization_profile"),
    **_names(EVERYWHERE, "Builder", "build_serialized_network"),
    **_names(EVERYWHERE, "INetworkDefinition", "num_inputs num_outputs get_input get_output"),
    **_names(EVERYWHERE, "ITensor", "name shape dtype"),
    **_names(EVERYWHERE, "IOptimizationProfile", "set_shape"),
    **_names(EVERYWHERE, "IBuilderConfig", "set_memory_pool_limit builder_optimization_level profiling_verbosity"),
    **_names(EVERYWHERE, "IBuilderConfig", "add_optimization_profile set_flag hardware_compatibility_level"),
    **_names(EVERYWHERE, "IBuilderConfig", "progress_monitor create_timing_cache set_timing_cache get_timing_cache"),
    **_names(EVERYWHERE, "ITimingCache", "serialize combine"),
    **_names(EVERYWHERE, "OnnxParser", "parse_from_file num_errors get_error"),
    **_names(EVERYWHERE, "ParserError", "desc node node_name node_operator"),
    **_names(EVERYWHERE, "", "TensorIOMode"),
    **_names(EVERYWHERE, "TensorIOMode", "INPUT"),
    **_names(EVERYWHERE, "Runtime", "deserialize_cuda_engine engine_host_code_allowed"),
    **_names(EVERYWHERE, "ICudaEngine", "num_io_tensors get_tensor_name get_tensor_mode get_tensor_shape"),
    **_names(EVERYWHERE, "ICudaEngine", "get_tensor_dtype get_tensor_profile_shape create_execution_context"),
    **_names(EVERYWHERE, "IExecutionContext", "set_input_shape get_tensor_shape set_tensor_address execute_async_v3"),
    **_names(EVERYWHERE, "IExecutionContext", "profiler"),
    **_names(EVERYWHERE, "", "IProfiler"),
    **_names(EVERYWHERE, "IProfiler", "__init__ report_layer_time"),
    **_names(EVERYWHERE, "ICudaEngine", "create_engine_inspector create_serialization_config serialize_with_config"),
    **_names(EVERYWHERE, "ISerializationConfig", "clear_flag"),
    **_names(EVERYWHERE, "EngineInspector", "get_engine_information"),
    **_names(EVERYWHERE, "OnnxParserRefitter", "refit_from_file num_errors get_error"),
    **_names(EVERYWHERE, "Refitter", "refit_cuda_engine"),
    **_names(EVERYWHERE, "", "DataType LayerType get_plugin_registry"),
    **_names(EVERYWHERE, "LayerType", "PLUGIN_V3"),
    **_names(EVERYWHERE, "INetworkDefinition", "num_layers get_layer"),
    **_names(EVERYWHERE, "ILayer", "type name"),
    **_names(EVERYWHERE, "IPluginCreatorV3One", "plugin_namespace"),
    **_names(EVERYWHERE, "IPluginRegistry", "load_library all_creators"),
    **_names(AHEAD_OF_TIME, "plugin", "register aot_impl from_shape_expr cdiv TensorDesc ShapeExpr KernelLaunchParams"),
    **_names(AHEAD_OF_TIME, "plugin", "SymInt32 SymIntExprs SymExprs"),
    **_names(AHEAD_OF_TIME, "plugin.TensorDesc", "dtype shape_expr"),
    **_names(AHEAD_OF_TIME, "plugin.ShapeExpr", "is_fake"),
    **_names(RTX_ONLY, "", "ComputeCapability"),
    **_names(RTX_ONLY, "IBuilderConfig", "num_compute_capabilities set_compute_capability"),
}
