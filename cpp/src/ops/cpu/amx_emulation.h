// What AMX's tile instructions do, in plain C++ after the operation sections of Intel's Software
// Developer's Manual (TILELOADD, TILESTORED, TDPBF16PS, TDPBSUD): to test kernels where there is no
// AMX. As there, what an instruction does not write of a tile becomes zero.
struct EmulatedTiles {
  struct Tile {
    alignas(64) uint8_t bytes[16][64];
  };
  struct State {
    TileConfig config;
    Tile tiles[8];
  };
  static inline State& state() {
    static thread_local State s;
    return s;
  }

  static inline void configure(const TileConfig& config) {
    State& s = state();
    __builtin_memset(&s, 0, sizeof(s));
    s.config = config;
    for (int i = 0; i < 8; ++i) {
      if (config.palette != 1 || config.rows[i] > 16 || config.bytes_per_row[i] > 64) {
        __builtin_trap();  // a general protection fault
      }
    }
  }
  static inline void release() { __builtin_memset(&state(), 0, sizeof(State)); }

  template <int T>
  static inline void zero() {
    __builtin_memset(&state().tiles[T], 0, sizeof(Tile));
  }
  template <int T>
  static inline void load(const void* p, int64_t stride) {
    State& s = state();
    zero<T>();
    for (int r = 0; r < s.config.rows[T]; ++r) {
      __builtin_memcpy(s.tiles[T].bytes[r], static_cast<const char*>(p) + r * stride,
                       s.config.bytes_per_row[T]);
    }
  }
  template <int T>
  static inline void store(void* p, int64_t stride) {
    State& s = state();
    for (int r = 0; r < s.config.rows[T]; ++r) {
      __builtin_memcpy(static_cast<char*>(p) + r * stride, s.tiles[T].bytes[r],
                       s.config.bytes_per_row[T]);
    }
  }

  // Denormals count as zero, before and after.
  static inline float flushed(float x) {
    return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
  }
  static inline float bf16_at(const Tile& tile, int row, int i) {
    uint16_t h;
    __builtin_memcpy(&h, tile.bytes[row] + 2 * i, sizeof(h));
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float x;
    __builtin_memcpy(&x, &u, sizeof(x));
    return flushed(x);
  }
  template <int C, int A, int B>
  static inline void check_shapes() {
    const TileConfig& c = state().config;
    if (c.rows[C] != c.rows[A] || c.bytes_per_row[A] != 4 * c.rows[B] ||
        c.bytes_per_row[C] != c.bytes_per_row[B] || c.rows[C] == 0) {
      __builtin_trap();  // an undefined opcode
    }
  }

  // The even products of a row and the odd ones are summed apart, then added to each other and to
  // c.
  template <int C, int A, int B>
  static inline void multiply_bf16() {
    check_shapes<C, A, B>();
    State& s = state();
    for (int m = 0; m < s.config.rows[C]; ++m) {
      for (int n = 0; n < s.config.bytes_per_row[C] / 4; ++n) {
        float sums[2] = {0.0f, 0.0f};
        for (int k = 0; k < s.config.rows[B]; ++k) {
          for (int i = 0; i < 2; ++i) {
            sums[i] = flushed(__builtin_fmaf(bf16_at(s.tiles[A], m, 2 * k + i),
                                             bf16_at(s.tiles[B], k, 2 * n + i), sums[i]));
          }
        }
        float c;
        __builtin_memcpy(&c, s.tiles[C].bytes[m] + 4 * n, sizeof(c));
        c = flushed(flushed(c) + flushed(sums[0] + sums[1]));
        __builtin_memcpy(s.tiles[C].bytes[m] + 4 * n, &c, sizeof(c));
      }
    }
  }

  template <int C, int A, int B>
  static inline void multiply_int8() {
    check_shapes<C, A, B>();
    State& s = state();
    for (int m = 0; m < s.config.rows[C]; ++m) {
      for (int n = 0; n < s.config.bytes_per_row[C] / 4; ++n) {
        uint32_t c;  // wraps around, as there
        __builtin_memcpy(&c, s.tiles[C].bytes[m] + 4 * n, sizeof(c));
        for (int k = 0; k < s.config.bytes_per_row[A]; ++k) {
          const auto a = static_cast<int8_t>(s.tiles[A].bytes[m][k]);
          const uint8_t b = s.tiles[B].bytes[k / 4][4 * n + k % 4];
          c += static_cast<uint32_t>(static_cast<int32_t>(a) * static_cast<int32_t>(b));
        }
        __builtin_memcpy(s.tiles[C].bytes[m] + 4 * n, &c, sizeof(c));
      }
    }
  }
};
