/* Fake quantizers with one pass over memory in each direction; called by cpu.py, compiled by
 * build.py.
 *
 * Tensors are dense float32 and processed in memory order. There is one boundary per channel, and
 * element p belongs to channel (p / inner) % channels. Independently of the vector width of the
 * processor and the number of threads, sums run over 16 lanes and over pieces of fixed size, so
 * that resumed training is bit-identical.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define PIECE 32768 /* elements that one thread processes at a time, a multiple of LANES */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

enum { ROUNDING, UNIFORM, TABLE }; /* source of the noise */
enum { INPUT, OUTPUT };            /* tensor that was saved for the backward pass */

typedef struct {
    int law;
    uint32_t first, second; /* halves of the key */
    const float *table;     /* `count` residuals; the first few are repeated at the end */
    int64_t count;
    int64_t origin;         /* index of the first element within the whole batch */
} Noise;

typedef struct {
    vec step, low, high, lowest, highest; /* see functional.Range */
} Range;

/* Rows of a packed range with one column per channel. SLOPE is the derivative of the boundary with
 * respect to its parameter. */
enum { STEP, LOW, HIGH, LOWEST, HIGHEST, SLOPE };
enum { SIGNED, UNSIGNED, AFFINE };         /* grids */

INLINE vec fill(float value) { return value - (vec){0}; }

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Load the first `count` lanes; the others are zero. */
INLINE vec load_part(const float *p, int64_t count) {
    vec v = {0};
    memcpy(&v, p, count * sizeof(float));
    return v;
}

INLINE vec choose(ivec where, vec yes, vec no) {
    return (vec)(((ivec)yes & where) | ((ivec)no & ~where));
}

INLINE vec keep(ivec where, vec value) { return (vec)((ivec)value & where); }

/* Round half to even, for |x| < 2^22, which covers grids of up to 16 bits. */
INLINE vec rounded(vec x) {
    const vec magic = fill(12582912.0f);
    return (x + magic) - magic;
}

/* The finalizer of MurmurHash3 with the second half of the key added in between, as in noise.py.
 * `h` is one position or a vector of positions. */
#define FINALIZE(h, noise, element)                               \
    do {                                                          \
        h ^= h >> 16;                                             \
        h *= 0x85ebca6bu;                                         \
        h ^= h >> 13;                                             \
        h += (noise)->second + (uint32_t)((element) >> 32);       \
        h *= 0xc2b2ae35u;                                         \
        h ^= h >> 16;                                             \
    } while (0)

INLINE uvec hashed(int64_t element, const Noise *noise) {
    const uvec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uvec h = ((uint32_t)element + lanes) ^ noise->first;
    FINALIZE(h, noise, element);
    return h;
}

/* The first lane of `hashed`. */
INLINE uint32_t hashed_one(int64_t element, const Noise *noise) {
    uint32_t h = (uint32_t)element ^ noise->first;
    FINALIZE(h, noise, element);
    return h;
}

INLINE const float *place_in_table(int64_t group, const Noise *noise) {
    return noise->table + (((uint64_t)hashed_one(group, noise) * (uint64_t)noise->count) >> 32);
}

/* A group of LANES adjacent elements reads LANES adjacent entries of the table from a hashed
 * position. Hashing a position per element would be several times slower. */
INLINE vec drawn(int64_t element, const Noise *noise) {
    const float *here = place_in_table(element / LANES, noise);
    if (element % LANES == 0) return load(here);
    const int64_t rest = LANES - element % LANES;
    const float *next = place_in_table(element / LANES + 1, noise);
    float out[LANES];
    for (int lane = 0; lane < LANES; lane++)
        out[lane] = lane < rest ? here[LANES - rest + lane] : next[lane - rest];
    return load(out);
}

/* Return the noise of LANES elements, in units of the step. */
INLINE vec noise_of(int law, int64_t element, const Noise *noise) {
    element += noise->origin;
    if (law == TABLE) return drawn(element, noise);
    uvec h = hashed(element, noise);
    return (__builtin_convertvector((ivec)h >> 8, vec) + 0.5f) * 0x1p-24f;
}

INLINE vec round_to_grid(vec x, Range r) {
    vec scaled = x / r.step;
    scaled = choose(scaled < r.lowest, r.lowest, scaled);
    scaled = choose(scaled > r.highest, r.highest, scaled);
    return rounded(scaled) * r.step;
}

INLINE vec residual_of(vec x, vec step) {
    vec scaled = x / step;
    return rounded(scaled) - scaled;
}

INLINE vec add_noise(int law, int64_t element, const Noise *noise, vec x, Range r) {
    vec y = x + noise_of(law, element, noise) * r.step;
    /* The backward pass may infer truncation from `y`, so no other element may equal a boundary. */
    y = (vec)((ivec)y ^ (((y == r.high) | (y == r.low)) & 1));
    y = choose(x >= r.high, r.high, y);
    return choose(x <= r.low, r.low, y);
}

typedef struct {
    vec step, low, high;
} Sums;

/* Return the gradient with respect to x, given the gradient `g` with respect to the output, and
 * add to the sums for step, low and high. */
INLINE vec collect(vec g, ivec above, ivec below, vec noise, Sums *sums) {
    vec inside = keep(~(above | below), g);
    sums->step += keep(~(above | below), g * noise);
    sums->low += keep(below, g);
    sums->high += keep(above, g);
    return inside;
}

INLINE vec backward_from_output(int law, int64_t element, const Noise *noise, vec y, vec g,
                                Range r, Sums *sums) {
    return collect(g, y == r.high, y == r.low, noise_of(law, element, noise), sums);
}

INLINE vec backward_from_input(int law, int64_t element, const Noise *noise, vec x, vec g, Range r,
                               Sums *sums) {
    vec n = law == ROUNDING ? residual_of(x, r.step) : noise_of(law, element, noise);
    return collect(g, x >= r.high, x <= r.low, n, sums);
}

INLINE double total(vec v) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

typedef struct {
    const float *x;  /* forward: input; backward: input or noisy output */
    const float *g;  /* backward: gradient with respect to the output */
    float *out;      /* forward: output; backward: gradient with respect to the input */
    int kept;        /* backward: INPUT or OUTPUT, the meaning of `x` */
    int64_t count, channels, inner;
    const float *range;
    double *sums; /* backward: three per piece with one boundary, otherwise per channel */
    Noise noise;
    int threads;
} Call;

/* Process `left` elements, at most LANES, starting at `i`. */
INLINE void forward_at(int law, const Call *c, int64_t i, int64_t left, Range r) {
    vec x = load_part(c->x + i, left);
    vec y = law == ROUNDING ? round_to_grid(x, r) : add_noise(law, i, &c->noise, x, r);
    memcpy(c->out + i, &y, left * sizeof(float));
}

INLINE void backward_at(int law, int kept, const Call *c, int64_t i, int64_t left, Range r,
                        Sums *sums) {
    vec x = load_part(c->x + i, left), g = load_part(c->g + i, left), out;
    if (kept == INPUT)
        out = backward_from_input(law, i, &c->noise, x, g, r, sums);
    else
        out = backward_from_output(law, i, &c->noise, x, g, r, sums);
    memcpy(c->out + i, &out, left * sizeof(float));
}

/* Elements to process: groups of `width` adjacent ones (LANES at most) every `stride` elements. */
typedef struct {
    int64_t from, to, stride, width;
} Walk;

INLINE void at(int law, int backward, int kept, const Call *c, int64_t i, int64_t left, Range r,
               Sums *sums) {
    if (backward)
        backward_at(law, kept, c, i, left, r, sums);
    else
        forward_at(law, c, i, left, r);
}

/* `law`, `backward` and `kept` are constants at every call site, so each case gets its own loop. */
INLINE void loop(int law, int backward, int kept, const Call *c, Walk w, Range r, Sums *sums) {
    Sums own = *sums; /* in registers */
    int64_t i = w.from;
    if (w.width == LANES)
        for (; i + LANES <= w.to; i += w.stride) at(law, backward, kept, c, i, LANES, r, &own);
    for (; i < w.to; i += w.stride) {
        int64_t left = w.to - i < w.width ? w.to - i : w.width;
        at(law, backward, kept, c, i, left, r, &own);
    }
    *sums = own;
}

static void walk(const Call *c, int backward, Walk w, const Range *range, Sums *sums) {
    const Range r = *range;
#define NUMBER(law, backward, kept) (law + 3 * (kept + 2 * backward))
#define CASE(law, backward, kept)                 \
    case NUMBER(law, backward, kept):             \
        loop(law, backward, kept, c, w, r, sums); \
        break;
    switch (NUMBER(c->noise.law, backward, c->kept)) {
        CASE(ROUNDING, 0, INPUT)
        CASE(UNIFORM, 0, INPUT)
        CASE(TABLE, 0, INPUT)
        CASE(ROUNDING, 1, INPUT)
        CASE(UNIFORM, 1, INPUT)
        CASE(UNIFORM, 1, OUTPUT)
        CASE(TABLE, 1, INPUT)
        CASE(TABLE, 1, OUTPUT)
    }
#undef CASE
#undef NUMBER
}

INLINE Range range_of(const Call *c, int64_t channel) {
    const float *r = c->range + channel;
    const int64_t n = c->channels;
    return (Range){fill(r[STEP * n]), fill(r[LOW * n]), fill(r[HIGH * n]), fill(r[LOWEST * n]),
                   fill(r[HIGHEST * n])};
}

INLINE void store_sums(double *to, const Sums *sums) {
    to[0] = total(sums->step);
    to[1] = total(sums->low);
    to[2] = total(sums->high);
}

/* One boundary; the tensor is split into pieces of fixed size. */
static void per_tensor(const Call *c, int backward) {
    const Range r = range_of(c, 0);
    const int64_t pieces = (c->count + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1 && pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t from = piece * PIECE, to = from + PIECE < c->count ? from + PIECE : c->count;
        Sums sums = {{0}, {0}, {0}};
        walk(c, backward, (Walk){from, to, LANES, LANES}, &r, &sums);
        if (backward) store_sums(c->sums + 3 * piece, &sums);
    }
}

/* One boundary per channel; each channel consists of contiguous runs of `inner` elements. */
static void per_channel(const Call *c, int backward) {
    const int64_t stride = c->channels * c->inner;
    const int many = c->threads > 1 && c->count > PIECE;
#pragma omp parallel for schedule(static) num_threads(c->threads) if (many)
    for (int64_t channel = 0; channel < c->channels; channel++) {
        const Range r = range_of(c, channel);
        Sums sums = {{0}, {0}, {0}};
        for (int64_t from = channel * c->inner; from < c->count; from += stride)
            walk(c, backward, (Walk){from, from + c->inner, LANES, LANES}, &r, &sums);
        if (backward) store_sums(c->sums + 3 * channel, &sums);
    }
}

/* One boundary per channel where adjacent elements belong to different channels: one lane each. */
static void side_by_side(const Call *c, int backward) {
    const int64_t blocks = (c->channels + LANES - 1) / LANES;
    const int many = c->threads > 1 && c->count > PIECE;
#pragma omp parallel for schedule(static) num_threads(c->threads) if (many)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * LANES;
        const int64_t lanes = c->channels - first < LANES ? c->channels - first : LANES;
        const float *row = c->range + first;
        const int64_t n = c->channels;
        const Range r = {load_part(row + STEP * n, lanes), load_part(row + LOW * n, lanes),
                         load_part(row + HIGH * n, lanes), load_part(row + LOWEST * n, lanes),
                         load_part(row + HIGHEST * n, lanes)};
        Sums sums = {{0}, {0}, {0}};
        walk(c, backward, (Walk){first, c->count, c->channels, lanes}, &r, &sums);
        for (int64_t lane = 0; backward && lane < lanes; lane++) {
            double *to = c->sums + 3 * (first + lane);
            to[0] = sums.step[lane];
            to[1] = sums.low[lane];
            to[2] = sums.high[lane];
        }
    }
}

static void run(const Call *c, int backward) {
    if (c->channels == 1)
        per_tensor(c, backward);
    else if (c->inner == 1)
        side_by_side(c, backward);
    else
        per_channel(c, backward);
}

/* noise.residuals_of: store the residuals of every `stride`-th element inside the range in the
 * given order. The table has `sampled` + LANES entries, `scratch` has `sampled`. Return the number
 * of residuals. */
int64_t nipq_residuals(const float *x, int64_t stride, int64_t sampled, int64_t channels,
                       int64_t inner, const float *range, const int64_t *order, float *scratch,
                       float *table, int threads) {
    const float none = 2.0f; /* larger than any residual */
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < sampled; i++) {
        const float *r = range + (channels == 1 ? 0 : (i * stride / inner) % channels);
        const float value = x[i * stride], scaled = value / r[STEP * channels];
        const int inside = value > r[LOW * channels] && value < r[HIGH * channels];
        scratch[i] = inside ? nearbyintf(scaled) - scaled : none;
    }
    int64_t used = 0;
    for (int64_t i = 0; i < sampled; i++) {
        table[used] = scratch[order[i]];
        used += table[used] != none;
    }
    for (int64_t i = 0; i < LANES; i++) table[used + i] = used ? table[i % used] : 0.0f;
    return used;
}

/* Return functional.positive of `raw` if `start` is given, otherwise `raw` as it is. */
INLINE float boundary_of(float raw, const float *start, int64_t i, float *slope) {
    if (start == NULL) {
        *slope = 1.0f;
        return raw;
    }
    const float e = expf(raw > 0.0f ? -raw : raw); /* exp(-|raw|) */
    const float softplus = (raw > 0.0f ? raw : 0.0f) + log1pf(e);
    const float alpha = start[i] * softplus, least = 1e-12f; /* functional.MIN_BOUNDARY */
    *slope = start[i] * (raw > 0.0f ? 1.0f : e) / (1.0f + e);
    return alpha < least ? least : alpha;
}

/* functional.quantization_range as a packed range. */
void nipq_range(const float *raw, const float *start, float bits, float minimum, int grid,
                int64_t channels, float *range) {
    const float levels = grid == SIGNED ? exp2f(bits - 1.0f) - 1.0f : exp2f(bits) - 1.0f;
    for (int64_t i = 0; i < channels; i++) {
        float *to = range + i;
        const float alpha = boundary_of(raw[i], start, i, &to[SLOPE * channels]);
        const float step = alpha / levels;
        float below = grid == SIGNED ? levels : 0.0f; /* number of levels below zero */
        if (grid == AFFINE) {
            below = nearbyintf(-minimum / step);
            below = below < 0.0f ? 0.0f : (below > levels ? levels : below);
        }
        to[STEP * channels] = step;
        to[LOW * channels] = grid == SIGNED ? -alpha : -below * step;
        to[HIGH * channels] = grid == AFFINE ? alpha - below * step : alpha;
        to[LOWEST * channels] = -below;
        to[HIGHEST * channels] = grid == AFFINE ? levels - below : levels;
    }
}

/* functional.range_gradients, given `pieces` sums of a single boundary, or one per channel. */
void nipq_range_gradients(const float *range, int grid, int64_t channels, const double *sums,
                          int64_t pieces, float *learned, float *bits) {
    double per_bit = 0.0;
    for (int64_t i = 0; i < channels; i++) {
        const float *r = range + i;
        double step = 0.0, low = 0.0, high = 0.0;
        for (int64_t p = i; p < (channels == 1 ? pieces : i + 1); p++) {
            step += sums[3 * p];
            low += sums[3 * p + 1];
            high += sums[3 * p + 2];
        }
        double levels = r[HIGHEST * channels];
        if (grid == AFFINE) {
            const double lowest = r[LOWEST * channels];
            levels -= lowest;
            step += lowest * (low + high);
        }
        const double by_alpha = (grid == SIGNED ? high - low : high) + step / levels;
        learned[i] = (float)(by_alpha * r[SLOPE * channels]);
        per_bit -= step * r[STEP * channels] * (1.0 + 1.0 / levels) * 0.6931471805599453;
    }
    *bits = (float)per_bit;
}

void nipq_forward(const Call *c) { run(c, 0); }

void nipq_backward(const Call *c) { run(c, 1); }
