// See pipeline.hpp. Work is cut into chunks of whole rows (or blocks, when decoding) that fit the
// second-level cache; threads take the next chunk from a counter.
#include "pipeline.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace mconv {

namespace {

constexpr int64_t kChunk = 1 << 16;  // elements per chunk
constexpr int kF32 = 0, kF16 = 1, kBF16 = 30;

template <class Work>
void parallel(int64_t count, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
    };
    std::vector<std::thread> pool;
    try {
        for (int64_t t = 1; t < std::min<int64_t>(threads, count); ++t) pool.emplace_back(loop);
    } catch (const std::system_error&) {
        // No more threads to be had: those that started, and this one, do the work.
    }
    loop();
    for (auto& t : pool) t.join();
}

const float* widen(const Casts& cast, int input, const void* from, int64_t n, float* scratch) {
    if (input == kFloat32) return static_cast<const float*>(from);
    auto to_float = input == kFloat16 ? cast.half_to_float : cast.bf16_to_float;
    to_float(static_cast<const uint16_t*>(from), scratch, n);
    return scratch;
}

int cast_chunk(const Casts& cast, int type, int input, const void* from, int64_t n, uint8_t* out,
               float* scratch) {
    if ((type == kF32 && input == kFloat32) || (type == kF16 && input == kFloat16) ||
        (type == kBF16 && input == kBFloat16)) {
        std::memcpy(out, from, size_t(n) * (type == kF32 ? 4 : 2));
        return kOk;
    }
    if (type == kF32) {
        widen(cast, input, from, n, reinterpret_cast<float*>(out));
        return kOk;
    }
    const float* x = widen(cast, input, from, n, scratch);
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    if (type == kF16) return cast.float_to_half(x, to, n) ? kOverflow : kOk;
    cast.float_to_bf16(x, to, n);
    return kOk;
}

// One chunk of rows through a block format, with what it needs beside.
struct Chunk {
    const Isa& isa;
    const Format& format;
    const Request& request;
    const float* unit;  // [cols] of ones where a search needs weights and there are none

    int encode(const float* x, int64_t rows, uint8_t* out, bool pure) const {
        Job job = {x, rows, request.cols, request.weights, nullptr, out, false};
        std::vector<float> means;
        if (pure) {
            job.pure = true;
            if (!job.weights) job.weights = unit;
        } else if (job.weights && format.wants_row_mean) {
            means.resize(size_t(rows));
            isa.casts.row_means(x, rows, request.cols, means.data());
            job.row_mean = means.data();
        }
        (pure && format.full ? format.full : format.encode)(job);
        return job.overflow ? kOverflow : kOk;
    }

    // Errors of encoded rows, one per block.
    std::vector<double> errors(const float* x, int64_t rows, const uint8_t* data) const {
        const int64_t blocks = rows * request.cols / format.block;
        std::vector<double> sums(size_t(blocks), 0.0);
        std::unique_ptr<float[]> y;
        if (data) {
            y.reset(new float[size_t(rows * request.cols)]);
            format.decode(data, blocks, y.get());
        }
        isa.casts.block_errors(x, y.get(), request.weights, rows, request.cols, format.block,
                               sums.data());
        return sums;
    }

    // Encode with the wanted care; `sums` gets the chunk's three sums.
    int run(const float* x, int64_t rows, uint8_t* out, double* sums) const {
        const int status = encode(x, rows, out, false);
        if (!request.best && !request.sums) return status;
        std::vector<double> own = errors(x, rows, out);
        sums[0] = total(errors(x, rows, nullptr));
        sums[1] = total(own);
        if (request.best) {
            std::vector<uint8_t> other(own.size() * size_t(format.bytes));
            encode(x, rows, other.data(), true);
            const std::vector<double> error = errors(x, rows, other.data());
            for (size_t b = 0; b < own.size(); ++b) {
                if (!(error[b] < own[b])) continue;
                own[b] = error[b];
                std::memcpy(out + b * size_t(format.bytes), &other[b * size_t(format.bytes)],
                            size_t(format.bytes));
            }
        }
        sums[2] = total(own);
        return status;
    }

    static double total(const std::vector<double>& values) {
        double sum = 0;
        for (double v : values) sum += v;
        return sum;
    }
};

}  // namespace

std::vector<const Isa*> available() {
    std::vector<const Isa*> found;
#if defined(MCONV_WITH_AVX512)
    if (isa_avx512().runs_here()) found.push_back(&isa_avx512());
#endif
#if defined(MCONV_WITH_AVX2)
    if (isa_avx2().runs_here()) found.push_back(&isa_avx2());
#endif
    found.push_back(&isa_generic());
    return found;
}

const Isa& best_isa() {
    static const Isa& best = *available().front();
    return best;
}

const Format* find_format(const Isa& isa, int type) {
    for (int i = 0; i < isa.count; ++i)
        if (isa.formats[i].id == type) return &isa.formats[i];
    return nullptr;
}

bool is_float_type(int type) { return type == kF32 || type == kF16 || type == kBF16; }

int encode_rows(const Isa& isa, const Request& r) {
    const Format* format = find_format(isa, r.type);
    const int64_t row_bytes = format ? r.cols / format->block * format->bytes
                                     : r.cols * (r.type == kF32 ? 4 : 2);
    const int64_t step = std::max<int64_t>(1, kChunk / r.cols);
    const bool scratch_needed = r.input != kFloat32;
    const size_t in_row = size_t(r.cols) * (r.input == kFloat32 ? 4 : 2);
    const std::vector<float> unit(r.best ? size_t(r.cols) : 0, 1.f);
    std::vector<double> sums(size_t((r.rows + step - 1) / step) * 3, 0.0);
    std::atomic<int> status{kOk};
    parallel((r.rows + step - 1) / step, r.threads, [&](int64_t chunk) {
        thread_local std::unique_ptr<float[]> scratch;
        thread_local int64_t capacity = 0;
        if (scratch_needed && capacity < step * r.cols) {
            capacity = step * r.cols;
            scratch.reset(new float[size_t(capacity)]);
        }
        const int64_t first = chunk * step, rows = std::min(step, r.rows - first);
        const int64_t n = rows * r.cols;
        const void* from = static_cast<const char*>(r.x) + size_t(first) * in_row;
        uint8_t* out = r.out + first * row_bytes;
        if (!format) {
            status |= cast_chunk(isa.casts, r.type, r.input, from, n, out, scratch.get());
            return;
        }
        const float* x = widen(isa.casts, r.input, from, n, scratch.get());
        if (!isa.casts.finite(x, n)) {
            status |= kNotFinite;
            return;
        }
        status |= Chunk{isa, *format, r, unit.data()}.run(x, rows, out, &sums[size_t(3 * chunk)]);
    });
    for (size_t i = 0; r.sums && i < sums.size(); ++i) r.sums[i % 3] += sums[i];
    return status;
}

void decode_blocks(const Isa& isa, int type, const uint8_t* in, int64_t bytes, float* out,
                   int threads) {
    const Format* format = find_format(isa, type);
    const int64_t block = format ? format->block : 1;
    const int64_t size = format ? format->bytes : type == kF32 ? 4 : 2;
    const int64_t count = bytes / size, step = kChunk / block;
    parallel((count + step - 1) / step, threads, [&](int64_t chunk) {
        const int64_t first = chunk * step, n = std::min(step, count - first);
        const uint8_t* from = in + first * size;
        float* to = out + first * block;
        if (format) format->decode(from, n, to);
        else if (type == kF32) std::memcpy(to, from, size_t(n) * 4);
        else
            (type == kF16 ? isa.casts.half_to_float : isa.casts.bf16_to_float)(
                reinterpret_cast<const uint16_t*>(from), to, n);
    });
}

}  // namespace mconv
