// One decode step of a batch of rows over a paged cache, in one launch: QK-norm and three-axis rotation of the queries and of the new
// key, its write into the cache, attention of R query heads per kv head over everything alive, and the merge of the parts.
//
// A row of the cache is a list of slots, cut into pages: slot s lies at place s % PAGE of page table[row][s / PAGE]; page 0 is
// nobody's. Slots 0 .. window - 1 are a ring (token i in slot i % window), slots store .. store + max_landmarks - 1 another ring, of
// the landmarks that left the first (landmark number j in slot store + j % max_landmarks). state [rows 4] says what the row holds:
// tokens, landmarks among them, landmarks that have left the window, and 1 if a token found no page. The same launch serves every
// layer; `decode_advance` counts the step afterwards.
//
// Block (row, kv head, part). What the row holds besides the new token is cut into `parts` runs; each block turns its queries itself.
// The last part that has keys also owns what changes: it reads the slot that the new token takes, and moves a live landmark in it to
// the store. Nobody else reads either slot, so blocks need no order. With several parts, each leaves its sums in `partial`, and the
// one that arrives last adds them in the order of parts: the same bits whoever is last. It resets the counter for the next launch.
#pragma once
#include "grid.cuh"
#include "norm_rope.cuh"

constexpr int DECODE_WARPS = 4, DECODE_THREADS = 32 * DECODE_WARPS;
constexpr int DECODE_MAX_PARTS = 64;
constexpr int DECODE_FEWEST_KEYS = 64;  // of a part; not measured
constexpr float NO_KEY = -1e30f;        // the running maximum before any key

template <class T>
struct DecodeStep {
  const T *q, *k, *v;                                          // [B H K] [B G K] [B G K]
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;         // strides
  const float *q_weight, *k_weight;                            // [K]
  const int64_t* position;                                     // [B 3]
  const double* turns;                                         // [K/2] turns per position
  const int* axis;                                             // [K/2] which position turns the pair
  const int *rows, *state, *table;                             // [B], -1 for nobody; [rows 4]; [rows table_width]
  const uint8_t *landmark, *marked;                            // [B] is the new token one; [rows window] is the one in this slot
  T* pool;                                                     // [pages 2 G PAGE K]
  int* fault;                                                  // = state, to be written
  T* out;                                                      // [B H K]
  float* partial;                                              // [B G parts R (K + 2)]
  int* arrived;                                                // [B G], zero
  int heads, groups, parts, page_bits, table_width, window, max_landmarks, store;
  float scale, eps;
};

// What a row holds besides the new token.
struct Held {
  int length, ring, low, store, taken;  // taken: the slot of the new token; low: number of the oldest live landmark in the store
  bool leaving;                         // a live landmark gives its slot to the new token
};

template <class T>
WEFT_DEVICE Held held_by(const DecodeStep<T>& step, int entry, int row) {
  const int* state = step.state + 4 * row;
  Held held;
  held.length = state[0];
  int landmarks = state[1] + step.landmark[entry], left = state[2];
  bool wrapped = held.length >= step.window;
  held.taken = held.length % step.window;
  held.ring = wrapped ? step.window - 1 : held.length;
  held.low = landmarks - step.max_landmarks;
  held.leaving = wrapped && held.low <= left && step.marked[(int64_t)row * step.window + held.taken];
  held.low = held.low < 0 ? 0 : held.low > left ? left : held.low;
  held.store = left - held.low;
  return held;
}

// The slot of the i-th thing that a row holds: the ring from the oldest token on, then the store from the oldest landmark on.
WEFT_DEVICE int slot_of(const Held& held, int i, int window, int max_landmarks, int store) {
  if (i < held.ring) {
    int slot = held.length >= window ? held.taken + 1 + i : i;
    return slot >= window ? slot - window : slot;
  }
  int place = held.low % max_landmarks + (i - held.ring);
  return store + (place >= max_landmarks ? place - max_landmarks : place);
}

// The key of a slot and, `value` numbers further on, its value; null where the row has no such page.
template <int K, class T>
WEFT_DEVICE T* place_of(const DecodeStep<T>& step, int row, int group, int slot) {
  int index = slot >> step.page_bits;
  int page = index < step.table_width ? step.table[(int64_t)row * step.table_width + index] : 0;
  int64_t line = (((int64_t)page * 2 * step.groups + group) << step.page_bits) + (slot & ((1 << step.page_bits) - 1));
  return page ? step.pool + line * K : nullptr;
}

// A row of x [K], normed and turned, handed to put(channel, number) by the 32 lanes of a warp. cosine and sine: of the lane's pairs.
template <int K, class T, class Put>
WEFT_DEVICE void norm_and_turn(const T* x, const float* weight, const float* cosine, const float* sine, float eps, Put put) {
  int lane = thread_index() % 32;
  Row<K / 64> a = load_row<K>(x, lane);
  float r = inverse_rms<K>(a, eps);
  WEFT_UNROLL
  for (int e = 0; e < K / 64; ++e) {
    int pair = lane + 32 * e;
    float u = a.first[e] * r * weight[pair], v = a.second[e] * r * weight[pair + K / 2];
    put(pair, u * cosine[e] - v * sine[e]);
    put(pair + K / 2, v * cosine[e] + u * sine[e]);
  }
}

// How the 32 lanes of a warp share keys: LANES lanes per key, each with CHANNELS channels in chunks of 16 bytes; KEYS keys at once.
template <int K, int R, class T>
struct Sharing {
  static constexpr int LANES = R * K > 512 ? 16 : 8, SETS = 32 / LANES, CHANNELS = K / LANES;
  static constexpr int PER_LOAD = 16 / (int)sizeof(T), LOADS = CHANNELS / PER_LOAD;
  static constexpr int KEYS = LOADS >= 4 ? 1 : (R > 4 ? 2 : 4) / LOADS;  // more would not fit the registers
};

// Running softmax sums of one lane: R heads over the keys of its set, and CHANNELS channels of their weighted values.
template <int R, int CHANNELS>
struct Sums {
  float most[R], weight[R], value[R][CHANNELS];
};

// Takes KEYS keys into the sums; q is scaled by log2(e) already. Lanes of a set hold parts of one key; `live` is equal in them.
template <int R, int CHANNELS, int LANES, int KEYS>
WEFT_DEVICE void take_keys(Sums<R, CHANNELS>& sums, const float (&q)[R][CHANNELS], const float (&key)[KEYS][CHANNELS],
                           const float (&value)[KEYS][CHANNELS], const bool (&live)[KEYS]) {
  WEFT_UNROLL
  for (int h = 0; h < R; ++h) {
    float score[KEYS], most = sums.most[h];
    WEFT_UNROLL
    for (int j = 0; j < KEYS; ++j) {
      score[j] = 0.f;
      WEFT_UNROLL
      for (int c = 0; c < CHANNELS; ++c) score[j] += q[h][c] * key[j][c];
      WEFT_UNROLL
      for (int mask = LANES / 2; mask; mask >>= 1) score[j] += shuffle_xor(score[j], mask);
      if (live[j]) most = fmaxf(most, score[j]);
    }
    float shrink = power2(sums.most[h] - most);
    sums.most[h] = most;
    sums.weight[h] *= shrink;
    WEFT_UNROLL
    for (int c = 0; c < CHANNELS; ++c) sums.value[h][c] *= shrink;
    WEFT_UNROLL
    for (int j = 0; j < KEYS; ++j) {
      float weight = live[j] ? power2(score[j] - most) : 0.f;
      sums.weight[h] += weight;
      WEFT_UNROLL
      for (int c = 0; c < CHANNELS; ++c) sums.value[h][c] += weight * value[j][c];
    }
  }
}

// Floats of shared memory: the queries, four rows of T (key and value that come and that leave), and the sums of every set.
template <int K, int R, class T>
constexpr int decode_shared_floats() {
  return R * K + 4 * K + DECODE_WARPS * Sharing<K, R, T>::SETS * R * (K + 2) + 4;
}

// The channel of number i of this lane, for the sums.
template <int K, int R, class T>
WEFT_DEVICE int channel_of(int part, int i) {
  using S = Sharing<K, R, T>;
  return (i / S::PER_LOAD * S::LANES + part) * S::PER_LOAD + i % S::PER_LOAD;
}

// Adds `count` sums of [R (K + 2)] (K numbers, their largest score, their weight) at `from`, in order, and hands each finished
// channel to put(head, channel, number, largest, weight). FRESH: written by other blocks. `factors` [count R] floats: scratch.
template <int K, int R, bool FRESH, class Put>
WEFT_DEVICE void add_sums(const float* from, int count, float* factors, Put put) {
  auto read = [&](int64_t at) { return FRESH ? load_fresh(from + at) : from[at]; };
  for (int i = thread_index(); i < count * R; i += DECODE_THREADS) {
    float most = NO_KEY;
    for (int n = 0; n < count; ++n) most = fmaxf(most, read((int64_t)(n * R + i % R) * (K + 2) + K));
    factors[i] = power2(read((int64_t)i * (K + 2) + K) - most);
  }
  sync_block();
  for (int i = thread_index(); i < R * K; i += DECODE_THREADS) {
    int h = i / K, c = i % K;
    float sum = 0.f, weight = 0.f, most = NO_KEY;
    for (int n = 0; n < count; ++n) {
      int64_t at = (int64_t)(n * R + h) * (K + 2);
      sum += factors[n * R + h] * read(at + c);
      weight += factors[n * R + h] * read(at + K + 1);
      most = fmaxf(most, read(at + K));
    }
    put(h, c, sum, most, weight);
  }
}

template <int K, int R, class T>
WEFT_KERNEL_PAIRED(DECODE_THREADS) decode_step(const DecodeStep<T> step) {
  using S = Sharing<K, R, T>;
  int part = block_index() % step.parts, group = block_index() / step.parts % step.groups;
  int entry = block_index() / (step.parts * step.groups), row = step.rows[entry];
  int heads = step.heads / step.groups;  // of this kv head; R or fewer
  int thread = thread_index(), warp = thread / 32, lane = thread % 32, share = lane % S::LANES;
  T* out = step.out + ((int64_t)entry * step.heads + group * heads) * K;
  if (row < 0) {
    if (part == 0)
      for (int i = thread; i < heads * K; i += DECODE_THREADS) out[i] = narrow_to<T>(0.f);
    return;
  }
  Held held = held_by(step, entry, row);
  int past = held.ring + held.store, run = (past + step.parts - 1) / step.parts;
  run = run < DECODE_FEWEST_KEYS ? DECODE_FEWEST_KEYS : run;
  int active = past ? (past + run - 1) / run : 1;
  if (part >= active) return;
  bool owner = part == active - 1;

  float* query = shared_floats();                          // [R K]
  T* rows = (T*)(query + R * K);                           // [4 K]: new key, new value, leaving key, leaving value
  float* sums_of = query + R * K + 4 * K;                  // [sets R (K + 2)]
  constexpr int SETS = DECODE_WARPS * S::SETS;
  int* last = (int*)(sums_of + SETS * R * (K + 2));

  float cosine[K / 64], sine[K / 64];
  WEFT_UNROLL
  for (int e = 0; e < K / 64; ++e) {
    int pair = lane + 32 * e;
    double turns = (double)step.position[3 * entry + step.axis[pair]] * step.turns[pair];
    turn_angle((float)(turns - rint(turns)), sine + e, cosine + e);
  }
  for (int h = warp; h < R; h += DECODE_WARPS) {
    const T* x = step.q + entry * step.q_row + (group * heads + h) * step.q_head;
    float scale = step.scale * 1.4426950408889634f;
    if (h < heads)
      norm_and_turn<K>(x, step.q_weight, cosine, sine, step.eps, [&](int c, float y) { query[h * K + c] = y * scale; });
    else
      for (int c = lane; c < K; c += 32) query[h * K + c] = 0.f;
  }
  int64_t value = (int64_t)step.groups << step.page_bits;  // lines between a key and its value
  T* taken = owner ? place_of<K>(step, row, group, held.taken) : nullptr;
  bool leaving = owner && held.leaving && taken;
  if (owner) {
    if (warp == DECODE_WARPS - 1)
      norm_and_turn<K>(step.k + entry * step.k_row + group * step.k_head, step.k_weight, cosine, sine, step.eps,
                       [&](int c, float y) { rows[c] = narrow_to<T>(y); });
    for (int c = thread; c < K; c += DECODE_THREADS) {
      rows[K + c] = step.v[entry * step.v_row + group * step.v_head + c];
      rows[2 * K + c] = leaving ? taken[c] : narrow_to<T>(0.f);
      rows[3 * K + c] = leaving ? taken[value * K + c] : narrow_to<T>(0.f);
    }
  }
  sync_block();
  if (owner) {
    T* kept = leaving ? place_of<K>(step, row, group, step.store + step.state[4 * row + 2] % step.max_landmarks) : nullptr;
    if (thread == 0 && group == 0 && (!taken || (leaving && !kept))) step.fault[4 * row + 3] = 1;
    for (int c = thread; c < 2 * K; c += DECODE_THREADS) {
      int64_t at = c < K ? c : value * K + c - K;
      if (taken) taken[at] = rows[c];
      if (kept) kept[at] = rows[2 * K + c];
    }
  }

  float q[R][S::CHANNELS];
  Sums<R, S::CHANNELS> sums;
  WEFT_UNROLL
  for (int h = 0; h < R; ++h) {
    sums.most[h] = NO_KEY;
    sums.weight[h] = 0.f;
    WEFT_UNROLL
    for (int i = 0; i < S::CHANNELS; ++i) {
      sums.value[h][i] = 0.f;
      q[h][i] = query[h * K + channel_of<K, R, T>(share, i)];
    }
  }
  int begin = part * run, end = begin + run < past ? begin + run : past;
  int beyond = owner ? end + 2 : end;  // the owner's last two: the landmark that leaves, and the new token
  for (int first = begin + warp * S::SETS * S::KEYS; first < beyond; first += DECODE_WARPS * S::SETS * S::KEYS) {
    Bytes16 key_words[S::KEYS][S::LOADS], value_words[S::KEYS][S::LOADS];
    bool live[S::KEYS];
    WEFT_UNROLL
    for (int j = 0; j < S::KEYS; ++j) {
      int i = first + j * S::SETS + lane / S::LANES;
      const T* at = i < end ? place_of<K>(step, row, group, slot_of(held, i, step.window, step.max_landmarks, step.store)) : nullptr;
      const T* own = i == end + 1 ? rows : i == end && leaving ? rows + 2 * K : nullptr;
      live[j] = at || (own && i < beyond);
      WEFT_UNROLL
      for (int n = 0; n < S::LOADS; ++n) {
        int c = (n * S::LANES + share) * S::PER_LOAD;
        key_words[j][n] = value_words[j][n] = Bytes16{0, 0, 0, 0};
        if (at) {
          key_words[j][n] = load16(at + c);
          value_words[j][n] = load16(at + value * K + c);
        } else if (live[j]) {
          key_words[j][n] = load16(own + c);
          value_words[j][n] = load16(own + K + c);
        }
      }
    }
    float keys[S::KEYS][S::CHANNELS], values[S::KEYS][S::CHANNELS];
    WEFT_UNROLL
    for (int j = 0; j < S::KEYS; ++j) {
      WEFT_UNROLL
      for (int n = 0; n < S::LOADS; ++n) {
        widen(key_words[j][n], step.pool, keys[j] + n * S::PER_LOAD);
        widen(value_words[j][n], step.pool, values[j] + n * S::PER_LOAD);
      }
    }
    take_keys<R, S::CHANNELS, S::LANES, S::KEYS>(sums, q, keys, values, live);
  }

  WEFT_UNROLL
  for (int h = 0; h < R; ++h) {
    float* mine = sums_of + (thread / S::LANES * R + h) * (K + 2);
    WEFT_UNROLL
    for (int i = 0; i < S::CHANNELS; ++i) mine[channel_of<K, R, T>(share, i)] = sums.value[h][i];
    if (share == 0) {
      mine[K] = sums.most[h];
      mine[K + 1] = sums.weight[h];
    }
  }
  sync_block();
  auto finish = [&](int h, int c, float sum, float, float weight) {
    if (h < heads) out[h * K + c] = narrow_to<T>(sum / weight);
  };
  if (active == 1) {
    add_sums<K, R, false>(sums_of, SETS, query, finish);
    return;
  }
  int64_t pair = (int64_t)entry * step.groups + group;
  float* partial = step.partial + pair * step.parts * R * (K + 2);
  float* mine = partial + (int64_t)part * R * (K + 2);
  add_sums<K, R, false>(sums_of, SETS, query, [&](int h, int c, float sum, float most, float weight) {
    mine[h * (K + 2) + c] = sum;
    if (c == 0) {
      mine[h * (K + 2) + K] = most;
      mine[h * (K + 2) + K + 1] = weight;
    }
  });
  fence();
  sync_block();
  if (thread == 0) *last = add_one(step.arrived + pair) == active - 1;
  sync_block();
  if (!*last) return;
  fence();
  if (thread == 0) step.arrived[pair] = 0;
  add_sums<K, R, true>(partial, active, query, finish);
}

// Counts the step of each row in state and marks the new tokens that are landmarks: after the last layer, once per step.
// slots: window of `marked`, [rows slots].
WEFT_KERNEL decode_advance(const int* rows, const uint8_t* landmark, int* state, uint8_t* marked, int batch, int slots, int threads) {
  int entry = block_index() * threads + thread_index();
  if (entry >= batch || rows[entry] < 0) return;
  int* mine = state + 4 * rows[entry];
  uint8_t* mark = marked + (int64_t)rows[entry] * slots + mine[0] % slots;
  mine[2] += mine[0] >= slots && *mark;
  *mark = landmark[entry] != 0;
  mine[1] += *mark;
  mine[0] += 1;
}
