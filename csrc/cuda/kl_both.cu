#include "kl_launch.cuh"

namespace fasttax {

const char* kl_both(const KlLaunch& x) {
  const KlDevice device;
  if (device.error != cudaSuccess) return kl_words(device.error);
  const int item = x.type == FloatType::kFloat ? 4 : 2;
  const KlResidence held = kl_residence(x.op, x.args.v, item, device.major >= 9 ? 8 : 1,
                                        size_t(device.block_limit), size_t(device.sm_limit));
  KlLaunch launch = x;
  launch.args.splits = 1;
  launch.args.cluster = held.cluster;
  const auto start = [&](auto entry) {
    using T = decltype(entry);
    return with_kind(kl_kind(x.op), [&](auto kind) -> const char* {
      constexpr KlOp kOp = kl_op(decltype(kind)::value);
      if (held.cluster)
        return kl_start(kl_resident_kernel<T, kOp>, dim3(unsigned(x.args.n * held.cluster)),
                        held.bytes, launch, held.cluster);
      return kl_start(kl_two_sweeps_kernel<T, kOp>, dim3(unsigned(x.args.n)),
                      kl_shared_bytes(x.op, kl_spans(x.args.v)), launch);
    });
  };
  return x.type == FloatType::kFloat ? start(float()) : start(__nv_bfloat16());
}

}  // namespace fasttax
