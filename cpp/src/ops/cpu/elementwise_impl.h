// Elementwise kernels over one row.

static inline V load_first(const float* p, int64_t n) {
  return n >= kLanes ? vload(p) : vload_partial(p, static_cast<int>(n));
}
static inline void store_first(float* p, V v, int64_t n) {
  if (n >= kLanes) {
    vstore(p, v);
  } else {
    vstore_partial(p, v, static_cast<int>(n));
  }
}

static inline void convert_to_f32(ElementType source, const void* x, int64_t n, float* y) {
  if (source == kF32) {
    __builtin_memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  if (source == kBf16) {
    for (; i + kLanes <= n; i += kLanes) vstore(y + i, vload_bf16(h + i));
    for (; i < n; ++i) y[i] = f32_from_bf16(h[i]);
  } else {
    for (; i + kLanes <= n; i += kLanes) vstore(y + i, vload_f16(h + i));
    for (; i < n; ++i) y[i] = f32_from_f16(h[i]);
  }
}

static inline void convert_from_f32(ElementType target, const float* x, int64_t n, void* y) {
  if (target == kF32) {
    __builtin_memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
  } else if (target == kBf16) {
    uint16_t* h = static_cast<uint16_t*>(y);
    for (int64_t i = 0; i < n; ++i) h[i] = bf16_from_f32(x[i]);
  } else {
    narrow_f16(x, n, static_cast<uint16_t*>(y));
  }
}

void widen(ElementType source, const void* x, int64_t n, float* y) {
  convert_to_f32(source, x, n, y);
}
void narrow(ElementType target, const float* x, int64_t n, void* y) {
  convert_from_f32(target, x, n, y);
}

// x - mean in the first n lanes, zero in the others; n < kLanes.
static inline V deviations_of_tail(const float* x, V mean, int64_t n) {
  float d[kLanes] = {};
  vstore_partial(d, vsub(vload_partial(x, static_cast<int>(n)), mean), static_cast<int>(n));
  return vload(d);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  V sum = vzero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = load_first(x + i, n - i);
    sum = vfma(v, v, sum);
  }
  const float mean = vreduce_add(sum) / static_cast<float>(n);
  const V factor = vset(1.0f / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = vmul(load_first(x + i, n - i), factor);
    store_first(y + i, vmul(v, load_first(weight + i, n - i)), n - i);
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                float* y) {
  const float count = static_cast<float>(n);
  V sum = vzero();
  for (int64_t i = 0; i < n; i += kLanes) sum = vadd(sum, load_first(x + i, n - i));
  const V mean = vset(vreduce_add(sum) / count);
  V squares = vzero();
  for (int64_t i = 0; i < n; i += kLanes) {
    // Lanes past the end hold zeros, which must not become deviations.
    const V d = n - i >= kLanes ? vsub(vload(x + i), mean) : deviations_of_tail(x + i, mean, n - i);
    squares = vfma(d, d, squares);
  }
  const V factor = vset(1.0f / __builtin_sqrtf(vreduce_add(squares) / count + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    V v = vmul(vsub(load_first(x + i, n - i), mean), factor);
    v = vmul(v, load_first(weight + i, n - i));
    if (bias != nullptr) v = vadd(v, load_first(bias + i, n - i));
    store_first(y + i, v, n - i);
  }
}

void rotary_neox(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const V c = load_first(cos + i, left);
    const V s = load_first(sin + i, left);
    const V x0 = load_first(x + i, left);
    const V x1 = load_first(x + half + i, left);
    store_first(y + i, vsub(vmul(x0, c), vmul(x1, s)), left);
    store_first(y + half + i, vadd(vmul(x1, c), vmul(x0, s)), left);
  }
}

void rotary_interleaved(const float* x, const float* cos, const float* sin, int64_t half,
                        float* y) {
  for (int64_t i = 0; i < half; ++i) {
    const float x0 = x[2 * i];
    const float x1 = x[2 * i + 1];
    y[2 * i] = x0 * cos[i] - x1 * sin[i];
    y[2 * i + 1] = x1 * cos[i] + x0 * sin[i];
  }
}

struct Silu {
  static inline V of(V x) { return vdiv(x, vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }
};

struct GeluTanh {
  static inline V of(V x) {
    const V cubic = vfma(vmul(vmul(x, x), vset(0.044715f)), x, x);
    // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
    return vdiv(x, vadd(vset(1.0f), vexp(vmul(cubic, vset(-1.5957691216057308f)))));
  }
};

// x times the normal distribution's cumulative function, which is erfc(-x / sqrt 2) / 2. With
// a = |x| / sqrt 2, erf(a) / (2 a) is a polynomial in a^2 below 1, and e^(a^2) erfc(a) / 2 above 1
// one in 1 / (1 + 0.4 a) (least squares over Chebyshev nodes, reweighted; relative error 2e-9).
struct Gelu {
  static inline V of(V x) {
    const V one = vset(1.0f);
    const V a = vmul(vabs(x), vset(0.70710678118654752f));
    const V z = vmul(a, a);
    V near = vset(3.92692796e-5f);
    near = vfma(near, z, vset(-4.00509599e-4f));
    near = vfma(near, z, vset(2.59416375e-3f));
    near = vfma(near, z, vset(-1.34269059e-2f));
    near = vfma(near, z, vset(5.64179257e-2f));
    near = vfma(near, z, vset(-1.88063129e-1f));
    near = vfma(near, z, vset(5.64189583e-1f));
    const V t = vdiv(one, vfma(a, vset(0.4f), one));
    V far = vset(3.24043535e-2f);
    far = vfma(far, t, vset(-1.19188664e-1f));
    far = vfma(far, t, vset(1.28842275e-1f));
    far = vfma(far, t, vset(-4.12938804e-2f));
    far = vfma(far, t, vset(9.05102914e-2f));
    far = vfma(far, t, vset(7.81271838e-2f));
    far = vfma(far, t, vset(1.05043486e-1f));
    far = vfma(far, t, vset(1.12724122e-1f));
    far = vfma(far, t, vset(1.12842495e-1f));
    const V beyond = vmul(vexp(vsub(vzero(), z)), vmul(far, t));
    const V tail = vless(a, one, vsub(vset(0.5f), vmul(a, near)), beyond);
    return vmul(x, vless(x, vzero(), tail, vsub(one, tail)));
  }
};

struct Relu {
  static inline V of(V x) { return vless(x, vzero(), vzero(), x); }
};

template <typename F>
void activate(const float* x, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = F::of(load_first(x + i, n - i));
    store_first(y + i, up == nullptr ? v : vmul(v, load_first(up + i, n - i)), n - i);
  }
}

void add(const float* a, const float* b, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_first(y + i, vadd(load_first(a + i, n - i), load_first(b + i, n - i)), n - i);
  }
}

void scale(const float* x, float factor, int64_t n, float* y) {
  const V f = vset(factor);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_first(y + i, vmul(load_first(x + i, n - i), f), n - i);
  }
}

void clamp(const float* x, float limit, int64_t n, float* y) {
  const V high = vset(limit);
  const V low = vset(-limit);
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = load_first(x + i, n - i);
    store_first(y + i, vless(high, v, high, vless(v, low, low, v)), n - i);
  }
}

void soft_cap(const float* x, float cap, int64_t n, float* y) {
  const V c = vset(cap);
  const V inverse = vset(1.0f / cap);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_first(y + i, vmul(c, vtanh(vmul(load_first(x + i, n - i), inverse))), n - i);
  }
}
