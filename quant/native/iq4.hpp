// IQ4_NL and IQ4_XS: four-bit indices into a fixed non-uniform codebook of 16 values.
#pragma once

#include "legacy.hpp"

namespace mconv::MCONV_ISA {

constexpr float kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The nearest codebook entry, the upper one on ties: the count of midpoints at or below v.
// (Differences to both neighbours are exact near a midpoint, so comparing v with it decides as
// comparing the differences does.)
MCONV_INLINE VI iq4_index(VF v) {
    VI index = {};
    for (int k = 1; k < 16; ++k) index -= v >= (kIq4[k - 1] + kIq4[k]) * 0.5f;
    return index;
}

#if defined(__AVX512F__)
struct Iq4Tables {
    __m512 values, middles;
};

MCONV_INLINE Iq4Tables iq4_tables() {
    float middles[16] = {};
    for (int k = 1; k < 16; ++k) middles[k] = (kIq4[k - 1] + kIq4[k]) * 0.5f;
    return {_mm512_loadu_ps(kIq4), _mm512_loadu_ps(middles)};
}

// Four steps of bisection over the 15 midpoints, in registers.
MCONV_INLINE VF iq4_value(VF v, const Iq4Tables& t) {
    __m512 x = (__m512)v;
    __m512i i = _mm512_setzero_si512();
    for (int step = 8; step; step >>= 1) {
        __m512i next = _mm512_or_si512(i, _mm512_set1_epi32(step));
        __mmask16 up = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(next, t.middles), _CMP_GE_OQ);
        i = _mm512_mask_mov_epi32(i, up, next);
    }
    return (VF)_mm512_permutexvar_ps(i, t.values);
}
#else
struct Iq4Tables {};
MCONV_INLINE Iq4Tables iq4_tables() { return {}; }

MCONV_INLINE VF iq4_value(VF v, const Iq4Tables&) {
    VF value = splat(kIq4[0]);
    for (int k = 1; k < 16; ++k) {
        VI up = v >= (kIq4[k - 1] + kIq4[k]) * 0.5f;
        value += (VF)(up & bits(splat(kIq4[k] - kIq4[k - 1])));
    }
    return value;
}
#endif

// Best scale of 32 elements: the plain start, then 15 inverse scales around it.
inline VF search_iq4(const VF* x, const VF* w) {
    AbsMax m = abs_max<32>(x);
    VI zero = m.amax < kGroupMaxEps;
    VF peak = select(zero, splat(1.f), m.value), scale = {}, best = {};
    const Iq4Tables tables = iq4_tables();
    for (int k = -8; k <= 7; ++k) {
        VF inverse = k < -7 ? 1.f / (-peak / kIq4[0]) : (float(k) + kIq4[0]) / peak;
        VF qx = {}, q2 = {};
        for (int e = 0; e < 32; ++e) {
            VF q = iq4_value(inverse * x[e], tables), wq = w[e] * q;
            qx += wq * x[e];
            q2 += wq * q;
        }
        if (k < -7) {
            scale = select(q2 > 0.f, qx / q2, VF{});
            best = scale * qx;
        } else {
            VI better = (q2 > 0.f) & (qx * qx > best * q2);
            VF trial = qx / q2;
            scale = select(better, trial, scale);
            best = select(better, trial * qx, best);
        }
    }
    return select(zero, VF{}, scale);
}

template <int N>
MCONV_INLINE void iq4_weights(const Lanes& lanes, const Job& job, const VF* x, VF* w) {
    if (!job.weights) {
        for (int e = 0; e < N; ++e) w[e] = x[e] * x[e];
        return;
    }
    VF mean = sum_squares<N>(x) * (2.f / N);
    gather<N>(lanes.weights, w);
    error_weights<N>(job, x, w, mean, w);
}

inline void encode_iq4_nl(Job& job) {
    for_groups<32, 18>(job, [&](const Lanes& lanes) {
        VF x[32], w[32];
        VI q[32];
        gather<32>(lanes.x, x);
        iq4_weights<32>(lanes, job, x, w);
        VF d = search_iq4(x, w), stored = put_half(lanes, 0, d, job);
        VF inverse = safe_inverse(job.pure ? stored : d);
        for (int e = 0; e < 32; ++e) q[e] = iq4_index(inverse * x[e]);
        put_nibbles(lanes, 2, q);
    });
}

inline void encode_iq4_xs(Job& job) {
    for_groups<256, 136>(job, [&](const Lanes& lanes) {
        VF x[256], w[256], scale[8];
        VI q[32];
        gather<256>(lanes.x, x);
        iq4_weights<256>(lanes, job, x, w);
        for (int j = 0; j < 8; ++j) scale[j] = search_iq4(x + 32 * j, w + 32 * j);
        VF d = -abs_max<8>(scale).value / 32.f, stored = put_half(lanes, 0, d, job);
        if (job.pure) d = stored;
        VF inverse = safe_inverse(d);
        VI low = {}, high = {};
        for (int j = 0; j < 8; ++j) {
            VI l = clamp(nearest(inverse * scale[j]), -32, 31);
            VF step = safe_inverse(d * to_float(l));
            for (int e = 0; e < 32; ++e) q[e] = iq4_index(step * x[32 * j + e]);
            put_nibbles(lanes, 8 + 16 * j, q);
            low |= ((l + 32) & 15) << (4 * j);
            high |= ((l + 32) >> 4) << (2 * j);
        }
        scatter<1>(lanes, 4, &low);
        for (int i = 0; i < lanes.used; ++i) {
            uint16_t h = uint16_t(high[i]);
            std::memcpy(lanes.out[i] + 2, &h, 2);
        }
    });
}

}  // namespace mconv::MCONV_ISA
