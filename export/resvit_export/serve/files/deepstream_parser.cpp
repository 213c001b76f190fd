// Reads a network's outputs as the validation did: boxes of DETR-like and anchor-free heads, classes, masks.
// resvit_bundle.h says how; the functions are named in config_infer_primary.txt.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "nvdsinfer_custom_impl.h"
#include "resvit_bundle.h"

namespace {

enum Activation { kNone = 0, kSigmoid = 1, kSoftmax = 2 };

struct Box {
  float left, top, right, bottom;
};

// The output of this name with FP32 values and as many dimensions, without the batch's; null where there is none.
const NvDsInferLayerInfo* find(const std::vector<NvDsInferLayerInfo>& layers, const char* name, unsigned rank) {
  for (const auto& layer : layers)
    if (layer.layerName != nullptr && std::strcmp(layer.layerName, name) == 0)
      return layer.buffer != nullptr && layer.dataType == FLOAT && layer.inferDims.numDims == rank ? &layer : nullptr;
  return nullptr;
}

double overlap(const Box& one, const Box& two) {
  const auto length = [](double low, double high) { return std::max(high - low, 0.0); };
  const auto area = [&](const Box& box) { return length(box.left, box.right) * length(box.top, box.bottom); };
  const double shared = length(std::max(one.left, two.left), std::min(one.right, two.right)) *
                        length(std::max(one.top, two.top), std::min(one.bottom, two.bottom));
  const double all = area(one) + area(two) - shared;
  return all > 0 ? shared / all : 0.0;
}

// Softmax of n scores, in double precision.
std::vector<double> softmax(const float* scores, unsigned n) {
  const double most = *std::max_element(scores, scores + n);
  std::vector<double> powers(n);
  for (unsigned i = 0; i < n; ++i) powers[i] = std::exp(scores[i] - most);
  const double sum = std::accumulate(powers.begin(), powers.end(), 0.0);
  for (double& power : powers) power /= sum;
  return powers;
}

// Probabilities [queries, classes]; of a softmax with a last "no object" class only each query's best.
std::vector<double> likely(const float* scores, unsigned queries, unsigned width, unsigned classes) {
  std::vector<double> found(static_cast<size_t>(queries) * classes, -1.0);
  for (unsigned q = 0; q < queries; ++q) {
    const float* row = scores + static_cast<size_t>(q) * width;
    double* to = found.data() + static_cast<size_t>(q) * classes;
    if (ACTIVATION == kSoftmax) {
      const auto all = softmax(row, width);
      const auto best = std::max_element(all.begin(), all.begin() + classes) - all.begin();
      to[best] = all[best];
      continue;
    }
    for (unsigned k = 0; k < classes; ++k)
      to[k] = ACTIVATION == kSigmoid ? 0.5 + 0.5 * std::tanh(0.5 * static_cast<double>(row[k])) : row[k];
  }
  return found;
}

Box corners(const float* box, const NvDsInferNetworkInfo& network) {
  Box made{box[0], box[1], box[2], box[3]};
  if (CENTRES)
    made = {box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2};
  if (NORMALIZED) {
    const float width = static_cast<float>(network.width), height = static_cast<float>(network.height);
    made = {made.left * width, made.top * height, made.right * width, made.bottom * height};
  }
  return made;
}

}  // namespace

extern "C" bool NvDsInferParseResvitBoxes(std::vector<NvDsInferLayerInfo> const& layers,
                                          NvDsInferNetworkInfo const& network,
                                          NvDsInferParseDetectionParams const& parameters,
                                          std::vector<NvDsInferParseObjectInfo>& objects) {
  const auto* boxes = find(layers, BOXES, 2);
  const auto* scores = find(layers, SCORES, 2);
  if (boxes == nullptr || scores == nullptr) return false;
  const unsigned queries = boxes->inferDims.d[0], width = scores->inferDims.d[1];
  if (boxes->inferDims.d[1] != 4 || scores->inferDims.d[0] != queries || width <= (ACTIVATION == kSoftmax)) return false;
  const unsigned classes = width - (ACTIVATION == kSoftmax);
  const auto values = likely(static_cast<const float*>(scores->buffer), queries, width, classes);

  // The best pairs of box and class, the earlier of equals first. NaN is never a detection.
  std::vector<unsigned> order;
  for (unsigned i = 0; i < values.size(); ++i)
    if (!std::isnan(values[i])) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](unsigned a, unsigned b) { return values[a] > values[b]; });
  order.resize(std::min<size_t>(order.size(), BEFORE_NMS));

  std::vector<std::vector<Box>> kept(classes);
  int count = 0;
  for (const unsigned pair : order) {
    const unsigned kind = pair % classes;
    const Box box = corners(static_cast<const float*>(boxes->buffer) + static_cast<size_t>(pair / classes) * 4, network);
    if (OVERLAP < 1.0) {
      const auto near = [&](const Box& other) { return overlap(other, box) > OVERLAP; };
      if (std::any_of(kept[kind].begin(), kept[kind].end(), near)) continue;
      kept[kind].push_back(box);
    }
    if (count++ == MOST) break;
    const auto& least = parameters.perClassPreclusterThreshold;
    const float score = static_cast<float>(values[pair]);
    if (!(score >= (kind < least.size() ? least[kind] : 0.0f))) continue;
    const auto inside = [](float at, unsigned most) { return std::min(std::max(at, 0.0f), static_cast<float>(most)); };
    NvDsInferParseObjectInfo object{};
    object.classId = kind;
    object.left = inside(box.left, network.width);
    object.top = inside(box.top, network.height);
    object.width = inside(box.right, network.width) - object.left;
    object.height = inside(box.bottom, network.height) - object.top;
    object.detectionConfidence = score;
    if (object.width > 0 && object.height > 0) objects.push_back(object);
  }
  return true;
}

extern "C" bool NvDsInferParseResvitClasses(std::vector<NvDsInferLayerInfo> const& layers,
                                            NvDsInferNetworkInfo const&, float threshold,
                                            std::vector<NvDsInferAttribute>& attributes, std::string& description) {
  const auto* layer = find(layers, SCORES, 1);
  if (layer == nullptr || layer->inferDims.d[0] < 2) return false;
  const auto* scores = static_cast<const float*>(layer->buffer);
  const unsigned classes = layer->inferDims.d[0];
  // What are probabilities already stay.
  const double sum = std::accumulate(scores, scores + classes, 0.0);
  const bool done = *std::min_element(scores, scores + classes) >= 0 && std::abs(sum - 1.0) <= 0.01;
  const auto all = done ? std::vector<double>(scores, scores + classes) : softmax(scores, classes);
  const auto best = std::max_element(all.begin(), all.end()) - all.begin();
  if (!(all[best] >= threshold)) return true;
  NvDsInferAttribute attribute{};
  attribute.attributeIndex = 0;
  attribute.attributeValue = static_cast<unsigned>(best);
  attribute.attributeConfidence = static_cast<float>(all[best]);
  const std::string name = static_cast<size_t>(best) < std::size(NAMES) ? NAMES[best] : std::to_string(best);
  attribute.attributeLabel = strdup(name.c_str());  // nvinfer frees it
  attributes.push_back(attribute);
  description.append(name);
  return true;
}

extern "C" bool NvDsInferParseResvitMasks(std::vector<NvDsInferLayerInfo> const& layers, NvDsInferNetworkInfo const&,
                                          float, unsigned, int* classes, float*& probabilities) {
  const auto* layer = find(layers, SCORES, 3);
  if (layer == nullptr || classes == nullptr) return false;
  const auto* scores = static_cast<const float*>(layer->buffer);
  const unsigned kinds = layer->inferDims.d[0];
  const size_t pixels = static_cast<size_t>(layer->inferDims.d[1]) * layer->inferDims.d[2];
  for (size_t i = 0; i < pixels; ++i) {
    unsigned best = 0;
    for (unsigned k = 1; k < kinds; ++k)
      if (scores[k * pixels + i] > scores[best * pixels + i]) best = k;
    classes[i] = static_cast<int>(best);
  }
  probabilities = static_cast<float*>(layer->buffer);
  return true;
}
