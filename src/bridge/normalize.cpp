// Gathers rows of bytes and turns each byte into the float that its channel's table has for it. A table is exact for
// any formula, and fast: two loads and one store for each value.

#include <cstddef>
#include <cstdint>

extern "C" {

// `rows` lists the `count` rows of `data` to gather, or is null for the first `count` rows; a row has channels * inner
// bytes. `tables` has 256 floats for each channel.
void tig_normalize_rows(const uint8_t* data, const int64_t* rows, size_t count, size_t channels, size_t inner,
                        const float* tables, float* out) {
  const size_t width = channels * inner;
  auto row = [&](size_t i) { return data + (rows ? static_cast<size_t>(rows[i]) : i) * width; };
  for (size_t i = 0; i < count; ++i) {
    // The rows lie anywhere in memory, so the processor cannot guess the next one.
    if (rows && i + 1 < count)
      for (size_t byte = 0; byte < width; byte += 64) __builtin_prefetch(row(i + 1) + byte);
    const uint8_t* from = row(i);
    for (size_t channel = 0; channel < channels; ++channel) {
      const float* table = tables + 256 * channel;
      for (size_t k = 0; k < inner; ++k) out[k] = table[from[k]];
      from += inner;
      out += inner;
    }
  }
}

}  // extern "C"
