// Values of any type and shape: as floats, in other types, by rows of images, and from .npy files.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "resvit/runtime.hpp"

namespace resvit {

std::size_t size_of(Type type);
const char* name_of(Type type);
bool is_float(Type type);
// How many elements; Error(Input) where that is more than memory holds or a size is negative.
std::size_t count_of(const std::vector<std::int64_t>& shape);

// Every element as a float32 (FP16 exactly) or a double; whole numbers too.
std::vector<float> floats_of(const Tensor& tensor);
std::vector<double> doubles_of(const Tensor& tensor);
// FP16 rounded to the nearest, halves to even, as NumPy does.
std::uint16_t half_of(float value);
float float_of(std::uint16_t half);

Tensor tensor_of(const std::string& name, std::vector<std::int64_t> shape, const std::vector<float>& values);
// The same in another type of the same kind. Throws Error(Input) for floats where whole numbers belong, and the reverse.
Tensor in_type(const Tensor& tensor, Type type);

// Rows `first` to `last` along the first axis, and rows `at` in that order.
Tensor rows_of(const Tensor& tensor, std::size_t first, std::size_t last);
Tensor taken(const Tensor& tensor, const std::vector<std::size_t>& at);
// One behind the other, which have the same shape but for the first axis.
Tensor joined(const std::vector<Tensor>& parts);

const Tensor* find(const std::vector<Tensor>& tensors, const std::string& name);
// Names and shapes, for messages.
std::string shapes_of(const std::vector<Tensor>& tensors);

// An array of numbers [N, ...] from the content of an .npy file. Throws Error(Input) for anything else.
Tensor tensor_from_npy(const std::vector<std::uint8_t>& content, const std::string& name);

}  // namespace resvit
