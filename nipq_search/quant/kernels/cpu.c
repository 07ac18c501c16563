/* Fake quantizers in one pass over memory forward and one backward; see cpu.py, which builds this.
 *
 * Tensors are dense float32, walked in the order in which they lie in memory. Boundaries are one
 * per channel: element p belongs to channel (p / inner) % channels. Whatever a processor's vector
 * width and the number of threads are, sums run over 16 lanes and over pieces of one size, so that
 * a resumed training sees the same bits.
 */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define PIECE 32768 /* elements of one thread's turn, a multiple of LANES */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int16_t svec __attribute__((vector_size(2 * LANES)));
typedef int8_t cvec __attribute__((vector_size(LANES)));

enum { ROUNDING, UNIFORM, TABLE }; /* where the noise comes from */

typedef struct {
    int law;
    uint32_t first, second; /* halves of the key */
    const float *table;     /* residuals, of which the first `count` are drawn from */
    int64_t count;
} Noise;

typedef struct {
    vec step, low, high, lowest, highest; /* as functional.Range */
} Range;

static inline vec fill(float value) { return value - (vec){0}; }

static inline vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The first `count` lanes; all of them where that is more. */
static inline vec load_part(const float *p, int64_t count) {
    vec v = {0};
    memcpy(&v, p, count * sizeof(float));
    return v;
}

static inline vec choose(ivec where, vec yes, vec no) {
    return (vec)(((ivec)yes & where) | ((ivec)no & ~where));
}

static inline vec keep(ivec where, vec value) { return (vec)((ivec)value & where); }

/* Half to even, for |x| < 2^22: the grids of 16 bits and fewer. */
static inline vec rounded(vec x) {
    const vec magic = fill(12582912.0f);
    return (x + magic) - magic;
}

/* The finalizer of MurmurHash3, the key's second half put in between; noise.py has the same. */
static inline uvec hashed(int64_t element, const Noise *noise) {
    const uvec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uvec h = ((uint32_t)element + lanes) ^ noise->first;
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h += noise->second + (uint32_t)(element >> 32);
    h *= 0xc2b2ae35u;
    return h ^ (h >> 16);
}

/* Noise of LANES elements, in units of the step. */
static inline vec noise_of(int law, int64_t element, const Noise *noise) {
    uvec h = hashed(element, noise);
    if (law == UNIFORM)
        return (__builtin_convertvector((ivec)h >> 8, vec) + 0.5f) * 0x1p-24f;
    vec out;
    for (int lane = 0; lane < LANES; lane++)
        out[lane] = noise->table[((uint64_t)h[lane] * (uint64_t)noise->count) >> 32];
    return out;
}

/* What the backward reads of a hard quantizer: the rounding residual in 16 bits, or which end. */
#define ABOVE 32767
#define BELOW (-32768)
#define CODES 65532.0f /* codes of one step */

static inline vec round_to_grid(vec x, Range r) {
    vec scaled = x / r.step;
    scaled = choose(scaled < r.lowest, r.lowest, scaled);
    scaled = choose(scaled > r.highest, r.highest, scaled);
    return rounded(scaled) * r.step;
}

static inline vec residual_of(vec x, vec step) {
    vec scaled = x / step;
    return rounded(scaled) - scaled;
}

static inline svec code_of(vec x, Range r) {
    ivec above = x >= r.high, below = x <= r.low;
    vec residual = keep(~(above | below), residual_of(x, r.step)); /* others may be no numbers */
    ivec code = __builtin_convertvector(rounded(residual * CODES), ivec);
    code = (above & ABOVE) | (below & BELOW) | (~(above | below) & code);
    return __builtin_convertvector(code, svec);
}

static inline vec add_noise(int law, int64_t element, const Noise *noise, vec x, Range r) {
    vec y = x + noise_of(law, element, noise) * r.step;
    /* The backward tells by `y` what was truncated: no other element may lie on an end. */
    y = (vec)((ivec)y ^ (((y == r.high) | (y == r.low)) & 1));
    y = choose(x >= r.high, r.high, y);
    return choose(x <= r.low, r.low, y);
}

typedef struct {
    vec step, low, high;
} Sums;

/* Gradient of x from `g`, where `part` is the derivative with respect to the step. */
static inline vec collect(vec g, ivec above, ivec below, vec noise, Sums *sums) {
    vec inside = keep(~(above | below), g);
    sums->step += keep(~(above | below), g * noise);
    sums->low += keep(below, g);
    sums->high += keep(above, g);
    return inside;
}

static inline vec noise_backward(int law, int64_t element, const Noise *noise, vec y, vec g,
                                 Range r, Sums *sums) {
    return collect(g, y == r.high, y == r.low, noise_of(law, element, noise), sums);
}

static inline vec backward_from_input(vec x, vec g, Range r, Sums *sums) {
    return collect(g, x >= r.high, x <= r.low, residual_of(x, r.step), sums);
}

static inline vec backward_from_code(svec code, vec g, Sums *sums) {
    ivec wide = __builtin_convertvector(code, ivec);
    vec residual = __builtin_convertvector(wide, vec) * (1.0f / CODES);
    return collect(g, wide == ABOVE, wide == BELOW, residual, sums);
}

static inline double total(vec v) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

typedef struct {
    const float *x;  /* input forward; backward the output of noise, the input of rounding */
    const float *g;  /* gradient of the output, backward */
    float *out;      /* output forward, gradient of the input backward */
    int16_t *codes;  /* of rounding, in the place of its input backward; or NULL */
    int64_t count, channels, inner;
    const float *step, *low, *high, *lowest, *highest;
    double *sums; /* backward: three for each piece (one boundary), or for each channel */
    Noise noise;
    int threads;
} Call;

/* LANES elements from `i` on, or the first `left` of them. */
static inline void forward_at(int law, const Call *c, int64_t i, int64_t left, Range r) {
    vec x = left < LANES ? load_part(c->x + i, left) : load(c->x + i), y;
    if (left > LANES) left = LANES;
    if (law == ROUNDING) {
        y = round_to_grid(x, r);
        if (c->codes) {
            svec code = code_of(x, r);
            memcpy(c->codes + i, &code, left * sizeof(int16_t));
        }
    } else {
        y = add_noise(law, i, &c->noise, x, r);
    }
    memcpy(c->out + i, &y, left * sizeof(float));
}

static inline void backward_at(int law, const Call *c, int64_t i, int64_t left, Range r,
                               Sums *sums) {
    vec g = left < LANES ? load_part(c->g + i, left) : load(c->g + i), out;
    if (left > LANES) left = LANES;
    if (law == ROUNDING) {
        if (c->codes) {
            svec code = {0};
            memcpy(&code, c->codes + i, left * sizeof(int16_t));
            out = backward_from_code(code, g, sums);
        } else {
            out = backward_from_input(load_part(c->x + i, left), g, r, sums);
        }
    } else {
        out = noise_backward(law, i, &c->noise, load_part(c->x + i, left), g, r, sums);
    }
    memcpy(c->out + i, &out, left * sizeof(float));
}

static inline void run(int law, int is_backward, const Call *c, int64_t from, int64_t to, Range r,
                       Sums *sums) {
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
        if (is_backward)
            backward_at(law, c, i, LANES, r, sums);
        else
            forward_at(law, c, i, LANES, r);
    }
    if (i < to) {
        if (is_backward)
            backward_at(law, c, i, to - i, r, sums);
        else
            forward_at(law, c, i, to - i, r);
    }
}

static inline Range range_of(const Call *c, int64_t channel) {
    return (Range){fill(c->step[channel]), fill(c->low[channel]), fill(c->high[channel]),
                   fill(c->lowest[channel]), fill(c->highest[channel])};
}

static inline void store_sums(double *to, const Sums *sums) {
    to[0] = total(sums->step);
    to[1] = total(sums->low);
    to[2] = total(sums->high);
}

/* One boundary: pieces of one size. */
static inline void per_tensor(int law, int is_backward, const Call *c) {
    const Range r = range_of(c, 0);
    const int64_t pieces = (c->count + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1 && pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t from = piece * PIECE, to = from + PIECE < c->count ? from + PIECE : c->count;
        Sums sums = {{0}, {0}, {0}};
        run(law, is_backward, c, from, to, r, &sums);
        if (is_backward) store_sums(c->sums + 3 * piece, &sums);
    }
}

/* A boundary per channel, whose elements lie in runs of `inner`. */
static inline void per_channel(int law, int is_backward, const Call *c) {
    const int64_t stride = c->channels * c->inner;
    const int many = c->threads > 1 && c->count > PIECE;
#pragma omp parallel for schedule(static) num_threads(c->threads) if (many)
    for (int64_t channel = 0; channel < c->channels; channel++) {
        const Range r = range_of(c, channel);
        Sums sums = {{0}, {0}, {0}};
        for (int64_t from = channel * c->inner; from < c->count; from += stride)
            run(law, is_backward, c, from, from + c->inner, r, &sums);
        if (is_backward) store_sums(c->sums + 3 * channel, &sums);
    }
}

/* A boundary per channel where channels lie side by side: a lane for each. */
static inline void side_by_side(int law, int is_backward, const Call *c) {
    const int64_t blocks = (c->channels + LANES - 1) / LANES;
    const int many = c->threads > 1 && c->count > PIECE;
#pragma omp parallel for schedule(static) num_threads(c->threads) if (many)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * LANES;
        const int64_t lanes = c->channels - first < LANES ? c->channels - first : LANES;
        const Range r = {load_part(c->step + first, lanes), load_part(c->low + first, lanes),
                         load_part(c->high + first, lanes),
                         load_part(c->lowest + first, lanes),
                         load_part(c->highest + first, lanes)};
        Sums sums = {{0}, {0}, {0}};
        for (int64_t i = first; i < c->count; i += c->channels) {
            if (is_backward)
                backward_at(law, c, i, lanes, r, &sums);
            else
                forward_at(law, c, i, lanes, r);
        }
        for (int64_t lane = 0; is_backward && lane < lanes; lane++) {
            double *to = c->sums + 3 * (first + lane);
            to[0] = sums.step[lane];
            to[1] = sums.low[lane];
            to[2] = sums.high[lane];
        }
    }
}

static inline void walk(int law, int is_backward, const Call *c) {
    if (c->channels == 1)
        per_tensor(law, is_backward, c);
    else if (c->inner == 1)
        side_by_side(law, is_backward, c);
    else
        per_channel(law, is_backward, c);
}

/* The law is a constant in each branch, so that every loop is compiled for it alone. */
#define RUN(NAME, IS_BACKWARD)                                                     \
    void NAME(const Call *c) {                                                     \
        if (c->noise.law == ROUNDING)                                              \
            walk(ROUNDING, IS_BACKWARD, c);                                        \
        else if (c->noise.law == UNIFORM)                                          \
            walk(UNIFORM, IS_BACKWARD, c);                                         \
        else                                                                       \
            walk(TABLE, IS_BACKWARD, c);                                           \
    }

RUN(nipq_forward, 0)
RUN(nipq_backward, 1)

/* min(max(x, 0), cap), which may overwrite x, and a byte for each element that lets gradients by. */
void nipq_relu_forward(const float *x, float *y, int8_t *open, int64_t count, float cap,
                       int threads) {
    const vec zero = {0}, top = fill(cap);
    const int64_t pieces = (count + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t end = (piece + 1) * PIECE < count ? (piece + 1) * PIECE : count;
        for (int64_t i = piece * PIECE; i < end; i += LANES) {
            int64_t left = end - i < LANES ? end - i : LANES;
            vec in = load_part(x + i, left);
            vec out = choose(in < zero, zero, in);
            out = choose(in > top, top, out);
            cvec mask = __builtin_convertvector(~((in <= zero) | (in >= top)), cvec);
            if (left == LANES) {
                memcpy(y + i, &out, sizeof out);
                memcpy(open + i, &mask, sizeof mask);
            } else {
                memcpy(y + i, &out, left * sizeof(float));
                memcpy(open + i, &mask, left);
            }
        }
    }
}

void nipq_relu_backward(const float *g, float *out, const int8_t *open, int64_t count,
                        int threads) {
    const int64_t pieces = (count + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t end = (piece + 1) * PIECE < count ? (piece + 1) * PIECE : count;
        for (int64_t i = piece * PIECE; i < end; i += LANES) {
            int64_t left = end - i < LANES ? end - i : LANES;
            cvec mask = {0};
            memcpy(&mask, open + i, left);
            vec part = keep(__builtin_convertvector(mask, ivec), load_part(g + i, left));
            memcpy(out + i, &part, left * sizeof(float));
        }
    }
}
