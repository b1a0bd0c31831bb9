#include "core/sampling/threshold.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastpage::sampling {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Bisects for the greatest value v for which reached(the values >= v) holds, where reached can only
// turn from false to true as v falls. Every step moves a bound onto a value that exists: the answer
// is exact, and ties cost no steps. The answer is >= low and <= high, high itself a value. Once few
// values are left between the bounds, they alone are looked at.
template <typename Reached, typename Midpoint>
float bisect(const float* values, int64_t n, float low, float high, float* search, Reached reached,
             Midpoint midpoint) {
  constexpr int64_t kShrink = 8;
  const Kernels& kernel = kernels();
  Split above{};    // all values > high
  Split dropped{};  // those of them that are no longer among `values`
  int64_t from_low = n;
  while (low < high) {
    if (from_low - above.count < n / kShrink) {
      n = kernel.gather(values, n, low, high, search, nullptr);
      values = search;
      dropped = above;
    }
    const float pivot = std::min(std::max(midpoint(low, high), std::nextafter(low, high)), high);
    Split split = kernel.split(values, n, pivot);
    split.mass += dropped.mass;
    split.count += dropped.count;
    if (reached(split)) {
      low = split.least;
      from_low = split.count;
    } else {
      high = split.next_less;
      above = split;
    }
  }
  return high;
}

}  // namespace

float kth_greatest(const float* values, int64_t n, int64_t k, float* search) {
  // Logits lie close together, apart from masked ones that may be as low as -3e38: gallop down from
  // the greatest before halving.
  float step = 8.0f;
  const auto midpoint = [&step](float low, float high) {
    const float gallop = high - step;
    step *= 8.0f;
    return std::max(low / 2 + high / 2, gallop);
  };
  const auto reached = [k](const Split& split) { return split.count >= k; };
  const Split all = kernels().split(values, n, kInfinity);
  const float greatest = all.count > 0 ? kInfinity : all.next_less;
  return bisect(values, n, -kInfinity, greatest, search, reached, midpoint);
}

float mass_threshold(const float* weights, int64_t n, double mass, double total, float* search) {
  // All n weights below this bound together weigh less than what may be left out. Half of it, for
  // the rounding of the sums.
  const auto low = static_cast<float>((total - mass) / static_cast<double>(n) / 2);
  const auto reached = [mass](const Split& split) { return split.mass >= mass; };
  const auto midpoint = [](float a, float b) { return std::sqrt(a * b); };
  return bisect(weights, n, low, 1.0f, search, reached, midpoint);
}

}  // namespace fastpage::sampling
