// The gated MLPs of a mixture: each row by those that it names.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "buffers.h"
#include "matmul.h"
#include "memory.h"
#include "threads.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

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
// Stacks may lack S, if there is one slot in each layer: an axis of length 1, made for the call, has XLA copy the
// stack. Scales, if they are not empty, are those of the stacks' columns: [L, S, 2, F] and [L, S, D].
template <typename X, typename W>
void GroupedMlpOf(Team& team, const X* x, int64_t rows, int64_t width, const int32_t* slots, const float* weights,
                  int64_t choices, const W* gate_up, const W* down, const float* gate_up_scale,
                  const float* down_scale, int64_t num_slots, int64_t inner, Activation activation, bool weigh_input,
                  X* out) {
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

}  // namespace
