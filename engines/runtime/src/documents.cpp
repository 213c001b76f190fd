// JSON that was written elsewhere, taken for what it may say and nothing else.

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "common.hpp"
#include "manifest.hpp"

namespace resvit {
namespace {

using Json = nlohmann::json;

constexpr int kDepthMost = 64;
constexpr std::size_t kFilesMost = 10000, kSignaturesMost = 8, kChannelsMost = 4096;
constexpr std::int64_t kWholeMost = (std::int64_t{1} << 53) - 1, kFileMost = std::int64_t{64} << 30;
constexpr std::int64_t kSideMost = 1 << 16, kClassesMost = 1 << 20;

Json json_from(const std::string& text, const std::string& what, Code code) {
  bool deep = false;
  const auto watch = [&deep](int depth, Json::parse_event_t, Json&) {
    deep |= depth > kDepthMost;
    return !deep;
  };
  Json found = Json::parse(text, watch, false);
  if (deep || found.is_discarded()) throw Error(what + " does not read as JSON.", kInstallAgain, code);
  return found;
}

// An object whose fields are taken one by one; `where` names it in messages.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) throw input_error(where_ + " is malformed: it is no JSON object.");
  }

  bool has(const std::string& key) const { return object_.contains(key) && !object_[key].is_null(); }
  const Json& at(const std::string& key) const {
    if (!object_.contains(key)) throw input_error(where_ + " does not say " + key + ".");
    return object_[key];
  }
  Fields object(const std::string& key) const { return {at(key), where_ + "." + key}; }
  const Json& list(const std::string& key) const {
    if (!at(key).is_array()) throw refusal(key, "a list");
    return at(key);
  }
  std::string text(const std::string& key) const {
    if (!at(key).is_string()) throw refusal(key, "a text");
    return at(key).get<std::string>();
  }
  bool flag(const std::string& key) const {
    if (!at(key).is_boolean()) throw refusal(key, "true or false");
    return at(key).get<bool>();
  }
  bool flagged(const std::string& key) const { return has(key) && flag(key); }
  std::int64_t whole(const std::string& key, std::int64_t least = 0, std::int64_t most = kWholeMost) const {
    return as_whole(at(key), key, least, most);
  }
  double number(const std::string& key, double least, double most) const {
    const double found = at(key).is_number() ? at(key).get<double>() : std::nan("");
    if (!(found >= least && found <= most)) throw refusal(key, "a number within bounds");
    return found;
  }
  std::string file(const std::string& key) const {
    const std::string name = text(key);
    if (!is_inside(name) || name.find('/') != std::string::npos) throw refusal(key, "a file name");
    return name;
  }
  std::string digest(const std::string& key) const {
    const std::string found = text(key);
    if (!is_digest(found)) throw refusal(key, "a SHA-256");
    return found;
  }
  std::vector<std::int64_t> wholes(const std::string& key, std::int64_t least = 0) const {
    std::vector<std::int64_t> found;
    for (const Json& one : list(key)) found.push_back(as_whole(one, key, least, kWholeMost));
    return found;
  }
  std::vector<std::string> texts(const std::string& key) const {
    std::vector<std::string> found;
    for (const Json& one : list(key)) {
      if (!one.is_string()) throw refusal(key, "a list of texts");
      found.push_back(one.get<std::string>());
    }
    return found;
  }
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& item : object_.items()) found.push_back(item.key());
    return found;
  }
  Error refusal(const std::string& key, const std::string& belongs) const {
    return input_error(where_ + "." + key + " is not " + belongs + ".");
  }

 private:
  std::int64_t as_whole(const Json& value, const std::string& key, std::int64_t least, std::int64_t most) const {
    const bool large = value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(kWholeMost);
    const bool fits = value.is_number_integer() && !large;
    const std::int64_t found = fits ? value.get<std::int64_t>() : 0;
    if (!fits || found < least || found > most) throw refusal(key, "a whole number within bounds");
    return found;
  }

  const Json& object_;
  std::string where_;
};

// ---- Preprocessing

Error unusable(const std::string& what) {
  return input_error("The preprocessing's " + shown(what) + " cannot be used.");
}

std::int64_t side(const Json& value, const std::string& what) {
  if (!value.is_number_integer() || value.get<double>() < 1 || value.get<double>() > kSideMost) throw unusable(what);
  return value.get<std::int64_t>();
}

std::vector<double> for_each_channel(const Json& value, std::size_t channels, const std::string& what) {
  std::vector<double> found;
  if (!value.is_array() && what != "pad_value") throw unusable(what);
  for (const Json& one : value.is_array() ? value : Json::array({value})) {
    if (!one.is_number() || !std::isfinite(one.get<double>())) throw unusable(what);
    found.push_back(one.get<double>());
  }
  if (found.size() != 1 && found.size() != channels) throw unusable(what);
  return found.size() == 1 ? std::vector<double>(channels, found[0]) : found;
}

std::size_t choice(const Json& value, const std::vector<std::string>& known, const std::string& what) {
  const auto found = value.is_string() ? std::find(known.begin(), known.end(), value.get<std::string>()) : known.end();
  if (found == known.end()) throw unusable(what);
  return static_cast<std::size_t>(found - known.begin());
}

// ---- Options of tasks

using Task = TaskOptions::Task;

std::optional<std::string> optional_text(const Fields& options, const std::string& key) {
  if (!options.has(key)) return std::nullopt;
  std::string text = options.text(key), small = text;
  std::transform(small.begin(), small.end(), small.begin(), [](unsigned char letter) { return std::tolower(letter); });
  if (small == "none" || small == "auto") return std::nullopt;
  return text;
}

// Whether an option is said, in whatever type; "none" and "auto" are as if it were not.
bool is_said(const Fields& options, const std::string& key) {
  return options.has(key) && (!options.at(key).is_string() || optional_text(options, key).has_value());
}

std::optional<std::size_t> optional_choice(const Fields& options, const std::string& key,
                                           const std::vector<std::string>& known) {
  const auto text = optional_text(options, key);
  if (!text) return std::nullopt;
  const auto found = std::find(known.begin(), known.end(), *text);
  if (found == known.end()) throw options.refusal(key, "one that exists");
  return static_cast<std::size_t>(found - known.begin());
}

// The characters one by one, or a line each where they are several lines.
std::vector<std::string> alphabet_of(std::string text) {
  std::string plain;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] != '\r' || at + 1 == text.size() || text[at + 1] != '\n') plain += text[at];
  }
  text = std::move(plain);
  std::vector<std::string> found;
  if (text.find('\n') != std::string::npos) {
    if (text.back() == '\n') text.pop_back();
    found = lines_of(text);
  } else {
    for (const char letter : text) {
      if ((static_cast<unsigned char>(letter) >> 6) == 2 && !found.empty()) {
        found.back() += letter;
      } else {
        found.emplace_back(1, letter);
      }
    }
  }
  if (std::set<std::string>(found.begin(), found.end()).size() != found.size()) {
    throw input_error("The manifest's characters hold one more than once.");
  }
  return found;
}

void read_options(const Fields& options, TaskOptions& made) {
  static const std::map<Task, std::set<std::string>> kKnown{
      {Task::Detection,
       {"boxes", "scores", "box_format", "normalized", "activation", "nms_iou", "score_threshold", "top_k",
        "class_numbers", "shown"}},
      {Task::Segmentation, {"output"}},
      {Task::Depth, {"output", "inverted", "align", "min_depth", "max_depth"}},
      {Task::Text, {"characters", "decoder", "blank", "end", "output"}},
      {Task::Embedding, {"output"}}};
  static const std::set<std::string> kOfTheData{"classes", "ignore", "depth_scale"};
  const auto known = kKnown.find(made.task);
  if (known == kKnown.end()) return;
  for (const std::string& key : options.names()) {
    if (known->second.count(key) == 0 && kOfTheData.count(key) == 0) {
      throw options.refusal(key, "an option of the bundle's task");
    }
  }
  made.output = optional_text(options, "output");
  if (made.task == Task::Detection) {
    made.boxes = optional_text(options, "boxes");
    made.scores = optional_text(options, "scores");
    if (const auto format = optional_choice(options, "box_format", {"xyxy", "cxcywh"})) made.centres = *format == 1;
    if (const auto found = optional_choice(options, "activation", {"none", "sigmoid", "softmax"})) {
      made.activation = static_cast<TaskOptions::Activation>(*found);
    }
    if (is_said(options, "normalized")) made.normalized = options.flag("normalized");
    if (is_said(options, "nms_iou")) made.nms_iou = options.number("nms_iou", 0, 1);
    if (options.has("score_threshold")) made.score_threshold = options.number("score_threshold", 0, 1);
    if (options.has("shown")) made.shown = options.number("shown", 0, 1);
    if (options.has("top_k")) made.top_k = options.whole("top_k", 1, 10000);
    if (options.has("class_numbers")) choice(options.at("class_numbers"), {"index", "id"}, "class_numbers");
  } else if (made.task == Task::Depth) {
    if (options.has("inverted")) made.inverted = options.flag("inverted");
    if (options.has("align")) choice(options.at("align"), {"none", "median"}, "align");
    if (options.has("min_depth")) made.min_depth = options.number("min_depth", 1e-9, 1e6);
    if (options.has("max_depth")) made.max_depth = options.number("max_depth", made.min_depth, 1e9);
    if (made.max_depth < made.min_depth) throw options.refusal("max_depth", "above min_depth");
  } else if (made.task == Task::Text) {
    if (const auto characters = optional_text(options, "characters")) made.alphabet = alphabet_of(*characters);
    if (const auto decoder = optional_choice(options, "decoder", {"ctc", "positions"})) made.ctc = *decoder == 0;
    if (is_said(options, "blank")) made.blank = options.whole("blank", -1, kClassesMost);
    if (is_said(options, "end")) made.end = options.whole("end", -1, kClassesMost);
    if ((made.blank && made.ctc == false) || (made.end && made.ctc == true)) {
      throw options.refusal("decoder", "the one that `blank` (CTC's) or `end` (of positions) belongs to");
    }
  }
}

std::shared_ptr<const TaskOptions> options_of(const Fields& manifest) {
  static const std::map<std::string, Task> kTasks{
      {"classification", Task::Classification}, {"detection", Task::Detection}, {"segmentation", Task::Segmentation},
      {"depth", Task::Depth},                   {"text", Task::Text},           {"embedding", Task::Embedding}};
  auto made = std::make_shared<TaskOptions>();
  if (!manifest.has("verdict")) return made;
  const auto task = kTasks.find(manifest.text("task"));
  if (task != kTasks.end()) made->task = task->second;
  const std::vector<std::string> called = manifest.texts("class_names");
  std::vector<std::int64_t> numbers;
  if (manifest.has("answers")) {
    const Fields answers = manifest.object("answers");
    static const Json kNothing = Json::object();
    const Fields options(answers.has("options") ? answers.at("options") : kNothing, "manifest.json.answers.options");
    read_options(options, *made);
    if (answers.has("class_ids")) numbers = answers.wholes("class_ids");
    if (answers.has("classes")) made->classes = answers.whole("classes", 1, kClassesMost);
    const bool by_id = options.has("class_numbers") && options.at("class_numbers") == "id";
    if (!by_id || numbers.size() != called.size()) numbers.clear();
  } else if (!called.empty()) {
    made->classes = static_cast<std::int64_t>(called.size());
  }
  std::map<std::int64_t, std::string> known;
  for (std::size_t at = 0; at < called.size(); ++at) {
    known[numbers.empty() ? static_cast<std::int64_t>(at) : numbers[at]] = called[at];
  }
  made->names = Names(std::move(known));
  return made;
}

// ---- The rest of the manifest

Encoding encoding_of(const Fields& said) {
  const std::string type = said.text("dtype");
  Encoding made{type == "int8", {}, {}};
  bool fits = type == "int8" || type == "uint8";
  for (auto* side : {&made.factor, &made.offset}) {
    for (const Json& one : said.list(side == &made.factor ? "factor" : "offset")) {
      fits = fits && one.is_number() && std::isfinite(one.get<double>());
      fits = fits && (side != &made.factor || one.get<double>() != 0.0);
      if (fits) side->push_back(static_cast<float>(one.get<double>()));
    }
  }
  if (!fits || made.factor.size() != made.offset.size() || made.factor.empty() || made.factor.size() > kChannelsMost) {
    throw said.refusal("factor", "a factor and an offset for each channel of an int8 or uint8 input");
  }
  return made;
}

Golden golden_of(const Fields& said) {
  Golden made;
  made.input = said.file("input");
  made.output = said.file("output");
  for (auto* files : {&made.inputs, &made.outputs}) {
    const std::string key = files == &made.inputs ? "inputs" : "outputs";
    if (!said.has(key)) continue;
    const Fields listed = said.object(key);
    for (const std::string& name : listed.names()) (*files)[name] = listed.file(name);
  }
  made.sets = said.flagged("sets");
  if (said.has("least_db")) {
    const Fields least = said.object("least_db");
    for (const std::string& name : least.names()) made.least_db[name] = least.number(name, 0, 100);
  }
  return made;
}

EngineRecord engine_of(const Fields& said) {
  EngineRecord made;
  made.builder = said.text("builder");
  made.rtx = made.builder == "TensorRT for RTX";
  made.for_cpu = !made.rtx && made.builder != "TensorRT";
  made.version = said.text("builder_version");
  made.sm = said.whole("sm", 0, 999);
  made.hardware_compatible = said.flagged("hardware_compatible");
  made.version_compatible = said.flagged("version_compatible");
  made.strip_weights = said.flagged("strip_weights");
  if (said.has("plugin_library")) {
    const Fields library = said.object("plugin_library");
    made.library = {library.file("name"), library.digest("sha256")};
  }
  return made;
}

std::vector<File> files_of(const Fields& manifest) {
  std::vector<File> found;
  const Json& listed = manifest.list("files");
  if (listed.size() > kFilesMost) throw manifest.refusal("files", "a list of files that can be");
  std::set<std::string> seen;
  for (const Json& one : listed) {
    const Fields file(one, "manifest.json.files");
    const auto bytes = static_cast<std::uint64_t>(file.whole("bytes", 0, kFileMost));
    found.push_back({file.text("path"), bytes, file.digest("sha256")});
    if (!is_inside(found.back().path) || !seen.insert(found.back().path).second) {
      throw file.refusal("path", "a plain relative path that comes once");
    }
  }
  return found;
}

}  // namespace

Preprocess Documents::preprocess(const std::string& text) {
  const Json said = json_from(text, "The preprocessing", Code::Input);
  if (!said.is_object()) throw unusable("form");
  Preprocess made;
  if (said.contains("channels")) made.channels_ = side(said["channels"], "channels");
  if (!said.contains("size") || !said["size"].is_array() || said["size"].size() != 2) throw unusable("size");
  made.size_ = {side(said["size"][0], "size"), side(said["size"][1], "size")};
  if (made.channels_ > static_cast<std::int64_t>(kChannelsMost)) throw unusable("channels");
  const auto channels = static_cast<std::size_t>(made.channels_);
  for (const auto& [name, value] : said.items()) {
    if (name == "size" || name == "channels") continue;
    if (name == "resize") {
      made.resize_ = static_cast<Preprocess::Resize>(choice(value, {"stretch", "crop", "letterbox", "none"}, name));
    } else if (name == "interpolation") {
      made.filter_ = static_cast<Preprocess::Filter>(choice(value, {"nearest", "bilinear", "bicubic", "lanczos"}, name));
    } else if (name == "channel_order") {
      made.bgr_ = choice(value, {"rgb", "bgr"}, name) == 1;
    } else if (name == "padding") {
      made.centred_ = choice(value, {"end", "centre"}, name) == 1;
    } else if (name == "crop_fraction") {
      if (!value.is_number() || value.get<double>() <= 0 || value.get<double>() > 1) throw unusable(name);
      made.crop_fraction_ = value.get<double>();
    } else if (name == "mean" || name == "std" || name == "pad_value") {
      auto& place = name == "mean" ? made.mean_ : name == "std" ? made.std_ : made.pad_value_;
      place = for_each_channel(value, channels, name);
    } else if (name == "exif") {
      choice(value, {"apply", "ignore"}, name);  // of files: a frame is upright
    } else if (name == "white") {
      if (side(value, name) > 65535) throw unusable(name);  // of more than 8 bits: a frame has them
    } else {
      throw unusable("entry " + name);
    }
  }
  for (auto* values : {&made.mean_, &made.std_, &made.pad_value_}) {
    if (values->size() != channels) values->assign(channels, values->front());
  }
  for (const double value : made.std_) {
    if (value <= 0) throw unusable("std");
  }
  for (const double value : made.pad_value_) {
    if (value < 0 || value > 255) throw unusable("pad_value");
  }
  return made;
}

Reading Documents::reading(const std::string& text) {
  const Json said = json_from(text, "The manifest", Code::Input);
  Reading made;
  made.options_ = options_of({said, "manifest.json"});
  return made;
}

std::vector<std::pair<std::string, std::vector<std::uint8_t>>> Documents::signatures(const std::string& text) {
  const Json said = json_from(text, "The signature", Code::Untrusted);
  // One meaning, one form: whatever is written otherwise was not written by us.
  const bool ours = said.is_object() && said.size() == 2 &&
                    said.value("payloadType", Json()) == "application/vnd.resvit.manifest+json" &&
                    said.contains("signatures") && said["signatures"].is_array() &&
                    said.dump(2, ' ', false, Json::error_handler_t::replace) + "\n" == text;
  if (!ours || said["signatures"].empty() || said["signatures"].size() > kSignaturesMost) {
    throw untrusted("The signature does not read: it is not in the form in which it is written.");
  }
  std::vector<std::pair<std::string, std::vector<std::uint8_t>>> found;
  for (const Json& entry : said["signatures"]) {
    const bool pair = entry.is_object() && entry.size() == 2 && entry.contains("keyid") && entry["keyid"].is_string() &&
                      entry.contains("sig") && entry["sig"].is_string();
    const auto signature = pair ? from_base64(entry["sig"].get<std::string>()) : std::nullopt;
    if (!signature) throw untrusted("The signature does not read: an entry is not a key and its signature.");
    found.emplace_back(entry["keyid"].get<std::string>(), *signature);
  }
  return found;
}

Manifest Documents::manifest(const std::string& text, const std::string& folder) {
  const Json document = json_from(text, "manifest.json", Code::Input);
  if (!document.is_object() || document.value("format", Json()) != "resvit-bundle") {
    throw input_error(folder + " is no bundle of resvit-export.", "Give the folder of an installed bundle.");
  }
  if (document.value("format_version", Json()) != 2) {
    throw input_error(folder + " has a format that this library does not read.", "Use a newer one.");
  }
  const Fields said(document, "manifest.json");
  Manifest made;
  made.digest = sha256(text.data(), text.size());
  if (said.has("name")) made.name = said.file("name");
  if (said.has("release")) made.release = static_cast<std::uint64_t>(said.whole("release"));
  made.files = files_of(said);
  if (said.has("engine")) made.engine = engine_of(said.object("engine"));
  made.to_be_built = said.has("plan");
  if (said.has("build")) {
    const Fields build = said.object("build");
    const auto batch = build.wholes("batch", 1);
    if (batch.size() != 3) throw build.refusal("batch", "the smallest, usual and largest batch");
    made.batch = {batch[0], batch[1], batch[2]};
    if (build.has("sizes")) {
      const auto sizes = build.wholes("sizes", 1);
      if (sizes.size() != 6) throw build.refusal("sizes", "the smallest, usual and largest size");
      made.sizes = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
    }
  }
  if (said.has("input")) {
    const Fields input = said.object("input");
    made.input = input.text("name");
    for (const Json& size : input.list("shape")) {
      if (!size.is_string() && !size.is_number_integer()) throw input.refusal("shape", "a shape");
      made.input_shape.push_back(size.is_string() ? -1 : size.get<std::int64_t>());
    }
    if (input.has("encoding")) made.encoding = encoding_of(input.object("encoding"));
  }
  if (said.has("golden")) {
    const Fields golden = said.object("golden");
    made.golden = golden_of(golden);
    if (golden.has("at_sizes")) {
      for (const Json& one : golden.list("at_sizes")) {
        made.golden_at_sizes.push_back(golden_of({one, "manifest.json.golden.at_sizes"}));
      }
    }
  }
  made.prepared_by = "code that it does not name";
  if (said.has("preprocess")) {
    const Fields preprocess = said.object("preprocess");
    if (preprocess.has("factory")) {
      made.prepared_by = "the maker's own code";
      if (preprocess.at("factory").is_string()) made.prepared_by += ", " + shown(preprocess.text("factory"));
    } else {
      made.preprocess = Documents::preprocess(said.at("preprocess").dump(-1, ' ', false, Json::error_handler_t::replace));
    }
  }
  made.reading.options_ = options_of(said);
  return made;
}

Preprocess Preprocess::from_json(const std::string& text) {
  return guarded([&] { return Documents::preprocess(text); });
}

}  // namespace resvit
