// A group is W blocks side by side: element e of lane i is x[e][i]. Loading transposes rows of
// memory into lanes; storing collects four bytes per lane into a 32-bit word and scatters words.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace mconv::MCONV_ISA {

struct Lanes {
    const float* x[W];        // first element of each lane's block
    const float* weights[W];  // importance of that element, or null
    uint8_t* out[W];          // encoded block
    float row_mean[W];        // mean of x*x over the lane's row (only where a format asks for it)
    int used;                 // lanes that hold a block; the rest repeat lane 0
};

template <int N>
MCONV_INLINE void gather(const float* const* from, VF* to) {
    float* t = reinterpret_cast<float*>(to);
    for (int i = 0; i < W; ++i)
        for (int e = 0; e < N; ++e) t[e * W + i] = from[i][e];
}

// Words of four consecutive bytes from four vectors holding one byte value each.
MCONV_INLINE VI word(VI a, VI b, VI c, VI d) { return a | b << 8 | c << 16 | d << 24; }

template <int N>
MCONV_INLINE void scatter(const Lanes& lanes, int offset, const VI* words) {
    const int32_t* w = reinterpret_cast<const int32_t*>(words);
    for (int i = 0; i < lanes.used; ++i)
        for (int e = 0; e < N; ++e) std::memcpy(lanes.out[i] + offset + 4 * e, &w[e * W + i], 4);
}

// Store one float16 per lane; returns the value that a reader will see.
MCONV_INLINE VF put_half(const Lanes& lanes, int offset, VF value, Job& job) {
    VF stored;
    for (int i = 0; i < W; ++i) {
        uint16_t h = float_to_half(value[i]);
        stored[i] = half_to_float(h);
        if (i < lanes.used) {
            std::memcpy(lanes.out[i] + offset, &h, 2);
            job.overflow |= (h & 0x7c00) == 0x7c00;
        }
    }
    return stored;
}

// Call encode(lanes) for every W blocks of `block` elements of the job's rows.
template <int BLOCK, int BYTES, class Encode>
void for_groups(Job& job, Encode encode) {
    const int64_t per_row = job.cols / BLOCK, count = per_row * job.rows;
    Lanes lanes;
    for (int64_t first = 0; first < count; first += W) {
        lanes.used = int(count - first < W ? count - first : W);
        for (int i = 0; i < W; ++i) {
            int64_t b = first + (i < lanes.used ? i : 0);
            lanes.x[i] = job.x + b * BLOCK;
            lanes.weights[i] = job.weights ? job.weights + b % per_row * BLOCK : nullptr;
            lanes.out[i] = job.out + b * BYTES;
            lanes.row_mean[i] = job.row_mean ? job.row_mean[b / per_row] : 0;
        }
        encode(lanes);
    }
}

// Sequential sum of squares of N elements per lane, in element order as the reference sums.
template <int N>
MCONV_INLINE VF sum_squares(const VF* x) {
    VF s = {};
    for (int e = 0; e < N; ++e) s += x[e] * x[e];
    return s;
}

}  // namespace mconv::MCONV_ISA
