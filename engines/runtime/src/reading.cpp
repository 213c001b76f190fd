// From a network's outputs to the task's answers. See resvit_engines/program/reading.py.

#include "reading.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common.hpp"

namespace resvit {
namespace {

// By how much probabilities in FP16 may miss a sum of 1.
constexpr double kNearlyOne = 0.01;

template <typename Value>
Value pairwise(const Value* values, std::size_t count) {
  if (count < 8) {
    Value sum = 0;
    for (std::size_t at = 0; at < count; ++at) sum += values[at];
    return sum;
  }
  if (count <= 128) {
    Value sums[8];
    std::copy(values, values + 8, sums);
    std::size_t at = 8;
    for (; at + 8 <= count; at += 8) {
      for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] += values[at + lane];
    }
    Value sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; at < count; ++at) sum += values[at];
    return sum;
  }
  const std::size_t half = count / 2 - count / 2 % 8;
  return pairwise(values, half) + pairwise(values + half, count - half);
}

void require_finite(const Tensors& outputs) {
  for (const Tensor& one : outputs) {
    if (!is_float(one.type)) continue;
    const std::vector<float> values = floats_of(one);
    if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
      throw mismatch("The network's output " + one.name + " holds NaN or infinity.",
                     "Run the golden check (load with check), and build the engine again on this device.");
    }
  }
}

// A caller's own placement must not lead out of a map.
void require_place(const Placement& place, Size size) {
  constexpr std::int64_t kMost = 1 << 16;
  bool fits = place.size.height == size.height && place.size.width == size.width;
  for (const std::int64_t side : {place.frame.height, place.frame.width, size.height, size.width}) {
    fits = fits && side >= 1 && side <= kMost;
  }
  if (!fits || place.placed.height < 1 || place.placed.width < 1) {
    throw input_error("The places of the frames are none of one network's input.", "Take them from Preprocess::place.");
  }
}

// Softmax of one image's scores; what are probabilities already, stay.
std::vector<float> probabilities_of(const float* scores, std::size_t count) {
  const auto [least, most] = std::minmax_element(scores, scores + count);
  if (*least >= 0.0f && std::fabs(static_cast<double>(sum_of(scores, count)) - 1.0) <= kNearlyOne) {
    return {scores, scores + count};
  }
  std::vector<double> powers(count);
  for (std::size_t at = 0; at < count; ++at) {
    powers[at] = std::exp(static_cast<double>(scores[at]) - static_cast<double>(*most));
  }
  const double sum = sum_of(powers.data(), count);
  std::vector<float> found;
  for (const double power : powers) found.push_back(static_cast<float>(power / sum));
  return found;
}

Answers classes_from(const TaskOptions& options, const Tensors& outputs, const Places& places) {
  const Tensor* logits = find(outputs, "logits");
  if (logits == nullptr && outputs.size() != 1) {
    throw input_error("The network has the outputs " + shapes_of(outputs) + "; none is called `logits`.");
  }
  if (logits == nullptr) logits = &outputs.front();
  if (logits->shape.size() != 2 || logits->shape[0] != static_cast<std::int64_t>(places.size()) || logits->shape[1] < 2) {
    throw input_error("The network's output has the shape " + shown(logits->shape) + " for " +
                      std::to_string(places.size()) + " images, not [" + std::to_string(places.size()) + ", classes].");
  }
  const std::vector<float> values = floats_of(*logits);
  const auto count = static_cast<std::size_t>(logits->shape[1]);
  Answers found;
  for (std::size_t image = 0; image < places.size(); ++image) {
    found.emplace_back(Classification{probabilities_of(values.data() + image * count, count), options.names});
  }
  return found;
}

Answers vectors_from(const TaskOptions& options, const Tensors& outputs, const Places& places) {
  std::vector<const Tensor*> flat;
  for (const Tensor& one : outputs) {
    const auto& shape = one.shape;
    const bool fits = shape.size() >= 2 && std::all_of(shape.begin() + 2, shape.end(), [](auto size) { return size == 1; });
    if (is_float(one.type) && fits) flat.push_back(&one);
  }
  const Tensor& output = chosen(flat, options, outputs, "An embedding is an output [B, D]");
  if (output.shape[0] != static_cast<std::int64_t>(places.size())) {
    throw input_error("The output " + output.name + " is " + shown(output.shape) + " for " +
                      std::to_string(places.size()) + " frames.");
  }
  const std::vector<float> values = floats_of(output);
  Answers found;
  for (std::int64_t image = 0; image < output.shape[0]; ++image) {
    const float* first = values.data() + image * output.shape[1];
    found.emplace_back(Embedding{{first, first + output.shape[1]}});
  }
  return found;
}

Answers as_they_are(const Tensors& outputs, const Places& places) {
  Answers found;
  for (std::size_t image = 0; image < places.size(); ++image) {
    Outputs answer;
    for (const Tensor& one : outputs) {
      const bool batched = !one.shape.empty() && one.shape[0] == static_cast<std::int64_t>(places.size());
      answer.tensors.push_back(batched ? rows_of(one, image, image + 1) : one);
      if (batched) answer.tensors.back().shape.erase(answer.tensors.back().shape.begin());
    }
    found.emplace_back(std::move(answer));
  }
  return found;
}

}  // namespace

double sum_of(const double* values, std::size_t count) { return pairwise(values, count); }
float sum_of(const float* values, std::size_t count) { return pairwise(values, count); }

const Tensor& chosen(const std::vector<const Tensor*>& fitting, const TaskOptions& options, const Tensors& outputs,
                     const std::string& needs) {
  if (!options.output && fitting.size() == 1) return *fitting.front();
  for (const Tensor* one : fitting) {
    if (options.output && one->name == *options.output) return *one;
  }
  throw input_error(needs + (options.output ? " called " + *options.output : "") + "; the network has " +
                        shapes_of(outputs) + ".",
                    "Make the bundle again with --task-option output=NAME.");
}

std::string Names::operator[](std::int64_t number) const {
  const auto found = known_ ? known_->find(number) : std::map<std::int64_t, std::string>::const_iterator();
  return known_ && found != known_->end() ? found->second : std::to_string(number);
}

std::vector<Class> Classification::top(std::size_t count) const {
  std::vector<std::size_t> order(probabilities.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto end = order.begin() + static_cast<std::ptrdiff_t>(std::min(count, order.size()));
  std::partial_sort(order.begin(), end, order.end(), [&](std::size_t one, std::size_t two) {
    return probabilities[one] != probabilities[two] ? probabilities[one] > probabilities[two] : one < two;
  });
  std::vector<Class> found;
  for (auto at = order.begin(); at != end; ++at) {
    const auto number = static_cast<std::int64_t>(*at);
    found.push_back({number, names[number], probabilities[*at]});
  }
  return found;
}

std::vector<Answer> Reading::answers(const std::vector<Tensor>& outputs, const std::vector<Placement>& places,
                                     std::optional<float> least_score) const {
  return guarded([&]() -> Answers {
    static const TaskOptions kAsTheyAre;
    const TaskOptions& options = options_ ? *options_ : kAsTheyAre;
    for (const Tensor& one : outputs) {
      if (one.data.size() != count_of(one.shape) * size_of(one.type)) {
        throw input_error("The output " + one.name + " does not hold what its shape " + shown(one.shape) + " says.");
      }
    }
    if (places.empty()) return {};
    for (const Placement& one : places) require_place(one, places.front().size);
    require_finite(outputs);
    switch (options.task) {
      case TaskOptions::Task::Classification: return classes_from(options, outputs, places);
      case TaskOptions::Task::Detection: return boxes_from(options, outputs, places, least_score);
      case TaskOptions::Task::Segmentation: return masks_from(options, outputs, places);
      case TaskOptions::Task::Depth: return depths_from(options, outputs, places);
      case TaskOptions::Task::Text: return lines_from(options, outputs, places);
      case TaskOptions::Task::Embedding: return vectors_from(options, outputs, places);
      case TaskOptions::Task::Other: break;
    }
    return as_they_are(outputs, places);
  });
}

}  // namespace resvit
