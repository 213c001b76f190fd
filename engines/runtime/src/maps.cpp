// From what a network says on a grid to every pixel of the frame. See resvit_engines/answers/maps.py, program/frames.py.

#include <algorithm>
#include <cmath>
#include <limits>

#include "common.hpp"
#include "reading.hpp"

namespace resvit {
namespace {

// Rows or columns of a grid of which a new one is made: the lower, and the share of the one above it.
struct Between {
  std::size_t low, high;
  float share;
};

std::vector<Between> between(const std::vector<double>& places, std::int64_t cells) {
  std::vector<Between> found;
  for (const double place : places) {
    const double last = static_cast<double>(cells - 1), raised = place - 0.5 > 0.0 ? place - 0.5 : 0.0;
    const double at = raised < last ? raised : last;
    const std::int64_t low = std::min(static_cast<std::int64_t>(at), std::max<std::int64_t>(cells - 2, 0));
    const std::int64_t high = std::min(low + 1, cells - 1);
    const float share = static_cast<float>(at - static_cast<double>(low));
    found.push_back({static_cast<std::size_t>(low), static_cast<std::size_t>(high), share});
  }
  return found;
}

// A map [height, width] at other rows and then columns, from the two nearest of each.
std::vector<float> interpolated(const float* values, std::int64_t width, const std::vector<Between>& rows,
                                const std::vector<Between>& columns) {
  const auto wide = static_cast<std::size_t>(width);
  std::vector<float> line(wide), made(rows.size() * columns.size());
  float* to = made.data();
  for (const Between& row : rows) {
    const float *low = values + row.low * wide, *high = values + row.high * wide, rest = 1.0f - row.share;
    for (std::size_t at = 0; at < wide; ++at) line[at] = low[at] * rest + high[at] * row.share;
    for (const Between& column : columns) {
      *to++ = line[column.low] * (1.0f - column.share) + line[column.high] * column.share;
    }
  }
  return made;
}

// Where the centres of `large` pixels lie among `small` cells, of which a cell's centre is a half.
std::vector<double> centres(std::int64_t small, std::int64_t large) {
  std::vector<double> found;
  for (std::int64_t at = 0; at < large; ++at) {
    found.push_back((static_cast<double>(at) + 0.5) * static_cast<double>(small) / static_cast<double>(large));
  }
  return found;
}

std::vector<float> map_at(const float* values, Size grid, Size size) {
  if (grid.height == size.height && grid.width == size.width) return {values, values + grid.height * grid.width};
  return interpolated(values, grid.width, between(centres(grid.height, size.height), grid.height),
                      between(centres(grid.width, size.width), grid.width));
}

// The class of the largest of the scores [K, h, w] at every pixel of `size`, the first of equals.
std::vector<std::int16_t> classes_at(const float* scores, std::int64_t classes, Size grid, Size size) {
  const auto pixels = static_cast<std::size_t>(size.height * size.width);
  std::vector<std::int16_t> found(pixels, 0);
  std::vector<float> best;
  for (std::int64_t number = 0; number < classes; ++number) {
    std::vector<float> large = map_at(scores + number * grid.height * grid.width, grid, size);
    if (number == 0) {
      best = std::move(large);
      continue;
    }
    for (std::size_t at = 0; at < pixels; ++at) {
      if (large[at] > best[at]) {
        best[at] = large[at];
        found[at] = static_cast<std::int16_t>(number);
      }
    }
  }
  return found;
}

// Where the centres of the frame's rows or columns lie in the input, and whether that is inside.
struct Axis {
  std::vector<double> at;
  std::vector<bool> seen;
};

Axis places_of(std::int64_t frame, std::int64_t placed, std::int64_t corner, std::int64_t size) {
  const double step = static_cast<double>(placed) / static_cast<double>(frame);
  Axis made;
  for (std::int64_t pixel = 0; pixel < frame; ++pixel) {
    const double at = (static_cast<double>(pixel) + 0.5) * step + static_cast<double>(corner);
    made.at.push_back(at);
    made.seen.push_back(at >= 0 && at < static_cast<double>(size));
  }
  return made;
}

Axis rows_in(const Placement& place) {
  return places_of(place.frame.height, place.placed.height, place.top, place.size.height);
}

Axis columns_in(const Placement& place) {
  return places_of(place.frame.width, place.placed.width, place.left, place.size.width);
}

std::vector<std::int16_t> labels_in(const std::vector<std::int16_t>& classes, const Placement& place) {
  const Axis rows = rows_in(place), columns = columns_in(place);
  std::vector<std::int16_t> found;
  found.reserve(rows.at.size() * columns.at.size());
  for (std::size_t y = 0; y < rows.at.size(); ++y) {
    for (std::size_t x = 0; x < columns.at.size(); ++x) {
      const bool seen = rows.seen[y] && columns.seen[x];
      const std::int64_t row = seen ? static_cast<std::int64_t>(rows.at[y]) : 0;
      const std::int64_t column = seen ? static_cast<std::int64_t>(columns.at[x]) : 0;
      found.push_back(seen ? classes[static_cast<std::size_t>(row * place.size.width + column)] : kUnseen);
    }
  }
  return found;
}

std::vector<float> values_in(const std::vector<float>& values, const Placement& place) {
  const Axis rows = rows_in(place), columns = columns_in(place);
  std::vector<float> found = interpolated(values.data(), place.size.width, between(rows.at, place.size.height),
                                          between(columns.at, place.size.width));
  for (std::size_t y = 0; y < rows.at.size(); ++y) {
    for (std::size_t x = 0; x < columns.at.size(); ++x) {
      const bool seen = rows.seen[y] && columns.seen[x];
      if (!seen) found[y * columns.at.size() + x] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  return found;
}

void require_frames(const Tensor& output, const Places& places) {
  if (output.shape[0] != static_cast<std::int64_t>(places.size()) || output.data.empty()) {
    throw input_error("The output " + output.name + " is " + shown(output.shape) + " for " +
                      std::to_string(places.size()) + " frames.");
  }
}

Size grid_of(const Tensor& output) {
  return {output.shape[output.shape.size() - 2], output.shape[output.shape.size() - 1]};
}

}  // namespace

Answers masks_from(const TaskOptions& options, const Tensors& outputs, const Places& places) {
  std::vector<const Tensor*> maps;
  for (const Tensor& one : outputs) {
    if (one.shape.size() == 3 || one.shape.size() == 4) maps.push_back(&one);
  }
  const Tensor& output = chosen(maps, options, outputs,
                                "Segmentation needs scores [B, classes, h, w] or class numbers [B, h, w]");
  require_frames(output, places);
  const Size grid = grid_of(output), size = places.front().size;
  const bool whole = size.height % grid.height == 0 && size.width % grid.width == 0 &&
                     size.height * grid.width == size.width * grid.height;
  const bool scored = output.shape.size() == 4;
  if (!whole || (scored && output.shape[1] < 2) ||
      (!scored && (grid.height != size.height || grid.width != size.width))) {
    throw input_error("The segmentation output has the shape " + shown(output.shape) + " for images of " +
                      std::to_string(size.height) + " x " + std::to_string(size.width) + ".");
  }
  const std::vector<float> scores = scored ? floats_of(output) : std::vector<float>();
  const std::vector<double> numbers = scored ? std::vector<double>() : doubles_of(output);
  const std::int64_t classes = scored ? output.shape[1] : 1, pixels = grid.height * grid.width;
  Answers found;
  for (std::size_t image = 0; image < places.size(); ++image) {
    const std::int64_t first = static_cast<std::int64_t>(image) * classes * pixels;
    std::vector<std::int16_t> labels;
    if (scored) {
      labels = classes_at(scores.data() + first, classes, grid, size);
    } else {
      for (std::int64_t at = 0; at < pixels; ++at) {
        const double number = numbers[static_cast<std::size_t>(first + at)];
        const bool fits = number > -2147483649.0 && number < 2147483648.0;
        labels.push_back(static_cast<std::int16_t>(fits ? static_cast<std::int32_t>(number) : 0));
      }
    }
    found.emplace_back(Mask{places[image].frame, labels_in(labels, places[image]), options.names});
  }
  return found;
}

Answers depths_from(const TaskOptions& options, const Tensors& outputs, const Places& places) {
  std::vector<const Tensor*> maps;
  for (const Tensor& one : outputs) {
    const auto& shape = one.shape;
    if (is_float(one.type) && (shape.size() == 3 || (shape.size() == 4 && shape[1] == 1))) maps.push_back(&one);
  }
  const Tensor& output = chosen(maps, options, outputs, "Depth needs an output [B, 1, h, w] or [B, h, w]");
  require_frames(output, places);
  const Size grid = grid_of(output);
  const std::vector<float> values = floats_of(output);
  const float nearest = static_cast<float>(options.min_depth), farthest = static_cast<float>(options.max_depth);
  const float least = static_cast<float>(1.0 / options.max_depth);
  Answers found;
  for (std::size_t image = 0; image < places.size(); ++image) {
    const float* first = values.data() + static_cast<std::int64_t>(image) * grid.height * grid.width;
    std::vector<float> depths = map_at(first, grid, places[image].size);
    for (float& depth : depths) {
      if (options.inverted) depth = 1.0f / std::max(depth, least);
      depth = std::min(std::max(depth, nearest), farthest);
    }
    found.emplace_back(Depths{places[image].frame, values_in(depths, places[image])});
  }
  return found;
}

}  // namespace resvit
