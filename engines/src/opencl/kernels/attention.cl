// Keys and values in pages, and attention over them. The host defines CACHE: 16 (halves), 32 (floats), 8 (bytes with a
// half-precision scale for each 32 values of a head).
//
// A layer's keys are [page][slot][key/value head][dimension], and so are its values; the scales of bytes are
// [page][slot][head][block of 32].

#define PAGE_TOKENS 32
#define CHUNK 256
#define SUM_CHAINS 16

#if CACHE == 16
typedef half Cached;
#elif CACHE == 32
typedef float Cached;
#else
typedef char Cached;
#endif

// Returns dimension `i` of the head's vector number `vector`.
float cached(__global const Cached *values, __global const half *scales, size_t vector, int head_dim, int i) {
#if CACHE == 16
    return vload_half(vector * head_dim + i, values);
#elif CACHE == 32
    return values[vector * head_dim + i];
#else
    return (float)values[vector * head_dim + i] * vload_half(vector * ((head_dim + 31) / 32) + i / 32, scales);
#endif
}

// The largest magnitude; NaN if a value is NaN.
float larger_magnitude(float largest, float value) {
    return as_float(max(as_uint(largest), as_uint(fabs(value))));
}

// Writes rows of keys or values, [row][head][dimension], to their slots. One work-item writes a block of 32 values.
__kernel void write_cache(__global const float *in, __global const int *slots, int heads, int head_dim, int count,
                          __global Cached *values, __global half *scales) {
    int i = get_global_id(0);
    if (i >= count) {
        return;
    }
    int blocks = (head_dim + 31) / 32;
    int block = i % blocks;
    int head = i / blocks % heads;
    int row = i / blocks / heads;
    size_t vector = (size_t)slots[row] * heads + head;
    __global const float *from = in + ((size_t)row * heads + head) * head_dim;
    int end = min(block * 32 + 32, head_dim);
#if CACHE == 8
    float largest = 0.0f;
    for (int d = block * 32; d < end; d++) {
        largest = larger_magnitude(largest, from[d]);
    }
    vstore_half_rte(divide(largest, 127.0f), vector * blocks + block, scales);
    float scale = vload_half(vector * blocks + block, scales);
#endif
    for (int d = block * 32; d < end; d++) {
#if CACHE == 16
        vstore_half_rte(from[d], vector * head_dim + d, values);
#elif CACHE == 32
        values[vector * head_dim + d] = from[d];
#else
        float level = 0.0f;
        if (scale != 0.0f) {
            level = divide(from[d], scale);
            level = level < -127.0f ? -127.0f : level;
            level = level > 127.0f ? 127.0f : level;
        }
        values[vector * head_dim + d] = (char)round_to_short(level);
#endif
    }
}

// The output of each query head of each row from `first_row` on. A work-group computes a head of a row; `query` and
// `mixed` are local memory for a head.
__kernel __attribute__((reqd_work_group_size(WORK_GROUP_SIZE, 1, 1)))
void attend(__global const float *queries, __global const Cached *keys, __global const half *key_scales,
            __global const Cached *values, __global const half *value_scales, __global const int *pages,
            __global const int *first_pages, __global const int *positions, __global const float *sinks, int has_sinks,
            int heads, int kv_heads, int head_dim, float scale, float cap, int has_cap, int window,
            __global float *out, __local float *query, __local float *mixed, int first_row) {
    __local float weights[CHUNK];
    __local float reduced[WORK_GROUP_SIZE];
    int item = get_local_id(0);
    int head = get_group_id(0);
    int row = first_row + get_group_id(1);
    int kv_head = head / (heads / kv_heads);
    int end = positions[row] + 1;
    int start = end > window ? end - window : 0;
    __global const int *own_pages = pages + first_pages[row];
    size_t at = ((size_t)row * heads + head) * head_dim;
    for (int d = item; d < head_dim; d += WORK_GROUP_SIZE) {
        query[d] = queries[at + d];
        mixed[d] = 0.0f;
    }
    float largest = has_sinks ? sinks[head] : -INFINITY;
    float total = has_sinks ? 1.0f : 0.0f;
    for (int chunk = start / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
        int from = max(chunk, start);
        int to = min(chunk + CHUNK, end);
        barrier(CLK_LOCAL_MEM_FENCE);
        float own = -INFINITY;
        for (int position = from + item; position < to; position += WORK_GROUP_SIZE) {
            size_t slot = (size_t)own_pages[position / PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS;
            size_t vector = slot * kv_heads + kv_head;
            float score = 0.0f;
            for (int d = 0; d < head_dim; d++) {
                score = fma(query[d], cached(keys, key_scales, vector, head_dim, d), score);
            }
            score *= scale;
            score = has_cap ? soft_cap(score, cap) : score;
            weights[position - chunk] = score;
            own = score > own ? score : own;
        }
        reduced[item] = own;
        for (int half_count = WORK_GROUP_SIZE / 2; half_count > 0; half_count /= 2) {
            barrier(CLK_LOCAL_MEM_FENCE);
            if (item < half_count && reduced[item + half_count] > reduced[item]) {
                reduced[item] = reduced[item + half_count];
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        float chunk_largest = reduced[0];
        for (int position = from + item; position < to; position += WORK_GROUP_SIZE) {
            weights[position - chunk] = exponential(weights[position - chunk] - chunk_largest);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        // Intel's runtime for the CPU would add a long chain in vectors, in another order; `volatile` keeps it from that.
        volatile float chain = 0.0f;
        if (item < SUM_CHAINS) {
            for (int i = item; i < to - chunk; i += SUM_CHAINS) {
                if (i >= from - chunk) {
                    chain += weights[i];
                }
            }
        }
        reduced[item] = chain;
        for (int half_count = SUM_CHAINS / 2; half_count > 0; half_count /= 2) {
            barrier(CLK_LOCAL_MEM_FENCE);
            if (item < half_count) {
                reduced[item] += reduced[item + half_count];
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        float joint = chunk_largest > largest ? chunk_largest : largest;
        float before = exponential(largest - joint);
        float after = exponential(chunk_largest - joint);
        largest = joint;
        total = fma(reduced[0], after, total * before);
        for (int d = item; d < head_dim; d += WORK_GROUP_SIZE) {
            float sum = 0.0f;
            for (int position = from; position < to; position++) {
                size_t slot = (size_t)own_pages[position / PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS;
                size_t vector = slot * kv_heads + kv_head;
                sum = fma(cached(values, value_scales, vector, head_dim, d), weights[position - chunk], sum);
            }
            mixed[d] = fma(sum, after, mixed[d] * before);
        }
    }
    for (int d = item; d < head_dim; d += WORK_GROUP_SIZE) {
        out[at + d] = divide(mixed[d], total);
    }
}
