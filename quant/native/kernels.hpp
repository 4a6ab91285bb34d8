// What the dispatcher and the kernels share: a job, and one table of functions per instruction set.
#pragma once

#include <cstdint>

namespace mconv {

// Rows [rows, cols] of finite float32 to encode at `out`; rows are contiguous on both sides.
struct Job {
    const float* x;
    int64_t rows, cols;
    const float* weights;   // importance [cols], or null
    const float* row_mean;  // mean of squares per row [rows], or null
    uint8_t* out;
    bool overflow;          // set when a scale did not fit in float16
    bool pure = false;      // least error under `weights` (not null), not ggml's bytes
};

using Encode = void (*)(Job&);
using Decode = void (*)(const uint8_t* in, int64_t blocks, float* out);

struct Format {
    int id, block, bytes;
    Encode encode;
    Decode decode;
    bool wants_row_mean;  // with importance, the encoder needs Job::row_mean
    Encode full;          // takes pure jobs; null: `encode` does
};

struct Casts {
    void (*bf16_to_float)(const uint16_t*, float*, int64_t);
    void (*half_to_float)(const uint16_t*, float*, int64_t);
    void (*float_to_bf16)(const float*, uint16_t*, int64_t);
    bool (*float_to_half)(const float*, uint16_t*, int64_t);  // true: a finite value overflowed
    bool (*finite)(const float*, int64_t);
    void (*row_means)(const float*, int64_t rows, int64_t cols, float*);
    // Sums of w * (x - y)^2 per block (y null: of w * x^2); w repeats along the row, null is one.
    void (*block_errors)(const float* x, const float* y, const float* w, int64_t rows, int64_t cols,
                         int block, double* sums);
};

struct Isa {
    const char* name;
    bool (*runs_here)();
    const Format* formats;
    int count;
    Casts casts;
};

const Isa& isa_generic();
const Isa& isa_avx2();    // where MCONV_WITH_AVX2 is defined
const Isa& isa_avx512();  // where MCONV_WITH_AVX512 is defined

}  // namespace mconv
