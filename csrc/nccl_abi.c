#define _GNU_SOURCE
#include "nccl_abi.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "error.h"

lina_nccl_functions lina_nccl;

/* Some builds of torch hold NCCL in a library of their own. */
static void *find_library(void) {
  void *library = dlopen("libnccl.so.2", RTLD_NOLOAD | RTLD_NOW);
  return library ? library : dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
}

int lina_nccl_load(void) {
  static _Atomic bool loaded;
  int version = 0;
  if (atomic_load(&loaded)) return LINA_OK;
  void *library = find_library();
  if (!library)
    return lina_error(LINA_ENCCL,
                      "no libnccl.so.2 in this process; this torch is built without CUDA");
#define X(type, name, arguments)                                                              \
  if (!(*(void **)&lina_nccl.name = dlsym(library, #name)))                                   \
    return lina_error(LINA_ENCCL,                                                             \
                      "NCCL has no symbol %s; lina needs NCCL " LINA_NCCL_NEEDED " or newer", \
                      #name);
  LINA_NCCL_FUNCTIONS(X)
#undef X
  if (lina_nccl.ncclGetVersion(&version) != LINA_NCCL_SUCCESS || version < LINA_NCCL_VERSION_NEEDED)
    return lina_error(LINA_ENCCL,
                      "NCCL is version %d; lina needs NCCL " LINA_NCCL_NEEDED " or newer", version);
  atomic_store(&loaded, true);   /* the reference stays: the table points into the library */
  return LINA_OK;
}
