// What XLA hands over: arrays of a type that is known when a call comes.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "memory.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

inline int64_t Product(ffi::AnyBuffer::Dimensions dims, size_t begin, size_t end) {
  int64_t product = 1;
  for (size_t i = begin; i < end; ++i) product *= dims[i];
  return product;
}

template <typename T>
const T* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}
template <typename T>
T* Data(ffi::Result<ffi::AnyBuffer> buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

ffi::Error Unsupported(const char* what) {
  return ffi::Error::InvalidArgument(std::string(what) + ": unsupported types");
}

// Calls run with a value of the type of an activation and one of a weight.
template <typename Run>
ffi::Error ByTypes(const char* what, ffi::DataType x, ffi::DataType w, const Run& run) {
  if (x == ffi::F32 && w == ffi::F32) return run(float{}, float{});
  if (x == ffi::BF16 && w == ffi::BF16) return run(Bf16{}, Bf16{});
  if (x == ffi::F32 && w == ffi::BF16) return run(float{}, Bf16{});
  if (x == ffi::F32 && w == ffi::S8) return run(float{}, int8_t{});
  if (x == ffi::BF16 && w == ffi::S8) return run(Bf16{}, int8_t{});
  if (x == ffi::F32 && w == ffi::F8E4M3FN) return run(float{}, Fp8{});
  if (x == ffi::BF16 && w == ffi::F8E4M3FN) return run(Bf16{}, Fp8{});
  return Unsupported(what);
}

// x as float32: itself, or copied.
inline const float* Wide(const float* x, size_t, std::unique_ptr<Scratch>&) { return x; }
inline const float* Wide(const Bf16* x, size_t size, std::unique_ptr<Scratch>& scratch) {
  scratch = std::make_unique<Scratch>(size);
  for (size_t i = 0; i < size; ++i) scratch->get()[i] = Widen(x[i]);
  return scratch->get();
}

}  // namespace
