// Recorded GPU bits for the oracle's tests, and how they are compared.
#pragma once

#include <bit>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace lockstep::oracle {

// A file of tests/data, raw little-endian.
template <class T>
std::vector<T> ReadData(const std::string& name) {
  const std::string path = std::string(LOCKSTEP_TEST_DATA) + "/" + name;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  EXPECT_TRUE(file.good()) << path;
  const std::streamoff bytes = file.good() ? static_cast<std::streamoff>(file.tellg()) : 0;
  EXPECT_GT(bytes, 0) << path;
  std::vector<T> values(static_cast<size_t>(bytes) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), bytes);
  return values;
}

inline bool SameBits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}
inline bool SameBits(uint16_t a, uint16_t b) {
  return a == b;
}

// How many elements differ in their bits. Sizes must agree.
template <class T>
int Differing(const std::vector<T>& got, const std::vector<T>& want) {
  EXPECT_EQ(got.size(), want.size());
  EXPECT_FALSE(want.empty());
  int count = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) count += !SameBits(got[i], want[i]);
  return count;
}

}  // namespace lockstep::oracle
