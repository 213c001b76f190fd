// The parts of reading outputs: boxes, maps and texts.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "resvit/runtime.hpp"
#include "tensor.hpp"

namespace resvit {

using Answers = std::vector<Answer>;
using Tensors = std::vector<Tensor>;
using Places = std::vector<Placement>;

Answers boxes_from(const TaskOptions& options, const Tensors& outputs, const Places& places,
                   std::optional<float> least_score);
Answers masks_from(const TaskOptions& options, const Tensors& outputs, const Places& places);
Answers depths_from(const TaskOptions& options, const Tensors& outputs, const Places& places);
Answers lines_from(const TaskOptions& options, const Tensors& outputs, const Places& places);

// The output of the option `output`, or the only one of those that fit. Throws Error(Input) where that is none or several,
// with what the task `needs`.
const Tensor& chosen(const std::vector<const Tensor*>& fitting, const TaskOptions& options, const Tensors& outputs,
                     const std::string& needs);
// Sums as NumPy does: in pairs, of blocks of 128, in eight accumulators.
double sum_of(const double* values, std::size_t count);
float sum_of(const float* values, std::size_t count);

}  // namespace resvit
