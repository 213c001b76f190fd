// Resizing of 8-bit pixels as Pillow does it. See resvit_engines/pictures/resample.py.

#pragma once

#include <cstdint>
#include <vector>

#include "resvit/runtime.hpp"

namespace resvit {

// [height, width, channels]
struct Pixels {
  std::int64_t height, width, channels;
  std::vector<std::uint8_t> data;
};

// What of the pixels is resized; edges need not be whole.
struct Area {
  float left, top, right, bottom;
};

enum class Kernel { Nearest, Bilinear, Bicubic, Lanczos };

Pixels resized(Pixels in, Size size, Kernel kernel, const Area& area);

}  // namespace resvit
