#include "kl_launch.cuh"

namespace fasttax {

const char* kl_both(const KlLaunch& x) {
  const KlDevice device;
  if (device.error != cudaSuccess) return cuda_words(device.error);
  const int pair_item = x.type == FloatType::kFloat ? 8 : 4;
  KlLaunch launch = x;
  launch.args.splits = 1;
  const auto start = [&](auto entry) {
    using T = decltype(entry);
    return with_kind(kl_kind(x.op), [&](auto kind) -> const char* {
      constexpr KlOp kOp = kl_op(decltype(kind)::value);
      // 16 blocks are more than every device of clusters must have, and a slice of a divided device
      // (MIG) may have no 8 multiprocessors beside each other
      for (int largest = device.major >= 9 ? 16 : 1; largest > 0; largest /= 2) {
        const KlResidence held = kl_residence(x.op, x.args.v, pair_item, largest,
                                              size_t(device.block_limit), size_t(device.sm_limit));
        if (!held.cluster) break;  // nor does a smaller one hold it
        launch.args.cluster = held.cluster;
        largest = held.cluster;
        const dim3 blocks(unsigned(x.args.n * held.cluster));
        if (kl_cluster_fits(kl_resident_kernel<T, kOp>, blocks, held.bytes, held.cluster))
          return kl_start(kl_resident_kernel<T, kOp>, blocks, held.bytes, launch, held.cluster);
      }
      return kl_start(kl_two_sweeps_kernel<T, kOp>, dim3(unsigned(x.args.n)),
                      kl_shared_bytes(x.op, kl_spans(x.args.v)), launch);
    });
  };
  return x.type == FloatType::kFloat ? start(float()) : start(__nv_bfloat16());
}

}  // namespace fasttax
