// Tensors of few distinct values: find the values, replace each by its place in a table, and back.
// Called by kernels/unique_values.py; values are bit patterns of 1, 2, 4 or 8 bytes.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

constexpr int64_t BLOCK = 1 << 14;  // elements between two looks at how many values there are
constexpr int64_t PARALLEL = 1 << 16;  // fewer elements are not worth a second thread
constexpr uint64_t SLOTS = 1 << 18;  // of the hash table: at most a quarter is taken

static inline uint64_t place_of(uint64_t value) { return (value * 0x9E3779B97F4A7C15ull) >> 46; }

// The place of a value's slot, its own or the free one where it belongs.
template <typename T>
struct Table {
    std::vector<T> keys = std::vector<T>(SLOTS);
    std::vector<int32_t> codes = std::vector<int32_t>(SLOTS, -1);
    uint64_t find(T value) const {
        uint64_t at = place_of(uint64_t(value));
        while (codes[at] >= 0 && keys[at] != value) at = (at + 1) & (SLOTS - 1);
        return at;
    }
};

// Small patterns index the table themselves.
template <typename T>
struct Direct {
    std::vector<int32_t> codes = std::vector<int32_t>(size_t(1) << (8 * sizeof(T)), -1);
    uint64_t find(T value) const { return value; }
};
template <> struct Table<uint8_t> : Direct<uint8_t> {};
template <> struct Table<uint16_t> : Direct<uint16_t> {};

template <typename T> static void set_key(Table<T>& table, uint64_t at, T value) { table.keys[at] = value; }
static void set_key(Table<uint8_t>&, uint64_t, uint8_t) {}
static void set_key(Table<uint16_t>&, uint64_t, uint16_t) {}

template <typename T, typename Code>
static void replace(const T* values, Code* codes, int64_t count, const Table<T>& table, int threads) {
#pragma omp parallel for num_threads(threads) if (count > PARALLEL)
    for (int64_t i = 0; i < count; i++) codes[i] = Code(table.codes[table.find(values[i])]);
}

template <typename T>
static int64_t encode(const T* values, int64_t count, T* distinct, int64_t most, void* codes, int threads) {
    Table<T> table;
    int64_t found = 0;
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        const int64_t end = std::min(count, begin + BLOCK);
        for (int64_t i = begin; i < end; i++) {
            const uint64_t at = table.find(values[i]);
            if (table.codes[at] >= 0) continue;
            if (found == most) return -1;
            set_key(table, at, values[i]);
            table.codes[at] = int32_t(found);
            distinct[found++] = values[i];
        }
    }
    if (found <= 256)
        replace(values, static_cast<uint8_t*>(codes), count, table, threads);
    else
        replace(values, static_cast<uint16_t*>(codes), count, table, threads);
    return found;
}

template <typename T, typename Code>
static void decode(const Code* codes, const T* distinct, T* values, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) if (count > PARALLEL)
    for (int64_t i = 0; i < count; i++) values[i] = distinct[codes[i]];
}

template <typename T>
static void decode_either(const void* codes, const T* distinct, T* values, int64_t count, bool wide, int threads) {
    if (wide)
        decode(static_cast<const uint16_t*>(codes), distinct, values, count, threads);
    else
        decode(static_cast<const uint8_t*>(codes), distinct, values, count, threads);
}

extern "C" {

// found: how many values there are, or -1: more than most. Codes are bytes up to 256 values, then two bytes.
void unique_encode(const void* values, void* distinct, void* codes, int64_t* found, int64_t count, int64_t most,
                   int32_t width, int threads) {
    switch (width) {
        case 1: *found = encode((const uint8_t*)values, count, (uint8_t*)distinct, most, codes, threads); break;
        case 2: *found = encode((const uint16_t*)values, count, (uint16_t*)distinct, most, codes, threads); break;
        case 4: *found = encode((const uint32_t*)values, count, (uint32_t*)distinct, most, codes, threads); break;
        default: *found = encode((const uint64_t*)values, count, (uint64_t*)distinct, most, codes, threads);
    }
}

void unique_decode(const void* codes, const void* distinct, void* values, int64_t count, int32_t width, bool wide,
                   int threads) {
    switch (width) {
        case 1: decode_either(codes, (const uint8_t*)distinct, (uint8_t*)values, count, wide, threads); break;
        case 2: decode_either(codes, (const uint16_t*)distinct, (uint16_t*)values, count, wide, threads); break;
        case 4: decode_either(codes, (const uint32_t*)distinct, (uint32_t*)values, count, wide, threads); break;
        default: decode_either(codes, (const uint64_t*)distinct, (uint64_t*)values, count, wide, threads);
    }
}
}
