// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 with float16 scale (and minimum). Without importance
// the scale follows from the extremes in one shot; with it, a weighted search picks it.
#pragma once

#include "group.hpp"
#include "search.hpp"

namespace mconv::MCONV_ISA {

MCONV_INLINE VF safe_inverse(VF d) { return select(d != 0.f, 1.f / d, VF{}); }

// C's (int8_t) of a float after x86 conversion: low byte, sign-extended.
MCONV_INLINE VI to_int8(VF v) { return truncate(v) << 24 >> 24; }

// weights[e] = importance * sqrt(mean + x*x), the reference's error weights, unless the job has
// its own.
template <int N>
MCONV_INLINE void error_weights(const Job& job, const VF* x, const VF* importance, VF mean, VF* w) {
    for (int e = 0; e < N; ++e)
        w[e] = job.pure ? importance[e] : importance[e] * sqrt(mean + x[e] * x[e]);
}

// Nibbles: byte j holds elements j (low) and j + 16 (high).
MCONV_INLINE void put_nibbles(const Lanes& lanes, int offset, const VI* q) {
    VI words[4];
    for (int i = 0; i < 4; ++i) {
        const VI *a = q + 4 * i, *b = a + 16;
        words[i] = word((a[0] & 15) | (b[0] & 15) << 4, (a[1] & 15) | (b[1] & 15) << 4,
                        (a[2] & 15) | (b[2] & 15) << 4, (a[3] & 15) | (b[3] & 15) << 4);
    }
    scatter<4>(lanes, offset, words);
}

// Fifth bits: bit j of a 32-bit word belongs to element j.
MCONV_INLINE void put_fifth_bits(const Lanes& lanes, int offset, const VI* q) {
    VI high = {};
    for (int e = 0; e < 32; ++e) high |= (q[e] >> 4 & 1) << e;
    scatter<1>(lanes, offset, &high);
}

// Two-bit planes: per 128 elements, byte l holds elements l, l+32, l+64, l+96 from low to high.
MCONV_INLINE void put_two_bits(const Lanes& lanes, int offset, const VI* q) {
    VI words[16];
    for (int i = 0; i < 16; ++i) {
        const VI* a = q + (i / 8) * 128 + (i % 8) * 4;
        VI b[4];
        for (int k = 0; k < 4; ++k)
            b[k] = (a[k] & 3) | (a[k + 32] & 3) << 2 | (a[k + 64] & 3) << 4 | (a[k + 96] & 3) << 6;
        words[i] = word(b[0], b[1], b[2], b[3]);
    }
    scatter<16>(lanes, offset, words);
}

template <int BITS>
void symmetric_block(const Lanes& lanes, Job& job, VI* q, VF* d) {
    constexpr int half = 1 << (BITS - 1);
    VF x[32];
    gather<32>(lanes.x, x);
    if (job.weights) {
        VF w[32], mean;
        gather<32>(lanes.weights, w);
        for (int i = 0; i < W; ++i) mean[i] = lanes.row_mean[i];
        error_weights<32>(job, x, w, mean, w);
        Symmetric s = search_symmetric<32, half, true>(x, w);
        for (int e = 0; e < 32; ++e) q[e] = stored_level<half>(s, x[e]);
        *d = s.scale;
        return;
    }
    *d = abs_max<32>(x).value / float(-half);
    VF inverse = safe_inverse(*d);
    for (int e = 0; e < 32; ++e)
        q[e] = min(to_int8(x[e] * inverse + (float(half) + 0.5f)), splat(2 * half - 1));
}

template <int BITS>
void asymmetric_block(const Lanes& lanes, Job& job, VI* q, VF* d, VF* m) {
    constexpr int top = (1 << BITS) - 1;
    VF x[32];
    gather<32>(lanes.x, x);
    if (job.weights) {
        VF w[32], mean;
        gather<32>(lanes.weights, w);
        for (int i = 0; i < W; ++i) mean[i] = lanes.row_mean[i];
        error_weights<32>(job, x, w, mean, w);
        Asymmetric s = search_asymmetric<32, top, 36, false>(x, w, -0.9f, 0.05f);
        for (int e = 0; e < 32; ++e) q[e] = stored_level<top>(s, x[e]);
        *d = s.scale;
        *m = -s.minimum;
        return;
    }
    VF low = x[0], high = x[0];
    for (int e = 1; e < 32; ++e) {
        low = smaller(x[e], low);
        high = larger(x[e], high);
    }
    *d = (high - low) / float(top);
    *m = low;
    VF inverse = safe_inverse(*d);
    for (int e = 0; e < 32; ++e) {
        VI l = to_int8((x[e] - low) * inverse + 0.5f);
        q[e] = BITS == 4 ? min(l, splat(top)) : l;
    }
}

inline void encode_q4_0(Job& job) {
    for_groups<32, 18>(job, [&](const Lanes& lanes) {
        VI q[32];
        VF d;
        symmetric_block<4>(lanes, job, q, &d);
        put_half(lanes, 0, d, job);
        put_nibbles(lanes, 2, q);
    });
}

inline void encode_q5_0(Job& job) {
    for_groups<32, 22>(job, [&](const Lanes& lanes) {
        VI q[32];
        VF d;
        symmetric_block<5>(lanes, job, q, &d);
        put_half(lanes, 0, d, job);
        put_fifth_bits(lanes, 2, q);
        put_nibbles(lanes, 6, q);
    });
}

inline void encode_q4_1(Job& job) {
    for_groups<32, 20>(job, [&](const Lanes& lanes) {
        VI q[32];
        VF d, m;
        asymmetric_block<4>(lanes, job, q, &d, &m);
        put_half(lanes, 0, d, job);
        put_half(lanes, 2, m, job);
        put_nibbles(lanes, 4, q);
    });
}

inline void encode_q5_1(Job& job) {
    for_groups<32, 24>(job, [&](const Lanes& lanes) {
        VI q[32];
        VF d, m;
        asymmetric_block<5>(lanes, job, q, &d, &m);
        put_half(lanes, 0, d, job);
        put_half(lanes, 2, m, job);
        put_fifth_bits(lanes, 4, q);
        put_nibbles(lanes, 8, q);
    });
}

inline void encode_q8_0(Job& job) {
    for_groups<32, 34>(job, [&](const Lanes& lanes) {
        VF x[32], amax = {};
        gather<32>(lanes.x, x);
        for (int e = 0; e < 32; ++e) amax = max(amax, abs(x[e]));
        VF d = amax / 127.f, inverse = safe_inverse(d);
        put_half(lanes, 0, d, job);
        VI words[8];
        for (int i = 0; i < 8; ++i) {
            VI q[4];
            for (int k = 0; k < 4; ++k) q[k] = round_away(x[4 * i + k] * inverse) & 255;
            words[i] = word(q[0], q[1], q[2], q[3]);
        }
        scatter<8>(lanes, 2, words);
    });
}

}  // namespace mconv::MCONV_ISA
