// Memory of the inputs and outputs of CPU operators.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "../common/tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace diffad {

// `x`, or a copy of it, in rows without gaps between neighbours: columns next to each other, or in
// channels_last (`last`) pixels next to each other. An expanded gradient, a transposed image and a
// slice of channels are copied; slices along N, H and W are not.
inline Tensor with_dense_rows(const Tensor& x, bool last) {
  using torch::headeronly::MemoryFormat;
  const bool dense = last ? x.stride(1) == 1 && x.stride(3) == x.size(1) : x.stride(3) == 1;
  if (dense) return x;
  return torch::stable::contiguous(x, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Asks for huge pages behind a large new tensor, before it is written for the first time.
//
// The C library takes large blocks from the system and gives them back at once, so that each new
// tensor of some MiB arrives without pages. Faulting them in 4 KiB at a time costs several times
// what copying them does; 2 MiB at a time it is a fraction, unless it is one page, within a heap that
// grows and shrinks by it. Where the system has none to give, or the memory was in use before,
// nothing changes.
inline void huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t end = (begin + x.numel() * x.element_size()) / page * page;
  const uintptr_t first = (begin + page - 1) / page * page;
  if (first + page < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// The first multiple from n on.
inline int64_t up_to(int64_t multiple, int64_t n) {
  return (n + multiple - 1) / multiple * multiple;
}

// Memory of a thread's own. Rows of vectors in it begin with lines of the cache: what is stored across
// two lines is slow to be read again.
using Scratch = std::unique_ptr<char, decltype(&std::free)>;
inline Scratch scratch_of(int64_t bytes) {
  constexpr int64_t kLine = 64;
  auto* memory = static_cast<char*>(std::aligned_alloc(kLine, (bytes / kLine + 1) * kLine));
  if (memory == nullptr) throw std::bad_alloc();
  return Scratch(memory, std::free);
}

// An operator that reads and writes more than this finds little of it in the caches: half of the 32
// MiB that a handful of cores commonly share. (sysconf tells the sum over a socket, or of its host.)
constexpr int64_t kCacheBytes = int64_t{16} << 20;

}  // namespace diffad
