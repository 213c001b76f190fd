// An unpacked bundle, held against what was signed. See resvit_engines/bundle/unpacked.py and keys/signing.py.

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "common.hpp"
#include "manifest.hpp"

namespace resvit {
namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kSignature = "signature.json";
constexpr std::size_t kManifestMost = 16u << 20, kSignatureMost = 64u << 10, kEntriesMost = 100000;

void require_signature(const std::string& manifest, const std::string& envelope, const Trust& trust) {
  const std::string type = "application/vnd.resvit.manifest+json";
  // DSSE's pre-authentication encoding.
  const std::string is_signed =
      "DSSEv1 " + std::to_string(type.size()) + " " + type + " " + std::to_string(manifest.size()) + " " + manifest;
  std::optional<Error> refusal;
  for (const auto& [keyid, signature] : Documents::signatures(envelope)) {
    try {
      if (trust.require(keyid).verifies(signature, is_signed)) return;
      throw untrusted("The signature does not hold: the manifest is not the one that was signed.");
    } catch (const Error& error) {
      if (!refusal) refusal = error;
    }
  }
  throw *refusal;
}

// The plain files below a folder with their sizes, by relative path; links count as what does not belong there.
std::map<std::string, std::uint64_t> files_below(const std::string& folder) {
  std::map<std::string, std::uint64_t> found;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const auto status = entry.symlink_status();
    if (fs::is_directory(status)) continue;
    const std::string name = entry.path().lexically_relative(folder).generic_string();
    if (!fs::is_regular_file(status)) throw untrusted(name + " in " + folder + " is no plain file.");
    found[name] = entry.file_size();
    if (found.size() > kEntriesMost) throw untrusted(folder + " holds more files than any bundle.");
  }
  return found;
}

}  // namespace

Bundle Bundle::open(const std::string& folder, const Trust& trust) {
  return guarded([&] {
    std::error_code failed;
    const std::string real = fs::canonical(folder, failed).string();
    if (failed || !fs::is_directory(real, failed)) {
      throw input_error("There is no folder " + shown(folder) + ".", "Give the folder of an installed bundle.");
    }
    if (!fs::exists(fs::symlink_status(real + "/" + kManifest, failed))) {
      throw input_error(shown(folder) + " is no unpacked bundle: it has no manifest.json.", kInstallAgain);
    }
    const std::string head = read_plain(real + "/" + kManifest, kManifestMost);
    require_signature(head, read_plain(real + "/" + kSignature, kSignatureMost), trust);
    Bundle bundle;
    bundle.folder_ = real;
    bundle.manifest_ = std::make_shared<const Manifest>(Documents::manifest(head, shown(folder)));
    try {
      auto there = files_below(real);
      there.erase(kManifest);
      there.erase(kSignature);
      for (const File& file : bundle.files()) {
        const auto found = there.find(file.path);
        if (found == there.end() || found->second != file.bytes) throw untrusted(file.path + " is not what was signed.");
        there.erase(found);
      }
      if (!there.empty()) throw untrusted(there.begin()->first + " was not signed.");
    } catch (const fs::filesystem_error& error) {
      throw Error(std::string("The folder cannot be read: ") + error.what(), "Check its permissions.", Code::System);
    }
    return bundle;
  });
}

const std::string& Bundle::name() const { return manifest_->name; }
std::uint64_t Bundle::release() const { return manifest_->release; }
const std::string& Bundle::digest() const { return manifest_->digest; }
const std::vector<File>& Bundle::files() const { return manifest_->files; }
const Reading& Bundle::reading() const { return manifest_->reading; }

const Preprocess& Bundle::preprocess() const {
  if (!manifest_->preprocess) {
    throw input_error("The bundle does not say how frames become input: its images were prepared by " +
                          manifest_->prepared_by + ".",
                      "Prepare them by that code, and run the engine by TensorRT itself.");
  }
  return *manifest_->preprocess;
}

std::vector<std::uint8_t> Bundle::read(const std::string& path) const {
  return guarded([&] {
    const auto file = std::find_if(files().begin(), files().end(), [&](const File& one) { return one.path == path; });
    if (file == files().end()) {
      throw input_error("The bundle has no file " + shown(path) + ".", "See manifest.json for those that it has.");
    }
    const std::string data = read_plain(folder_ + "/" + path, file->bytes);
    if (data.size() != file->bytes || sha256(data.data(), data.size()) != file->sha256) {
      throw untrusted(path + " is not what was signed: it was changed after it was installed.");
    }
    return std::vector<std::uint8_t>(data.begin(), data.end());
  });
}

void Bundle::check() const {
  for (const File& file : files()) read(file.path);
}

std::string installed_folder(const std::string& name) {
  const auto said = [](const char* variable) {
    const char* found = std::getenv(variable);
    return std::string(found == nullptr ? "" : found);
  };
  std::string root = said("RESVIT_ROOT");
  if (root.empty()) {
    const std::string data = said("XDG_DATA_HOME");
    root = geteuid() == 0 ? "/var/lib/resvit" : (data.empty() ? said("HOME") + "/.local/share" : data) + "/resvit";
  }
  return root + "/" + name + "/current";
}

}  // namespace resvit
