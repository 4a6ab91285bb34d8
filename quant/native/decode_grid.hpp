// Decoders of IQ1, IQ2 and IQ3: grid points, signs and scales.
#pragma once

#include "decode.hpp"
#include "grid.hpp"

namespace mconv::MCONV_ISA {

// Seven stored sign bits; the eighth makes their number even.
MCONV_INLINE unsigned even_signs(unsigned s) { return s | unsigned(__builtin_parity(s)) << 7; }

// Eight values of a grid row (or two rows of four) times d, with signs.
MCONV_INLINE void put_signed(const float* a, const float* b, float d, unsigned signs, float* y) {
    for (int j = 0; j < 8; ++j) {
        const float v = j < 4 ? a[j] : b[j - 4];
        const uint32_t flip = (signs >> j & 1) << 31;
        float r = d * v;
        uint32_t u;
        std::memcpy(&u, &r, 4);
        u ^= flip;
        std::memcpy(y + j, &u, 4);
    }
}

inline void decode_iq2_xxs(const uint8_t* in, int64_t blocks, float* out) {
    const float* grid = grid_of(16).value.data();
    each_block<256, 66>(in, blocks, out, [grid](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int g = 0; g < 8; ++g) {
            const uint8_t* q = b + 2 + 8 * g;
            uint32_t s;
            std::memcpy(&s, q + 4, 4);
            const float dl = d * (0.5f + float(s >> 28)) * 0.25f;
            for (int l = 0; l < 4; ++l) {
                const float* p = grid + 8 * q[l];
                put_signed(p, p + 4, dl, even_signs(s >> 7 * l & 127), y + 32 * g + 8 * l);
            }
        }
    });
}

inline void decode_iq2_xs(const uint8_t* in, int64_t blocks, float* out) {
    const float* grid = grid_of(17).value.data();
    each_block<256, 74>(in, blocks, out, [grid](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int l = 0; l < 32; ++l) {  // 8 elements each, two share a scale
            const unsigned q = b[2 + 2 * l] | unsigned(b[3 + 2 * l]) << 8;
            const int scale = b[66 + l / 4] >> 4 * (l / 2 % 2) & 15;
            const float* p = grid + 8 * (q & 511);
            put_signed(p, p + 4, d * (0.5f + float(scale)) * 0.25f, even_signs(q >> 9), y + 8 * l);
        }
    });
}

inline void decode_iq2_s(const uint8_t* in, int64_t blocks, float* out) {
    const float* grid = grid_of(22).value.data();
    each_block<256, 82>(in, blocks, out, [grid](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int l = 0; l < 32; ++l) {
            const unsigned code = b[2 + l] | unsigned(b[66 + l / 4] >> 2 * (l % 4) & 3) << 8;
            const int scale = b[74 + l / 4] >> 4 * (l / 2 % 2) & 15;
            const float* p = grid + 8 * code;
            put_signed(p, p + 4, d * (0.5f + float(scale)) * 0.25f, b[34 + l], y + 8 * l);
        }
    });
}

inline void decode_iq3_xxs(const uint8_t* in, int64_t blocks, float* out) {
    const float* grid = grid_of(18).value.data();
    each_block<256, 98>(in, blocks, out, [grid](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int l = 0; l < 32; ++l) {
            uint32_t s;
            std::memcpy(&s, b + 66 + 4 * (l / 4), 4);
            const float dl = d * (0.5f + float(s >> 28)) * 0.5f;
            put_signed(grid + 4 * b[2 + 2 * l], grid + 4 * b[3 + 2 * l], dl,
                       even_signs(s >> 7 * (l % 4) & 127), y + 8 * l);
        }
    });
}

inline void decode_iq3_s(const uint8_t* in, int64_t blocks, float* out) {
    const float* grid = grid_of(21).value.data();
    each_block<256, 110>(in, blocks, out, [grid](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int l = 0; l < 32; ++l) {
            const unsigned high = b[66 + l / 4] >> 2 * (l % 4);
            const int scale = b[106 + l / 8] >> 4 * (l / 4 % 2) & 15;
            put_signed(grid + 4 * (b[2 + 2 * l] | (high & 1) << 8),
                       grid + 4 * (b[3 + 2 * l] | (high & 2) << 7), d * float(1 + 2 * scale),
                       b[74 + l], y + 8 * l);
        }
    });
}

MCONV_INLINE void put_shifted(const float* p, float d, bool minus, float* y) {
    const float delta = minus ? -0.125f : 0.125f;
    for (int j = 0; j < 8; ++j) y[j] = d * (p[j] + delta);
}

inline void decode_iq1_s(const uint8_t* in, int64_t blocks, float* out) {
    const float* grid = grid_of(19).value.data();
    each_block<256, 50>(in, blocks, out, [grid](const uint8_t* b, float* y) {
        const float d = read_half(b);
        for (int g = 0; g < 8; ++g) {
            const unsigned h = b[34 + 2 * g] | unsigned(b[35 + 2 * g]) << 8;
            const float dl = d * float(2 * (h >> 12 & 7) + 1);
            for (int l = 0; l < 4; ++l)
                put_shifted(grid + 8 * (b[2 + 4 * g + l] | (h >> 3 * l & 7) << 8), dl, h >> 15,
                            y + 32 * g + 8 * l);
        }
    });
}

inline void decode_iq1_m(const uint8_t* in, int64_t blocks, float* out) {
    const float* grid = grid_of(29).value.data();
    each_block<256, 56>(in, blocks, out, [grid](const uint8_t* b, float* y) {
        uint16_t s[4], half = 0;
        std::memcpy(s, b + 48, 8);
        for (int k = 0; k < 4; ++k) half |= uint16_t(s[k] >> 12 << 4 * k);
        const float d = half_to_float(half);
        for (int g = 0; g < 16; ++g) {
            const float dl = d * float(2 * (s[g / 4] >> 3 * (g % 4) & 7) + 1);
            for (int l = 0; l < 2; ++l) {
                const unsigned h = b[32 + g] >> 4 * l;
                put_shifted(grid + 8 * (b[2 * g + l] | (h & 7) << 8), dl, h & 8,
                            y + 16 * g + 8 * l);
            }
        }
    });
}

}  // namespace mconv::MCONV_ISA
