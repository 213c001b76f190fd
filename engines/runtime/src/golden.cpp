#include "golden.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>

#include "common.hpp"
#include "manifest.hpp"
#include "tensor.hpp"

namespace resvit {
namespace {

constexpr double kToleranceDb = 20.0, kSigmas = 3.0;
// The share of a set's rows that may be others: those whose scores were at the end of the selection.
constexpr double kEdge = 0.02;
constexpr std::int64_t kRowsMost = 4096;

struct Report {
  std::size_t images;
  double sqnr;  // infinite where nothing differs
  double agreement;  // below 0 where the outputs are no classes
  std::string label;
};

std::string decibels(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f dB", value);
  return text;
}

Error differs(const std::string& why, const std::string& label) {
  return mismatch(label + " computes something else than what was validated: " + why + ".",
                  "Do not use it: keep the version that runs now, and build the engine again on this device.");
}

double norm(const std::vector<double>& values) {
  return std::sqrt(std::accumulate(values.begin(), values.end(), 0.0, [](double sum, double x) { return sum + x * x; }));
}

// ---- Answers that are sets. See resvit_engines/rows.py.

bool is_finite(const Tensor& tensor) {
  const auto values = doubles_of(tensor);
  return std::all_of(values.begin(), values.end(), [](double value) { return std::isfinite(value); });
}

// `found` with the rows of its sets in the order in which `expected` has them.
std::vector<Tensor> paired_rows(const std::vector<Tensor>& expected, std::vector<Tensor> found) {
  std::map<std::int64_t, std::vector<std::string>> counts;
  std::vector<std::int64_t> order_of_counts;
  for (const Tensor& one : expected) {
    const Tensor* other = find(found, one.name);
    const bool fits = other != nullptr && other->shape == one.shape && one.shape.size() >= 2 && one.shape[1] > 1 &&
                      one.shape[1] <= kRowsMost && is_finite(one) && is_finite(*other);
    if (!fits) continue;
    if (counts[one.shape[1]].empty()) order_of_counts.push_back(one.shape[1]);
    counts[one.shape[1]].push_back(one.name);
  }
  std::vector<std::string> names;
  for (const std::int64_t count : order_of_counts) {
    if (counts[count].size() > names.size()) names = counts[count];
  }
  if (names.empty()) return found;
  struct Side {
    const Tensor *expected, *found;
    std::vector<double> true_values, own_values;
    std::size_t row;
  };
  std::vector<Side> sides;
  const std::vector<Tensor> given = found;
  for (const std::string& name : names) {
    Side side{find(expected, name), find(given, name), {}, {}, 0};
    side.true_values = doubles_of(*side.expected);
    side.own_values = doubles_of(*side.found);
    const double scale = std::max(norm(side.true_values) / std::sqrt(static_cast<double>(side.true_values.size())), 1e-12);
    for (auto* values : {&side.true_values, &side.own_values}) {
      for (double& value : *values) value /= scale;
    }
    side.row = side.true_values.size() / static_cast<std::size_t>(side.expected->shape[0] * side.expected->shape[1]);
    sides.push_back(std::move(side));
  }
  const auto rows = static_cast<std::size_t>(sides[0].expected->shape[1]);
  for (std::size_t image = 0; image < static_cast<std::size_t>(sides[0].expected->shape[0]); ++image) {
    std::vector<double> distances(rows * rows, 0.0);
    for (const Side& side : sides) {
      for (std::size_t one = 0; one < rows; ++one) {
        const double* true_row = side.true_values.data() + (image * rows + one) * side.row;
        for (std::size_t other = 0; other < rows; ++other) {
          const double* own_row = side.own_values.data() + (image * rows + other) * side.row;
          double& sum = distances[one * rows + other];
          for (std::size_t at = 0; at < side.row; ++at) sum += (true_row[at] - own_row[at]) * (true_row[at] - own_row[at]);
        }
      }
    }
    std::vector<std::uint32_t> nearest(rows * rows);
    std::iota(nearest.begin(), nearest.end(), 0u);
    std::stable_sort(nearest.begin(), nearest.end(), [&](auto a, auto b) { return distances[a] < distances[b]; });
    std::vector<std::size_t> partner(rows, rows), by_distance(rows);
    std::vector<double> distance(rows, 0.0);
    std::vector<bool> taken_already(rows, false);
    for (const std::uint32_t flat : nearest) {
      const std::size_t row = flat / rows, column = flat % rows;
      if (partner[row] != rows || taken_already[column]) continue;
      partner[row] = column;
      taken_already[column] = true;
      distance[row] = distances[flat];
    }
    std::iota(by_distance.begin(), by_distance.end(), std::size_t{0});
    std::stable_sort(by_distance.begin(), by_distance.end(), [&](auto a, auto b) { return distance[a] > distance[b]; });
    by_distance.resize(static_cast<std::size_t>(kEdge * static_cast<double>(rows)));
    std::vector<bool> at_the_edge(rows, false);
    for (const std::size_t row : by_distance) at_the_edge[row] = true;
    for (const Side& side : sides) {
      auto& target = const_cast<Tensor*>(find(found, side.expected->name))->data;
      const std::size_t bytes = side.row * size_of(side.expected->type);
      for (std::size_t row = 0; row < rows; ++row) {
        // An expected row replaces one of the edge only where both are of one type.
        const bool whole = at_the_edge[row] && side.expected->type == side.found->type;
        const Tensor& from = whole ? *side.expected : *side.found;
        const std::size_t first = (image * rows + (whole ? row : partner[row])) * bytes;
        std::copy_n(from.data.begin() + static_cast<std::ptrdiff_t>(first), bytes,
                    target.begin() + static_cast<std::ptrdiff_t>((image * rows + row) * bytes));
      }
    }
  }
  return found;
}

// ---- Comparing

Report compared(const Tensor& output, const Tensor& expected, std::optional<double> least, const std::string& which,
                const std::string& label) {
  if (output.shape != expected.shape) {
    throw differs(which + "the output is " + shown(output.shape) + " and that which was validated " +
                      shown(expected.shape),
                  label);
  }
  if (!is_finite(output)) throw differs(which + "some of its outputs are NaN or infinite", label);
  const std::vector<double> own = doubles_of(output), wanted = doubles_of(expected);
  const auto images = static_cast<std::size_t>(expected.shape[0]);
  const std::size_t row = wanted.size() / images;
  std::vector<double> error(own.size()), moving(wanted);
  for (std::size_t at = 0; at < own.size(); ++at) error[at] = own[at] - wanted[at];
  for (std::size_t at = 0; at < row; ++at) {
    double mean = 0;
    for (std::size_t image = 0; image < images; ++image) mean += wanted[image * row + at];
    for (std::size_t image = 0; image < images; ++image) moving[image * row + at] -= mean / static_cast<double>(images);
  }
  const double noise = norm(error), signal = norm(wanted), moved = norm(moving);
  Report report{images, std::numeric_limits<double>::infinity(), -1.0, label};
  if (noise > 0) report.sqnr = 20.0 * std::log10(std::max(signal, 1e-300) / noise);
  if (report.sqnr < kToleranceDb) {
    throw differs(which + "SQNR " + decibels(report.sqnr) + ", and " + decibels(kToleranceDb) + " are needed", label);
  }
  if (least && noise > 0 && moved > 1e-6 * signal && 20.0 * std::log10(moved / noise) < *least) {
    throw differs(which + "of what moves from image to image, SQNR " + decibels(20.0 * std::log10(moved / noise)) +
                      ", and " + decibels(*least) + " are needed",
                  label);
  }
  if (expected.shape.size() != 2 || row < 2) return report;
  const double allowed = kSigmas * std::sqrt(2.0) * noise / std::sqrt(static_cast<double>(wanted.size()));
  std::size_t same = 0;
  for (std::size_t image = 0; image < images; ++image) {
    const double *mine = own.data() + image * row, *right = wanted.data() + image * row;
    const auto answer = std::max_element(mine, mine + row) - mine, best = std::max_element(right, right + row) - right;
    same += answer == best ? 1 : 0;
    if (answer != best && right[best] - right[answer] > allowed) {
      throw differs(which + "golden image " + std::to_string(image) + " is answered with " + std::to_string(answer) +
                        " instead of " + std::to_string(best) + ", by more than rounding explains",
                    label);
    }
  }
  report.agreement = static_cast<double>(same) / static_cast<double>(images);
  return report;
}

class Check {
 public:
  Check(const Bundle& bundle, const Engine& engine, const Run& run) : bundle_(bundle), engine_(engine), run_(run) {}

  // Checks the golden images of one size: in batches of every kind, or unless `whole` in the smallest alone.
  void of(const Golden& golden, bool whole) {
    const Manifest& manifest = bundle_.manifest();
    Tensor images = npy(golden.input);
    const Tensor expected = npy(golden.output);
    const auto count = static_cast<std::size_t>(images.shape[0]);
    if (!whole && images.shape.size() != 4) throw input_error("The bundle's golden files hold no images.");
    if (expected.shape[0] != images.shape[0]) {
      throw input_error("The bundle's golden files hold " + std::to_string(count) + " images and " +
                        std::to_string(expected.shape[0]) + " outputs.");
    }
    images.name = engine_.inputs.front().name;
    for (const Spec& spec : engine_.inputs) {
      if (spec.name == manifest.input) images.name = spec.name;
    }
    std::vector<Tensor> given{images}, others;
    for (const auto& [name, file] : golden.inputs) given.push_back(named(name, file, count));
    for (const auto& [name, file] : golden.outputs) {
      if (file != golden.output) others.push_back(named(name, file, count));
    }
    const std::vector<Tensor> feeds = checked_feeds(given, engine_.inputs);
    std::vector<std::int64_t> batches;
    const std::array<std::int64_t, 3> usual{1, static_cast<std::int64_t>(count), static_cast<std::int64_t>(count)};
    for (const std::int64_t wanted : manifest.batch.value_or(usual)) {
      const std::int64_t batch = std::min(std::max(wanted, engine_.fewest), engine_.most);
      if (std::find(batches.begin(), batches.end(), batch) == batches.end()) batches.push_back(batch);
    }
    if (!whole) batches.resize(1);
    for (std::size_t turn = 0; turn < batches.size(); ++turn) {
      std::string label = engine_.label + ", batch " + std::to_string(batches[turn]);
      if (!whole) label += ", images of " + std::to_string(images.shape[2]) + "x" + std::to_string(images.shape[3]);
      in_batches(golden, feeds, expected, others, batches[turn], turn, label);
    }
  }

  std::string sentence() const {
    const auto worst = std::min_element(reports_.begin(), reports_.end(),
                                        [](const Report& one, const Report& two) { return one.sqnr < two.sqnr; });
    std::string text = std::to_string(images_) + " golden images: ";
    text += std::isinf(worst->sqnr) ? "the very outputs" : "SQNR " + decibels(worst->sqnr);
    if (worst->agreement >= 0) {
      text += ", " + std::to_string(std::lround(100 * worst->agreement)) + "% of the answers the same";
    }
    return text + " (" + worst->label + ")";
  }

 private:
  Tensor npy(const std::string& file) const { return tensor_from_npy(bundle_.read(file), file); }

  Tensor named(const std::string& name, const std::string& file, std::size_t count) const {
    Tensor found = npy(file);
    found.name = name;
    if (found.shape[0] != static_cast<std::int64_t>(count)) {
      throw input_error("The bundle's golden files hold " + std::to_string(count) + " images and " +
                        std::to_string(found.shape[0]) + " of " + name + ".");
    }
    return found;
  }

  // At other places in each kind of batch: kernels, and their faults, differ from one to the next.
  void in_batches(const Golden& golden, const std::vector<Tensor>& feeds, Tensor expected, std::vector<Tensor> others,
                  std::int64_t batch, std::size_t turn, const std::string& label) {
    const auto count = static_cast<std::size_t>(expected.shape[0]), size = static_cast<std::size_t>(batch);
    std::vector<std::size_t> at((count + size - 1) / size * size);
    for (std::size_t place = 0; place < at.size(); ++place) at[place] = (place + turn) % count;
    std::vector<std::vector<Tensor>> parts;
    for (std::size_t first = 0; first < at.size(); first += size) {
      const std::vector<std::size_t> some(at.begin() + static_cast<std::ptrdiff_t>(first),
                                          at.begin() + static_cast<std::ptrdiff_t>(first + size));
      std::vector<Tensor> part;
      for (std::size_t input = 0; input < feeds.size(); ++input) {
        part.push_back(engine_.inputs[input].shape.empty() ? feeds[input] : taken(feeds[input], some));
      }
      parts.push_back(run_(part));
    }
    std::vector<Tensor> outputs;
    for (std::size_t one = 0; one < parts[0].size(); ++one) {
      std::vector<Tensor> pieces;
      for (const auto& part : parts) pieces.push_back(part[one]);
      outputs.push_back(pieces[0].shape.empty() ? pieces[0] : joined(pieces));
    }
    const Tensor* judged = find(outputs, "logits");
    const std::string name = judged != nullptr ? "logits" : outputs.front().name;
    expected = taken(expected, at);
    expected.name = name;
    for (Tensor& other : others) other = taken(other, at);
    if (golden.sets) {
      std::vector<Tensor> all{expected};
      all.insert(all.end(), others.begin(), others.end());
      outputs = paired_rows(all, std::move(outputs));
    }
    const auto least_of = [&](const std::string& output) {
      const auto found = golden.least_db.find(output);
      return found == golden.least_db.end() ? std::optional<double>() : found->second;
    };
    std::vector<Report> found{compared(*find(outputs, name), expected, least_of(name), "", label)};
    for (const Tensor& other : others) {
      const Tensor* output = find(outputs, other.name);
      if (output == nullptr) throw differs("it has no output " + other.name, label);
      found.push_back(compared(*output, other, least_of(other.name), "of " + other.name + ": ", label));
    }
    reports_.insert(reports_.end(), found.begin(), found.end());
    images_ = reports_.size() == found.size() ? count : images_;
  }

  const Bundle& bundle_;
  const Engine& engine_;
  const Run& run_;
  std::vector<Report> reports_;
  std::size_t images_ = 0;
};

}  // namespace

std::string golden_check(const Bundle& bundle, const Engine& engine, const Run& run) {
  const Manifest& manifest = bundle.manifest();
  const bool there = manifest.golden && std::any_of(manifest.files.begin(), manifest.files.end(), [&](const File& file) {
    return file.path == manifest.golden->input;
  });
  if (!there) {
    throw input_error("The bundle has no golden images, so nothing shows that what runs here is what was validated.",
                      "Make the bundle again with this version, or load it with check = false.");
  }
  Check check(bundle, engine, run);
  check.of(*manifest.golden, true);
  for (const Golden& golden : manifest.golden_at_sizes) check.of(golden, false);
  return check.sentence();
}

}  // namespace resvit
