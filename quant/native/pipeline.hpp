// Rows of any float type in, encoded rows out: widening, checks and threads around the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace mconv {

enum Input : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Status : int { kOk = 0, kNotFinite = 1, kOverflow = 2 };

struct Request {
    int type;                // ggml id
    const void* x;           // [rows, cols]
    int input;               // an Input
    int64_t rows, cols;
    const float* weights;    // [cols] or null
    uint8_t* out;
    int threads;
    bool best = false;       // per block, ggml's encoding or a full search: what has less error
    double* sums = nullptr;  // adds up w*x^2, ggml's error, the error of `out` (block types only)
};

// The instruction sets that were compiled in and run on this processor, best first.
std::vector<const Isa*> available();
const Isa& best_isa();
const Format* find_format(const Isa& isa, int type);
bool is_float_type(int type);

// Returns an or of Status. The bytes written do not depend on the thread count.
int encode_rows(const Isa& isa, const Request& request);
void decode_blocks(const Isa& isa, int type, const uint8_t* in, int64_t bytes, float* out,
                   int threads);

}  // namespace mconv
