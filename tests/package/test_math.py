"""csrc/math and csrc/cpu/simd.h, compiled as they are, against numpy float64 on wide grids.

The bounds are those that their comments state.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.tools.kernels import SIMD, simd_levels

pybind11 = pytest.importorskip("pybind11")
CSRC = Path(__file__).parents[2] / "csrc"
TINY = float(np.finfo(np.float32).tiny)  # 2^-126
INF, NAN = np.inf, np.nan

KERNELS = """
#if defined(FASTTAX_ISA)
namespace fasttax { namespace FASTTAX_ISA_NS {
inline void apply(int fn, const float* a, float* out, long n) {
  for (long i = 0; i < n; i += kLanes) {
    const VF z = load(a + i, std::min<long>(kLanes, n - i), 0.0f);
    const VF r = fn == 0   ? exp(z)
                 : fn == 1 ? log(z)
                 : fn == 2 ? log1p(z)
                 : fn == 3 ? tanh(z)
                           : exp_flushed(z);
    store(out + i, r, std::min<long>(kLanes, n - i));
  }
}
} }
#endif
"""
MODULE = """
#include <pybind11/numpy.h>
#define FASTTAX_KERNELS "kernels.h"
#include "cpu/isa.h"
#include "math/ewc.h"
#include "math/kl.h"
#include "math/kl_jsd.h"
namespace py = pybind11;
template <int level> void at(int fn, const float* a, float* out, long n) {
#if defined(__x86_64__)
  if (level == 2) return fasttax::avx512::apply(fn, a, out, n);
  if (level == 1) return fasttax::avx2::apply(fn, a, out, n);
#endif
  fasttax::portable::apply(fn, a, out, n);
}
py::array_t<float> simd(int level, int fn, py::array_t<float> a) {
  py::array_t<float> out(a.size());
  (level == 2 ? at<2> : level == 1 ? at<1> : at<0>)(fn, a.data(), out.mutable_data(), a.size());
  return out;
}
PYBIND11_MODULE(fasttax_math, m) {
  m.def("simd", &simd);
  m.def("bregman", py::vectorize([](double d) { return fasttax::kl_bregman(d); }));
  m.def("bregman_small", py::vectorize([](double d) { return fasttax::kl_bregman_small(d); }));
  m.def("bregman_pair", py::vectorize([](double d, bool back) {
    double f, g;
    fasttax::kl_bregman_small(d, f, g);
    return back ? g : f;
  }));
  m.def("defect", py::vectorize([](double t) { return fasttax::kl_defect(t); }));
  m.def("jsd_g", py::vectorize([](double t) { return fasttax::jsd_g(t); }));
  m.def("jsd_g_small", py::vectorize([](double t) { return fasttax::jsd_g_small(t); }));
  m.def("jsd_pieces", [](double beta, py::array_t<double> u) {
    const fasttax::JsdPieces pieces(beta);
    const auto at = [](auto& terms, double u) {
      const long n = std::lrint(u);
      double sum = 0;
      for (int k = fasttax::JsdPieces::kTerms - 1; k >= 0; --k)
        sum = sum * (u - n) + terms[k][n & 31];
      return sum;
    };
    py::array_t<double> log_m(u.size()), value(u.size());
    for (long i = 0; i < u.size(); ++i) {
      log_m.mutable_at(i) = at(pieces.log_m, u.at(i));
      value.mutable_at(i) = at(pieces.value, u.at(i));
    }
    return py::make_tuple(log_m, value);
  });
  m.def("bregman_unit", py::vectorize([](double d) { return fasttax::kl_bregman_unit(d); }));
  m.def("bregman_mid", py::vectorize([](double d) { return fasttax::kl_bregman_mid(d); }));
  m.def("pull", py::vectorize([](double t, double a, double f) {
    return fasttax::ewc_pull(t, a, f);
  }));
  m.def("term", py::vectorize([](double t, double a, double f) {
    return fasttax::ewc_term(t, a, f);
  }));
  m.def("prox", py::vectorize([](double t, double a, double f, double s) {
    return fasttax::ewc_prox(t, a, 1.0, s * f, 1.0);
  }));
}
"""


@pytest.fixture(scope="module")
def math(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("math")
    (folder / "kernels.h").write_text(KERNELS)
    (folder / "module.cpp").write_text(MODULE)
    library = folder / ("fasttax_math" + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [
        f"-I{path}"
        for path in (CSRC, folder, pybind11.get_include(), sysconfig.get_paths()["include"])
    ]
    subprocess.run(
        [
            "g++",
            "-O2",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fno-math-errno",
            "-Wno-psabi",
            *includes,
            str(folder / "module.cpp"),
            "-o",
            str(library),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("fasttax_math", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


both_signs = np.concatenate([-np.logspace(2, -40, 4001), np.logspace(-40, 2, 4001)])
# what, the truth in float64, inputs, relative bound (eps is 1.2e-7), exact values
SIMD_FUNCTIONS = {
    # 2.2e-7 measured without fma (two rounded products), 2.0e-7 with; 2^-149 absolute where the
    # result is subnormal
    "exp": (
        0,
        np.exp,
        np.concatenate(
            [
                np.linspace(-86, 88, 200001),
                np.linspace(-103, -86, 1001),
                both_signs[np.abs(both_signs) < 80],
            ]
        ),
        2.5e-7,
        {-INF: 0.0, -1e30: 0.0, -200.0: 0.0, 0.0: 1.0, NAN: NAN},
    ),
    "log": (
        1,
        np.log,
        np.concatenate(
            [np.logspace(-37.9, 38.5, 200001), np.linspace(0.5, 2, 100001), [1e-45, 1e-40, TINY]]
        ),
        2.5e-7,
        {0.0: -INF, INF: INF, 1.0: 0.0, -1.0: NAN, NAN: NAN},
    ),
    "log1p": (
        2,
        np.log1p,
        np.concatenate([np.logspace(-30, 38, 100001), -np.logspace(-30, -1e-4, 100001)]),
        4e-7,
        {0.0: 0.0, -1.0: -INF, INF: INF, -2.0: NAN, NAN: NAN},
    ),
    "tanh": (
        3,
        np.tanh,
        np.concatenate([both_signs, np.linspace(-20, 20, 100001)]),
        2.5e-7,
        {0.0: 0.0, INF: 1.0, -INF: -1.0, 1e30: 1.0, NAN: NAN},
    ),
}


@pytest.mark.parametrize("level", simd_levels(), ids=SIMD.get)
@pytest.mark.parametrize("name", SIMD_FUNCTIONS)
def test_simd_functions(name: str, level: int, math: ModuleType) -> None:
    fn, truth, inputs, bound, exact = SIMD_FUNCTIONS[name]
    z = inputs.astype(np.float32)
    expected = truth(z.astype(np.float64))
    error = np.abs(math.simd(level, fn, z) - expected)
    allowed = bound * np.abs(expected) + 2.0**-149
    worst = int(np.argmax(error / allowed))
    assert (error <= allowed).all(), (
        f"{name}({z[worst]!r}): error {error[worst]:.2e}, allowed {allowed[worst]:.2e}"
    )
    got = math.simd(level, fn, np.array(list(exact), dtype=np.float32))
    np.testing.assert_array_equal(got, np.array(list(exact.values()), dtype=np.float32))


@pytest.mark.parametrize("level", simd_levels(), ids=SIMD.get)
def test_exp_flushed(level: int, math: ModuleType) -> None:
    z = np.concatenate([np.linspace(-86.99, 88, 400001), -np.logspace(1.9, -40, 4001)]).astype(
        np.float32
    )
    truth = np.exp(z.astype(np.float64))
    error = np.abs(math.simd(level, 4, z) - truth) / truth
    # the table form: three roundings, the cubic term, and that of the scale
    allowed = 2.5e-7 + 1.4e-8 * np.abs(z)
    worst = int(np.argmax(error / allowed))
    assert (error <= allowed).all(), (
        f"exp_flushed({z[worst]!r}): error {error[worst]:.2e}, allowed {allowed[worst]:.2e}"
    )
    got = math.simd(level, 4, np.array([-INF, -1e30, -110.0, -0.0, 0.0, NAN], dtype=np.float32))
    np.testing.assert_array_equal(got, np.array([0, 0, 0, 1, 1, NAN], dtype=np.float32))


def series(t: np.ndarray, first: int, coefficient) -> np.ndarray:  # type: ignore[no-untyped-def]
    """sum_k coefficient(k) t^k in long double: near 0 the closed forms cancel in float64 too."""
    t = t.astype(np.longdouble)
    return sum(np.longdouble(coefficient(k)) * t**k for k in range(first, 40))


def factorial(k: int) -> np.longdouble:
    return np.prod(np.arange(1, k + 1, dtype=np.longdouble))


# to +-1/4; squares stay above 1e-308
SMALL = np.concatenate([-np.logspace(-0.6021, -150, 2001), np.logspace(-150, -0.6021, 2001)])


def close(got: np.ndarray, truth: np.ndarray, bound: float) -> None:
    assert (got >= 0).all(), "a Bregman divergence is never negative"
    relative = np.abs(got - truth) / np.maximum(np.abs(truth), 1e-307)
    assert relative.max() <= bound, f"{float(relative.max()):.2e}"


def test_bregman(math: ModuleType) -> None:
    truth = series(-SMALL, 2, lambda k: 1 / factorial(k))
    close(math.bregman_small(SMALL), truth, 1.3e-8)
    close(math.bregman_pair(SMALL, False), truth, 1.3e-8)
    close(math.bregman_pair(-SMALL, True), truth, 1.3e-8)
    # expm1(-d) + d just above the threshold of 0.01 loses 2/d roundings
    close(math.bregman(SMALL), truth, 1e-13)
    d = np.concatenate([np.linspace(-40, -0.25, 1001), np.linspace(0.25, 700, 1001)])
    close(math.bregman(d), np.exp(-d.astype(np.longdouble)) - 1 + d, 1e-13)


def test_defect(math: ModuleType) -> None:
    close(math.defect(SMALL), series(SMALL, 2, lambda k: np.longdouble((-1) ** k) / k), 1e-13)
    t = np.concatenate([-1 + np.logspace(-12, -0.13, 500), np.logspace(-0.6, 12, 1001)])
    close(math.defect(t), t.astype(np.longdouble) - np.log1p(t.astype(np.longdouble)), 1e-13)
    assert math.defect(0.0) == 0


def test_jsd_g(math: ModuleType) -> None:
    truth = series(SMALL, 2, lambda k: np.longdouble((-1) ** k) / (k * (k - 1)))
    close(math.jsd_g_small(SMALL), truth, 1e-8)
    close(math.jsd_g(SMALL), truth, 1e-13)
    t = np.concatenate([-1 + np.logspace(-12, -0.13, 500), np.logspace(-0.6, 12, 1001)])
    wide = t.astype(np.longdouble)
    close(math.jsd_g(t), (1 + wide) * np.log1p(wide) - wide, 1e-13)
    assert math.jsd_g(0.0) == 0
    assert math.jsd_g(-1.0) == 1


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 0.5])
def test_jsd_pieces(beta: float, math: ModuleType) -> None:
    """log(m/p) and an entry's part of the divergence; below 1e-4 the truth cancels in 64 bits."""
    small = np.logspace(-4, -0.5, 2001)
    u = np.concatenate([np.linspace(-15.49, 15.49, 40001), -small, small]).astype(np.longdouble)
    u = u[u != 0]
    log_m = np.log1p(beta * np.expm1(-u))
    value = -log_m * np.exp(log_m) - beta * u * np.exp(-u)
    got_log_m, got_value = math.jsd_pieces(beta, u.astype(np.float64))
    # the fit, and coefficients rounded to float32: at 1/2 the value is a quarter of that at 1,
    # around which it is expanded
    assert np.abs(got_log_m / log_m - 1).max() <= 1.3e-7
    close(got_value, value, 4e-7)
    assert math.jsd_pieces(beta, np.zeros(1))[0] == 0
    assert math.jsd_pieces(beta, np.zeros(1))[1] == 0


def test_bregman_polynomials(math: ModuleType) -> None:
    for found, reach, bound in ((math.bregman_unit, 1.0, 2e-7), (math.bregman_mid, 2.0, 1e-7)):
        size = np.logspace(-100, np.log10(reach), 4001).astype(np.longdouble)
        for d in (size, -size):
            near = np.abs(d) < 0.1
            truth = np.where(
                near, series(-d * near, 2, lambda k: 1 / factorial(k)), np.expm1(-d) + d
            )
            close(found(d.astype(np.float64)), truth, bound)


def test_ewc(math: ModuleType) -> None:
    theta, anchor = np.random.default_rng(0).standard_normal((2, 1000))
    fisher = np.logspace(-30, 30, 1000)
    np.testing.assert_allclose(
        math.pull(theta, anchor, fisher), fisher * (theta - anchor), rtol=1e-15
    )
    np.testing.assert_allclose(
        math.term(theta, anchor, fisher), fisher * (theta - anchor) ** 2, rtol=1e-15
    )
    assert (math.pull(anchor, anchor, fisher) == 0).all()
    assert (math.prox(anchor, anchor, fisher, 3.0) == anchor).all()
    step = 0.3
    moved = math.prox(theta, anchor, fisher, step)
    # the minimum of (t - theta)^2/2 + step fisher (t - anchor)^2/2: its gradient there is 0, up to
    # anchor's rounding times fisher
    gradient = (moved - theta) + step * fisher * (moved - anchor)
    assert (
        np.abs(gradient) <= 4e-16 * (np.abs(theta) + np.abs(anchor)) * (1 + step * fisher)
    ).all()
    assert (np.abs(moved - anchor) <= np.abs(theta - anchor) * (1 + 1e-15) + 1e-16).all()
