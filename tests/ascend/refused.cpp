// What the toolkit's headers do not accept, and the emulation's must not either: compiled, never run.
#include "kernel_operator.h"

namespace {

using namespace AscendC;

// ---- TBuf hands out tensors only where it may be changed
template <typename Buffer>
constexpr bool gets = requires(Buffer& buffer) {
  buffer.template Get<float>();
  buffer.template Get<float>(8);
  buffer.template GetWithOffset<float>(8, 0);
};
static_assert(gets<TBuf<TPosition::VECCALC>> && !gets<const TBuf<TPosition::VECCALC>>);

// ---- events between pipes that no instruction connects
template <typename Event>
constexpr bool has_s_fix = requires { Event::S_FIX; };
template <typename Event>
constexpr bool has_s_m = requires { Event::S_M; };
template <typename Event>
constexpr bool has_mte1_s = requires { Event::MTE1_S; };
template <typename Event>
constexpr bool has_fix_s = requires { Event::FIX_S; };
static_assert(has_fix_s<HardEvent> && !has_s_fix<HardEvent> && !has_s_m<HardEvent> && !has_mte1_s<HardEvent>);

// ---- a parameter structure takes all of its fields or none
template <typename Params, typename... Fields>
constexpr bool made_of = requires(Fields... fields) { Params(fields...); };
static_assert(made_of<DataCopyExtParams> && made_of<DataCopyExtParams, int, int, int, int, int>);
static_assert(!made_of<DataCopyExtParams, int, int, int, int> && !made_of<Nd2NzParams, int, int, int>);
static_assert(made_of<BrcbRepeatParams, int, int> && !made_of<BrcbRepeatParams, int>);
static_assert(made_of<FixpipeParamsV220, int, int, int, int, bool> && !made_of<FixpipeParamsV220, int, int, int, int>);
static_assert(!made_of<MmadParams, int, int, int> && !made_of<LoadData2DParams, int, int, int>);

// ---- tensors of one call have one type, and its parameters are those of its kind
template <typename To, typename From, typename Params>
constexpr bool copies = requires(LocalTensor<To> to, GlobalTensor<From> from, Params params) {
  DataCopyPad(to, from, params, DataCopyPadExtParams<To>());
};
static_assert(copies<half, half, DataCopyExtParams> && !copies<half, float, DataCopyExtParams>);
static_assert(!copies<half, half, Nd2NzParams> && !copies<half, half, int>);
template <typename A, typename B>
constexpr bool adds = requires(LocalTensor<A> a, LocalTensor<B> b) { Add(a, a, b, 8); };
static_assert(adds<float, float> && !adds<float, half>);

// ---- a call of so many elements sets the mask by itself
template <bool... set_mask>
constexpr bool adds_all = requires(LocalTensor<float> a) { Add<float, set_mask...>(a, a, a, 8); };
template <bool... set_mask>
constexpr bool adds_lanes =
    requires(LocalTensor<float> a) { Add<float, set_mask...>(a, a, a, uint64_t{8}, 1, BinaryRepeatParams()); };
static_assert(adds_all<> && !adds_all<false> && adds_lanes<> && adds_lanes<false>);

// ---- numbers in a row, by lanes, go only where a tensor has a name
template <typename Tensor>
constexpr bool counts = requires(Tensor tensor) { CreateVecIndex(static_cast<Tensor>(tensor), 0.0f, 64u); };
template <typename Tensor>
constexpr bool counts_lanes =
    requires(Tensor tensor) { CreateVecIndex(static_cast<Tensor>(tensor), 0.0f, uint64_t{64}, 1, 1, 8); };
static_assert(counts<LocalTensor<float>> && counts_lanes<LocalTensor<float>&> && !counts_lanes<LocalTensor<float>>);

}  // namespace
