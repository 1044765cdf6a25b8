// One place of each of equal strata, as optim/projection/strata.py has it.
#pragma once

#include "values.h"

struct Strata {  // native.py
    int64_t size, count, shift;
    Key key;
};

struct Places : Strata {
    bool equal;       // all strata are, as where a quarter of a matrix is chosen: fewer quotients, and shorter ones
    int64_t longest;  // of them
    int64_t turn;     // where the first begins

    explicit Places(const Strata& strata)
        : Strata(strata), equal(size % count == 0), longest(size / count + !equal), turn(shift / count) {}

    int64_t begin(int64_t stratum) const {
        return equal ? stratum * longest + turn : int64_t((__int128(stratum) * size + shift) / count);
    }

    // The last stratum that begins at or before an element; -1: the part of the last that lies at the beginning.
    int64_t of(int64_t element) const {
        if (equal && size <= INT32_MAX) return int64_t(uint32_t(element - turn + longest) / uint32_t(longest)) - 1;
        if (equal) return (element - turn + longest) / longest - 1;
        const __int128 past = __int128(element + 1) * count - shift - 1 + size;  // not negative
        return int64_t(past / size) - 1;
    }

    int64_t place(int64_t stratum) const {
        const int64_t start = begin(stratum), length = begin(stratum + 1) - start;
        const int64_t found = start + int64_t(uint64_t(key.from(uint64_t(stratum))[0]) * uint64_t(length) >> 32);
        return found < size ? found : found - size;
    }

    // The places of strata from number `first` on, a multiple of LANES of them, of which the first is the one of
    // `origin` or the one behind, counted from `origin`: none is further away than a stratum and a chunk.
    template <int LANES>
    void some(int64_t first, int strata, int64_t origin, int32_t* __restrict place) const {
        const Words words = key.from(uint64_t(first));
        if (equal) {
            const int32_t start = int32_t(begin(first) - origin), length = int32_t(longest);
            for (int stratum = 0; stratum < strata; stratum += LANES)
                for (int i = 0; i < LANES; i++) {
                    const uint64_t within = uint64_t(words[stratum + i]) * uint32_t(length) >> 32;
                    place[stratum + i] = start + (stratum + i) * length + int32_t(within);
                }
            return;
        }
        // Not negative, so that cutting is rounding down, and with 0.5 that no rounding of the product can reach
        // a whole number: the numbers are below 2^51.
        const int64_t base = int64_t(__int128(first) * size + shift - __int128(origin) * count) + longest * count;
        const double from = double(base) + 0.5, step = double(size), inverse = 1.0 / double(count);
        for (int stratum = 0; stratum < strata; stratum += LANES) {
            int32_t start[LANES], length[LANES];
#pragma omp simd
            for (int i = 0; i < LANES; i++) {
                start[i] = int32_t((from + (stratum + i) * step) * inverse);
                length[i] = int32_t((from + (stratum + i + 1) * step) * inverse) - start[i];
            }
#pragma omp simd
            for (int i = 0; i < LANES; i++) {
                const uint64_t within = uint64_t(words[stratum + i]) * uint32_t(length[i]) >> 32;
                place[stratum + i] = start[i] + int32_t(within) - int32_t(longest);
            }
        }
    }
};
