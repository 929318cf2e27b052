/* What a training step does between its matrix products, each in one pass over memory. Compiled and called by kernels.py.
 *
 * Every function exists for float and for bfloat16: this file includes itself once for each. Numbers inside are always float32, and each row is
 * summed by one thread in one order, so that the result does not depend on the number of threads. Nothing is allocated but a row per thread, before the
 * threads begin: a function that may find no memory for it returns 1 and has changed nothing.
 */
#ifndef T

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bfloat16;

/* As omp.h has them: its header may be missing where its library is not. */
int omp_get_max_threads(void);
int omp_get_thread_num(void);

static inline float to_float_float(float x) { return x; }
static inline float from_float_float(float x) { return x; }

static inline float to_float_bfloat16(bfloat16 x) {
    union { uint32_t i; float f; } bits = {.i = (uint32_t)x << 16};
    return bits.f;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline bfloat16 from_float_bfloat16(float x) {
    union { float f; uint32_t i; } bits = {.f = x};
    return (bfloat16)((bits.i + 0x7fffu + ((bits.i >> 16) & 1u)) >> 16);
}

/* e^x to 2 units in the last place, without a branch: 2^k times a polynomial of what is left (Cephes' coefficients). Below -87 it is 1e-38; NaN stays. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float k = rintf(x * 1.44269504088896341f);
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } scale = {.i = ((int32_t)k + 127) << 23};
    return p * scale.f;
}

enum { SILU = 0, GELU_TANH = 1 };

/* act(x) and its slope */
static inline void activate(int kind, float x, float *value, float *slope) {
    if (kind == SILU) {
        float s = 1.0f / (1.0f + exponential(-x));
        *value = x * s;
        *slope = s * (1.0f + x * (1.0f - s));
    } else {
        float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        float t = 1.0f - 2.0f / (exponential(2.0f * inner) + 1.0f);
        *value = 0.5f * x * (1.0f + t);
        *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
    }
}

#define JOIN(a, b) a##_##b
#define JOINED(a, b) JOIN(a, b)
#define FN(name) JOINED(name, T)
#define LOAD(x) JOINED(to_float, T)(x)
#define STORE(x) JOINED(from_float, T)(x)

#define T float
#include "kernels.c"
#undef T
#define T bfloat16
#include "kernels.c"
#undef T

#else

/* y = x · scale · (offset + w), scale = 1 / sqrt(mean(x²) + epsilon). x, y: (rows, size); scale: (rows,) */
void FN(rms_norm)(const T *x, const T *w, float offset, float epsilon, T *y, float *scale, long rows, long size) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const T *in = x + row * size;
        T *out = y + row * size;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < size; i++) sum += LOAD(in[i]) * LOAD(in[i]);
        float s = 1.0f / sqrtf(sum / (float)size + epsilon);
        scale[row] = s;
#pragma omp simd
        for (long i = 0; i < size; i++) out[i] = STORE(LOAD(in[i]) * s * (offset + LOAD(w[i])));
    }
}

/* d loss / d x = scale · (slope − normed · mean(slope · normed)), slope = above · (offset + w), normed = x · scale: multiplied first, so that a row whose
 * squares overflow (scale 0) has a gradient of 0 and not of 0 · infinity */
void FN(rms_norm_back)(const T *above, const T *x, const T *w, float offset, const float *scale, T *of_x, long rows, long size) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const T *up = above + row * size, *in = x + row * size;
        T *out = of_x + row * size;
        float s = scale[row], inner = 0.0f;
#pragma omp simd reduction(+ : inner)
        for (long i = 0; i < size; i++) inner += LOAD(up[i]) * (offset + LOAD(w[i])) * (LOAD(in[i]) * s);
        inner /= (float)size;
#pragma omp simd
        for (long i = 0; i < size; i++) out[i] = STORE(s * (LOAD(up[i]) * (offset + LOAD(w[i])) - LOAD(in[i]) * s * inner));
    }
}

/* Heads normed (where w is given) and turned by their position: y = n · cos + rotate_half(n) · sin. x, y: (tokens, heads, size); cos, sin: (tokens, size) */
void FN(norm_and_turn)(const T *x, const T *w, float offset, float epsilon, const T *cosine, const T *sine, T *y, float *scale, long tokens,
                       long heads, long size) {
    long half = size / 2;
#pragma omp parallel for schedule(static)
    for (long row = 0; row < tokens * heads; row++) {
        const T *in = x + row * size, *c = cosine + row / heads * size, *d = sine + row / heads * size;
        T *out = y + row * size;
        float s = 1.0f;
        if (w) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < size; i++) sum += LOAD(in[i]) * LOAD(in[i]);
            scale[row] = s = 1.0f / sqrtf(sum / (float)size + epsilon);
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = LOAD(in[i]) * s * (offset + LOAD(w[i])), b = LOAD(in[i + half]) * s * (offset + LOAD(w[i + half]));
                out[i] = STORE(a * LOAD(c[i]) - b * LOAD(d[i]));
                out[i + half] = STORE(b * LOAD(c[i + half]) + a * LOAD(d[i + half]));
            }
        } else {
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = LOAD(in[i]), b = LOAD(in[i + half]);
                out[i] = STORE(a * LOAD(c[i]) - b * LOAD(d[i]));
                out[i + half] = STORE(b * LOAD(c[i + half]) + a * LOAD(d[i + half]));
            }
        }
    }
}

int FN(norm_and_turn_back)(const T *above, const T *x, const T *w, float offset, const float *scale, const T *cosine, const T *sine, T *of_x,
                            long tokens, long heads, long size) {
    long half = size / 2;
    float *rows = malloc(omp_get_max_threads() * size * sizeof(float));
    if (!rows) return 1;
#pragma omp parallel
    {
        float *turned = rows + omp_get_thread_num() * size;
#pragma omp for schedule(static)
        for (long row = 0; row < tokens * heads; row++) {
            const T *up = above + row * size, *in = x + row * size, *c = cosine + row / heads * size, *d = sine + row / heads * size;
            T *out = of_x + row * size;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = LOAD(up[i]), b = LOAD(up[i + half]);
                turned[i] = a * LOAD(c[i]) + b * LOAD(d[i + half]);
                turned[i + half] = b * LOAD(c[i + half]) - a * LOAD(d[i]);
            }
            if (!w) {
#pragma omp simd
                for (long i = 0; i < size; i++) out[i] = STORE(turned[i]);
                continue;
            }
            float s = scale[row], inner = 0.0f;
#pragma omp simd reduction(+ : inner)
            for (long i = 0; i < size; i++) {
                turned[i] *= offset + LOAD(w[i]);
                inner += turned[i] * (LOAD(in[i]) * s);
            }
            inner /= (float)size;
#pragma omp simd
            for (long i = 0; i < size; i++) out[i] = STORE(s * (turned[i] - LOAD(in[i]) * s * inner));
        }
    }
    free(rows);
    return 0;
}

/* inner = act(gate) · up */
void FN(gated)(int kind, const T *gate, const T *up, T *inner, long count) {
#define LOOP(KIND)                                     \
    _Pragma("omp parallel for simd schedule(static)")  \
    for (long i = 0; i < count; i++) {                 \
        float value, slope;                            \
        activate(KIND, LOAD(gate[i]), &value, &slope); \
        inner[i] = STORE(value * LOAD(up[i]));         \
    }
    if (kind == SILU) { LOOP(SILU) } else { LOOP(GELU_TANH) }
#undef LOOP
}

/* From d loss / d inner: `inner` again, d loss / d gate, and d loss / d up in the place of what came. */
void FN(gated_back)(int kind, const T *gate, const T *up, T *above, T *inner, T *of_gate, long count) {
#define LOOP(KIND)                                           \
    _Pragma("omp parallel for simd schedule(static)")        \
    for (long i = 0; i < count; i++) {                       \
        float value, slope, u = LOAD(up[i]), a = LOAD(above[i]); \
        activate(KIND, LOAD(gate[i]), &value, &slope);       \
        inner[i] = STORE(value * u);                         \
        of_gate[i] = STORE(a * u * slope);                   \
        above[i] = STORE(a * value);                         \
    }
    if (kind == SILU) { LOOP(SILU) } else { LOOP(GELU_TANH) }
#undef LOOP
}

/* Scores become probabilities. scores: (batch, tokens, group, keys), raw products; token i sees keys first + i − window + 1 … first + i.
 * log_sums: (batch, tokens, group), log Σ exp(scale · score) / scale: in units of the scores, and always subtracted before the multiplication, since
 * a fused multiply-add of scores near 1e20 would be off by far more than e's largest power. */
int FN(softmax)(T *scores, float scale, float *log_sums, long batch, long tokens, long group, long keys, long first, long window) {
    float *rows = malloc(omp_get_max_threads() * keys * sizeof(float));
    if (!rows) return 1;
#pragma omp parallel
    {
        float *powers = rows + omp_get_thread_num() * keys;
#pragma omp for schedule(static)
        for (long row = 0; row < batch * tokens * group; row++) {
            T *s = scores + row * keys;
            long last = first + row / group % tokens, begin = last - window + 1 < 0 ? 0 : last - window + 1;
            float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
            for (long j = begin; j <= last; j++) {
                float value = LOAD(s[j]);
                most = value > most ? value : most;
            }
#pragma omp simd reduction(+ : sum)
            for (long j = begin; j <= last; j++) sum += powers[j] = exponential((LOAD(s[j]) - most) * scale);
            log_sums[row] = most + logf(sum) / scale;
            float share = 1.0f / sum;
            for (long j = 0; j < begin; j++) s[j] = STORE(0.0f);
#pragma omp simd
            for (long j = begin; j <= last; j++) s[j] = STORE(powers[j] * share);
            for (long j = last + 1; j < keys; j++) s[j] = STORE(0.0f);
        }
    }
    free(rows);
    return 0;
}

/* From raw scores and d loss / d probability: probabilities in the place of the scores, d loss / d score in the place of what came. */
int FN(softmax_back)(T *scores, T *above, float scale, const float *log_sums, long batch, long tokens, long group, long keys, long first,
                      long window) {
    float *rows = malloc(omp_get_max_threads() * keys * sizeof(float));
    if (!rows) return 1;
#pragma omp parallel
    {
        float *shares = rows + omp_get_thread_num() * keys;
#pragma omp for schedule(static)
        for (long row = 0; row < batch * tokens * group; row++) {
            T *s = scores + row * keys, *up = above + row * keys;
            long last = first + row / group % tokens, begin = last - window + 1 < 0 ? 0 : last - window + 1;
            float sum = log_sums[row], inner = 0.0f;
#pragma omp simd reduction(+ : inner)
            for (long j = begin; j <= last; j++) {
                shares[j] = exponential((LOAD(s[j]) - sum) * scale);
                inner += shares[j] * LOAD(up[j]);
            }
            for (long j = 0; j < begin; j++) s[j] = up[j] = STORE(0.0f);
#pragma omp simd
            for (long j = begin; j <= last; j++) {
                s[j] = STORE(shares[j]);
                up[j] = STORE(shares[j] * (LOAD(up[j]) - inner) * scale);
            }
            for (long j = last + 1; j < keys; j++) s[j] = up[j] = STORE(0.0f);
        }
    }
    free(rows);
    return 0;
}

/* A block of logits joins log_sums, the log Σ exp of each row so far (-inf before the first block); and `bound`, for each word of the block, is an upper
 * bound of its probability in any row: exp(logit − the largest of what is known not to be above the row's final log Σ exp). `least` holds a logit
 * of each row that is known beforehand, its target's. logits: (rows, words); least, log_sums: (rows,); bound: (words,) */
int FN(join_logits)(const T *logits, const float *least, float *log_sums, float *bound, long rows, long words) {
    float *all = calloc(omp_get_max_threads() * words, sizeof(float));
    if (!all) return 1;
    memset(bound, 0, words * sizeof(float));
#pragma omp parallel
    {
        float *mine = all + omp_get_thread_num() * words;
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            const T *in = logits + row * words;
            float before = log_sums[row], high = before > least[row] ? before : least[row], sum = 0.0f;
#pragma omp simd reduction(max : high)
            for (long i = 0; i < words; i++) {
                float value = LOAD(in[i]);
                high = value > high ? value : high;
            }
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < words; i++) {
                float power = exponential(LOAD(in[i]) - high);
                sum += power;
                mine[i] = power > mine[i] ? power : mine[i];
            }
            log_sums[row] = high + logf(sum + expf(before - high));
        }
#pragma omp critical
        for (long i = 0; i < words; i++) bound[i] = mine[i] > bound[i] ? mine[i] : bound[i];
    }
    free(all);
    return 0;
}

/* Logits become (p − 1 at the target) · by_row, and `missing` loses the probabilities. place: (rows,) where the target stands; outside the block:
 * elsewhere. share: (rows,) the target's probability, from its logit in float32: the one in the block is rounded. */
void FN(logit_slopes)(T *logits, const float *log_sums, const float *by_row, const float *share, float *missing, const int64_t *place, int64_t start,
                      long rows, long words) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        T *in = logits + row * words;
        float sum = 0.0f, all = log_sums[row], by = by_row[row];
        int64_t target = place[row] - start;
        int inside = target >= 0 && target < words;
        float rounded = inside ? exponential(LOAD(in[target]) - all) : 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < words; i++) {
            float p = exponential(LOAD(in[i]) - all);
            sum += p;
            in[i] = STORE(p * by);
        }
        missing[row] -= sum;
        if (inside) {
            missing[row] += rounded - share[row];
            in[target] = STORE((share[row] - 1.0f) * by);
        }
    }
}

/* Rows to 8 bits, each with its own scale: rounded = 128 + round(x / scale), scale = max |x| / 127; NaN where the row holds what is not finite. */
void FN(to_bytes)(const T *x, uint8_t *rounded, float *scale, long rows, long size) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const T *in = x + row * size;
        float most = 1e-12f;
        int spoilt = 0;
#pragma omp simd reduction(max : most) reduction(| : spoilt)
        for (long i = 0; i < size; i++) {
            union { float f; uint32_t i; } value = {.f = fabsf(LOAD(in[i]))};
            most = value.f > most ? value.f : most;
            spoilt |= value.i >= 0x7f800000u; /* infinite or NaN; value · 0 is folded to 0 by GCC 12 */
        }
        float by = 127.0f / most;
        scale[row] = spoilt ? NAN : most / 127.0f;
#pragma omp simd
        for (long i = 0; i < size; i++) rounded[row * size + i] = (uint8_t)(128 + (int32_t)rintf(LOAD(in[i]) * by));
    }
}

/* y = x · scale of the row, x: (rows, size) float32 */
void FN(scale_rows)(const float *x, const float *scale, T *y, long rows, long size) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
#pragma omp simd
        for (long i = 0; i < size; i++) y[row * size + i] = STORE(x[row * size + i] * scale[row]);
}

#endif
