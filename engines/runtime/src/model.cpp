// A loaded bundle as a function from frames to answers. See resvit_engines/program/model.py.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <mutex>

#include "common.hpp"
#include "engine.hpp"
#include "golden.hpp"
#include "manifest.hpp"
#include "tensor.hpp"

namespace resvit {
namespace {

constexpr std::int64_t kMostAtOnce = 64;  // where the engine takes any number: more only take more memory
constexpr std::size_t kMostSide = 1u << 15;
constexpr int kMostStreams = 64;

// Lanes that are free; who finds none waits.
class Lanes {
 public:
  void put(std::unique_ptr<Lane> lane) {
    {
      const std::lock_guard<std::mutex> alone(mutex_);
      free_.push_back(std::move(lane));
    }
    freed_.notify_one();
  }
  std::unique_ptr<Lane> take() {
    std::unique_lock<std::mutex> alone(mutex_);
    freed_.wait(alone, [this] { return !free_.empty(); });
    std::unique_ptr<Lane> lane = std::move(free_.back());
    free_.pop_back();
    return lane;
  }

 private:
  std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<std::unique_ptr<Lane>> free_;
};

// A lane that comes back whatever happens.
class Borrowed {
 public:
  explicit Borrowed(Lanes& lanes) : lanes_(lanes), lane_(lanes.take()) {}
  ~Borrowed() { lanes_.put(std::move(lane_)); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Lane& operator*() const { return *lane_; }

 private:
  Lanes& lanes_;
  std::unique_ptr<Lane> lane_;
};

// round(image * factor + offset) for each channel, cut to the range of the type.
Tensor encoded(const Tensor& images, const Encoding& encoding) {
  const auto channels = static_cast<std::size_t>(images.shape[1]);
  if (encoding.factor.size() != 1 && encoding.factor.size() != channels) {
    throw input_error("The images have " + std::to_string(channels) + " channels, and the engine reads " +
                      std::to_string(encoding.factor.size()) + ".");
  }
  const std::vector<float> values = floats_of(images);
  const auto plane = static_cast<std::size_t>(images.shape[2] * images.shape[3]);
  const float low = encoding.is_signed ? -128.0f : 0.0f, high = encoding.is_signed ? 127.0f : 255.0f;
  Tensor made{images.name, images.shape, encoding.is_signed ? Type::Int8 : Type::UInt8, {}};
  made.data.reserve(values.size());
  for (std::size_t at = 0; at < values.size(); ++at) {
    const std::size_t channel = encoding.factor.size() == 1 ? 0 : at / plane % channels;
    const float whole = std::nearbyint(values[at] * encoding.factor[channel] + encoding.offset[channel]);
    const float cut = std::min(std::max(whole, low), high);
    made.data.push_back(encoding.is_signed ? static_cast<std::uint8_t>(static_cast<std::int8_t>(cut))
                                           : static_cast<std::uint8_t>(cut));
  }
  return made;
}

void require_frame(const Frame& frame, std::size_t number) {
  const bool fits = frame.pixels != nullptr && frame.height >= 1 && frame.width >= 1 && frame.height <= kMostSide &&
                    frame.width <= kMostSide && (frame.channels == 1 || frame.channels == 3) &&
                    frame.stride >= frame.width * frame.channels;
  if (fits) return;
  throw input_error("Frame " + std::to_string(number) + " of " + std::to_string(frame.height) + " x " +
                        std::to_string(frame.width) + " pixels, " + std::to_string(frame.channels) +
                        " channels and a stride of " + std::to_string(frame.stride) + " bytes is none.",
                    "Give uint8 pixels in 1 or 3 channels, 1 to " + std::to_string(kMostSide) + " a side.");
}

Preprocess preprocess_of(const Bundle& bundle, const std::optional<Size>& size) {
  const Preprocess& usual = bundle.preprocess();
  if (!size) return usual;
  const Manifest& manifest = bundle.manifest();
  bool holds = manifest.input_shape.size() == 4 && manifest.input_shape[2] == size->height &&
               manifest.input_shape[3] == size->width;
  if (manifest.sizes) {
    const auto& sizes = *manifest.sizes;  // height and width of the smallest, the usual and the largest
    holds = size->height >= sizes[0] && size->height <= sizes[4] && size->width >= sizes[1] && size->width <= sizes[5];
  }
  if (!holds) {
    throw input_error("The bundle is not for images of " + std::to_string(size->height) + " x " +
                          std::to_string(size->width) + " pixels.",
                      "Leave the size out, or build it for a range: --input-shape 3x320..640x320..640.");
  }
  return usual.at(*size);
}

}  // namespace

std::vector<Tensor> checked_feeds(const std::vector<Tensor>& given, const std::vector<Spec>& inputs) {
  std::vector<Tensor> feeds;
  std::optional<std::int64_t> count;
  for (const Tensor& one : given) {
    const bool known = std::any_of(inputs.begin(), inputs.end(), [&](const Spec& spec) { return spec.name == one.name; });
    if (!known) throw input_error("The engine has no input '" + one.name + "'.", "Give those that it has, by their names.");
  }
  for (const Spec& spec : inputs) {
    const Tensor* one = find(given, spec.name);
    if (one == nullptr) {
      throw input_error("The engine reads '" + spec.name + "' too, which is not given.", "Give it beside the images.");
    }
    bool fits = one->shape.size() == spec.shape.size();
    for (std::size_t axis = 1; fits && axis < spec.shape.size(); ++axis) {
      fits = spec.shape[axis] == -1 || spec.shape[axis] == one->shape[axis];
    }
    if (!fits || one->data.size() != count_of(one->shape) * size_of(one->type)) {
      throw input_error("The input '" + spec.name + "' is " + shown(one->shape) + ", and the engine reads " +
                            shown(spec.shape) + ".",
                        "Prepare images as the bundle's manifest.json says under 'preprocess'.");
    }
    feeds.push_back(in_type(*one, spec.type));
    if (spec.shape.empty()) continue;
    if (one->shape[0] < 1 || (count && *count != one->shape[0])) {
      throw input_error("The inputs hold different numbers of images, or none.", "Give one row for each image.");
    }
    count = one->shape[0];
  }
  return feeds;
}

struct Model::Parts {
  Bundle bundle;
  Preprocess preprocess;
  Settings settings;
  std::unique_ptr<Engine> engine;
  std::string image, golden;
  std::int64_t fewest = 1, most = 1;
  Lanes lanes;
};

Model::Model(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

const Bundle& Model::bundle() const { return parts_->bundle; }
const std::string& Model::label() const { return parts_->engine->label; }
const std::string& Model::golden() const { return parts_->golden; }
std::pair<std::int64_t, std::int64_t> Model::batch() const { return {parts_->fewest, parts_->most}; }

Model Model::load(const std::string& what, const Trust& trust, const Settings& settings) {
  return guarded([&] {
    if (settings.streams < 1 || settings.streams > kMostStreams) {
      throw input_error(std::to_string(settings.streams) + " streams cannot be had.",
                        "Give 1 to " + std::to_string(kMostStreams) + ".");
    }
    if (settings.least_score && !(*settings.least_score >= 0.0f && *settings.least_score <= 1.0f)) {
      throw input_error("A least score of " + std::to_string(*settings.least_score) + " is out of range.", "Give 0 to 1.");
    }
    auto parts = std::make_unique<Parts>();
    const bool is_folder = what.find('/') != std::string::npos || what == "." || what == "..";
    parts->bundle = Bundle::open(is_folder ? what : installed_folder(what), trust);
    parts->settings = settings;
    parts->preprocess = preprocess_of(parts->bundle, settings.size);
    if (settings.check) parts->bundle.check();
    parts->engine = Engine::open(parts->bundle);
    Engine& engine = *parts->engine;
    parts->image = engine.inputs.front().name;
    for (const Spec& spec : engine.inputs) {
      if (spec.name == parts->bundle.manifest().input) parts->image = spec.name;
    }
    if (settings.check) {
      std::unique_ptr<Lane> lane;
      const Run run = [&](const std::vector<Tensor>& feeds) {
        std::int64_t needed = 1;
        for (const Tensor& feed : feeds) needed = feed.shape.empty() ? needed : feed.shape[0];
        if (lane == nullptr || lane->capacity() < needed) {
          lane.reset();
          lane = engine.lane(needed, false);
        }
        return lane->run(feeds);
      };
      parts->golden = golden_check(parts->bundle, engine, run);
    }
    parts->fewest = engine.fewest;
    parts->most = std::max(engine.fewest, std::min(engine.most, kMostAtOnce));
    for (int stream = 0; stream < settings.streams; ++stream) {
      parts->lanes.put(engine.lane(parts->most, settings.cuda_graph));
    }
    return Model(std::move(parts));
  });
}

std::vector<Answer> Model::answers(const std::vector<Frame>& frames, const std::vector<Tensor>& beside) const {
  return guarded([&] {
    if (frames.empty()) throw input_error("No frame was given.", "Give at least one.");
    const Preprocess& how = parts_->preprocess;
    const auto count = static_cast<std::int64_t>(frames.size());
    std::vector<Placement> places;
    std::vector<float> values(how.values() * frames.size());
    for (std::size_t at = 0; at < frames.size(); ++at) {
      require_frame(frames[at], at);
      places.push_back(how.place({static_cast<std::int64_t>(frames[at].height), static_cast<std::int64_t>(frames[at].width)}));
      how.apply(frames[at], values.data() + at * how.values());
    }
    Tensor images = tensor_of(parts_->image, {count, how.channels(), how.height(), how.width()}, values);
    const Manifest& manifest = parts_->bundle.manifest();
    if (manifest.encoding) images = encoded(images, *manifest.encoding);
    std::vector<Tensor> given{images};
    given.insert(given.end(), beside.begin(), beside.end());
    const std::vector<Tensor> feeds = checked_feeds(given, parts_->engine->inputs);
    std::vector<Answer> found;
    for (std::int64_t first = 0; first < count; first += parts_->most) {
      const std::int64_t size = std::min(parts_->most, count - first), whole = std::max(size, parts_->fewest);
      // A batch that is too small is filled up by repeating its last frame.
      std::vector<std::size_t> at;
      for (std::int64_t one = 0; one < whole; ++one) at.push_back(static_cast<std::size_t>(first + std::min(one, size - 1)));
      std::vector<Tensor> part;
      for (const Tensor& feed : feeds) part.push_back(feed.shape.empty() ? feed : taken(feed, at));
      std::vector<Tensor> outputs;
      {
        const Borrowed lane(parts_->lanes);
        outputs = (*lane).run(part);
      }
      for (Tensor& output : outputs) {
        const bool batched = !output.shape.empty() && output.shape[0] == whole;
        if (batched && whole != size) output = rows_of(output, 0, static_cast<std::size_t>(size));
      }
      const std::vector<Placement> some(places.begin() + first, places.begin() + first + size);
      const auto answers = parts_->bundle.reading().answers(outputs, some, parts_->settings.least_score);
      found.insert(found.end(), answers.begin(), answers.end());
    }
    return found;
  });
}

}  // namespace resvit
