// Vectors of W lanes and the few operations the kernels need, for one instruction set per
// translation unit (MCONV_ISA names it). Built on GCC/Clang vector extensions; intrinsics only
// where the extension has no word for the instruction. Every lane computes in IEEE float32
// without contraction, so a lane's result equals scalar code doing the same steps.
#pragma once

#include <math.h>
#include <cstdint>
#include <cstring>

#if defined(__AVX__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mconv::MCONV_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float VF __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));

#define MCONV_INLINE inline __attribute__((always_inline))

MCONV_INLINE VF splat(float v) { return v - VF{}; }
MCONV_INLINE VI splat(int32_t v) { return v - VI{}; }
MCONV_INLINE VF to_float(VI v) { return __builtin_convertvector(v, VF); }
MCONV_INLINE VI bits(VF v) { return (VI)v; }
MCONV_INLINE VF abs(VF v) { return (VF)((VI)v & 0x7fffffff); }

MCONV_INLINE VF select(VI mask, VF a, VF b) { return mask ? a : b; }
MCONV_INLINE VI select(VI mask, VI a, VI b) { return mask ? a : b; }

// For operands that are not NaN and whose zeros' signs do not matter.
MCONV_INLINE VF min(VF a, VF b) {
#if defined(__AVX512F__)
    return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

MCONV_INLINE VF max(VF a, VF b) {
#if defined(__AVX512F__)
    return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// The scalar idiom `if (a < b) b = a`: keeps b on ties, so zeros keep the sign they would have.
MCONV_INLINE VF smaller(VF a, VF b) { return select(a < b, a, b); }
MCONV_INLINE VF larger(VF a, VF b) { return select(a > b, a, b); }

MCONV_INLINE VI min(VI a, VI b) { return a < b ? a : b; }
MCONV_INLINE VI max(VI a, VI b) { return a > b ? a : b; }
MCONV_INLINE VI clamp(VI v, int low, int high) { return min(max(v, splat(low)), splat(high)); }

MCONV_INLINE VF sqrt(VF v) {
#if defined(__AVX512F__)
    return (VF)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
    return (VF)_mm256_sqrt_ps((__m256)v);
#else
    VF r;
    for (int i = 0; i < W; ++i) r[i] = __builtin_sqrtf(v[i]);
    return r;
#endif
}

MCONV_INLINE bool any(VI mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t r = 0;
    for (int i = 0; i < W; ++i) r |= mask[i];
    return r != 0;
#endif
}

constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to nearest even

// Round to nearest even as an integer; beyond 2^22 the result wraps exactly as the reference does.
MCONV_INLINE VI nearest(VF v) { return (bits(v + kMagic) & 0x007fffff) - 0x00400000; }

// The same as a float, valid only for |v| < 2^22.
MCONV_INLINE VF nearest_small(VF v) { return (v + kMagic) - kMagic; }

// Truncate; out of range or NaN gives 0, the low byte of what x86 conversion instructions give.
MCONV_INLINE VI truncate(VF v) {
    VF safe = select(abs(v) < 2147483648.f, v, VF{});
    return __builtin_convertvector(safe, VI);
}

// Round half away from zero, as roundf, then truncate as above.
MCONV_INLINE VI round_away(VF v) {
    // The largest float below one half: v + that, truncated, is exactly roundf for |v| < 2^23.
    VF half = (VF)((bits(v) & INT32_MIN) | bits(splat(0.49999997f)));
    return truncate(v + half);
}

// float16 <-> float32 for single values, in integer arithmetic: any processor, ggml's bits.
inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) {
        float v = float(mantissa) * 0x1p-24f;
        return sign ? -v : v;
    }
    uint32_t u = exponent == 31 ? 0x7f800000u | mantissa << 13
                                : (exponent + 112) << 23 | mantissa << 13;
    u |= sign;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline uint16_t float_to_half(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (a < 0x38800000) {  // result is subnormal: let the adder round at 2^-24
        float v;
        std::memcpy(&v, &a, 4);
        v += 0.5f;
        std::memcpy(&a, &v, 4);
        return uint16_t(sign | (a - 0x3f000000));
    }
    a += 0xfff + (a >> 13 & 1);
    return uint16_t(sign | ((a - 0x38000000) >> 13));
}

}  // namespace mconv::MCONV_ISA
