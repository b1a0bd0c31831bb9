// AMX's tile registers, by number: thin names for the instructions. They are written in assembly
// because compilers disagree on how their intrinsics take a tile's number.
struct AmxTiles {
  static inline void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  // Gives the registers back: a thread that holds none is cheaper to switch away from.
  static inline void release() { asm volatile("tilerelease"); }

  template <int T>
  static inline void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  // Rows are `stride` bytes apart.
  template <int T>
  static inline void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(p), "r"(stride) : "memory");
  }
  template <int T>
  static inline void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(p), "r"(stride) : "memory");
  }
  // c += a b: of pairs of bf16 in fp32; of fours of signed and of unsigned bytes in int32.
  template <int C, int A, int B>
  static inline void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static inline void multiply_int8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
