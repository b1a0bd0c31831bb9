// Scalar conversions of 16-bit floats; narrowing rounds to nearest even.

static inline uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof(u));
  return u;
}
static inline float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof(x));
  return x;
}

static inline float f32_from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

static inline uint16_t bf16_from_f32(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

[[maybe_unused]] static inline float f32_from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = h & 0x7c00u;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
    const float magnitude = static_cast<float>(h & 0x3ffu) * 0x1p-24f;
    return bits_float(float_bits(magnitude) | sign);
  }
  const uint32_t rebias = exponent == 0x7c00u ? 224u : 112u;  // infinity and NaN keep all ones
  return bits_float(sign | ((static_cast<uint32_t>(h & 0x7fffu) << 13) + (rebias << 23)));
}

[[maybe_unused]] static inline uint16_t f16_from_f32(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: 0.5 has just the right last place
    h = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(sign | h);
}
