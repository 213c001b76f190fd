// Whether what runs here computes what was validated: golden images in, outputs compared.

#pragma once

#include <functional>
#include <string>
#include <vector>

#include "engine.hpp"
#include "resvit/runtime.hpp"

namespace resvit {

// Runs one batch within the engine's bounds.
using Run = std::function<std::vector<Tensor>(const std::vector<Tensor>&)>;

// As golden_check of resvit_engines/run/golden.py, by the same rules and limits; the result in words.
// Throws Error(Mismatch) where an output differs by more, Error(Input) for golden files that are missing or do not fit.
std::string golden_check(const Bundle& bundle, const Engine& engine, const Run& run);

}  // namespace resvit
