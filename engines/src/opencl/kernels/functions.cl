// Functions of one number, as in `arithmetic/functions.rs`: the same operations in the same order.

#pragma OPENCL FP_CONTRACT OFF

// Division and roots that round to nearest.
#ifdef DIVIDE_IN_DOUBLE
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
float divide(float a, float b) {
    return (float)((double)a / (double)b);
}

float root(float x) {
    return (float)sqrt((double)x);
}
#else
float divide(float a, float b) {
    return a / b;
}

float root(float x) {
    return sqrt(x);
}
#endif

#define WORK_GROUP_SIZE 64
#define SUPERBLOCK 256
#define BLOCK 32
#define ROUNDER 12582912.0f

// Where the upper byte of a column's code is within its superblock; the lower byte comes LOWER bytes later. 16 bytes,
// which tiles.cl reads at once, have the columns 4 t ... 4 t + 3 of two blocks, and the same four 16 further.
#define LOWER 64
int code_index(int column) {
    int block = column / BLOCK;
    int i = column % BLOCK;
    return block / 2 * 128 + i % 16 / 4 * 16 + block % 2 * 8 + i / 16 * 4 + i % 4;
}

// Rounds to the nearest integer, ties to even, for |x| < 2^15; 0 for a value that is not a number.
short round_to_short(float x) {
    return isnan(x) ? (short)0 : as_short2(x + ROUNDER).s0;
}

float exponential(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    clamped = clamped > 88.0f ? 88.0f : clamped;
    float shifted = clamped * 1.44269504088896340736f + ROUNDER;
    float n = shifted - ROUNDER;
    float r = fma(n, -0.6933594f, clamped);
    r = fma(n, 2.1219444e-4f, r);
    float p = 1.9875692e-4f;
    p = fma(p, r, 1.3982e-3f);
    p = fma(p, r, 8.333452e-3f);
    p = fma(p, r, 4.1665796e-2f);
    p = fma(p, r, 1.6666665e-1f);
    p = fma(p, r, 5e-1f);
    float power = as_float((as_uint(shifted) << 23) + (127u << 23));
    float value = fma(p * r, r, r + 1.0f) * power;
    return x < -87.0f ? 0.0f : value;
}

float hyperbolic_tangent(float x) {
    return 1.0f - divide(2.0f, exponential(2.0f * x) + 1.0f);
}

float soft_cap(float x, float cap) {
    return cap * hyperbolic_tangent(divide(x, cap));
}
