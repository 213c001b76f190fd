// Coefficients in double, rounded to 22 bits behind the point; first across, then down, with 8 bits between. A pixel of the
// nearest is found by adding steps. Pillow has this in src/libImaging/Resample.c and Geometry.c.

#include "resample.hpp"

#include <algorithm>
#include <cmath>

namespace resvit {
namespace {

constexpr int kBits = 22;
constexpr double kPi = 3.14159265358979323846;

double sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * kPi) / (x * kPi); }

double bilinear(double x) { return std::max(1.0 - std::fabs(x), 0.0); }

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

// One output position: which inputs it sums, from `first` on, and how much of each in fixed point.
struct Tap {
  std::int64_t first;
  std::vector<std::int32_t> weights;
};

std::vector<Tap> taps(std::int64_t in, float from, float to, std::int64_t out, Kernel kernel) {
  double (*const value)(double) = kernel == Kernel::Bilinear ? bilinear : kernel == Kernel::Bicubic ? bicubic : lanczos;
  const double reach = kernel == Kernel::Bilinear ? 1.0 : kernel == Kernel::Bicubic ? 2.0 : 3.0;
  const double scale = static_cast<double>(to - from) / static_cast<double>(out);
  const double wide = std::max(scale, 1.0), support = reach * wide, narrow = 1.0 / wide;
  std::vector<Tap> found(static_cast<std::size_t>(out));
  std::vector<double> shares;
  for (std::int64_t place = 0; place < out; ++place) {
    const double centre = static_cast<double>(from) + (static_cast<double>(place) + 0.5) * scale;
    const std::int64_t first = std::max<std::int64_t>(static_cast<std::int64_t>(centre - support + 0.5), 0);
    const std::int64_t last = std::min(static_cast<std::int64_t>(centre + support + 0.5), in);
    double sum = 0.0;
    shares.clear();
    for (std::int64_t at = first; at < last; ++at) {
      shares.push_back(value((static_cast<double>(at) - centre + 0.5) * narrow));
      sum += shares.back();
    }
    Tap& tap = found[static_cast<std::size_t>(place)];
    tap.first = first;
    for (double share : shares) {
      if (sum != 0.0) share /= sum;
      tap.weights.push_back(static_cast<std::int32_t>(share * (1 << kBits) + (share < 0 ? -0.5 : 0.5)));
    }
  }
  return found;
}

std::uint8_t rounded(std::int64_t sum) {
  return static_cast<std::uint8_t>(std::clamp<std::int64_t>(sum >> kBits, 0, 255));
}

Pixels across(const Pixels& in, const std::vector<Tap>& found) {
  const auto width = static_cast<std::int64_t>(found.size());
  Pixels out{in.height, width, in.channels, {}};
  out.data.resize(static_cast<std::size_t>(in.height * width * in.channels));
  for (std::int64_t row = 0; row < in.height; ++row) {
    const std::uint8_t* source = in.data.data() + row * in.width * in.channels;
    std::uint8_t* target = out.data.data() + row * width * in.channels;
    for (const Tap& tap : found) {
      const std::uint8_t* value = source + tap.first * in.channels;
      if (in.channels == 3) {
        std::int64_t red = 1 << (kBits - 1), green = red, blue = red;
        for (const std::int32_t weight : tap.weights) {
          red += std::int64_t{value[0]} * weight;
          green += std::int64_t{value[1]} * weight;
          blue += std::int64_t{value[2]} * weight;
          value += 3;
        }
        *target++ = rounded(red);
        *target++ = rounded(green);
        *target++ = rounded(blue);
      } else {  // pictures have 1 or 3 channels
        std::int64_t sum = 1 << (kBits - 1);
        for (const std::int32_t weight : tap.weights) sum += std::int64_t{*value++} * weight;
        *target++ = rounded(sum);
      }
    }
  }
  return out;
}

Pixels down(const Pixels& in, const std::vector<Tap>& found) {
  const auto height = static_cast<std::int64_t>(found.size()), row = in.width * in.channels;
  Pixels out{height, in.width, in.channels, {}};
  out.data.resize(static_cast<std::size_t>(height * row));
  std::vector<std::int64_t> sums(static_cast<std::size_t>(row));
  for (std::int64_t place = 0; place < height; ++place) {
    const Tap& tap = found[static_cast<std::size_t>(place)];
    std::fill(sums.begin(), sums.end(), 1 << (kBits - 1));
    const std::uint8_t* source = in.data.data() + tap.first * row;
    for (const std::int32_t weight : tap.weights) {
      for (std::int64_t& sum : sums) sum += std::int64_t{*source++} * weight;
    }
    std::transform(sums.begin(), sums.end(), out.data.begin() + place * row, rounded);
  }
  return out;
}

std::vector<std::int64_t> nearest(std::int64_t in, float from, float to, std::int64_t out) {
  const double step = static_cast<double>(to - from) / static_cast<double>(out);
  double at = static_cast<double>(from) + step * 0.5;
  std::vector<std::int64_t> found;
  for (std::int64_t place = 0; place < out; ++place, at += step) {
    found.push_back(std::clamp<std::int64_t>(static_cast<std::int64_t>(at), 0, in - 1));
  }
  return found;
}

}  // namespace

Pixels resized(Pixels in, Size size, Kernel kernel, const Area& area) {
  const bool wider = size.width != in.width || area.left != 0 || area.right != static_cast<float>(in.width);
  const bool taller = size.height != in.height || area.top != 0 || area.bottom != static_cast<float>(in.height);
  if (!wider && !taller) return in;
  if (kernel == Kernel::Nearest) {
    const auto columns = nearest(in.width, area.left, area.right, size.width);
    const auto rows = nearest(in.height, area.top, area.bottom, size.height);
    Pixels out{size.height, size.width, in.channels, {}};
    out.data.reserve(static_cast<std::size_t>(size.height * size.width * in.channels));
    for (const std::int64_t y : rows) {
      for (const std::int64_t x : columns) {
        const auto first = in.data.begin() + (y * in.width + x) * in.channels;
        out.data.insert(out.data.end(), first, first + in.channels);
      }
    }
    return out;
  }
  if (wider) in = across(in, taps(in.width, area.left, area.right, size.width, kernel));
  if (taller) in = down(in, taps(in.height, area.top, area.bottom, size.height, kernel));
  return in;
}

}  // namespace resvit
