// Formats without a search: MXFP4, NVFP4 (E2M1 with block exponents or E4M3 scales), the ternary
// TQ1_0 and TQ2_0, and the one- and two-bit Q1_0 and Q2_0.
#pragma once

#include "legacy.hpp"

namespace mconv::MCONV_ISA {

// E2M1 code of x for scale d (code 0..7 by magnitude, +8 when negative and not zero): the count of
// midpoints of d * {0, 1, 2, 3, 4, 6, 8, 12} strictly below |x|.
MCONV_INLINE VI e2m1_code(VF x, VF d) {
    constexpr float middle[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.f, 7.f, 10.f};
    VF a = abs(x);
    VI code = {};
    for (int k = 0; k < 7; ++k) code -= a > middle[k] * d;
    return code | ((x < 0.f) & (code != 0) & 8);
}

// floor(log2(amax)) - 2 + 127 as a byte, rounding as the C library's log2f does near powers of 2.
inline uint8_t mx_exponent(float amax) {
    if (!(amax > 0)) return 0;
    return uint8_t(int(floorf(log2f(amax)) - 2 + 127));
}

// Half of 2^(e - 127).
inline float mx_half(uint8_t e) {
    uint32_t u = e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline void encode_mxfp4(Job& job) {
    for_groups<32, 17>(job, [&](const Lanes& lanes) {
        VF x[32], amax = {}, d;
        VI q[32];
        gather<32>(lanes.x, x);
        for (int e = 0; e < 32; ++e) amax = max(amax, abs(x[e]));
        for (int i = 0; i < W; ++i) {
            uint8_t e = mx_exponent(amax[i]);
            d[i] = mx_half(e);
            lanes.out[i][0] = e;
        }
        for (int e = 0; e < 32; ++e) q[e] = e2m1_code(x[e], d);
        put_nibbles(lanes, 1, q);
    });
}

inline float e4m3_to_float(uint8_t v) {  // unsigned, halved (the codes are doubled)
    if (v == 0 || v == 0x7f) return 0;
    int exponent = v >> 3 & 15, mantissa = v & 7;
    return exponent ? ldexpf(1 + float(mantissa) / 8, exponent - 8)
                    : ldexpf(float(mantissa), -10);
}

inline uint8_t float_to_e4m3(float x) {
    if (!(x > 0)) return 0;
    if (x > 448) x = 448;
    uint32_t u;
    std::memcpy(&u, &x, 4);
    int exponent = int(u >> 23 & 255) - 120;
    if (exponent <= 0) {
        int m = int(x * 512 + 0.5f);
        return uint8_t(m > 7 ? 7 : m < 1 ? 0 : m);
    }
    int mantissa = int(u >> 20 & 7) + int(u >> 19 & 1);  // half rounds up
    if (mantissa > 7) mantissa = 0, ++exponent;
    return exponent >= 15 ? 0x7e : uint8_t(exponent << 3 | mantissa);
}

// Encode 64 elements under four scale codes.
MCONV_INLINE void put_nvfp4(const Lanes& lanes, const VF* x, const VI* code) {
    VI words[8], scales = {};
    for (int s = 0; s < 4; ++s) {
        VF d;
        VI q[16];
        for (int i = 0; i < W; ++i) d[i] = e4m3_to_float(uint8_t(code[s][i]));
        scales |= code[s] << (8 * s);
        for (int e = 0; e < 16; ++e) q[e] = select(d == 0.f, VI{}, e2m1_code(x[16 * s + e], d));
        for (int i = 0; i < 2; ++i) {
            const VI *a = q + 4 * i, *b = a + 8;
            words[2 * s + i] = word(a[0] | b[0] << 4, a[1] | b[1] << 4, a[2] | b[2] << 4,
                                    a[3] | b[3] << 4);
        }
    }
    scatter<1>(lanes, 0, &scales);
    scatter<8>(lanes, 4, words);
}

inline void encode_nvfp4(Job& job) {
    for_groups<64, 36>(job, [&](const Lanes& lanes) {
        VF x[64];
        VI code[4];
        gather<64>(lanes.x, x);
        for (int s = 0; s < 4; ++s) {
            VF amax = {};
            for (int e = 16 * s; e < 16 * s + 16; ++e) amax = max(amax, abs(x[e]));
            for (int i = 0; i < W; ++i) code[s][i] = float_to_e4m3(amax[i] / 6.f);
        }
        put_nvfp4(lanes, x, code);
    });
}

// Levels round(x / absmax) + 1 of a ternary block; also stores the scale at `offset`.
MCONV_INLINE void ternary_levels(const Lanes& lanes, Job& job, int offset, VI* q) {
    VF x[256], amax = {};
    gather<256>(lanes.x, x);
    for (int e = 0; e < 256; ++e) amax = max(amax, abs(x[e]));
    VF inverse = safe_inverse(amax);
    put_half(lanes, offset, amax, job);
    for (int e = 0; e < 256; ++e) q[e] = round_away(x[e] * inverse) + 1;
}

// N trits at stride S, most significant first, as ceil(value * 256 / 243).
template <int N>
MCONV_INLINE VI trits(const VI* q, int stride) {
    VI v = {};
    for (int n = 0; n < 5; ++n) v = v * 3 + (n < N ? q[n * stride] : VI{});
    // (v * 256 + 242) / 243 for v <= 242, by multiplication.
    return ((v * 256 + 242) * 17261) >> 22;
}

MCONV_INLINE void put_trits(const Lanes& lanes, const VI* q) {
    VI b[52], words[13];
    for (int m = 0; m < 32; ++m) b[m] = trits<5>(q + m, 32);
    for (int m = 0; m < 16; ++m) b[32 + m] = trits<5>(q + 160 + m, 16);
    for (int m = 0; m < 4; ++m) b[48 + m] = trits<4>(q + 240 + m, 4);
    for (int i = 0; i < 13; ++i)
        words[i] = word(b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]);
    scatter<13>(lanes, 0, words);
}

inline void encode_tq1_0(Job& job) {
    for_groups<256, 54>(job, [&](const Lanes& lanes) {
        VI q[256];
        ternary_levels(lanes, job, 52, q);
        put_trits(lanes, q);
    });
}

inline void encode_tq2_0(Job& job) {
    for_groups<256, 66>(job, [&](const Lanes& lanes) {
        VI q[256];
        ternary_levels(lanes, job, 64, q);
        put_two_bits(lanes, 0, q);
    });
}

inline void encode_q1_0(Job& job) {
    for_groups<128, 18>(job, [&](const Lanes& lanes) {
        VF x[128], sum = {};
        VI words[4] = {};
        gather<128>(lanes.x, x);
        for (int e = 0; e < 128; ++e) {
            sum += abs(x[e]);
            words[e / 32] |= ((x[e] >= 0.f) & 1) << (e % 32);
        }
        put_half(lanes, 0, sum / 128.f, job);
        scatter<4>(lanes, 2, words);
    });
}

inline void encode_q2_0(Job& job) {
    for_groups<64, 18>(job, [&](const Lanes& lanes) {
        VF x[64], amax = {};
        VI words[4] = {};
        gather<64>(lanes.x, x);
        for (int e = 0; e < 64; ++e) amax = max(amax, abs(x[e]));
        VF inverse = safe_inverse(amax);
        put_half(lanes, 0, amax, job);
        VI broken = (inverse == INFINITY) << 31;  // C's conversion of an infinity: the lowest int
        for (int e = 0; e < 64; ++e) {
            VI l = round_away(x[e] * inverse) + 1;
            words[e / 16] |= clamp(l | broken, 0, 3) << (2 * (e % 16));
        }
        scatter<4>(lanes, 2, words);
    });
}

}  // namespace mconv::MCONV_ISA
