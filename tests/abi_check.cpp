/* abi_check.cpp - lina's declarations of libtorch's C functions against torch's
 * own headers: compiles only if every type agrees. Run by test_abi.py.
 *
 * lina says void * where torch has a pointer to an opaque struct; nothing else
 * may differ, not even a const or a width.
 */
#define USE_CUDA 1
#include <ATen/Config.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "torch_abi.h"

namespace {

template <class T>
struct plain {
  using type = T;
};
template <class T>
struct plain<T *> {
  using inner = typename plain<T>::type;
  using type = std::conditional_t<std::is_class_v<T>, void *, inner *>;
};
template <class T>
struct plain<const T> {
  using type = const typename plain<T>::type;
};
template <class R, class... A>
struct plain<R(A...)> {
  using type = typename plain<R>::type(typename plain<A>::type...);
};

template <class Torch, class Lina>
constexpr bool agrees = std::is_same_v<typename plain<Torch>::type, Lina>;

}  // namespace

#define X(result, name, arguments)                          \
  static_assert(agrees<decltype(::name), result arguments>, \
                #name ": torch_abi.h differs from torch's header");
LINA_TORCH_FUNCTIONS(X)
LINA_TORCH_CUDA_FUNCTIONS(X)
LINA_TORCH_ONEDNN_FUNCTIONS(X)
#ifdef LINA_ABI_NEWER
LINA_TORCH_OPTIONAL_FUNCTIONS(X)
#endif
#undef X
