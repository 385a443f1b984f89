// Bit maps in 64-bit words: bit x % 64 of word x / 64 stands for pixel x.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace corrmatch::CORRMATCH_ISA {

inline constexpr int64_t kWordBits = 64;

inline int64_t words_for(int64_t bits) { return (bits + kWordBits - 1) / kWordBits; }

// A word whose lowest n bits are set, or all bits for n >= 64.
inline uint64_t low_bits(int64_t n) { return n >= kWordBits ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

inline int popcount(uint64_t word) {
#if defined(__POPCNT__) || !defined(__x86_64__)
  return std::popcount(word);
#else  // without the instruction std::popcount calls a library function
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return int((word * 0x0101010101010101u) >> 56);
#endif
}

// The highest bit of each of 64 bytes.
inline uint64_t top_bits(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  return _mm512_movepi8_mask(_mm512_loadu_si512(bytes));
#elif defined(__AVX2__)
  const auto half = [bytes](int i) {
    return uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes) + i))));
  };
  return half(0) | half(1) << 32;
#elif defined(__SSE2__)
  const auto quarter = [bytes](int i) {
    return uint64_t(uint32_t(_mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + i))));
  };
  return quarter(0) | quarter(1) << 16 | quarter(2) << 32 | quarter(3) << 48;
#else
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    eight = (eight >> 7) & 0x0101010101010101u;
    word |= (eight * 0x0102040810204080u) >> 56 << (8 * i);  // the product moves bit 8 b to bit 56 + b
  }
  return word;
#endif
}

// The word whose bit i is flag(i). Compilers vectorise the loop over bytes.
template <class Flag>
inline uint64_t word_of(Flag&& flag) {
  alignas(64) uint8_t bytes[kWordBits];
  for (int i = 0; i < kWordBits; ++i) bytes[i] = flag(i) ? 0xff : 0;
  return top_bits(bytes);
}

template <class F>
inline void for_each_bit(uint64_t word, F&& f) {
  for (; word != 0; word &= word - 1) f(std::countr_zero(word));
}

// Calls f(begin, end) for each maximal run of ones.
template <class F>
inline void for_each_run(uint64_t word, F&& f) {
  while (word != 0) {
    const int begin = std::countr_zero(word);
    const int end = begin + std::countr_one(word >> begin);
    f(begin, end);
    word &= ~low_bits(end);
  }
}

// Sets bits begin..end-1 of a map in 32-bit words.
inline void set_bits(uint32_t* words, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin / 32, last = (end - 1) / 32;
  const uint32_t from = ~uint32_t(0) << (begin % 32), to = ~uint32_t(0) >> (31 - (end - 1) % 32);
  if (first == last) {
    words[first] |= from & to;
    return;
  }
  words[first] |= from;
  for (int64_t i = first + 1; i < last; ++i) words[i] = ~uint32_t(0);
  words[last] |= to;
}

}  // namespace corrmatch::CORRMATCH_ISA
