// One instruction set's table of kernels. Compiled once per set, with MCONV_ISA naming it and the
// matching -m flags; everything inside has that name's namespace, so nothing leaks between sets.
#include "kernels.hpp"

#include "casts.hpp"
#include "decode.hpp"
#include "decode_grid.hpp"
#include "full.hpp"
#include "iq1.hpp"
#include "iq23.hpp"
#include "iq4.hpp"
#include "kquants.hpp"
#include "legacy.hpp"
#include "tiny.hpp"

#define MCONV_TEXT2(x) #x
#define MCONV_TEXT(x) MCONV_TEXT2(x)
#define MCONV_JOIN2(a, b) a##b
#define MCONV_JOIN(a, b) MCONV_JOIN2(a, b)

namespace mconv {
namespace MCONV_ISA {

static bool runs_here() {
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2");
#else
    return true;
#endif
}

static const Format kFormats[] = {
    // id, block, bytes, encode, decode, wants row mean, full search
    {2, 32, 18, encode_q4_0, decode_nibbles<18, 2, -1, false, 8>, true, full_symmetric<4, 18>},
    {3, 32, 20, encode_q4_1, decode_nibbles<20, 4, -1, true, 0>, true, full_asymmetric<4, 20>},
    {6, 32, 22, encode_q5_0, decode_nibbles<22, 6, 2, false, 16>, true, full_symmetric<5, 22>},
    {7, 32, 24, encode_q5_1, decode_nibbles<24, 8, 4, true, 0>, true, full_asymmetric<5, 24>},
    {8, 32, 34, encode_q8_0, decode_q8_0, false, full_q8_0},
    {10, 256, 84, encode_q2_k, decode_q2_k, false, nullptr},
    {11, 256, 110, encode_q3_k, decode_q3_k, false, nullptr},
    {12, 256, 144, encode_q45_k<4>, decode_q45_k<4>, false, nullptr},
    {13, 256, 176, encode_q45_k<5>, decode_q45_k<5>, false, nullptr},
    {14, 256, 210, encode_q6_k, decode_q6_k, false, nullptr},
    {16, 256, 66, encode_grid<Iq2Xxs>, decode_iq2_xxs, false, nullptr},
    {17, 256, 74, encode_grid<Iq2Xs>, decode_iq2_xs, false, nullptr},
    {18, 256, 98, encode_grid<Iq3Xxs>, decode_iq3_xxs, false, nullptr},
    {19, 256, 50, encode_iq1_s, decode_iq1_s, false, nullptr},
    {20, 32, 18, encode_iq4_nl, decode_iq4_nl, false, nullptr},
    {21, 256, 110, encode_grid<Iq3S>, decode_iq3_s, false, nullptr},
    {22, 256, 82, encode_grid<Iq2S>, decode_iq2_s, false, nullptr},
    {23, 256, 136, encode_iq4_xs, decode_iq4_xs, false, nullptr},
    {29, 256, 56, encode_iq1_m, decode_iq1_m, false, nullptr},
    {34, 256, 54, encode_tq1_0, decode_tq1_0, false, full_tq1_0},
    {35, 256, 66, encode_tq2_0, decode_tq2_0, false, full_tq2_0},
    {39, 32, 17, encode_mxfp4, decode_mxfp4, false, full_mxfp4},
    {40, 64, 36, encode_nvfp4, decode_nvfp4, false, full_nvfp4},
    {41, 128, 18, encode_q1_0, decode_q1_0, false, full_q1_0},
    {42, 64, 18, encode_q2_0, decode_q2_0, false, full_q2_0},
};

}  // namespace MCONV_ISA

const Isa& MCONV_JOIN(isa_, MCONV_ISA)() {
    using namespace MCONV_ISA;
    static const Isa isa = {
        MCONV_TEXT(MCONV_ISA), runs_here, kFormats, int(sizeof(kFormats) / sizeof(kFormats[0])),
        {bf16_to_float_row, half_to_float_row, float_to_bf16_row, float_to_half_row, finite_row,
         row_mean_squares, block_errors}};
    return isa;
}

}  // namespace mconv
