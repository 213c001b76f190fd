// The parser's functions, called with plain arrays.
#include <cstdlib>

#include "resvit_parser.cpp"

using ParseBoxes = bool (*)(std::vector<NvDsInferLayerInfo> const&, NvDsInferNetworkInfo const&,
                            NvDsInferParseDetectionParams const&, std::vector<NvDsInferParseObjectInfo>&);
using ParseClasses = bool (*)(std::vector<NvDsInferLayerInfo> const&, NvDsInferNetworkInfo const&, float,
                              std::vector<NvDsInferAttribute>&, std::string&);
using ParseMasks = bool (*)(std::vector<NvDsInferLayerInfo> const&, NvDsInferNetworkInfo const&, float, unsigned int,
                            int*, float*&);
static const ParseBoxes parse_boxes = NvDsInferParseResvitBoxes;
static const ParseClasses parse_classes = NvDsInferParseResvitClasses;
static const ParseMasks parse_masks = NvDsInferParseResvitMasks;

static NvDsInferLayerInfo layer(const char* name, const float* values, std::vector<unsigned> sizes, int type) {
  NvDsInferLayerInfo made{};
  made.dataType = static_cast<NvDsInferDataType>(type);
  made.layerName = name;
  made.buffer = const_cast<float*>(values);
  made.inferDims.numDims = static_cast<unsigned>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) made.inferDims.d[i] = sizes[i];
  return made;
}

// Returns how many objects there are, each six numbers in `out`; -1 where the parser refuses.
extern "C" int boxes(const float* box, const float* score, unsigned queries, unsigned width, unsigned height_px,
                     unsigned width_px, float least, int type, float* out) {
  const NvDsInferParseDetectionParams parameters{width, std::vector<float>(width, least), {}};
  std::vector<NvDsInferParseObjectInfo> objects;
  const std::vector<NvDsInferLayerInfo> layers{layer("other", score, {1}, 0), layer(SCORES, score, {queries, width}, type),
                                               layer(BOXES, box, {queries, 4}, type)};
  if (!parse_boxes(layers, {width_px, height_px, 3}, parameters, objects)) return -1;
  for (const auto& object : objects)
    for (const float value : {object.left, object.top, object.width, object.height, object.detectionConfidence,
                              static_cast<float>(object.classId)})
      *out++ = value;
  return static_cast<int>(objects.size());
}

extern "C" int best(const float* scores, unsigned classes, float threshold, float* confidence, char* label) {
  std::vector<NvDsInferAttribute> attributes;
  std::string description;
  if (!parse_classes({layer(SCORES, scores, {classes}, 0)}, {8, 8, 3}, threshold, attributes, description)) return -2;
  if (attributes.empty()) return -1;
  *confidence = attributes[0].attributeConfidence;
  std::strcpy(label, attributes[0].attributeLabel);
  const bool same = description == attributes[0].attributeLabel;
  std::free(attributes[0].attributeLabel);
  return same ? static_cast<int>(attributes[0].attributeValue) : -3;
}

extern "C" int masks(const float* scores, unsigned kinds, unsigned height, unsigned width, int* out) {
  float* probabilities = nullptr;
  if (!parse_masks({layer(SCORES, scores, {kinds, height, width}, 0)}, {width, height, 3}, 0.0f, kinds, out, probabilities))
    return -1;
  return probabilities == scores;
}
