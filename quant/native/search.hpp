// The scale searches behind the K-quants, IQ4 and the importance-weighted legacy formats, one lane
// per (sub-)block. Each lane performs the reference algorithm's float operations in its order, and
// every branch is a select, so results are bit-identical.
//
// A search returns scales and what is needed to reproduce the winning integers (`levels`), because
// most formats re-derive them from the rounded scales and need them only where those are zero.
#pragma once

#include "simd.hpp"

namespace mconv::MCONV_ISA {

constexpr float kGroupMaxEps = 1e-15f;  // a block below this magnitude counts as zero

struct AbsMax {
    VF amax, value;  // largest magnitude, and the (first) signed value that has it
};

template <int N>
MCONV_INLINE AbsMax abs_max(const VF* x) {
    AbsMax m = {};
    for (int e = 0; e < N; ++e) {
        VF a = abs(x[e]);
        VI more = a > m.amax;
        m.amax = select(more, a, m.amax);
        m.value = select(more, x[e], m.value);
    }
    return m;
}

// ---- symmetric: levels -NMAX..NMAX-1 --------------------------------------------------------

struct Symmetric {
    VF scale, inverse;  // best scale; inverse scale that produced the winning levels
    VI zero;            // lanes that count as zero: scale 0, and stored level 0 (not NMAX)
};

template <int NMAX>
MCONV_INLINE VF level_signed(VF inverse, VF x) {
    VF l = nearest_small(inverse * x);
    return min(max(l, splat(-float(NMAX))), splat(float(NMAX - 1)));
}

// WEIGHTED: weights w; otherwise x*x.
template <int N, int NMAX, bool WEIGHTED>
MCONV_INLINE Symmetric search_symmetric(const VF* x, const VF* w) {
    AbsMax m = abs_max<N>(x);
    Symmetric r;
    r.zero = m.amax < kGroupMaxEps;
    VF peak = select(r.zero, splat(1.f), m.value), best;
    VF wx[N], ww[N];
    for (int e = 0; e < N; ++e) {
        ww[e] = WEIGHTED ? w[e] : x[e] * x[e];
        wx[e] = ww[e] * x[e];
    }
    for (int k = -1; k < 19; ++k) {  // -1 is the plain start, then the 18 alternatives around it
        if (k == 9) continue;
        const float top = k < 0 ? float(NMAX) : float(NMAX) + 0.1f * float(k - 9);
        VF inverse = -top / peak, lx = {}, l2 = {};
        for (int e = 0; e < N; ++e) {
            VF l = level_signed<NMAX>(inverse, x[e]);
            lx += wx[e] * l;
            l2 += ww[e] * l * l;
        }
        if (k < 0) {
            r.scale = select(l2 != 0.f, lx / l2, VF{});
            best = r.scale * lx;
            r.inverse = inverse;
        } else {
            VI better = (l2 > 0.f) & (lx * lx > best * l2);
            VF scale = lx / l2;
            r.scale = select(better, scale, r.scale);
            best = select(better, scale * lx, best);
            r.inverse = select(better, inverse, r.inverse);
        }
    }
    r.scale = select(r.zero, VF{}, r.scale);
    return r;
}

// The stored (non-negative) level of one element under a symmetric search result.
template <int NMAX>
MCONV_INLINE VI stored_level(const Symmetric& r, VF x) {
    VI l = clamp(nearest(r.inverse * x), -NMAX, NMAX - 1) + NMAX;
    return select(r.zero, VI{}, l);
}

// ---- asymmetric: x = scale * level - minimum, levels 0..NMAX ---------------------------------

struct Asymmetric {
    VF scale, minimum;  // minimum >= 0 is subtracted
    VF inverse, base;   // winning levels are nearest(inverse * (x - base))
    VI flat;            // lanes where every level is 0
};

template <int NMAX, bool EXACT>
MCONV_INLINE VF level_positive(VF inverse, VF shifted) {
    if constexpr (EXACT) return to_float(clamp(nearest(inverse * shifted), 0, NMAX));
    return min(max(nearest_small(inverse * shifted), VF{}), splat(float(NMAX)));
}

template <int N, int NMAX, bool EXACT>
MCONV_INLINE void fill_levels(const VF* x, VF inverse, VF base, VF* level) {
    for (int e = 0; e < N; ++e) level[e] = level_positive<NMAX, EXACT>(inverse, x[e] - base);
}

template <int N, bool MAD>
MCONV_INLINE VF weighted_error(const VF* x, const VF* w, const VF* level, VF scale, VF base) {
    VF error = {};
    for (int e = 0; e < N; ++e) {
        VF diff = scale * level[e] + base - x[e];
        error += w[e] * (MAD ? abs(diff) : diff * diff);
    }
    return error;
}

struct Moments {
    VF l, l2, xl;
};

template <int N, int NMAX, bool EXACT>
MCONV_INLINE Moments moments(const VF* x, const VF* w, VF inverse, VF base, VF* level) {
    Moments s = {};
    for (int e = 0; e < N; ++e) {
        VF l = level_positive<NMAX, EXACT>(inverse, x[e] - base);
        level[e] = l;
        VF wl = w[e] * l;
        s.l += wl;
        s.l2 += wl * l;
        s.xl += wl * x[e];
    }
    return s;
}

// Whether the float shortcut for rounding could leave its range (then integers must wrap instead).
MCONV_INLINE bool needs_exact(VF low, VF base, VF range, VI flat) {
    VI fine = (range > 1e-36f) & (abs(low - base) < 1e4f * range);
    return any(~(fine | flat));
}

template <int N, int NMAX, int STEPS, bool MAD>
Asymmetric search_asymmetric(const VF* x, const VF* w, float rmin, float rdelta) {
    VF low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int e = 1; e < N; ++e) {
        low = smaller(x[e], low);
        high = larger(x[e], high);
        sum_w += w[e];
        sum_x += w[e] * x[e];
    }
    low = select(low > 0.f, VF{}, low);
    Asymmetric r;
    r.flat = high <= low;
    VF base = low, level[N];
    VF inverse = float(NMAX) / (high - base);
    VF scale = 1.f / inverse;
    if (needs_exact(low, base, high - base, r.flat))
        fill_levels<N, NMAX, true>(x, inverse, base, level);
    else
        fill_levels<N, NMAX, false>(x, inverse, base, level);
    VF best = weighted_error<N, MAD>(x, w, level, scale, base);
    r.inverse = inverse;
    r.base = base;
    for (int k = 0; k <= STEPS; ++k) {
        inverse = (rmin + rdelta * float(k) + float(NMAX)) / (high - base);
        Moments s = needs_exact(low, base, high - base, r.flat)
                        ? moments<N, NMAX, true>(x, w, inverse, base, level)
                        : moments<N, NMAX, false>(x, w, inverse, base, level);
        VF det = sum_w * s.l2 - s.l * s.l;
        VF this_scale = (sum_w * s.xl - sum_x * s.l) / det;
        VF this_base = (s.l2 * sum_x - s.l * s.xl) / det;
        VI above = this_base > 0.f;
        this_base = select(above, VF{}, this_base);
        this_scale = select(above, s.xl / s.l2, this_scale);
        VF error = weighted_error<N, MAD>(x, w, level, this_scale, this_base);
        VI better = (det > 0.f) & (error < best) & ~r.flat;
        best = select(better, error, best);
        scale = select(better, this_scale, scale);
        r.inverse = select(better, inverse, r.inverse);
        r.base = select(better, base, r.base);
        base = select(better, this_base, base);
    }
    r.scale = select(r.flat, VF{}, scale);
    r.minimum = -base;
    return r;
}

template <int NMAX>
MCONV_INLINE VI stored_level(const Asymmetric& r, VF x) {
    return select(r.flat, VI{}, clamp(nearest(r.inverse * (x - r.base)), 0, NMAX));
}

// ---- positive: the scales of a super-block, levels 0..NMAX -----------------------------------

// Levels are bytes: a negative level wraps, as it does in the reference.
template <int N, int NMAX>
VF search_positive(const VF* x, const VF* w, VI* level) {
    VF top = {};
    for (int e = 0; e < N; ++e) top = max(top, x[e]);
    VI zero = top < kGroupMaxEps;
    VF safe = select(zero, splat(1.f), top);
    VF inverse = float(NMAX) / safe, scale = 1.f / inverse, best = {};
    for (int e = 0; e < N; ++e) {
        VF diff = x[e] - scale * to_float(nearest(inverse * x[e]) & 255);
        best += w[e] * diff * diff;
    }
    for (int k = -4; k <= 4; ++k) {
        if (k == 0) continue;
        VF trial = (0.1f * float(k) + float(NMAX)) / safe, step = 1.f / trial, error = {};
        for (int e = 0; e < N; ++e) {
            VF diff = x[e] - step * to_float(min(nearest(trial * x[e]), splat(NMAX)));
            error += w[e] * diff * diff;
        }
        VI better = error < best;
        best = select(better, error, best);
        inverse = select(better, trial, inverse);
    }
    VF lx = {}, l2 = {};
    for (int e = 0; e < N; ++e) {
        VI l = min(nearest(inverse * x[e]), splat(NMAX));
        level[e] = l & 255;
        VF f = to_float(l);
        lx += w[e] * x[e] * f;
        l2 += w[e] * f * f;
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        VI changed = {};
        for (int e = 0; e < N; ++e) {
            VF f = to_float(level[e]), wx = w[e] * x[e];
            VF slx = lx - wx * f, sl2 = l2 - w[e] * f * f;
            VI l = min(nearest(x[e] * sl2 / slx), splat(NMAX));
            VI maybe = (slx > 0.f) & (sl2 > 0.f) & (l != level[e]);
            VF g = to_float(l);
            slx += wx * g;
            sl2 += w[e] * g * g;
            maybe &= slx * slx * l2 > lx * lx * sl2;
            level[e] = select(maybe, l & 255, level[e]);
            lx = select(maybe, slx, lx);
            l2 = select(maybe, sl2, l2);
            changed |= maybe;
        }
        if (!any(changed)) break;
    }
    for (int e = 0; e < N; ++e) level[e] = select(zero, VI{}, level[e]);
    return select(zero | ~(l2 > 0.f), VF{}, lx / l2);
}

}  // namespace mconv::MCONV_ISA
