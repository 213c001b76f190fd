// Drives the plugin library as TensorRT does: finds a creator, makes a plugin, asks for shapes, and lets it launch.
// Standard input says what, a line each:  op NAME | text FIELD CONTENT-IN-HEX | list FIELD NUMBERS | tensor TYPE SIZES
// and  skip-serialising.  Standard output says what came of it; "log" lines are what the plugin told the logger.
#include <NvInfer.h>

#include <dlfcn.h>

#include <cstdlib>
#include <iostream>
#include <list>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Value final : apiv::VDimensionExpr {
    explicit Value(int64_t number) : number{number} {}
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return number; }
    bool isSizeTensor() const override { return false; }
    int64_t number;
};

struct Expression final : IDimensionExpr {
    explicit Expression(int64_t number) : value{number} { mImpl = &value; }
    Value value;
};

struct Arithmetic final : apiv::VExprBuilder {
    IDimensionExpr const* constant(int64_t number) override { return &made.emplace_back(number); }
    IDimensionExpr const* operation(
        DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second) override {
        int64_t const a = first.getConstantValue(), b = second.getConstantValue();
        if (op == DimensionOperation::kPROD) { return constant(a * b); }
        if (op == DimensionOperation::kCEIL_DIV) { return constant((a + b - 1) / b); }
        std::abort();
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        std::abort();
    }
    std::list<Expression> made;
};

struct Builder final : IExprBuilder {
    Builder() { mImpl = &arithmetic; }
    Arithmetic arithmetic;
};

struct Logger final : ILogger {
    void log(Severity, char const* text) noexcept override { std::cout << "log " << text << std::endl; }
};

struct Finder final : ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
    Logger logger;
};

std::vector<int64_t> shown(Dims const& dims) { return {dims.d, dims.d + dims.nbDims}; }

std::ostream& operator<<(std::ostream& out, std::vector<int64_t> const& numbers) {
    for (auto const number : numbers) { out << ' ' << number; }
    return out;
}

} // namespace

int main(int count, char** arguments) {
    if (count != 2) { return 64; }
    void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::cout << "load " << dlerror() << std::endl;
        return 65;
    }
    Finder finder;
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    int32_t nbCreators = 0;
    auto const getCreators
        = reinterpret_cast<IPluginCreatorInterface* const* (*) (int32_t&)>(dlsym(library, "getCreators"));
    auto* const* const creators = getCreators(nbCreators);
    std::map<std::string, IPluginCreatorV3One*> known;
    for (int32_t i = 0; i < nbCreators; ++i) {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        known[creator->getPluginName()] = creator;
        std::cout << "creator " << creator->getPluginName() << ' ' << creator->getPluginVersion() << ' '
                  << creator->getPluginNamespace() << std::endl;
    }

    std::string op;
    bool serialise = true;
    std::list<std::string> names, texts;
    std::list<std::vector<int32_t>> lists;
    std::vector<PluginField> fields;
    std::vector<PluginTensorDesc> inputs;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words{line};
        std::string kind, name, hex;
        words >> kind;
        if (kind == "op") {
            words >> op;
        } else if (kind == "text") {
            words >> names.emplace_back() >> hex;
            auto& text = texts.emplace_back();
            for (size_t i = 0; i + 1 < hex.size(); i += 2) {
                text.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
            }
            fields.emplace_back(names.back().c_str(), text.data(), PluginFieldType::kCHAR, text.size());
        } else if (kind == "list") {
            words >> names.emplace_back();
            auto& list = lists.emplace_back();
            for (int32_t number = 0; words >> number;) { list.push_back(number); }
            fields.emplace_back(names.back().c_str(), list.data(), PluginFieldType::kINT32, list.size());
        } else if (kind == "tensor") {
            int32_t type = 0;
            words >> type;
            auto& desc = inputs.emplace_back();
            desc = PluginTensorDesc{{}, static_cast<DataType>(type), TensorFormat::kLINEAR, 0.0F};
            for (int64_t size = 0; words >> size;) { desc.dims.d[desc.dims.nbDims++] = size; }
        } else {
            serialise = false;
        }
    }
    if (known.count(op) == 0) { return 66; }
    auto* const creator = known[op];
    auto const* const declared = creator->getFieldNames();
    for (int32_t i = 0; i < declared->nbFields; ++i) { std::cout << "declared " << declared->fields[i].name << std::endl; }
    PluginFieldCollection const given{static_cast<int32_t>(fields.size()), fields.data()};
    std::unique_ptr<IPluginV3> plugin{creator->createPlugin("node", &given, TensorRTPhase::kBUILD)};
    if (plugin == nullptr) { return 1; }
    std::unique_ptr<IPluginV3> again{plugin->clone()};
    auto* const build = static_cast<IPluginV3OneBuild*>(again->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const core = static_cast<IPluginV3OneCore*>(again->getCapabilityInterface(PluginCapabilityType::kCORE));
    std::cout << "plugin " << core->getPluginName() << ' ' << core->getPluginVersion() << ' '
              << core->getPluginNamespace() << std::endl;

    auto const nbInputs = static_cast<int32_t>(inputs.size()), nbOutputs = build->getNbOutputs();
    std::vector<DataType> inputTypes, outputTypes(nbOutputs);
    for (auto const& input : inputs) { inputTypes.push_back(input.type); }
    if (build->getOutputDataTypes(outputTypes.data(), nbOutputs, inputTypes.data(), nbInputs) != 0) { return 2; }
    Builder builder;
    std::vector<DimsExprs> over(nbInputs), shapes(nbOutputs);
    for (int32_t i = 0; i < nbInputs; ++i) {
        over[i].nbDims = inputs[i].dims.nbDims;
        for (int32_t axis = 0; axis < over[i].nbDims; ++axis) {
            over[i].d[axis] = builder.constant(inputs[i].dims.d[axis]);
        }
    }
    if (build->getOutputShapes(over.data(), nbInputs, nullptr, 0, shapes.data(), nbOutputs, builder) != 0) { return 3; }
    std::vector<PluginTensorDesc> outputs;
    for (int32_t i = 0; i < nbOutputs; ++i) {
        auto& desc = outputs.emplace_back();
        desc = PluginTensorDesc{{}, outputTypes[i], TensorFormat::kLINEAR, 0.0F};
        for (int32_t axis = 0; axis < shapes[i].nbDims; ++axis) {
            desc.dims.d[desc.dims.nbDims++] = shapes[i].d[axis]->getConstantValue();
        }
        std::cout << "output " << static_cast<int32_t>(desc.type) << shown(desc.dims) << std::endl;
    }

    std::vector<DynamicPluginTensorDesc> all;
    for (auto const& tensors : {inputs, outputs}) {
        for (auto const& desc : tensors) { all.push_back({desc, desc.dims, desc.dims, desc.dims}); }
    }
    for (int32_t at = 0; at < nbInputs + nbOutputs; ++at) {
        auto asked = all;
        bool const linear = build->supportsFormatCombination(at, asked.data(), nbInputs, nbOutputs);
        asked[at].desc.format = TensorFormat::kCHW32;
        bool const packed = build->supportsFormatCombination(at, asked.data(), nbInputs, nbOutputs);
        asked[at] = all[at];
        asked[at].desc.type = DataType::kINT64;
        bool const other = build->supportsFormatCombination(at, asked.data(), nbInputs, nbOutputs);
        std::cout << "format " << at << ' ' << linear << packed << other << std::endl;
    }
    if (build->configurePlugin(all.data(), nbInputs, all.data() + nbInputs, nbOutputs) != 0) { return 4; }

    // As an engine does: the attributes that the plugin wants to keep, and a new plugin of those.
    if (serialise) {
        auto* const runtime
            = static_cast<IPluginV3OneRuntime*>(again->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        auto const* const kept = runtime->getFieldsToSerialize();
        if (kept == nullptr) { return 5; }
        std::unique_ptr<IPluginV3> read{creator->createPlugin("node", kept, TensorRTPhase::kRUNTIME)};
        if (read == nullptr) { return 6; }
        plugin = std::move(read);
    }
    auto* const original
        = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached{original->attachToContext(nullptr)};
    auto* const runtime
        = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    if (runtime->onShapeChange(inputs.data(), nbInputs, outputs.data(), nbOutputs) != 0) { return 7; }
    std::vector<void const*> from;
    std::vector<void*> to;
    for (uintptr_t i = 0; i < inputs.size(); ++i) { from.push_back(reinterpret_cast<void*>(0x1000 + i)); }
    for (uintptr_t i = 0; i < outputs.size(); ++i) { to.push_back(reinterpret_cast<void*>(0x2000 + i)); }
    auto const stream = reinterpret_cast<cudaStream_t>(0x77);
    for (int run = 0; run < 2; ++run) {
        if (runtime->enqueue(inputs.data(), outputs.data(), from.data(), to.data(), nullptr, stream) != 0) { return 8; }
    }
    attached.reset();
    std::cout << "done" << std::endl;
    return 0;
}
