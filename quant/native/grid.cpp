// See grid.hpp. The neighbour lists hold every grid point within the 1 to 3 smallest distinct
// distances of an off-grid vector, as the reference encoder defines them.
#include "grid.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace mconv {

namespace {

struct Shape {
    int type, dims, bits, levels, distances;
};

// Levels per coordinate in use, and how many distinct distances a neighbour list spans.
constexpr Shape kShapes[] = {
    {16, 8, 2, 3, 2}, {17, 8, 2, 3, 2}, {22, 8, 2, 3, 1}, {19, 8, 2, 3, 3},
    {29, 8, 2, 3, 3}, {18, 4, 3, 8, 2}, {21, 4, 3, 8, 3},
};

std::array<Grid, sizeof(kShapes) / sizeof(kShapes[0])> grids;

int slot(int type) {
    for (size_t i = 0; i < grids.size(); ++i)
        if (kShapes[i].type == type) return int(i);
    throw std::invalid_argument("this type has no grid");
}

int distance(const Shape& s, unsigned a, unsigned b) {
    int sum = 0;
    for (int k = 0; k < s.dims; ++k) {
        const unsigned mask = (1u << s.bits) - 1;
        int d = 2 * (int(a >> (k * s.bits) & mask) - int(b >> (k * s.bits) & mask));
        sum += d * d;
    }
    return sum;
}

void append_neighbours(const Shape& s, Grid& g, unsigned u) {
    std::vector<int> d(g.point.size());
    for (size_t i = 0; i < d.size(); ++i) d[i] = distance(s, g.point[i], u);
    const size_t head = g.lists.size();
    g.lists.push_back(0);
    int last = -1;
    for (int round = 0; round < s.distances; ++round) {
        int next = 1 << 30;
        for (int v : d)
            if (v > last && v < next) next = v;
        for (size_t i = 0; i < d.size(); ++i)
            if (d[i] == next) g.lists.push_back(g.point[i]);
        last = next;
    }
    while ((g.lists.size() - head - 1) % 16) g.lists.push_back(g.lists[head + 1]);
    g.lists[head] = uint16_t(g.lists.size() - head - 1);
}

}  // namespace

const Grid& grid_of(int type) { return grids[size_t(slot(type))]; }

void set_grid(int type, const uint16_t* points, const float* values, int count) {
    const int at = slot(type);
    const Shape& s = kShapes[at];
    Grid g;
    g.dims = s.dims;
    g.bits = s.bits;
    g.point.assign(points, points + count);
    g.value.assign(values, values + int64_t(count) * s.dims);
    g.map.assign(size_t(1) << (s.dims * s.bits), -1);
    for (int i = 0; i < count; ++i) g.map[points[i]] = i;
    const unsigned mask = (1u << s.bits) - 1;
    for (unsigned u = 0; u < g.map.size(); ++u) {
        bool used = true;
        for (int k = 0; k < s.dims; ++k) used &= int(u >> (k * s.bits) & mask) < s.levels;
        if (!used || g.map[u] >= 0) continue;
        g.map[u] = -1 - int32_t(g.lists.size());
        append_neighbours(s, g, u);
    }
    grids[size_t(at)] = std::move(g);
}

}  // namespace mconv
