// Compiled kernels as layers of TensorRT, for versions without ahead-of-time plugins (10.3 on JetPack 6).
//
// One generic plugin serves every op type. All it knows is in the attributes of its node, which
// engines/resvit_engines/plugins/fields.py describes: the PTX, how to launch it, and the sizes of the outputs. It
// launches through the driver API, with the arguments in the order tensor inputs, int32 scalars, tensor outputs.
//
// Built against TensorRT's headers alone, once per major version: the library links neither TensorRT nor CUDA, and
// opens the driver (libcuda.so.1) when it first launches. Nothing is global but the logger's finder, which TensorRT
// gives once when it loads the library.

#include <NvInfer.h>
#include <cuda.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using nvinfer1::DataType;

constexpr char const* kNAMESPACE = "resvit";
constexpr char const* kVERSION = "1";

// Held against plugins/names.py by a test.
constexpr std::array kOP_TYPES{
    "ResvitAttention", "ResvitAttentionQ", "ResvitAttentionBias", "ResvitAttentionBiasQ", "ResvitAttentionSplit",
    "ResvitAttentionSplitQ", "ResvitAttentionSplitBias", "ResvitAttentionSplitBiasQ", "ResvitBridge",
    "ResvitBridgeNorm", "ResvitBridgeNormQ", "ResvitBridgeW8", "ResvitBridgeW8Norm", "ResvitBridgeW8NormQ",
    "ResvitDeformable", "ResvitDeformableQ",
};

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

void sayError(std::string const& text) noexcept {
    auto* const finder = gLoggerFinder.load();
    auto* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) { return logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str()); }
    std::fprintf(stderr, "resvit plugin: %s\n", text.c_str());
}

[[noreturn]] void fail(std::string const& problem) { throw std::runtime_error{problem}; }

// What every method does with a failure: TensorRT takes no exceptions.
template <typename Work>
int32_t guarded(char const* where, Work work) noexcept {
    try {
        work();
        return 0;
    } catch (std::exception const& error) {
        sayError(std::string{where} + ": " + error.what());
        return 1;
    }
}

constexpr char const* kTOO_FEW_DIMENSIONS = "an input has fewer dimensions than the kernel was compiled for";

// One factor of a size: dimension `axis` of tensor input `input`, divided by `divisor` and rounded up.
struct Term {
    int32_t input, axis, divisor;
};

// `factor` times the product of all terms.
struct Extent {
    int32_t factor{1};
    std::vector<Term> terms;

    int64_t at(nvinfer1::PluginTensorDesc const* inputs) const {
        int64_t whole = factor;
        for (auto const& term : terms) {
            auto const& dims = inputs[term.input].dims;
            if (term.axis >= dims.nbDims) { fail(kTOO_FEW_DIMENSIONS); }
            int64_t const size = (static_cast<int64_t>(dims.d[term.axis]) + term.divisor - 1) / term.divisor;
            if (__builtin_mul_overflow(whole, size, &whole)) { fail("a size is past 64 bits"); }
        }
        return whole;
    }

    nvinfer1::IDimensionExpr const* over(nvinfer1::DimsExprs const* inputs, nvinfer1::IExprBuilder& builder) const {
        using nvinfer1::DimensionOperation;
        auto const* whole = builder.constant(factor);
        for (auto const& term : terms) {
            if (term.axis >= inputs[term.input].nbDims) { fail(kTOO_FEW_DIMENSIONS); }
            auto const* size = inputs[term.input].d[term.axis];
            if (term.divisor != 1) {
                size = builder.operation(DimensionOperation::kCEIL_DIV, *size, *builder.constant(term.divisor));
            }
            whole = builder.operation(DimensionOperation::kPROD, *whole, *size);
        }
        return whole;
    }
};

struct Output {
    DataType type;
    std::vector<Extent> shape;
};

// Reads an attribute's numbers one by one.
class Reader {
public:
    Reader(char const* name, std::vector<int32_t> const& numbers, size_t nbInputs)
        : mName{name}, mNumbers{numbers}, mNbInputs{nbInputs} {}

    bool done() const { return mAt == mNumbers.size(); }
    int32_t number() {
        if (done()) { malformed(); }
        return mNumbers[mAt++];
    }

    Extent extent() {
        Extent found;
        found.factor = number();
        auto const count = number();
        if (found.factor < 0 || count < 0 || count > nvinfer1::Dims::MAX_DIMS) { malformed(); }
        for (int32_t i = 0; i < count; ++i) {
            Term term{};
            term.input = number();
            term.axis = number();
            term.divisor = number();
            if (term.input < 0 || static_cast<size_t>(term.input) >= mNbInputs || term.axis < 0
                || term.axis >= nvinfer1::Dims::MAX_DIMS || term.divisor < 1) {
                malformed();
            }
            found.terms.push_back(term);
        }
        return found;
    }

    std::vector<Extent> extents(int32_t count) {
        if (count < 0) { malformed(); }
        std::vector<Extent> found;
        for (int32_t i = 0; i < count; ++i) { found.push_back(extent()); }
        return found;
    }

    [[noreturn]] void malformed() const { fail("the attribute " + mName + " is malformed"); }
private:
    std::string mName;
    std::vector<int32_t> const& mNumbers;
    size_t mNbInputs;
    size_t mAt{0};
};

// Two texts and five lists of numbers, in the order in which they are declared.
constexpr std::array kTEXTS{"kernel_entry", "kernel_ptx"};
constexpr std::array kLISTS{"kernel_block", "kernel_grid", "kernel_scalars", "kernel_inputs", "kernel_outputs"};

using FieldData = std::pair<void const*, size_t>;
// All attributes, in that order.
std::vector<nvinfer1::PluginField> fieldsFrom(std::array<FieldData, kTEXTS.size() + kLISTS.size()> const& data) {
    std::vector<nvinfer1::PluginField> fields;
    for (size_t i = 0; i < data.size(); ++i) {
        bool const text = i < kTEXTS.size();
        fields.emplace_back(text ? kTEXTS[i] : kLISTS[i - kTEXTS.size()], data[i].first,
            text ? nvinfer1::PluginFieldType::kCHAR : nvinfer1::PluginFieldType::kINT32,
            static_cast<int32_t>(data[i].second));
    }
    return fields;
}

// What a node says about its kernel; never changed once it is read.
class Description {
public:
    explicit Description(nvinfer1::PluginFieldCollection const& fields) {
        for (size_t i = 0; i < kTEXTS.size(); ++i) {
            auto const& field = find(fields, kTEXTS[i], nvinfer1::PluginFieldType::kCHAR);
            texts[i].assign(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
            texts[i].resize(texts[i].find_last_not_of('\0') + 1);
        }
        for (size_t i = 0; i < kLISTS.size(); ++i) {
            auto const& field = find(fields, kLISTS[i], nvinfer1::PluginFieldType::kINT32);
            auto const* const first = static_cast<int32_t const*>(field.data);
            lists[i].assign(first, first + field.length);
        }
        for (auto const number : lists[3]) { inputs.push_back(static_cast<DataType>(number)); }
        Reader block = reader(0), sizes = reader(1), counted = reader(2), results = reader(4);
        threads = block.number();
        sharedBytes = block.number();
        grid = sizes.extents(3);
        scalars = counted.extents(counted.number());
        while (!results.done()) {
            auto const type = static_cast<DataType>(results.number());
            auto const rank = results.number();
            if (rank > nvinfer1::Dims::MAX_DIMS) { results.malformed(); }
            outputs.push_back({type, results.extents(rank)});
        }
        for (auto const* rest : {&block, &sizes, &counted}) {
            if (!rest->done()) { rest->malformed(); }
        }
        bool const whole = !texts[0].empty() && !texts[1].empty() && !inputs.empty() && !outputs.empty();
        if (!whole || threads < 1 || sharedBytes < 0) {
            fail("the attributes of the kernel " + texts[0] + " are malformed");
        }
    }

    std::array<std::string, kTEXTS.size()> texts;
    std::array<std::vector<int32_t>, kLISTS.size()> lists;
    int32_t threads{0}, sharedBytes{0};
    std::vector<Extent> grid, scalars;
    std::vector<DataType> inputs;
    std::vector<Output> outputs;
private:
    static nvinfer1::PluginField const& find(
        nvinfer1::PluginFieldCollection const& fields, char const* name, nvinfer1::PluginFieldType type) {
        for (int32_t i = 0; i < fields.nbFields; ++i) {
            auto const& field = fields.fields[i];
            if (field.name != nullptr && std::string{name} == field.name) {
                if (field.type == type && field.data != nullptr && field.length > 0) { return field; }
                fail("the attribute " + std::string{name} + " has another type");
            }
        }
        fail("the node has no attribute " + std::string{name});
    }

    Reader reader(size_t list) const { return Reader{kLISTS[list], lists[list], inputs.size()}; }
};

// The driver, opened by name: a build needs no CUDA library, and a machine without a driver gets a sentence.
class Driver {
public:
    Driver() {
        // Never closed: the driver serves the whole process.
        void* const library = dlopen("libcuda.so.1", RTLD_NOW);
        if (library == nullptr) {
            char const* const reason = dlerror();
            fail("the NVIDIA driver does not load: " + std::string{reason != nullptr ? reason : "no reason"});
        }
        find(library, moduleLoadData, "cuModuleLoadData");
        find(library, moduleGetFunction, "cuModuleGetFunction");
        find(library, moduleUnload, "cuModuleUnload");
        find(library, funcSetAttribute, "cuFuncSetAttribute");
        find(library, launchKernel, "cuLaunchKernel");
        find(library, ctxGetCurrent, "cuCtxGetCurrent");
        find(library, ctxPushCurrent, "cuCtxPushCurrent_v2");
        find(library, ctxPopCurrent, "cuCtxPopCurrent_v2");
        find(library, getErrorString, "cuGetErrorString");
    }

    void check(CUresult result, std::string const& what) const {
        if (result == CUDA_SUCCESS) { return; }
        char const* text = nullptr;
        getErrorString(result, &text);
        fail(what + " failed: " + (text != nullptr ? text : "error") + " (" + std::to_string(result) + ")");
    }

    decltype(&::cuModuleLoadData) moduleLoadData{};
    decltype(&::cuModuleGetFunction) moduleGetFunction{};
    decltype(&::cuModuleUnload) moduleUnload{};
    decltype(&::cuFuncSetAttribute) funcSetAttribute{};
    decltype(&::cuLaunchKernel) launchKernel{};
    decltype(&::cuCtxGetCurrent) ctxGetCurrent{};
    decltype(&::cuCtxPushCurrent) ctxPushCurrent{};
    decltype(&::cuCtxPopCurrent) ctxPopCurrent{};
    decltype(&::cuGetErrorString) getErrorString{};
private:
    template <typename Function>
    static void find(void* library, Function& function, char const* name) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr) { fail("the NVIDIA driver has no " + std::string{name}); }
    }
};

// A kernel that is loaded into the CUDA context that was current.
class LoadedKernel {
public:
    explicit LoadedKernel(Description const& what) {
        auto const& [entry, ptx] = what.texts;
        mDriver.check(mDriver.ctxGetCurrent(&mContext), "cuCtxGetCurrent");
        mDriver.check(mDriver.moduleLoadData(&mModule, ptx.c_str()), "loading the kernel " + entry);
        try {
            mDriver.check(mDriver.moduleGetFunction(&mFunction, mModule, entry.c_str()), "finding the kernel " + entry);
            if (what.sharedBytes > kSHARED_FOR_ALL) {
                auto const attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                mDriver.check(mDriver.funcSetAttribute(mFunction, attribute, what.sharedBytes),
                    "asking for " + std::to_string(what.sharedBytes) + " bytes of shared memory");
            }
        } catch (...) {
            unload();
            throw;
        }
    }
    LoadedKernel(LoadedKernel const&) = delete;
    LoadedKernel& operator=(LoadedKernel const&) = delete;
    ~LoadedKernel() { unload(); }

    void launch(std::array<unsigned, 3> grid, Description const& what, void** arguments, cudaStream_t stream) const {
        mDriver.check(mDriver.launchKernel(mFunction, grid[0], grid[1], grid[2], static_cast<unsigned>(what.threads), 1,
                          1, static_cast<unsigned>(what.sharedBytes), stream, arguments, nullptr),
            "launching the kernel " + what.texts[0]);
    }
private:
    // From here on a launch must ask for its shared memory.
    static constexpr int32_t kSHARED_FOR_ALL = 48 << 10;

    void unload() noexcept {
        // A context that is gone took the module along.
        if (mDriver.ctxPushCurrent(mContext) != CUDA_SUCCESS) { return; }
        guarded("unloading", [this] { mDriver.check(mDriver.moduleUnload(mModule), "cuModuleUnload"); });
        CUcontext popped{};
        guarded("unloading", [&] { mDriver.check(mDriver.ctxPopCurrent(&popped), "cuCtxPopCurrent"); });
    }

    Driver mDriver;
    CUcontext mContext{};
    CUmodule mModule{};
    CUfunction mFunction{};
};

class ResvitPlugin final : public nvinfer1::IPluginV3,
                           public nvinfer1::IPluginV3OneCore,
                           public nvinfer1::IPluginV3OneBuild,
                           public nvinfer1::IPluginV3OneRuntime {
public:
    ResvitPlugin(char const* opType, std::shared_ptr<Description const> what)
        : mOpType{opType}, mWhat{std::move(what)} {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        using nvinfer1::PluginCapabilityType;
        if (type == PluginCapabilityType::kCORE) { return static_cast<nvinfer1::IPluginV3OneCore*>(this); }
        if (type == PluginCapabilityType::kBUILD) { return static_cast<nvinfer1::IPluginV3OneBuild*>(this); }
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        nvinfer1::IPluginV3* copy = nullptr;
        guarded(mOpType, [&] { copy = new ResvitPlugin{mOpType, mWhat}; });
        return copy;
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    char const* getPluginName() const noexcept override { return mOpType; }
    char const* getPluginVersion() const noexcept override { return kVERSION; }
    char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(mWhat->outputs.size()); }
    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes,
        int32_t nbInputs) const noexcept override {
        return guarded(mOpType, [&] {
            require(nbInputs, nbOutputs);
            for (int32_t i = 0; i < nbInputs; ++i) {
                if (inputTypes[i] == mWhat->inputs[i]) { continue; }
                fail("input " + std::to_string(i) + " has another type than the kernel's");
            }
            for (int32_t i = 0; i < nbOutputs; ++i) { outputTypes[i] = mWhat->outputs[i].type; }
        });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& builder) noexcept override {
        return guarded(mOpType, [&] {
            require(nbInputs, nbOutputs);
            for (int32_t i = 0; i < nbOutputs; ++i) {
                auto const& shape = mWhat->outputs[i].shape;
                outputs[i].nbDims = static_cast<int32_t>(shape.size());
                for (size_t d = 0; d < shape.size(); ++d) { outputs[i].d[d] = shape[d].over(inputs, builder); }
            }
        });
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override {
        if (guarded(mOpType, [&] { require(nbInputs, nbOutputs); }) != 0) { return false; }
        auto const type = pos < nbInputs ? mWhat->inputs[pos] : mWhat->outputs[pos - nbInputs].type;
        return inOut[pos].desc.format == nvinfer1::TensorFormat::kLINEAR && inOut[pos].desc.type == type;
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const*, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept override {
        return guarded(mOpType, [&] { require(nbInputs, nbOutputs); });
    }

    // Loads the kernel here, since loading may not be captured into a CUDA graph, as enqueue may be.
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const*, int32_t nbInputs, nvinfer1::PluginTensorDesc const*,
        int32_t nbOutputs) noexcept override {
        return guarded(mOpType, [&] {
            require(nbInputs, nbOutputs);
            load();
        });
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
        void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept override {
        return guarded(mOpType, [&] {
            load();
            std::array<unsigned, 3> grid{};
            for (size_t i = 0; i < grid.size(); ++i) {
                // The driver's own limits: 2^31 - 1 blocks in x, 65535 in y and z.
                grid[i] = bounded(mWhat->grid[i].at(inputDesc), i == 0 ? std::numeric_limits<int32_t>::max() : 65535);
                if (grid[i] == 0) { return; } // an empty tensor
            }
            std::vector<void const*> tensors(inputs, inputs + mWhat->inputs.size()); // {} would be two elements
            tensors.insert(tensors.end(), outputs, outputs + mWhat->outputs.size());
            std::vector<int32_t> scalars;
            for (auto const& scalar : mWhat->scalars) {
                auto const value = bounded(scalar.at(inputDesc), std::numeric_limits<int32_t>::max());
                scalars.push_back(static_cast<int32_t>(value));
            }
            // The driver takes the address of every argument.
            std::vector<void*> arguments;
            auto const add = [&arguments](auto& values, size_t from, size_t to) {
                for (size_t i = from; i < to; ++i) { arguments.push_back(&values[i]); }
            };
            add(tensors, 0, mWhat->inputs.size());
            add(scalars, 0, scalars.size());
            add(tensors, mWhat->inputs.size(), tensors.size());
            mLoaded->launch(grid, *mWhat, arguments.data(), stream);
        });
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        bool const failed = guarded(mOpType, [this] {
            std::array<FieldData, kTEXTS.size() + kLISTS.size()> data;
            auto next = data.begin();
            for (auto const& text : mWhat->texts) { *next++ = {text.data(), text.size()}; }
            for (auto const& list : mWhat->lists) { *next++ = {list.data(), list.size()}; }
            mFields = fieldsFrom(data);
            mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        });
        return failed ? nullptr : &mCollection;
    }
private:
    void require(int32_t nbInputs, int32_t nbOutputs) const {
        if (nbInputs != static_cast<int32_t>(mWhat->inputs.size()) || nbOutputs != getNbOutputs()) {
            fail("the node has another number of inputs or outputs than its kernel");
        }
    }

    void load() {
        if (mLoaded == nullptr) { mLoaded = std::make_unique<LoadedKernel>(*mWhat); }
    }

    static unsigned bounded(int64_t value, int64_t largest) {
        if (value >= 0 && value <= largest) { return static_cast<unsigned>(value); }
        fail("a size of " + std::to_string(value) + " is more than a launch takes");
    }

    char const* mOpType;
    std::shared_ptr<Description const> mWhat; // shared by clones; never changed
    std::unique_ptr<LoadedKernel> mLoaded;    // of this clone, which serves one execution context
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{0, nullptr};
};

class ResvitCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit ResvitCreator(char const* opType) : mOpType{opType}, mFields{fieldsFrom({})} {}

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase) noexcept override {
        nvinfer1::IPluginV3* plugin = nullptr;
        guarded(name != nullptr ? name : mOpType, [&] {
            if (fields == nullptr) { fail("the node has no attributes"); }
            plugin = new ResvitPlugin{mOpType, std::make_shared<Description const>(*fields)};
        });
        return plugin;
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    char const* getPluginName() const noexcept override { return mOpType; }
    char const* getPluginVersion() const noexcept override { return kVERSION; }
    char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }
private:
    char const* mOpType;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{static_cast<int32_t>(mFields.size()), mFields.data()};
};

} // namespace

// Asked before the library is given to TensorRT, whose interfaces change from one major version to the next.
extern "C" __attribute__((visibility("default"))) int32_t resvitTensorRTMajor() { return NV_TENSORRT_MAJOR; }

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    gLoggerFinder.store(finder);
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators) {
    // Made at the first call and never changed; they must outlive TensorRT's registry.
    static auto const creators = [] {
        std::array<nvinfer1::IPluginCreatorInterface*, kOP_TYPES.size()> made{};
        for (size_t i = 0; i < made.size(); ++i) { made[i] = new ResvitCreator{kOP_TYPES[i]}; }
        return made;
    }();
    nbCreators = static_cast<int32_t>(creators.size());
    return creators.data();
}
