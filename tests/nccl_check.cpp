// Compiles only if lina's declarations of NCCL's functions agree with NCCL's own header: as many
// arguments, of the same sizes and kinds, the same numbers and the same layout of what is passed.
#include <nccl.h>

#include <cstddef>
#include <type_traits>

#include "nccl_abi.h"

template <class A, class B>
constexpr bool alike = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B> &&
                       std::is_class_v<A> == std::is_class_v<B>;

template <class R, class... A, class S, class... B>
constexpr bool same(R (*)(A...), S (*)(B...)) {
  if constexpr (sizeof...(A) == sizeof...(B))
    return alike<R, S> && (alike<A, B> && ...);
  else
    return false;
}

#define X(type, name, arguments) \
  static_assert(same((type(*) arguments) nullptr, (decltype(&::name))nullptr), #name);
LINA_NCCL_FUNCTIONS(X)
#undef X

static_assert(sizeof(lina_nccl_id) == sizeof(ncclUniqueId));
static_assert(NCCL_API_MAGIC == LINA_NCCL_MAGIC && NCCL_CONFIG_UNDEF_INT == INT_MIN);
static_assert(ncclSuccess == LINA_NCCL_SUCCESS && ncclInProgress == (int)LINA_NCCL_IN_PROGRESS);
static_assert(ncclSum == (int)LINA_NCCL_SUM && ncclAvg == (int)LINA_NCCL_AVG);
static_assert(ncclUint8 == (int)LINA_NCCL_UINT8 && ncclFloat16 == (int)LINA_NCCL_F16 &&
              ncclFloat32 == (int)LINA_NCCL_F32 && ncclFloat64 == (int)LINA_NCCL_F64 &&
              ncclBfloat16 == (int)LINA_NCCL_BF16);
#define AT(theirs, ours)                                                              \
  static_assert(offsetof(ncclConfig_t, theirs) == offsetof(lina_nccl_config, ours) && \
                sizeof(ncclConfig_t::theirs) == sizeof(lina_nccl_config::ours))
AT(size, size);
AT(magic, magic);
AT(version, version);
AT(blocking, blocking);
AT(cgaClusterSize, cga_cluster_size);
AT(minCTAs, min_ctas);
AT(maxCTAs, max_ctas);
AT(netName, net_name);
AT(splitShare, split_share);
