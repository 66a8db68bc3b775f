// Attention over the paged cache: keys and values are read where they lie, and only those that some query sees.
//
// It goes over blocks of keys that begin at fixed positions, so that its sums do not depend on how many queries there
// are at once.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "matmul.h"
#include "memory.h"
#include "paged_cache.h"
#include "threads.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int kKeyBlock = 64;    // keys that are taken at once; a multiple of it begins a block
constexpr int kQueryCols = 128;  // queries that one task takes at once

enum class Span : int32_t { kFull = 0, kWindow = 1, kChunk = 2 };

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

// Queries [tokens * group] of a sequence and of each of some key-value heads, against the keys that each sees. Of
// several heads a token's keys are read together, as they lie.
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

// query [B, T, H, d], positions [B, T], begins [S + 1], table [S, pages], first [S], layer [], key and value pages
// [L, P, page, Kv, *], or without Kv, which is then 1, -> [B, T, H, dv]. A value is the first dv numbers of what the
// value pages hold.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer positions, ffi::AnyBuffer begins,
                  ffi::AnyBuffer table, ffi::AnyBuffer first, ffi::AnyBuffer layer, ffi::AnyBuffer keys,
                  ffi::AnyBuffer values, ffi::Result<ffi::AnyBuffer> out, float scale, int32_t span,
                  int64_t span_size) {
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
      AttendOf<X>(team, Data<X>(query), query.dimensions(), Data<int32_t>(positions), RowsOf(begins), paged.first,
                  kv_heads, value_dim, scale, static_cast<Span>(span), span_size, source, Data<X>(out));
      return ffi::Error::Success();
    }
  });
}

// Latent attention that makes keys and values of the latents that some query sees. query [B, T, H, dn + dr], positions
// [B, T], begins [S + 1], table [S, pages], first [S], layer [] of the cache, entries [L, P, page, r + dr], layer [] of
// the weights, key_value [L, r, H, dn + dv] -> [B, T, H, dv].
ffi::Error AttendLatent(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer positions, ffi::AnyBuffer begins,
                        ffi::AnyBuffer table, ffi::AnyBuffer first, ffi::AnyBuffer cached, ffi::AnyBuffer entries,
                        ffi::AnyBuffer layer, ffi::AnyBuffer key_value, ffi::Result<ffi::AnyBuffer> out, float scale,
                        int32_t span, int64_t span_size) {
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

}  // namespace
