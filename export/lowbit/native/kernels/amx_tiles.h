// The tile registers of AMX, and the same in plain C++ for tests on processors without them.
//
// A tile has up to 16 rows of 64 bytes. A product takes rows of four unsigned bytes from one tile and columns of four
// signed bytes from another: sums[m][n] += sum over k and i of a[m][4 k + i] * b[k][4 n + i], exact in 32 bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/rows.h"

namespace lowbit {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64, kTileChannels = 16;
constexpr int kSumTiles = 4, kFirstPixels = 4, kWeights = 7;  // registers: 0..3, 4..6, 7

#if defined(__AMX_INT8__)
// Registers are named in the instructions, so their numbers are template arguments. Every statement is volatile and
// clobbers memory: the compiler knows nothing of tiles, and must not move loads or stores across them.
class HardwareTiles {
public:
    explicit HardwareTiles(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; ++tile) {
            shapes.row_bytes[tile] = kTileBytes;
            shapes.rows[tile] = static_cast<uint8_t>(tile == kWeights ? kTileRows : rows);
        }
        __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
    }
    ~HardwareTiles() { __asm__ volatile("tilerelease" : : : "memory"); }  // otherwise every switch of tasks saves 8 KB
    HardwareTiles(const HardwareTiles&) = delete;
    HardwareTiles& operator=(const HardwareTiles&) = delete;

    template <int Tile> INLINE void clear() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile) : "memory"); }
    template <int Tile> INLINE void load(const void* from, size_t row) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row), "i"(Tile) : "memory");
    }
    template <int Tile> INLINE void store(void* to, size_t row) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row), "i"(Tile) : "memory");
    }
    template <int Sums, int Pixels, int Weights> INLINE void multiply() {
        __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Pixels), "i"(Weights) : "memory");
    }
};
#endif

class EmulatedTiles {
public:
    explicit EmulatedTiles(int rows) : rows_(rows) {}
    template <int Tile> void clear() { std::memset(tiles_[Tile], 0, sizeof tiles_[Tile]); }
    template <int Tile> void load(const void* from, size_t row) {
        for (int r = 0; r < rows_of(Tile); ++r) std::memcpy(tiles_[Tile][r], static_cast<const uint8_t*>(from) + r * row, kTileBytes);
    }
    template <int Tile> void store(void* to, size_t row) {
        for (int r = 0; r < rows_of(Tile); ++r) std::memcpy(static_cast<uint8_t*>(to) + r * row, tiles_[Tile][r], kTileBytes);
    }
    template <int Sums, int Pixels, int Weights> void multiply() {
        for (int m = 0; m < rows_; ++m)
            for (int n = 0; n < kTileChannels; ++n) {
                int32_t sum;
                std::memcpy(&sum, tiles_[Sums][m] + 4 * n, sizeof sum);
                for (int k = 0; k < kTileRows; ++k)
                    for (int i = 0; i < 4; ++i)
                        sum += tiles_[Pixels][m][4 * k + i] * static_cast<int8_t>(tiles_[Weights][k][4 * n + i]);
                std::memcpy(tiles_[Sums][m] + 4 * n, &sum, sizeof sum);
            }
    }

private:
    int rows_of(int tile) const { return tile == kWeights ? kTileRows : rows_; }
    int rows_;
    uint8_t tiles_[8][kTileRows][kTileBytes] = {};
};

}  // namespace
}  // namespace lowbit
