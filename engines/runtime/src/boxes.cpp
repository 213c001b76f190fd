// From a detector's outputs to boxes in the frame. See resvit_engines/answers/boxes.py.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "common.hpp"
#include "reading.hpp"

namespace resvit {
namespace {

// Candidates of an image that overlap is looked for among, the best first.
constexpr std::size_t kBeforeNms = 1000;

using Activation = TaskOptions::Activation;

struct Corners {
  float left, top, right, bottom;
};

std::pair<const Tensor*, const Tensor*> outputs_of(const TaskOptions& options, const Tensors& outputs) {
  const std::string boxes = options.boxes.value_or(""), scores = options.scores.value_or("");
  const std::pair<std::string, std::string> pairs[] = {{"", ""}, {"boxes", "scores"}, {"pred_boxes", "logits"}};
  for (const auto& [usual_boxes, usual_scores] : pairs) {
    const Tensor* one = find(outputs, boxes.empty() ? usual_boxes : boxes);
    const Tensor* other = find(outputs, scores.empty() ? usual_scores : scores);
    if (one != nullptr && other != nullptr) return {one, other};
  }
  std::vector<const Tensor*> fours, others;
  for (const Tensor& one : outputs) {
    if (one.shape.size() == 3) (one.shape[2] == 4 ? fours : others).push_back(&one);
  }
  if (boxes.empty() && scores.empty() && outputs.size() == 2 && fours.size() == 1 && others.size() == 1) {
    return {fours[0], others[0]};
  }
  throw input_error("Detection needs outputs called boxes and scores, or pred_boxes and logits; the network has " +
                    shapes_of(outputs) + ".");
}

double overlap(const Corners& one, const Corners& two) {
  const auto side = [](double low, double high) { return std::max(high - low, 0.0); };
  const double shared = side(std::max<double>(one.left, two.left), std::min<double>(one.right, two.right)) *
                        side(std::max<double>(one.top, two.top), std::min<double>(one.bottom, two.bottom));
  const auto area = [&](const Corners& box) { return side(box.left, box.right) * side(box.top, box.bottom); };
  const double united = area(one) + area(two) - shared;
  return united > 0 ? shared / united : 0.0;
}

class BoxReader {
 public:
  BoxReader(const TaskOptions& options, const Tensors& outputs) : options_(options) {
    std::tie(boxes_, scores_) = outputs_of(options, outputs);
    const auto &boxes = boxes_->shape, &scores = scores_->shape;
    if (boxes.size() != 3 || boxes[2] != 4 || scores.size() != 3 || scores[1] != boxes[1] || scores[2] < 1) {
      throw input_error("Detection reads boxes from " + boxes_->name + " and scores from " + scores_->name +
                        ", and the network has " + shapes_of(outputs) +
                        ": not [B, boxes, 4] and [B, boxes, classes].");
    }
    const bool family = boxes_->name == "pred_boxes" || scores_->name == "logits";
    width_ = static_cast<std::size_t>(scores[2]);
    count_ = static_cast<std::size_t>(boxes[1]);
    const bool one_more = options.classes && scores[2] == *options.classes + 1;
    const Activation guess = one_more ? Activation::Softmax : Activation::Sigmoid;
    activation_ = options.activation.value_or(family ? guess : Activation::None);
    classes_ = activation_ == Activation::Softmax ? width_ - 1 : width_;
    if (classes_ == 0) throw input_error("The scores in " + scores_->name + " are of no class but \"no object\".");
    centres_ = options.centres.value_or(family);
    normalized_ = options.normalized.value_or(family);
    overlap_ = options.nms_iou.value_or(family ? 1.0 : 0.6);
    positions_ = floats_of(*boxes_);
    values_ = doubles_of(*scores_);
  }

  const Tensor& boxes() const { return *boxes_; }
  const Tensor& scores() const { return *scores_; }

  Detections read(std::size_t image, const Placement& place, float least) const {
    const std::vector<double> likely = likely_of(image);
    const auto top = static_cast<std::size_t>(options_.top_k);
    std::vector<std::size_t> order = largest(likely, overlap_ < 1.0 ? std::max(kBeforeNms, top) : top);
    order.erase(std::remove_if(order.begin(), order.end(),
                               [&](std::size_t at) { return !(likely[at] >= options_.score_threshold); }),
                order.end());
    std::vector<Corners> corners;
    for (const std::size_t at : order) corners.push_back(corners_of(image, at / classes_, place.size));
    if (overlap_ < 1.0) keep_apart(order, corners, top);
    Detections found;
    for (std::size_t at = 0; at < order.size(); ++at) {
      const float score = static_cast<float>(likely[order[at]]);
      if (!(score >= least)) continue;
      const auto number = static_cast<std::int64_t>(order[at] % classes_);
      found.boxes.push_back(in_frame(corners[at], place, score, number));
    }
    return found;
  }

 private:
  // Probabilities [Q, K] of an image; of a softmax only each box's best class, the others below any threshold.
  std::vector<double> likely_of(std::size_t image) const {
    const double* from = values_.data() + image * count_ * width_;
    std::vector<double> likely(from, from + count_ * width_);
    if (activation_ == Activation::None) {
      for (const double value : likely) {
        if (value >= 0.0 && value <= 1.0) continue;
        throw input_error("The scores in " + scores_->name + " are not probabilities: one is " + std::to_string(value) +
                              ".",
                          "Make the bundle again with --task-option activation=sigmoid, or softmax.");
      }
    } else if (activation_ == Activation::Sigmoid) {
      for (double& value : likely) value = 0.5 + 0.5 * std::tanh(0.5 * value);
    } else {
      std::vector<double> only(count_ * classes_, -1.0), powers(width_);
      for (std::size_t row = 0; row < count_; ++row) {
        const double* scores = from + row * width_;
        const double most = *std::max_element(scores, scores + width_);
        for (std::size_t at = 0; at < width_; ++at) powers[at] = std::exp(scores[at] - most);
        const double sum = sum_of(powers.data(), width_);
        for (double& power : powers) power /= sum;
        const auto best = std::max_element(powers.begin(), powers.end() - 1) - powers.begin();
        only[row * classes_ + static_cast<std::size_t>(best)] = powers[static_cast<std::size_t>(best)];
      }
      return only;
    }
    return likely;
  }

  // Indices of the `most` largest values, largest first, the earlier of equals first.
  static std::vector<std::size_t> largest(const std::vector<double>& values, std::size_t most) {
    std::vector<std::size_t> order(values.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto before = [&](std::size_t one, std::size_t two) {
      return values[one] != values[two] ? values[one] > values[two] : one < two;
    };
    most = std::min(most, order.size());
    const auto middle = order.begin() + static_cast<std::ptrdiff_t>(most);
    if (middle != order.end()) std::nth_element(order.begin(), middle, order.end(), before);
    order.resize(most);
    std::sort(order.begin(), order.end(), before);
    return order;
  }

  Corners corners_of(std::size_t image, std::size_t box, Size size) const {
    const float* at = positions_.data() + (image * count_ + box) * 4;
    Corners made{at[0], at[1], at[2], at[3]};
    if (centres_) {
      const float wide = at[2] / 2, tall = at[3] / 2;
      made = {at[0] - wide, at[1] - tall, at[0] + wide, at[1] + tall};
    }
    if (normalized_) {
      const float width = static_cast<float>(size.width), height = static_cast<float>(size.height);
      made = {made.left * width, made.top * height, made.right * width, made.bottom * height};
    }
    return made;
  }

  // Drops boxes, best first, that overlap a better one of their class, and all beyond the `most` best.
  void keep_apart(std::vector<std::size_t>& order, std::vector<Corners>& corners, std::size_t most) const {
    std::vector<std::size_t> kept;
    for (std::size_t at = 0; at < order.size(); ++at) {
      const bool covered = std::any_of(kept.begin(), kept.end(), [&](std::size_t better) {
        return order[better] % classes_ == order[at] % classes_ && !(overlap(corners[better], corners[at]) <= overlap_);
      });
      if (!covered) kept.push_back(at);
    }
    kept.resize(std::min(kept.size(), most));
    std::vector<std::size_t> left;
    std::vector<Corners> edges;
    for (const std::size_t at : kept) {
      left.push_back(order[at]);
      edges.push_back(corners[at]);
    }
    order = std::move(left);
    corners = std::move(edges);
  }

  Box in_frame(const Corners& box, const Placement& place, float score, std::int64_t number) const {
    const double across = static_cast<double>(place.frame.width) / static_cast<double>(place.placed.width);
    const double down = static_cast<double>(place.frame.height) / static_cast<double>(place.placed.height);
    const auto moved = [](float at, std::int64_t corner, double scale, std::int64_t most) {
      const double found = (static_cast<double>(at) - static_cast<double>(corner)) * scale;
      const double above = found > 0.0 ? found : 0.0, end = static_cast<double>(most);
      return static_cast<float>(above < end ? above : end);
    };
    return {moved(box.left, place.left, across, place.frame.width),
            moved(box.top, place.top, down, place.frame.height),
            moved(box.right, place.left, across, place.frame.width),
            moved(box.bottom, place.top, down, place.frame.height),
            score,
            number,
            options_.names[number]};
  }

  const TaskOptions& options_;
  const Tensor *boxes_ = nullptr, *scores_ = nullptr;
  std::size_t width_ = 0, count_ = 0, classes_ = 0;
  Activation activation_ = Activation::None;
  bool centres_ = false, normalized_ = false;
  double overlap_ = 1.0;
  std::vector<float> positions_;
  std::vector<double> values_;
};

}  // namespace

Answers boxes_from(const TaskOptions& options, const Tensors& outputs, const Places& places,
                   std::optional<float> least_score) {
  const BoxReader reader(options, outputs);
  for (const Tensor* one : {&reader.boxes(), &reader.scores()}) {
    if (one->shape[0] != static_cast<std::int64_t>(places.size())) {
      throw input_error("The output " + one->name + " is " + shown(one->shape) + " for " +
                        std::to_string(places.size()) + " frames.");
    }
  }
  Answers found;
  for (std::size_t image = 0; image < places.size(); ++image) {
    found.emplace_back(reader.read(image, places[image], least_score.value_or(static_cast<float>(options.shown))));
  }
  return found;
}

}  // namespace resvit
