// From what a recogniser says of positions to a text. See resvit_engines/answers/texts.py.

#include <algorithm>

#include "common.hpp"
#include "reading.hpp"

namespace resvit {
namespace {

struct Decoder {
  bool ctc;
  std::int64_t silent;
  std::vector<std::string> classes;
};

std::vector<Decoder> decoders_for(const TaskOptions& options, std::int64_t count) {
  if (options.alphabet.empty()) {
    throw input_error("The bundle does not say which characters the network writes.",
                      "Make it again with --task-option characters=FILE.");
  }
  std::vector<std::vector<std::string>> spaced{options.alphabet};
  if (std::find(options.alphabet.begin(), options.alphabet.end(), " ") == options.alphabet.end()) {
    spaced.push_back(options.alphabet);
    spaced.back().emplace_back(" ");
  }
  std::vector<Decoder> found;
  for (const bool ctc : {true, false}) {
    const auto &said = ctc ? options.blank : options.end, &other = ctc ? options.end : options.blank;
    if ((options.ctc && *options.ctc != ctc) || (!options.ctc && !said && other)) continue;
    for (const auto& characters : spaced) {
      const auto length = static_cast<std::int64_t>(characters.size());
      if (length == count - 1) {
        std::vector<std::int64_t> silent{0, count - 1};
        if (said) silent = {(*said % count + count) % count};
        for (const std::int64_t at : silent) {
          Decoder decoder{ctc, at, characters};
          decoder.classes.insert(decoder.classes.begin() + at, "");
          found.push_back(std::move(decoder));
        }
      } else if (!ctc && length == count - 2 && (!said || *said == 0 || *said == 1)) {
        // A start in front of the end, or behind it, that no position answers with.
        Decoder decoder{ctc, said.value_or(1), {"", ""}};
        decoder.classes.insert(decoder.classes.end(), characters.begin(), characters.end());
        found.push_back(std::move(decoder));
      }
    }
  }
  return found;
}

}  // namespace

Answers lines_from(const TaskOptions& options, const Tensors& outputs, const Places& places) {
  std::vector<const Tensor*> fitting;
  for (const Tensor& one : outputs) {
    if (is_float(one.type) && one.shape.size() == 3) fitting.push_back(&one);
  }
  const Tensor& output = chosen(fitting, options, outputs, "Text needs an output [B, positions, classes]");
  const auto length = static_cast<std::int64_t>(options.alphabet.size());
  const auto fits = [&](std::int64_t size) { return size == length + 1 || size == length + 2; };
  const bool turned = fits(output.shape[1]) && !fits(output.shape[2]);
  const std::int64_t positions = output.shape[turned ? 2 : 1], classes = output.shape[turned ? 1 : 2];
  if (classes < 1 || output.shape[0] != static_cast<std::int64_t>(places.size())) {
    throw input_error("The output " + output.name + " is " + shown(output.shape) + " for " +
                      std::to_string(places.size()) + " frames.");
  }
  const std::vector<Decoder> decoders = decoders_for(options, classes);
  if (decoders.empty()) {
    throw input_error("The network chooses from " + std::to_string(classes) + " classes, and there are " +
                      std::to_string(length) + " characters: one class more, or two with the space, is what they need.");
  }
  if (decoders.size() > 1) {
    throw input_error("The bundle does not say how positions become a text: " + std::to_string(decoders.size()) +
                      " ways would fit.");
  }
  const Decoder& decoder = decoders.front();
  const std::vector<float> scores = floats_of(output);
  const std::int64_t step = turned ? positions : 1, row = turned ? 1 : classes;
  Answers found;
  for (std::size_t image = 0; image < places.size(); ++image) {
    const float* of_image = scores.data() + static_cast<std::int64_t>(image) * positions * classes;
    std::string text;
    std::int64_t last = -1;
    for (std::int64_t position = 0; position < positions; ++position) {
      const float* from = of_image + position * row;
      std::int64_t best = 0;
      for (std::int64_t number = 1; number < classes; ++number) {
        if (from[number * step] > from[best * step]) best = number;
      }
      if (!decoder.ctc && best == decoder.silent) break;
      if (!decoder.ctc || (best != last && best != decoder.silent)) text += decoder.classes[static_cast<std::size_t>(best)];
      last = best;
    }
    found.emplace_back(Line{std::move(text)});
  }
  return found;
}

}  // namespace resvit
