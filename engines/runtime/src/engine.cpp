#include "engine.hpp"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>

#include "common.hpp"
#include "manifest.hpp"
#include "tensor.hpp"

namespace resvit {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr bool kRtx = true;
#else
constexpr bool kRtx = false;
#endif
constexpr std::int64_t kAmpere = 80;
constexpr const char* kEngine = "engine.plan";
constexpr const char* kRebuild = "Build the engine again on this device.";

// What TensorRT said last of what went wrong.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, char const* text) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::lock_guard<std::mutex> alone(mutex_);
    try {
      last_ = text;
    } catch (const std::bad_alloc&) {
    }
  }
  std::string said() const {
    const std::lock_guard<std::mutex> alone(mutex_);
    return last_.empty() ? "it gave no reason" : shown(last_);
  }

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

void call(cudaError_t code, const char* name) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // it would stay the "last error" that other libraries of this process look at
  const std::string problem = std::string(name) + " failed: " + cudaGetErrorString(code) + ".";
  if (code == cudaErrorMemoryAllocation) {
    throw Error(problem, "Close other programs that use the GPU, use fewer streams, or build with a smaller batch.",
                Code::System);
  }
  if (code == cudaErrorNoDevice || code == cudaErrorInsufficientDriver) {
    throw Error(problem, "Run on the device that the engine is for, with a driver as new as its CUDA.", Code::Missing);
  }
  throw Error(problem, "Check the GPU with nvidia-smi, or dmesg on a Jetson, and start the program again.", Code::System);
}

// Something that CUDA gave, and the call that gives it back.
template <typename Kind, cudaError_t (*GiveBack)(Kind)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Kind made) : held_(made) {}
  Owned(Owned&& other) noexcept : held_(std::exchange(other.held_, Kind())) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(held_, other.held_);
    return *this;
  }
  ~Owned() {
    if (held_ != Kind()) GiveBack(held_);
  }
  Kind get() const { return held_; }

 private:
  Kind held_ = Kind();
};

cudaError_t end_stream(cudaStream_t stream) {
  cudaStreamSynchronize(stream);
  return cudaStreamDestroy(stream);
}

using DeviceMemory = Owned<void*, cudaFree>;
using PinnedMemory = Owned<void*, cudaFreeHost>;
using Stream = Owned<cudaStream_t, end_stream>;
using Graph = Owned<cudaGraph_t, cudaGraphDestroy>;
using Executable = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;

std::vector<std::int64_t> shape_of(const nvinfer1::Dims& dims) {
  return {dims.d, dims.d + std::max<std::int32_t>(dims.nbDims, 0)};
}

nvinfer1::Dims dims_of(const std::vector<std::int64_t>& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

Type type_of(nvinfer1::DataType type, const std::string& name) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return Type::Float32;
    case nvinfer1::DataType::kHALF: return Type::Float16;
    case nvinfer1::DataType::kINT8: return Type::Int8;
    case nvinfer1::DataType::kUINT8: return Type::UInt8;
    case nvinfer1::DataType::kINT32: return Type::Int32;
    case nvinfer1::DataType::kINT64: return Type::Int64;
    case nvinfer1::DataType::kBOOL: return Type::Bool;
    default: break;
  }
  throw Error("The engine's '" + name + "' is of a type that is not read here.",
              "Export the model with FP32 or FP16 inputs and outputs.", Code::Impossible);
}

// What was deserialised; members end in the reverse order.
struct Loaded {
  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::int32_t device = 0;
  std::map<std::string, std::vector<std::int64_t>> largest;  // of every input, without the batch
};

// An input or output: pinned memory on the host, and as much on the device.
struct Buffer {
  Spec spec;
  PinnedMemory host;
  DeviceMemory device;
  std::vector<std::int64_t> shape;  // of the current batch

  std::size_t bytes() const { return count_of(shape) * size_of(spec.type); }
};

class EngineLane final : public Lane {
 public:
  EngineLane(std::shared_ptr<Loaded> loaded, const Engine& engine, std::int64_t capacity, bool cuda_graph)
      : loaded_(std::move(loaded)), capacity_(capacity), wants_graph_(cuda_graph) {
    context_.reset(loaded_->engine->createExecutionContext());
    if (context_ == nullptr) {
      throw Error("TensorRT could not make an execution context: " + loaded_->logger.said() + ".",
                  "Close other programs that use the GPU, use fewer streams, or build with a smaller batch.",
                  Code::System);
    }
    for (const auto* specs : {&engine.inputs, &engine.outputs}) {
      for (const Spec& spec : *specs) buffers_.push_back({spec, {}, {}, {}});
    }
    inputs_ = engine.inputs.size();
    std::vector<std::vector<std::int64_t>> most;
    for (std::size_t at = 0; at < inputs_; ++at) {
      most.push_back(loaded_->largest[buffers_[at].spec.name]);
      if (!buffers_[at].spec.shape.empty()) most.back().insert(most.back().begin(), capacity);
    }
    set_shapes(most);
    for (Buffer& buffer : buffers_) {
      const std::size_t bytes = std::max<std::size_t>(buffer.bytes(), 1);
      void* made = nullptr;
      call(cudaHostAlloc(&made, bytes, cudaHostAllocDefault), "cudaHostAlloc");
      buffer.host = PinnedMemory(made);
      call(cudaMalloc(&made, bytes), "cudaMalloc");
      buffer.device = DeviceMemory(made);
      room_.push_back(bytes);
      if (!context_->setTensorAddress(buffer.spec.name.c_str(), made)) {
        throw Error("TensorRT does not take an address for '" + buffer.spec.name + "'.", kRebuild, Code::System);
      }
    }
    cudaStream_t stream = nullptr;
    call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    stream_ = Stream(stream);
  }

  std::int64_t capacity() const override { return capacity_; }

  std::vector<Tensor> run(const std::vector<Tensor>& feeds) override {
    // A thread that never spoke to CUDA would ask the first GPU.
    call(cudaSetDevice(loaded_->device), "cudaSetDevice");
    std::vector<std::vector<std::int64_t>> shapes;
    for (const Tensor& feed : feeds) shapes.push_back(feed.shape);
    bool same = true;
    for (std::size_t at = 0; at < inputs_; ++at) same = same && buffers_[at].shape == shapes[at];
    if (!same) set_shapes(shapes);
    for (std::size_t at = 0; at < buffers_.size(); ++at) {
      if (buffers_[at].bytes() > room_[at]) {
        throw input_error("'" + buffers_[at].spec.name + "' " + shown(buffers_[at].shape) +
                              " is larger than the engine's own largest batch.",
                          "Give a size within those that it was built for.");
      }
    }
    for (std::size_t at = 0; at < inputs_; ++at) {
      const Buffer& buffer = buffers_[at];
      std::memcpy(buffer.host.get(), feeds[at].data.data(), buffer.bytes());
      call(cudaMemcpyAsync(buffer.device.get(), buffer.host.get(), buffer.bytes(), cudaMemcpyHostToDevice,
                           stream_.get()),
           "cudaMemcpyAsync");
    }
    if (wants_graph_ && graph_.get() == nullptr) capture();
    if (graph_.get() != nullptr) {
      call(cudaGraphLaunch(graph_.get(), stream_.get()), "cudaGraphLaunch");
    } else {
      enqueue();
    }
    for (std::size_t at = inputs_; at < buffers_.size(); ++at) {
      const Buffer& buffer = buffers_[at];
      call(cudaMemcpyAsync(buffer.host.get(), buffer.device.get(), buffer.bytes(), cudaMemcpyDeviceToHost,
                           stream_.get()),
           "cudaMemcpyAsync");
    }
    call(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
    std::vector<Tensor> found;
    for (std::size_t at = inputs_; at < buffers_.size(); ++at) {
      const Buffer& buffer = buffers_[at];
      const auto* bytes = static_cast<const std::uint8_t*>(buffer.host.get());
      found.push_back({buffer.spec.name, buffer.shape, buffer.spec.type, {bytes, bytes + buffer.bytes()}});
    }
    return found;
  }

 private:
  // Tells the context the inputs' shapes, and asks it for those of the outputs.
  void set_shapes(const std::vector<std::vector<std::int64_t>>& shapes) {
    graph_ = Executable();
    for (Buffer& buffer : buffers_) buffer.shape.assign(1, -1);  // no batch is taken for this one where it fails
    for (std::size_t at = 0; at < inputs_; ++at) {
      const Spec& spec = buffers_[at].spec;
      const bool open = std::any_of(spec.shape.begin(), spec.shape.end(), [](std::int64_t size) { return size < 0; });
      if (open && !context_->setInputShape(spec.name.c_str(), dims_of(shapes[at]))) {
        throw input_error("The engine does not take " + shown(shapes[at]) + " for its input '" + spec.name + "'.",
                          "Use a batch and sizes within those that it was built for: manifest.json says them under 'build'.");
      }
    }
    std::vector<std::vector<std::int64_t>> found(shapes);
    for (std::size_t at = inputs_; at < buffers_.size(); ++at) {
      found.push_back(shape_of(context_->getTensorShape(buffers_[at].spec.name.c_str())));
      const auto& shape = found.back();
      if (std::any_of(shape.begin(), shape.end(), [](std::int64_t size) { return size < 0; })) {
        throw Error("The size of the output '" + buffers_[at].spec.name + "' depends on what is in the images.",
                    "Export the model so that its outputs have fixed shapes.", Code::Impossible);
      }
    }
    for (std::size_t at = 0; at < buffers_.size(); ++at) buffers_[at].shape = found[at];
  }

  void enqueue() {
    if (!context_->enqueueV3(stream_.get())) {
      throw Error("TensorRT could not run the engine: " + loaded_->logger.said() + ".", kRebuild, Code::System);
    }
  }

  // Records the computing as one graph, which is launched in one call; where that fails, it goes on without.
  void capture() {
    // TensorRT finishes setting up a new shape in a first run, which cannot be recorded.
    enqueue();
    call(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    bool recorded = cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    if (recorded) {
      recorded = context_->enqueueV3(stream_.get());
      // Ends the recording in any case: the stream is used as before.
      recorded = cudaStreamEndCapture(stream_.get(), &graph) == cudaSuccess && recorded && graph != nullptr;
    }
    const Graph owned(graph);
    if (recorded && cudaGraphInstantiate(&made, graph, 0) == cudaSuccess) {
      graph_ = Executable(made);
    } else {
      cudaGetLastError();
      wants_graph_ = false;
    }
  }

  std::shared_ptr<Loaded> loaded_;
  std::int64_t capacity_;
  bool wants_graph_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::vector<Buffer> buffers_;  // inputs first
  std::vector<std::size_t> room_;
  std::size_t inputs_ = 0;
  // After the buffers, so that it ends, and with it all work, before they are freed.
  Stream stream_;
  Executable graph_;
};

class OpenedEngine final : public Engine {
 public:
  explicit OpenedEngine(std::shared_ptr<Loaded> loaded) : loaded_(std::move(loaded)) {
    const nvinfer1::ICudaEngine& engine = *loaded_->engine;
    for (std::int32_t at = 0; at < engine.getNbIOTensors(); ++at) {
      const char* name = engine.getIOTensorName(at);
      const Spec spec{name, shape_of(engine.getTensorShape(name)), type_of(engine.getTensorDataType(name), name)};
      if (engine.getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) {
        outputs.push_back(spec);
        continue;
      }
      inputs.push_back(spec);
      auto low = spec.shape, high = spec.shape;
      if (std::any_of(low.begin(), low.end(), [](std::int64_t size) { return size < 0; })) {
        low = shape_of(engine.getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMIN));
        high = shape_of(engine.getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMAX));
      }
      if (low.size() != spec.shape.size() || high.size() != spec.shape.size()) {
        throw Error("The engine does not say which sizes its input '" + spec.name + "' takes.", kRebuild, Code::Build);
      }
      if (spec.shape.empty()) continue;
      fewest = std::max(fewest, low[0]);
      most = std::min(most, high[0]);
      loaded_->largest[spec.name] = {high.begin() + 1, high.end()};
    }
    if (inputs.empty() || outputs.empty() || fewest > most) {
      throw Error("The engine takes no batch of images.", kRebuild, Code::Build);
    }
    const std::int32_t version = getInferLibVersion();
    label = std::string(kRtx ? "TensorRT for RTX " : "TensorRT ") + std::to_string(version / 10000) + "." +
            std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
  }

  std::unique_ptr<Lane> lane(std::int64_t capacity, bool cuda_graph) override {
    return std::make_unique<EngineLane>(loaded_, *this, capacity, cuda_graph);
  }

 private:
  std::shared_ptr<Loaded> loaded_;
};

// Why the engine of this record cannot run here is said before anything of it is read.
void require_fitting(const EngineRecord& record, std::int32_t device) {
  if (record.for_cpu || record.rtx != kRtx) {
    throw Error("The engine was built by " + shown(record.builder) + ", and this program runs those of " +
                    (kRtx ? "TensorRT for RTX." : "TensorRT."),
                record.for_cpu ? "Run it from Python: resvit_engines.load." : "Build it, or this program, for the other.",
                Code::Impossible);
  }
  if (record.strip_weights) {
    throw Error("The engine was built without its weights, which are not filled in here.", "Build it with them.",
                Code::Impossible);
  }
  int major = 0, minor = 0;
  call(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  call(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  const std::int64_t here = major * 10 + minor;
  if (record.sm != here && !(record.hardware_compatible && here >= kAmpere)) {
    const auto written = [](std::int64_t sm) { return std::to_string(sm / 10) + "." + std::to_string(sm % 10); };
    throw Error("The engine is for SM " + written(record.sm) + ", and this GPU has SM " + written(here) + ".",
                "Run on the device that the engine is for.", Code::Impossible);
  }
}

// The plugin library that an engine needs: like the engine, code that runs here, so only with its digest. Loaded once in a
// process, from memory, so that no file can change in between.
void load_library(const Bundle& bundle, const std::string& name, const std::string& digest) {
  static std::mutex mutex;
  static std::set<std::string> loaded;
  const std::lock_guard<std::mutex> alone(mutex);
  if (loaded.count(digest) != 0) return;
  const std::vector<std::uint8_t> content = bundle.read(name);
  if (sha256(content.data(), content.size()) != digest) {
    throw untrusted(name + " is not the plugin library that the engine was built with: it is not loaded.");
  }
  // Left open: the loader may read from it as long as the library is in use.
  const int memory = memfd_create("resvit_plugins", MFD_CLOEXEC);
  std::size_t written = 0;
  while (memory >= 0 && written < content.size()) {
    const ssize_t more = write(memory, content.data() + written, content.size() - written);
    if (more <= 0) break;
    written += static_cast<std::size_t>(more);
  }
  const std::string path = "/proc/self/fd/" + std::to_string(memory);
  const auto refused = [&](const std::string& why) {
    return Error("TensorRT cannot load the plugin library " + name + ": " + why + ".",
                 "Build it for the TensorRT that is installed here: resvit-engine plugin.", Code::Build);
  };
  if (written != content.size()) throw refused("it does not fit into memory");
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw refused(shown(dlerror()));
  const auto major = reinterpret_cast<std::int32_t (*)()>(dlsym(library, "resvitTensorRTMajor"));
  if (major == nullptr || major() != NV_TENSORRT_MAJOR) throw refused("it was compiled for another TensorRT");
  if (getPluginRegistry()->loadLibrary(path.c_str()) == nullptr) throw refused("it gave no reason");
  loaded.insert(digest);
}

}  // namespace

std::unique_ptr<Engine> Engine::open(const Bundle& bundle) {
  const auto& record = bundle.manifest().engine;
  if (!record) {
    throw Error("There is no engine in this bundle.", "Build one on the device with 'resvit-engine build'.",
                Code::Missing);
  }
  auto loaded = std::make_shared<Loaded>();
  call(cudaGetDevice(&loaded->device), "cudaGetDevice");
  require_fitting(*record, loaded->device);
  // What is deserialised are the bytes that were compared with the signed digest.
  const std::vector<std::uint8_t> content = bundle.read(kEngine);
  if (record->library) load_library(bundle, record->library->first, record->library->second);
  loaded->runtime.reset(nvinfer1::createInferRuntime(loaded->logger));
  if (loaded->runtime == nullptr) {
    throw Error("TensorRT cannot run engines here: " + loaded->logger.said() + ".",
                "Check that the NVIDIA driver works and is new enough for this TensorRT.", Code::Missing);
  }
  // The lean runtime that a version-compatible engine carries is code for the CPU.
  if (record->version_compatible) loaded->runtime->setEngineHostCodeAllowed(true);
  loaded->engine.reset(loaded->runtime->deserializeCudaEngine(content.data(), content.size()));
  if (loaded->engine == nullptr) {
    throw Error("TensorRT cannot read the engine: " + loaded->logger.said() + ".",
                "An engine is read by the TensorRT version and the GPU that it was built for: build it again here.",
                Code::Build);
  }
  return std::make_unique<OpenedEngine>(std::move(loaded));
}

}  // namespace resvit
