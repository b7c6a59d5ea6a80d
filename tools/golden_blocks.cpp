// Blocks through the functions of llama.cpp or ik_llama.cpp: the oracle of golden_blocks.py, which runs this program.
//
//   golden_blocks dequantise TYPE ROWS COLUMNS    bytes of rows on standard input, floats on standard output
//   golden_blocks quantise TYPE ROWS COLUMNS      the other way round
//
// TYPE is a number of ggml.h. Link it with the library of either (G is the folder of its `ggml`, B that of the built
// library):
//
//   c++ -std=c++17 -DIK -I$G/include -o golden_blocks tools/golden_blocks.cpp -L$B -lggml        # ik_llama.cpp
//   c++ -std=c++17 -I$G/include -o golden_blocks tools/golden_blocks.cpp -L$B -lggml-base        # llama.cpp

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <unistd.h>

#include "ggml.h"

namespace {

template <typename T> std::vector<T> read(size_t count) {
    std::vector<T> values(count);
    if (fread(values.data(), sizeof(T), count, stdin) != count || fgetc(stdin) != EOF) {
        fprintf(stderr, "standard input is not %zu bytes\n", count * sizeof(T));
        exit(1);
    }
    return values;
}

template <typename T> void write(FILE * file, const std::vector<T> & values) {
    if (fwrite(values.data(), sizeof(T), values.size(), file) != values.size() || fclose(file)) exit(1);
}

// Rows that one call of a type's to_float takes.
int rows_together(ggml_type type) {
    const std::string name = ggml_type_name(type);
    const size_t at = name.rfind("_r");
    return at == std::string::npos ? 1 : atoi(name.c_str() + at + 2);
}

void quantise(ggml_type type, const float * weights, void * blocks, int64_t rows, int64_t columns) {
    const std::vector<float> importance(columns, 1.0f);
#ifdef IK
    ggml_quantize_chunk(type, weights, blocks, 0, rows, columns, importance.data(), nullptr);
#else
    ggml_quantize_chunk(type, weights, blocks, 0, rows, columns, importance.data());
#endif
}

#ifdef IK
// The functions of the BitNet types begin behind the row's scale, and leave it out. Says how long it is, 0 in others.
int bitnet_scale(ggml_type type, const uint8_t * row, float * scale) {
    if (type == GGML_TYPE_IQ1_BN) {
        ggml_fp16_t half;
        memcpy(&half, row, sizeof(half));
        *scale = ggml_fp16_to_fp32(half);
        return sizeof(half);
    }
    if (type == GGML_TYPE_IQ2_BN) {
        memcpy(scale, row, sizeof(*scale));
        return sizeof(*scale);
    }
    return 0;
}

void dequantise(ggml_type type, const uint8_t * row, float * out, int64_t count) {
    float scale;
    const int skip = bitnet_scale(type, row, &scale);
    ggml_internal_get_type_traits(type).to_float(row + skip, out, count);
    for (int64_t i = 0; skip && i < count; ++i) out[i] *= scale;
}
#else
void dequantise(ggml_type type, const uint8_t * row, float * out, int64_t count) {
    ggml_get_type_traits(type)->to_float(row, out, count);
}
#endif

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: golden_blocks dequantise|quantise TYPE ROWS COLUMNS\n");
        return 1;
    }
    FILE * output = fdopen(dup(1), "wb");
    dup2(2, 1);  // the libraries print there
    const auto type = ggml_type(atoi(argv[2]));
    const int64_t rows = atoi(argv[3]), columns = atoi(argv[4]);
    ggml_free(ggml_init({ 1 << 20, nullptr, true }));  // fills the table of halves
    const size_t row_bytes = ggml_row_size(type, columns);

    if (std::string(argv[1]) == "quantise") {
        const auto weights = read<float>(rows * columns);
        std::vector<uint8_t> blocks(rows * row_bytes);
        quantise(type, weights.data(), blocks.data(), rows, columns);
        write(output, blocks);
        return 0;
    }
    const auto blocks = read<uint8_t>(rows * row_bytes);
    std::vector<float> weights(rows * columns);
    const int together = rows_together(type);
    for (int64_t row = 0; row < rows; row += together) {
        dequantise(type, blocks.data() + row * row_bytes, weights.data() + row * columns, together * columns);
    }
    write(output, weights);
    return 0;
}
