// An engine as a function from arrays to arrays, on this machine's GPU. All calls into TensorRT and CUDA are in engine.cpp.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "resvit/runtime.hpp"

namespace resvit {

// An input or output: -1 in `shape` is open.
struct Spec {
  std::string name;
  std::vector<std::int64_t> shape;
  Type type;
};

// One stream with buffers for batches of at most `capacity`, of any size that the engine takes. For one thread at a time.
class Lane {
 public:
  virtual ~Lane() = default;
  // Runs one batch and waits for it. `feeds` are checked_feeds(). Throws Error(Input) for a batch or size that the engine
  // does not take, Error(System) where CUDA or TensorRT refuse, with their words.
  virtual std::vector<Tensor> run(const std::vector<Tensor>& feeds) = 0;
  virtual std::int64_t capacity() const = 0;
};

class Engine {
 public:
  // The bundle's engine, if its bytes are those that were signed; throws Error as Model::load.
  static std::unique_ptr<Engine> open(const Bundle& bundle);
  virtual ~Engine() = default;
  virtual std::unique_ptr<Lane> lane(std::int64_t capacity, bool cuda_graph) = 0;

  std::vector<Spec> inputs, outputs;
  // The smallest and the largest batch that run in one piece.
  std::int64_t fewest = 1, most = std::int64_t{1} << 30;
  std::string label;
};

// One tensor for each of the engine's inputs, in its type; all of as many images. Throws Error(Input) for names, types and
// shapes that are not the engine's.
std::vector<Tensor> checked_feeds(const std::vector<Tensor>& given, const std::vector<Spec>& inputs);

}  // namespace resvit
