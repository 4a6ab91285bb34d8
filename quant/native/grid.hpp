// The point grids of the IQ1, IQ2 and IQ3 formats: which packed level vectors a code may name, and
// for every other vector the ordered list of grid points worth trying.
#pragma once

#include <cstdint>
#include <vector>

namespace mconv {

struct Grid {
    int dims, bits;               // levels per point, bits per packed level
    std::vector<uint16_t> point;  // packed levels of each grid index
    std::vector<int32_t> map;     // packed levels -> grid index, or -1 - offset into `lists`
    // Per off-grid vector: the count of neighbours rounded up to 16, then their packed levels,
    // nearest first (ties by grid index), the first one repeated as padding.
    std::vector<uint16_t> lists;
    std::vector<float> value;     // decoded magnitudes, `dims` per grid index
};

// The grid of a ggml type; empty `point` until set_grid has been called for it.
const Grid& grid_of(int type);

// Install the grid points (packed levels and decoded values, in code order). Thread-safe if calls do not overlap.
void set_grid(int type, const uint16_t* points, const float* values, int count);

}  // namespace mconv
