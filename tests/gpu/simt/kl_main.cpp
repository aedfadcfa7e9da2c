// Runs csrc/cuda/kl.cuh on the SIMT machine: every kernel, dtype and op against a float64 textbook,
// each error judged by the textbook's own in float32; and the same bits from one block a row, from
// several, from two sweeps at once and from clusters of 1 to 8. Prints what it ran; exits 1 on a
// wrong value.
#include <string>

#include "kl_own_types.h"
#include "kl_run.h"

namespace {

using namespace fasttax;

bool quick = false;

// the largest error of a batch, the float textbook's, and the size of what is compared
struct Judge {
  double error = 0, own = 0, size = 0;
  bool same = true;

  void add(double got, double truth, double textbook) {
    if (std::isnan(truth) || std::isinf(truth)) {
      same = same && (std::isnan(truth) ? std::isnan(got) : got == truth);
      return;
    }
    same = same && !std::isnan(got);
    error = std::max(error, std::fabs(got - truth));
    if (std::isfinite(textbook)) own = std::max(own, std::fabs(textbook - truth));
    size = std::max(size, std::fabs(truth));
  }
  bool good(const std::string& what, double ulps, double epsilon) const {
    const double allowed = 2 * own + ulps * epsilon * size + 4e-15;
    if (same && error <= allowed) return true;
    printf("%s: error %.3e, allowed %.3e (own %.3e, size %.3e)%s\n", what.c_str(), error, allowed,
           own, size, same ? "" : ", NaN or inf differ");
    return false;
  }
};

struct Case {
  std::string name;
  int64_t v;
  // row, entry -> x, y
  std::function<void(int64_t, int64_t, std::mt19937&, double&, double&)> logits;
  Options options;
  int64_t n = 2;
  int stride = 0, shift = 0;  // beyond v; entries
  double ulps = 4;
  bool masked = false;
  double relative = 0;  // bound on a divergence's own error over its size; 0: none
};

// The same bits, or NaN both: its sign and payload are nobody's business.
template <class T>
bool same_bits(const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (memcmp(a + i, b + i, sizeof(T)) &&
        !(std::isnan(kl_widen(a[i])) && std::isnan(kl_widen(b[i]))))
      return false;
  return true;
}

template <class T, KlOp op>
bool check(const Case& c) {
  using R = Run<T, op>;
  std::mt19937 random(unsigned(c.v) * 31 + unsigned(op));
  Matrix<T> x(c.n, c.v, c.v + c.stride, c.shift),
      y(c.n, c.v, c.v + c.stride, c.shift ? c.shift + 1 : 0);
  for (int64_t r = 0; r < c.n; ++r)
    for (int64_t i = 0; i < c.v; ++i) {
      double a = 0, b = 0;
      c.logits(r, i, random, a, b);
      x.set(r, i, a), y.set(r, i, b);
    }
  std::vector<int64_t> ids;
  std::vector<float> upstream;
  std::unique_ptr<bool[]> mask(new bool[size_t(c.n)]);
  for (int64_t r = 0; r < c.n; ++r)
    ids.push_back(r % 2 ? c.v - 1 : c.v / 2), mask[size_t(r)] = r != 1;
  for (int i = 0; i < R::kValues * c.n; ++i) upstream.push_back(0.4f + 0.3f * float(i % 5));
  R run(x, y, c.options, c.masked ? mask.get() : nullptr, R::kStatsOp ? ids.data() : nullptr,
        upstream.data(), c.shift ? 3 : 0);
  run.forward(1);
  run.template gradient<op != KlOp::kAlone>();
  Judge value[kTokenStats], for_x, for_y;
  bool precise = true;
  for (int64_t r = 0; r < c.n; ++r) {
    float g[kTokenStats] = {};
    for (int s = 0; s < R::kValues; ++s) g[s] = upstream[size_t(s * c.n + r)];
    if (c.masked && r == 1) {
      for (int s = 0; s < R::kValues; ++s)
        value[s].add(double(run.values[size_t(s * c.n + r)]), 0, 0);
      for (int64_t i = 0; i < c.v; ++i)
        for_x.add(run.dx.get(r, i), 0, 0),
            for_y.add(op == KlOp::kAlone ? 0 : run.dy.get(r, i), 0, 0);
      continue;
    }
    const Textbook<double> truth(op, x.row(r), y.row(r), c.options, g,
                                 R::kStatsOp ? ids[size_t(r)] : -1);
    const Textbook<float> own(op, x.row(r), y.row(r), c.options, g,
                              R::kStatsOp ? ids[size_t(r)] : -1);
    for (int s = R::kStatsOp ? int(kKlPolicyRef) : 0;
         c.relative > 0 && op != KlOp::kAlone && s < R::kValues; ++s) {
      const double error = std::fabs(double(run.values[size_t(s * c.n + r)]) / truth.values[s] - 1);
      if (error > c.relative)
        printf("%s, op %d: relative error %.3e of %.3e\n", c.name.c_str(), int(op), error,
               truth.values[s]);
      precise &= error <= c.relative;
    }
    for (int s = 0; s < R::kValues; ++s)
      value[s].add(double(run.values[size_t(s * c.n + r)]), truth.values[s], double(own.values[s]));
    for (int64_t i = 0; i < c.v; ++i) {
      const auto rounded = [](float v) { return double(kl_widen(kl_narrow<T>(v))); };
      for_x.add(run.dx.get(r, i), truth.dx[size_t(i)], rounded(own.dx[size_t(i)]));
      if (op != KlOp::kAlone)
        for_y.add(run.dy.get(r, i), truth.dy[size_t(i)], rounded(own.dy[size_t(i)]));
    }
  }
  const std::string what = c.name + ", op " + std::to_string(int(op)) + ", " +
                           std::to_string(sizeof(T)) + " bytes, V " + std::to_string(c.v);
  const double epsilon = sizeof(T) == 4                   ? 0x1p-24
                         : std::is_same<T, __half>::value ? 0x1p-11
                                                          : 0x1p-8;
  bool ok = precise & for_x.good(what + ", policy's gradient", c.ulps, std::max(epsilon, 0x1p-23)) &
            for_y.good(what + ", reference's gradient", c.ulps, std::max(epsilon, 0x1p-23));
  for (int s = 0; s < R::kValues; ++s)
    ok &= value[s].good(what + ", value " + std::to_string(s), c.ulps, 0x1p-23);

  // the same bits however the work is shared out
  const auto equal = [&](const R& other, const char* how, bool gradients) {
    bool same = same_bits(run.values.data(), other.values.data(), int64_t(run.values.size()));
    for (int64_t r = 0; gradients && r < c.n; ++r)
      same = same &&
             same_bits(run.dx.data + r * run.dx.stride, other.dx.data + r * other.dx.stride, c.v);
    if (!same) printf("%s: other bits %s\n", what.c_str(), how);
    ok = ok && same;
  };
  const int rounds = (kl_spans(c.v) + kKlWarps - 1) / kKlWarps;
  if (rounds > 1) {
    R split(x, y, c.options, run.a.mask, run.a.ids, upstream.data());
    split.forward(rounds);
    split.template gradient<false>();
    equal(split, "from a split row", true);
  }
  if constexpr (!R::kStatsOp && !std::is_same<T, __half>::value) {
    for (int cluster : {0, 1, 2, 8}) {
      if (cluster > 0 && kl_span(c.v) > kSpan) continue;  // as kl_residence has it
      if (cluster > 1 && (cluster - 1) * ((kl_spans(c.v) + cluster - 1) / cluster) >= kl_spans(c.v))
        continue;
      R other(x, y, c.options, run.a.mask, run.a.ids, upstream.data(), c.shift ? 1 : 0);
      other.both(cluster);
      equal(other, cluster ? "from a cluster" : "from two sweeps", true);
    }
  }
  if (op != KlOp::kAlone) {  // the reference's gradient alone; over the logits themselves
    R alone(x, y, c.options, run.a.mask, run.a.ids, upstream.data(), c.shift ? 3 : 0);
    alone.forward(1);
    alone.template gradient<true>(false);
    ok = ok && same_bits(alone.dy.data, run.dy.data, c.v);
  }
  if (!R::kStatsOp) {
    R place(x, y, c.options, run.a.mask, run.a.ids, upstream.data());
    place.forward(1);
    place.a.dx = place.a.x;
    place.template gradient<false>();
    for (int64_t r = 0; r < c.n; ++r)
      ok = ok && same_bits(x.data + r * x.stride, run.dx.data + r * run.dx.stride, c.v);
  }
  if (!ok) printf("failed: %s\n", what.c_str());
  return ok;
}

// ONE_OP: of a build with a fault, which is in every op: 10 s to compile under ASan, not 43.
template <class T, int kind = 0>
bool check_ops(const Case& c) {
#ifdef ONE_OP
  return check<T, kl_op(KlKind::kPolicyRef)>(c);
#endif
  if constexpr (kind < kKlKinds)
    return check<T, kl_op(KlKind(kind))>(c) & check_ops<T, kind + 1>(c);
  else return check<T, KlOp::kStats>(c) & check<T, KlOp::kAlone>(c);
}

std::function<void(int64_t, int64_t, std::mt19937&, double&, double&)> normal(double size,
                                                                              double apart,
                                                                              double offset = 0) {
  return [=](int64_t, int64_t, std::mt19937& random, double& x, double& y) {
    std::normal_distribution<double> draw;
    x = offset + size * draw(random);
    y = x + apart * draw(random);
  };
}

// Kinds of logits that people have (bench/logits.py): by how much the reference differs, and a
// token or two 14 and 20 above the rest.
struct Kind {
  const char* name;
  double size, apart;
  bool confident;
};
constexpr Kind kDataKinds[] = {{"equal", 3, 0, false},        {"moved .001", 3, 1e-3, false},
                               {"moved .01", 3, 0.01, false}, {"moved .1", 3, 0.1, false},
                               {"moved .3", 3, 0.3, false},   {"confident", 1, 0.1, true},
                               {"far", 3, 3, false}};

// Of each kind every row is read once, of jsd twice, no span is summed twice, and the divergences
// and the entropy are good to 2e-6.
template <class T, KlOp op>
bool check_kinds() {
  constexpr int64_t n = 4, v = 8 * kSpan;
  bool ok = true;
  for (const Kind& kind : kDataKinds)
    for (const double cap : {0.0, 30.0})
      for (const double offset : {0.0, 1000.0}) {
        if (offset > 0 && (sizeof(T) == 2 || cap > 0)) continue;  // no digits left there
        std::mt19937 random(7);
        std::normal_distribution<double> draw;
        Matrix<T> x(n, v, v, 0), y(n, v, v, 0);
        for (int64_t r = 0; r < n; ++r)
          for (int64_t i = 0; i < v; ++i) {
            const bool high = kind.confident && (i == 100 * r || i == 5000 + r);
            const double a = high ? (i < 5000 ? 20 : 14) : kind.size * draw(random);
            y.set(r, i, offset + a), x.set(r, i, offset + a + kind.apart * draw(random));
          }
        std::vector<int64_t> ids(size_t(n), 3);
        Options options;
        options.cap = options.ref_cap = cap;
        Run<T, op> run(x, y, options, nullptr, kl_is_kind(op) ? nullptr : ids.data(), nullptr);
        simt::Machine& m = simt::machine();
        m.streamed = m.opaque = 0;
        run.forward(1);
        const size_t read = size_t(2 * n * v) * sizeof(T) * (kl_op_two_sweeps(op) ? 2 : 1),
                     once = size_t(n * v) / KlVector<T>::kEntries * 8;
        if (m.streamed != read || m.opaque != once) {
          printf("%s, op %d: %zu bytes read of %zu, %zu vectors summed of %zu\n", kind.name,
                 int(op), m.streamed, read, m.opaque / 8, once / 8);
          ok = false;
        }
        const float g[kTokenStats] = {};
        for (int64_t r = 0; r < n; ++r) {
          const Textbook<double> truth(op, x.row(r), y.row(r), options, g, 3);
          for (int s : {0, int(kEntropy), int(kKlPolicyRef), int(kKlRefPolicy)}) {
            if (kl_is_kind(op) ? s > 0 : s == 0) continue;
            const double want = truth.values[s], got = double(run.values[size_t(s * n + r)]);
            const double error = kind.apart == 0 && s != kEntropy ? got : std::fabs(got / want - 1);
            // capped logits are rounded as logits of the cap's size are
            if (error <= (cap > 0 ? 5e-6 : 2e-6)) continue;
            printf("%s, op %d, cap %g, value %d: relative error %.3e of %.3e\n", kind.name, int(op),
                   cap, s, error, want);
            ok = false;
          }
        }
      }
  return ok;
}

// Entropy and lse have the same bits whatever the reference is, and where there is none.
template <class T>
bool check_entropy() {
  constexpr int64_t n = 2, v = 3000;
  std::mt19937 random(7);
  std::normal_distribution<double> draw;
  Matrix<T> x(n, v, v, 0), y(n, v, v, 0);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < v; ++i) x.set(r, i, 2 * draw(random) + (i == 1500 ? 20 : 0));
  Run<T, KlOp::kAlone> alone(x, x, {}, nullptr, nullptr, nullptr);
  alone.forward(1);
  bool ok = true;
  for (const double apart : {0.01, 5.0, 300.0, double(-INFINITY)}) {
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < v; ++i)
        y.set(r, i, x.get(r, i) + (apart == -INFINITY && i % 7 ? 0 : apart));
    Run<T, KlOp::kStats> pair(x, y, {}, nullptr, nullptr, nullptr);
    pair.forward(1);
    for (const int s : {int(kEntropy), int(kLse)})
      ok &= same_bits(alone.values.data() + s * n, pair.values.data() + s * n, n);
  }
  if (!ok) printf("entropy: other bits beside a reference\n");
  return ok;
}

}  // namespace

int main(int arguments, char** argument) {
  quick = arguments > 1;
  const bool races = quick && std::string(argument[1]) == "races";  // which TSan finds in any size
  bool ok = true;
  for (const int64_t v : races ? std::vector<int64_t>{130, 2051}
                               : std::vector<int64_t>{1, 2, 5, 130, 1003, 1024, 2051})
    ok &= check_ops<float>({"normal", v, normal(2, 0.5), {}});
  ok &= check_ops<__nv_bfloat16>({"normal", 2056, normal(2, 0.5), {}}) &
        check_ops<__half>({"normal", 2051, normal(2, 0.5), {}});
  ok &= check_ops<float>({"masked",
                          1100,
                          [](int64_t r, int64_t i, std::mt19937&, double& x, double& y) {
                            x = r == 1 ? NAN : std::sin(double(i)),
                            y = r == 1 ? INFINITY : std::cos(double(i));
                          },
                          {},
                          3,
                          0,
                          0,
                          4,
                          true});
  ok &= check_ops<__nv_bfloat16>({"off alignment", 2051, normal(2, 0.1), {}, 3, 1, 1});
  ok &= check_own_types<__nv_bfloat16, float, kl_op(KlKind::kPolicyRef)>(2051, 1, 0);
  if (quick) {
    printf("%s: %d launches\n", ok ? "ok" : "FAILED", launches);
    return ok ? 0 : 1;
  }
  ok &= check_ops<float>({"two rounds", 9001, normal(2, 0.5), {}}) &
        check_ops<__nv_bfloat16>({"two rounds", 17000, normal(2, 0.2), {}, 1});
  ok &= check_ops<float>({"off alignment", 3077, normal(2, 0.1), {}, 3, 1, 1}) &
        check_ops<__nv_bfloat16>({"off by six", 4099, normal(2, 0.1), {}, 2, 5, 6}) &
        check_ops<__half>({"off alignment", 2048, normal(2, 0.1), {}, 2, 3, 7});
  const Options none;
  ok &= check_ops<float>({"KL of 5e-7", 9001, normal(2, 1e-3), none, 2, 0, 0, 4, false, 1e-5});
  for (const double offset : {1000.0, -1000.0})
    ok &= check_ops<float>(
        {"far offset", 3000, normal(2, 0.1, offset), none, 2, 0, 0, 64, false, 1e-5});
  const auto apart_at_the_peak = [](int64_t r, int64_t i, std::mt19937& random, double& x,
                                    double& y) {
    std::normal_distribution<double> draw;
    x = i == 5 ? 9 : 2 * draw(random),
    y = x + (i == 5 ? 0.6 + 0.1 * double(r) : 1e-3 * draw(random));
  };
  ok &= check_ops<float>({"frames apart", 9001, apart_at_the_peak, none, 2, 0, 0, 4, false, 1e-5});
  // the reference's highest entry is no one's but its own: the frame is off by half, the KL 1e-4
  const auto one_apart = [](int64_t, int64_t i, std::mt19937& random, double& x, double& y) {
    std::normal_distribution<double> draw;
    x = 1e-2 * draw(random), y = x + (i == 700 ? 0.3 : 1e-3 * draw(random));
  };
  ok &= check_ops<float>({"one apart", 9001, one_apart, none, 2, 0, 0, 4, false, 1e-5});
  for (const double apart : {1e-3, 1e-2, 0.08, 3.0})
    ok &= check_ops<float>({"apart " + std::to_string(apart), 9001, normal(2, apart), {}});
  ok &= check_ops<float>({"equal", 3000, normal(3, 0), {}}) &
        check_ops<float>({"extreme", 9001, normal(300, 30), {}, 2, 0, 0, 64});
  ok &= check_ops<float>({"offset", 3000, normal(2, 0.1, 1000), {}, 2, 0, 0, 64}) &
        check_ops<float>({"apart in offset",
                          3000,
                          [](int64_t, int64_t, std::mt19937& random, double& x, double& y) {
                            std::normal_distribution<double> draw;
                            x = draw(random), y = x + 700 + 0.1 * draw(random);
                          },
                          {},
                          2,
                          0,
                          0,
                          64});
  for (const double height : {12.0, 39.0, 60.0})
    ok &= check_ops<float>({"peak",
                            9001,
                            [=](int64_t r, int64_t i, std::mt19937& random, double& x, double& y) {
                              std::normal_distribution<double> draw;
                              x = draw(random), y = x + 0.1 * draw(random);
                              if (i == 3000 + r) x += height, y += height + 0.05;
                            },
                            {},
                            2,
                            0,
                            0,
                            16});
  for (const bool inf_mask : {false, true})
    for (const int who : {1, 2, 3}) {
      Options o;
      o.inf_mask = inf_mask;
      ok &=
          check_ops<float>({"-inf", 2600,
                            [=](int64_t r, int64_t i, std::mt19937& random, double& x, double& y) {
                              std::normal_distribution<double> draw;
                              x = draw(random), y = x + 0.3 * draw(random);
                              if (i % 7 == r || i < 1200) {
                                if (who & 1) x = -INFINITY;
                                if (who & 2) y = -INFINITY;
                              }
                            },
                            o});
    }
  ok &= check_ops<float>(
      {"all -inf",
       1500,
       [](int64_t, int64_t, std::mt19937&, double& x, double& y) { x = y = -INFINITY; },
       {}});
  ok &= check_ops<float>({"NaN",
                          1500,
                          [](int64_t r, int64_t i, std::mt19937&, double& x, double& y) {
                            x = r == 0 && i == 700 ? NAN : 0.1 * double(i % 9),
                            y = 0.2 * double(i % 5);
                          },
                          {}});
  Options temperatures, caps, sharp;
  temperatures.temperature = 0.7, temperatures.ref_temperature = 1.4, temperatures.scale = 1.2;
  caps.cap = 5, caps.ref_cap = 3;
  sharp.temperature = sharp.ref_temperature = 0.5;
  for (const Options& o : {temperatures, caps, sharp})
    ok &= check_ops<float>({"options", 2100, normal(2, 0.5), o, 2, 0, 0, 16});
#ifndef ONE_OP
  for (const double beta : {0.0, 0.1, 1.0}) {
    Options o;
    o.beta = beta;
    for (const double apart : {1e-3, 0.5, 3.0})
      ok &= check<float, kl_op(KlKind::kJsd)>({"beta", 1500, normal(2, apart), o});
  }
  for (const double beta : {0.01, 0.2, 3.0})  // of Renyi, entries whose p is 0 and w is not
    for (const double gap : {86.0, 110.0, 200.0}) {
      Options o;
      o.beta = beta;
      ok &= check<float, kl_op(KlKind::kRenyi)>(
          {"far below", 1500,
           [=](int64_t, int64_t i, std::mt19937&, double& x, double& y) {
             x = 0.1 * double(i % 9) - (i % 7 ? 0 : gap), y = 0.1 * double(i % 5);
           },
           o});
    }
#endif
  for (const double cap : {5.0, 30.0})  // one softcap: near, beyond the series, all but flat
    for (const double size : {2.0, 300.0})
      for (const double apart : {1e-3, 0.3, 8.0}) {
        Options o;
        o.cap = o.ref_cap = cap, o.temperature = o.ref_temperature = 0.8;
        ok &= check_ops<float>({"one softcap", 2100, normal(size, apart), o, 2, 0, 0, 16});
      }
  for (const double hole : {double(-INFINITY), double(NAN)}) {
    Options o;
    o.cap = o.ref_cap = 20;
    ok &= check_ops<float>({"softcap and holes", 2100,
                            [=](int64_t r, int64_t i, std::mt19937& random, double& x, double& y) {
                              normal(2, 0.3)(r, i, random, x, y);
                              if (i % 700 == 3) x = hole;
                              if (i % 700 == 5) y = hole == hole ? hole : y;
                              if (i % 700 == 7) x = y = hole;
                            },
                            o});
  }
  ok &= check<__nv_bfloat16, kl_op(KlKind::kPolicyRef)>(
      {"long spans", (1 << 19) + 77, normal(2, 0.1), {}, 1});
  ok &= check_kinds<float, kl_op(KlKind::kPolicyRef)>() &
        check_kinds<__nv_bfloat16, kl_op(KlKind::kPolicyRef)>();
#ifndef ONE_OP
  ok &= check_kinds<float, kl_op(KlKind::kRefPolicy)>() & check_kinds<float, KlOp::kStats>() &
        check_kinds<float, kl_op(KlKind::kJsd)>() & check_kinds<__nv_bfloat16, KlOp::kStats>() &
        check_entropy<float>() & check_entropy<__nv_bfloat16>();
  ok &= check_own_types<__nv_bfloat16, float>() & check_own_types<float, __half>() &
        check_own_types<__half, __nv_bfloat16>() & check_float_off_alignment();
#endif
  printf("%s: %d launches\n", ok ? "ok" : "FAILED", launches);
  return ok ? 0 : 1;
}
