#include "core/sampling/threshold.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace fastpage::sampling {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The greatest value at which `reached`, of all that are as great or greater, is true; `low` if it
// is at none. `above` is what is greater than all of these few values.
template <typename Reached>
float walk_down(float* values, int64_t n, float low, Split above, Reached reached) {
  std::sort(values, values + n, std::greater<float>());
  for (int64_t i = 0; i < n; ++i) {
    above.mass += values[i];
    ++above.count;
    if (reached(above)) return values[i];
  }
  return low;
}

// The same for many values: narrows [low, high), where the answer lies, and looks no more at the
// values outside of it, until few are left or all that are left are equal.
template <typename Reached, typename Midpoint>
float bisect(const float* values, int64_t n, float low, float high, float* search, Reached reached,
             Midpoint midpoint) {
  constexpr int64_t kFew = 32;
  constexpr int64_t kShrink = 8;
  const Kernels& kernel = kernels();
  Split above{};    // all values >= high
  Split dropped{};  // those of them that are no longer among `values`
  int64_t from_low = n;
  while (std::nextafter(low, high) < high) {
    if (from_low - above.count <= std::max(n / kShrink, kFew)) {
      n = kernel.gather(values, n, low, std::nextafter(high, low), search, nullptr);
      values = search;
      dropped = above;
      if (n <= kFew) return walk_down(search, n, low, above, reached);
    }
    float pivot = midpoint(low, high);
    if (!(pivot > low)) pivot = std::nextafter(low, high);
    if (pivot >= high) pivot = std::nextafter(high, low);
    Split split = kernel.split(values, n, pivot);
    split.mass += dropped.mass;
    split.count += dropped.count;
    if (reached(split)) {
      low = pivot;
      from_low = split.count;
    } else {
      high = pivot;
      above = split;
    }
  }
  return low;
}

}  // namespace

float kth_greatest(const float* values, int64_t n, int64_t k, float greatest, float* search) {
  // Logits lie close together, apart from masked ones that may be as low as -3e38: gallop down from
  // the greatest before halving.
  float step = 8.0f;
  const auto midpoint = [&step](float low, float high) {
    const float gallop = high - step;
    step *= 8.0f;
    return std::max(low / 2 + high / 2, gallop);
  };
  const auto reached = [k](const Split& split) { return split.count >= k; };
  const float high = std::nextafter(greatest, kInfinity);
  return bisect(values, n, -kInfinity, high, search, reached, midpoint);
}

float mass_threshold(const float* weights, int64_t n, double mass, double total, float* search) {
  // All n weights below this bound together weigh less than what may be left out. Half of it, for
  // the rounding of the sums.
  const auto low = static_cast<float>((total - mass) / static_cast<double>(n) / 2);
  const auto reached = [mass](const Split& split) { return split.mass >= mass; };
  const auto midpoint = [](float a, float b) { return std::sqrt(a * b); };
  return bisect(weights, n, low, std::nextafter(1.0f, 2.0f), search, reached, midpoint);
}

}  // namespace fastpage::sampling
