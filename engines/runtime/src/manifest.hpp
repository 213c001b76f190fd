// What the library reads of a bundle's manifest. See resvit_engines/bundle/manifest.py and program/reading.py.

#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "resvit/runtime.hpp"

namespace resvit {

// The options of all tasks; those that the bundle's task does not have keep their usual values.
struct TaskOptions {
  enum class Task { Other, Classification, Detection, Segmentation, Depth, Text, Embedding };
  enum class Activation { None, Sigmoid, Softmax };

  Task task = Task::Other;
  Names names;
  std::optional<std::int64_t> classes;

  std::optional<std::string> output;
  // Detection
  std::optional<std::string> boxes, scores;
  std::optional<bool> centres, normalized;
  std::optional<Activation> activation;
  std::optional<double> nms_iou;
  double score_threshold = 0.0, shown = 0.3;
  std::int64_t top_k = 100;
  // Depth
  bool inverted = false;
  double min_depth = 0.001, max_depth = 1e6;
  // Text
  std::vector<std::string> alphabet;
  std::optional<bool> ctc;
  std::optional<std::int64_t> blank, end;
};

// round(image * factor + offset) for each channel, cut to the range of int8 or uint8.
struct Encoding {
  bool is_signed;
  std::vector<float> factor, offset;
};

struct Golden {
  std::string input = "golden_input.npy", output = "golden_output.npy";
  std::map<std::string, std::string> inputs, outputs;
  bool sets = false;
  std::map<std::string, double> least_db;
};

struct EngineRecord {
  bool rtx = false, for_cpu = false;
  std::string builder, version;
  std::int64_t sm = 0;
  bool hardware_compatible = false, version_compatible = false, strip_weights = false;
  std::optional<std::pair<std::string, std::string>> library;  // name and SHA-256
};

struct Manifest {
  std::string name, digest;
  std::uint64_t release = 1;
  std::vector<File> files;
  std::optional<EngineRecord> engine;
  bool to_be_built = false;
  std::optional<std::array<std::int64_t, 3>> batch;
  std::optional<std::array<std::int64_t, 6>> sizes;
  std::string input;  // the image's name; empty where it is not said
  std::vector<std::int64_t> input_shape;  // -1 where it is open
  std::optional<Encoding> encoding;
  std::optional<Golden> golden;
  std::vector<Golden> golden_at_sizes;
  std::optional<Preprocess> preprocess;
  std::string prepared_by;  // why there is no preprocess
  Reading reading;
};

// The only place where JSON is read.
struct Documents {
  static Manifest manifest(const std::string& text, const std::string& folder);
  // (key id, signature) of signature.json. Throws Error(Untrusted) for any form but the one in which it is written.
  static std::vector<std::pair<std::string, std::vector<std::uint8_t>>> signatures(const std::string& text);
  static Preprocess preprocess(const std::string& text);
  // For tests of reading alone: {"verdict"...} fields as in a manifest.
  static Reading reading(const std::string& text);
};

}  // namespace resvit
