// IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: magnitudes snapped to a grid of points, signs apart,
// odd multiples of a sub-block scale. A lane is a super-block; scale candidates are tried for all
// lanes at once, and groups that miss the grid are snapped one by one.
#pragma once

#include "legacy.hpp"
#include "neighbour.hpp"
#include "search.hpp"

namespace mconv::MCONV_ISA {

// What differs between the formats.
struct Iq2Xxs {
    static constexpr int type = 16, bytes = 66, block = 32, dims = 8, bits = 2, levels = 3, tries = 6;
    static constexpr float step = 0.1f, epsilon = 1e-15f, mean = 1.f, fudge = 1.f;
    static constexpr bool parity = true, search_first = true, refit_all = true;
};
struct Iq2Xs {
    static constexpr int type = 17, bytes = 74, block = 16, dims = 8, bits = 2, levels = 3, tries = 9;
    static constexpr float step = 0.1f, epsilon = 1e-15f, mean = 1.f, fudge = 1.f;
    static constexpr bool parity = true, search_first = false, refit_all = false;
};
struct Iq2S {
    static constexpr int type = 22, bytes = 82, block = 16, dims = 8, bits = 2, levels = 3, tries = 9;
    static constexpr float step = 0.1f, epsilon = 1e-8f, mean = 2.f, fudge = 0.9875f;
    static constexpr bool parity = false, search_first = false, refit_all = false;
};
struct Iq3Xxs {
    static constexpr int type = 18, bytes = 98, block = 32, dims = 4, bits = 3, levels = 8, tries = 15;
    static constexpr float step = 0.2f, epsilon = 1e-8f, mean = 2.f, fudge = 1.0125f;
    static constexpr bool parity = true, search_first = false, refit_all = false;
};
struct Iq3S {
    static constexpr int type = 21, bytes = 110, block = 32, dims = 4, bits = 3, levels = 8, tries = 9;
    static constexpr float step = 0.2f, epsilon = 0.f, mean = 2.f, fudge = 1.033f;
    static constexpr bool parity = false, search_first = false, refit_all = true;
};

template <class F>
struct SubBlock {
    static constexpr int groups = F::block / F::dims;
    VI point[groups];         // packed levels
    VI sign[F::block / 8];    // sign bits of 8 elements
    VF scale;
    VI active;                // lanes above the zero threshold
};

// Strip signs; where a format stores only 7 of 8 sign bits, flip the cheapest element of a group
// with an odd count of minus signs.
template <class F>
MCONV_INLINE void strip_signs(const VF* x, const VF* w, VF* magnitude, VI* sign) {
    for (int k = 0; k < F::block / 8; ++k) {
        const VF *xs = x + 8 * k, *ws = w + 8 * k;
        VF* m = magnitude + 8 * k;
        VI s = {}, odd = {}, cheapest = {};
        VF low = ws[0] * xs[0] * xs[0];
        for (int i = 0; i < 8; ++i) {
            VI minus = ~(xs[i] >= 0.f);
            m[i] = select(minus, -xs[i], xs[i]);
            s |= minus & (1 << i);
            odd ^= minus;
            VF cost = ws[i] * xs[i] * xs[i];
            VI lower = cost < low;
            low = select(lower, cost, low);
            cheapest = select(lower, splat(i), cheapest);
        }
        if (F::parity) {
            for (int i = 0; i < 8; ++i) {
                VI flip = odd & (cheapest == i);
                m[i] = select(flip, -m[i], m[i]);
                s ^= flip & (1 << i);
            }
            s &= 127;
        }
        sign[k] = s;
    }
}

template <class F>
MCONV_INLINE void round_levels(const VF* m, VF inverse, VI* point) {
    for (int g = 0; g < F::block / F::dims; ++g) {
        point[g] = VI{};
        for (int i = 0; i < F::dims; ++i) {
            VI l = clamp(nearest(0.5f * (inverse * m[g * F::dims + i] - 1.f)), 0, F::levels - 1);
            point[g] |= l << (F::bits * i);
        }
    }
}

// Snap the groups of lanes in `wanted` that miss the grid; on_grid tells which did not.
template <class F>
MCONV_INLINE void snap(const Grid& grid, const Levels& levels, const VF* m, const VF* root,
                       VF scale, VI wanted, int used, VI* point, VI* on_grid) {
    const float* x = reinterpret_cast<const float*>(m);
    const float* w = reinterpret_cast<const float*>(root);
    for (int g = 0; g < F::block / F::dims; ++g) {
        const int at = g * F::dims * W;
        on_grid[g] = splat(-1);
        for (int i = 0; i < used; ++i) {
            const int32_t code = grid.map[size_t(point[g][i])];
            if (code >= 0 || !wanted[i]) continue;
            on_grid[g][i] = 0;
            point[g][i] = best_neighbour<F::dims, F::bits>(grid.lists.data() - code - 1, x + at + i,
                                                           w + at + i, scale[i], levels.get());
        }
    }
}

template <class F>
MCONV_INLINE void fit(const VF* w, const VF* wx, const VI* point, VF* qx, VF* q2) {
    *qx = *q2 = VF{};
    for (int e = 0; e < F::block; ++e) {
        VI l = point[e / F::dims] >> (F::bits * (e % F::dims)) & ((1 << F::bits) - 1);
        VF q = to_float(2 * l + 1);
        *qx += wx[e] * q;
        *q2 += w[e] * q * q;
    }
}

template <class F>
void search_grid(const Grid& grid, const Levels& levels, const VF* x, const VF* w, int used,
                 SubBlock<F>& r) {
    constexpr int n = F::block, groups = SubBlock<F>::groups, top = 2 * F::levels - 1;
    VF m[n], root[n], wx[n];
    strip_signs<F>(x, w, m, r.sign);
    VF peak = m[0];
    for (int e = 0; e < n; ++e) {
        root[e] = sqrt(w[e]);
        wx[e] = w[e] * m[e];
        peak = select(peak > m[e], peak, m[e]);
    }
    r.active = F::epsilon > 0 ? ~(peak < F::epsilon) : peak != 0.f;
    VF denominator = peak;
    r.scale = peak / float(top);
    if constexpr (F::search_first) {
        VI unused[n];
        r.scale = search_positive<n, F::levels + 1>(m, w, unused);
        denominator = r.scale * float(F::levels);
        r.active &= denominator > 0.f;
    }
    VF best = {};
    VI good[groups], point[groups], on_grid[groups];
    for (int g = 0; g < groups; ++g) {
        r.point[g] = VI{};
        good[g] = splat(F::refit_all ? 0 : -1);
    }
    for (int k = -F::tries; k <= F::tries; ++k) {
        VF inverse = (float(top) + float(k) * F::step) / denominator, qx, q2;
        round_levels<F>(m, inverse, point);
        snap<F>(grid, levels, m, root, 1.f / inverse, r.active, used, point, on_grid);
        fit<F>(w, wx, point, &qx, &q2);
        VI better = (q2 > 0.f) & (qx * qx > best * q2) & r.active;
        VF scale = qx / q2;
        r.scale = select(better, scale, r.scale);
        best = select(better, scale * qx, best);
        for (int g = 0; g < groups; ++g) {
            r.point[g] = select(better, point[g], r.point[g]);
            good[g] = select(better, on_grid[g], good[g]);
        }
    }
    // Refit: groups that missed the grid (or all) are rounded again with the final scale.
    VI missed = {};
    for (int g = 0; g < groups; ++g) missed |= ~good[g];
    if (F::search_first) missed = splat(-1);
    VI again = missed & (r.scale > 0.f) & r.active;
    if (any(again)) {
        VF qx, q2;
        round_levels<F>(m, 1.f / r.scale, point);
        VI redo[groups];
        for (int g = 0; g < groups; ++g) redo[g] = F::refit_all ? again : again & ~good[g];
        for (int g = 0; g < groups; ++g) point[g] = select(redo[g], point[g], r.point[g]);
        snap<F>(grid, levels, m, root, r.scale, again, used, point, on_grid);
        for (int g = 0; g < groups; ++g) r.point[g] = select(redo[g], point[g], r.point[g]);
        fit<F>(w, wx, r.point, &qx, &q2);
        r.scale = select(again & (q2 > 0.f), qx / q2, r.scale);
    }
    VI negative = r.scale < 0.f;
    r.scale = select(r.active, select(negative, -r.scale, r.scale), VF{});
    for (int k = 0; k < n / 8; ++k)
        r.sign[k] = (r.sign[k] ^ (negative & (F::parity ? 127 : 255))) & r.active;
}

// Byte positions of each format.
template <class F>
MCONV_INLINE void put_grid_codes(uint8_t* out, const Grid& grid, const SubBlock<F>* sub, int lane,
                                 const int* level, bool compact) {
    constexpr int groups = SubBlock<F>::groups, blocks = 256 / F::block;
    std::memset(out + 2, 0, F::bytes - 2);
    // ggml's IQ3_S encoder does not step over an all-zero sub-block, so the codes and signs of the
    // following ones move up (and decode wrongly). `compact` promises its bytes.
    int place = 0;
    for (int b = 0; b < blocks; ++b) {
        const SubBlock<F>& s = sub[b];
        if (compact && !s.active[lane]) continue;
        uint32_t signs = 0;
        for (int k = 0; k < F::block / 8 && F::parity; ++k) signs |= uint32_t(s.sign[k][lane]) << 7 * k;
        if (F::type == 16 || F::type == 18) {
            signs |= uint32_t(level[b]) << 28;
            std::memcpy(out + (F::type == 16 ? 2 + 8 * b + 4 : 66 + 4 * b), &signs, 4);
        }
        for (int g = 0; g < groups; ++g) {
            const int at = groups * b + g;
            const int code = s.active[lane] ? grid.map[size_t(s.point[g][lane])] : 0;
            if (F::type == 16) out[2 + 8 * b + g] = uint8_t(code);
            if (F::type == 17) {
                uint16_t c = uint16_t(code | s.sign[g][lane] << 9);
                std::memcpy(out + 2 + 2 * at, &c, 2);
            }
            if (F::type == 22) {
                out[2 + at] = uint8_t(code);
                out[34 + at] = uint8_t(s.sign[g][lane]);
                out[66 + at / 4] |= uint8_t(code >> 8 << 2 * (at % 4));
            }
            if (F::type == 18) out[2 + at] = uint8_t(code);
            if (F::type == 21) out[2 + groups * place + g] = uint8_t(code);
            if (F::type == 21) out[66 + at / 8] |= uint8_t(code >> 8 << at % 8);
        }
        if (F::type == 21)
            for (int k = 0; k < 4; ++k) out[74 + 4 * place + k] = uint8_t(s.sign[k][lane]);
        ++place;
    }
    const int scales = F::type == 17 ? 66 : F::type == 22 ? 74 : 106;
    if (F::type == 17 || F::type == 21 || F::type == 22)
        for (int b = 0; b < blocks; ++b) out[scales + b / 2] |= uint8_t(level[b] << 4 * (b % 2));
}

template <class F>
void encode_grid(Job& job) {
    const Grid& grid = grid_of(F::type);
    const Levels levels = make_levels<F::bits>([](int l) { return float(2 * l + 1); });
    constexpr int blocks = 256 / F::block;
    for_groups<256, F::bytes>(job, [&](const Lanes& lanes) {
        VF x[256], w[256], mean, top = {};
        SubBlock<F> sub[blocks];
        gather<256>(lanes.x, x);
        mean = F::mean * sum_squares<256>(x) / 256.f;
        if (job.weights) {
            gather<256>(lanes.weights, w);
            error_weights<256>(job, x, w, mean, w);
        } else {
            for (int e = 0; e < 256; ++e)
                w[e] = F::type == 22 ? 0.25f * mean + x[e] * x[e] : x[e] * x[e];
        }
        for (int b = 0; b < blocks; ++b) {
            search_grid<F>(grid, levels, x + F::block * b, w + F::block * b, lanes.used, sub[b]);
            top = larger(sub[b].scale, top);
        }
        VI some = top != 0.f;
        VF d = top / 31.f, inverse = 1.f / d;
        put_half(lanes, 0, select(some, d * F::fudge, VF{}), job);
        VI level[blocks];
        for (int b = 0; b < blocks; ++b)
            level[b] = clamp(nearest(0.5f * (inverse * sub[b].scale - 1.f)), 0, 15) & some;
        for (int i = 0; i < lanes.used; ++i) {
            int own[blocks];
            for (int b = 0; b < blocks; ++b) own[b] = level[b][i];
            put_grid_codes<F>(lanes.out[i], grid, sub, i, own, F::type == 21 && !job.pure);
        }
    });
}

}  // namespace mconv::MCONV_ISA
