#include "common.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace resvit {
namespace {

constexpr std::size_t kLineMost = 200;
constexpr std::size_t kBase64Most = 4096;
constexpr std::size_t kNameMost = 200;  // file systems hold 255, and temporary names put some around it
constexpr std::size_t kPathMost = 1024;
const char* const kDigits = "0123456789abcdef";

struct Handle {
  int number;
  ~Handle() {
    if (number >= 0) close(number);
  }
};

// Line feeds and the like in what others named must not write into a log or a terminal.
std::string printable(const std::string& text) {
  std::string made;
  for (const char letter : text) {
    const auto byte = static_cast<unsigned char>(letter);
    if (byte < 0x20 || byte == 0x7f) {
      made += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    } else {
      made += letter;
    }
  }
  return made;
}

}  // namespace

Error::Error(const std::string& problem, std::string fix, Code code)
    : std::runtime_error(printable(problem)), fix_(printable(fix)), code_(code) {}

Error input_error(const std::string& problem, const std::string& fix) { return Error(problem, fix, Code::Input); }

Error untrusted(const std::string& problem, const std::string& fix) { return Error(problem, fix, Code::Untrusted); }

Error mismatch(const std::string& problem, const std::string& fix) { return Error(problem, fix, Code::Mismatch); }

std::string shown(const std::string& text) {
  return text.size() <= kLineMost ? text : text.substr(0, kLineMost) + "...";
}

std::string shown(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) text += (axis ? ", " : "") + std::to_string(shape[axis]);
  return text + "]";
}

std::string read_plain(const std::string& path, std::uint64_t most, struct stat* status, bool follow_links) {
  const Handle file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | (follow_links ? 0 : O_NOFOLLOW))};
  struct stat found {};
  if (file.number < 0 || fstat(file.number, &found) != 0 || !S_ISREG(found.st_mode)) {
    const std::string why = file.number < 0 ? std::strerror(errno) : "it is no plain file";
    throw untrusted(path + " cannot be read: " + why + ".");
  }
  if (static_cast<std::uint64_t>(found.st_size) > most) throw untrusted(path + " is longer than it may be.");
  std::string data(static_cast<std::size_t>(found.st_size), '\0');
  std::size_t at = 0;
  while (at < data.size()) {
    const ssize_t got = read(file.number, data.data() + at, data.size() - at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) throw untrusted(path + " ends before its size.");
    at += static_cast<std::size_t>(got);
  }
  if (status != nullptr) *status = found;
  return data;
}

std::string sha256(const void* data, std::size_t size) {
  std::array<unsigned char, 32> digest{};
  unsigned int length = 0;
  if (EVP_Digest(data, size, digest.data(), &length, EVP_sha256(), nullptr) != 1) {
    throw Error("libcrypto computes no SHA-256.", "Check its installation.", Code::System);
  }
  std::string text;
  for (const unsigned char byte : digest) text += {kDigits[byte >> 4], kDigits[byte & 15]};
  return text;
}

bool is_digest(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of(kDigits) == std::string::npos;
}

std::optional<std::vector<std::uint8_t>> from_base64(const std::string& text) {
  if (text.empty() || text.size() % 4 != 0 || text.size() > kBase64Most) return std::nullopt;
  std::vector<std::uint8_t> data(text.size() / 4 * 3);
  const auto* source = reinterpret_cast<const unsigned char*>(text.data());
  if (EVP_DecodeBlock(data.data(), source, static_cast<int>(text.size())) < 0) return std::nullopt;
  data.resize(data.size() - static_cast<std::size_t>(std::count(text.end() - 2, text.end(), '=')));
  std::string again(text.size() + 1, '\0');
  EVP_EncodeBlock(reinterpret_cast<unsigned char*>(again.data()), data.data(), static_cast<int>(data.size()));
  again.resize(text.size());
  if (again != text) return std::nullopt;
  return data;
}

bool is_printable_utf8(const std::string& text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto first = static_cast<unsigned char>(text[at]);
    const std::size_t more = first < 0x80 ? 0 : (first >> 5) == 6 ? 1 : (first >> 4) == 14 ? 2 : (first >> 3) == 30 ? 3 : 4;
    if (more == 4 || at + more >= text.size()) return false;
    std::uint32_t point = more == 0 ? first : first & (0x3f >> more);
    for (std::size_t next = 1; next <= more; ++next) {
      const auto byte = static_cast<unsigned char>(text[at + next]);
      if ((byte >> 6) != 2) return false;
      point = point << 6 | (byte & 0x3f);
    }
    static constexpr std::uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    const bool control = point < 0x20 || (point >= 0x7f && point < 0xa0);
    if (control || point < kLeast[more] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return false;
    at += more + 1;
  }
  return true;
}

bool is_inside(const std::string& path) {
  if (path.empty() || path.size() > kPathMost) return false;
  for (std::size_t begin = 0; begin <= path.size();) {
    const std::size_t end = std::min(path.find('/', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    if (part.empty() || part == "." || part == ".." || part.size() > kNameMost) return false;
    begin = end + 1;
  }
  return std::all_of(path.begin(), path.end(), [](char letter) {
    const auto byte = static_cast<unsigned char>(letter);
    return byte >= 0x20 && byte != 0x7f && letter != '\\' && letter != ':';
  });
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

}  // namespace resvit
