// The paged cache of keys and values: where a token's lie, and putting them there.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "buffers.h"
#include "xla/ffi/api/ffi.h"

namespace {

struct Paged {
  int64_t page_size, table_width;
  const int32_t* table;  // [B, table_width]
  const int32_t* first;  // [B]: the position at which a table begins

  int64_t Place(int64_t sequence, int64_t at) const {  // of the token `at` places on from the first
    return table[sequence * table_width + at / page_size] * page_size + at % page_size;
  }
};

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

// Puts new [B, T, ...] in their places of pages [L, P, page, ...], for each of the arrays given; those at position -1
// nowhere. positions [B, T], begins [S + 1], table [S, pages], first [S], layer [], then pages, then new -> pages, in
// place.
ffi::Error Write(ffi::AnyBuffer positions, ffi::AnyBuffer begins, ffi::AnyBuffer table, ffi::AnyBuffer first,
                 ffi::AnyBuffer layer, ffi::RemainingArgs arrays, ffi::RemainingRets outs) {
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

}  // namespace
