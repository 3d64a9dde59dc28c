// Geometry and boxes of a batch of radiographs: the CUDA engine's own kernels, without headers, for NVRTC.
//
// A kernel is written as phases, loops over the block's threads, between barriers. On a GPU each
// thread runs its own turn of a phase; a host compiler (-ffp-contract=off) runs all turns one after
// the other, so that the same source is compared with Pillow and with engine/boxes.py without a GPU.
// engine/cuda/kernels.py has the arguments, the layouts and the launch sizes.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
static_assert(sizeof(u32) == 4 && sizeof(u64) == 8, "the layouts of kernels.py");

struct alignas(16) Quad {
    u32 word[4];
};

// What a phase knows of its block.
struct Block {
    u32 x, y, z, columns, threads;  // columns: the grid's size along x
    Quad* shared;
};

#ifdef __CUDACC__
#define BODY static __device__ __forceinline__
// One turn: this thread's.
#define PHASE(block, thread) for (u32 thread = threadIdx.x, turn = 1; turn; turn = 0)
#define BARRIER() __syncthreads()
#define PRIVATE(type, name) type name[1]  // one per thread
#define MINE(name, thread) name[0]
#define UNROLLED _Pragma("unroll")
#define UNROLLED_TWICE _Pragma("unroll 2")
#define ROLLED _Pragma("unroll 1")

BODY Block this_block() {
    extern __shared__ Quad shared[];
    return {blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, blockDim.x, shared};
}
BODY float add(float a, float b) { return __fadd_rn(a, b); }
BODY float sub(float a, float b) { return __fsub_rn(a, b); }
BODY float mul(float a, float b) { return __fmul_rn(a, b); }
BODY float divide(float a, float b) { return __fdiv_rn(a, b); }
BODY u32 bits_of(float value) { return __float_as_uint(value); }
BODY float float_of(u32 bits) { return __uint_as_float(bits); }
#else
#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>

#define BODY static inline
// Every other block takes its threads backwards: a phase whose turns depend on their order would show.
#define PHASE(block, thread) \
    for (u32 turn = 0, thread; \
         turn < (block).threads && (thread = ((block).x + (block).y) % 2 ? (block).threads - 1 - turn : turn, true); ++turn)
#define BARRIER() ((void)0)
#define PRIVATE(type, name) type name[1024]
#define MINE(name, thread) name[thread]
#define UNROLLED
#define UNROLLED_TWICE
#define ROLLED

using std::max;
using std::min;
BODY float add(float a, float b) { return a + b; }
BODY float sub(float a, float b) { return a - b; }
BODY float mul(float a, float b) { return a * b; }
BODY float divide(float a, float b) { return a / b; }
BODY u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
BODY float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
BODY u32 __dp4a(u32 a, u32 b, u32 sum) {
    for (u32 shift = 0; shift < 32; shift += 8) sum += (a >> shift & 255) * (b >> shift & 255);
    return sum;
}
BODY u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return u32((u64(high) << 32 | low) >> (shift & 31)); }
template <class T>
BODY T replaced(T* at, T value) {
    return std::exchange(*at, value);
}
BODY u32 atomicAdd(u32* at, u32 value) { return replaced(at, *at + value); }
BODY u32 atomicOr(u32* at, u32 value) { return replaced(at, *at | value); }
BODY u32 atomicMin(u32* at, u32 value) { return replaced(at, min(*at, value)); }
BODY u32 atomicMax(u32* at, u32 value) { return replaced(at, max(*at, value)); }
BODY u64 atomicMax(u64* at, u64 value) { return replaced(at, max(*at, value)); }
BODY u32 atomicCAS(u32* at, u32 expected, u32 value) { return replaced(at, *at == expected ? value : *at); }
#endif

struct Image {  // kernels.py: IMAGE
    u64 pixels, table, resampling;
    int pitch, width, steps, words, phase;
};
static_assert(sizeof(Image) == 48, "kernels.py");

// ---------------------------------------------------------------------------------------- geometry
//
// Pillow's resize: integer weights of 22 bits, rows first, each rounded to uint8, then columns. One
// block makes a band of output rows of a tile of output columns; each thread owns one column and goes
// down the source rows. A source row's pixel after the horizontal pass is one number in a register,
// which is added at once to the (at most two) output rows it counts for: integer sums have no order,
// so nothing of the image between the passes is ever stored.
//
// Source rows go through shared memory in chunks, in 16-byte loads, two chunks in turn: while one is
// computed, the next one's loads are under way into registers. Of each window of 4 pixels the sum of
// pixel x weight is three dp4a, over the weights' three bytes: w = w0 + 2^8 w1 + 2^16 w2. That is
// exact: arithmetic is modulo 2^32, and the whole sum is below 2^30 (kernels.py, _MOST_SHRINKING).

constexpr u32 THREADS = 256, UNITS = 512, STEPS = 64;  // of a block; of a chunk: 16-pixel units, source rows
constexpr u32 LOADS = UNITS / THREADS;                 // units of a chunk that one thread loads
constexpr u32 WORDS = 6;                               // of a window whose weights a thread keeps in registers
constexpr u32 ROUND = 1u << 21;                        // Resample.c: a half, in 22-bit weights

struct alignas(16) Step {  // a source row; the output row it completes, or -1; weights for the row at work and the next
    int y, completes;
    u32 now, next;
};

struct Chunk {
    Quad units[UNITS];
    Step steps[STEPS];
};

struct Column {  // what a thread keeps of its output column
    u32 weights[3][WORDS];
    u32 first;      // its window's first word in the tile
    u32 now, next;  // sums of the output row at work and the next one
};

struct Fetched {  // what a thread has loaded of the next chunk, not yet shifted to the tile's words
    u32 row[LOADS], unit[LOADS];  // where in a chunk: always the same
    Quad pixels[LOADS];
    u32 after[LOADS];  // the word behind each unit
    Step step;
};

struct Tile {  // what a block reads of its image
    u64 start;        // address of row 0's first word, which may start up to 3 pixels before the row
    u64 table;        // of a 16-bit image
    int pitch;        // bytes
    int begin, end;   // bytes of a row that are needed and exist, from its first word
    u32 units;        // of 16 pixels, in a row wherever it is aligned
};

BODY u64 row_address(const Tile& tile, int y) { return tile.start + (long long)y * tile.pitch; }

// Pixels from the last 16-byte boundary to row y's first word.
BODY u32 row_offset(const Tile& tile, int y) { return u32(row_address(tile, y)) % 16 >> (tile.table ? 1 : 0); }

// Four pixels from four uint16 values.
BODY u32 looked_up(const u8* table, u32 low, u32 high) {
    return table[low & 0xffff] | table[low >> 16] << 8 | table[high & 0xffff] << 16 | u32(table[high >> 16]) << 24;
}

// 16 bytes of a row, or zeros where none of them is needed; `at` is from its first word.
BODY Quad quad_at(const Tile& tile, u64 row, int at) {
    return at + 16 > tile.begin && at < tile.end ? *reinterpret_cast<const Quad*>(row + at) : Quad{};
}

// Unit `unit` of row y, and the word behind it, as they lie in memory.
BODY void load(const Tile& tile, int y, int unit, Quad& pixels, u32& after) {
    const u64 row = row_address(tile, y);
    const int bytes = tile.table ? 32 : 16, at = unit * bytes - int(row % 16), behind = at + bytes;
    const bool more = row_offset(tile, y) % 4 && behind < tile.end;
    const u32* const words = reinterpret_cast<const u32*>(row + behind);
    if (!tile.table) {
        pixels = quad_at(tile, row, at);
        after = more ? words[0] : 0;
        return;
    }
    const u8* const table = reinterpret_cast<const u8*>(tile.table);
    const Quad low = quad_at(tile, row, at), high = quad_at(tile, row, at + 16);
    pixels.word[0] = looked_up(table, low.word[0], low.word[1]);
    pixels.word[1] = looked_up(table, low.word[2], low.word[3]);
    pixels.word[2] = looked_up(table, high.word[0], high.word[1]);
    pixels.word[3] = looked_up(table, high.word[2], high.word[3]);
    after = more ? looked_up(table, words[0], words[1]) : 0;
}

// Load what this thread brings of a chunk: its units of `rows` rows from y0 on, and its step.
BODY void fetch(const Tile& tile, int y0, u32 rows, const Step* steps, u32 count, u32 thread, Fetched& fetched) {
    UNROLLED for (u32 i = 0; i < LOADS; ++i)
        if (fetched.row[i] < rows)
            load(tile, y0 + int(fetched.row[i]), int(fetched.unit[i]), fetched.pixels[i], fetched.after[i]);
    if (thread < count) fetched.step = steps[thread];
}

// Put it into shared memory: units moved so that the row's words start at multiples of 4 bytes, and the step
// with its row's first word instead of y.
BODY void put(const Tile& tile, int y0, u32 rows, u32 count, u32 thread, const Fetched& fetched, Chunk& chunk) {
    UNROLLED for (u32 i = 0; i < LOADS; ++i)
        if (fetched.row[i] < rows) {
            const u32 bits = 8 * (row_offset(tile, y0 + int(fetched.row[i])) % 4);
            const u32* const word = fetched.pixels[i].word;
            chunk.units[thread + i * THREADS] = {
                {__funnelshift_r(word[0], word[1], bits), __funnelshift_r(word[1], word[2], bits),
                 __funnelshift_r(word[2], word[3], bits), __funnelshift_r(word[3], fetched.after[i], bits)}};
        }
    if (thread < count) {
        Step step = fetched.step;
        step.y = (step.y - y0) * int(tile.units) * 4 + int(row_offset(tile, step.y) / 4);
        chunk.steps[thread] = step;
    }
}

// Go down a chunk's rows with a window of W words, and `words` - W more whose weights are read from memory.
// Where the window has fewer, it reads on behind it, within the chunk, with weights of zero.
template <u32 W>
BODY void go_down(const Chunk& chunk, u32 count, Column& column, const u32* weights, u32 words, u32 size, u32 top,
                  u8* output) {
    UNROLLED_TWICE for (u32 i = 0; i < count; ++i) {
        const Step step = chunk.steps[i];
        const u32* const window = chunk.units[0].word + step.y + column.first;
        u32 sums[3] = {ROUND, 0, 0};
        UNROLLED for (u32 w = 0; w < W; ++w) {
            UNROLLED for (u32 part = 0; part < 3; ++part)
                sums[part] = __dp4a(window[w], column.weights[part][w], sums[part]);
        }
        if (W == WORDS)
            ROLLED for (u32 w = W; w < words; ++w) {
                UNROLLED for (u32 part = 0; part < 3; ++part)
                    sums[part] = __dp4a(window[w], weights[(part * words + w) * size], sums[part]);
            }
        const u32 pixel = (sums[0] + (sums[1] << 8) + (sums[2] << 16)) >> 22;
        column.now += step.now * pixel;
        column.next += step.next * pixel;
        if (step.completes >= 0) {
            if (step.completes >= int(top)) output[step.completes * size] = column.now >> 22;  // else the band above's
            column.now = column.next;
            column.next = ROUND;
        }
    }
}

BODY void geometry_block(const Block& block, const Image* images, u8* input, u32* count, u32 size, u32 rows,
                         u32 columns) {
    const Image image = images[block.z];
    const u32 left = block.x * columns, right = min(left + columns, size);
    const u32 top = block.y * rows, bottom = min(top + rows, size);
    input += u64(block.z) * size * size;
    PHASE(block, thread) {
        if (thread == 0 && (block.x | block.y | block.z) == 0) *count = 0;
    }

    const Step* const steps = reinterpret_cast<const Step*>(image.resampling);  // kernels.py: Resampling.data
    const u32* const spans = reinterpret_cast<const u32*>(steps + image.steps);
    const u32* const firsts = spans + 2 * size;
    const u32* const weights = firsts + size;
    const u32 words = image.words;
    Tile tile{0, 0, 0, 0, 0, UNITS + 1};
    if (image.pixels) {
        const int bytes = image.table ? 2 : 1, pixels = 4 * int(firsts[right - 1] + words - firsts[left]);
        const int origin = 4 * int(firsts[left]) - image.phase;
        tile.start = image.pixels + (long long)origin * bytes;
        tile.table = image.table;
        tile.pitch = image.pitch;
        tile.begin = max(-origin, 0) * bytes;
        tile.end = min(pixels, image.width - origin) * bytes;
        tile.units = u32(pixels + 30) / 16;
    }
    if (tile.units > UNITS) {  // no image, or a launch too wide for it
        PHASE(block, thread) {
            if (left + thread < right)
                for (u32 y = top; y < bottom; ++y) input[y * size + left + thread] = 0;
        }
        return;
    }

    const u32 begin = spans[2 * top], end = spans[2 * bottom - 1];
    u32 steps_at_once = min(UNITS / tile.units, STEPS);
    if (steps_at_once > 1) steps_at_once &= ~1u;  // an enlarged image's steps come in pairs: row y, row y + 1
    PRIVATE(Column, mine);
    PRIVATE(Fetched, fetched);
    PHASE(block, thread) {
        Column& column = MINE(mine, thread);
        const u32 x = min(left + thread, right - 1);
        UNROLLED for (u32 w = 0; w < WORDS; ++w) {
            UNROLLED for (u32 part = 0; part < 3; ++part)
                column.weights[part][w] = w < words ? weights[(part * words + w) * size + x] : 0;
        }
        column.first = firsts[x] - firsts[left];
        column.now = column.next = ROUND;
        UNROLLED for (u32 i = 0; i < LOADS; ++i) {
            MINE(fetched, thread).row[i] = (thread + i * THREADS) / tile.units;
            MINE(fetched, thread).unit[i] = (thread + i * THREADS) % tile.units;
        }
    }

    // Turn k loads chunk k + 1 into registers and computes chunk k; the turn before the first only loads.
    const int last_row = steps[end - 1].y;
    int y0 = steps[begin].y;
    u32 parity = 0;
    for (u32 at = begin, ready = 0; at < end || ready; parity ^= 1) {
        const Chunk& chunk = reinterpret_cast<Chunk*>(block.shared)[parity];
        const u32 coming = min(steps_at_once, end - at);
        const u32 coming_rows = min(coming, u32(last_row + 1 - y0));  // rows go up by one step at most
        const int following = steps[min(at + coming, end - 1)].y;
        PHASE(block, thread) {
            fetch(tile, y0, coming_rows, steps + at, coming, thread, MINE(fetched, thread));
            Column& column = MINE(mine, thread);
            const u32 x = left + thread;
            if (x >= right) continue;
            if (words <= 2)
                go_down<2>(chunk, ready, column, weights + x, words, size, top, input + x);
            else if (words == 3)
                go_down<3>(chunk, ready, column, weights + x, words, size, top, input + x);
            else if (words <= 5)
                go_down<5>(chunk, ready, column, weights + x, words, size, top, input + x);
            else
                go_down<WORDS>(chunk, ready, column, weights + x, words, size, top, input + x);
        }
        PHASE(block, thread) {
            put(tile, y0, coming_rows, coming, thread, MINE(fetched, thread),
                reinterpret_cast<Chunk*>(block.shared)[parity ^ 1]);
        }
        BARRIER();  // the chunk just written is whole; nobody still reads the one that is written next
        at += coming;
        ready = coming;
        y0 = following;
    }
}

// ------------------------------------------------------------------------------------------- boxes
//
// engine/boxes.py, one block per map: each thread takes columns of the upsampled map and goes down
// them. Pixels above the threshold are kept as vertical runs; runs of neighbouring columns that touch,
// corners too, are joined in a union-find forest in shared memory; each tree of at least the minimum
// area is a region. Float operations are those of engine/boxes.py in its order, each rounded by itself.

constexpr u32 SLOTS = 64;       // regions of one map
constexpr u32 NONE = ~0u;       // no run, no slot
constexpr u32 OVERFLOW = 1, NOT_FINITE = 2;  // kernels.py
constexpr float LARGEST = 3.402823466e38f;

struct Region {  // kernels.py: REGION
    int image, finding, left, top, right, bottom, area, peak_x, peak_y;
    float peak_value;
};

struct Run {  // pixels start to end of one column
    u16 start, end;
    u32 above;   // the column's run above, or NONE
    u32 parent;  // in the forest; a root is its own
    u32 area;    // of a root's region; then its slot, or NONE
};

struct Slot {  // a region's extents, half open, and peak: ordered value, then the complement of y * S + x
    u64 peak;
    u32 left, top, right, bottom, area, unused;
};

struct Map {  // in shared memory, before the slots, positions, last runs of columns, and runs
    u32 low, high;  // ordered values
    u32 flags, found, runs, slots, base;
    float cut;
    u32 unused[8];
};
static_assert(sizeof(Map) == 64 && sizeof(Slot) == 32 && sizeof(Run) == 16 && sizeof(Region) == 40, "kernels.py");

// Unsigned integers in the order of the floats; both zeros are one.
BODY u32 ordered(float value) {
    const u32 bits = bits_of(add(value, 0.0f));
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
BODY float unordered(u32 key) { return float_of(key >> 31 ? key & ~(1u << 31) : ~key); }

// Where sample i of `target` lies among `source` cells.
BODY float position(u32 i, u32 source, u32 target) {
    const float scale = divide(float(source), float(target));
    const float p = sub(mul(add(float(i), 0.5f), scale), 0.5f);
    return min(max(p, 0.0f), float(source - 1));
}

struct Heat {  // one column of the upsampled map
    const float* cam;
    u32 height, width, left, right;
    float t;
    float cell, upper, delta;  // the last pixel's upper cell, the value there, and the difference to the lower one
};

BODY Heat heat_of_column(const float* cam, u32 height, u32 width, u32 size, u32 x) {
    const float p = position(x, width, size), cell = floorf(p);
    const u32 left = u32(cell);
    return {cam, height, width, left, min(left + 1, width - 1), sub(p, cell), -1.0f, 0.0f, 0.0f};
}

BODY float across(const Heat& heat, u32 row) {
    const float* const cells = heat.cam + row * heat.width;
    return add(cells[heat.left], mul(sub(cells[heat.right], cells[heat.left]), heat.t));
}

// The value at position p down the column.
BODY float heat_at(Heat& heat, float p) {
    const float cell = floorf(p);
    if (cell != heat.cell) {
        heat.cell = cell;
        heat.upper = across(heat, u32(cell));
        heat.delta = sub(across(heat, min(u32(cell) + 1, heat.height - 1)), heat.upper);
    }
    return add(heat.upper, mul(heat.delta, sub(p, cell)));
}

BODY bool inside(float value, float low, float range, float threshold) {
    return divide(sub(value, low), range) >= threshold;
}

// The least value that is inside: rounding keeps order, so all above it are inside, too, and no pixel needs a division.
BODY float least_inside(u32 low, u32 high, float threshold) {
    const float base = unordered(low), range = sub(unordered(high), base);
    while (low < high) {
        const u32 middle = low + (high - low) / 2;
        if (inside(unordered(middle), base, range, threshold))
            high = middle;
        else
            low = middle + 1;
    }
    return unordered(low);
}

BODY u32 root_of(Run* runs, u32 run) {
    for (;;) {  // other threads join trees meanwhile; what has a parent keeps having one
        const u32 parent = *static_cast<volatile u32*>(&runs[run].parent);
        if (parent == run) return run;
        const u32 grandparent = *static_cast<volatile u32*>(&runs[parent].parent);
        if (grandparent != parent) *static_cast<volatile u32*>(&runs[run].parent) = grandparent;
        run = grandparent;
    }
}

BODY void join(Run* runs, u32 a, u32 b) {
    for (;;) {
        a = root_of(runs, a);
        b = root_of(runs, b);
        if (a == b) return;
        const u32 child = max(a, b), parent = min(a, b);
        if (atomicCAS(&runs[child].parent, child, parent) == child) return;
    }
}

BODY void boxes_block(const Block& block, const Image* images, const float* logits, const float* cams,
                      const float* logit_thresholds, const float* box_thresholds, const u8* wanted, u32* count,
                      u8* flags, Region* regions, u32 height, u32 width, u32 size, u32 most_runs, u32 capacity,
                      u32 min_area) {
    const u32 finding = block.x, index = block.y * block.columns + finding;
    Map& map = *reinterpret_cast<Map*>(block.shared);
    Slot* const slots = reinterpret_cast<Slot*>(&map + 1);
    float* const positions = reinterpret_cast<float*>(slots + SLOTS);  // (S,), down the columns
    u32* const last = reinterpret_cast<u32*>(positions + size);        // (S,), each column's lowest run
    Run* const runs = reinterpret_cast<Run*>(block.shared + (sizeof(Map) + SLOTS * sizeof(Slot) + 8 * size + 15) / 16);
    const float* const cam = cams + u64(index) * height * width;
    const bool taken = images[block.y].pixels && wanted[index] && logits[index] >= logit_thresholds[finding];

    PHASE(block, thread) {
        if (thread == 0) {
            flags[index] = 0;
            map.low = NONE;
            map.high = map.flags = map.found = map.runs = map.slots = 0;
        }
    }
    if (!taken) return;
    BARRIER();

    PHASE(block, thread) {
        u32 wrong = 0;
        for (u32 i = thread; i < height * width; i += block.threads) {
            const float size_of = fabsf(cam[i]);
            if (!(size_of <= 1e38f)) wrong |= size_of <= LARGEST ? OVERFLOW : NOT_FINITE;  // sums could overflow
        }
        if (wrong) atomicOr(&map.flags, wrong);
        for (u32 y = thread; y < size; y += block.threads) positions[y] = position(y, height, size);
    }
    BARRIER();
    if (map.flags) {
        PHASE(block, thread) {
            if (thread == 0) flags[index] = map.flags & NOT_FINITE ? NOT_FINITE : OVERFLOW;
        }
        return;
    }

    PHASE(block, thread) {
        float low = LARGEST, high = -LARGEST;
        for (u32 x = thread; x < size; x += block.threads) {
            Heat heat = heat_of_column(cam, height, width, size, x);
            for (u32 y = 0; y < size; ++y) {
                const float value = heat_at(heat, positions[y]);
                low = min(low, value);
                high = max(high, value);
            }
        }
        if (low <= high) {  // a thread may have no column
            atomicMin(&map.low, ordered(low));
            atomicMax(&map.high, ordered(high));
        }
    }
    BARRIER();

    PHASE(block, thread) {
        const float low = unordered(map.low), high = unordered(map.high), threshold = box_thresholds[finding];
        if (thread == 0 && high > low && inside(high, low, sub(high, low), threshold)) {
            map.cut = least_inside(map.low, map.high, threshold);
            map.found = 1;
        }
    }
    BARRIER();
    if (!map.found) return;

    PHASE(block, thread) {
        for (u32 x = thread; x < size; x += block.threads) {
            Heat heat = heat_of_column(cam, height, width, size, x);
            u32 above = NONE, start = NONE;
            for (u32 y = 0; y <= size; ++y) {
                const bool in = y < size && heat_at(heat, positions[y]) >= map.cut;
                if (in && start == NONE) start = y;
                if (in || start == NONE) continue;
                const u32 run = atomicAdd(&map.runs, 1u);
                if (run < most_runs) runs[run] = {u16(start), u16(y), above, run, 0};
                above = run;
                start = NONE;
            }
            last[x] = above;
        }
    }
    BARRIER();
    if (map.runs > most_runs) {
        PHASE(block, thread) {
            if (thread == 0) flags[index] = OVERFLOW;
        }
        return;
    }

    PHASE(block, thread) {
        for (u32 x = thread + 1; x < size; x += block.threads)
            for (u32 a = last[x - 1], b = last[x]; a != NONE && b != NONE;) {
                if (runs[a].start <= runs[b].end && runs[b].start <= runs[a].end) join(runs, a, b);
                if (runs[a].start >= runs[b].start)  // nothing further up in the other column reaches it
                    a = runs[a].above;
                else
                    b = runs[b].above;
            }
    }
    BARRIER();

    PHASE(block, thread) {
        for (u32 run = thread; run < map.runs; run += block.threads)
            atomicAdd(&runs[root_of(runs, run)].area, u32(runs[run].end - runs[run].start));
    }
    BARRIER();

    PHASE(block, thread) {
        for (u32 run = thread; run < map.runs; run += block.threads) {
            if (runs[run].parent != run) continue;
            const u32 area = runs[run].area, slot = area >= min_area ? atomicAdd(&map.slots, 1u) : NONE;
            if (slot < SLOTS) slots[slot] = {0, NONE, NONE, 0, 0, area, 0};
            runs[run].area = slot;
        }
    }
    BARRIER();
    if (map.slots > SLOTS) {
        PHASE(block, thread) {
            if (thread == 0) flags[index] = OVERFLOW;
        }
        return;
    }

    PHASE(block, thread) {
        for (u32 x = thread; x < size; x += block.threads) {
            Heat heat = heat_of_column(cam, height, width, size, x);
            for (u32 run = last[x]; run != NONE; run = runs[run].above) {
                const u32 found = runs[root_of(runs, run)].area, start = runs[run].start, end = runs[run].end;
                if (found == NONE) continue;
                float best = -LARGEST;
                u32 best_y = start;
                for (u32 y = start; y < end; ++y) {
                    const float value = heat_at(heat, positions[y]);
                    if (value > best) {
                        best = value;
                        best_y = y;
                    }
                }
                Slot& slot = slots[found];
                atomicMax(&slot.peak, u64(ordered(best)) << 32 | u32(~(best_y * size + x)));
                atomicMin(&slot.left, x);
                atomicMin(&slot.top, start);
                atomicMax(&slot.right, x + 1);
                atomicMax(&slot.bottom, end);
            }
        }
        if (thread == 0) map.base = atomicAdd(count, map.slots);
    }
    BARRIER();

    PHASE(block, thread) {
        if (thread == 0 && map.slots > capacity - min(map.base, capacity)) flags[index] = OVERFLOW;
        if (thread < map.slots && map.base + thread < capacity) {
            const Slot& slot = slots[thread];
            const u32 peak = ~u32(slot.peak), x = peak % size, y = peak / size;
            Heat heat = heat_of_column(cam, height, width, size, x);
            regions[map.base + thread] = {
                int(block.y),     int(finding),   int(slot.left), int(slot.top), int(slot.right),
                int(slot.bottom), int(slot.area), int(x),         int(y),        heat_at(heat, positions[y])};
        }
    }
}

// ----------------------------------------------------------------------------------------- entries

#ifdef __CUDACC__
// Blocks on a multiprocessor: as many as leave the geometry kernel enough registers.
#if __CUDA_ARCH__ >= 1000
constexpr u32 BLOCKS = 3;
#else
constexpr u32 BLOCKS = 4;
#endif
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) geometry(const Image* images, u8* input, u32* count, u32 size,
                                                               u32 rows, u32 columns) {
    geometry_block(this_block(), images, input, count, size, rows, columns);
}

extern "C" __global__ void __launch_bounds__(1024, 1) boxes(const Image* images, const float* logits, const float* cams,
                                                         const float* logit_thresholds, const float* box_thresholds,
                                                         const u8* wanted, u32* count, u8* flags, Region* regions,
                                                         u32 height, u32 width, u32 size, u32 most_runs, u32 capacity,
                                                         u32 min_area) {
    boxes_block(this_block(), images, logits, cams, logit_thresholds, box_thresholds, wanted, count, flags, regions,
                height, width, size, most_runs, capacity, min_area);
}
#else
// Run the whole grid, one block after the other; `args` as cuLaunchKernel takes them, pointers to the arguments.
template <class... Args, std::size_t... I>
static void run(void (*body)(const Block&, Args...), const u32 grid[3], const u32 block[3], u32 shared_bytes, void** args,
                std::index_sequence<I...>) {
    for (u32 z = 0; z < grid[2]; ++z)
        for (u32 y = 0; y < grid[1]; ++y)
            for (u32 x = 0; x < grid[0]; ++x) {
                // Of exactly that many bytes for the address sanitiser, and not zero, as on a GPU.
                const std::unique_ptr<Quad[]> shared(new Quad[shared_bytes / 16]);
                std::memset(static_cast<void*>(shared.get()), 0xa5, shared_bytes / 16 * 16);
                body({x, y, z, grid[0], block[0], shared.get()}, *static_cast<Args*>(args[I])...);
            }
}
template <class... Args>
static void run(void (*body)(const Block&, Args...), const u32 grid[3], const u32 block[3], u32 shared_bytes, void** args) {
    run(body, grid, block, shared_bytes, args, std::index_sequence_for<Args...>{});
}

extern "C" void geometry_host(const u32 grid[3], const u32 block[3], u32 shared_bytes, void** args) {
    run(geometry_block, grid, block, shared_bytes, args);
}

extern "C" void boxes_host(const u32 grid[3], const u32 block[3], u32 shared_bytes, void** args) {
    run(boxes_block, grid, block, shared_bytes, args);
}
#endif
