// Memory that is zero, page-aligned, and resident only where it has been touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

class Mapping {
 public:
  Mapping() = default;
  // Throws std::bad_alloc. Asks for 2 MiB pages: a step streams through hundreds of megabytes,
  // which 4 KiB pages would spend on address translation.
  explicit Mapping(size_t bytes);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* base_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Hands out 64-byte aligned pieces of one mapping, in order. Without a mapping it only counts, so
// that the same code first measures what it will take.
class Arena {
 public:
  Arena() = default;
  explicit Arena(size_t bytes) : mapping_(bytes) {}

  template <typename T>
  T* take(size_t count) {
    const size_t begin = used_;
    used_ += padded(count * sizeof(T));
    if (used_ > mapping_.bytes()) return nullptr;
    return reinterpret_cast<T*>(mapping_.data() + begin);
  }
  static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }
  size_t used() const { return used_; }

 private:
  Mapping mapping_;
  size_t used_ = 0;
};

}  // namespace headrace
