// An installed bundle in a C++ program: camera frames in, the task's answers out, as resvit_engines.load gives them.
//
//   const auto trust = resvit::Trust::usual();
//   const auto model = resvit::Model::load("/var/lib/resvit/NAME/current", trust);
//   const auto answer = model.answer({pixels, 1080, 1920, 3, stride});
//   const auto best = std::get<resvit::Classification>(answer).best();
//
// A bundle is opened only as it was signed. Frames are prepared, and outputs read, by the rules of Python's
// resvit_engines, with the same results to the last bit. Whatever is wrong is said by an Error; nothing else is thrown.
// Everything here may be used by several threads at once, as long as none assigns to it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace resvit {

struct Documents;
struct Manifest;
struct TaskOptions;

// The exit codes of resvit-engine for the same faults.
enum class Code { Input = 3, Impossible = 6, Missing = 7, Build = 8, System = 9, Untrusted = 10, Mismatch = 11 };

// What went wrong, what to do about it, and what kind of fault it is.
class Error : public std::runtime_error {
 public:
  Error(const std::string& problem, std::string fix, Code code);
  const std::string& fix() const { return fix_; }
  Code code() const { return code_; }

 private:
  std::string fix_;
  Code code_;
};

// ---- Frames and how they are prepared

enum class Order { Rgb, Bgr };

// A camera's frame or a decoded picture: uint8, rows from top to bottom, grey (1 channel) or colour (3) as they lie in
// memory. `stride` is the distance of two rows in bytes, at least width * channels. OpenCV's frames are Order::Bgr.
struct Frame {
  const std::uint8_t* pixels;
  std::size_t height, width, channels, stride;
  Order order = Order::Rgb;
};

// Height and width in pixels.
struct Size {
  std::int64_t height, width;
};

// Where a frame lies in the network's input `size`: resized to `placed`, with its top left corner at `top`, `left`.
struct Placement {
  Size frame, size, placed;
  std::int64_t top, left;
};

// What the manifest says under `preprocess`: resizing, cutting or padding, the order of channels, mean and deviation.
//
// The result equals that of resvit_engines.pictures.preprocess byte for byte: the filters are Pillow's, in its fixed-point
// arithmetic, and what follows is float32 in the same order.
class Preprocess {
 public:
  // Reads the JSON object. Throws Error(Input) for what the Python program would refuse.
  static Preprocess from_json(const std::string& text);

  std::int64_t height() const { return size_.height; }
  std::int64_t width() const { return size_.width; }
  std::int64_t channels() const { return channels_; }
  // How many values one prepared image has.
  std::size_t values() const { return static_cast<std::size_t>(channels_ * size_.height * size_.width); }

  // Writes one image [channels, height, width] to `out`, which has room for values().
  // Throws Error(Input) where `resize` is "none" and the frame has another size, or the frame is none.
  void apply(const Frame& frame, float* out) const;
  std::vector<float> apply(const Frame& frame) const;
  // Where a frame of this size comes to lie. Throws Error(Input) as apply().
  Placement place(Size frame) const;
  // The same for an input of another size.
  Preprocess at(Size size) const;

 private:
  friend struct Documents;
  enum class Resize { Stretch, Crop, Letterbox, None };
  enum class Filter { Nearest, Bilinear, Bicubic, Lanczos };
  Size covering(Size frame) const;

  Size size_{0, 0};
  std::int64_t channels_ = 3;
  Resize resize_ = Resize::Stretch;
  Filter filter_ = Filter::Bicubic;
  double crop_fraction_ = 1.0;
  std::vector<double> mean_{0.0}, std_{1.0}, pad_value_{0.0};
  bool bgr_ = false, centred_ = false;
};

// ---- What the network answers

enum class Type { Float32, Float16, Int8, UInt8, Int32, Int64, Bool };

// Values by name: `data` holds the elements of `shape` in C order, little endian.
struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  Type type = Type::Float32;
  std::vector<std::uint8_t> data;
};

// What classes are called; those that have no name, by their number.
class Names {
 public:
  Names() = default;
  explicit Names(std::map<std::int64_t, std::string> known)
      : known_(std::make_shared<const std::map<std::int64_t, std::string>>(std::move(known))) {}
  std::string operator[](std::int64_t number) const;

 private:
  std::shared_ptr<const std::map<std::int64_t, std::string>> known_;
};

struct Class {
  std::int64_t number;
  std::string name;
  float probability;  // 0 to 1
};

// The probabilities of all classes.
struct Classification {
  std::vector<float> probabilities;
  Names names;
  Class best() const { return top(1).front(); }
  // The likeliest classes, the likeliest first.
  std::vector<Class> top(std::size_t count) const;
};

// Edges in pixels of the frame, a score of 0 to 1, and the class.
struct Box {
  float left, top, right, bottom, score;
  std::int64_t number;
  std::string name;
};

// Boxes, best first.
struct Detections {
  std::vector<Box> boxes;
};

// The class of a frame's pixels that the network did not see, since the preprocessing cut them off.
constexpr std::int16_t kUnseen = -1;

// The class of every pixel of the frame [height, width].
struct Mask {
  Size size;
  std::vector<std::int16_t> classes;
  Names names;
};

// The depth of every pixel of the frame [height, width] in the unit of the training data; NaN where it was cut off.
struct Depths {
  Size size;
  std::vector<float> depths;
};

// The text that was read, in UTF-8.
struct Line {
  std::string text;
};

// The vector of the frame as the network gives it.
struct Embedding {
  std::vector<float> vector;
};

// The network's outputs, each without the batch's axis, of a network whose task says no more.
struct Outputs {
  std::vector<Tensor> tensors;
};

using Answer = std::variant<Classification, Detections, Mask, Depths, Line, Embedding, Outputs>;

// How a bundle says that its outputs are read.
class Reading {
 public:
  // One answer for each of N frames, of `outputs` [N, ...]; `places` say where each frame lies in the input.
  // `least_score` is of boxes that are given; without it the task's option `shown` decides.
  // Throws Error(Mismatch) for NaN and infinity, Error(Input) for outputs that are not the task's.
  std::vector<Answer> answers(const std::vector<Tensor>& outputs, const std::vector<Placement>& places,
                              std::optional<float> least_score = std::nullopt) const;

 private:
  friend struct Documents;
  std::shared_ptr<const TaskOptions> options_;
};

// ---- What was signed

// An Ed25519 key that is trusted here.
class PublicKey {
 public:
  // Reads a .pub file of `resvit-export keygen` or ssh-keygen. Throws Error(Untrusted) where it is none, is withdrawn by
  // its own file, or others than root and this user may write to it.
  static PublicKey from_file(const std::string& path);

  const std::string& name() const { return name_; }
  // SHA-256 of the raw key, 64 hexadecimal digits.
  const std::string& keyid() const { return keyid_; }
  bool revoked() const { return revoked_; }
  bool verifies(const std::vector<std::uint8_t>& signature, const std::string& data) const;

 private:
  std::vector<std::uint8_t> raw_;
  std::string name_, keyid_;
  bool revoked_ = false;
};

// The keys that are trusted here: those of one file, or of a folder, less what the list `revoked` beside them withdraws.
class Trust {
 public:
  // Keys that are withdrawn at the usual places of this machine are so here too.
  // Throws Error(Untrusted) for a key or list that is malformed or that others may write to, Error(Input) for no such path.
  static Trust from(const std::string& path);
  // $RESVIT_TRUST, else /etc/resvit/keys for root and ~/.config/resvit/keys for others.
  static Trust usual();

  // The key of this id. Throws Error(Untrusted) where it is not trusted or was withdrawn.
  const PublicKey& require(const std::string& keyid) const;

 private:
  static Trust stored(const std::string& path);
  void add_revoked(const std::string& folder);
  std::vector<PublicKey> keys_;
  std::vector<std::string> revoked_;
  std::string source_;
};

struct File {
  std::string path;
  std::uint64_t bytes;
  std::string sha256;
};

// An unpacked bundle, such as /var/lib/resvit/NAME/current, whose signature held when it was opened.
class Bundle {
 public:
  // Checks the signature over manifest.json, and that the folder holds the files that it lists, with their sizes, and no
  // other. Whether a key has expired is not asked: what was installed in time keeps running. A link such as `current` is
  // followed once. Throws Error(Untrusted) where any of that is not so, Error(Input) where there is no bundle.
  static Bundle open(const std::string& folder, const Trust& trust);

  const std::string& name() const;
  std::uint64_t release() const;
  // SHA-256 of manifest.json, by which installations are known.
  const std::string& digest() const;
  const std::vector<File>& files() const;
  // How frames become input. Throws Error(Input) where the maker's own code prepared the images: nobody guesses how.
  const Preprocess& preprocess() const;
  const Reading& reading() const;

  // A file's content, such as "engine.plan". What is held against the signed digest are the bytes that are returned.
  // Throws Error(Untrusted) where they are others, Error(Input) for a file that the manifest does not list.
  std::vector<std::uint8_t> read(const std::string& path) const;
  // Reads every file so.
  void check() const;

  const Manifest& manifest() const { return *manifest_; }

 private:
  std::string folder_;
  std::shared_ptr<const Manifest> manifest_;
};

// ---- Running

struct Settings {
  // Whether every file is read and compared, and the golden images are run and compared with what was validated.
  bool check = true;
  // How many batches run at once; each takes memory on the GPU.
  int streams = 2;
  // Whether computing is recorded as a CUDA graph, which is launched in one call.
  bool cuda_graph = true;
  // Of boxes that are given; without it the score from which validation counted boxes as shown.
  std::optional<float> least_score;
  // The input's size of a bundle that takes several; without it the usual one.
  std::optional<Size> size;
};

// An engine that runs on this machine's GPU, the one that was chosen with cudaSetDevice when it was loaded.
class Model {
 public:
  // `what` is the folder of an unpacked bundle, or the name of an installed one.
  // Throws Error: Untrusted as Bundle::open, and for an engine that is not the signed one; Missing where the bundle has
  // no engine; Impossible for one of another GPU or builder; Build where TensorRT refuses it, with its words; Mismatch
  // where the golden check fails; System where memory is short.
  static Model load(const std::string& what, const Trust& trust, const Settings& settings = {});
  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

  // The answers for frames of any sizes, in their order. The caller's thread prepares them and waits; calls of other
  // threads run beside it, on other streams. `beside` is what the network reads beside images, [N, ...] by name.
  // Throws Error(Input) for what is no frame or not one that the network takes, Error(System) where the GPU failed,
  // Error(Mismatch) for answers that are NaN or infinite.
  std::vector<Answer> answers(const std::vector<Frame>& frames, const std::vector<Tensor>& beside = {}) const;
  Answer answer(const Frame& frame) const { return answers({frame}).front(); }

  const Bundle& bundle() const;
  // What computes, and what the golden check found (empty where it was left out).
  const std::string& label() const;
  const std::string& golden() const;
  // How few and how many frames run at once: fewer are filled up, more run one batch after the other.
  std::pair<std::int64_t, std::int64_t> batch() const;

 private:
  struct Parts;
  explicit Model(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

// Where `resvit-engine install` puts a bundle of this name: $RESVIT_ROOT/NAME/current, or below its usual place.
std::string installed_folder(const std::string& name);

}  // namespace resvit
