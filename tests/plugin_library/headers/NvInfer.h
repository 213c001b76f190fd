// The part of TensorRT's plugin interface that the plugin library uses, declared after its documentation: for machines
// without TensorRT's headers, and for tests alone. It shows that the library does what it should, not that it fits a
// TensorRT: for that the same tests run with NVIDIA's headers wherever they are found.
#pragma once

#include <cstddef>
#include <cstdint>

#define NV_TENSORRT_MAJOR 0

using cudaStream_t = struct CUstream_st*;

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW32 = 5 };
enum class PluginFieldType : int32_t { kINT32 = 5, kCHAR = 6 };
enum class PluginCapabilityType : int32_t { kCORE, kBUILD, kRUNTIME };
enum class TensorRTPhase : int32_t { kBUILD, kRUNTIME };
enum class DimensionOperation : int32_t { kPROD = 1, kCEIL_DIV = 8 };

struct Dims {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max, opt;
};

struct PluginField {
    PluginField(char const* name_, void const* data_, PluginFieldType type_, int32_t length_)
        : name{name_}, data{data_}, type{type_}, length{length_} {}
    char const* name;
    void const* data;
    PluginFieldType type;
    int32_t length;
};

struct PluginFieldCollection {
    int32_t nbFields;
    PluginField const* fields;
};

class IDimensionExpr;

namespace apiv {
struct VDimensionExpr {
    virtual ~VDimensionExpr() = default;
    virtual bool isConstant() const = 0;
    virtual int64_t getConstantValue() const = 0;
    virtual bool isSizeTensor() const = 0;
};
struct VExprBuilder {
    virtual ~VExprBuilder() = default;
    virtual IDimensionExpr const* constant(int64_t) = 0;
    virtual IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) = 0;
    virtual IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) = 0;
};
} // namespace apiv

class IDimensionExpr {
public:
    int64_t getConstantValue() const { return mImpl->getConstantValue(); }
    virtual ~IDimensionExpr() = default;

protected:
    apiv::VDimensionExpr* mImpl{};
};

struct DimsExprs {
    int32_t nbDims;
    IDimensionExpr const* d[Dims::MAX_DIMS];
};

class IExprBuilder {
public:
    IDimensionExpr const* constant(int64_t value) { return mImpl->constant(value); }
    IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) {
        return mImpl->operation(op, a, b);
    }
    virtual ~IExprBuilder() = default;

protected:
    apiv::VExprBuilder* mImpl{};
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity, char const*) noexcept = 0;
    virtual ~ILogger() = default;
};

struct ILoggerFinder {
    virtual ILogger* findLogger() = 0;
    virtual ~ILoggerFinder() = default;
};

struct IPluginCapability {
    virtual ~IPluginCapability() = default;
};
struct IPluginResourceContext;

struct IPluginV3 {
    virtual ~IPluginV3() = default;
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
};

struct IPluginV3OneCore : IPluginCapability {
    virtual char const* getPluginName() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;
};

struct IPluginV3OneBuild : IPluginCapability {
    virtual int32_t configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept = 0;
    virtual int32_t getOutputDataTypes(DataType*, int32_t, DataType const*, int32_t) const noexcept = 0;
    virtual int32_t getOutputShapes(
        DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs*, int32_t, IExprBuilder&) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t, DynamicPluginTensorDesc const*, int32_t, int32_t) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
};

struct IPluginV3OneRuntime : IPluginCapability {
    virtual int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept = 0;
    virtual int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const*, void* const*, void*,
        cudaStream_t) noexcept = 0;
    virtual IPluginV3* attachToContext(IPluginResourceContext*) noexcept = 0;
    virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

struct IPluginCreatorInterface {
    virtual ~IPluginCreatorInterface() = default;
};

struct IPluginCreatorV3One : IPluginCreatorInterface {
    virtual IPluginV3* createPlugin(char const*, PluginFieldCollection const*, TensorRTPhase) noexcept = 0;
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual char const* getPluginName() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;
};

} // namespace nvinfer1
