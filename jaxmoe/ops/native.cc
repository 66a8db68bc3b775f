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
// Vectors are GCC's and clang's vector extensions: one source for AVX-512, AVX2 and NEON.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// kSums vectors of sums stay in registers beside a row of a panel; kDepth pairs of vectors of weights do in Stream.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 24, kTileVecs = 4, kDepth = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kSums = 12, kTileVecs = 2, kDepth = 4;
#else
constexpr int kLanes = 4, kSums = 24, kTileVecs = 4, kDepth = 8;
#endif
constexpr int kPair = 2 * kLanes, kPanel = kTileVecs * kLanes;
constexpr int kBlockCols = 128;  // of a packed block, and of what one task computes of many rows
constexpr int kBlockDepth = 128;  // a panel of it fits the first cache
constexpr int kChunkRows = 264;   // of one task, at most
constexpr int kStreamRows = 40;   // up to so many rows weights are not worth packing
constexpr int kKeyBlock = 64;     // keys that attention takes at once; a multiple of it begins a block
constexpr int kQueryCols = 128;   // queries that one task of attention takes at once

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfU __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef int8_t ByteU __attribute__((vector_size(kLanes), aligned(1), may_alias));

struct Bf16 {
  uint16_t bits;
};
struct Fp8 {  // float8_e4m3fn
  uint8_t bits;
};

inline float Widen(float value) { return value; }
inline float Widen(Bf16 value) {
  uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float Widen(int8_t value) { return value; }
inline float Widen(Fp8 value) {
  int exponent = value.bits >> 3 & 15, mantissa = value.bits & 7;
  float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  if ((value.bits & 127) == 127) magnitude = NAN;
  return value.bits & 128 ? -magnitude : magnitude;
}
inline void Narrow(float value, float* out) { *out = value; }
inline void Narrow(float value, Bf16* out) {  // to the nearest, even on ties, as XLA rounds
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out->bits = std::isnan(value) ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

inline Vec Splat(float value) { return value - Vec{}; }
inline Vec Load(const float* from) { return *reinterpret_cast<const VecU*>(from); }
inline Vec Load(const Bf16* from) {
  UVec wide = __builtin_convertvector(*reinterpret_cast<const HalfU*>(from), UVec) << 16;
  return (Vec)wide;
}
// GCC converts bytes one by one unless told which instruction it has.
inline IVec Bytes(const void* from) {
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(*static_cast<const ByteU*>(from), IVec);
#endif
}
inline Vec Load(const int8_t* from) { return __builtin_convertvector(Bytes(from), Vec); }
inline Vec Load(const Fp8* from) {
  IVec bits = Bytes(from);
  // With the exponent moved from a bias of 7 to 127. Denormals, whose exponent of 0 counts as 1, are then 2^-7 too much
  // and half of what they should be; they must not pass through float32's own, which XLA has the processor flush.
  Vec value = (Vec)(((bits & 127) << 20) + (120 << 23));
  value = (bits & 120) == 0 ? (value - 0x1p-7f) * 2.0f : value;
  return (Vec)((IVec)value | (bits & (int32_t)0x80000000));
}
inline void Store(Vec value, float* to) { *reinterpret_cast<VecU*>(to) = value; }
template <typename X>
inline void Copy(const X* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(Load(from + i), to + i);
  for (; i < count; ++i) to[i] = Widen(from[i]);
}
inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// e^x to 2 units in the last place; 0 for x below -87, where results would be denormal.
__attribute__((always_inline)) inline Vec Exp(Vec x) {
  const Vec magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Vec bounded = x > Splat(88.0f) ? Splat(88.0f) : x;
  bounded = bounded < Splat(-87.0f) ? Splat(-87.0f) : bounded;
  Vec n = bounded * 1.44269504f + magic;
  IVec exponent = ((IVec)n - (IVec)magic + 127) << 23;
  n = n - magic;
  Vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vec result = p * (Vec)exponent;
  return x < Splat(-87.0f) ? Vec{} : result;
}

// ---------------------------------------------------------------------------------------------------------------------

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Memory that outlives a call, because the pages of fresh memory cost more to touch than many calls cost to compute.
class Scratch {
 public:
  explicit Scratch(size_t floats) : size_(std::max<size_t>(floats, 1)) {
    std::lock_guard<std::mutex> lock(Mutex());
    auto& spare = Spare();
    auto fits = std::find_if(spare.begin(), spare.end(), [&](const Block& block) { return block.second >= size_; });
    if (fits != spare.end()) {
      block_ = std::move(*fits);
      spare.erase(fits);
    } else {
      size_t bytes = (size_ * sizeof(float) + 4095) / 4096 * 4096;
      block_ = {std::unique_ptr<float, Free>(static_cast<float*>(std::aligned_alloc(4096, bytes))), bytes / 4};
    }
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(Mutex());
    auto& spare = Spare();
    spare.push_back(std::move(block_));
    std::sort(spare.begin(), spare.end(), [](const Block& a, const Block& b) { return a.second < b.second; });
    if (spare.size() > 64) spare.erase(spare.begin());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() { return block_.first.get(); }

 private:
  using Block = std::pair<std::unique_ptr<float, Free>, size_t>;
  static std::mutex& Mutex() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<Block>& Spare() {
    static auto* spare = new std::vector<Block>;
    return *spare;
  }
  size_t size_;
  Block block_;
};

float* Local(size_t floats, int which) {  // of this thread, for one task
  static thread_local std::vector<float> buffers[3];
  std::vector<float>& buffer = buffers[which];
  if (buffer.size() < floats + 16) buffer.resize(floats + 16);
  auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Spreads tasks over XLA's own threads. The caller works too and waits for nothing but tasks that a thread is at work
// on, so that callers on every thread of the pool, as with many virtual devices, cannot wait for each other.
class Team {
 public:
  explicit Team(ffi::ThreadPool& pool) : pool_(pool) { Active().fetch_add(1); }
  ~Team() { Active().fetch_sub(1); }

  // Cores that are not busy with other calls, this thread's included.
  int size() const {
    static const int cores = std::max(1u, std::thread::hardware_concurrency());
    return std::max(1, std::min<int>(cores - Active().load() + 1, pool_.num_threads()));
  }

  template <typename Task>
  void Run(int64_t tasks, const Task& task) {
    int helpers = static_cast<int>(std::min<int64_t>(size(), tasks)) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    struct Shared {
      std::atomic<int64_t> next{0}, done{0};
      int64_t tasks;
      const Task* task;
      void Work() {
        for (int64_t i; (i = next.fetch_add(1)) < tasks; done.fetch_add(1)) (*task)(i);
      }
    };
    auto shared = std::make_shared<Shared>();
    shared->tasks = tasks;
    shared->task = &task;
    for (int i = 0; i < helpers; ++i) pool_.Schedule([shared] { shared->Work(); });
    shared->Work();
    for (int spins = 0; shared->done.load() < tasks; ++spins) {
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  static std::atomic<int>& Active() {
    static std::atomic<int> active{0};
    return active;
  }
  ffi::ThreadPool& pool_;
};

// ---------------------------------------------------------------------------------------------------------------------
// y[m, n] = sum_k x[m, k] w[k, n], over blocks of depth.

// D rows of w at a time against every row of x: weights come once, in order, from memory, and sums wait in a cache.
// What comes next in each row is asked for, and at their ends what the next D rows begin with.
template <int D, typename W>
inline void StreamRows(const float* x, ptrdiff_t ldx, int rows, const W* w, ptrdiff_t ldw, int cols, float* y,
                       ptrdiff_t ldy) {
  const int further = rows == 1 ? 2 * kPair : 4 * kPair;
  int c = 0;
  for (; c + kPair <= cols; c += kPair) {
    const W* soon = w + c + further + (c + further < cols ? 0 : D * ldw - cols);
    Vec first[D], second[D];
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) {
      first[d] = Load(w + d * ldw + c);
      second[d] = Load(w + d * ldw + c + kLanes);
      __builtin_prefetch(soon + d * ldw);
      if (sizeof(W) * kLanes >= 64) __builtin_prefetch(soon + d * ldw + kLanes);
    }
    for (int m = 0; m < rows; ++m) {
      Vec left = Load(y + m * ldy + c), right = Load(y + m * ldy + c + kLanes);
#pragma GCC unroll 16
      for (int d = 0; d < D; ++d) {
        Vec of_row = Splat(x[m * ldx + d]);
        left += of_row * first[d];
        right += of_row * second[d];
      }
      Store(left, y + m * ldy + c);
      Store(right, y + m * ldy + c + kLanes);
    }
  }
  for (; c < cols; ++c) {
    for (int m = 0; m < rows; ++m) {
      float sum = y[m * ldy + c];
      for (int d = 0; d < D; ++d) sum += x[m * ldx + d] * Widen(w[d * ldw + c]);
      y[m * ldy + c] = sum;
    }
  }
}

inline void Zero(float* y, ptrdiff_t ldy, int rows, int cols) {
  for (int m = 0; m < rows; ++m) std::memset(y + m * ldy, 0, cols * sizeof(float));
}

inline void Add(float* y, const float* more, int count) {
  for (int i = 0; i < count; ++i) y[i] += more[i];
}

// One block: y = x w.
template <typename W>
void StreamBlock(const float* x, ptrdiff_t ldx, int rows, const W* w, ptrdiff_t ldw, int depth, int cols, float* y,
                 ptrdiff_t ldy) {
  Zero(y, ldy, rows, cols);
  int k = 0;
  for (; k + kDepth <= depth; k += kDepth) StreamRows<kDepth>(x + k, ldx, rows, w + k * ldw, ldw, cols, y, ldy);
  for (; k < depth; ++k) StreamRows<1>(x + k, ldx, rows, w + k * ldw, ldw, cols, y, ldy);
}

// All blocks: y = x w.
template <typename W>
void Stream(const float* x, ptrdiff_t ldx, int rows, const W* w, ptrdiff_t ldw, int depth, int cols, float* y,
            ptrdiff_t ldy) {
  StreamBlock(x, ldx, rows, w, ldw, std::min(depth, kBlockDepth), cols, y, ldy);
  for (int k = kBlockDepth; k < depth; k += kBlockDepth) {
    float* block = Local(static_cast<size_t>(rows) * cols, 2);
    StreamBlock(x + k, ldx, rows, w + k * ldw, ldw, std::min(depth - k, kBlockDepth), cols, block, cols);
    for (int m = 0; m < rows; ++m) Add(y + m * ldy, block + m * cols, cols);
  }
}

// Rows of a matrix that are needed soon, asked for a line at a time over the steps of other work: a processor has few
// places for lines under way, and those that it needs now want some of them.
struct Ahead {
  const char* row;
  ptrdiff_t stride = 0;       // bytes from row to row
  int lines = 1;              // of a row
  int every = INT32_MAX / 2;  // steps
  int line = 0;

  void Ask() {
    __builtin_prefetch(row + 64 * line, 0, 2);
    ++line;
    row += line == lines ? stride : 0;
    line = line == lines ? 0 : line;
  }
};

// Fresh: y is only written; otherwise the sums, from zero, are added to it.
// Loops are unrolled by command: GCC decides too late, and then keeps sums in memory.
// M rows against a packed panel [depth, V * kLanes]. Row i of x at step k: x[i * ldx + k * step].
template <int M, int V, bool Fresh>
inline void Tile(const float* x, ptrdiff_t ldx, ptrdiff_t step, int depth, const float* panel, float* y,
                 ptrdiff_t ldy, Ahead& ahead) {
  Vec sums[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) sums[i][j] = Vec{};
  const float* of_rows[(M + 2) / 3];
#pragma GCC unroll 16
  for (int i = 0; i < (M + 2) / 3; ++i) of_rows[i] = x + 3 * i * ldx;
  Ahead own = ahead;  // in registers
  for (int k = 0; k < depth;) {
    own.Ask();
    for (int stop = std::min(depth, k + own.every); k < stop; ++k) {
      Vec weights[V];
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) weights[j] = Load(panel + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        Vec of_row = Splat(of_rows[i / 3][i % 3 * ldx]);
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) sums[i][j] += of_row * weights[j];
      }
#pragma GCC unroll 16
      for (int i = 0; i < (M + 2) / 3; ++i) of_rows[i] += step;
      panel += V * kLanes;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) {
      float* to = y + i * ldy + j * kLanes;
      Store(Fresh ? sums[i][j] : Load(to) + sums[i][j], to);
    }
  ahead = own;
}

constexpr int TileRows(int vecs) { return std::min(12, kSums / vecs); }

template <int V, bool Fresh = false, int M = TileRows(V)>
inline void TileOf(int rows, const float* x, ptrdiff_t ldx, ptrdiff_t step, int depth, const float* panel, float* y,
                   ptrdiff_t ldy, Ahead& ahead) {
  if constexpr (M > 1) {
    if (rows < M) return TileOf<V, Fresh, M - 1>(rows, x, ldx, step, depth, panel, y, ldy, ahead);
  }
  Tile<M, V, Fresh>(x, ldx, step, depth, panel, y, ldy, ahead);
}

// A tile of one, two or kTileVecs vectors, whose y is as wide.
template <bool Fresh>
inline void TileBy(int vecs, int rows, const float* x, ptrdiff_t ldx, ptrdiff_t step, int depth, const float* panel,
                   float* y) {
  Ahead resting{reinterpret_cast<const char*>(x)};
  if (vecs == 1) return TileOf<1, Fresh>(rows, x, ldx, step, depth, panel, y, kLanes, resting);
  if (vecs == 2) return TileOf<2, Fresh>(rows, x, ldx, step, depth, panel, y, kPair, resting);
  TileOf<kTileVecs, Fresh>(rows, x, ldx, step, depth, panel, y, kPanel, resting);
}

inline int EvenRows(int rows, int vecs = kTileVecs) {  // of a tile, so that all are about as high
  int tiles = (rows + TileRows(vecs) - 1) / TileRows(vecs);
  return (rows + tiles - 1) / tiles;
}

inline size_t Rounded(size_t cols) { return (cols + kPanel - 1) / kPanel * kPanel; }

// Row by row, so that a page of memory is visited once.
template <typename W>
void Pack(const W* w, ptrdiff_t ldw, int depth, int cols, float* panels) {
  constexpr int kAhead = 6, kLine = 64 / sizeof(W);
  int whole = cols / kPanel * kPanel;
  ptrdiff_t panel = static_cast<ptrdiff_t>(depth) * kPanel;
  for (int k = 0; k < depth; ++k, w += ldw, panels += kPanel) {
    for (int c = 0; c < cols; c += kLine) __builtin_prefetch(w + kAhead * ldw + c);
    float* to = panels;
    for (int c = 0; c < whole; c += kPanel, to += panel) {
      for (int j = 0; j < kPanel; j += kLanes) Store(Load(w + c + j), to + j);
    }
    if (whole < cols)
      for (int j = 0; j < kPanel; ++j) to[j] = whole + j < cols ? Widen(w[whole + j]) : 0.0f;
  }
}

// y = x w. cols <= kBlockCols where rows > kStreamRows; y then has room for whole panels. next: what will be multiplied
// by thereafter, as wide, if that is known.
template <typename W>
void Multiply(const float* x, ptrdiff_t ldx, int rows, const W* w, ptrdiff_t ldw, int depth, int cols, float* y,
              ptrdiff_t ldy, const W* next = nullptr) {
  if (rows <= kStreamRows) return Stream(x, ldx, rows, w, ldw, depth, cols, y, ldy);
  float* panels = Local(static_cast<size_t>(kBlockDepth) * kBlockCols, 0);
  int high = EvenRows(rows), tiles = (rows + high - 1) / high;
  Zero(y, ldy, rows, static_cast<int>(Rounded(cols)));
  for (int k = 0; k < depth; k += kBlockDepth) {
    int deep = std::min(kBlockDepth, depth - k);
    Pack(w + k * ldw, ldw, deep, cols, panels);
    // While one block is multiplied by, the next is on its way from memory.
    const W* coming = k + deep < depth ? w + (k + deep) * ldw : next;
    constexpr int kLine = 64 / sizeof(W);
    int panels_wide = (cols + kPanel - 1) / kPanel;
    Ahead ahead{reinterpret_cast<const char*>(x)};
    if (coming) {
      int lines = (cols + kLine - 1) / kLine;
      ahead = {reinterpret_cast<const char*>(coming), static_cast<ptrdiff_t>(ldw * sizeof(W)), lines,
               std::max(1, tiles * panels_wide / lines)};
    }
    // A panel stays in the first cache while rows pass by.
    for (int p = 0; p < panels_wide; ++p) {
      for (int m = 0; m < rows; m += high) {
        TileOf<kTileVecs>(std::min(high, rows - m), x + m * ldx + k, ldx, 1, deep,
                  panels + static_cast<ptrdiff_t>(deep) * p * kPanel, y + m * ldy + p * kPanel, ldy, ahead);
      }
    }
  }
}

// A few rows against a matrix.
template <typename W>
struct Few {
  const float* x;
  ptrdiff_t ldx;
  int rows;
  const W* w;
  ptrdiff_t ldw;
  int depth, cols;
};

constexpr int kManyRows = 24;  // more are bound by multiplications, and by where sums wait

// All products at once; finish(product, row, col, cols, y) gets each row, whole or in pieces. Where tasks are few, each
// takes a block of depth of its own, which lies in one piece of memory.
template <bool kWholeRows, typename W, typename Finish>
void StreamAll(Team& team, const std::vector<Few<W>>& products, const Finish& finish) {
  struct Task {
    size_t product;
    int col, cols, k, depth;
    float* y;  // or none, if the task has all that its columns need
  };
  // Memory is read fastest along whole rows, as long as their sums stay in the second cache, and so do those of blocks.
  constexpr int64_t kWidest = 4096, kNarrowest = 512, kTasks = 16, kManyTasks = 32, kSumsOfBlocks = 128 << 10;
  int64_t all_cols = 0, widest_tasks = 0, block_sums = 0, floats = 0;
  for (const Few<W>& each : products) {
    all_cols += each.cols;
    widest_tasks += (each.cols - 1) / kWidest + 1;
    block_sums += static_cast<int64_t>((each.depth - 1) / kBlockDepth + 1) * each.rows * each.cols;
  }
  bool by_blocks = widest_tasks < kManyTasks && block_sums <= kSumsOfBlocks;
  auto blocks_of = [&](const Few<W>& each) {
    return by_blocks && each.rows <= kManyRows ? (each.depth - 1) / kBlockDepth + 1 : 1;
  };
  auto width_of = [&](const Few<W>& each) {
    int64_t most = each.rows > kManyRows ? 256
                   : by_blocks           ? kWidest
                                         : std::clamp(all_cols / kTasks, kNarrowest, kWidest);
    return static_cast<int>(Rounded((each.cols - 1) / ((each.cols - 1) / most + 1) + 1));
  };
  auto needs_sums = [&](const Few<W>& each) {
    return blocks_of(each) > 1 || (kWholeRows && width_of(each) < each.cols);
  };
  for (const Few<W>& each : products)
    if (needs_sums(each)) floats += static_cast<int64_t>(blocks_of(each)) * each.rows * each.cols;
  Scratch scratch(floats);
  std::vector<Task> tasks;
  std::vector<std::pair<size_t, int>> rows;  // whose sums are finished when all tasks are done
  std::vector<float*> sums;
  float* y = scratch.get();
  for (size_t i = 0; i < products.size(); ++i) {
    const Few<W>& each = products[i];
    bool kept = needs_sums(each);
    sums.push_back(y);
    for (int row = 0; kept && row < each.rows; ++row) rows.push_back({i, row});
    int deep = blocks_of(each) > 1 ? kBlockDepth : each.depth, wide = width_of(each);
    for (int k = 0; k < each.depth; k += deep) {
      for (int col = 0; col < each.cols; col += wide)
        tasks.push_back({i, col, std::min(wide, each.cols - col), k, std::min(deep, each.depth - k),
                         kept ? y + col : nullptr});
      if (kept) y += static_cast<size_t>(each.rows) * each.cols;
    }
  }
  team.Run(tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    const Few<W>& each = products[task.product];
    float* to = task.y ? task.y : Local(static_cast<size_t>(each.rows) * task.cols, 1);
    Stream(each.x + task.k, each.ldx, each.rows, each.w + task.k * each.ldw + task.col, each.ldw, task.depth,
           task.cols, to, task.y ? each.cols : task.cols);
    for (int row = 0; !task.y && row < each.rows; ++row)
      finish(task.product, row, task.col, task.cols, to + row * task.cols);
  });
  // Threads share only what is worth waking them for.
  size_t at_once = std::max<size_t>(1, rows.size() * (32 << 10) / std::max<int64_t>(floats, 1));
  team.Run((rows.size() + at_once - 1) / at_once, [&](int64_t index) {
    for (size_t at = index * at_once; at < std::min(rows.size(), (index + 1) * at_once); ++at) {
      auto [product, row] = rows[at];
      const Few<W>& each = products[product];
      float* sum = sums[product] + static_cast<size_t>(row) * each.cols;
      for (int block = 1; block < blocks_of(each); ++block)
        Add(sum, sum + static_cast<size_t>(block) * each.rows * each.cols, each.cols);
      finish(product, row, 0, each.cols, sum);
    }
  });
}

// Rows of one task, so that all have about as many.
inline int64_t TaskRows(int64_t rows) {
  int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  return (rows + chunks - 1) / std::max<int64_t>(chunks, 1);
}

// ---------------------------------------------------------------------------------------------------------------------

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

ffi::Error Unsupported(const char* what) { return ffi::Error::InvalidArgument(std::string(what) + ": unsupported types"); }

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

template <typename X, typename W>
void LinearOf(Team& team, const X* x, int64_t rows, int64_t depth, const std::vector<const W*>& weights,
              const std::vector<int64_t>& cols, const std::vector<X*>& outs) {
  std::unique_ptr<Scratch> wide;
  const float* input = Wide(x, rows * depth, wide);
  if (rows <= kStreamRows) {
    std::vector<Few<W>> products;
    for (size_t i = 0; i < cols.size(); ++i)
      products.push_back({input, depth, static_cast<int>(rows), weights[i], cols[i], static_cast<int>(depth),
                          static_cast<int>(cols[i])});
    StreamAll<false>(team, products, [&](size_t stack, int row, int col, int count, const float* y) {
      X* out = outs[stack] + row * cols[stack] + col;
      for (int c = 0; c < count; ++c) Narrow(y[c], out + c);
    });
    return;
  }
  struct Task {
    int stack, row, col, cols;
  };
  std::vector<Task> tasks;
  int64_t rows_of_task = TaskRows(rows);
  for (int64_t row = 0; row < rows; row += rows_of_task)
    for (size_t i = 0; i < cols.size(); ++i)
      for (int64_t col = 0; col < cols[i]; col += kBlockCols)
        tasks.push_back({static_cast<int>(i), static_cast<int>(row), static_cast<int>(col),
                         static_cast<int>(std::min<int64_t>(kBlockCols, cols[i] - col))});
  team.Run(tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    int high = static_cast<int>(std::min(rows_of_task, rows - task.row));
    size_t ldy = Rounded(task.cols);
    float* y = Local(high * ldy, 1);
    Multiply(input + task.row * depth, depth, high, weights[task.stack] + task.col, cols[task.stack],
             static_cast<int>(depth), task.cols, y, ldy);
    for (int m = 0; m < high; ++m) {
      X* out = outs[task.stack] + (task.row + m) * cols[task.stack] + task.col;
      for (int c = 0; c < task.cols; ++c) Narrow(y[m * ldy + c], out + c);
    }
  });
}

// x [N, K], layer [], rows of x that are in use [], then stacks [L, K, M...] -> for each stack [N, M...]; 0 in other
// rows.
ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer layer, ffi::AnyBuffer in_use,
                  ffi::RemainingArgs stacks, ffi::RemainingRets outs) {
  int64_t all = x.dimensions()[0], depth = x.dimensions()[1];
  int64_t rows = std::clamp<int64_t>(*Data<int32_t>(in_use), 0, all);
  int32_t index = *Data<int32_t>(layer);
  auto first = stacks.get<ffi::AnyBuffer>(0);
  if (!first) return first.error();
  Team team(pool);
  return ByTypes("linear", x.element_type(), first->element_type(), [&](auto of_x, auto of_w) {
    using X = decltype(of_x);
    using W = decltype(of_w);
    std::vector<const W*> weights;
    std::vector<int64_t> cols;
    std::vector<X*> results;
    for (size_t i = 0; i < stacks.size(); ++i) {
      auto stack = stacks.get<ffi::AnyBuffer>(i);
      auto out = outs.get<ffi::AnyBuffer>(i);
      if (!stack) return stack.error();
      if (!out) return out.error();
      if (stack->element_type() != first->element_type()) return Unsupported("linear");
      cols.push_back(Product(stack->dimensions(), 2, stack->dimensions().size()));
      weights.push_back(Data<W>(*stack) + index * depth * cols.back());
      results.push_back(Data<X>(*out));
      std::memset(results.back() + rows * cols.back(), 0, (all - rows) * cols.back() * sizeof(X));
    }
    if (rows == 0) return ffi::Error::Success();
    LinearOf<X, W>(team, Data<X>(x), rows, depth, weights, cols, results);
    return ffi::Error::Success();
  });
}

// Columns of a matrix whose rows are the sums' columns: w[n * ldw + k]. Panels as of Pack.
template <typename W>
void PackTransposed(const W* w, ptrdiff_t ldw, int depth, int cols, float* panels) {
  for (int c = 0; c < cols; c += kPanel, panels += static_cast<ptrdiff_t>(depth) * kPanel) {
    for (int j = 0; j < kPanel; ++j) {
      const W* from = w + (c + j) * ldw;
      for (int k = 0; k < depth; ++k) panels[k * kPanel + j] = c + j < cols ? Widen(from[k]) : 0.0f;
    }
  }
}

// x [rows, H, K], layer [], stack [L, R, H, W], or [R, W] of one, -> [rows, H, N]: each head meets a matrix of its own. What is summed over
// is R, and N columns of W from `begin` on are what comes out; transposed, K columns of W from `begin` on, and R.
template <typename X, typename W>
void HeadsOf(Team& team, const X* x, int64_t rows, int64_t heads, int64_t depth, const W* w, int64_t stack_cols,
             int64_t begin, bool transposed, int64_t cols, X* out) {
  std::unique_ptr<Scratch> wide;
  const float* input = Wide(x, rows * heads * depth, wide);
  int64_t ldw = heads * stack_cols, blocks = (cols + kBlockCols - 1) / kBlockCols;
  int64_t rows_of_task = TaskRows(rows), chunks = (rows + rows_of_task - 1) / std::max<int64_t>(rows_of_task, 1);
  team.Run(heads * blocks * chunks, [&](int64_t task) {
    int64_t head = task % heads, col = task / heads % blocks * kBlockCols, row = task / heads / blocks * rows_of_task;
    int wide_cols = static_cast<int>(std::min<int64_t>(kBlockCols, cols - col));
    int high = static_cast<int>(std::min(rows_of_task, rows - row));
    size_t ldy = Rounded(wide_cols);
    float* y = Local(high * ldy, 1);
    const float* from = input + (row * heads + head) * depth;
    const W* own = w + head * stack_cols + begin;
    if (!transposed) {
      Multiply(from, heads * depth, high, own + col, ldw, static_cast<int>(depth), wide_cols, y, ldy);
    } else {
      float* panels = Local(static_cast<size_t>(kBlockDepth) * kBlockCols, 0);
      Ahead resting{reinterpret_cast<const char*>(own)};
      std::memset(y, 0, high * ldy * sizeof(float));
      int tile = EvenRows(high);
      for (int k = 0; k < depth; k += kBlockDepth) {
        int deep = static_cast<int>(std::min<int64_t>(kBlockDepth, depth - k));
        PackTransposed(own + col * ldw + k, ldw, deep, wide_cols, panels);
        for (int m = 0; m < high; m += tile)
          for (int c = 0; c < wide_cols; c += kPanel)
            TileOf<kTileVecs>(std::min(tile, high - m), from + m * heads * depth + k, heads * depth, 1, deep,
                      panels + static_cast<ptrdiff_t>(deep) * c, y + m * ldy + c, ldy, resting);
      }
    }
    for (int m = 0; m < high; ++m)
      for (int c = 0; c < wide_cols; ++c) Narrow(y[m * ldy + c], out + ((row + m) * heads + head) * cols + col + c);
  });
}

ffi::Error Heads(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer layer, ffi::AnyBuffer stack,
                 ffi::Result<ffi::AnyBuffer> out, int64_t begin, bool transposed) {
  auto shape = x.dimensions(), held = stack.dimensions();
  int64_t of_layer = held.size() == 2 ? 0 : *Data<int32_t>(layer) * Product(held, 1, 4);
  Team team(pool);
  return ByTypes("heads", x.element_type(), stack.element_type(), [&](auto of_x, auto of_w) {
    using X = decltype(of_x);
    using W = decltype(of_w);
    HeadsOf<X, W>(team, Data<X>(x), shape[0], shape[1], shape[2], Data<W>(stack) + of_layer, held.back(), begin,
                  transposed, out->dimensions()[2], Data<X>(out));
    return ffi::Error::Success();
  });
}

// ---------------------------------------------------------------------------------------------------------------------

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

inline void Gate(Activation activation, const float* gate, const float* up, int count, float* out) {
  int i = 0;
  if (activation == Activation::kSilu) {
    for (; i + kLanes <= count; i += kLanes) {
      Vec value = Load(gate + i);
      Store(value / (Exp(-value) + 1.0f) * Load(up + i), out + i);
    }
    if (i < count) {
      float padded[3][kLanes] = {};
      std::memcpy(padded[0], gate + i, (count - i) * sizeof(float));
      std::memcpy(padded[1], up + i, (count - i) * sizeof(float));
      Gate(activation, padded[0], padded[1], kLanes, padded[2]);
      std::memcpy(out + i, padded[2], (count - i) * sizeof(float));
    }
    return;
  }
  for (; i < count; ++i) {
    float x = gate[i];
    if (activation == Activation::kRelu) {
      x = std::max(x, 0.0f);
    } else if (activation == Activation::kGelu) {
      x = 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    } else {
      x = 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    }
    out[i] = x * up[i];
  }
}

inline void Scale(float* y, size_t ldy, int rows, int cols, const float* scale) {
  for (int m = 0; m < rows; ++m)
    for (int c = 0; c < cols; ++c) y[m * ldy + c] *= scale[c];
}

// x [N, D], slots and weights [N, K], layer [], gate_up [L, S, D, 2, F], down [L, S, F, D] -> [N, D]; slot -1 is none.
// Stacks may lack S, if there is one slot in each layer: an axis of length 1, made for the call, has XLA copy the stack.
// Scales, if they are not empty, are those of the stacks' columns: [L, S, 2, F] and [L, S, D].
template <typename X, typename W>
void GroupedMlpOf(Team& team, const X* x, int64_t rows, int64_t width, const int32_t* slots, const float* weights,
                  int64_t choices, const W* gate_up, const W* down, const float* gate_up_scale,
                  const float* down_scale, int64_t num_slots, int64_t inner, Activation activation, bool weigh_input, X* out) {
  // Pairs of row and choice in order of their slots. place: where a pair stands in it.
  std::vector<int64_t> begins(num_slots + 1), filled;
  int64_t pairs = rows * choices;
  for (int64_t pair = 0; pair < pairs; ++pair)
    if (slots[pair] >= 0) ++begins[slots[pair] + 1];
  for (int64_t slot = 0; slot < num_slots; ++slot) begins[slot + 1] += begins[slot];
  int64_t chosen = begins[num_slots];
  filled.assign(begins.begin(), begins.end() - 1);
  std::vector<int64_t> place(pairs, -1), order(chosen);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (slots[pair] < 0) continue;
    place[pair] = filled[slots[pair]]++;
    order[place[pair]] = pair;
  }
  struct Task {
    int64_t slot, row;
    int rows, col, cols;
  };
  auto held = [&](int64_t slot) { return begins[slot + 1] - begins[slot]; };
  auto make_tasks = [&](int64_t cols) {  // of slots with many rows
    std::vector<Task> tasks;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (held(slot) <= kStreamRows) continue;
      int64_t rows_of_task = TaskRows(held(slot));
      for (int64_t row = 0; row < held(slot); row += rows_of_task)
        for (int64_t col = 0; col < cols; col += kBlockCols)
          tasks.push_back({slot, begins[slot] + row, static_cast<int>(std::min(rows_of_task, held(slot) - row)),
                           static_cast<int>(col), static_cast<int>(std::min<int64_t>(kBlockCols, cols - col))});
    }
    return tasks;
  };
  std::vector<int64_t> few;  // slots with few rows
  for (int64_t slot = 0; slot < num_slots; ++slot)
    if (held(slot) > 0 && held(slot) <= kStreamRows) few.push_back(slot);
  auto few_rows = [&](const float* from, int64_t depth, const W* stack, int64_t cols) {
    std::vector<Few<W>> products;
    for (int64_t slot : few)
      products.push_back({from + begins[slot] * depth, depth, static_cast<int>(held(slot)), stack + slot * depth * cols,
                          cols, static_cast<int>(depth), static_cast<int>(cols)});
    return products;
  };
  Scratch scratch(chosen * (width + inner + width));
  float* gathered = scratch.get();
  float* hidden = gathered + chosen * width;
  float* products = hidden + chosen * inner;
  constexpr int64_t kRowsAtOnce = 64;
  team.Run((chosen + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t task) {
    for (int64_t at = task * kRowsAtOnce; at < std::min(chosen, (task + 1) * kRowsAtOnce); ++at) {
      const X* from = x + order[at] / choices * width;
      float scale = weigh_input ? weights[order[at]] : 1.0f;
      X rounded;
      for (int64_t i = 0; i < width; ++i) {
        Narrow(Widen(from[i]) * scale, &rounded);
        gathered[at * width + i] = Widen(rounded);
      }
    }
  });
  // What this thread is likely to do next, if all take their turns.
  int turn = team.size();
  std::vector<Task> into = make_tasks(inner);
  auto gate_of = [&](const Task& task) { return gate_up + task.slot * width * 2 * inner + task.col; };
  team.Run(into.size(), [&](int64_t index) {
    const Task& task = into[index];
    const W* gate = gate_of(task);
    const W* next = index + turn < static_cast<int64_t>(into.size()) ? gate_of(into[index + turn]) : nullptr;
    size_t ldy = Rounded(task.cols);
    float* y = Local(2 * task.rows * ldy, 1);
    float* up = y + task.rows * ldy;
    const float* from = gathered + task.row * width;
    int depth = static_cast<int>(width);
    Multiply(from, width, task.rows, gate, 2 * inner, depth, task.cols, y, ldy, gate + inner);
    Multiply(from, width, task.rows, gate + inner, 2 * inner, depth, task.cols, up, ldy, next);
    if (gate_up_scale) {
      const float* scale = gate_up_scale + task.slot * 2 * inner + task.col;
      Scale(y, ldy, task.rows, task.cols, scale);
      Scale(up, ldy, task.rows, task.cols, scale + inner);
    }
    for (int m = 0; m < task.rows; ++m) {
      float* to = hidden + (task.row + m) * inner + task.col;
      Gate(activation, y + m * ldy, up + m * ldy, task.cols, to);
    }
  });
  StreamAll<true>(team, few_rows(gathered, width, gate_up, 2 * inner), [&](size_t index, int row, int, int, float* y) {
    int64_t slot = few[index];
    if (gate_up_scale) Scale(y, 0, 1, 2 * inner, gate_up_scale + slot * 2 * inner);
    Gate(activation, y, y + inner, inner, hidden + (begins[slot] + row) * inner);
  });
  std::vector<Task> out_of = make_tasks(width);
  auto down_of = [&](const Task& task) { return down + task.slot * inner * width + task.col; };
  team.Run(out_of.size(), [&](int64_t index) {
    const Task& task = out_of[index];
    const W* next = index + turn < static_cast<int64_t>(out_of.size()) ? down_of(out_of[index + turn]) : nullptr;
    size_t ldy = Rounded(task.cols);
    float* y = Local(task.rows * ldy, 1);
    Multiply(hidden + task.row * inner, inner, task.rows, down_of(task), width, static_cast<int>(inner), task.cols, y,
             ldy, next);
    if (down_scale) Scale(y, ldy, task.rows, task.cols, down_scale + task.slot * width + task.col);
    for (int m = 0; m < task.rows; ++m)
      std::memcpy(products + (task.row + m) * width + task.col, y + m * ldy, task.cols * sizeof(float));
  });
  StreamAll<false>(team, few_rows(hidden, inner, down, width), [&](size_t index, int row, int col, int cols, float* y) {
    int64_t slot = few[index];
    if (down_scale) Scale(y, 0, 1, cols, down_scale + slot * width + col);
    std::memcpy(products + (begins[slot] + row) * width + col, y, cols * sizeof(float));
  });
  team.Run((rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t task) {
    float* sum = Local(width, 1);
    for (int64_t row = task * kRowsAtOnce; row < std::min(rows, (task + 1) * kRowsAtOnce); ++row) {
      std::memset(sum, 0, width * sizeof(float));
      for (int64_t pair = row * choices; pair < (row + 1) * choices; ++pair) {
        if (place[pair] < 0) continue;
        const float* product = products + place[pair] * width;
        float scale = weigh_input ? 1.0f : weights[pair];
        for (int64_t i = 0; i < width; ++i) sum[i] += scale * product[i];
      }
      for (int64_t i = 0; i < width; ++i) Narrow(sum[i], out + row * width + i);
    }
  });
}

ffi::Error GroupedMlp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer slots, ffi::AnyBuffer weights,
                      ffi::AnyBuffer layer, ffi::AnyBuffer gate_up, ffi::AnyBuffer down,
                      ffi::Buffer<ffi::F32> gate_up_scale, ffi::Buffer<ffi::F32> down_scale,
                      ffi::Result<ffi::AnyBuffer> out, int32_t activation, bool weigh_input) {
  int64_t rows = x.dimensions()[0], width = x.dimensions()[1], choices = slots.dimensions()[1];
  auto stack = down.dimensions();
  int64_t num_slots = stack.size() == 4 ? stack[1] : 1, inner = stack[stack.size() - 2];
  int64_t index = *Data<int32_t>(layer), of_layer = index * num_slots * width * inner;
  const float* of_gate_up = gate_up_scale.element_count() ? gate_up_scale.typed_data() : nullptr;
  const float* of_down = down_scale.element_count() ? down_scale.typed_data() : nullptr;
  if (gate_up.element_type() != down.element_type()) return Unsupported("grouped_mlp");
  Team team(pool);
  return ByTypes("grouped_mlp", x.element_type(), down.element_type(), [&](auto of_x, auto of_w) {
    using X = decltype(of_x);
    using W = decltype(of_w);
    GroupedMlpOf<X, W>(team, Data<X>(x), rows, width, Data<int32_t>(slots), Data<float>(weights), choices,
                       Data<W>(gate_up) + 2 * of_layer, Data<W>(down) + of_layer,
                       of_gate_up ? of_gate_up + index * num_slots * 2 * inner : nullptr,
                       of_down ? of_down + index * num_slots * width : nullptr, num_slots, inner,
                       static_cast<Activation>(activation), weigh_input, Data<X>(out));
    return ffi::Error::Success();
  });
}

// ---------------------------------------------------------------------------------------------------------------------

enum class Span : int32_t { kFull = 0, kWindow = 1, kChunk = 2 };

struct Paged {
  int64_t page_size, table_width;
  const int32_t* table;  // [B, table_width]
  const int32_t* first;  // [B]: the position at which a table begins

  int64_t Place(int64_t sequence, int64_t at) const {  // of the token `at` places on from the first
    return table[sequence * table_width + at / page_size] * page_size + at % page_size;
  }
};

// Where attention finds the key and value of a token, for key-value heads of one sequence, side by side.
template <typename X>
struct PagedSource {
  const Paged& paged;
  int64_t sequence;
  const X* keys;
  int64_t key_stride, key_dim;
  const X* values;
  int64_t value_stride, value_dim;
  bool shared;  // values are the first numbers of their keys

  void operator()(int64_t at, int head, float* key, float* value) const {
    int64_t token = paged.Place(sequence, at);
    Copy(keys + token * key_stride + head * key_dim, key_dim, key);
    if (!shared) Copy(values + token * value_stride + head * value_dim, value_dim, value);
  }
};

// Keys and values made of latents [tokens, H, dn + dv]; what is rotated comes from the cache.
template <typename X>
struct LatentSource {
  const Paged& paged;
  int64_t sequence;
  const float* made;
  int64_t made_stride, nope_dim, value_dim;
  const X* rotated;
  int64_t entry_stride, rope_dim;
  bool shared;

  void operator()(int64_t at, int head, float* key, float* value) const {
    const float* from = made + at * made_stride + head * (nope_dim + value_dim);
    std::memcpy(key, from, nope_dim * sizeof(float));
    std::memcpy(value, from + nope_dim, value_dim * sizeof(float));
    const X* entry = rotated + paged.Place(sequence, at) * entry_stride;
    Copy(entry, rope_dim, key + nope_dim);
  }
};

// Queries [tokens * group] of a sequence and of each of some key-value heads, against the keys that each sees. Of several
// heads a token's keys are read together, as they lie.
template <typename X, typename Source>
void AttendTask(const X* query, int64_t heads, int64_t head_dim, int64_t value_dim, int kv_heads, int group,
                int tokens, const int32_t* positions, const Source& source, int32_t first, float scale,
                Span span, int64_t span_size, X* out) {
  int queries = tokens * group;
  int cols = queries <= kLanes ? kLanes : queries <= kPair ? kPair : (queries + kPanel - 1) / kPanel * kPanel;
  int panel = std::min(cols, kPanel), panels = cols / panel, vecs = panel / kLanes;
  // By panels: queries [panels, d, panel], sums [panels, dv, panel], scores [panels, kKeyBlock, panel].
  int64_t key_floats = static_cast<int64_t>(kKeyBlock) * head_dim, value_floats = kKeyBlock * value_dim;
  int64_t held = (head_dim + value_dim + 2) * cols;  // of a head, beside its block
  float* scores = Local(kKeyBlock * cols + kv_heads * (held + key_floats + value_floats), 1);
  float* of_heads = scores + kKeyBlock * cols;
  float* key_blocks = of_heads + kv_heads * held;
  float* value_blocks = key_blocks + kv_heads * key_floats;
  int32_t low[kQueryCols + kPanel], high[kQueryCols + kPanel];
  int32_t from = INT32_MAX, to = -1, all_from = -1, all_to = INT32_MAX;
  for (int q = 0; q < cols; ++q) {
    int32_t position = q < queries ? positions[q / group] : -1;
    low[q] = INT32_MAX;
    high[q] = -1;
    if (position >= 0) {
      high[q] = position;
      low[q] = 0;
      if (span == Span::kWindow) low[q] = std::max<int64_t>(0, position - span_size + 1);
      if (span == Span::kChunk) low[q] = position / span_size * span_size;
      from = std::min(from, low[q]);
      to = std::max(to, high[q]);
    }
    all_from = std::max(all_from, low[q]);
    all_to = std::min(all_to, high[q]);
  }
  for (int head = 0; head < kv_heads; ++head) {
    float* transposed = of_heads + head * held;
    float* sums = transposed + head_dim * cols;
    std::memset(sums, 0, value_dim * cols * sizeof(float));
    std::fill_n(sums + value_dim * cols, cols, -1e30f);      // largest
    std::fill_n(sums + (value_dim + 1) * cols, cols, 0.0f);  // total
    for (int q = 0; q < cols; ++q) {
      float* column = transposed + q / panel * head_dim * panel + q % panel;
      const X* row = query + (q / group * heads + head * group + q % group) * head_dim;
      for (int64_t i = 0; i < head_dim; ++i) column[i * panel] = q < queries ? Widen(row[i]) * scale : 0.0f;
    }
  }
  for (int32_t begin = from / kKeyBlock * kKeyBlock; begin <= to; begin += kKeyBlock) {
    int32_t start = std::max(begin, first), stop = std::min(begin + kKeyBlock, to + 1);
    int count = stop - start;
    if (count <= 0) continue;
    for (int i = 0; i < count; ++i)
      for (int head = 0; head < kv_heads; ++head)
        source(start - first + i, head, key_blocks + head * key_floats + i * head_dim,
               value_blocks + head * value_floats + i * value_dim);
    int64_t block_stride = source.shared ? head_dim : value_dim;
    bool masks = start < all_from || stop - 1 > all_to;
    int key_rows = EvenRows(count, vecs), value_rows = EvenRows(static_cast<int>(value_dim), vecs);
    for (int part = 0; part < kv_heads * panels; ++part) {
      int head = part / panels, p = part % panels;
      const float* transposed = of_heads + head * held;
      float* sums = of_heads + head * held + head_dim * cols;
      float* largest = sums + value_dim * cols;
      float* total = largest + cols;
      const float* key_block = key_blocks + head * key_floats;
      const float* block = source.shared ? key_block : value_blocks + head * value_floats;
      float* of_panel = scores + static_cast<ptrdiff_t>(p) * kKeyBlock * panel;
      const float* of_queries = transposed + p * head_dim * panel;
      for (int i = 0; i < count; i += key_rows) {
        int rows = std::min(key_rows, count - i);
        TileBy<true>(vecs, rows, key_block + i * head_dim, head_dim, 1, head_dim, of_queries, of_panel + i * panel);
      }
      for (int v = 0; v < panel; v += kLanes) {
        int q = p * panel + v;
        IVec lowest, highest;
        std::memcpy(&lowest, low + q, sizeof(IVec));
        std::memcpy(&highest, high + q, sizeof(IVec));
        Vec before = Load(largest + q), now = before;
        for (int i = 0; i < count; ++i) {
          Vec score = Load(of_panel + i * panel + v);
          if (masks) {
            IVec position = start + i - IVec{};
            score = ((position >= lowest) & (position <= highest)) ? score : Splat(-2e30f);
            Store(score, of_panel + i * panel + v);
          }
          now = Max(now, score);
        }
        Vec kept = Exp(before - now), sum = Load(total + q) * kept;
        for (int i = 0; i < count; ++i) {
          float* at = of_panel + i * panel + v;
          Vec score = Load(at);
          Vec weight = Exp(score - now);
          if (masks) weight = score < Splat(-1.5e30f) ? Vec{} : weight;
          Store(weight, at);
          sum += weight;
        }
        Store(now, largest + q);
        Store(sum, total + q);
        IVec grown = now > before;
        bool any = false;
        for (int i = 0; i < kLanes; ++i) any |= grown[i] != 0;
        if (any) {
          float* column = sums + p * value_dim * panel + v;
          for (int64_t i = 0; i < value_dim; ++i) Store(Load(column + i * panel) * kept, column + i * panel);
        }
      }
      float* of_sums = sums + p * value_dim * panel;
      for (int64_t i = 0; i < value_dim; i += value_rows) {
        int rows = static_cast<int>(std::min<int64_t>(value_rows, value_dim - i));
        TileBy<false>(vecs, rows, block + i, 1, block_stride, count, of_panel, of_sums + i * panel);
      }
    }
  }
  for (int head = 0; head < kv_heads; ++head) {
    const float* sums = of_heads + head * held + head_dim * cols;
    const float* total = sums + (value_dim + 1) * cols;
    for (int q = 0; q < queries; ++q) {
      X* row = out + (q / group * heads + head * group + q % group) * value_dim;
      const float* column = sums + q / panel * value_dim * panel + q % panel;
      float share = total[q] > 0.0f ? 1.0f / total[q] : 0.0f;
      for (int64_t i = 0; i < value_dim; ++i) Narrow(column[i * panel] * share, row + i);
    }
  }
}

// Which tokens of a batch belong to which sequence: those of sequence s are rows begins[s] to begins[s + 1]; what comes
// after the last is padding.
struct Rows {
  int64_t sequences;
  const int32_t* begins;  // [sequences + 1]

  int64_t count(int64_t sequence) const { return begins[sequence + 1] - begins[sequence]; }
  int64_t all() const { return begins[sequences]; }
};

inline Rows RowsOf(const ffi::AnyBuffer& begins) {
  return {begins.dimensions()[0] - 1, Data<int32_t>(begins)};
}

// Tasks over sequences, heads and tiles of queries. make_source(sequence, kv_head) -> where its keys and values are.
template <typename X, typename MakeSource>
void AttendOf(Team& team, const X* query, ffi::AnyBuffer::Dimensions shape, const int32_t* positions, const Rows& rows,
              const int32_t* first, int64_t kv_heads, int64_t value_dim, float scale, Span span, int64_t span_size,
              const MakeSource& make_source, X* out) {
  struct Task {
    int64_t sequence, token;
    int tokens, head, kv_heads, group;
  };
  int64_t heads = shape[2], key_dim = shape[3];
  int group = static_cast<int>(heads / kv_heads), together = std::min(group, kQueryCols);
  while (group % together) --together;
  int64_t at_once = std::max<int64_t>(1, kQueryCols / together);
  auto is_few = [&](int64_t sequence) { return rows.count(sequence) * group <= kLanes; };
  // With few queries it is keys that take the time: heads stay together as long as all threads have something to do.
  int64_t few = 0, kv_together = kv_heads, enough = 4 * team.size();
  for (int64_t s = 0; s < rows.sequences; ++s) few += rows.count(s) > 0 && is_few(s);
  while (kv_together > 1 && (kv_heads % kv_together || few * kv_heads / kv_together < enough)) --kv_together;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < rows.sequences; ++s) {
    if (is_few(s)) continue;
    // The last queries see most keys: they go first, so that no thread is left with a long one.
    for (int64_t end = rows.count(s), tile = (end - 1) / at_once; tile >= 0; --tile)
      for (int head = 0; head < heads; head += together)
        tasks.push_back({s, rows.begins[s] + tile * at_once, static_cast<int>(std::min(at_once, end - tile * at_once)),
                         head, 1, together});
  }
  for (int64_t s = 0; s < rows.sequences; ++s) {
    if (!rows.count(s) || !is_few(s)) continue;
    for (int64_t kv = 0; kv < kv_heads; kv += kv_together)
      tasks.push_back({s, rows.begins[s], static_cast<int>(rows.count(s)), static_cast<int>(kv * group),
                       static_cast<int>(kv_together), group});
  }
  team.Run(tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    int64_t row = task.token * heads + task.head;
    AttendTask<X>(query + row * key_dim, heads, key_dim, value_dim, task.kv_heads, task.group, task.tokens,
                  positions + task.token, make_source(task.sequence, task.head / group), first[task.sequence], scale,
                  span, span_size, out + row * value_dim);
  });
  int64_t of_row = heads * value_dim;
  std::memset(out + rows.all() * of_row, 0, (shape[0] * shape[1] - rows.all()) * of_row * sizeof(X));
}

// query [B, T, H, d], positions [B, T], begins [S + 1], table [S, pages], first [S], layer [], key and value pages [L, P, page, Kv, *],
// or without Kv, which is then 1, -> [B, T, H, dv]. A value is the first dv numbers of what the value pages hold.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer positions, ffi::AnyBuffer begins,
                  ffi::AnyBuffer table, ffi::AnyBuffer first, ffi::AnyBuffer layer, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                  ffi::Result<ffi::AnyBuffer> out, float scale, int32_t span, int64_t span_size) {
  auto key_shape = keys.dimensions(), value_shape = values.dimensions();
  Paged paged{key_shape[2], table.dimensions()[1], Data<int32_t>(table), Data<int32_t>(first)};
  int64_t index = *Data<int32_t>(layer), kv_heads = key_shape.size() == 5 ? key_shape[3] : 1;
  int64_t key_dim = key_shape.back(), stored_value = value_shape.back(), value_dim = out->dimensions()[3];
  bool shared = keys.untyped_data() == values.untyped_data();
  Team team(pool);
  return ByTypes("attend", query.element_type(), keys.element_type(), [&](auto of_x, auto of_w) {
    using X = decltype(of_x);
    if constexpr (!std::is_same_v<X, decltype(of_w)>) {
      return Unsupported("attend");
    } else {
      const X* of_keys = Data<X>(keys) + index * Product(key_shape, 1, key_shape.size());
      const X* of_values = Data<X>(values) + index * Product(value_shape, 1, value_shape.size());
      auto source = [&](int64_t sequence, int64_t kv_head) {
        return PagedSource<X>{paged, sequence, of_keys + kv_head * key_dim, kv_heads * key_dim, key_dim,
                              of_values + kv_head * stored_value, kv_heads * stored_value, value_dim, shared};
      };
      AttendOf<X>(team, Data<X>(query), query.dimensions(), Data<int32_t>(positions), RowsOf(begins), paged.first, kv_heads, value_dim,
                  scale, static_cast<Span>(span), span_size, source, Data<X>(out));
      return ffi::Error::Success();
    }
  });
}

// Latent attention that makes keys and values of the latents that some query sees. query [B, T, H, dn + dr], positions
// [B, T], begins [S + 1], table [S, pages], first [S], layer [] of the cache, entries [L, P, page, r + dr], layer [] of the weights,
// key_value [L, r, H, dn + dv] -> [B, T, H, dv].
ffi::Error AttendLatent(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer positions, ffi::AnyBuffer begins,
                        ffi::AnyBuffer table, ffi::AnyBuffer first, ffi::AnyBuffer cached, ffi::AnyBuffer entries, ffi::AnyBuffer layer,
                        ffi::AnyBuffer key_value, ffi::Result<ffi::AnyBuffer> out, float scale, int32_t span,
                        int64_t span_size) {
  auto shape = query.dimensions(), held = entries.dimensions(), weights = key_value.dimensions();
  Paged paged{held[2], table.dimensions()[1], Data<int32_t>(table), Data<int32_t>(first)};
  Rows rows = RowsOf(begins);
  int64_t heads = shape[2], width = held[3], rank = weights[1], made_dim = weights[3];
  int64_t value_dim = out->dimensions()[3], nope_dim = made_dim - value_dim, cols = heads * made_dim;
  // Where the tokens of each sequence begin among those made.
  std::vector<int64_t> made_begins(rows.sequences + 1, 0);
  constexpr int64_t kRowsAtOnce = 96;
  struct Task {
    int64_t sequence, row, col;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < rows.sequences; ++b) {
    int64_t last = -1;
    for (int64_t row = rows.begins[b]; row < rows.begins[b + 1]; ++row)
      last = std::max<int64_t>(last, Data<int32_t>(positions)[row]);
    int64_t seen = last < 0 ? 0 : last + 1 - paged.first[b];
    made_begins[b + 1] = made_begins[b] + seen;
    for (int64_t row = 0; row < seen; row += kRowsAtOnce)
      for (int64_t col = 0; col < cols; col += kBlockCols) tasks.push_back({b, row, col});
  }
  Scratch scratch(made_begins.back() * cols);
  float* made = scratch.get();
  Team team(pool);
  return ByTypes("attend_latent", query.element_type(), entries.element_type(), [&](auto of_x, auto of_w) {
    using X = decltype(of_x);
    if constexpr (!std::is_same_v<X, decltype(of_w)>) {
      return Unsupported("attend_latent");
    } else {
      if (key_value.element_type() != entries.element_type()) return Unsupported("attend_latent");
      const X* cache = Data<X>(entries) + *Data<int32_t>(cached) * Product(held, 1, 4);
      const X* matrix = Data<X>(key_value) + *Data<int32_t>(layer) * rank * cols;
      team.Run(tasks.size(), [&](int64_t index) {
        const Task& task = tasks[index];
        int64_t begin = made_begins[task.sequence], seen = made_begins[task.sequence + 1] - begin;
        int high = static_cast<int>(std::min(kRowsAtOnce, seen - task.row));
        int wide = static_cast<int>(std::min<int64_t>(kBlockCols, cols - task.col));
        float* y = Local(high * (kBlockCols + rank), 1);
        float* latents = y + high * kBlockCols;
        for (int i = 0; i < high; ++i) {
          const X* entry = cache + paged.Place(task.sequence, task.row + i) * width;
          for (int64_t j = 0; j < rank; ++j) latents[i * rank + j] = Widen(entry[j]);
        }
        Multiply(latents, rank, high, matrix + task.col, cols, static_cast<int>(rank), wide, y, kBlockCols);
        for (int i = 0; i < high; ++i)
          std::memcpy(made + (begin + task.row + i) * cols + task.col, y + i * kBlockCols, wide * sizeof(float));
      });
      auto source = [&](int64_t sequence, int64_t head) {
        return LatentSource<X>{paged, sequence, made + made_begins[sequence] * cols + head * made_dim, cols, nope_dim,
                               value_dim, cache + rank, width, width - rank, false};
      };
      AttendOf<X>(team, Data<X>(query), shape, Data<int32_t>(positions), rows, paged.first, heads, value_dim, scale,
                  static_cast<Span>(span), span_size, source, Data<X>(out));
      return ffi::Error::Success();
    }
  });
}

// Puts new [B, T, ...] in their places of pages [L, P, page, ...], for each of the arrays given; those at position -1
// nowhere. positions [B, T], begins [S + 1], table [S, pages], first [S], layer [], then pages, then new -> pages, in place.
ffi::Error Write(ffi::AnyBuffer positions, ffi::AnyBuffer begins, ffi::AnyBuffer table, ffi::AnyBuffer first, ffi::AnyBuffer layer,
                 ffi::RemainingArgs arrays, ffi::RemainingRets outs) {
  Rows rows = RowsOf(begins);
  int64_t width = table.dimensions()[1];
  for (size_t i = 0; i < outs.size(); ++i) {
    auto fresh = arrays.get<ffi::AnyBuffer>(outs.size() + i);
    auto pages = outs.get<ffi::AnyBuffer>(i);
    if (!fresh) return fresh.error();
    if (!pages) return pages.error();
    if (fresh->element_type() != (*pages)->element_type()) return Unsupported("write");
    auto shape = (*pages)->dimensions();
    int64_t page_size = shape[2];
    size_t bytes = Product(shape, 3, shape.size()) * ffi::ByteWidth(fresh->element_type());
    auto* base = Data<char>(*pages) + *Data<int32_t>(layer) * shape[1] * page_size * bytes;
    for (int64_t b = 0; b < rows.sequences; ++b) {
      for (int64_t row = rows.begins[b]; row < rows.begins[b + 1]; ++row) {
        int32_t position = Data<int32_t>(positions)[row];
        if (position < 0) continue;
        int64_t at = position - Data<int32_t>(first)[b];
        int64_t page = Data<int32_t>(table)[b * width + at / page_size];
        std::memcpy(base + (page * page_size + at % page_size) * bytes,
                    Data<char>(*fresh) + row * bytes, bytes);
      }
    }
  }
  return ffi::Error::Success();
}

// logits [B, V] -> the place of the greatest of each row, the first on ties [B], and the logarithm of the sum of all
// exponentials [B].
ffi::Error Greedy(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::ResultBuffer<ffi::S32> best,
                  ffi::ResultBuffer<ffi::F32> log_sum) {
  int64_t rows = logits.dimensions()[0], cols = logits.dimensions()[1], whole = cols / kLanes * kLanes;
  Team team(pool);
  team.Run(rows, [&](int64_t row) {
    const float* from = logits.typed_data() + row * cols;
    float largest = -INFINITY;
    Vec most = Splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += kLanes) most = Max(most, Load(from + i));
    for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    for (int64_t i = whole; i < cols; ++i) largest = std::max(largest, from[i]);
    int64_t at = 0;
    while (at + 1 < cols && from[at] != largest) ++at;
    Vec sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) sums += Exp(Load(from + i) - largest);
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    for (int64_t i = whole; i < cols; ++i) sum += std::exp(from[i] - largest);
    best->typed_data()[row] = static_cast<int32_t>(at);
    log_sum->typed_data()[row] = largest + static_cast<float>(std::log(sum));
  });
  return ffi::Error::Success();
}

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
