// Snap one group of 4 or 8 values to the best point of a neighbour list. A level has few possible
// values, so each coordinate's error terms form a small table; W neighbours then add table entries
// side by side, in coordinate order, which gives each exactly the reference's float sum.
#pragma once

#include <cfloat>

#include "grid.hpp"
#include "simd.hpp"

namespace mconv::MCONV_ISA {

#if defined(__AVX512F__) || defined(__AVX2__)

// Entry (index mod W) of a table held in a register.
MCONV_INLINE VF lookup(VF table, VI index) {
#if defined(__AVX512F__)
    return (VF)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    return (VF)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#endif
}

MCONV_INLINE VI load_points(const uint16_t* from) {
#if defined(__AVX512F__)
    return (VI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
    return (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#endif
}

MCONV_INLINE unsigned mask_bits(VI mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#else
    return unsigned(_mm256_movemask_ps((__m256)mask));
#endif
}

MCONV_INLINE float lowest(VF v) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_ps((__m512)v);
#else
    __m128 m = _mm_min_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
#endif
}

// x and w are columns of a lane array: element i is x[i * W]. `levels` holds the value of each
// level, repeated to fill a register.
template <int DIMS, int BITS>
inline uint16_t best_neighbour(const uint16_t* list, const float* x, const float* w, float scale,
                               VF levels) {
    VF table[DIMS], value = scale * levels;
    for (int i = 0; i < DIMS; ++i) {
        VF diff = value - x[i * W];
        table[i] = w[i * W] * diff * diff;
    }
    const int count = *list++;
    float best = FLT_MAX;
    int at = 0;
    for (int first = 0; first < count; first += W) {
        VI p = load_points(list + first);
        VF d = lookup(table[0], p);
        for (int i = 1; i < DIMS; ++i) d += lookup(table[i], p >> (BITS * i));
        float low = lowest(d);
        if (low < best) {
            best = low;
            at = first + __builtin_ctz(mask_bits(d == low) | 1u << (W - 1));
        }
    }
    return list[at];
}

#else

template <int DIMS, int BITS>
inline uint16_t best_neighbour(const uint16_t* list, const float* x, const float* w, float scale,
                               const float* levels) {
    constexpr int n = 1 << BITS;
    float table[DIMS][n];
    for (int i = 0; i < DIMS; ++i)
        for (int l = 0; l < n; ++l) {
            float diff = scale * levels[l] - x[i * W];
            table[i][l] = w[i * W] * diff * diff;
        }
    const int count = *list++;
    float best = FLT_MAX;
    int at = 0;
    for (int j = 0; j < count; ++j) {
        const unsigned p = list[j];
        float d = table[0][p & (n - 1)];
        for (int i = 1; i < DIMS; ++i) d += table[i][p >> (BITS * i) & (n - 1)];
        if (d < best) {
            best = d;
            at = j;
        }
    }
    return list[at];
}

#endif

// The level values in the form best_neighbour takes.
struct Levels {
    alignas(64) float value[W < 8 ? 8 : W];
#if defined(__AVX512F__) || defined(__AVX2__)
    MCONV_INLINE VF get() const {
        VF v;
        std::memcpy(&v, value, sizeof v);
        return v;
    }
#else
    const float* get() const { return value; }
#endif
};

template <int BITS, class Value>
MCONV_INLINE Levels make_levels(Value value) {
    Levels l;
    for (int i = 0; i < int(sizeof(l.value) / 4); ++i) l.value[i] = value(i & ((1 << BITS) - 1));
    return l;
}

}  // namespace mconv::MCONV_ISA
