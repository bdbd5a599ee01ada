// Global attention, forward: the global tokens attend to all keys. These are split, so that one global token
// at batch 1 still employs every thread; a second pass merges the splits.
#pragma once

#include "forward_tile.h"

namespace led {
namespace LED_ISA {

// Every sequence's keys are cut into equal splits of whole tiles.
template <class T>
struct KeySplits {
  int64_t keys, per_head;
  KeySplits(const CpuAttentionParams& params, int64_t tasks_without) {
    const int64_t max_seqlen = params.call.max_seqlen;
    const int64_t wanted = ceil_div(4 * params.execution.num_threads, larger<int64_t>(tasks_without, 1));
    keys = round_up(larger<int64_t>(ceil_div(max_seqlen, wanted), 1), Geometry<T>::kBlockN);
    per_head = ceil_div(max_seqlen, keys);
  }
};

template <class T>
class GlobalForward {
  using G = Geometry<T>;
  static constexpr int kTiles = 8;  // tiles of queries that share one packing of a tile of keys

 public:
  explicit GlobalForward(const CpuAttentionParams& p)
      : p_(p),
        call_(p.call),
        block_d_(round_up(call_.head_dim, G::kPanel)),
        tiles_(smaller<int64_t>(ceil_div(call_.mask.max_globals, G::kBlockM), kTiles)),
        slots_(tiles_ * G::kBlockM),
        slot_chunks_(tiles_ == 0 ? 0 : ceil_div(call_.mask.max_globals, slots_)),
        splits_(p, call_.batch * call_.heads * slot_chunks_),
        dropout_(call_.dropout, kGlobalStream) {}

  void run() {
    Arena thread_sizes(nullptr), partial_sizes(nullptr);
    take(thread_sizes);
    take_tiles(partial_sizes);
    const int64_t outputs = call_.batch * call_.heads * slot_chunks_, tasks = outputs * splits_.per_head;
    Scratch scratch(thread_sizes.used() * p_.execution.num_threads), partials(partial_sizes.used() * tasks);
    const auto tiles_of = [&](int64_t task) {
      Arena arena(partials.at(partial_sizes.used() * task));
      return take_tiles(arena);
    };
    parallel_tasks(tasks, p_.execution, [&](int64_t task, int thread) {
      Arena arena(scratch.at(thread_sizes.used() * thread));
      PackedKeys<T> keys = take(arena);
      attend_split(tiles_of(task), keys, Output(*this, task / splits_.per_head),
                   task % splits_.per_head * splits_.keys);
    });
    parallel_tasks(outputs, p_.execution, [&](int64_t output, int) {
      const Output o(*this, output);
      for (int t = 0; t < tiles_; ++t) {
        ForwardTile<T> merged = tiles_of(output * splits_.per_head).tile[t];
        for (int64_t split = 1; split < splits_.per_head; ++split) {
          merged.merge(tiles_of(output * splits_.per_head + split).tile[t]);
        }
        for (int i = 0; i < G::kBlockM; ++i) {
          const int64_t slot = o.slot + t * G::kBlockM + i;
          if (slot < call_.mask.max_globals)
            merged.write_row(p_, i, o.seq.batch, slot, o.head, slot < o.seq.num_global_queries);
        }
      }
    });
  }

 private:
  // A result is of a sequence, a head and a chunk of slots, from `slot` on.
  struct Output {
    int64_t head, slot;
    Sequence seq;
    Output(const GlobalForward& f, int64_t index)
        : head(index / f.slot_chunks_ % f.call_.heads),
          slot(index % f.slot_chunks_ * f.slots_),
          seq(f.call_, index / f.slot_chunks_ / f.call_.heads) {}
  };
  struct Tiles {
    ForwardTile<T> tile[kTiles];
  };

  PackedKeys<T> take(Arena& arena) const { return PackedKeys<T>::take(arena, G::kBlockN, block_d_, false); }

  Tiles take_tiles(Arena& arena) const {
    Tiles t;
    for (int i = 0; i < tiles_; ++i) t.tile[i] = ForwardTile<T>::take(arena, block_d_);
    return t;
  }

  void attend_split(Tiles tiles, PackedKeys<T>& packed, const Output& o, int64_t begin) {
    const Sequence& seq = o.seq;
    for (int t = 0; t < tiles_; ++t) {
      tiles.tile[t].load(call_, seq.batch, o.head, [&](int i) {
        const int64_t slot = o.slot + t * G::kBlockM + i;
        return slot < seq.num_global_queries ? slot : -1;
      });
    }
    if (o.slot >= seq.num_global_queries) return;
    const int64_t end = smaller(begin + splits_.keys, seq.len);
    for (int64_t start = begin; start < end && !p_.execution.stops(); start += G::kBlockN) {
      const int64_t keys = round_up(smaller<int64_t>(end - start, G::kBlockN), G::kPanel);
      const auto key_at = [&](int64_t i) { return start + i < end ? start + i : -1; };
      for (int64_t offset = 0; offset < keys; offset += G::kPanel)
        packed.pack_panel(call_, seq, o.head, offset, key_at);
      const bool interior = start + keys <= end && !seq.has_padding(start, start + keys);
      for (int t = 0; t < tiles_; ++t) {
        for (int g = 0; g < G::kBlockM / G::kRows; ++g) {
          const int64_t slot = o.slot + t * G::kBlockM + g * G::kRows;
          if (slot < seq.num_global_queries)
            attend_group(tiles.tile[t], g, packed, seq, o.head, slot, start, keys, interior);
        }
      }
    }
  }

  void attend_group(ForwardTile<T>& tile, int g, const PackedKeys<T>& packed, const Sequence& seq,
                    int64_t head, int64_t slot, int64_t start, int64_t keys, bool interior) {
    tile.score(g, packed, 0, keys);
    const Band<T> bands[G::kRows] = {};
    for (int64_t n = 0; !interior && n < keys; n += G::kPanel)
      tile.template mask<Visible::kAll>(n, bands, packed.positions);
    tile.attend(g, packed, 0, keys, dropout_, [&](int i) {
      const int64_t query = seq.global_position[smaller(slot + i, seq.num_globals - 1)];
      dropout_.factors(static_cast<uint32_t>(seq.batch * call_.heads + head), static_cast<uint32_t>(query),
                       start + seq.position_offset, keys, tile.keep);
    });
  }

  const CpuAttentionParams& p_;
  const AttentionCall& call_;
  int64_t block_d_, tiles_, slots_, slot_chunks_;
  KeySplits<T> splits_;
  DropoutRow<T> dropout_;
};

}  // namespace LED_ISA
}  // namespace led
