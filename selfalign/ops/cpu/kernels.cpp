// Float32 kernels for CPUs with AVX-512 or AVX2: what a training step does between its large matmuls.
//
// Every number is a function of the inputs alone: sums are taken in a fixed order, whatever the number
// of threads. All arrays are row-major; letters are those of the Python side: B samples, N tokens,
// K groups, H heads, d features of a head, D features of a token.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <omp.h>

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, PANEL = 4;
#else
constexpr int64_t LANES = 8, PANEL = 2;
#endif
constexpr int64_t BYTES = 4 * LANES;

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ivec __attribute__((vector_size(BYTES)));
typedef float unaligned_vec __attribute__((vector_size(BYTES), aligned(4), may_alias));

inline vec load(const float* from) { return *reinterpret_cast<const unaligned_vec*>(from); }
inline void store(float* to, vec x) { *reinterpret_cast<unaligned_vec*>(to) = x; }
// For large results that nobody reads soon: past the caches, so that memory is not read first only to be
// overwritten. `to` is aligned to BYTES, as rows of torch's own memory are. What is streamed is seen by
// other threads after the streaming one's `finish_streaming`.
inline void stream(float* to, vec x) {
#ifdef __AVX512F__
    _mm512_stream_ps(to, x);
#else
    _mm256_stream_ps(to, x);
#endif
}
inline void finish_streaming() { _mm_sfence(); }
inline vec all(float x) { return vec{} + x; }
inline vec max(vec a, vec b) { return a > b ? a : b; }  // b, if either is not a number
inline vec min(vec a, vec b) { return a < b ? a : b; }

inline float sum(vec x) {
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
inline float max(vec x) {
    float top = x[0];
    for (int64_t i = 1; i < LANES; i++) top = std::max(top, static_cast<float>(x[i]));
    return top;
}
// 2^x within 2 units in the last place; x is clamped to where float32 has normal numbers.
inline vec power_of_two(vec x) {
    x = min(all(127.0f), max(all(-126.0f), x));
    // Adding 1.5 * 2^23 rounds to whole numbers, and leaves them in the lowest bits.
    const vec rounded = x + 12582912.0f;
    const vec r = x - (rounded - 12582912.0f);
    vec p = all(1.535336188319500e-4f);  // 2^r on [-1/2, 1/2], coefficients fitted (Cephes, exp2f)
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    return p * reinterpret_cast<vec>((reinterpret_cast<ivec>(rounded) + 127) << 23);
}

inline float dot(const float* a, const float* b, int64_t n) {
    vec sums = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(a + i) * load(b + i);
    float total = sum(sums);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory for one thread, handed out in aligned pieces.
class Scratch {
  public:
    explicit Scratch(int64_t floats)
        : base_(static_cast<float*>(std::aligned_alloc(64, 4 * round_up(floats, 16)))), next_(base_) {}
    ~Scratch() { std::free(base_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* take(int64_t floats) {
        float* piece = next_;
        next_ += round_up(floats, 16);
        return piece;
    }

  private:
    float *base_, *next_;
};

// ---- Small matrices, which stay in the cache.

// C (+)= A B for `rows` x (LANES * columns) of C. A has any strides.
template <int rows, int columns, bool add>
inline void multiply_tile(int64_t depth, const float* A, int64_t a_row, int64_t a_column,
                          const float* B, int64_t b_row, float* C, int64_t c_row) {
    vec c[rows][columns];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) c[i][j] = add ? load(C + i * c_row + j * LANES) : vec{};
    for (int64_t k = 0; k < depth; k++) {
        vec b[columns];
        for (int j = 0; j < columns; j++) b[j] = load(B + k * b_row + j * LANES);
        for (int i = 0; i < rows; i++) {
            const vec a = all(A[i * a_row + k * a_column]);
            for (int j = 0; j < columns; j++) c[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) store(C + i * c_row + j * LANES, c[i][j]);
}

template <int columns, bool add>
void multiply_panel(int64_t rows, int64_t depth, const float* A, int64_t a_row, int64_t a_column,
                    const float* B, int64_t b_row, float* C, int64_t c_row) {
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6)
        multiply_tile<6, columns, add>(depth, A + i * a_row, a_row, a_column, B, b_row,
                                       C + i * c_row, c_row);
    for (; i + 2 <= rows; i += 2)
        multiply_tile<2, columns, add>(depth, A + i * a_row, a_row, a_column, B, b_row,
                                       C + i * c_row, c_row);
    for (; i < rows; i++)
        multiply_tile<1, columns, add>(depth, A + i * a_row, a_row, a_column, B, b_row,
                                       C + i * c_row, c_row);
}

// C (+)= A B; `columns` is a multiple of LANES.
template <bool add>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* A, int64_t a_row,
              int64_t a_column, const float* B, int64_t b_row, float* C, int64_t c_row) {
    int64_t j = 0;
    for (; j + PANEL * LANES <= columns; j += PANEL * LANES)
        multiply_panel<PANEL, add>(rows, depth, A, a_row, a_column, B + j, b_row, C + j, c_row);
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        multiply_panel<2, add>(rows, depth, A, a_row, a_column, B + j, b_row, C + j, c_row);
    for (; j < columns; j += LANES)
        multiply_panel<1, add>(rows, depth, A, a_row, a_column, B + j, b_row, C + j, c_row);
}

// The first or the second halves of a and b, number by number in turn.
template <bool second>
inline vec interleave(vec a, vec b) {
    ivec pick;
    for (int64_t i = 0; i < LANES; i++)
        pick[i] = i / 2 + i % 2 * LANES + (second ? LANES / 2 : 0);
    return __builtin_shuffle(a, b, pick);
}

// A LANES x LANES block, transposed in registers: every round interleaves upper and lower rows.
inline void transpose_block(const float* in, int64_t in_row, float* out, int64_t out_row) {
    vec rows[LANES], mixed[LANES];
    for (int64_t i = 0; i < LANES; i++) rows[i] = load(in + i * in_row);
    for (int64_t round = 1; round < LANES; round *= 2) {
        for (int64_t i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = interleave<false>(rows[i], rows[i + LANES / 2]);
            mixed[2 * i + 1] = interleave<true>(rows[i], rows[i + LANES / 2]);
        }
        std::copy(mixed, mixed + LANES, rows);
    }
    for (int64_t i = 0; i < LANES; i++) store(out + i * out_row, rows[i]);
}

void transpose_part(int64_t rows, int64_t columns, const float* in, int64_t in_row, float* out,
                    int64_t out_row) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            if (i + LANES <= rows && j + LANES <= columns) {
                transpose_block(in + i * in_row + j, in_row, out + j * out_row + i, out_row);
                continue;
            }
            for (int64_t a = i; a < std::min(i + LANES, rows); a++)
                for (int64_t b = j; b < std::min(j + LANES, columns); b++)
                    out[b * out_row + a] = in[a * in_row + b];
        }
}

// ---- Attention.

constexpr int64_t QUERIES = 48, KEYS = 256;  // a tile of scores: 48 KiB
constexpr float LOG2_E = 1.44269504f;

// Copies rows of `features` numbers, and fills each up to `width` with zeros.
inline void pack(int64_t rows, int64_t features, int64_t width, const float* in, int64_t in_row,
                 float* out) {
    for (int64_t i = 0; i < rows; i++) {
        std::memcpy(out + i * width, in + i * in_row, 4 * features);
        std::memset(out + i * width + features, 0, 4 * (width - features));
    }
}

// Multiplies rows of `features` numbers by a factor.
inline void scale(int64_t rows, int64_t features, float factor, const float* in, int64_t in_row,
                  float* out, int64_t out_row) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < features; j++) out[i * out_row + j] = in[i * in_row + j] * factor;
}

// Transposes rows of `features` numbers, and fills each of the results up to `width` with zeros.
void pack_transposed(int64_t rows, int64_t features, int64_t width, const float* in,
                     int64_t in_row, float* out) {
    transpose_part(rows, features, in, in_row, out, width);
    for (int64_t j = 0; j < features; j++)
        std::memset(out + j * width + rows, 0, 4 * (width - rows));
}

// Where a part's tokens of one sample and head begin, in q, k, v of shape (B, N, 3, H, d) and in
// an array of shape (B, N, H, d).
struct Place {
    int64_t sample, head, first, tokens;
    Place(const int64_t* part, int64_t task, int64_t H)
        : sample(part[0] + task / H), head(task % H), first(part[2]), tokens(part[3] - part[2]) {}
    int64_t in_qkv(int64_t N, int64_t H, int64_t d) const {
        return (sample * N + first) * 3 * H * d + head * d;
    }
    int64_t in_out(int64_t N, int64_t H, int64_t d) const {
        return (sample * N + first) * H * d + head * d;
    }
    int64_t in_rows(int64_t N, int64_t H) const { return (sample * H + head) * N + first; }
};

}  // namespace

extern "C" {

// Softmax attention within each part, tile by tile with a running maximum (FlashAttention). Scores are
// in units of ln 2, since powers of two are cheaper than powers of e.
// `parts`: four numbers each: first and end sample, first and end token.
// `log_sums` (B, H, N): logarithm of each query's sum of exponentials, for the backward pass.
void attention_forward(const float* qkv, float* out, float* log_sums, const int64_t* parts,
                       int64_t num_parts, int64_t N, int64_t H, int64_t d) {
    const int64_t qkv_row = 3 * H * d, out_row = H * d, width = round_up(d, LANES);
    const float factor = LOG2_E / std::sqrt(static_cast<float>(d));
    for (const int64_t* part = parts; part < parts + 4 * num_parts; part += 4) {
        const int64_t n = part[3] - part[2], padded = round_up(n, LANES);
#pragma omp parallel
        {
            Scratch scratch((d + width) * padded + QUERIES * (KEYS + d + width + 2) + 128);
            float *keys = scratch.take(d * padded), *values = scratch.take(n * width),
                  *queries = scratch.take(QUERIES * d), *scores = scratch.take(QUERIES * KEYS),
                  *sums = scratch.take(QUERIES * width), *top = scratch.take(QUERIES),
                  *total = scratch.take(QUERIES);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < (part[1] - part[0]) * H; task++) {
                const Place place(part, task, H);
                const float *q = qkv + place.in_qkv(N, H, d), *k = q + H * d, *v = k + H * d;
                pack_transposed(n, d, padded, k, qkv_row, keys);
                pack(n, d, width, v, qkv_row, values);
                for (int64_t i0 = 0; i0 < n; i0 += QUERIES) {
                    const int64_t rows = std::min(QUERIES, n - i0);
                    scale(rows, d, factor, q + i0 * qkv_row, qkv_row, queries, d);
                    std::fill(top, top + rows, -INFINITY);
                    std::fill(total, total + rows, 0.0f);
                    for (int64_t j0 = 0; j0 < n; j0 += KEYS) {
                        const int64_t columns = std::min(KEYS, n - j0);
                        const int64_t wide = round_up(columns, LANES);
                        multiply<false>(rows, wide, d, queries, d, 1, keys + j0, padded, scores,
                                        KEYS);
                        for (int64_t i = 0; i < rows; i++) {
                            float* row = scores + i * KEYS;
                            std::fill(row + columns, row + wide, -INFINITY);
                            vec tops = load(row);
                            for (int64_t j = LANES; j < wide; j += LANES)
                                tops = max(load(row + j), tops);
                            const float new_top = std::max(max(tops), top[i]);
                            vec totals = {};
                            for (int64_t j = 0; j < wide; j += LANES) {
                                const vec x = power_of_two(load(row + j) - new_top);
                                store(row + j, x);
                                totals += x;
                            }
                            for (int64_t j = columns; j < wide; j++) totals[j % LANES] -= row[j];
                            if (j0) {
                                const float shrink = std::exp2(top[i] - new_top);
                                total[i] *= shrink;
                                scale(1, width, shrink, sums + i * width, width, sums + i * width,
                                      width);
                            }
                            total[i] += sum(totals);
                            top[i] = new_top;
                        }
                        const float* seen = values + j0 * width;
                        if (j0)
                            multiply<true>(rows, width, columns, scores, KEYS, 1, seen, width, sums,
                                           width);
                        else
                            multiply<false>(rows, width, columns, scores, KEYS, 1, seen, width,
                                            sums, width);
                    }
                    for (int64_t i = 0; i < rows; i++) {
                        scale(1, d, 1 / total[i], sums + i * width, width,
                              out + place.in_out(N, H, d) + (i0 + i) * out_row, out_row);
                        log_sums[place.in_rows(N, H) + i0 + i] = top[i] + std::log2(total[i]);
                    }
                }
            }
        }
    }
}

// Gradient of `attention_forward` with respect to q, k and v, written to (B, N, 3, H, d).
void attention_backward(const float* qkv, const float* out, const float* log_sums,
                        const float* grad, float* grad_qkv, const int64_t* parts,
                        int64_t num_parts, int64_t N, int64_t H, int64_t d) {
    const int64_t qkv_row = 3 * H * d, out_row = H * d, width = round_up(d, LANES);
    const float factor = 1 / std::sqrt(static_cast<float>(d));
    for (const int64_t* part = parts; part < parts + 4 * num_parts; part += 4) {
        const int64_t n = part[3] - part[2];
#pragma omp parallel
        {
            Scratch scratch(n * (3 * width + 1) + KEYS * (2 * d + 3 * width) + 2 * QUERIES * KEYS + 256);
            float *queries = scratch.take(n * width), *grad_out = scratch.take(n * width),
                  *grad_queries = scratch.take(n * width), *inner = scratch.take(n),
                  *keys_t = scratch.take(d * KEYS), *values_t = scratch.take(d * KEYS),
                  *keys = scratch.take(KEYS * width), *grad_keys = scratch.take(KEYS * width),
                  *grad_values = scratch.take(KEYS * width),
                  *weights = scratch.take(QUERIES * KEYS),
                  *grad_scores = scratch.take(QUERIES * KEYS);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < (part[1] - part[0]) * H; task++) {
                const Place place(part, task, H);
                const float *q = qkv + place.in_qkv(N, H, d), *k = q + H * d, *v = k + H * d;
                const float *o = out + place.in_out(N, H, d), *g = grad + place.in_out(N, H, d);
                const float* log_sum = log_sums + place.in_rows(N, H);
                float *gq = grad_qkv + place.in_qkv(N, H, d), *gk = gq + H * d, *gv = gk + H * d;
                pack(n, d, width, q, qkv_row, queries);
                scale(n, width, factor * LOG2_E, queries, width, queries, width);
                pack(n, d, width, g, out_row, grad_out);
                for (int64_t i = 0; i < n; i++)
                    inner[i] = dot(o + i * out_row, g + i * out_row, d);
                for (int64_t j0 = 0; j0 < n; j0 += KEYS) {
                    const int64_t columns = std::min(KEYS, n - j0);
                    const int64_t wide = round_up(columns, LANES);
                    pack_transposed(columns, d, wide, k + j0 * qkv_row, qkv_row, keys_t);
                    pack_transposed(columns, d, wide, v + j0 * qkv_row, qkv_row, values_t);
                    pack(columns, d, width, k + j0 * qkv_row, qkv_row, keys);
                    std::fill(grad_keys, grad_keys + columns * width, 0.0f);
                    std::fill(grad_values, grad_values + columns * width, 0.0f);
                    for (int64_t i0 = 0; i0 < n; i0 += QUERIES) {
                        const int64_t rows = std::min(QUERIES, n - i0);
                        multiply<false>(rows, wide, d, queries + i0 * width, width, 1, keys_t, wide,
                                        weights, KEYS);
                        multiply<false>(rows, wide, d, grad_out + i0 * width, width, 1, values_t,
                                        wide, grad_scores, KEYS);
                        for (int64_t i = 0; i < rows; i++)
                            for (int64_t j = 0; j < wide; j += LANES) {
                                float *w = weights + i * KEYS + j, *s = grad_scores + i * KEYS + j;
                                const vec x = power_of_two(load(w) - log_sum[i0 + i]);
                                store(w, x);
                                store(s, x * (load(s) - inner[i0 + i]));
                            }
                        multiply<true>(columns, width, rows, weights, 1, KEYS,
                                       grad_out + i0 * width, width, grad_values, width);
                        multiply<true>(columns, width, rows, grad_scores, 1, KEYS,
                                       queries + i0 * width, width, grad_keys, width);
                        float* to = grad_queries + i0 * width;
                        if (j0)
                            multiply<true>(rows, width, columns, grad_scores, KEYS, 1, keys, width,
                                           to, width);
                        else
                            multiply<false>(rows, width, columns, grad_scores, KEYS, 1, keys, width,
                                            to, width);
                    }
                    // `queries` carry the factor of the scores already, in units of ln 2.
                    scale(columns, d, 1 / LOG2_E, grad_keys, width, gk + j0 * qkv_row, qkv_row);
                    for (int64_t i = 0; i < columns; i++)
                        std::memcpy(gv + (j0 + i) * qkv_row, grad_values + i * width, 4 * d);
                }
                scale(n, d, factor, grad_queries, width, gq, qkv_row);
            }
        }
    }
}

}  // extern "C"

// ---- Work per token, between the matmuls. D is a multiple of LANES.

namespace {

constexpr int64_t CHUNK = 64;  // tokens per task: their sums are added up afterwards, in order

// A range of tokens of one sample and group.
struct Chunk {
    int64_t sample, group, first, end;
};

// The groups' tokens, cut into chunks. `ends` (K) says where the groups end.
class Chunks {
  public:
    Chunks(int64_t B, const int64_t* ends, int64_t K) : B_(B), K_(K), ends_(ends) {
        for (int64_t k = 0; k < K; k++)
            per_group_ = std::max(per_group_, (ends[k] - first(k) + CHUNK - 1) / CHUNK);
    }
    int64_t count() const { return B_ * K_ * per_group_; }
    int64_t per_group() const { return per_group_; }
    Chunk operator[](int64_t i) const {
        const int64_t group = i / per_group_ % K_, begin = first(group) + i % per_group_ * CHUNK;
        return {i / per_group_ / K_, group, std::min(begin, ends_[group]),
                std::min(begin + CHUNK, ends_[group])};
    }

  private:
    int64_t first(int64_t k) const { return k ? ends_[k - 1] : 0; }
    int64_t B_, K_, per_group_ = 1;
    const int64_t* ends_;
};

// out[r] = sum over the `each` rows of `partial` that belong to r; rows of D numbers, `apart` apart.
void add_partial_sums(const float* partial, int64_t apart, int64_t rows, int64_t each, int64_t D,
                      float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < D; j += LANES) {
            vec x = load(partial + r * each * apart + j);
            for (int64_t i = 1; i < each; i++) x += load(partial + (r * each + i) * apart + j);
            store(out + r * D + j, x);
        }
}

}  // namespace

extern "C" {

// normed = norm(x) * (1 + scale) + shift. scale and shift are (B, K, D) with the strides given, the rest
// (B, N, D). `moments` (B, N, 2) are each token's mean and inverse standard deviation.
void modulated_norm_forward(const float* x, const float* shift, const float* scale,
                            int64_t sample_stride, int64_t group_stride, float* normed,
                            float* moments, const int64_t* ends, int64_t B, int64_t N, int64_t K,
                            int64_t D, float epsilon) {
    const Chunks chunks(B, ends, K);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks.count(); c++) {
        const Chunk chunk = chunks[c];
        const int64_t condition = chunk.sample * sample_stride + chunk.group * group_stride;
        for (int64_t t = chunk.first; t < chunk.end; t++) {
            const int64_t row = chunk.sample * N + t;
            const float* from = x + row * D;
            vec sums = {}, squares = {};
            for (int64_t j = 0; j < D; j += LANES) sums += load(from + j);
            const float mean = sum(sums) / D;
            for (int64_t j = 0; j < D; j += LANES) {
                const vec centred = load(from + j) - mean;
                squares += centred * centred;
            }
            const float inverse = 1 / std::sqrt(sum(squares) / D + epsilon);
            for (int64_t j = 0; j < D; j += LANES) {
                const vec centred = (load(from + j) - mean) * inverse;
                stream(normed + row * D + j,
                       centred * (load(scale + condition + j) + 1.0f) + load(shift + condition + j));
            }
            moments[2 * row] = mean;
            moments[2 * row + 1] = inverse;
        }
        finish_streaming();
    }
}

// Gradients of `modulated_norm_forward` with respect to x, shift and scale.
void modulated_norm_backward(const float* grad, const float* x, const float* moments,
                             const float* scale, int64_t sample_stride, int64_t group_stride,
                             float* grad_x, float* grad_shift, float* grad_scale,
                             const int64_t* ends, int64_t B, int64_t N, int64_t K, int64_t D) {
    const Chunks chunks(B, ends, K);
    Scratch scratch(2 * chunks.count() * D);
    float* partial = scratch.take(2 * chunks.count() * D);
    std::fill(partial, partial + 2 * chunks.count() * D, 0.0f);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks.count(); c++) {
        const Chunk chunk = chunks[c];
        const float* scales = scale + chunk.sample * sample_stride + chunk.group * group_stride;
        float *shift_sums = partial + 2 * c * D, *scale_sums = shift_sums + D;
        for (int64_t t = chunk.first; t < chunk.end; t++) {
            const int64_t row = chunk.sample * N + t;
            const float mean = moments[2 * row], inverse = moments[2 * row + 1];
            const float *g = grad + row * D, *from = x + row * D;
            vec sums = {}, inner = {};
            for (int64_t j = 0; j < D; j += LANES) {
                const vec up = load(g + j), normed = (load(from + j) - mean) * inverse;
                store(shift_sums + j, load(shift_sums + j) + up);
                store(scale_sums + j, load(scale_sums + j) + up * normed);
                const vec scaled = up * (load(scales + j) + 1.0f);
                sums += scaled;
                inner += scaled * normed;
            }
            const float average = sum(sums) / D, along = sum(inner) / D;
            for (int64_t j = 0; j < D; j += LANES) {
                const vec normed = (load(from + j) - mean) * inverse;
                const vec scaled = load(g + j) * (load(scales + j) + 1.0f);
                stream(grad_x + row * D + j, (scaled - average - normed * along) * inverse);
            }
        }
        finish_streaming();
    }
    add_partial_sums(partial, 2 * D, B * K, chunks.per_group(), D, grad_shift);
    add_partial_sums(partial + D, 2 * D, B * K, chunks.per_group(), D, grad_scale);
}

// out = x + gate * update; gate is (B, K, D) with the strides given, the rest (B, N, D).
void gated_residual_forward(const float* x, const float* gate, const float* update,
                            int64_t gate_sample, int64_t gate_group, float* out,
                            const int64_t* ends, int64_t B, int64_t N, int64_t K, int64_t D) {
    const Chunks chunks(B, ends, K);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks.count(); c++) {
        const Chunk chunk = chunks[c];
        const float* gates = gate + chunk.sample * gate_sample + chunk.group * gate_group;
        for (int64_t t = chunk.first; t < chunk.end; t++) {
            const int64_t row = (chunk.sample * N + t) * D;
            for (int64_t j = 0; j < D; j += LANES)
                stream(out + row + j, load(x + row + j) + load(gates + j) * load(update + row + j));
        }
        finish_streaming();
    }
}

// Gradients of `gated_residual_forward` with respect to gate and update; that of x is `grad`.
void gated_residual_backward(const float* grad, const float* gate, const float* update,
                             int64_t gate_sample, int64_t gate_group, float* grad_gate,
                             float* grad_update, const int64_t* ends, int64_t B, int64_t N,
                             int64_t K, int64_t D) {
    const Chunks chunks(B, ends, K);
    Scratch scratch(chunks.count() * D);
    float* partial = scratch.take(chunks.count() * D);
    std::fill(partial, partial + chunks.count() * D, 0.0f);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks.count(); c++) {
        const Chunk chunk = chunks[c];
        const float* gates = gate + chunk.sample * gate_sample + chunk.group * gate_group;
        float* sums = partial + c * D;
        for (int64_t t = chunk.first; t < chunk.end; t++) {
            const int64_t row = (chunk.sample * N + t) * D;
            for (int64_t j = 0; j < D; j += LANES) {
                const vec g = load(grad + row + j);
                stream(grad_update + row + j, g * load(gates + j));
                store(sums + j, load(sums + j) + g * load(update + row + j));
            }
        }
        finish_streaming();
    }
    add_partial_sums(partial, D, B * K, chunks.per_group(), D, grad_gate);
}

// GELU in its tanh form, x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
// `count` is a multiple of LANES, here and below.
void gelu_forward(const float* x, float* out, int64_t count) {
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; i += LANES) {
            const vec a = load(x + i);
            const vec u = a * (a * a * 0.0356774081f + 0.7978845608f);
            stream(out + i, a / (power_of_two(u * (-2 * LOG2_E)) + 1.0f));
        }
        finish_streaming();
    }
}

void gelu_backward(const float* grad, const float* x, float* grad_x, int64_t count) {
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; i += LANES) {
            const vec a = load(x + i), square = a * a;
            const vec u = a * (square * 0.0356774081f + 0.7978845608f);
            const vec share = 1.0f / (power_of_two(u * (-2 * LOG2_E)) + 1.0f);
            const vec slope = square * 0.1070322243f + 0.7978845608f;
            stream(grad_x + i,
                   load(grad + i) * share * (a * (1.0f - share) * slope * 2.0f + 1.0f));
        }
        finish_streaming();
    }
}

// ---- The gradient of a linear layer's weight and bias.

// grad_weight (N, K) = gradᵀ x and grad_bias (N) = the sum over the rows of grad, for grad (M, N) and
// x (M, K). Nothing is transposed: tiles take their columns of grad with a stride. N and K are
// multiples of LANES; every number is summed over the rows in order, however the work is divided.
void linear_gradients(const float* grad, const float* x, float* grad_weight, float* grad_bias,
                      int64_t M, int64_t N, int64_t K) {
    constexpr int64_t DEPTH = 256, ROWS = 96;
    const int64_t down = (N + ROWS - 1) / ROWS;
    int64_t columns = 384;  // of grad_weight in a task: fewer where there are too few tasks
    while (columns > 96 && down * ((K + columns - 1) / columns) < 2 * omp_get_max_threads())
        columns /= 2;
    const int64_t across = (K + columns - 1) / columns;
#pragma omp parallel
    {
        Scratch scratch(ROWS * DEPTH);
        float* packed = scratch.take(ROWS * DEPTH);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < down * across; task++) {
            const int64_t n0 = task % down * ROWS, n = std::min(ROWS, N - n0);
            const int64_t k0 = task / down * columns, k = std::min(columns, K - k0);
            float* to = grad_weight + n0 * K + k0;
            if (k0 == 0) std::fill(grad_bias + n0, grad_bias + n0 + n, 0.0f);
            for (int64_t m0 = 0; m0 < M; m0 += DEPTH) {
                const int64_t m = std::min(DEPTH, M - m0);
                pack(m, n, n, grad + m0 * N + n0, N, packed);
                for (int64_t j = 0; j < n && k0 == 0; j += LANES) {
                    vec sums = load(grad_bias + n0 + j);
                    for (int64_t i = 0; i < m; i++) sums += load(packed + i * n + j);
                    store(grad_bias + n0 + j, sums);
                }
                if (m0)
                    multiply<true>(n, k, m, packed, 1, n, x + m0 * K + k0, K, to, K);
                else
                    multiply<false>(n, k, m, packed, 1, n, x + m0 * K + k0, K, to, K);
            }
        }
    }
}

}  // extern "C"
