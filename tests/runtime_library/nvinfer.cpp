// A stand-in for TensorRT's runtime, for tests without a GPU. Its engines are texts that say which tensors there are:
//
//   engine
//   input NAME TYPE SIZES (-1 is open) min SIZES max SIZES
//   output NAME TYPE SEED SCALE SHIFT KIND SIZES     (-1: the batch, -2 and -3: the image's height and width)
//
// and what is computed is small but real: every element of an output is a sum of eight products, of numbers that SEED and
// its place choose, with values of its own image; KIND says what is made of it. `standin_compute` is the same for Python.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" void standinLaunch(cudaStream_t stream, std::function<void()> work);

namespace {

std::string environment(char const* name) {
    char const* const found = std::getenv(name);
    return found == nullptr ? "" : found;
}

struct Tensor {
    std::string name, type, kind;
    std::vector<int64_t> sizes, least, most;
    uint64_t seed = 0;
    double scale = 1, shift = 0;
};

struct Plan {
    std::vector<Tensor> tensors;
    Tensor const* find(std::string const& name) const {
        for (auto const& one : tensors) {
            if (one.name == name) { return &one; }
        }
        return nullptr;
    }
    Tensor const& image() const { return tensors.front(); }
};

bool parsed(std::string const& text, Plan& plan) {
    std::istringstream lines{text};
    std::string line;
    if (!std::getline(lines, line) || line != "engine") { return false; }
    while (std::getline(lines, line)) {
        std::istringstream words{line};
        std::string word;
        Tensor made;
        words >> word >> made.name >> made.type;
        if (word == "output") { words >> made.seed >> made.scale >> made.shift >> made.kind; }
        auto* sizes = &made.sizes;
        while (words >> word) {
            if (word == "min" || word == "max") {
                sizes = word == "min" ? &made.least : &made.most;
            } else {
                sizes->push_back(std::stoll(word));
            }
        }
        plan.tensors.push_back(made);
    }
    return !plan.tensors.empty();
}

uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

float from_half(uint16_t bits) {
    int const exponent = bits >> 10 & 31, fraction = bits & 1023;
    float const value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                      : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

uint16_t to_half(float value) {
    float const size = std::fabs(value);
    uint16_t const sign = std::signbit(value) ? 0x8000 : 0;
    if (size < 6.103515625e-05F) { return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))); }
    int const exponent = std::ilogb(size);
    auto const fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return sign | static_cast<uint16_t>(((exponent + 15) << 10) + fraction - 1024);
}

float element(void const* data, std::string const& type, int64_t at) {
    if (type == "float32") { return static_cast<float const*>(data)[at]; }
    if (type == "float16") { return from_half(static_cast<uint16_t const*>(data)[at]); }
    if (type == "int8") { return static_cast<int8_t const*>(data)[at] / 127.0F; }
    return static_cast<uint8_t const*>(data)[at] / 255.0F;
}

int64_t product(std::vector<int64_t> const& sizes) {
    int64_t found = 1;
    for (auto const size : sizes) { found *= size; }
    return found;
}

std::vector<int64_t> sizes_of(Tensor const& output, std::vector<int64_t> const& image) {
    std::vector<int64_t> sizes;
    for (auto const size : output.sizes) { sizes.push_back(size >= 0 ? size : image[size == -1 ? 0 : size == -2 ? 2 : 3]); }
    return sizes;
}

void compute(Tensor const& image, Tensor const& output, std::vector<int64_t> const& shape, void const* in, void* out) {
    auto const sizes = sizes_of(output, shape);
    int64_t const batch = shape[0], of_image = product(shape) / batch, of_output = product(sizes) / batch;
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < of_output; ++i) {
            double sum = 0;
            for (uint64_t tap = 0; tap < 8; ++tap) {
                uint64_t const key = mixed(output.seed * 1000003 + static_cast<uint64_t>(i) * 8 + tap);
                double const weight = static_cast<double>(key >> 40) / (1 << 23) - 1.0;
                int64_t const from = b * of_image + static_cast<int64_t>(key % static_cast<uint64_t>(of_image));
                sum += weight * static_cast<double>(element(in, image.type, from));
            }
            auto value = static_cast<float>(sum * output.scale + output.shift);
            if (output.kind == "positive") { value = std::fabs(value); }
            if (output.kind == "likely") { value = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(value)))); }
            if (output.kind == "nan") { value = std::numeric_limits<float>::quiet_NaN(); }
            int64_t const at = b * of_output + i;
            if (output.type == "float16") {
                static_cast<uint16_t*>(out)[at] = to_half(value);
            } else if (output.type == "int32") {
                static_cast<int32_t*>(out)[at] = static_cast<int32_t>(std::fabs(value));
            } else {
                static_cast<float*>(out)[at] = value;
            }
        }
    }
}

Dims dims_of(std::vector<int64_t> const& sizes) {
    Dims dims{};
    for (auto const size : sizes) { dims.d[dims.nbDims++] = size; }
    return dims;
}

class Context final : public IExecutionContext {
public:
    explicit Context(Plan const& plan) : plan_{plan} {
        for (auto const& one : plan.tensors) { shapes_[one.name] = one.sizes; }
    }
    bool setInputShape(char const* name, Dims const& dims) noexcept override {
        Tensor const& image = *plan_.find(name);
        for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
            if (dims.d[axis] < image.least[axis] || dims.d[axis] > image.most[axis]) { return false; }
        }
        shapes_[name].assign(dims.d, dims.d + dims.nbDims);
        return true;
    }
    Dims getTensorShape(char const* name) const noexcept override {
        Tensor const& one = *plan_.find(name);
        if (one.kind == "unknown") { return dims_of({-1, 2}); }
        return dims_of(one.kind.empty() ? shapes_.at(name) : sizes_of(one, shapes_.at(plan_.image().name)));
    }
    bool setTensorAddress(char const* name, void* data) noexcept override {
        addresses_[name] = data;
        return true;
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        auto const trouble = environment("RESVIT_TEST_TROUBLE");
        if (trouble == "run" || (trouble == "capture" && ++runs_ == 2)) { return false; }
        auto const shape = shapes_.at(plan_.image().name);
        auto const addresses = addresses_;
        standinLaunch(stream, [=, this_plan = plan_] {
            for (auto const& one : this_plan.tensors) {
                if (one.kind.empty()) { continue; }
                compute(this_plan.image(), one, shape, addresses.at(this_plan.image().name), addresses.at(one.name));
            }
        });
        return true;
    }

private:
    Plan plan_;
    std::map<std::string, std::vector<int64_t>> shapes_;
    std::map<std::string, void*> addresses_;
    int runs_ = 0;
};

class TheEngine final : public ICudaEngine {
public:
    explicit TheEngine(Plan plan) : plan_{std::move(plan)} {}
    int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(plan_.tensors.size()); }
    char const* getIOTensorName(int32_t index) const noexcept override { return plan_.tensors[index].name.c_str(); }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override {
        return plan_.find(name)->kind.empty() ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    DataType getTensorDataType(char const* name) const noexcept override {
        static std::map<std::string, DataType> const types{{"float32", DataType::kFLOAT}, {"float16", DataType::kHALF},
            {"int8", DataType::kINT8}, {"uint8", DataType::kUINT8}, {"int32", DataType::kINT32}};
        auto const found = types.find(plan_.find(name)->type);
        return found == types.end() ? DataType::kFP8 : found->second;
    }
    Dims getTensorShape(char const* name) const noexcept override {
        auto sizes = plan_.find(name)->sizes;
        for (auto& size : sizes) { size = size < 0 ? -1 : size; }
        return dims_of(sizes);
    }
    Dims getProfileShape(char const* name, int32_t, OptProfileSelector select) const noexcept override {
        return dims_of(select == OptProfileSelector::kMIN ? plan_.find(name)->least : plan_.find(name)->most);
    }
    IExecutionContext* createExecutionContext() noexcept override {
        return environment("RESVIT_TEST_TROUBLE") == "context" ? nullptr : new Context{plan_};
    }

private:
    Plan plan_;
};

class TheRuntime final : public IRuntime {
public:
    explicit TheRuntime(ILogger& logger) : logger_{logger} {}
    void setEngineHostCodeAllowed(bool) noexcept override {}
    ICudaEngine* deserializeCudaEngine(void const* blob, size_t size) noexcept override {
        Plan plan;
        if (parsed({static_cast<char const*>(blob), size}, plan)) { return new TheEngine{plan}; }
        logger_.log(ILogger::Severity::kERROR, "Serialization assertion failed: version tag does not match");
        return nullptr;
    }

private:
    ILogger& logger_;
};

class Registry final : public IPluginRegistry {
public:
    void* loadLibrary(char const* path) noexcept override { return std::strlen(path) != 0 ? this : nullptr; }
};

} // namespace

extern "C" {
void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept {
    return environment("RESVIT_TEST_TROUBLE") == "runtime" ? nullptr : new TheRuntime{*static_cast<ILogger*>(logger)};
}
int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
IPluginRegistry* getPluginRegistry() noexcept {
    static Registry registry;
    return &registry;
}
// One output of an engine for an image input of this shape; -1 where there is none.
int64_t standin_compute(char const* text, char const* output, int64_t const* shape, int32_t rank, void const* in, void* out) {
    Plan plan;
    if (!parsed(text, plan) || plan.find(output) == nullptr) { return -1; }
    compute(plan.image(), *plan.find(output), {shape, shape + rank}, in, out);
    return 0;
}
}
