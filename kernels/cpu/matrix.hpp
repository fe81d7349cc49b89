// The addresses of a matrix's rows, and the type of their logits.
#pragma once

#include <cstdint>

#include "kl.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline const char* address(const Matrix& matrix, int64_t row, int64_t column) {
    const int64_t offset = (row * matrix.row_stride + column) * size_of(matrix.dtype);
    return static_cast<const char*>(matrix.data) + offset;
}

template <class Function> auto with_dtype(Dtype dtype, const char* row, Function function) {
    switch (dtype) {
        case Dtype::bfloat16: return function(reinterpret_cast<const BFloat16*>(row));
        case Dtype::float16: return function(reinterpret_cast<const Float16*>(row));
        default: return function(reinterpret_cast<const float*>(row));
    }
}

}  // namespace
}  // namespace fastkl
