#define _GNU_SOURCE
#include "torch_abi.h"

#include <dlfcn.h>

#include "error.h"

lina_torch_functions lina_torch;

/* ISO C has no cast from object to function pointers; POSIX's way is to copy. */
#define FIND(library, name) (*(void **)&lina_torch.name = dlsym((library), #name))

static int load_cpu(void *cpu) {
#define X(type, name, arguments)                                                                 \
  if (!FIND(cpu, name))                                                                          \
    return lina_error(LINA_ETORCH,                                                               \
                      "torch has no symbol %s; lina needs torch " LINA_TORCH_NEEDED " or newer", \
                      #name);
  LINA_TORCH_FUNCTIONS(X)
#undef X
#define X(type, name, arguments) (void)FIND(cpu, name);
  LINA_TORCH_ONEDNN_FUNCTIONS(X)
  LINA_TORCH_OPTIONAL_FUNCTIONS(X)
#undef X
  *(void **)&lina_torch.operator_new = dlsym(cpu, "_Znwm");
  *(void **)&lina_torch.operator_delete = dlsym(cpu, "_ZdlPv");
  bool cells = lina_torch.torch_new_stable_ivalue && lina_torch.torch_delete_stable_ivalue;
  if (!cells && !(lina_torch.operator_new && lina_torch.operator_delete))
    return lina_error(LINA_ETORCH,
                      "torch has no symbol torch_new_stable_ivalue and "
                      "libstdc++ no operator new and delete (_Znwm, _ZdlPv)");
  return LINA_OK;
}

static int load_cuda(void *cuda) {
#define X(type, name, arguments)                                    \
  if (!FIND(cuda, name))                                            \
    return lina_error(LINA_ETORCH,                                  \
                      "torch's CUDA build has no symbol %s; lina "  \
                      "needs torch " LINA_TORCH_NEEDED " or newer", \
                      #name);
  LINA_TORCH_CUDA_FUNCTIONS(X)
#undef X
  lina_torch.has_cuda = true;
  return LINA_OK;
}

int lina_torch_load(void) {
  void *cpu = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
  if (!cpu)
    return lina_error(LINA_ETORCH,
                      "libtorch_cpu.so is not loaded; import torch "
                      "before lina._C");
  int rc = load_cpu(cpu);
  void *cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
  if (rc == LINA_OK && cuda) rc = load_cuda(cuda);
  /* torch stays loaded by itself; lina's references are given back. */
  if (cuda) dlclose(cuda);
  dlclose(cpu);
  return rc;
}
