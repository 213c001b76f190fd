// What the parts of the library share: errors in short, files read with bounds, digests and base64.

#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "resvit/runtime.hpp"

namespace resvit {

constexpr const char* kInstallAgain = "Install the bundle again.";
constexpr const char* kMakeAgain = "Make the bundle again.";

Error input_error(const std::string& problem, const std::string& fix = kMakeAgain);
Error untrusted(const std::string& problem, const std::string& fix = kInstallAgain);
Error mismatch(const std::string& problem, const std::string& fix);

// Text of others for a sentence: control characters as escapes, and not longer than a line.
std::string shown(const std::string& text);
std::string shown(const std::vector<std::int64_t>& shape);

// Does `work`, and says it where memory does not suffice.
template <typename Work>
auto guarded(Work&& work) -> decltype(work()) {
  try {
    return std::forward<Work>(work)();
  } catch (const std::bad_alloc&) {
    throw Error("This machine has too little memory for it.", "Close other programs, or give fewer frames at once.",
                Code::System);
  } catch (const std::length_error&) {
    throw Error("This is larger than any memory.", kInstallAgain, Code::System);
  }
}

// A plain file of at most `most` bytes, no link, opened without waiting; `status` is that of the file that was read.
// Throws Error(Untrusted) for all else.
std::string read_plain(const std::string& path, std::uint64_t most, struct stat* status = nullptr,
                       bool follow_links = false);

std::string sha256(const void* data, std::size_t size);
bool is_digest(const std::string& text);
// Base64 in its one form: no line ends, full padding, no bits that decoding drops. Nothing where it is none.
std::optional<std::vector<std::uint8_t>> from_base64(const std::string& text);
// Whether every byte belongs to a character of UTF-8 as RFC 3629 has it, none of them a control character.
bool is_printable_utf8(const std::string& text);
// A relative path of names that stays in its folder.
bool is_inside(const std::string& path);
std::vector<std::string> lines_of(const std::string& text);

}  // namespace resvit
