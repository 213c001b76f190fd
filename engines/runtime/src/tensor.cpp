#include "tensor.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>

#include "common.hpp"

namespace resvit {
namespace {

constexpr std::size_t kElementsMost = std::size_t{1} << 40;
constexpr std::size_t kDimensionsMost = 32, kHeaderMost = 64u << 10;

template <typename Value>
Value element(const Tensor& tensor, std::size_t at) {
  Value value;
  std::memcpy(&value, tensor.data.data() + at * sizeof(Value), sizeof(Value));
  return value;
}

template <typename To, typename From>
std::vector<To> all_of(const Tensor& tensor, std::size_t count) {
  std::vector<To> values(count);
  for (std::size_t at = 0; at < count; ++at) values[at] = static_cast<To>(element<From>(tensor, at));
  return values;
}

template <typename To>
std::vector<To> numbers_of(const Tensor& tensor) {
  const std::size_t count = tensor.data.size() / size_of(tensor.type);
  switch (tensor.type) {
    case Type::Float32: return all_of<To, float>(tensor, count);
    case Type::Int8: return all_of<To, std::int8_t>(tensor, count);
    case Type::Int32: return all_of<To, std::int32_t>(tensor, count);
    case Type::Int64: return all_of<To, std::int64_t>(tensor, count);
    case Type::UInt8:
    case Type::Bool: return all_of<To, std::uint8_t>(tensor, count);
    case Type::Float16: break;
  }
  std::vector<To> values(count);
  for (std::size_t at = 0; at < count; ++at) values[at] = static_cast<To>(float_of(element<std::uint16_t>(tensor, at)));
  return values;
}

template <typename To, typename From>
Tensor cast(const Tensor& tensor, Type type, const std::vector<From>& values) {
  Tensor made{tensor.name, tensor.shape, type, std::vector<std::uint8_t>(values.size() * sizeof(To))};
  for (std::size_t at = 0; at < values.size(); ++at) {
    const To value = static_cast<To>(values[at]);
    std::memcpy(made.data.data() + at * sizeof(To), &value, sizeof(To));
  }
  return made;
}

// What stands in the header of an .npy file, a Python dictionary of three entries in any order.
class Header {
 public:
  explicit Header(const std::string& text) : text_(text) {
    expect('{');
    while (!accept('}')) {
      const std::string key = quoted();
      expect(':');
      if (key == "descr" && kind.empty()) {
        kind = quoted();
      } else if (key == "fortran_order" && !ordered_) {
        fortran = word() == "True";
        ordered_ = true;
      } else if (key == "shape" && !shaped_) {
        expect('(');
        while (!accept(')')) {
          shape.push_back(whole());
          if (!accept(',') && peek() != ')') fail();
        }
        shaped_ = true;
      } else {
        fail();
      }
      if (!accept(',') && peek() != '}') fail();
    }
    peek();
    if (kind.empty() || !ordered_ || !shaped_ || at_ != text_.size()) fail();
  }

  std::string kind;
  bool fortran = false;
  std::vector<std::int64_t> shape;

 private:
  [[noreturn]] static void fail() { throw std::invalid_argument("header"); }
  char peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool accept(char letter) { return peek() == letter && at_ < text_.size() ? (++at_, true) : false; }
  void expect(char letter) {
    if (!accept(letter)) fail();
  }
  std::string quoted() {
    expect('\'');
    const std::size_t end = text_.find('\'', at_);
    if (end == std::string::npos) fail();
    const std::string found = text_.substr(at_, end - at_);
    at_ = end + 1;
    return found;
  }
  std::string word() {
    peek();
    const std::size_t begin = at_;
    while (at_ < text_.size() && std::isalpha(static_cast<unsigned char>(text_[at_])) != 0) ++at_;
    const std::string found = text_.substr(begin, at_ - begin);
    if (found != "True" && found != "False") fail();
    return found;
  }
  std::int64_t whole() {
    peek();
    std::int64_t found = 0;
    const std::size_t begin = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9' && at_ - begin < 18) {
      found = found * 10 + (text_[at_++] - '0');
    }
    if (at_ == begin) fail();
    return found;
  }

  const std::string& text_;
  std::size_t at_ = 0;
  bool ordered_ = false, shaped_ = false;
};

}  // namespace

std::size_t size_of(Type type) {
  switch (type) {
    case Type::Float32:
    case Type::Int32: return 4;
    case Type::Float16: return 2;
    case Type::Int64: return 8;
    case Type::Int8:
    case Type::UInt8:
    case Type::Bool: break;
  }
  return 1;
}

const char* name_of(Type type) {
  static constexpr const char* kNames[] = {"float32", "float16", "int8", "uint8", "int32", "int64", "bool"};
  return kNames[static_cast<int>(type)];
}

bool is_float(Type type) { return type == Type::Float32 || type == Type::Float16; }

std::size_t count_of(const std::vector<std::int64_t>& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape) {
    if (size < 0) throw input_error("A shape " + shown(shape) + " is not known to its end.");
    if (size != 0 && count > kElementsMost / static_cast<std::size_t>(size)) {
      throw input_error("A shape " + shown(shape) + " is larger than any memory.");
    }
    count *= static_cast<std::size_t>(size);
  }
  return count;
}

std::vector<float> floats_of(const Tensor& tensor) { return numbers_of<float>(tensor); }

std::vector<double> doubles_of(const Tensor& tensor) { return numbers_of<double>(tensor); }

float float_of(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  std::uint32_t exponent = (half >> 10) & 0x1fu, fraction = half & 0x3ffu, bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | fraction << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else if (fraction == 0) {
    bits = sign;
  } else {
    exponent = 113;
    while ((fraction & 0x400u) == 0) {
      fraction <<= 1;
      --exponent;
    }
    bits = sign | exponent << 23 | (fraction & 0x3ffu) << 13;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint16_t half_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);  // NaN
  if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above
  std::uint32_t fraction = bits & 0x7fffffu, shift = 13, base = 0;
  const std::uint32_t exponent = bits >> 23;
  if (exponent >= 113) {
    base = (exponent - 112) << 10;
  } else if (exponent >= 102) {  // below 2^-25 all is zero
    fraction |= 0x800000u;
    shift = 126 - exponent;
  } else {
    return sign;
  }
  const std::uint32_t kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), tie = 1u << (shift - 1);
  const std::uint32_t up = rest > tie || (rest == tie && (kept & 1u) != 0) ? 1 : 0;
  return static_cast<std::uint16_t>(sign | (base + kept + up));
}

Tensor tensor_of(const std::string& name, std::vector<std::int64_t> shape, const std::vector<float>& values) {
  Tensor made{name, std::move(shape), Type::Float32, std::vector<std::uint8_t>(values.size() * sizeof(float))};
  if (!values.empty()) std::memcpy(made.data.data(), values.data(), made.data.size());
  return made;
}

Tensor in_type(const Tensor& tensor, Type type) {
  if (tensor.type == type) return tensor;
  if (is_float(tensor.type) != is_float(type) || type == Type::Bool || tensor.type == Type::Bool) {
    throw input_error("The input '" + tensor.name + "' holds " + name_of(tensor.type) + ", and the engine reads " +
                          name_of(type) + ".",
                      "Prepare images as the bundle's manifest.json says under 'preprocess'.");
  }
  if (type == Type::Float16) {
    const std::vector<float> values = floats_of(tensor);
    std::vector<std::uint16_t> halves(values.size());
    std::transform(values.begin(), values.end(), halves.begin(), half_of);
    return cast<std::uint16_t>(tensor, type, halves);
  }
  if (type == Type::Float32) return cast<float>(tensor, type, floats_of(tensor));
  // In 64 bits, so that none is lost on the way; a smaller type drops the upper ones, as NumPy does.
  const std::vector<std::int64_t> values = numbers_of<std::int64_t>(tensor);
  if (type == Type::Int64) return cast<std::int64_t>(tensor, type, values);
  if (type == Type::Int32) return cast<std::int32_t>(tensor, type, values);
  if (type == Type::Int8) return cast<std::int8_t>(tensor, type, values);
  return cast<std::uint8_t>(tensor, type, values);
}

Tensor rows_of(const Tensor& tensor, std::size_t first, std::size_t last) {
  const std::size_t row = tensor.data.size() / static_cast<std::size_t>(tensor.shape.at(0));
  const auto begin = tensor.data.begin();
  Tensor made{tensor.name, tensor.shape, tensor.type,
              {begin + static_cast<std::ptrdiff_t>(first * row), begin + static_cast<std::ptrdiff_t>(last * row)}};
  made.shape[0] = static_cast<std::int64_t>(last - first);
  return made;
}

Tensor taken(const Tensor& tensor, const std::vector<std::size_t>& at) {
  const std::size_t row = tensor.data.size() / static_cast<std::size_t>(tensor.shape.at(0));
  Tensor made{tensor.name, tensor.shape, tensor.type, {}};
  made.shape[0] = static_cast<std::int64_t>(at.size());
  made.data.reserve(row * at.size());
  for (const std::size_t one : at) {
    const auto begin = tensor.data.begin() + static_cast<std::ptrdiff_t>(one * row);
    made.data.insert(made.data.end(), begin, begin + static_cast<std::ptrdiff_t>(row));
  }
  return made;
}

Tensor joined(const std::vector<Tensor>& parts) {
  Tensor made = parts.at(0);
  for (std::size_t at = 1; at < parts.size(); ++at) {
    made.shape.at(0) += parts[at].shape.at(0);
    made.data.insert(made.data.end(), parts[at].data.begin(), parts[at].data.end());
  }
  return made;
}

const Tensor* find(const std::vector<Tensor>& tensors, const std::string& name) {
  const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& one) { return one.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

std::string shapes_of(const std::vector<Tensor>& tensors) {
  std::string text;
  for (const Tensor& one : tensors) text += (text.empty() ? "" : ", ") + one.name + " " + shown(one.shape);
  return text.empty() ? "none" : text;
}

Tensor tensor_from_npy(const std::vector<std::uint8_t>& content, const std::string& name) {
  static const std::map<std::string, Type> kTypes{
      {"<f4", Type::Float32}, {"<f2", Type::Float16}, {"|i1", Type::Int8}, {"|u1", Type::UInt8},
      {"<i4", Type::Int32},   {"<i8", Type::Int64},   {"|b1", Type::Bool}};
  const Error none = input_error(name + " holds no array of numbers [N, ...] as numpy.save writes it.");
  static const std::string kMagic = "\x93NUMPY";
  if (content.size() < 12 || !std::equal(kMagic.begin(), kMagic.end(), content.begin(), [](char a, std::uint8_t b) {
        return static_cast<std::uint8_t>(a) == b;
      })) {
    throw none;
  }
  const std::size_t width = content[6] == 1 ? 2 : 4;
  std::size_t length = 0;
  for (std::size_t at = 0; at < width; ++at) length |= static_cast<std::size_t>(content[8 + at]) << (8 * at);
  const std::size_t begin = 8 + width + length;
  if (length > kHeaderMost || begin > content.size()) throw none;
  const auto start = content.begin() + static_cast<std::ptrdiff_t>(8 + width);
  try {
    const std::string text(start, start + static_cast<std::ptrdiff_t>(length));
    const Header header(text);
    const auto type = kTypes.find(header.kind);
    if (type == kTypes.end() || header.fortran || header.shape.empty() || header.shape.size() > kDimensionsMost) throw none;
    const std::size_t bytes = count_of(header.shape) * size_of(type->second);
    if (bytes != content.size() - begin || header.shape[0] == 0) throw none;
    return {name, header.shape, type->second, {content.begin() + static_cast<std::ptrdiff_t>(begin), content.end()}};
  } catch (const std::invalid_argument&) {
    throw none;
  }
}

}  // namespace resvit
