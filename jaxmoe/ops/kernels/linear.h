// Linear layers: all rows by one matrix, or each head's by its own.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "buffers.h"
#include "matmul.h"
#include "threads.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

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

constexpr int kFewRows = 8;  // that meet a transposed matrix as it lies; it is packed for more

// Columns of a matrix whose rows are the sums' columns: w[n * ldw + k]. Panels as of Pack.
template <typename W>
void PackTransposed(const W* w, ptrdiff_t ldw, int depth, int cols, float* panels) {
  for (int c = 0; c < cols; c += kPanel, panels += static_cast<ptrdiff_t>(depth) * kPanel) {
    for (int j = 0; j < kPanel; j += kLanes) {
      int k = 0;
      if (c + j + kLanes <= cols) {
        for (Vec square[kLanes]; k + kLanes <= depth; k += kLanes) {
          for (int i = 0; i < kLanes; ++i) square[i] = Load(w + (c + j + i) * ldw + k);
          Transpose(square);
          for (int i = 0; i < kLanes; ++i) Store(square[i], panels + (k + i) * kPanel + j);
        }
      }
      for (; k < depth; ++k)
        for (int i = j; i < j + kLanes; ++i)
          panels[k * kPanel + i] = c + i < cols ? Widen(w[(c + i) * ldw + k]) : 0.0f;
    }
  }
}

// A few rows, M at most, against kLanes columns of a transposed matrix, turned on the way; summed in the order of
// Multiply. It asks for the columns after these, each a row in memory that nothing else would see coming.
template <int M = kFewRows, typename W>
void ColumnsOf(int rows, const float* x, ptrdiff_t ldx, const W* w, ptrdiff_t ldw, int depth, float* y, ptrdiff_t ldy) {
  if constexpr (M > 1) {
    if (rows < M) return ColumnsOf<M - 1>(rows, x, ldx, w, ldw, depth, y, ldy);
  }
  Vec totals[M] = {};
  for (int block = 0; block < depth; block += kBlockDepth) {
    Vec sums[M] = {};
    int end = std::min(depth, block + kBlockDepth), k = block;
    for (; k + kLanes <= end; k += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_prefetch(w + (i + kLanes) * ldw + k);
        square[i] = Load(w + i * ldw + k);
      }
      Transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sums[m] += x[m * ldx + k + i] * square[i];
    }
    for (; k < end; ++k) {
      float column[kLanes];
      for (int i = 0; i < kLanes; ++i) column[i] = Widen(w[i * ldw + k]);
      for (int m = 0; m < M; ++m) sums[m] += x[m * ldx + k] * Load(column);
    }
    for (int m = 0; m < M; ++m) totals[m] += sums[m];
  }
  for (int m = 0; m < M; ++m) Store(totals[m], y + m * ldy);
}

// As Multiply, of a matrix whose rows are the sums' columns: w[n * ldw + k].
template <typename W>
void MultiplyTransposed(const float* x, ptrdiff_t ldx, int rows, const W* w, ptrdiff_t ldw, int depth, int cols,
                        float* y, ptrdiff_t ldy) {
  int begin = 0;
  for (; rows <= kFewRows && begin + kLanes <= cols; begin += kLanes) {
    ColumnsOf(rows, x, ldx, w + begin * ldw, ldw, depth, y + begin, ldy);
  }
  if (begin == cols) return;
  begin = begin / kPanel * kPanel;  // y has room for whole panels
  for (int row = 0; row < rows; ++row) std::memset(y + row * ldy + begin, 0, (ldy - begin) * sizeof(float));
  float* panels = Local(static_cast<size_t>(kBlockDepth) * kBlockCols, 0);
  Ahead resting{reinterpret_cast<const char*>(w)};
  int tile = EvenRows(rows);
  for (int k = 0; k < depth; k += kBlockDepth) {
    int deep = std::min(kBlockDepth, depth - k);
    PackTransposed(w + begin * ldw + k, ldw, deep, cols - begin, panels);
    for (int row = 0; row < rows; row += tile)
      for (int c = begin; c < cols; c += kPanel)
        TileOf<kTileVecs>(std::min(tile, rows - row), x + row * ldx + k, ldx, 1, deep,
                          panels + static_cast<ptrdiff_t>(deep) * (c - begin), y + row * ldy + c, ldy, resting);
  }
}

// x [rows, H, K], layer [], stack [L, R, H, W], or [R, W] of one, -> [rows, H, N]: each head meets a matrix of its own.
// What is summed over is R, and N columns of W from `begin` on are what comes out; transposed, K columns of W from
// `begin` on, and R.
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
    if (transposed) {
      MultiplyTransposed(from, heads * depth, high, own + col * ldw, ldw, static_cast<int>(depth), wide_cols, y, ldy);
    } else {
      Multiply(from, heads * depth, high, own + col, ldw, static_cast<int>(depth), wide_cols, y, ldy);
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

}  // namespace
