// Tensor cores: matrices between shared memory and registers (ldmatrix, stmatrix), mma.sync and
// wgmma. Products are summed in double and rounded once. An instruction's shape is in `immediate`:
// what Shape reads from it.
#include "lanes.h"
#include "place.h"

namespace ptx {
namespace {

using U = uint32_t;

enum class Entry { kBfloat, kHalf, kTf32 };

struct Shape {
  int n, k;
  Entry entry;
  bool a_in_registers, a_across, b_across;  // across: not k, but m or n is contiguous
  explicit Shape(int64_t bits)
      : n(int(bits & 0xfff)),
        k(int(bits >> 12 & 0xff)),
        entry(Entry(bits >> 20 & 15)),
        a_in_registers(bits >> 24 & 1),
        a_across(bits >> 25 & 1),
        b_across(bits >> 26 & 1) {}
};

float value_of(Entry entry, U bits) {
  if (entry == Entry::kBfloat) return std::bit_cast<float>(bits << 16);
  if (entry == Entry::kHalf) return float(std::bit_cast<_Float16>(uint16_t(bits)));
  return std::bit_cast<float>(bits & ~U(0x1fff));
}
int bytes_of(Entry entry) { return entry == Entry::kTf32 ? 4 : 2; }

void must_be_whole(Warp& w, const Instruction& i, Mask mask) {
  if (mask == kWhole) return;
  w.launch->fault("lanes apart", w, i, 0, text("%08x of a whole warp's", mask));
  throw Stop("a matrix without its lanes");
}

// --- 8x8 matrices of 16 bits: lane l's address is row l % 8 of matrix l / 8

template <int n, bool turned>
void load_matrix(Warp& w, const Instruction& i, Mask mask) {
  must_be_whole(w, i, mask);
  must_know(w, i, n == 4 ? kWhole : (Mask(1) << 8 * n) - 1, i.slots[n], "an address");
  uint16_t rows[4][8][8] = {};
  bool known = true;
  for (int l = 0; l < 8 * n; ++l) {
    Place at;
    const uint64_t address = w.row<uint64_t>(i.slots[n])[l] + uint64_t(i.immediate);
    if (!resolve(w, i, l, address, 16, false, Space::kShared, at)) continue;
    known &= must_be_written(w, i, l, at, 16);
    touch(w, i, l, at, 16, false);
    memcpy(rows[l / 8][l % 8], at.data, 16);
  }
  for (int k = 0; k < n; ++k) {
    for (int l = 0; l < kLanes; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      const U low = turned ? rows[k][c][r] : rows[k][r][c],
              high = turned ? rows[k][c + 1][r] : rows[k][r][c + 1];
      w.row<U>(i.slots[k])[l] = high << 16 | low;
    }
    w.know(i.slots[k], kWhole, known ? kWhole : 0);
  }
}

template <int n, bool turned>
void store_matrix(Warp& w, const Instruction& i, Mask mask) {
  must_be_whole(w, i, mask);
  must_know(w, i, n == 4 ? kWhole : (Mask(1) << 8 * n) - 1, i.slots[0], "an address");
  uint16_t rows[4][8][8] = {};
  Mask known = kWhole;
  for (int k = 0; k < n; ++k) {
    known &= w.known[i.slots[1 + k]];
    for (int l = 0; l < kLanes; ++l) {
      const U both = w.row<U>(i.slots[1 + k])[l];
      const int r = l / 4, c = l % 4 * 2;
      (turned ? rows[k][c][r] : rows[k][r][c]) = uint16_t(both);
      (turned ? rows[k][c + 1][r] : rows[k][r][c + 1]) = uint16_t(both >> 16);
    }
  }
  for (int l = 0; l < 8 * n; ++l) {
    Place at;
    const uint64_t address = w.row<uint64_t>(i.slots[0])[l] + uint64_t(i.immediate);
    if (!resolve(w, i, l, address, 16, true, Space::kShared, at)) continue;
    touch(w, i, l, at, 16, true, memcmp(at.data, rows[l / 8][l % 8], 16) == 0);
    memcpy(at.data, rows[l / 8][l % 8], 16);
    mark(at, 16, known == kWhole);
  }
}

// --- fragments of 16 rows in registers: a lane has rows l / 4 and l / 4 + 8

// a[row][k] of a warp's 16 rows, from its four registers
void rows_of(Warp& w, const int32_t* slots, Entry entry, int ks, float (&a)[16][16]) {
  for (int l = 0; l < kLanes; ++l)
    for (int part = 0; part < 4; ++part) {
      const U bits = w.row<U>(slots[part])[l];
      const int row = l / 4 + part % 2 * 8;
      if (entry == Entry::kTf32) {
        a[row][l % 4 + part / 2 * (ks / 2)] = value_of(entry, bits);
        continue;
      }
      const int k = l % 4 * 2 + part / 2 * 8;
      a[row][k] = value_of(entry, bits & 0xffff), a[row][k + 1] = value_of(entry, bits >> 16);
    }
}

void mma(Warp& w, const Instruction& i, Mask mask) {  // m16n8: d (4), a (4), b (2 or 1), c (4)
  must_be_whole(w, i, mask);
  const Shape shape(i.immediate);
  const int bs = shape.entry == Entry::kTf32 ? shape.k / 4 : shape.k / 8;
  float a[16][16] = {}, b[16][8] = {};
  rows_of(w, i.slots + 4, shape.entry, shape.k, a);
  Mask known = kWhole;
  for (int s = 4; s < 8 + bs + 4; ++s) known &= w.known[i.slots[s]];
  for (int l = 0; l < kLanes; ++l)
    for (int part = 0; part < bs; ++part) {
      const U bits = w.row<U>(i.slots[8 + part])[l];
      if (shape.entry == Entry::kTf32) {
        b[l % 4 + 4 * part][l / 4] = value_of(shape.entry, bits);
        continue;
      }
      const int k = l % 4 * 2 + 8 * part;
      b[k][l / 4] = value_of(shape.entry, bits & 0xffff);
      b[k + 1][l / 4] = value_of(shape.entry, bits >> 16);
    }
  float d[4][kLanes];
  for (int l = 0; l < kLanes; ++l)
    for (int part = 0; part < 4; ++part) {
      const int row = l / 4 + part / 2 * 8, column = l % 4 * 2 + part % 2;
      double sum = std::bit_cast<float>(w.row<U>(i.slots[8 + bs + part])[l]);
      for (int k = 0; k < shape.k; ++k) sum += double(a[row][k]) * b[k][column];
      d[part][l] = float(sum);
    }
  for (int part = 0; part < 4; ++part) {
    memcpy(w.row<U>(i.slots[part]), d[part], sizeof d[part]);
    w.know(i.slots[part], kWhole, known == kWhole ? kWhole : 0);
  }
}

// --- wgmma: four warps, each with 16 of 64 rows; what they read is known by a descriptor

struct Descriptor {
  uint64_t start, leading, stride;
  int swizzle;  // bytes of a row that are stirred: 0, 32, 64 or 128

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    const int kind = int(bits >> 62);
    swizzle = kind == 0 ? 0 : 256 >> kind;
  }
  // of entry (m or n, k) of `bytes`
  uint64_t address(int row, int k, int bytes, bool across) const {
    uint64_t at = start;
    if (swizzle == 0) {  // core matrices of 8 rows of 16 bytes
      const int wide = 16 / bytes;
      const int along = across ? row : k, down = across ? k : row;
      at += uint64_t(down / 8) * stride + uint64_t(along / wide) * leading +
            uint64_t(down % 8 * 16 + along % wide * bytes);
      return at;
    }
    const int wide = swizzle / bytes;
    if (across) {
      at += uint64_t(row / wide) * leading + uint64_t(k / 8) * stride +
            uint64_t(k % 8 * swizzle + row % wide * bytes);
    } else {
      at += uint64_t(row / 8) * stride + uint64_t(row % 8 * swizzle + k * bytes);
    }
    return at ^ ((at >> 7 & uint64_t(swizzle / 16 - 1)) << 4);
  }
};

float shared_entry(Warp& w, const Instruction& i, const Shape& shape, uint64_t address,
                   bool& known) {
  const U bytes = U(bytes_of(shape.entry));
  address += w.cta->rank * kSharedStride;
  Place at;
  U bits = 0;
  if (resolve(w, i, 0, address, bytes, false, Space::kShared, at)) {
    known &= must_be_written(w, i, 0, at, bytes);
    touch(w, i, 0, at, bytes, false);
    memcpy(&bits, at.data, bytes);
  }
  return value_of(shape.entry, bits);
}

void wgmma(Warp& w, const Instruction& i, Mask mask) {  // d (n / 2), a (1 or 4), b, scale
  must_be_whole(w, i, mask);
  const Shape shape(i.immediate);
  const int ds = shape.n / 2, as = shape.a_in_registers ? 4 : 1, bytes = bytes_of(shape.entry);
  const int32_t *a_slots = i.slots + ds, b_slot = i.slots[ds + as], scale = i.slots[ds + as + 1];
  must_know(w, i, mask, b_slot, "a descriptor");
  must_know(w, i, mask, scale, "a scale");
  bool known = true;
  float a[16][16] = {};
  if (shape.a_in_registers) {
    for (int s = 0; s < 4; ++s) known &= w.known[a_slots[s]] == kWhole;
    rows_of(w, a_slots, shape.entry, shape.k, a);
  } else {
    must_know(w, i, mask, a_slots[0], "a descriptor");
    const Descriptor of(w.row<uint64_t>(a_slots[0])[0]);
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < shape.k; ++k)
        a[row][k] = shared_entry(
            w, i, shape, of.address(w.number % 4 * 16 + row, k, bytes, shape.a_across), known);
  }
  const Descriptor of(w.row<uint64_t>(b_slot)[0]);
  std::vector<float> b(size_t(shape.n * shape.k));
  for (int n = 0; n < shape.n; ++n)
    for (int k = 0; k < shape.k; ++k)
      b[size_t(n * shape.k + k)] =
          shared_entry(w, i, shape, of.address(n, k, bytes, shape.b_across), known);
  const bool adds = w.predicate(scale) & 1;
  for (int s = 0; s < ds; ++s) {
    U* d = w.row<U>(i.slots[s]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + s % 4 / 2 * 8, n = s / 4 * 8 + l % 4 * 2 + s % 2;
      double sum = adds ? double(std::bit_cast<float>(d[l])) : 0.0;
      for (int k = 0; k < shape.k; ++k)
        sum += double(a[row][k]) * double(b[size_t(n * shape.k + k)]);
      d[l] = std::bit_cast<U>(float(sum));
    }
    w.know(i.slots[s], kWhole, (adds ? w.known[i.slots[s]] : kWhole) & (known ? kWhole : 0));
  }
}

#define MATRICES(name, f)                                                          \
  {name ".x1", f<1, false>}, {name ".x2", f<2, false>}, {name ".x4", f<4, false>}, \
      {name ".trans.x1", f<1, true>}, {name ".trans.x2", f<2, true>}, {            \
    name ".trans.x4", f<4, true>                                                   \
  }

const Register matrices({
    MATRICES("ldmatrix", load_matrix),
    MATRICES("stmatrix", store_matrix),
    {"mma", mma},
    {"wgmma", wgmma},
});

}  // namespace
}  // namespace ptx
