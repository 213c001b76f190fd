// From a frame to what the network reads. See resvit_engines/pictures/preprocess.py, which this equals byte for byte.

#include <algorithm>
#include <cmath>

#include "common.hpp"
#include "resample.hpp"

namespace resvit {
namespace {

constexpr std::int64_t kMostSide = 1 << 16, kMostChannels = 4096;
// A picture that is all but a line would have to be enlarged beyond any memory before it is cut.
constexpr double kMostEnlarged = 64;

double real(std::int64_t value) { return static_cast<double>(value); }

// Half to even, as Python rounds.
std::int64_t even(double value) { return static_cast<std::int64_t>(std::nearbyint(value)); }

// A frame in RGB and in as many channels as the network reads: colour becomes ITU-R 601 luma, grey equal channels.
Pixels in_channels(const Frame& frame, std::int64_t channels) {
  Pixels out{static_cast<std::int64_t>(frame.height), static_cast<std::int64_t>(frame.width), channels, {}};
  out.data.resize(frame.height * frame.width * static_cast<std::size_t>(channels));
  std::uint8_t* to = out.data.data();
  const bool swapped = frame.order == Order::Bgr && frame.channels == 3;
  for (std::size_t y = 0; y < frame.height; ++y) {
    const std::uint8_t* pixel = frame.pixels + y * frame.stride;
    if (static_cast<std::int64_t>(frame.channels) == channels && !swapped) {
      to = std::copy(pixel, pixel + frame.width * frame.channels, to);
      continue;
    }
    for (std::size_t x = 0; x < frame.width; ++x, pixel += frame.channels) {
      if (frame.channels == 1) {
        to = std::fill_n(to, channels, *pixel);
        continue;
      }
      const std::uint8_t red = pixel[swapped ? 2 : 0], green = pixel[1], blue = pixel[swapped ? 0 : 2];
      if (channels == 1) {
        *to++ = static_cast<std::uint8_t>((red * 19595u + green * 38470u + blue * 7471u + 0x8000u) >> 16);
      } else {
        *to++ = red;
        *to++ = green;
        *to++ = blue;
      }
    }
  }
  return out;
}

Pixels cut(const Pixels& in, std::int64_t top, std::int64_t left, std::int64_t height, std::int64_t width) {
  Pixels out{height, width, in.channels, {}};
  out.data.reserve(static_cast<std::size_t>(height * width * in.channels));
  for (std::int64_t row = 0; row < height; ++row) {
    const auto first = in.data.begin() + ((row + top) * in.width + left) * in.channels;
    out.data.insert(out.data.end(), first, first + width * in.channels);
  }
  return out;
}

}  // namespace

Size Preprocess::covering(Size frame) const {
  const auto want = Size{static_cast<std::int64_t>(std::floor(real(size_.height) / crop_fraction_)),
                         static_cast<std::int64_t>(std::floor(real(size_.width) / crop_fraction_))};
  if (frame.width * want.height <= frame.height * want.width) {
    const double tall = real(want.width * frame.height) / real(frame.width);
    return {std::max(want.height, static_cast<std::int64_t>(tall)), want.width};
  }
  const double wide = real(want.height * frame.width) / real(frame.height);
  return {want.height, std::max(want.width, static_cast<std::int64_t>(wide))};
}

Placement Preprocess::place(Size frame) const {
  if (frame.height < 1 || frame.width < 1 || frame.height > kMostSide || frame.width > kMostSide) {
    throw input_error("A frame has " + std::to_string(frame.height) + " x " + std::to_string(frame.width) + " pixels.",
                      "Give 1 to " + std::to_string(kMostSide) + " pixels a side.");
  }
  switch (resize_) {
    case Resize::None:
      if (frame.height != size_.height || frame.width != size_.width) {
        throw input_error("A frame is " + std::to_string(frame.height) + "x" + std::to_string(frame.width) +
                              " pixels (height x width), but the preprocessing does no resizing and the network reads " +
                              std::to_string(size_.height) + "x" + std::to_string(size_.width) + ".",
                          "Give frames of that size.");
      }
      return {frame, size_, frame, 0, 0};
    case Resize::Stretch: return {frame, size_, size_, 0, 0};
    case Resize::Letterbox: {
      const double scale = std::min(real(size_.height) / real(frame.height), real(size_.width) / real(frame.width));
      const auto fitted = [&](std::int64_t side, std::int64_t most) {
        return std::min(most, std::max(std::int64_t{1}, even(real(side) * scale)));
      };
      const Size placed{fitted(frame.height, size_.height), fitted(frame.width, size_.width)};
      if (!centred_) return {frame, size_, placed, 0, 0};
      return {frame, size_, placed, (size_.height - placed.height) / 2, (size_.width - placed.width) / 2};
    }
    case Resize::Crop: break;
  }
  const Size placed = covering(frame);
  return {frame, size_, placed, -even(real(placed.height - size_.height) / 2),
          -even(real(placed.width - size_.width) / 2)};
}

Preprocess Preprocess::at(Size size) const {
  Preprocess made = *this;
  made.size_ = size;
  return made;
}

void Preprocess::apply(const Frame& frame, float* out) const {
  const bool sound = frame.pixels != nullptr && frame.height >= 1 && frame.width >= 1 && frame.height <= kMostSide &&
                     frame.width <= kMostSide && frame.channels >= 1 && frame.channels <= kMostChannels &&
                     frame.stride >= frame.width * frame.channels;
  if (!sound) {
    throw input_error("This is no frame.", "Give uint8 pixels, their height, width, channels and stride.");
  }
  const auto height = static_cast<std::int64_t>(frame.height), width = static_cast<std::int64_t>(frame.width);
  const Placement at = place({height, width});
  const bool pictures = (channels_ == 1 || channels_ == 3) && (frame.channels == 1 || frame.channels == 3);
  const bool same = at.placed.height == height && at.placed.width == width && height == size_.height &&
                    width == size_.width && frame.channels == static_cast<std::size_t>(channels_);
  if (!pictures && !same) {
    throw input_error("A frame of " + std::to_string(frame.channels) + " channels was given, and the network reads " +
                          std::to_string(channels_) + ".",
                      "Give grey frames or colour; others only as the network reads them.");
  }
  guarded([&] {
    Pixels pixels = in_channels(frame, channels_);
    const double larger = std::max(real(size_.height * size_.width), real(height * width));
    if (real(at.placed.height) * real(at.placed.width) > kMostEnlarged * larger) {
      const double across = real(width) / real(at.placed.width), down = real(height) / real(at.placed.height);
      const double right = std::min(real(size_.width - at.left) * across, real(width));
      const double bottom = std::min(real(size_.height - at.top) * down, real(height));
      const Area area{static_cast<float>(real(-at.left) * across), static_cast<float>(real(-at.top) * down),
                      static_cast<float>(right), static_cast<float>(bottom)};
      pixels = resized(std::move(pixels), size_, static_cast<Kernel>(filter_), area);
    } else {
      const Area whole{0, 0, static_cast<float>(width), static_cast<float>(height)};
      pixels = resized(std::move(pixels), at.placed, static_cast<Kernel>(filter_), whole);
    }
    if (resize_ == Resize::Crop && (pixels.height != size_.height || pixels.width != size_.width)) {
      pixels = cut(pixels, -at.top, -at.left, size_.height, size_.width);
    }
    const bool padded = resize_ == Resize::Letterbox;
    const std::int64_t top = padded ? at.top : 0, left = padded ? at.left : 0;
    for (std::int64_t channel = 0; channel < channels_; ++channel) {
      const auto number = static_cast<std::size_t>(channel);
      const std::int64_t source = bgr_ ? channels_ - 1 - channel : channel;
      const float mean = static_cast<float>(mean_[number]), deviation = static_cast<float>(std_[number]);
      const float fill = static_cast<float>((pad_value_[number] / 255.0 - mean_[number]) / std_[number]);
      float ready[256];
      for (int value = 0; value < 256; ++value) ready[value] = (static_cast<float>(value) / 255.0f - mean) / deviation;
      for (std::int64_t y = 0; y < size_.height; ++y) {
        const std::int64_t row = y - top;
        const bool seen = row >= 0 && row < pixels.height;
        const std::uint8_t* from = pixels.data.data() + (seen ? row : 0) * pixels.width * channels_ + source;
        for (std::int64_t x = 0; x < size_.width; ++x) {
          const std::int64_t column = x - left;
          *out++ = seen && column >= 0 && column < pixels.width ? ready[from[column * channels_]] : fill;
        }
      }
    }
  });
}

std::vector<float> Preprocess::apply(const Frame& frame) const {
  return guarded([&] {
    std::vector<float> out(values());
    apply(frame, out.data());
    return out;
  });
}

}  // namespace resvit
