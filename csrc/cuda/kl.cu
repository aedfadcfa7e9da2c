#include "kl_launch.cuh"

namespace fasttax {

const char* kl_plan(KlLaunch& x, int64_t& parts, int64_t& tickets) {
  const KlDevice device;
  if (device.error != cudaSuccess) return cuda_words(device.error);
  x.args.splits = kl_splits(x.args.n, x.args.v, device.multiprocessors);
  const bool split = x.args.splits > 1;
  parts = split ? x.args.n * kl_spans(x.args.v) * kl_parts_count(x.op) : 0;
  tickets = split ? x.args.n : 0;
  return nullptr;
}

const char* kl_forward(const KlLaunch& x) {
  const dim3 blocks(unsigned(x.args.n * x.args.splits));
  const size_t shared_bytes = kl_shared_bytes(x.op, x.args.splits > 1 ? 0 : kl_spans(x.args.v));
  return kl_with_type(x.type, [&](auto entry) {
    using T = decltype(entry);
    return kl_with_op(x.op, [&](auto op) -> const char* {
      constexpr KlOp kOp = decltype(op)::value;
      const char* failed = kl_start(kl_forward_kernel<T, kOp>, blocks, shared_bytes, x);
      if constexpr (kl_op_two_sweeps(kOp))
        if (!failed) failed = kl_start(kl_second_kernel<T, kOp>, blocks, shared_bytes, x);
      return failed;
    });
  });
}

}  // namespace fasttax
