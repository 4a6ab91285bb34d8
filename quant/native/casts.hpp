// Whole-array casts between float32, float16 and bfloat16, and the per-row helpers.
#pragma once

#include "simd.hpp"

namespace mconv::MCONV_ISA {

inline void bf16_to_float_row(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t u = uint32_t(from[i]) << 16;
        std::memcpy(to + i, &u, 4);
    }
}

inline void half_to_float_row(const uint16_t* from, float* to, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
    for (; i < n; ++i) to[i] = half_to_float(from[i]);
}

inline void float_to_bf16_row(const float* from, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t u;
        std::memcpy(&u, from + i, 4);
        uint32_t nan = (u & 0x7fffffff) > 0x7f800000, high = u >> 16;
        uint32_t rounded = (u + 0x7fff + (high & 1)) >> 16;
        to[i] = uint16_t(nan ? high | 64 : rounded);
    }
}

// Returns whether a finite value became infinite.
inline bool float_to_half_row(const float* from, uint16_t* to, int64_t n) {
    uint32_t over = 0;
    int64_t i = 0;
#if defined(__F16C__)
    __m256i overflow = _mm256_setzero_si256();
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_loadu_ps(from + i);
        __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
        __m256i a = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
        __m256i big = _mm256_cmpgt_epi32(a, _mm256_set1_epi32(0x477fefff));
        __m256i odd = _mm256_cmpgt_epi32(a, _mm256_set1_epi32(0x7f7fffff));  // infinite or NaN
        overflow = _mm256_or_si256(overflow, _mm256_andnot_si256(odd, big));
        if (_mm256_testz_si256(odd, odd)) {
            _mm_storeu_si128((__m128i*)(to + i), h);
        } else {
            for (int k = 0; k < 8; ++k) to[i + k] = float_to_half(from[i + k]);
        }
    }
    over = !_mm256_testz_si256(overflow, overflow);
#endif
    for (; i < n; ++i) {
        uint32_t u;
        std::memcpy(&u, from + i, 4);
        u &= 0x7fffffff;
        over |= u >= 0x477ff000 && u < 0x7f800000;
        to[i] = float_to_half(from[i]);
    }
    return over;
}

inline bool finite_row(const float* x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t u;
        std::memcpy(&u, x + i, 4);
        u &= 0x7fffffff;
        top = top > u ? top : u;
    }
    return top < 0x7f800000;
}

// Mean of squares of each row, summed in element order; eight rows side by side hide the latency.
inline void row_mean_squares(const float* x, int64_t rows, int64_t cols, float* mean) {
    for (int64_t first = 0; first < rows; first += 8) {
        const int64_t count = rows - first < 8 ? rows - first : 8;
        const float* row[8];
        float sum[8] = {};
        for (int r = 0; r < 8; ++r) row[r] = x + (first + (r < count ? r : 0)) * cols;
        for (int64_t j = 0; j < cols; ++j)
            for (int r = 0; r < 8; ++r) sum[r] += row[r][j] * row[r][j];
        for (int r = 0; r < count; ++r) mean[first + r] = sum[r] / float(cols);
    }
}

// See Casts::block_errors. Sixteen partial sums, added up in order.
template <bool WEIGHTED>
void block_errors_row(const float* x, const float* y, const float* w, int64_t cols, int block,
                      double* sums) {
    for (int64_t at = 0; at < cols; at += block) {
        double part[16] = {}, sum = 0;
        for (int64_t e = at; e < at + block; e += 16)
            for (int i = 0; i < 16; ++i) {
                double diff = y ? double(x[e + i]) - double(y[e + i]) : double(x[e + i]);
                part[i] += WEIGHTED ? double(w[e + i]) * diff * diff : diff * diff;
            }
        for (int i = 0; i < 16; ++i) sum += part[i];
        *sums++ = sum;
    }
}

inline void block_errors(const float* x, const float* y, const float* w, int64_t rows, int64_t cols,
                         int block, double* sums) {
    for (int64_t r = 0; r < rows; ++r, x += cols, sums += cols / block) {
        const float* from = y ? y + r * cols : nullptr;
        if (w) block_errors_row<true>(x, from, w, cols, block, sums);
        else block_errors_row<false>(x, from, w, cols, block, sums);
    }
}

}  // namespace mconv::MCONV_ISA
