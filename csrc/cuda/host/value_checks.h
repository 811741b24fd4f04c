// The value checks that QUEST_OPS_CHECK=1 asks for: device integers are copied to the host for the CPU's checks.
#pragma once

#include <vector>

#include "launch.h"

namespace quest::cuda {

class HostCopies {
 public:
  explicit HostCopies(cudaStream_t stream) : stream_(stream) {
    cudaStreamCaptureStatus status;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    STD_TORCH_CHECK(
        status == cudaStreamCaptureStatusNone,
        "QUEST_OPS_CHECK=1 needs a synchronisation, which a CUDA graph cannot capture: unset it while capturing");
  }
  // Replaces the rows x columns matrix at *data by a packed copy on the host, whose row stride is `columns`.
  void fetch(const int32_t*& data, int64_t rows, int64_t columns, int64_t stride) {
    if (!data) return;
    std::vector<int32_t>& copy = copies_.emplace_back(rows * columns + 1);
    if (rows > 0 && columns > 0)
      STD_CUDA_CHECK(cudaMemcpy2DAsync(
          copy.data(), columns * 4, data, (rows > 1 ? stride : columns) * 4, columns * 4, rows, cudaMemcpyDeviceToHost,
          stream_));
    data = copy.data();
  }
  void wait() const { STD_CUDA_CHECK(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_;
  std::vector<std::vector<int32_t>> copies_;
};

inline void fetch_paging(HostCopies& host, Paging& g, int32_t B) {
  host.fetch(g.page_table, B, g.P, g.page_table_stride);
  g.page_table_stride = g.P;
  host.fetch(g.seq_lens, 1, B, B);
  host.fetch(g.new_lens, 1, B, B);
}

inline void fetch_extra(HostCopies& host, AppendParams& p) { host.fetch(p.end_lens, 1, p.size.B, p.size.B); }
inline void fetch_extra(HostCopies& host, UpdateBoundsParams& p) { host.fetch(p.first_token, 1, p.size.B, p.size.B); }
inline void fetch_extra(HostCopies&, AppendCodesParams&) {}
inline void fetch_extra(HostCopies&, EstimateParams&) {}
inline void fetch_extra(HostCopies&, TopkParams&) {}

template <class Params>
void check_values_if_requested(Params p, cudaStream_t stream) {
  if (!value_checks_requested()) return;
  HostCopies host(stream);
  fetch_paging(host, p.paging, p.size.B);
  fetch_extra(host, p);
  host.wait();
  check_values(p);
}

inline void check_values_if_requested(DecodeStepParams p, cudaStream_t stream) {
  if (!value_checks_requested()) return;
  HostCopies host(stream);
  fetch_paging(host, p.paging, p.size.B);
  fetch_paging(host, p.append.paging, p.size.B);
  fetch_extra(host, p.append);
  host.wait();
  check_values(p);
}

// `pages` has three strides, so it is made contiguous first; only a debugging run pays for that.
template <class Params>
void check_values_if_requested(Params p, const std::optional<Tensor>& pages, cudaStream_t stream) {
  if (!value_checks_requested()) return;
  HostCopies host(stream);
  fetch_paging(host, p.paging, p.size.B);
  if (pages) {
    const Tensor packed = torch::stable::contiguous(*pages);
    PageLists& lists = p.pages;
    lists.data = static_cast<const int32_t*>(packed.const_data_ptr());
    lists.stride_h = lists.K, lists.stride_t = int64_t{lists.K} * lists.Hs, lists.stride_b = lists.stride_t * p.size.T;
    host.fetch(lists.data, int64_t{p.size.B} * p.size.T * lists.Hs, lists.K, lists.K);
    host.wait();
  }
  host.wait();
  check_values(p);
}

}  // namespace quest::cuda
