#include "memory.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace headrace {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

Mapping::Mapping(size_t bytes) : mapped_(bytes + kHugePage), bytes_(bytes) {
  base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(base_);
  data_ = reinterpret_cast<uint8_t*>((address + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
  madvise(data_, bytes, MADV_HUGEPAGE);  // A wish: without it all works, a little slower.
#endif
}

Mapping::~Mapping() {
  if (base_ != nullptr) munmap(base_, mapped_);
}

Mapping::Mapping(Mapping&& other) noexcept { *this = std::move(other); }

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace headrace
