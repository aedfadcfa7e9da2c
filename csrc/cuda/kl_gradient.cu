#include "kl_launch.cuh"

namespace fasttax {

const char* kl_gradient(const KlLaunch& x) {
  const dim3 blocks(unsigned(x.args.n), unsigned((x.args.v + kTile - 1) / kTile));
  return kl_with_type(x.type, [&](auto entry) {
    using T = decltype(entry);
    return kl_with_op(x.op, [&](auto op) {
      constexpr KlOp kOp = decltype(op)::value;
      if constexpr (kl_has_ref(kOp))
        if (x.args.dy.base) return kl_start(kl_gradient_kernel<T, kOp, true>, blocks, 0, x);
      return kl_start(kl_gradient_kernel<T, kOp, false>, blocks, 0, x);
    });
  });
}

}  // namespace fasttax
