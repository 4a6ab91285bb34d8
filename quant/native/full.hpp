// Searches for the least error under given weights, for the formats where ggml takes a scale in one
// shot: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, Q2_0, MXFP4, NVFP4. The bytes are not ggml's;
// the format is. Own algorithms: a sweep of scales, each refitted by least squares.
#pragma once

#include "tiny.hpp"

namespace mconv::MCONV_ISA {

// Sums that give a candidate's least-squares scale qx / q2 and its gain over zero qx * qx / q2.
template <int N, int LOW, int TOP>
MCONV_INLINE void fit_levels(const VF* x, const VF* w, VF inverse, VF* qx, VF* q2) {
    *qx = *q2 = VF{};
    for (int e = 0; e < N; ++e) {
        VF l = min(max(nearest_small(inverse * x[e]), splat(float(LOW))), splat(float(TOP)));
        VF wl = w[e] * l;
        *qx += wl * x[e];
        *q2 += wl * l;
    }
}

// Best scale for levels LOW..TOP: candidates map the largest magnitude to reach(0..COUNT-1), then
// levels and scale are refitted in turn.
template <int N, int LOW, int TOP, int COUNT, class Reach>
VF search_scale(const VF* x, const VF* w, Reach reach) {
    AbsMax m = abs_max<N>(x);
    VI zero = m.amax < kGroupMaxEps;
    VF peak = select(zero, splat(1.f), m.value), scale = {}, best = {};
    for (int k = 0; k < COUNT + 2; ++k) {
        VF inverse = k < COUNT ? reach(k) / peak : safe_inverse(scale), qx, q2;
        fit_levels<N, LOW, TOP>(x, w, inverse, &qx, &q2);
        VI better = (q2 > 0.f) & (qx * qx > best * q2);
        VF trial = qx / q2;
        scale = select(better, trial, scale);
        best = select(better, trial * qx, best);
    }
    return select(zero, VF{}, scale);
}

// Stored levels 0..TOP-LOW for the scale as it is stored.
template <int N, int LOW, int TOP>
MCONV_INLINE void stored_levels(const VF* x, VF d, VI* q) {
    VF inverse = safe_inverse(d);
    for (int e = 0; e < N; ++e) q[e] = clamp(nearest(inverse * x[e]), LOW, TOP) - LOW;
}

template <int N, int LOW, int TOP, int COUNT, class Reach>
MCONV_INLINE void full_levels(const Lanes& lanes, Job& job, int offset, Reach reach, VI* q) {
    VF x[N], w[N];
    gather<N>(lanes.x, x);
    gather<N>(lanes.weights, w);
    VF d = search_scale<N, LOW, TOP, COUNT>(x, w, reach);
    stored_levels<N, LOW, TOP>(x, put_half(lanes, offset, d, job), q);
}

template <int BITS, int BYTES>
void full_symmetric(Job& job) {
    constexpr int half = 1 << (BITS - 1);
    for_groups<32, BYTES>(job, [&](const Lanes& lanes) {
        VI q[32];
        full_levels<32, -half, half - 1, 33>(
            lanes, job, 0, [=](int k) { return -(float(half) * (0.8f + 0.0125f * float(k))); }, q);
        if (BITS == 5) put_fifth_bits(lanes, 2, q);
        put_nibbles(lanes, BYTES - 16, q);
    });
}

template <int BITS, int BYTES>
void full_asymmetric(Job& job) {
    constexpr int top = (1 << BITS) - 1;
    for_groups<32, BYTES>(job, [&](const Lanes& lanes) {
        VF x[32], w[32];
        VI q[32];
        gather<32>(lanes.x, x);
        gather<32>(lanes.weights, w);
        Asymmetric s = search_asymmetric<32, top, 36, false>(x, w, -0.9f, 0.05f);
        VF d = put_half(lanes, 0, s.scale, job), m = put_half(lanes, 2, -s.minimum, job);
        VF inverse = safe_inverse(d);
        for (int e = 0; e < 32; ++e) q[e] = clamp(nearest((x[e] - m) * inverse), 0, top);
        if (BITS == 5) put_fifth_bits(lanes, 4, q);
        put_nibbles(lanes, BYTES - 16, q);
    });
}

inline void full_q8_0(Job& job) {
    for_groups<32, 34>(job, [&](const Lanes& lanes) {
        VI q[32], words[8];
        full_levels<32, -128, 127, 25>(
            lanes, job, 0, [](int k) { return -(125.f + 0.25f * float(k)); }, q);
        for (int e = 0; e < 32; ++e) q[e] = (q[e] - 128) & 255;
        for (int i = 0; i < 8; ++i)
            words[i] = word(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]);
        scatter<8>(lanes, 2, words);
    });
}

// Reaches of the formats with very few levels, a geometric sweep: from the peak being the largest
// level to it lying far beyond.
constexpr int kReaches = 24;
constexpr float kReach[kReaches] = {0.75f, 0.9f, 1.05f, 1.2f, 1.35f, 1.5f, 1.7f, 1.9f,
                                    2.1f,  2.35f, 2.6f, 2.9f, 3.2f,  3.6f, 4.f,  4.5f,
                                    5.1f,  6.f,  7.f,  8.5f, 11.f,  15.f, 22.f, 40.f};

inline void full_tq1_0(Job& job) {
    for_groups<256, 54>(job, [&](const Lanes& lanes) {
        VI q[256];
        full_levels<256, -1, 1, kReaches>(lanes, job, 52, [](int k) { return kReach[k]; }, q);
        put_trits(lanes, q);
    });
}

inline void full_tq2_0(Job& job) {
    for_groups<256, 66>(job, [&](const Lanes& lanes) {
        VI q[256];
        full_levels<256, -1, 1, kReaches>(lanes, job, 64, [](int k) { return kReach[k]; }, q);
        put_two_bits(lanes, 0, q);
    });
}

// Levels -1..2 are lopsided: either sign of the scale may be the better one.
inline void full_q2_0(Job& job) {
    for_groups<64, 18>(job, [&](const Lanes& lanes) {
        VI q[64], words[4] = {};
        full_levels<64, -1, 2, 2 * kReaches>(
            lanes, job, 0, [](int k) { return k < kReaches ? kReach[k] : -kReach[k - kReaches]; },
            q);
        for (int e = 0; e < 64; ++e) words[e / 16] |= q[e] << (2 * (e % 16));
        scatter<4>(lanes, 2, words);
    });
}

// The signs fix the levels, so the weighted mean magnitude is the best scale.
inline void full_q1_0(Job& job) {
    for_groups<128, 18>(job, [&](const Lanes& lanes) {
        VF x[128], w[128], sum = {}, all = {};
        VI words[4] = {};
        gather<128>(lanes.x, x);
        gather<128>(lanes.weights, w);
        for (int e = 0; e < 128; ++e) {
            sum += w[e] * abs(x[e]);
            all += w[e];
            words[e / 32] |= ((x[e] >= 0.f) & 1) << (e % 32);
        }
        put_half(lanes, 0, select(all > 0.f, sum / all, VF{}), job);
        scatter<4>(lanes, 2, words);
    });
}

// Weighted error of N elements as E2M1 codes of scale d; see e2m1_code.
template <int N>
MCONV_INLINE VF e2m1_error(const VF* x, const VF* w, VF d) {
    constexpr float middle[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.f, 7.f, 10.f};
    constexpr float step[7] = {1, 1, 1, 1, 2, 2, 4};
    VF error = {};
    for (int e = 0; e < N; ++e) {
        VF a = abs(x[e]), value = {};
        for (int k = 0; k < 7; ++k)
            value += (VF)(VI(a > middle[k] * d) & bits(splat(step[k])));
        VF diff = a - value * d;
        error += w[e] * diff * diff;
    }
    return error;
}

// Best scale code per lane among `start + from .. start + to`, within 0..limit.
template <int N, class Value>
MCONV_INLINE VI search_code(const VF* x, const VF* w, VI start, int from, int to, int limit,
                            Value value) {
    VI found = start;
    VF best;
    for (int k = 0; k <= to - from + 1; ++k) {
        const int offset = k ? from + k - 1 : 0;  // the plain code first: it stays on ties
        VI code = clamp(start + offset, 0, limit);
        VF d;
        for (int i = 0; i < W; ++i) d[i] = value(uint8_t(code[i]));
        VF error = e2m1_error<N>(x, w, d);
        VI better = k ? error < best : splat(-1);
        found = select(better, code, found);
        best = select(better, error, best);
    }
    return found;
}

inline void full_mxfp4(Job& job) {
    for_groups<32, 17>(job, [&](const Lanes& lanes) {
        VF x[32], w[32], amax = {}, d;
        VI code, q[32];
        gather<32>(lanes.x, x);
        gather<32>(lanes.weights, w);
        for (int e = 0; e < 32; ++e) amax = max(amax, abs(x[e]));
        for (int i = 0; i < W; ++i) code[i] = mx_exponent(amax[i]);
        code = search_code<32>(x, w, code, -2, 1, 254, mx_half);
        for (int i = 0; i < W; ++i) {
            d[i] = mx_half(uint8_t(code[i]));
            lanes.out[i][0] = uint8_t(code[i]);
        }
        for (int e = 0; e < 32; ++e) q[e] = e2m1_code(x[e], d);
        put_nibbles(lanes, 1, q);
    });
}

inline void full_nvfp4(Job& job) {
    static const struct Values {
        float of[128];
        Values() {
            for (int c = 0; c < 128; ++c) of[c] = e4m3_to_float(uint8_t(c));
        }
    } values;
    for_groups<64, 36>(job, [&](const Lanes& lanes) {
        VF x[64], w[64];
        VI scale[4];
        gather<64>(lanes.x, x);
        gather<64>(lanes.weights, w);
        for (int s = 0; s < 4; ++s) {
            VF amax = {};
            for (int e = 16 * s; e < 16 * s + 16; ++e) amax = max(amax, abs(x[e]));
            for (int i = 0; i < W; ++i) scale[s][i] = float_to_e4m3(amax[i] / 6.f);
            scale[s] = search_code<16>(x + 16 * s, w + 16 * s, scale[s], -4, 6, 0x7e,
                                       [](uint8_t c) { return values.of[c]; });
        }
        put_nvfp4(lanes, x, scale);
    });
}

}  // namespace mconv::MCONV_ISA
