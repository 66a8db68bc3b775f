// Rows times a matrix: y[m, n] = sum_k x[m, k] w[k, n].
//
// Every sum goes over blocks of kBlockDepth, each from first to last with fused multiply-adds, and then over the
// blocks, in one order whatever the tiling. Few rows stream the weights by; for many, a block of them is packed into
// panels that stay in a cache while rows pass by.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "memory.h"
#include "threads.h"
#include "vectors.h"

namespace {

// kSums vectors of sums stay in registers beside a row of a panel; kDepth pairs of vectors of weights do in Stream.
#if defined(__AVX512F__)
constexpr int kSums = 24, kTileVecs = 4, kDepth = 8;
#elif defined(__AVX__)
constexpr int kSums = 12, kTileVecs = 2, kDepth = 4;
#else
constexpr int kSums = 24, kTileVecs = 4, kDepth = 8;
#endif
constexpr int kPair = 2 * kLanes, kPanel = kTileVecs * kLanes;
constexpr int kBlockCols = 128;   // of a packed block, and of what one task computes of many rows
constexpr int kBlockDepth = 128;  // a panel of it fits the first cache
constexpr int kChunkRows = 264;   // of one task, at most
constexpr int kStreamRows = 40;   // up to so many rows weights are not worth packing

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

}  // namespace
