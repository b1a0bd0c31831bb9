// Vector functions that the elementwise kernels and attention share.

// e^x for x <= 88, 0 below the normal range, NaN for NaN. Cephes' reduction (x = n ln 2 + r) and
// polynomial, about 1 ulp.
static inline V vexp_bounded(V x) {
  const V lowest = vset(-87.3f);
  const V clamped = vmax(lowest, x);
  const V n = vround(vmul(clamped, vset(1.44269504088896341f)));
  V r = vfma(n, vset(-0.693359375f), clamped);
  r = vfma(n, vset(2.12194440e-4f), r);
  V p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vadd(vfma(p, vmul(r, r), r), vset(1.0f));
  return vless(x, lowest, vzero(), vscale2(p, n));
}

// e^x, infinite above 88.
static inline V vexp(V x) {
  const V highest = vset(88.0f);
  return vless(highest, x, vset(__builtin_inff()), vexp_bounded(x));
}

// tanh x: an odd polynomial near 0 (Cephes), else by e^2x.
static inline V vtanh(V x) {
  const V a = vabs(x);
  const V e = vexp(vadd(a, a));
  const V far = vcopysign(vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f)))), x);
  const V z = vmul(x, x);
  V p = vset(-5.70498872745e-3f);
  p = vfma(p, z, vset(2.06390887954e-2f));
  p = vfma(p, z, vset(-5.37397155531e-2f));
  p = vfma(p, z, vset(1.33314422036e-1f));
  p = vfma(p, z, vset(-3.33332819422e-1f));
  const V near = vfma(vmul(p, z), x, x);
  return vless(a, vset(0.625f), near, far);
}
