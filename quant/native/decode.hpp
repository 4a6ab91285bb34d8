// Decoders of every format without a grid: one block at a time, in loops the compiler vectorises.
// Each value is computed with the reference decoder's operations.
#pragma once

#include "iq4.hpp"
#include "tiny.hpp"

namespace mconv::MCONV_ISA {

MCONV_INLINE float read_half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return half_to_float(h);
}

template <int BLOCK, int BYTES, class One>
MCONV_INLINE void each_block(const uint8_t* in, int64_t blocks, float* out, One one) {
    for (int64_t i = 0; i < blocks; ++i) one(in + i * BYTES, out + i * BLOCK);
}

// Q4_0, Q4_1, Q5_0, Q5_1: nibbles at QS, fifth bits at QH (or -1), minimum at 2 or a fixed offset.
template <int BYTES, int QS, int QH, bool MIN, int OFFSET>
void decode_nibbles(const uint8_t* in, int64_t blocks, float* out) {
    each_block<32, BYTES>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b), m = MIN ? read_half(b + 2) : 0;
        int32_t q[32];
        uint32_t high = 0;
        if (QH >= 0) std::memcpy(&high, b + (QH < 0 ? 0 : QH), 4);
        for (int j = 0; j < 16; ++j) {
            q[j] = b[QS + j] & 15;
            q[j + 16] = b[QS + j] >> 4;
        }
        for (int j = 0; j < 32; ++j) {
            if (QH >= 0) q[j] |= int32_t(high >> j & 1) << 4;
            y[j] = MIN ? float(q[j]) * d + m : float(q[j] - OFFSET) * d;
        }
    });
}

inline void decode_q8_0(const uint8_t* in, int64_t blocks, float* out) {
    each_block<32, 34>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int j = 0; j < 32; ++j) y[j] = float(int8_t(b[2 + j])) * d;
    });
}

inline void decode_q2_k(const uint8_t* in, int64_t blocks, float* out) {
    each_block<256, 84>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b + 80), m = read_half(b + 82);
        for (int g = 0; g < 16; ++g) {  // 16 elements each
            const float dl = d * float(b[g] & 15), ml = m * float(b[g] >> 4);
            const uint8_t* q = b + 16 + 32 * (g / 8) + 16 * (g % 2);
            const int shift = 2 * (g % 8 / 2);
            for (int l = 0; l < 16; ++l) y[16 * g + l] = dl * float(q[l] >> shift & 3) - ml;
        }
    });
}

inline void decode_q3_k(const uint8_t* in, int64_t blocks, float* out) {
    each_block<256, 110>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b + 108);
        const uint8_t* s = b + 96;
        for (int g = 0; g < 16; ++g) {
            const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4;
            const int scale = low | (s[8 + g % 4] >> 2 * (g / 4) & 3) << 4;
            const float dl = d * float(scale - 32);
            const uint8_t *q = b + 32 + 32 * (g / 8) + 16 * (g % 2), *h = b + 16 * (g % 2);
            const int shift = 2 * (g % 8 / 2), bit = g / 2;
            for (int l = 0; l < 16; ++l)
                y[16 * g + l] = dl * float(int(q[l] >> shift & 3) - 4 + 4 * (h[l] >> bit & 1));
        }
    });
}

template <int BITS>
void decode_q45_k(const uint8_t* in, int64_t blocks, float* out) {
    each_block<256, BITS == 4 ? 144 : 176>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b), m = read_half(b + 2);
        const uint8_t *s = b + 4, *high = b + 16, *qs = b + (BITS == 4 ? 16 : 48);
        for (int g = 0; g < 8; ++g) {  // 32 elements each
            const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | s[g - 4] >> 6 << 4;
            const int low = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | s[g] >> 6 << 4;
            const float dl = d * float(scale), ml = m * float(low);
            const uint8_t* q = qs + 32 * (g / 2);
            const int shift = 4 * (g % 2);
            for (int l = 0; l < 32; ++l) {
                int v = q[l] >> shift & 15;
                if (BITS == 5) v += (high[l] >> g & 1) << 4;
                y[32 * g + l] = dl * float(v) - ml;
            }
        }
    });
}

inline void decode_q6_k(const uint8_t* in, int64_t blocks, float* out) {
    each_block<256, 210>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b + 208);
        for (int g = 0; g < 16; ++g) {
            const int half = g / 8, part = g % 8 / 2, at = 16 * (g % 2);
            const float dl = d * float(int8_t(b[192 + g]));
            const uint8_t* low = b + 64 * half + 32 * (part % 2) + at;
            const uint8_t* high = b + 128 + 32 * half + at;
            const int shift = part / 2 * 4, up = 2 * part;
            for (int l = 0; l < 16; ++l)
                y[16 * g + l] = dl * float(((low[l] >> shift & 15) | (high[l] >> up & 3) << 4) - 32);
        }
    });
}

// 16 bytes of indices into a table of 16 values, scaled.
MCONV_INLINE void decode_table(const uint8_t* q, const float* table, float d, int half, float* y) {
    for (int j = 0; j < half; ++j) {
        y[j] = d * table[q[j] & 15];
        y[j + half] = d * table[q[j] >> 4];
    }
}

inline void decode_iq4_nl(const uint8_t* in, int64_t blocks, float* out) {
    each_block<32, 18>(in, blocks, out, [](const uint8_t* b, float* y) {
        decode_table(b + 2, kIq4, read_half(b), 16, y);
    });
}

inline void decode_iq4_xs(const uint8_t* in, int64_t blocks, float* out) {
    each_block<256, 136>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b);
        const int high = b[2] | b[3] << 8;
        for (int g = 0; g < 8; ++g) {
            const int scale = (b[4 + g / 2] >> 4 * (g % 2) & 15) | (high >> 2 * g & 3) << 4;
            decode_table(b + 8 + 16 * g, kIq4, d * float(scale - 32), 16, y + 32 * g);
        }
    });
}

constexpr float kE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline void decode_mxfp4(const uint8_t* in, int64_t blocks, float* out) {
    each_block<32, 17>(in, blocks, out, [](const uint8_t* b, float* y) {
        decode_table(b + 1, kE2m1, mx_half(b[0]), 16, y);
    });
}

inline void decode_nvfp4(const uint8_t* in, int64_t blocks, float* out) {
    each_block<64, 36>(in, blocks, out, [](const uint8_t* b, float* y) {
        for (int s = 0; s < 4; ++s)
            decode_table(b + 4 + 8 * s, kE2m1, e4m3_to_float(b[s]), 8, y + 16 * s);
    });
}

// Trits 0..COUNT-1 of `n` bytes, most significant first, at stride n.
template <int COUNT>
MCONV_INLINE void decode_trits(const uint8_t* q, int n, float d, float* y) {
    constexpr uint8_t power[5] = {1, 3, 9, 27, 81};
    for (int t = 0; t < COUNT; ++t)
        for (int j = 0; j < n; ++j) {
            const uint8_t v = uint8_t(q[j] * power[t]);
            y[t * n + j] = float(int(v * 3 >> 8) - 1) * d;
        }
}

inline void decode_tq1_0(const uint8_t* in, int64_t blocks, float* out) {
    each_block<256, 54>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b + 52);
        decode_trits<5>(b, 32, d, y);
        decode_trits<5>(b + 32, 16, d, y + 160);
        decode_trits<4>(b + 48, 4, d, y + 240);
    });
}

inline void decode_tq2_0(const uint8_t* in, int64_t blocks, float* out) {
    each_block<256, 66>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b + 64);
        for (int g = 0; g < 8; ++g)
            for (int l = 0; l < 32; ++l)
                y[32 * g + l] = float(int(b[32 * (g / 4) + l] >> 2 * (g % 4) & 3) - 1) * d;
    });
}

inline void decode_q1_0(const uint8_t* in, int64_t blocks, float* out) {
    each_block<128, 18>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int j = 0; j < 16; ++j)
            for (int k = 0; k < 8; ++k) y[8 * j + k] = b[2 + j] >> k & 1 ? d : -d;
    });
}

inline void decode_q2_0(const uint8_t* in, int64_t blocks, float* out) {
    each_block<64, 18>(in, blocks, out, [](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int j = 0; j < 16; ++j)
            for (int k = 0; k < 4; ++k) y[4 * j + k] = float(int(b[2 + j] >> 2 * k & 3) - 1) * d;
    });
}

}  // namespace mconv::MCONV_ISA
