// IQ1_S and IQ1_M: ternary values with a shift of +-1/8, snapped to a grid of 2048 points. The best
// three-way split of the sorted elements is found exhaustively; a lane is a super-block.
#pragma once

#include <cfloat>

#include "legacy.hpp"
#include "neighbour.hpp"

namespace mconv::MCONV_ISA {

// Elements of a sub-block in ascending order (stable), with their weights and original places.
template <int N>
struct Sorted {
    VF x[N], w[N];
    VI index[N];
};

template <int N>
void sort_lanes(const VF* x, const VF* w, Sorted<N>& s) {
    for (int e = 0; e < N; ++e) {
        s.x[e] = x[e];
        s.w[e] = w[e];
        s.index[e] = splat(e);
    }
    auto order = [&](int a, int b) {  // Batcher's network; the place breaks ties
        VI swap = (s.x[a] > s.x[b]) | ((s.x[a] == s.x[b]) & (s.index[a] > s.index[b]));
        VF xa = s.x[a], wa = s.w[a];
        VI ia = s.index[a];
        s.x[a] = select(swap, s.x[b], xa);
        s.x[b] = select(swap, xa, s.x[b]);
        s.w[a] = select(swap, s.w[b], wa);
        s.w[b] = select(swap, wa, s.w[b]);
        s.index[a] = select(swap, s.index[b], ia);
        s.index[b] = select(swap, ia, s.index[b]);
    };
    for (int p = 1; p < N; p *= 2)
        for (int k = p; k >= 1; k /= 2)
            for (int j = k % p; j + k < N; j += 2 * k)
                for (int i = 0; i < k && i + j + k < N; ++i)
                    if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) order(i + j, i + j + k);
}

// A split: sorted elements before `first` are -1, before `second` 0, the rest +1. `shift` numbers
// the combination of shifts.
struct Split {
    VF score, scale;
    VI first, second, shift;
};

MCONV_INLINE Split no_split(VF scale) {
    return {splat(-FLT_MAX), scale, splat(-1), splat(-1), splat(-1)};
}

MCONV_INLINE void consider(Split& best, VF qx, VF q2, int first, int second, int shift) {
    VI better = (q2 > 0.f) & (qx * qx > best.score * q2);
    if (!any(better)) return;
    VF scale = qx / q2;
    best.scale = select(better, scale, best.scale);
    best.score = select(better, scale * qx, best.score);
    best.first = select(better, splat(first), best.first);
    best.second = select(better, splat(second), best.second);
    best.shift = select(better, splat(shift), best.shift);
}

constexpr float kPlus[3] = {-1 + 0.125f, 0.125f, 1 + 0.125f};
constexpr float kMinus[3] = {-1 - 0.125f, -0.125f, 1 - 0.125f};

// One shift for all 32 elements: 1 is plus, 0 is minus.
inline Split split_whole(const VF* x, const VF* w, Sorted<32>& s, VF peak) {
    sort_lanes<32>(x, w, s);
    VF sx[33] = {}, sw[33] = {};
    for (int e = 0; e < 32; ++e) {
        sx[e + 1] = sx[e] + s.w[e] * s.x[e];
        sw[e + 1] = sw[e] + s.w[e];
    }
    const float *p = kPlus, *m = kMinus;
    Split best = no_split(peak);
    for (int a = 0; a <= 32; ++a)
        for (int b = a; b <= 32; ++b) {
            VF mid = sx[b] - sx[a], end = sx[32] - sx[b], mid_w = sw[b] - sw[a];
            VF end_w = sw[32] - sw[b];
            VF qx = sx[a] * p[0] + mid * p[1] + end * p[2];
            VF q2 = sw[a] * p[0] * p[0] + mid_w * p[1] * p[1] + end_w * p[2] * p[2];
            consider(best, qx, q2, a, b, 1);
            qx = sx[a] * m[0] + mid * m[1] + end * m[2];
            q2 = sw[a] * m[0] * m[0] + mid_w * m[1] * m[1] + end_w * m[2] * m[2];
            consider(best, qx, q2, a, b, 0);
        }
    return best;
}

// A shift per half of 16 elements: bit 1 of `shift` is the first half's, bit 0 the second's
// (0 plus, 1 minus).
inline Split split_halves(const VF* x, const VF* w, Sorted<16>& s, VF peak) {
    sort_lanes<16>(x, w, s);
    VF sx[2][17] = {}, sw[2][17] = {};
    for (int e = 0; e < 16; ++e)
        for (int h = 0; h < 2; ++h) {
            VI mine = h ? s.index[e] >= 8 : s.index[e] < 8;
            sx[h][e + 1] = select(mine, sx[h][e] + s.w[e] * s.x[e], sx[h][e]);
            sw[h][e + 1] = select(mine, sw[h][e] + s.w[e], sw[h][e]);
        }
    const float *p = kPlus, *m = kMinus;
    const float p1 = p[0] * p[0] - p[1] * p[1], p2 = p[1] * p[1] - p[2] * p[2];
    const float m1 = m[0] * m[0] - m[1] * m[1], m2 = m[1] * m[1] - m[2] * m[2];
    Split best = no_split(peak);
    for (int a = 0; a <= 16; ++a)
        for (int b = a; b <= 16; ++b) {
            VF qp[2], qm[2], wp[2], wm[2];
            for (int h = 0; h < 2; ++h) {
                VF sum = sx[h][a] + sx[h][b];
                qp[h] = sx[h][16] * p[2] - sum;
                qm[h] = sx[h][16] * m[2] - sum;
                wp[h] = sw[h][16] * p[2] * p[2] + sw[h][a] * p1 + sw[h][b] * p2;
                wm[h] = sw[h][16] * m[2] * m[2] + sw[h][a] * m1 + sw[h][b] * m2;
            }
            consider(best, qp[0] + qp[1], wp[0] + wp[1], a, b, 0);
            consider(best, qp[0] + qm[1], wp[0] + wm[1], a, b, 1);
            consider(best, qm[0] + qp[1], wm[0] + wp[1], a, b, 2);
            consider(best, qm[0] + qm[1], wm[0] + wm[1], a, b, 3);
        }
    return best;
}

template <int GROUPS>
struct Ternary {
    VF scale;
    VI active, shift;       // shift as in the split, after a negative scale was mirrored
    VI point[GROUPS];       // packed levels, on the grid
};

// Turn a split into grid points of 8 and refit the scale where a group was not on the grid.
// minus(shift, group) tells which lanes use the negative shift.
template <int N, class Minus>
void snap_ternary(const Grid& grid, const Levels levels[2], const VF* x, const VF* w,
                  const Sorted<N>& s, const Split& best, VI mirror, int used, Minus minus,
                  Ternary<N / 8>& r) {
    constexpr int groups = N / 8;
    r.active &= best.first >= 0;
    VI negative = best.scale < 0.f;
    r.scale = select(negative, -best.scale, best.scale);
    r.shift = select(negative, mirror - best.shift, best.shift);
    for (int g = 0; g < groups; ++g) r.point[g] = VI{};
    for (int e = 0; e < N; ++e) {
        VI level = 2 + (e < best.second) + (e < best.first);
        level = select(negative, 2 - level, level);
        for (int g = 0; g < groups; ++g) {
            VI here = s.index[e] >> 3 == g;
            r.point[g] |= (level << (2 * (s.index[e] & 7))) & here;
        }
    }
    const float *xs = reinterpret_cast<const float*>(x), *ws = reinterpret_cast<const float*>(w);
    VI missed = {};
    for (int g = 0; g < groups; ++g) {
        VI low = minus(r.shift, g);
        for (int i = 0; i < used; ++i) {
            const int32_t code = grid.map[size_t(r.point[g][i])];
            if (code >= 0 || !r.active[i]) continue;
            missed[i] = -1;
            r.point[g][i] = best_neighbour<8, 2>(grid.lists.data() - code - 1, xs + 8 * g * W + i,
                                                 ws + 8 * g * W + i, r.scale[i],
                                                 levels[low[i] ? 1 : 0].get());
        }
    }
    if (!any(missed)) return;
    VF qx = {}, q2 = {};
    for (int e = 0; e < N; ++e) {
        VF level = to_float((r.point[e / 8] >> (2 * (e % 8)) & 3) - 1);
        VF q = level + select(minus(r.shift, e / 8), splat(-0.125f), splat(0.125f));
        VF wq = w[e] * q;
        qx += wq * x[e];
        q2 += wq * q;
    }
    r.scale = select(missed & (qx > 0.f) & (q2 > 0.f), qx / q2, r.scale);
}

template <int N>
MCONV_INLINE void iq1_weights(const Lanes& lanes, const Job& job, const VF* x, VF* w) {
    if (!job.weights) {
        for (int e = 0; e < N; ++e) w[e] = x[e] * x[e];
        return;
    }
    VF mean = 2.f * sum_squares<N>(x) / float(N);
    gather<N>(lanes.weights, w);
    error_weights<N>(job, x, w, mean, w);
}

template <int N>
MCONV_INLINE VF peak_magnitude(const VF* x) {
    VF peak = {};
    for (int e = 0; e < N; ++e) peak = max(peak, abs(x[e]));
    return peak;
}

inline void encode_iq1_s(Job& job) {
    const Grid& grid = grid_of(19);
    const Levels levels[2] = {make_levels<2>([](int l) { return kPlus[l < 3 ? l : 0]; }),
                              make_levels<2>([](int l) { return kMinus[l < 3 ? l : 0]; })};
    for_groups<256, 50>(job, [&](const Lanes& lanes) {
        VF x[256], w[256], top = {};
        Ternary<4> sub[8];
        gather<256>(lanes.x, x);
        iq1_weights<256>(lanes, job, x, w);
        for (int b = 0; b < 8; ++b) {
            const VF *xs = x + 32 * b, *ws = w + 32 * b;
            VF peak = peak_magnitude<32>(xs);
            Sorted<32> s;
            Split best = split_whole(xs, ws, s, peak);
            sub[b].active = ~(peak < 1e-12f);
            snap_ternary<32>(grid, levels, xs, ws, s, best, splat(1), lanes.used,
                             [](VI shift, int) { return shift == 0; }, sub[b]);
            sub[b].scale = select(sub[b].active, sub[b].scale, VF{});
            top = larger(sub[b].scale, top);
        }
        VI some = top != 0.f;
        VF d = top / 15.f, inverse = 1.f / d;
        put_half(lanes, 0, select(some, d * 1.125f, VF{}), job);
        for (int b = 0; b < 8; ++b) {
            VI level = clamp(nearest(0.5f * (inverse * sub[b].scale - 1.f)), 0, 7);
            level = (level | (sub[b].active & (sub[b].shift == 0) & 8)) & some;
            for (int i = 0; i < lanes.used; ++i) {
                uint16_t high = uint16_t(level[i] << 12);
                for (int g = 0; g < 4; ++g) {
                    int code = sub[b].active[i] ? grid.map[size_t(sub[b].point[g][i])] : 0;
                    lanes.out[i][2 + 4 * b + g] = uint8_t(code);
                    high |= uint16_t(code >> 8 << 3 * g);
                }
                std::memcpy(lanes.out[i] + 34 + 2 * b, &high, 2);
            }
        }
    });
}

// The block scale is refitted over all elements once the sub-block scales are rounded.
MCONV_INLINE VF refit_iq1_m(const VF* x, const VF* w, const Ternary<2>* sub, const VI* level,
                            VF unfitted) {
    VF qx = {}, q2 = {};
    for (int e = 0; e < 256; ++e) {
        const Ternary<2>& s = sub[e / 16];
        const int g = e / 8 % 2;
        VI minus = (s.shift & (g ? 1 : 2)) != 0;
        VF unit = to_float((s.point[g] >> (2 * (e % 8)) & 3) - 1);
        VF q = unit + select(minus, splat(-0.125f), splat(0.125f));
        q = q * to_float(2 * level[e / 16] + 1);
        VF wq = w[e] * q;
        qx += wq * x[e];
        q2 += wq * q;
    }
    return select(q2 > 0.f, qx / q2, unfitted);
}

inline void encode_iq1_m(Job& job) {
    const Grid& grid = grid_of(29);
    const Levels levels[2] = {make_levels<2>([](int l) { return kPlus[l < 3 ? l : 0]; }),
                              make_levels<2>([](int l) { return kMinus[l < 3 ? l : 0]; })};
    for_groups<256, 56>(job, [&](const Lanes& lanes) {
        VF x[256], w[256], top = {};
        VI level[16];
        Ternary<2> sub[16];
        gather<256>(lanes.x, x);
        iq1_weights<256>(lanes, job, x, w);
        for (int b = 0; b < 16; ++b) {
            const VF *xs = x + 16 * b, *ws = w + 16 * b;
            VF peak = peak_magnitude<16>(xs);
            Sorted<16> s;
            Split best = split_halves(xs, ws, s, peak);
            sub[b].active = ~(peak < 1e-7f);
            snap_ternary<16>(grid, levels, xs, ws, s, best, splat(3), lanes.used,
                             [](VI shift, int g) { return (shift & (g ? 1 : 2)) != 0; }, sub[b]);
            sub[b].scale = select(sub[b].active, sub[b].scale, VF{});
            sub[b].shift &= sub[b].active;
            for (int g = 0; g < 2; ++g)
                sub[b].point[g] = select(sub[b].active, sub[b].point[g], splat(grid.point[0]));
            top = larger(sub[b].scale, top);
        }
        VI some = top != 0.f;
        VF d = top / 15.f, inverse = 1.f / d;
        for (int b = 0; b < 16; ++b)
            level[b] = clamp(nearest(0.5f * (inverse * sub[b].scale - 1.f)), 0, 7) & some;
        d = refit_iq1_m(x, w, sub, level, d);
        for (int i = 0; i < lanes.used; ++i) {
            uint8_t* out = lanes.out[i];
            uint16_t half = float_to_half(d[i] * 1.1125f);
            std::memset(out, 0, 56);
            if (!some[i]) continue;
            job.overflow |= (half & 0x7c00) == 0x7c00;
            uint16_t scales[4];
            for (int k = 0; k < 4; ++k) {
                scales[k] = uint16_t((half >> (4 * k) & 15) << 12);
                for (int b = 0; b < 4; ++b) scales[k] |= uint16_t(level[4 * k + b][i] << 3 * b);
            }
            std::memcpy(out + 48, scales, 8);
            for (int b = 0; b < 16; ++b) {
                const int shift = sub[b].shift[i];
                int high = (shift & 1 ? 0x80 : 0) | (shift & 2 ? 0x08 : 0);
                for (int g = 0; g < 2; ++g) {
                    int code = grid.map[size_t(sub[b].point[g][i])];
                    out[2 * b + g] = uint8_t(code);
                    high |= code >> 8 << 4 * g;
                }
                out[32 + b] = uint8_t(high);
            }
        }
    });
}

}  // namespace mconv::MCONV_ISA
