// SipHash-2-4 with 128 bits of output (Aumasson & Bernstein, "SipHash: a fast short-input PRF",
// 2012, and the authors' 128-bit variant), a word at a time.
#pragma once

#include "fastpage/block_pool.h"

namespace fastpage {

class SipHash128 {
 public:
  SipHash128(uint64_t k0, uint64_t k1)
      : v0_(k0 ^ 0x736f6d6570736575),
        v1_(k1 ^ 0x646f72616e646f6d ^ 0xee),
        v2_(k0 ^ 0x6c7967656e657261),
        v3_(k1 ^ 0x7465646279746573) {}

  void add(uint64_t word) {
    v3_ ^= word;
    round();
    round();
    v0_ ^= word;
  }

  // `tail`: the last num_bytes % 8 bytes, little-endian. num_bytes: of the whole input.
  BlockHash finish(uint64_t tail, size_t num_bytes) {
    add(tail | static_cast<uint64_t>(num_bytes) << 56);
    v2_ ^= 0xee;
    const uint64_t lo = squeeze();
    v1_ ^= 0xdd;
    const uint64_t hi = squeeze();
    return {lo, hi};
  }

 private:
  static uint64_t rotl(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

  void round() {
    v0_ += v1_;
    v2_ += v3_;
    v1_ = rotl(v1_, 13) ^ v0_;
    v3_ = rotl(v3_, 16) ^ v2_;
    v0_ = rotl(v0_, 32);
    v2_ += v1_;
    v0_ += v3_;
    v1_ = rotl(v1_, 17) ^ v2_;
    v3_ = rotl(v3_, 21) ^ v0_;
    v2_ = rotl(v2_, 32);
  }

  uint64_t squeeze() {
    for (int i = 0; i < 4; ++i) round();
    return v0_ ^ v1_ ^ v2_ ^ v3_;
  }

  uint64_t v0_, v1_, v2_, v3_;
};

}  // namespace fastpage
