// Q2_K .. Q6_K: super-blocks of 256 = 8 x 32 or 16 x 16 elements, whose scales (and minima) are
// themselves quantized. A lane is a whole super-block, so its sub-block scales form a column that
// the same vector code quantizes again.
#pragma once

#include "legacy.hpp"

namespace mconv::MCONV_ISA {

// The levels of one sub-block re-derived from its rounded scale `d` and minimum `m`; where the
// scale rounded to zero the search's levels stay.
template <int N, int NMAX>
MCONV_INLINE void requantize_positive(const VF* x, VF d, VF m, const Asymmetric& s, VI* q) {
    VI keep = d == 0.f;
    for (int e = 0; e < N; ++e) q[e] = clamp(nearest((x[e] + m) / d), 0, NMAX);
    if (any(keep))
        for (int e = 0; e < N; ++e) q[e] = select(keep, stored_level<NMAX>(s, x[e]), q[e]);
}

// ---- Q2_K, Q4_K, Q5_K: scales and minima ---------------------------------------------------

// The sub-blocks of a super-block, searched.
template <int BITS>
struct Searched {
    static constexpr int size = BITS == 2 ? 16 : 32, count = 256 / size, top = (1 << BITS) - 1;
    static constexpr int scale_top = BITS == 2 ? 15 : 63;
    Asymmetric found[count];
    VF scale[count], low[count], weight[count];
};

// Error weights of one sub-block without importance, and its search.
template <int BITS>
MCONV_INLINE Asymmetric search_plain(const VF* x) {
    constexpr int size = Searched<BITS>::size, top = Searched<BITS>::top;
    VF w[size], rms = BITS == 2 ? VF{} : sqrt(sum_squares<size>(x) / float(size));
    for (int e = 0; e < size; ++e) w[e] = BITS == 2 ? abs(x[e]) : rms + abs(x[e]);
    if (BITS == 2) return search_asymmetric<size, top, 15, true>(x, w, -0.5f, 0.1f);
    if (BITS == 4) return search_asymmetric<size, top, 20, false>(x, w, -1.f, 0.1f);
    return search_asymmetric<size, top, 15, false>(x, w, -0.5f, 0.1f);
}

template <int BITS>
void search_sub_blocks(const Lanes& lanes, const Job& job, const VF* x, Searched<BITS>& s) {
    constexpr int size = Searched<BITS>::size, top = Searched<BITS>::top;
    VF importance[256], mean = {};
    if (job.weights) {
        gather<256>(lanes.weights, importance);
        mean = (BITS == 2 ? 1.f : 2.f) * sum_squares<256>(x) / 256.f;
    }
    for (int j = 0; j < s.count; ++j) {
        const VF* xs = x + size * j;
        if (job.weights) {
            VF w[size];
            error_weights<size>(job, xs, importance + size * j, mean, w);
            s.weight[j] = VF{};
            for (int e = 0; e < size; ++e) s.weight[j] += w[e];
            s.found[j] = search_asymmetric<size, top, 36, false>(xs, w, -0.9f, 0.05f);
        } else {
            s.found[j] = search_plain<BITS>(xs);
        }
        s.scale[j] = s.found[j].scale;
        s.low[j] = s.found[j].minimum;
    }
}

// Byte levels of non-negative values in units of the largest over TOP; returns that unit.
template <int N, int TOP>
MCONV_INLINE VF round_scales(const VF* value, VI* level) {
    VF most = {};
    for (int j = 0; j < N; ++j) most = larger(value[j], most);
    VF up = select(most > 0.f, float(TOP) / most, VF{});
    for (int j = 0; j < N; ++j) level[j] = nearest(up * value[j]) & 255;
    return most / float(TOP);
}

// Quantize the scales and minima of a super-block; returns their units before rounding to half.
template <int BITS>
MCONV_INLINE void quantize_scales(const Job& job, const Searched<BITS>& s, VI* ls, VI* lm, VF* d,
                                  VF* dmin) {
    constexpr int count = Searched<BITS>::count, top = Searched<BITS>::scale_top;
    *d = job.weights ? search_positive<count, top>(s.scale, s.weight, ls)
                     : round_scales<count, top>(s.scale, ls);
    *dmin = job.weights ? search_positive<count, top>(s.low, s.weight, lm)
                        : round_scales<count, top>(s.low, lm);
    // The reference clamps in these cases only; elsewhere a wrapped level spills into neighbours.
    if (BITS == 5 || (BITS == 4 && !job.weights) || job.pure) {
        for (int j = 0; j < count; ++j) {
            ls[j] = min(ls[j], splat(top));
            lm[j] = min(lm[j], splat(top));
        }
    }
}

// Six-bit scales and minima of 8 sub-blocks in 12 bytes; both become what a reader unpacks.
MCONV_INLINE void put_six_bits(const Lanes& lanes, int offset, VI* scale, VI* low) {
    VI b[12];
    for (int j = 0; j < 4; ++j) {
        b[j] = (scale[j] | scale[j + 4] >> 4 << 6) & 255;
        b[j + 4] = (low[j] | low[j + 4] >> 4 << 6) & 255;
        b[j + 8] = (scale[j + 4] & 15) | (low[j + 4] & 15) << 4;
    }
    for (int j = 0; j < 4; ++j) {
        scale[j] = b[j] & 63;
        low[j] = b[j + 4] & 63;
        scale[j + 4] = (b[j + 8] & 15) | b[j] >> 6 << 4;
        low[j + 4] = b[j + 8] >> 4 | b[j + 4] >> 6 << 4;
    }
    VI words[3] = {word(b[0], b[1], b[2], b[3]), word(b[4], b[5], b[6], b[7]),
                   word(b[8], b[9], b[10], b[11])};
    scatter<3>(lanes, offset, words);
}

// One bit per element: bit k of byte m belongs to element 32k + m.
MCONV_INLINE void put_bit_plane(const Lanes& lanes, int offset, const VI* q, int shift) {
    VI words[8];
    for (int i = 0; i < 8; ++i) {
        VI b[4];
        for (int k = 0; k < 4; ++k) {
            b[k] = VI{};
            for (int j = 0; j < 8; ++j) b[k] |= (q[32 * j + 4 * i + k] >> shift) << j;
        }
        words[i] = word(b[0], b[1], b[2], b[3]);
    }
    scatter<8>(lanes, offset, words);
}

template <int BITS>
void encode_q45_k(Job& job) {
    for_groups<256, BITS == 4 ? 144 : 176>(job, [&](const Lanes& lanes) {
        VF x[256], d, dmin;
        VI ls[8], lm[8], q[256], words[32];
        Searched<BITS> s;
        gather<256>(lanes.x, x);
        search_sub_blocks<BITS>(lanes, job, x, s);
        quantize_scales<BITS>(job, s, ls, lm, &d, &dmin);
        d = put_half(lanes, 0, d, job);
        dmin = put_half(lanes, 2, dmin, job);
        put_six_bits(lanes, 4, ls, lm);
        for (int j = 0; j < 8; ++j)
            requantize_positive<32, (1 << BITS) - 1>(x + 32 * j, d * to_float(ls[j]),
                                                     dmin * to_float(lm[j]), s.found[j],
                                                     q + 32 * j);
        if (BITS == 5) put_bit_plane(lanes, 16, q, 4);
        for (int i = 0; i < 32; ++i) {
            const VI *a = q + (i / 8) * 64 + (i % 8) * 4, *b = a + 32;
            words[i] = word((a[0] & 15) | (b[0] & 15) << 4, (a[1] & 15) | (b[1] & 15) << 4,
                            (a[2] & 15) | (b[2] & 15) << 4, (a[3] & 15) | (b[3] & 15) << 4);
        }
        scatter<32>(lanes, BITS == 5 ? 48 : 16, words);
    });
}

inline void encode_q2_k(Job& job) {
    for_groups<256, 84>(job, [&](const Lanes& lanes) {
        VF x[256], d, dmin;
        VI ls[16], lm[16], packed[16], words[4], q[256];
        Searched<2> s;
        gather<256>(lanes.x, x);
        search_sub_blocks<2>(lanes, job, x, s);
        quantize_scales<2>(job, s, ls, lm, &d, &dmin);
        for (int j = 0; j < 16; ++j) packed[j] = (ls[j] | lm[j] << 4) & 255;
        for (int i = 0; i < 4; ++i)
            words[i] = word(packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]);
        scatter<4>(lanes, 0, words);
        d = put_half(lanes, 80, d, job);
        dmin = put_half(lanes, 82, dmin, job);
        for (int j = 0; j < 16; ++j)
            requantize_positive<16, 3>(x + 16 * j, d * to_float(packed[j] & 15),
                                       dmin * to_float(packed[j] >> 4), s.found[j], q + 16 * j);
        put_two_bits(lanes, 16, q);
    });
}

// ---- Q3_K ------------------------------------------------------------------------------------

// Coordinate descent from the plain start (no importance) on P sub-blocks of N at once; their
// chains are independent, which hides the latency of the division. Stored levels are 0..2*NMAX-1.
template <int N, int NMAX, int P>
void descend_symmetric(const VF* x, VI* level, VF* scale) {
    VI zero[P];
    VF lx[P], l2[P];
    for (int p = 0; p < P; ++p) {
        AbsMax m = abs_max<N>(x + p * N);
        zero[p] = m.amax < kGroupMaxEps;
        VF inverse = -float(NMAX) / select(zero[p], splat(1.f), m.value);
        lx[p] = l2[p] = VF{};
        for (int e = p * N; e < p * N + N; ++e) {
            level[e] = clamp(nearest(inverse * x[e]), -NMAX, NMAX - 1);
            VF w = x[e] * x[e], f = to_float(level[e]);
            lx[p] += w * x[e] * f;
            l2[p] += w * f * f;
        }
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        VI changed = {};
        for (int i = 0; i < N; ++i) {
            for (int p = 0; p < P; ++p) {
                const int e = p * N + i;
                VF w = x[e] * x[e], wx = w * x[e], f = to_float(level[e]);
                VF slx = lx[p] - wx * f, sl2 = l2[p] - w * f * f;
                VI l = clamp(nearest(x[e] * sl2 / slx), -NMAX, NMAX - 1);
                VI maybe = (slx > 0.f) & (l != level[e]) & ~zero[p];
                VF g = to_float(l);
                slx += wx * g;
                sl2 += w * g * g;
                maybe &= (sl2 > 0.f) & (slx * slx * l2[p] > lx[p] * lx[p] * sl2);
                level[e] = select(maybe, l, level[e]);
                lx[p] = select(maybe, slx, lx[p]);
                l2[p] = select(maybe, sl2, l2[p]);
                changed |= maybe;
            }
        }
        if (!any(changed)) break;
    }
    for (int p = 0; p < P; ++p) {
        for (int e = p * N; e < p * N + N; ++e) level[e] = select(zero[p], VI{}, level[e] + NMAX);
        scale[p] = select(zero[p] | ~(l2[p] > 0.f), VF{}, lx[p] / l2[p]);
    }
}

// Six-bit scales (biased by 32) of 16 sub-blocks in 12 bytes.
MCONV_INLINE void put_q3_scales(const Lanes& lanes, int offset, const VI* l) {
    VI b[12];
    for (int j = 0; j < 8; ++j) b[j] = (l[j] & 15) | (l[j + 8] & 15) << 4;
    for (int j = 0; j < 4; ++j)
        b[8 + j] = (l[j] >> 4) | (l[j + 4] >> 4) << 2 | (l[j + 8] >> 4) << 4 | (l[j + 12] >> 4) << 6;
    VI words[3] = {word(b[0], b[1], b[2], b[3]), word(b[4], b[5], b[6], b[7]),
                   word(b[8], b[9], b[10], b[11])};
    scatter<3>(lanes, offset, words);
}

inline void encode_q3_k(Job& job) {
    for_groups<256, 110>(job, [&](const Lanes& lanes) {
        VF x[256], scale[16], sum_w[16], importance[256], mean = {};
        VI q[256], ls[16];
        gather<256>(lanes.x, x);
        if (job.weights) {
            gather<256>(lanes.weights, importance);
            mean = 2.f * sum_squares<256>(x) / 256.f;
        }
        for (int j = 0; j < 16; j += 4)
            if (!job.weights) descend_symmetric<16, 4, 4>(x + 16 * j, q + 16 * j, scale + j);
        for (int j = 0; job.weights && j < 16; ++j) {
            const VF* xs = x + 16 * j;
            VF w[16];
            error_weights<16>(job, xs, importance + 16 * j, mean, w);
            sum_w[j] = VF{};
            for (int e = 0; e < 16; ++e) sum_w[j] += w[e];
            Symmetric s = search_symmetric<16, 4, true>(xs, w);
            for (int e = 0; e < 16; ++e) q[16 * j + e] = stored_level<4>(s, xs[e]);
            scale[j] = s.scale;
        }
        VF d;
        if (job.weights) {
            Symmetric s = search_symmetric<16, 32, true>(scale, sum_w);
            for (int j = 0; j < 16; ++j) ls[j] = stored_level<32>(s, scale[j]);
            d = s.scale;
        } else {
            VF peak = abs_max<16>(scale).value, inverse = -32.f / peak;
            VI some = peak != 0.f;
            for (int j = 0; j < 16; ++j) {
                VI l = nearest(inverse * scale[j]) << 24 >> 24;  // an int8 in the reference
                ls[j] = select(some, clamp(l, -32, 31) + 32, VI{});
            }
            d = select(some, 1.f / inverse, VF{});
        }
        put_q3_scales(lanes, 96, ls);
        d = put_half(lanes, 108, d, job);
        for (int j = 0; j < 16; ++j) {
            VF ds = d * to_float(ls[j] - 32);
            VI keep = ds == 0.f;
            for (int e = 16 * j; e < 16 * j + 16; ++e)
                q[e] = select(keep, q[e], clamp(nearest(x[e] / ds), -4, 3) + 4);
        }
        put_bit_plane(lanes, 0, q, 2);
        put_two_bits(lanes, 32, q);
    });
}

// ---- Q6_K ------------------------------------------------------------------------------------

MCONV_INLINE void put_q6(const Lanes& lanes, const VI* q) {
    VI words[48];
    for (int i = 0; i < 16; ++i) {
        const VI* a = q + (i / 8) * 128 + (i % 8) * 4;
        VI b[4], c[4], h[4];
        for (int k = 0; k < 4; ++k) {
            b[k] = (a[k] & 15) | (a[k + 64] & 15) << 4;
            c[k] = (a[k + 32] & 15) | (a[k + 96] & 15) << 4;
            h[k] = a[k] >> 4 | a[k + 32] >> 4 << 2 | a[k + 64] >> 4 << 4 | a[k + 96] >> 4 << 6;
        }
        int at = (i / 8) * 16 + i % 8;
        words[at] = word(b[0], b[1], b[2], b[3]);
        words[at + 8] = word(c[0], c[1], c[2], c[3]);
        words[32 + i] = word(h[0], h[1], h[2], h[3]);
    }
    scatter<48>(lanes, 0, words);
}

inline void encode_q6_k(Job& job) {
    for_groups<256, 210>(job, [&](const Lanes& lanes) {
        VF x[256], scale[16], importance[256];
        Symmetric found[16];
        gather<256>(lanes.x, x);
        if (job.weights) gather<256>(lanes.weights, importance);
        for (int j = 0; j < 16; ++j) {
            found[j] = job.weights
                           ? search_symmetric<16, 32, true>(x + 16 * j, importance + 16 * j)
                           : search_symmetric<16, 32, false>(x + 16 * j, nullptr);
            scale[j] = found[j].scale;
        }
        AbsMax peak = abs_max<16>(scale);
        VI zero = peak.amax < kGroupMaxEps, q[256], words[4], ls[16];
        VF inverse = -128.f / peak.value;
        VF d = put_half(lanes, 208, select(zero, VF{}, 1.f / inverse), job);
        for (int j = 0; j < 16; ++j) {
            ls[j] = min(nearest(inverse * scale[j]), splat(127)) << 24 >> 24;
            VF ds = d * to_float(ls[j]);
            VI keep = ds == 0.f;
            for (int e = 16 * j; e < 16 * j + 16; ++e)
                q[e] = clamp(nearest(x[e] / ds), -32, 31) + 32;
            if (any(keep))
                for (int e = 16 * j; e < 16 * j + 16; ++e)
                    q[e] = select(keep, stored_level<32>(found[j], x[e]), q[e]);
            for (int e = 16 * j; e < 16 * j + 16; ++e) q[e] = select(zero, VI{}, q[e]);
            ls[j] = select(zero, VI{}, ls[j] & 255);
        }
        put_q6(lanes, q);
        for (int i = 0; i < 4; ++i)
            words[i] = word(ls[4 * i], ls[4 * i + 1], ls[4 * i + 2], ls[4 * i + 3]);
        scatter<4>(lanes, 192, words);
    });
}

}  // namespace mconv::MCONV_ISA
