// Does what standard input asks for, a line each, by the C++ runtime, and says what came of it.

#include <unistd.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <sstream>
#include <thread>

#include "common.hpp"
#include "manifest.hpp"
#include "resvit/runtime.hpp"
#include "tensor.hpp"

extern "C" std::int64_t standin_compute(char const*, char const*, std::int64_t const*, std::int32_t, void const*, void*);

namespace {

using namespace resvit;
using Words = std::istringstream;

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<std::uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }

template <typename Value>
void put(std::ostream& out, const std::vector<Value>& values) {
  out.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(Value)));
}

struct Writer {
  std::ostream& out;
  void operator()(const Classification& found) const {
    out << "classification " << found.probabilities.size() << "\n";
    put(out, found.probabilities);
    for (const Class& one : found.top(3)) out << one.number << " " << one.name << "\n";
  }
  void operator()(const Detections& found) const {
    out << "detections " << found.boxes.size() << "\n";
    for (const Box& box : found.boxes) {
      put(out, std::vector<float>{box.left, box.top, box.right, box.bottom, box.score});
      out << box.number << " " << box.name << "\n";
    }
  }
  void operator()(const Mask& found) const {
    out << "mask " << found.size.height << " " << found.size.width << "\n";
    put(out, found.classes);
  }
  void operator()(const Depths& found) const {
    out << "depths " << found.size.height << " " << found.size.width << "\n";
    put(out, found.depths);
  }
  void operator()(const Line& found) const { out << "line\n" << found.text << "\n"; }
  void operator()(const Embedding& found) const {
    out << "embedding " << found.vector.size() << "\n";
    put(out, found.vector);
  }
  void operator()(const Outputs& found) const {
    for (const Tensor& one : found.tensors) {
      out << "output " << one.name << " " << name_of(one.type);
      for (const auto size : one.shape) out << " " << size;
      out << "\n";
      put(out, one.data);
    }
  }
};

std::string written(const std::vector<Answer>& answers) {
  std::ostringstream out;
  for (const Answer& one : answers) std::visit(Writer{out}, one);
  return out.str();
}

struct Picture {
  std::string bytes;
  std::size_t height, width, channels, spare;
  std::string order;
  Frame frame() const {
    return {reinterpret_cast<const std::uint8_t*>(bytes.data()), height, width, channels, width * channels + spare,
            order == "bgr" ? Order::Bgr : Order::Rgb};
  }
};

Picture picture(Words& words) {
  Picture made;
  std::string file;
  words >> file >> made.height >> made.width >> made.channels >> made.spare >> made.order;
  made.bytes = content(file);
  return made;
}

// prepare PREPROCESS OUT  FRAME HEIGHT WIDTH CHANNELS SPARE ORDER
std::string prepare(Words& words) {
  std::string how, to;
  words >> how >> to;
  const auto preprocess = Preprocess::from_json(content(how));
  const Picture given = picture(words);
  const auto out = preprocess.apply(given.frame());
  std::ofstream file(to, std::ios::binary);
  put(file, out);
  return std::to_string(preprocess.channels()) + " " + std::to_string(preprocess.height()) + " " +
         std::to_string(preprocess.width());
}

// open FOLDER TRUST [FILE], check FOLDER TRUST
std::string open(Words& words, bool check) {
  std::string folder, trust, file;
  words >> folder >> trust;
  const auto bundle = Bundle::open(folder, Trust::from(trust));
  if (check) bundle.check();
  if (words >> file) return std::to_string(bundle.read(file).size());
  return bundle.name() + " " + std::to_string(bundle.release()) + " " + bundle.digest() + " " +
         std::to_string(bundle.files().size());
}

// read READING PREPROCESS OUT LEAST(-1: as usual) FRAMES (HEIGHT WIDTH)... (NAME NPY)...
std::string read(Words& words) {
  std::string reading, how, to, name, file;
  float least;
  std::size_t count;
  words >> reading >> how >> to >> least >> count;
  const auto preprocess = Preprocess::from_json(content(how));
  std::vector<Placement> places;
  for (std::size_t at = 0; at < count; ++at) {
    Size frame{};
    words >> frame.height >> frame.width;
    places.push_back(preprocess.place(frame));
  }
  std::vector<Tensor> outputs;
  while (words >> name >> file) {
    outputs.push_back(tensor_from_npy(bytes_of(content(file)), name));
  }
  const auto answers = Documents::reading(content(reading))
                           .answers(outputs, places, least < 0 ? std::optional<float>() : std::optional<float>(least));
  std::ofstream(to, std::ios::binary) << written(answers);
  return std::to_string(answers.size());
}

// run WHAT TRUST OUT STREAMS THREADS GRAPH CHECK (FRAME HEIGHT WIDTH CHANNELS SPARE ORDER)...
std::string run(Words& words) {
  std::string what, trust, to;
  std::size_t threads;
  Settings settings;
  words >> what >> trust >> to >> settings.streams >> threads >> settings.cuda_graph >> settings.check;
  std::vector<Picture> pictures;
  while (words >> std::ws && !words.eof()) pictures.push_back(picture(words));
  std::vector<Frame> frames;
  for (const Picture& one : pictures) frames.push_back(one.frame());
  const auto model = Model::load(what, Trust::from(trust), settings);
  std::vector<std::string> found(threads);
  std::vector<std::thread> workers;
  for (std::size_t at = 0; at < threads; ++at) {
    workers.emplace_back([&, at] {
      try {
        for (int turn = 0; turn < (threads > 1 ? 5 : 1); ++turn) found[at] = written(model.answers(frames));
      } catch (const Error& error) {
        found[at] = std::string("error ") + error.what();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  for (const std::string& one : found) {
    if (one.rfind("error ", 0) == 0) throw Error(one.substr(6), "", Code::System);
    if (one != found.front()) throw Error("Threads got different answers.", "", Code::System);
  }
  std::ofstream(to, std::ios::binary) << found.front();
  return model.label() + "; " + model.golden();
}

// compute PLAN OUTPUT IN OUT BYTES SIZES: what the stand-in's engine makes of an input, for Python's.
std::string compute(Words& words) {
  std::string plan, output, in, to;
  std::size_t bytes;
  std::vector<std::int64_t> shape;
  words >> plan >> output >> in >> to >> bytes;
  for (std::int64_t size = 0; words >> size;) shape.push_back(size);
  const std::string given = content(in);
  std::vector<char> made(bytes);
  standin_compute(content(plan).c_str(), output.c_str(), shape.data(), static_cast<std::int32_t>(shape.size()),
                  given.data(), made.data());
  std::ofstream file(to, std::ios::binary);
  put(file, made);
  return "";
}

// halves: every FP16 to FP32 and back, and the middles between neighbours.
std::string halves() {
  std::size_t wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    wrong += half_of(float_of(half)) != half;
    wrong += half_of(-float_of(half)) != (half | 0x8000);
    if (bits + 1 == 0x7c00) continue;
    const float middle = (float_of(half) + float_of(static_cast<std::uint16_t>(half + 1))) / 2;
    wrong += half_of(middle) != (half % 2 == 0 ? half : half + 1);
  }
  wrong += half_of(65520.0f) != 0x7c00;
  wrong += half_of(65519.0f) != 0x7bff;
  return std::to_string(wrong);
}

// fuzz KIND SEED COUNT FILE [MORE]: the file, changed in COUNT ways, must be read or refused by an Error, and by nothing else.
std::string fuzz(Words& words) {
  std::string kind, file, more;
  unsigned seed;
  int count, refused = 0;
  words >> kind >> seed >> count >> file >> more;
  std::mt19937 dice(seed);
  const std::string whole = content(file);
  static const std::string kTokens[] = {"[", "]", "{", "}", "\"", "-1", "1e999", "null", "true", "\\ud800", "99999999999999999999",
                                        ":", ",", "\xff", "\n", "0", "'", "(", ")"};
  for (int turn = 0; turn < count; ++turn) {
    std::string text = whole;
    for (unsigned changes = 1 + dice() % 4; changes > 0; --changes) {
      const std::size_t at = text.empty() ? 0 : dice() % text.size();
      switch (dice() % 6) {
        case 0: text = text.substr(0, at); break;
        case 1: if (!text.empty()) text[at] = static_cast<char>(dice()); break;
        case 2: text.insert(at, kTokens[dice() % std::size(kTokens)]); break;
        case 3: text.erase(at, 1 + dice() % 8); break;
        case 4: text.insert(at, text.substr(dice() % (text.size() + 1), dice() % 64)); break;
        default: if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << dice() % 8)); break;
      }
    }
    try {
      if (kind == "manifest") Documents::manifest(text, "fuzz");
      if (kind == "signature") Documents::signatures(text);
      if (kind == "preprocess") Preprocess::from_json(text);
      if (kind == "npy") tensor_from_npy(bytes_of(text), "fuzz");
      if (kind == "key") {
        std::ofstream(more, std::ios::binary) << text;
        PublicKey::from_file(more);
      }
      if (kind == "reading") {
        // What still reads meets outputs of every form.
        const auto reading = Documents::reading(text);
        std::vector<Tensor> outputs;
        static const char* kNames[] = {"logits", "boxes", "scores", "pred_boxes", "out"};
        for (unsigned number = 1 + dice() % 3; number > 0; --number) {
          Tensor one{kNames[dice() % 5], {dice() % 4 == 0 ? 1 : 2}, static_cast<Type>(dice() % 7), {}};
          for (unsigned axes = dice() % 4; axes > 0; --axes) one.shape.push_back(dice() % 6);
          one.data.resize(count_of(one.shape) * size_of(one.type));
          for (auto& byte : one.data) byte = static_cast<std::uint8_t>(dice() % 64);
          outputs.push_back(one);
        }
        const Placement place{{5, 7}, {4, 4}, {3, 4}, 0, 0};
        reading.answers(outputs, {place, place});
      }
    } catch (const Error& error) {
      ++refused;
      if (std::string(error.what()).empty() || error.fix().empty()) return "an error without a sentence";
    }
  }
  return std::to_string(refused);
}

std::string done(Words& words) {
  std::string what;
  words >> what;
  if (what == "prepare") return prepare(words);
  if (what == "open" || what == "check") return open(words, what == "check");
  if (what == "read") return read(words);
  if (what == "run") return run(words);
  if (what == "compute") return compute(words);
  if (what == "halves") return halves();
  return fuzz(words);
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    Words words(line);
    try {
      const std::string said = done(words);
      std::cout << "ok " << said << std::endl;
    } catch (const Error& error) {
      std::cout << "error " << static_cast<int>(error.code()) << " " << error.what() << std::endl;
    }
  }
}
