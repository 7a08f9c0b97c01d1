// Kernels over rows of activations. Shapes are [row][width] unless told otherwise.

// out = (x * f) * weight with f = 1 / sqrt(sum(x^2) / width + epsilon). A work-group computes a row; work-item l has
// the columns l, l + 64, ... of the sum of squares.
__kernel __attribute__((reqd_work_group_size(WORK_GROUP_SIZE, 1, 1)))
void norm(__global const float *in, __global const float *weight, float epsilon, int width, __global float *out) {
    __local float chains[WORK_GROUP_SIZE];
    int item = get_local_id(0);
    size_t row = (size_t)get_group_id(0) * width;
    float chain = 0.0f;
    for (int column = item; column < width; column += WORK_GROUP_SIZE) {
        float value = in[row + column];
        chain = fma(value, value, chain);
    }
    chains[item] = chain;
    for (int half_count = WORK_GROUP_SIZE / 2; half_count > 0; half_count /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item < half_count) {
            chains[item] += chains[item + half_count];
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    float mean = divide(chains[0], (float)width);
    float factor = divide(1.0f, root(mean + epsilon));
    for (int column = item; column < width; column += WORK_GROUP_SIZE) {
        out[row + column] = in[row + column] * factor * weight[column];
    }
}

// Codes of a row in superblocks: for each pair of blocks upper bytes, then lower bytes, in the order of code_index().
// With them, the sums of upper and of lower bytes of 16 columns, and one unit for each superblock. A work-group
// computes a superblock. `upper_only`: codes of 8 bits.
__kernel __attribute__((reqd_work_group_size(WORK_GROUP_SIZE, 1, 1)))
void encode(__global const float *in, int width, int upper_only, __global char *codes, __global int2 *sums,
            __global float *units) {
    __local float largest[WORK_GROUP_SIZE];
    __local int2 split[SUPERBLOCK];
    int item = get_local_id(0);
    int superblock = get_group_id(0);
    int superblocks = get_num_groups(0);
    size_t row = get_group_id(1);
    __global const float *values = in + row * width + superblock * SUPERBLOCK;
    int count = min(SUPERBLOCK, width - superblock * SUPERBLOCK);
    float own = 0.0f;
    for (int column = item; column < count; column += WORK_GROUP_SIZE) {
        float magnitude = fabs(values[column]);
        own = magnitude > own ? magnitude : own;
    }
    largest[item] = own;
    for (int half_count = WORK_GROUP_SIZE / 2; half_count > 0; half_count /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item < half_count && largest[item + half_count] > largest[item]) {
            largest[item] = largest[item + half_count];
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    float most = largest[0];
    float unit = 0.0f;
    float factor = 0.0f;
    if (!(most < 1e-30f)) {
        unit = divide(most, upper_only ? 256.0f * 127.0f : 32639.0f);
        factor = divide(upper_only ? 127.0f : 32639.0f, most);
    }
    size_t index = row * superblocks + superblock;
    __global char *own_codes = codes + index * 2 * SUPERBLOCK;
    for (int column = item; column < SUPERBLOCK; column += WORK_GROUP_SIZE) {
        int code = column < count ? round_to_short(values[column] * factor) : 0;
        int high = upper_only ? code : (code + 128) >> 8;
        int low = upper_only ? 0 : code - (high << 8);
        own_codes[code_index(column)] = (char)high;
        own_codes[code_index(column) + LOWER] = (char)low;
        split[column] = (int2)(high, low);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int part = item; part < SUPERBLOCK / 16; part += WORK_GROUP_SIZE) {
        int2 sum = 0;
        for (int column = part * 16; column < part * 16 + 16; column++) {
            sum += split[column];
        }
        sums[index * (SUPERBLOCK / 16) + part] = sum;
    }
    if (item == 0) {
        units[index] = unit;
    }
}

#define SILU 0
#define GELU_TANH 1
#define CLAMPED_SWISH 2

// gate = activation(gate) * up, in place.
__kernel void gate(__global float *gate, __global const float *up, int count, int activation, float slope, float limit) {
    int i = get_global_id(0);
    if (i >= count) {
        return;
    }
    float g = gate[i];
    float u = up[i];
    float out;
    if (activation == SILU) {
        out = divide(g, 1.0f + exponential(-g)) * u;
    } else if (activation == GELU_TANH) {
        float inner = 0.7978846f * (g + 0.044715f * g * g * g);
        out = 0.5f * g * (1.0f + hyperbolic_tangent(inner)) * u;
    } else {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u;
        u = u < -limit ? -limit : u;
        out = divide(g, 1.0f + exponential(-slope * g)) * (u + 1.0f);
    }
    gate[i] = out;
}

__kernel void add(__global float *hidden, __global const float *delta, int count) {
    int i = get_global_id(0);
    if (i < count) {
        hidden[i] += delta[i];
    }
}

// The chosen rows: out[i] = in[rows[i]]. `count` is that of values.
__kernel void gather(__global const float *in, __global const int *rows, int count, int width, __global float *out) {
    int i = get_global_id(0);
    if (i < count) {
        out[i] = in[(size_t)rows[i / width] * width + i % width];
    }
}

__kernel void cap_values(__global float *values, int count, float cap) {
    int i = get_global_id(0);
    if (i < count) {
        values[i] = soft_cap(values[i], cap);
    }
}

// Rotates the pairs of all heads: (a, b) becomes (a cos - b sin, b cos + a sin). `neighbours`: the pairs of a head are
// (0, 1), (2, 3), ...; else (0, pairs), (1, pairs + 1), ... Cosines and sines are [row][pair].
__kernel void rotate_heads(__global float *rows, __global const float *cosines, __global const float *sines, int pairs,
                           int heads, int head_dim, int neighbours, int count) {
    int i = get_global_id(0);
    if (i >= count) {
        return;
    }
    int pair = i % pairs;
    int head = i / pairs % heads;
    int row = i / pairs / heads;
    __global float *values = rows + ((size_t)row * heads + head) * head_dim;
    int first = neighbours ? 2 * pair : pair;
    int second = neighbours ? first + 1 : pair + pairs;
    float a = values[first];
    float b = values[second];
    float c = cosines[row * pairs + pair];
    float s = sines[row * pairs + pair];
    values[first] = a * c - b * s;
    values[second] = b * c + a * s;
}

// The `used` best experts of each row with their weights, as `route` in `expert_routing.rs` defines them: by descending
// logit, then by number. One work-item computes a row. `order` is scratch: [row][expert].
__kernel void route(__global const float *logits, int experts, int used, int among_all, int rows, __global int *order,
                    __global int *chosen, __global float *weights) {
    int row = get_global_id(0);
    if (row >= rows) {
        return;
    }
    __global const float *own = logits + (size_t)row * experts;
    __global int *sorted = order + (size_t)row * experts;
    for (int expert = 0; expert < experts; expert++) {
        float key = isnan(own[expert]) ? -INFINITY : own[expert];
        int place = expert;
        while (place > 0) {
            float before = own[sorted[place - 1]];
            before = isnan(before) ? -INFINITY : before;
            if (!(before < key)) {
                break;
            }
            sorted[place] = sorted[place - 1];
            place--;
        }
        sorted[place] = expert;
    }
    float best = own[sorted[0]];
    // `volatile`: the order of the additions is that of the experts.
    volatile float sum = 0.0f;
    int summed = among_all ? experts : used;
    for (int i = 0; i < summed; i++) {
        sum += exponential(own[sorted[i]] - best);
    }
    for (int i = 0; i < used; i++) {
        chosen[row * used + i] = sorted[i];
        weights[row * used + i] = divide(exponential(own[sorted[i]] - best), sum);
    }
}

// out = one fused chain over the row's experts, in the order of its choices. `parts` is [row][used][width].
__kernel void combine(__global const float *parts, __global const float *weights, int used, int width, int count,
                      __global float *out) {
    int i = get_global_id(0);
    if (i >= count) {
        return;
    }
    int row = i / width;
    int column = i % width;
    float sum = 0.0f;
    for (int slot = 0; slot < used; slot++) {
        size_t part = (size_t)row * used + slot;
        sum = fma(weights[part], parts[part * width + column], sum);
    }
    out[i] = sum;
}
