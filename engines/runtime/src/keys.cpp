// Keys that are trusted: see resvit_engines/keys/key_file.py for the form of their files, guarded.py for who may write.

#include <grp.h>
#include <openssl/evp.h>
#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <set>

#include "common.hpp"

namespace resvit {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kKeyMost = 64u << 10, kListMost = 4u << 20, kValueMost = 200, kKeysMost = 1000;
constexpr const char* kRevoked = "revoked";
constexpr const char* kKeyFix = "Give a .pub file of resvit-export keygen or of ssh-keygen.";
const std::string kBegin = "-----BEGIN PUBLIC KEY-----", kEnd = "-----END PUBLIC KEY-----", kSsh = "ssh-ed25519";
// What stands before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410), and in a line of OpenSSH's.
const std::vector<std::uint8_t> kDer{0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00};
const std::vector<std::uint8_t> kSshHead{0,   0,   0,   11,  's', 's', 'h', '-', 'e', 'd', '2',
                                         '5', '5', '1', '9', 0,   0,   0,   32};

// Points of order 8 or less, without their sign: under such a key anyone can sign.
bool is_of_small_order(std::vector<std::uint8_t> raw) {
  static const std::set<std::string> kPoints{
      std::string(64, '0'),
      "01" + std::string(62, '0'),
      "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
      "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
      "ec" + std::string(60, 'f') + "7f",
      "ed" + std::string(60, 'f') + "7f",
      "ee" + std::string(60, 'f') + "7f"};
  raw.back() &= 0x7f;
  std::string text;
  for (const std::uint8_t byte : raw) text += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
  return kPoints.count(text) != 0;
}

// Whether a group is its owner's alone, as many systems make one for each user.
bool is_of_one(const struct stat& status) {
  std::vector<char> room(1 << 16), more(1 << 16);
  struct passwd user {}, *owner = nullptr;
  struct group one {}, *found = nullptr;
  if (getpwuid_r(status.st_uid, &user, room.data(), room.size(), &owner) != 0 || owner == nullptr) return false;
  if (getgrgid_r(status.st_gid, &one, more.data(), more.size(), &found) != 0 || found == nullptr) return false;
  bool alone = std::strcmp(one.gr_name, user.pw_name) == 0;
  for (char** member = one.gr_mem; *member != nullptr; ++member) alone = alone && std::strcmp(*member, user.pw_name) == 0;
  return alone;
}

void require_unwritable(const std::string& path, const struct stat& status, bool on_the_way) {
  if (on_the_way && (status.st_mode & S_ISVTX) != 0) return;  // as of /tmp: only the owner renames or removes a file
  if ((status.st_mode & S_IWOTH) != 0 || ((status.st_mode & S_IWGRP) != 0 && !is_of_one(status))) {
    throw untrusted("Others may write to " + path + ", and so decide what is trusted.", "Run: chmod go-w " + path);
  }
}

bool is_own(uid_t owner) {
  const char* by_sudo = geteuid() == 0 ? std::getenv("SUDO_UID") : nullptr;
  return owner == 0 || owner == geteuid() || (by_sudo != nullptr && std::to_string(owner) == by_sudo);
}

// Refuses what another user than root and this one owns or can write to, or can exchange.
void require_guarded(const std::string& path, const struct stat& status) {
  struct stat named {};
  if (lstat(path.c_str(), &named) != 0 || !is_own(status.st_uid) || !is_own(named.st_uid)) {
    throw untrusted(path + " belongs to another user, who so decides what is trusted.", "Take it over with chown.");
  }
  require_unwritable(path, status, false);
  std::error_code failed;
  std::set<std::string> folders;
  for (fs::path at : {fs::absolute(path, failed), fs::canonical(path, failed)}) {
    while (at.has_relative_path()) folders.insert((at = at.parent_path()).string());
  }
  for (const std::string& folder : folders) {
    struct stat there {};
    if (failed || stat(folder.c_str(), &there) != 0) {
      throw untrusted(folder + " cannot be read.", "Check its permissions.");
    }
    require_unwritable(folder, there, true);
  }
}

std::string read_guarded(const std::string& path, std::uint64_t most) {
  struct stat status {};
  std::string text = read_plain(path, most, &status, true);
  require_guarded(path, status);
  return text;
}

bool says_nothing(const std::string& line) {
  return line.find_first_not_of(' ') == std::string::npos || line[0] == '#';
}

std::string lower(std::string text) {
  for (char& letter : text) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  return text;
}

// The attributes of some lines, added to `said`; behind the key only Revoked counts.
void read_attribute(const std::string& line, bool behind, const std::string& path, std::map<std::string, std::string>& said) {
  static const std::set<std::string> kAttributes{"name", "created", "expires", "revoked"};
  if (says_nothing(line)) return;
  const std::size_t colon = line.find(':');
  const std::string title = lower(line.substr(0, std::min(colon, line.size())));
  if (colon == std::string::npos || kAttributes.count(title) == 0 || (behind && title != "revoked")) {
    throw untrusted(path + " has a line that is not understood: " + shown(line) + ".", kKeyFix);
  }
  const std::size_t first = line.find_first_not_of(' ', colon + 1), last = line.find_last_not_of(' ');
  const std::string value = first == std::string::npos ? "" : line.substr(first, last + 1 - first);
  if (value.empty() || value.size() > kValueMost || !said.emplace(title, value).second) {
    throw untrusted(path + " says " + title + " twice, not at all or at too great length.", kKeyFix);
  }
}

void require_date(const std::map<std::string, std::string>& said, const std::string& title, const std::string& path) {
  const auto found = said.find(title);
  if (found == said.end()) return;
  const std::string& date = found->second;
  bool fits = date.size() == 10;
  for (std::size_t at = 0; fits && at < date.size(); ++at) {
    fits = at == 4 || at == 7 ? date[at] == '-' : std::isdigit(static_cast<unsigned char>(date[at])) != 0;
  }
  if (!fits) throw untrusted(path + " says " + shown(date) + " where a date belongs.", "Write it as 2027-11-25.");
}

struct KeyCloser {
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};

std::string environment(const char* name) {
  const char* found = std::getenv(name);
  return found == nullptr ? "" : found;
}

std::string usual_folder() {
  if (geteuid() == 0) return "/etc/resvit/keys";
  const std::string config = environment("XDG_CONFIG_HOME");
  return (config.empty() ? environment("HOME") + "/.config" : config) + "/resvit/keys";
}

}  // namespace

PublicKey PublicKey::from_file(const std::string& path) {
  return guarded([&] {
    const std::string text = read_guarded(path, kKeyMost);
    const Error none = untrusted(path + " is not an Ed25519 public key.", kKeyFix);
    std::map<std::string, std::string> said;
    std::optional<std::vector<std::uint8_t>> body;
    std::string encoded, comment;
    enum { Before, Inside, Behind } where = Before;
    std::size_t head = 0;
    for (const std::string& line : lines_of(text)) {
      if (!is_printable_utf8(line)) throw untrusted(path + " is not a text file of plain lines.", kKeyFix);
      if (where == Inside) {
        if (line != kEnd) {
          encoded += line;
          continue;
        }
        body = from_base64(encoded);
        head = kDer.size();
        if (!body || body->size() != head + 32 || !std::equal(kDer.begin(), kDer.end(), body->begin())) throw none;
        where = Behind;
      } else if (line == kBegin || line.rfind("ssh-", 0) == 0) {
        if (where == Behind) throw untrusted(path + " holds more than one key.", "Give each key a file of its own.");
        where = line == kBegin ? Inside : Behind;
        if (where == Inside) continue;
        const std::size_t first = line.find(' '), second = line.find(' ', std::min(first, line.size() - 1) + 1);
        if (line.substr(0, std::min(first, line.size())) != kSsh || first == std::string::npos) throw none;
        body = from_base64(line.substr(first + 1, second == std::string::npos ? second : second - first - 1));
        head = kSshHead.size();
        if (!body || body->size() != head + 32 || !std::equal(kSshHead.begin(), kSshHead.end(), body->begin())) throw none;
        comment = second == std::string::npos ? "" : line.substr(second + 1);
        for (const std::string title : {"name:", "created:", "expires:", "revoked:"}) {
          // 'echo Revoked: yes >>' behind a line without its end.
          if (lower(comment).find(title) != std::string::npos) {
            throw untrusted(path + " says " + title + " in the line of the key.", "Give it a line of its own.");
          }
        }
        if (comment.size() > kValueMost) throw untrusted("The comment of the key in " + path + " is too long.", kKeyFix);
      } else {
        read_attribute(line, where == Behind, path, said);
      }
    }
    if (where != Behind || !body) throw none;
    PublicKey key;
    key.raw_.assign(body->begin() + static_cast<std::ptrdiff_t>(head), body->end());
    if (is_of_small_order(key.raw_)) throw none;
    require_date(said, "created", path);
    require_date(said, "expires", path);
    const std::string revoked = lower(said.count("revoked") != 0 ? said["revoked"] : "no");
    if (revoked != "yes" && revoked != "no") {
      throw untrusted(path + " says Revoked: " + shown(revoked) + ".", "Write yes or no.");
    }
    key.revoked_ = revoked == "yes";
    key.keyid_ = sha256(key.raw_.data(), key.raw_.size());
    key.name_ = said.count("name") != 0 ? said["name"] : !comment.empty() ? comment : fs::path(path).stem().string();
    return key;
  });
}

bool PublicKey::verifies(const std::vector<std::uint8_t>& signature, const std::string& data) const {
  const std::unique_ptr<EVP_PKEY, KeyCloser> key(
      EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, nullptr, raw_.data(), raw_.size()));
  const std::unique_ptr<EVP_MD_CTX, KeyCloser> context(EVP_MD_CTX_new());
  if (!key || !context || EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key.get()) != 1) return false;
  return EVP_DigestVerify(context.get(), signature.data(), signature.size(),
                          reinterpret_cast<const unsigned char*>(data.data()), data.size()) == 1;
}

Trust Trust::stored(const std::string& path) {
  return guarded([&] {
    Trust trust;
    trust.source_ = path;
    std::error_code failed;
    if (!fs::exists(path, failed)) {
      throw input_error("There is no " + path + " to read trusted keys from.", "Give a .pub file or a folder of them.");
    }
    if (!fs::is_directory(path, failed)) {
      trust.keys_.push_back(PublicKey::from_file(path));
      trust.add_revoked(fs::absolute(path, failed).parent_path().string());
      trust.add_revoked(fs::canonical(path, failed).parent_path().string());
      return trust;
    }
    struct stat status {};
    if (stat(path.c_str(), &status) != 0) throw untrusted(path + " cannot be read.", "Check its permissions.");
    require_guarded(path, status);
    std::vector<std::string> names;
    for (fs::directory_iterator at(path, failed), end; !failed && at != end; at.increment(failed)) {
      names.push_back(at->path().filename().string());
      if (names.size() > kKeysMost) break;
    }
    if (failed || names.size() > kKeysMost) {
      throw untrusted(path + " cannot be read as a folder of keys.", "Check its permissions, and that it holds keys alone.");
    }
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) {
      if (name != kRevoked && lower(name.substr(0, name.find('.'))) == kRevoked) {
        throw untrusted(path + "/" + name + " looks like a list of revoked keys, and only one called 'revoked' is read.",
                        "Rename it, or take it away.");
      }
      const std::string end = name.size() > 4 ? name.substr(name.size() - 4) : "";
      if (name[0] != '.' && (end == ".pub" || end == ".pem")) trust.keys_.push_back(PublicKey::from_file(path + "/" + name));
    }
    trust.add_revoked(path);
    return trust;
  });
}

Trust Trust::from(const std::string& path) {
  Trust trust = stored(path);
  // What was withdrawn on this machine is so under whatever name it comes.
  for (const std::string& other : {environment("RESVIT_TRUST"), usual_folder()}) {
    struct stat there {};
    if (other.empty() || other == path || lstat(other.c_str(), &there) != 0) continue;
    const Trust more = stored(other);
    trust.revoked_.insert(trust.revoked_.end(), more.revoked_.begin(), more.revoked_.end());
    for (const PublicKey& key : more.keys_) {
      if (key.revoked()) trust.revoked_.push_back(key.keyid());
    }
  }
  return trust;
}

Trust Trust::usual() {
  const std::string named = environment("RESVIT_TRUST");
  return from(named.empty() ? usual_folder() : named);
}

const PublicKey& Trust::require(const std::string& keyid) const {
  const auto key = std::find_if(keys_.begin(), keys_.end(), [&](const PublicKey& one) { return one.keyid() == keyid; });
  const bool withdrawn = std::any_of(keys_.begin(), keys_.end(), [&](const PublicKey& one) {
    return one.revoked() && one.keyid() == keyid;
  });
  if (withdrawn || std::find(revoked_.begin(), revoked_.end(), keyid) != revoked_.end()) {
    throw untrusted("The bundle is signed by a key that was revoked.", "Get one that is signed by another key.");
  }
  if (key == keys_.end()) {
    throw untrusted("The bundle is signed by a key that is not trusted here (" + source_ + ").",
                    "If you know its maker, put the maker's .pub file there.");
  }
  return *key;
}

void Trust::add_revoked(const std::string& folder) {
  const std::string path = folder + "/" + kRevoked;
  struct stat there {};
  if (lstat(path.c_str(), &there) != 0) return;
  const std::string text = read_guarded(path, kListMost);
  if (text.find_first_not_of(" \n") == std::string::npos) {
    throw untrusted(path + " is empty, as a list is that lost its lines.", "Write it again, or remove it.");
  }
  for (const std::string& line : lines_of(text)) {
    if (says_nothing(line)) continue;
    if (!is_digest(line)) throw untrusted(path + " holds a line that is no key id.", "Write one key id a line.");
    revoked_.push_back(line);
  }
}

}  // namespace resvit
