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

enum { ROUNDING, UNIFORM, TABLE }; /* where the noise comes from */

typedef struct {
    int law;
    uint32_t first, second; /* halves of the key */
    const float *table;     /* residuals, of which the first `count` are drawn from */
    int64_t count;
} Noise;

typedef struct {
    vec step, low, high;
} Range;

static inline vec fill(float value) { return value - (vec){0}; }

static inline vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

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

/* Noise of LANES elements, in units of the step; that of rounding is its own residual. */
static inline vec noise_of(int law, int64_t element, const Noise *noise, vec x, vec step) {
    if (law == ROUNDING) {
        vec scaled = x / step;
        return rounded(scaled) - scaled;
    }
    uvec h = hashed(element, noise);
    if (law == UNIFORM)
        return (__builtin_convertvector((ivec)h >> 8, vec) + 0.5f) * 0x1p-24f;
    vec out;
    for (int lane = 0; lane < LANES; lane++)
        out[lane] = noise->table[((uint64_t)h[lane] * (uint64_t)noise->count) >> 32];
    return out;
}

static inline vec forward(int law, int64_t element, const Noise *noise, vec x, Range r) {
    if (law == ROUNDING) { /* low and high are integers here */
        vec scaled = x / r.step;
        scaled = choose(scaled < r.low, r.low, scaled);
        scaled = choose(scaled > r.high, r.high, scaled);
        return rounded(scaled) * r.step;
    }
    vec y = x + noise_of(law, element, noise, x, r.step) * r.step;
    y = choose(x >= r.high, r.high, y);
    return choose(x <= r.low, r.low, y);
}

typedef struct {
    vec step, low, high;
} Sums;

static inline vec backward(int law, int64_t element, const Noise *noise, vec x, vec g, Range r,
                           Sums *sums) {
    ivec above = x >= r.high, below = x <= r.low;
    vec inside = keep(~(above | below), g);
    vec part = inside * noise_of(law, element, noise, x, r.step);
    /* Far outside the noise of rounding may be no number; nothing outside counts. */
    sums->step += keep(~(above | below), part);
    sums->low += keep(below, g);
    sums->high += keep(above, g);
    return inside;
}

static inline double total(vec v) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

static inline void forward_run(int law, const Noise *noise, const float *x, float *y, int64_t from,
                               int64_t to, Range r) {
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
        vec out = forward(law, i, noise, load(x + i), r);
        memcpy(y + i, &out, sizeof out);
    }
    if (i < to) {
        vec out = forward(law, i, noise, load_part(x + i, to - i), r);
        memcpy(y + i, &out, (to - i) * sizeof(float));
    }
}

static inline void backward_run(int law, const Noise *noise, const float *x, const float *g,
                                float *gx, int64_t from, int64_t to, Range r, Sums *sums) {
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
        vec out = backward(law, i, noise, load(x + i), load(g + i), r, sums);
        memcpy(gx + i, &out, sizeof out);
    }
    if (i < to) {
        int64_t left = to - i;
        vec out =
            backward(law, i, noise, load_part(x + i, left), load_part(g + i, left), r, sums);
        memcpy(gx + i, &out, left * sizeof(float));
    }
}

typedef struct {
    const float *x, *g; /* g: only backward */
    float *out;         /* y forward, the gradient of x backward */
    int64_t count, channels, inner;
    const float *step, *low, *high;
    double *sums; /* backward, per tensor: three for each piece; per channel: three for each */
    Noise noise;
    int threads;
} Call;

static inline Range range_of(const Call *c, int64_t channel) {
    return (Range){fill(c->step[channel]), fill(c->low[channel]), fill(c->high[channel])};
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
        if (is_backward) {
            Sums sums = {{0}, {0}, {0}};
            backward_run(law, &c->noise, c->x, c->g, c->out, from, to, r, &sums);
            store_sums(c->sums + 3 * piece, &sums);
        } else {
            forward_run(law, &c->noise, c->x, c->out, from, to, r);
        }
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
        for (int64_t from = channel * c->inner; from < c->count; from += stride) {
            if (is_backward)
                backward_run(law, &c->noise, c->x, c->g, c->out, from, from + c->inner, r, &sums);
            else
                forward_run(law, &c->noise, c->x, c->out, from, from + c->inner, r);
        }
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
                         load_part(c->high + first, lanes)};
        Sums sums = {{0}, {0}, {0}};
        for (int64_t i = first; i < c->count; i += c->channels) {
            vec x = load_part(c->x + i, lanes), out;
            if (is_backward)
                out = backward(law, i, &c->noise, x, load_part(c->g + i, lanes), r, &sums);
            else
                out = forward(law, i, &c->noise, x, r);
            memcpy(c->out + i, &out, lanes * sizeof(float));
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
