// Python bindings: mconv.quant._native. All checks on shapes and values' meaning are in Python;
// here only what protects memory.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "grid.hpp"
#include "pipeline.hpp"

namespace nb = nanobind;
using namespace mconv;

using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Sums = nb::ndarray<double, nb::shape<3>, nb::c_contig, nb::device::cpu>;
using Points = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

static const Isa& choose(const std::optional<std::string>& name) {
    if (!name) return best_isa();
    for (const Isa* isa : available())
        if (isa->name == *name) return *isa;
    throw std::invalid_argument("this processor has no instruction set called " + *name);
}

static int quantize(int type, Bytes x, int input, int64_t cols, std::optional<Floats> weights,
                    BytesOut out, int threads, std::optional<std::string> isa_name, bool best,
                    std::optional<Sums> sums) {
    const Isa& isa = choose(isa_name);
    const Format* format = find_format(isa, type);
    if (!format && !is_float_type(type)) throw std::invalid_argument("no kernel for this type");
    const int64_t item = input == kFloat32 ? 4 : 2;
    if (cols <= 0 || int64_t(x.size()) % (cols * item) || (format && cols % format->block) ||
        (weights && int64_t(weights->size()) != cols))
        throw std::invalid_argument("shapes do not fit together");
    const int64_t rows = int64_t(x.size()) / (cols * item);
    const int64_t row_bytes =
        format ? cols / format->block * format->bytes : cols * (type == 0 ? 4 : 2);
    if (int64_t(out.size()) != rows * row_bytes) throw std::invalid_argument("wrong output size");
    Request request = {type, x.data(), input, rows, cols, weights ? weights->data() : nullptr,
                       out.data(), threads, best && format, sums ? sums->data() : nullptr};
    nb::gil_scoped_release release;
    return encode_rows(isa, request);
}

static void dequantize(int type, Bytes data, FloatsOut out, int threads,
                       std::optional<std::string> isa_name) {
    const Isa& isa = choose(isa_name);
    const Format* format = find_format(isa, type);
    if (format ? !format->decode : !is_float_type(type))
        throw std::invalid_argument("no kernel for this type");
    const int64_t size = format ? format->bytes : type == 0 ? 4 : 2;
    const int64_t block = format ? format->block : 1;
    if (int64_t(data.size()) % size || int64_t(data.size()) / size * block != int64_t(out.size()))
        throw std::invalid_argument("wrong output size");
    nb::gil_scoped_release release;
    decode_blocks(isa, type, data.data(), int64_t(data.size()), out.data(), threads);
}

NB_MODULE(_native, m) {
    m.doc() = "Compiled quantization kernels; use mconv.quant.quantize and dequantize.";
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Isa* isa : available()) names.emplace_back(isa->name);
        return names;
    });
    m.def("can_quantize", [](int type) {
        const Format* f = find_format(best_isa(), type);
        return f ? f->encode != nullptr : is_float_type(type);
    });
    m.def("can_dequantize", [](int type) {
        const Format* f = find_format(best_isa(), type);
        return f ? f->decode != nullptr : is_float_type(type);
    });
    m.def("set_grid", [](int type, Points points, Floats values) {
        const int dims = type == 18 || type == 21 ? 4 : 8;
        if (values.size() != points.size() * size_t(dims))
            throw std::invalid_argument("a grid needs the values of every point");
        set_grid(type, points.data(), values.data(), int(points.size()));
    });
    m.def("has_grid", [](int type) { return !grid_of(type).point.empty(); });
    m.def("quantize", &quantize, nb::arg("type"), nb::arg("x"), nb::arg("input"), nb::arg("cols"),
          nb::arg("weights").none(), nb::arg("out"), nb::arg("threads"),
          nb::arg("isa") = nb::none(), nb::arg("best") = false, nb::arg("sums") = nb::none());
    m.def("dequantize", &dequantize, nb::arg("type"), nb::arg("data"), nb::arg("out"),
          nb::arg("threads"), nb::arg("isa") = nb::none());
}
