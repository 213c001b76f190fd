// Runs pictures through an installed bundle and says what is in them:
//
//   resvit-frames NAME|FOLDER KEY.pub FRAME.ppm...
//
// Frames are binary PPM files (P6), such as `ffmpeg -i camera.mp4 frame%04d.ppm` writes.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "resvit/runtime.hpp"

namespace {

struct Picture {
  std::string bytes;
  std::size_t height, width, first;

  resvit::Frame frame() const {
    return {reinterpret_cast<const std::uint8_t*>(bytes.data()) + first, height, width, 3, width * 3};
  }
};

bool is_space(char one) { return one == ' ' || (one >= '\t' && one <= '\r'); }

bool is_digit(char one) { return one >= '0' && one <= '9'; }

// The number of a header that stands behind white space and comments, from `#` to the end of the line; `at` goes behind
// it. 0 where none of one to five digits stands there.
std::size_t next_number(const std::string& bytes, std::size_t& at) {
  const std::size_t before = at;
  while (at < bytes.size() && (is_space(bytes[at]) || bytes[at] == '#')) {
    if (bytes[at] == '#') at = std::min(bytes.find('\n', at), bytes.size() - 1);
    ++at;
  }
  std::size_t number = 0, digits = 0;
  for (; at < bytes.size() && is_digit(bytes[at]) && digits < 6; ++at, ++digits) {
    number = 10 * number + static_cast<std::size_t>(bytes[at] - '0');
  }
  return at == before + digits || digits > 5 ? 0 : number;
}

Picture read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Picture made{{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()}, 0, 0, 0};
  std::size_t at = 2;
  made.width = next_number(made.bytes, at);
  made.height = next_number(made.bytes, at);
  const std::size_t white = next_number(made.bytes, at);
  const bool sound = made.bytes.compare(0, 2, "P6") == 0 && white == 255 && at < made.bytes.size() &&
                     is_space(made.bytes[at]) && made.width >= 1 && made.width <= 32768 && made.height >= 1 &&
                     made.height <= 32768;
  made.first = at + 1;
  if (!sound || made.bytes.size() != made.first + made.width * made.height * 3) {
    throw resvit::Error(path + " is no binary PPM file of 8 bits.", "Write one: ffmpeg -i picture.jpg frame.ppm",
                        resvit::Code::Input);
  }
  return made;
}

struct Said {
  void operator()(const resvit::Classification& found) const {
    for (const auto& one : found.top(3)) std::cout << "  " << one.name << " " << one.probability << "\n";
  }
  void operator()(const resvit::Detections& found) const {
    for (const auto& box : found.boxes) {
      std::cout << "  " << box.name << " " << box.score << " at " << box.left << ", " << box.top << " to " << box.right
                << ", " << box.bottom << "\n";
    }
  }
  void operator()(const resvit::Mask& found) const {
    std::cout << "  classes of " << found.size.height << " x " << found.size.width << " pixels; in the middle: "
              << found.names[found.classes[found.classes.size() / 2]] << "\n";
  }
  void operator()(const resvit::Depths& found) const {
    std::cout << "  depths of " << found.size.height << " x " << found.size.width
              << " pixels; in the middle: " << found.depths[found.depths.size() / 2] << "\n";
  }
  void operator()(const resvit::Line& found) const { std::cout << "  " << found.text << "\n"; }
  void operator()(const resvit::Embedding& found) const {
    std::cout << "  a vector of " << found.vector.size() << " numbers, the first " << found.vector.front() << "\n";
  }
  void operator()(const resvit::Outputs& found) const {
    for (const auto& one : found.tensors) std::cout << "  " << one.name << ": " << one.data.size() << " bytes\n";
  }
};

}  // namespace

int main(int count, char** words) {
  if (count < 4) {
    std::cerr << "usage: resvit-frames NAME|FOLDER KEY.pub FRAME.ppm...\n";
    return 2;
  }
  try {
    const auto model = resvit::Model::load(words[1], resvit::Trust::from(words[2]));
    std::cout << model.bundle().name() << ", release " << model.bundle().release() << "; " << model.golden() << "\n";
    for (int at = 3; at < count; ++at) {
      const Picture picture = read_ppm(words[at]);
      std::cout << words[at] << "\n";
      std::visit(Said{}, model.answer(picture.frame()));
    }
    return 0;
  } catch (const resvit::Error& error) {
    std::cerr << "error: " << error.what() << "\n  -> " << error.fix() << "\n";
    return static_cast<int>(error.code());
  }
}
