// Blocks of 32 x 32 of a bf16 matrix product with fp32 sums, by AMX: two tiles of either operand, four of sums.
//
// A tile is 16 rows of 64 bytes. A first operand's tile holds 16 of its rows, 32 numbers along the axis that is
// summed over; a second operand's holds 16 pairs of rows, of 16 columns, the two of a pair side by side. As
// 32-bit words the one is the other transposed, so that any operand is packed from any order of memory by
// loading and, where needed, a transposition. A *panel* is what a block sums over: pairs of tiles, one behind
// the other. What is missing at an edge is zero.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "values.h"

constexpr int SIDE = 32;         // of a block, and the numbers along the summed axis in a tile
constexpr int TILE = 512;        // numbers in a tile
constexpr int PAIR = 2 * TILE;   // of tiles

static inline int64_t blocks_of(int64_t length) { return (length + SIDE - 1) / SIDE; }

// Linux hands the tile registers out to those who ask; once is enough for all threads.
static inline bool tiles_granted() {
    constexpr int ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, ask, tile_data) == 0;
    return granted;
}

struct TileRegisters {  // of one thread, while this lives
    TileRegisters() {
        alignas(64) uint8_t shape[64] = {1};  // the palette; then bytes of a row (2 each) and rows, by register
        for (int tile = 0; tile < 8; tile++) {
            shape[16 + 2 * tile] = 64;
            shape[48 + tile] = 16;
        }
        __asm__ volatile("" : : "r"(shape) : "memory");  // gcc 12 takes it that 8 bytes of the shape are read
        _tile_loadconfig(shape);
    }
    ~TileRegisters() { _tile_release(); }
};

// sums [32, stride] = (or +=) a panel times a panel of `steps` pairs of tiles.
static inline void multiply(const bf16* first, const bf16* second, int64_t steps, float* sums, int64_t stride,
                            bool add) {
    const int64_t bytes = 4 * stride;
    // Panels and sums are in memory: gcc 12 does not know that loads of tiles read any.
    __asm__ volatile("" : : : "memory");
    if (add) {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + 16, bytes);
        _tile_loadd(2, sums + 16 * stride, bytes);
        _tile_loadd(3, sums + 16 * stride + 16, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, first + step * PAIR, 64);
        _tile_loadd(6, second + step * PAIR, 64);
        _tile_loadd(7, second + step * PAIR + TILE, 64);
        _tile_loadd(5, first + step * PAIR + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + 16, bytes);
    _tile_stored(2, sums + 16 * stride, bytes);
    _tile_stored(3, sums + 16 * stride + 16, bytes);
}

static inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// 32 numbers in a row, of which `count` exist.
static inline __m512i row_of(const float* from, int64_t count) {
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(count), from);
    const __m512 high = _mm512_maskz_loadu_ps(first_lanes(count - 16), from + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

static inline __m512i row_of(const bf16* from, int64_t count) {
    const __mmask32 lanes = __mmask32(first_lanes(count)) | __mmask32(first_lanes(count - 16)) << 16;
    return _mm512_maskz_loadu_epi16(lanes, from);
}

// sum += the squares of those 32, two by two.
static inline __m512 squares_of(const float* from, int64_t count, __m512 sum) {
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(count), from);
    const __m512 high = _mm512_maskz_loadu_ps(first_lanes(count - 16), from + 16);
    return _mm512_fmadd_ps(high, high, _mm512_fmadd_ps(low, low, sum));
}

static inline __m512 squares_of(const bf16* from, int64_t count, __m512 sum) {
    const __m512i row = row_of(from, count);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(row, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(int32_t(0xFFFF0000u))));
    return _mm512_fmadd_ps(odd, odd, _mm512_fmadd_ps(even, even, sum));
}

// sum += the squares of 16.
static inline __m512 squares_beside(const float* from, int64_t count, __m512 sum) {
    const __m512 value = _mm512_maskz_loadu_ps(first_lanes(count), from);
    return _mm512_fmadd_ps(value, value, sum);
}

static inline __m512 squares_beside(const bf16* from, int64_t count, __m512 sum) {
    const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(count), from);
    const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    return _mm512_fmadd_ps(value, value, sum);
}

// 16 numbers of one row beside those of another, pair by pair.
static inline __m512i pairs_of(const float* even, const float* odd, int64_t even_count, int64_t odd_count) {
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(even_count), even);
    const __m512 high = _mm512_maskz_loadu_ps(first_lanes(odd_count), odd);
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

static inline __m512i pairs_of(const bf16* even, const bf16* odd, int64_t even_count, int64_t odd_count) {
    const __m256i low = _mm256_maskz_loadu_epi16(first_lanes(even_count), even);
    const __m256i high = _mm256_maskz_loadu_epi16(first_lanes(odd_count), odd);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

static inline void store_transposed(const __m512i* rows, bf16* tile) {
    alignas(64) uint32_t words[16][16];
    for (int row = 0; row < 16; row++) _mm512_store_si512(words[row], rows[row]);
    const __m512i steps = _mm512_mullo_epi32(_mm512_set1_epi32(16), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7,
                                                                                    6, 5, 4, 3, 2, 1, 0));
    for (int row = 0; row < 16; row++)
        _mm512_storeu_si512(tile + row * SIDE, _mm512_i32gather_epi32(steps, &words[0][row], 4));
}

// One panel of a matrix whose rows follow one another by `stride`: 32 places along the axis that stays, `steps`
// pairs of tiles along the summed one, of which `places` and `length` numbers exist. The summed axis lies along
// the rows of the memory (ALONG) or across them. Where `squares` is not null those of the places are added to it:
// [32, 16] partial sums of each ALONG the rows, [32] across them.
template <bool ALONG, bool SECOND, class Number>
static inline void pack(const Number* from, int64_t stride, int64_t places, int64_t length, int64_t steps,
                        bf16* panel, float* squares = nullptr) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t step = 0; step < steps; step++)
        for (int half = 0; half < 2; half++) {
            __m512i rows[16];
            for (int row = 0; row < 16; row++) {
                if (ALONG) {
                    const int64_t place = 16 * half + row;
                    const Number* start = from + place * stride + step * SIDE;
                    rows[row] = place < places ? row_of(start, length - step * SIDE) : _mm512_setzero_si512();
                    if (squares && place < places) {
                        float* sum = squares + 16 * place;
                        _mm512_storeu_ps(sum, squares_of(start, length - step * SIDE, _mm512_loadu_ps(sum)));
                    }
                } else {
                    const int64_t even = step * SIDE + 2 * row, count = places - 16 * half;
                    const Number* start = from + even * stride + 16 * half;
                    rows[row] = pairs_of(start, start + stride, even < length ? count : 0,
                                         even + 1 < length ? count : 0);
                    if (squares) {
                        sums[half] = squares_beside(start, even < length ? count : 0, sums[half]);
                        sums[half] = squares_beside(start + stride, even + 1 < length ? count : 0, sums[half]);
                    }
                }
            }
            bf16* tile = panel + step * PAIR + half * TILE;
            if (ALONG == SECOND)
                store_transposed(rows, tile);
            else
                for (int row = 0; row < 16; row++) _mm512_storeu_si512(tile + row * SIDE, rows[row]);
        }
    if (!ALONG && squares)
        for (int half = 0; half < 2; half++) {
            float* sum = squares + 16 * half;
            _mm512_storeu_ps(sum, _mm512_add_ps(sums[half], _mm512_loadu_ps(sum)));
        }
}
