/* splitmix.h - random numbers of the fuzzers and the fakes.
 *
 * Source: splitmix64, Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195.
 */
#ifndef SPLITMIX_H
#define SPLITMIX_H

#include <stdint.h>

static inline uint64_t splitmix(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/* The state that a fuzzer's call begins with, from the seed and its number alone. */
static inline uint64_t splitmix_call(uint64_t seed, int64_t call) {
  return seed * 0x2545f4914f6cdd1du + (uint64_t)call * 0x9e3779b97f4a7c15u;
}

#endif
