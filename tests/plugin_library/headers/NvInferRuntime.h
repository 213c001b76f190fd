// The part of TensorRT's runtime interface that the C++ runtime (engines/runtime) uses, declared after its documentation;
// see NvInfer.h. tests/runtime_library/nvinfer.cpp computes behind it.
#pragma once

#include "NvInfer.h"

#define NV_TENSORRT_VERSION 100300

namespace nvinfer1 {

enum class TensorIOMode : int32_t { kNONE, kINPUT, kOUTPUT };
enum class OptProfileSelector : int32_t { kMIN, kOPT, kMAX };

class IExecutionContext {
public:
    virtual ~IExecutionContext() = default;
    virtual bool setInputShape(char const* tensorName, Dims const& dims) noexcept = 0;
    virtual Dims getTensorShape(char const* tensorName) const noexcept = 0;
    virtual bool setTensorAddress(char const* tensorName, void* data) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
public:
    virtual ~ICudaEngine() = default;
    virtual int32_t getNbIOTensors() const noexcept = 0;
    virtual char const* getIOTensorName(int32_t index) const noexcept = 0;
    virtual TensorIOMode getTensorIOMode(char const* tensorName) const noexcept = 0;
    virtual DataType getTensorDataType(char const* tensorName) const noexcept = 0;
    virtual Dims getTensorShape(char const* tensorName) const noexcept = 0;
    virtual Dims getProfileShape(
        char const* tensorName, int32_t profileIndex, OptProfileSelector select) const noexcept = 0;
    virtual IExecutionContext* createExecutionContext() noexcept = 0;
};

class IRuntime {
public:
    virtual ~IRuntime() = default;
    virtual void setEngineHostCodeAllowed(bool allowed) noexcept = 0;
    virtual ICudaEngine* deserializeCudaEngine(void const* blob, size_t size) noexcept = 0;
};

class IPluginRegistry {
public:
    virtual ~IPluginRegistry() = default;
    virtual void* loadLibrary(char const* pluginPath) noexcept = 0;
};

} // namespace nvinfer1

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept;
extern "C" int32_t getInferLibVersion() noexcept;
extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;

namespace nvinfer1 {
inline IRuntime* createInferRuntime(ILogger& logger) noexcept {
    return static_cast<IRuntime*>(createInferRuntime_INTERNAL(&logger, NV_TENSORRT_VERSION));
}
} // namespace nvinfer1
