// The step's heavy operations for a CPU: linear layers, gated MLPs of a mixture, and attention over paged caches.
//
// XLA:CPU multiplies few rows slowly, computes every group of a ragged_dot, copies a stack's slice before it multiplies
// by it, and gathers whole contexts. Here weights are read once, where they lie, and only those that some row names;
// keys and values are read where they lie, and only those that some query sees.
//
// Every number is the result of the same operations in the same order whatever else is in the batch, however rows are
// tiled and whichever thread computes them: a product is summed over blocks of kBlockDepth, each from first to last
// with fused multiply-adds, and then over the blocks; and attention goes over blocks of keys that begin at fixed
// positions. So results do not depend, to the bit, on batch, chunking or the number of threads.
//
// One translation unit, so that all is inlined into the loops that need it.

#include <utility>

#include "attention.h"
#include "grouped_mlp.h"
#include "linear.h"
#include "paged_cache.h"
#include "sampling.h"
#include "xla/ffi/api/ffi.h"

namespace {

// A binding with so many more arrays of any type.
template <int N, typename Binding>
auto Arguments(Binding&& binding) {
  if constexpr (N == 1) {
    return std::move(binding).template Arg<ffi::AnyBuffer>();
  } else {
    return Arguments<N - 1>(std::move(binding).template Arg<ffi::AnyBuffer>());
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeLinear, Linear,
                              Arguments<3>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeHeads, Heads,
                              Arguments<3>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("begin")
                                  .Attr<bool>("transposed"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeGroupedMlp, GroupedMlp,
                              Arguments<6>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("activation")
                                  .Attr<bool>("weigh_input"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeAttend, Attend,
                              Arguments<8>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("span")
                                  .Attr<int64_t>("span_size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeAttendLatent, AttendLatent,
                              Arguments<9>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("span")
                                  .Attr<int64_t>("span_size"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeWrite, Write,
                              Arguments<5>(ffi::Ffi::Bind())
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeGreedy, Greedy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxmoeSample, Sample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
