/* ReLU that saves one byte per element; see relu.py. Compiled together with cpu.c by build.py. */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define PIECE 32768 /* elements that one thread processes at a time, a multiple of LANES */

/* Compute min(max(x, 0), cap), possibly in place, and store one byte per element: 1 if its
 * gradient passes, otherwise 0. */
void nipq_relu_forward(const float *x, float *y, int8_t *open, int64_t count, float cap,
                       int threads) {
    const int64_t pieces = (count + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t end = (piece + 1) * PIECE < count ? (piece + 1) * PIECE : count;
        float part[LANES * 4];
        for (int64_t i = piece * PIECE; i < end; i += LANES * 4) {
            const int64_t left = end - i < LANES * 4 ? end - i : LANES * 4;
            memcpy(part, x + i, left * sizeof(float));
            for (int lane = 0; lane < left; lane++)
                open[i + lane] = !(part[lane] <= 0.0f) & !(part[lane] >= cap);
            for (int lane = 0; lane < left; lane++) {
                float v = part[lane] < 0.0f ? 0.0f : part[lane];
                y[i + lane] = v > cap ? cap : v;
            }
        }
    }
}

void nipq_relu_backward(const float *restrict g, float *restrict out,
                        const int8_t *restrict open, int64_t count, int threads) {
    const int64_t pieces = (count + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t end = (piece + 1) * PIECE < count ? (piece + 1) * PIECE : count;
        for (int64_t i = piece * PIECE; i < end; i++) out[i] = open[i] ? g[i] : 0.0f;
    }
}
