#include "register.h"

#include "torch_abi.h"

static const struct {
  const char *name, *schema;
  lina_boxed *function;
} ops[] = {
    {"gate_fwd",
     "gate_fwd(Tensor logits, Tensor? bias, int k, int score, bool renorm, float scale, "
     "int groups, int top_groups, int group_top, bool stats) "
     "-> (Tensor weight, Tensor expert, Tensor load, Tensor stat)",
     lina_gate_fwd_boxed},
    {"gate_bwd",
     "gate_bwd(Tensor logits, Tensor expert, Tensor? dweight, Tensor? dstat, int score, "
     "bool renorm, float scale) -> Tensor",
     lina_gate_bwd_boxed},
    {"sort",
     "sort(Tensor expert, int experts) -> (Tensor offset, Tensor row_pair, Tensor pair_row)",
     lina_sort_boxed},
    {"dispatch_layout",
     "dispatch_layout(Tensor expert, Tensor said, int experts, int ep, int me, int forward, "
     "int backward) -> (Tensor token, Tensor row, Tensor token_backward, Tensor row_backward, "
     "Tensor header)",
     lina_dispatch_layout_boxed},
    {"experts_fwd",
     "experts_fwd(Tensor x, Tensor offset, Tensor row_pair, Tensor w_up, Tensor? b_up, "
     "Tensor w_down, Tensor? b_down, int k, int activation, bool interleaved, float alpha, "
     "float limit, bool save) -> (Tensor y, Tensor h)",
     lina_experts_fwd_boxed},
    {"experts_bwd",
     "experts_bwd(Tensor dy, Tensor? weight, Tensor x, Tensor h, Tensor offset, "
     "Tensor row_pair, Tensor pair_row, Tensor w_up, Tensor w_down, Tensor? b_down, "
     "Tensor? dh, Tensor? a, int activation, bool interleaved, float alpha, float limit, int need) "
     "-> (Tensor dx, Tensor dweight, Tensor dw_up, Tensor db_up, Tensor dw_down, "
     "Tensor db_down, Tensor dh_kept, Tensor a_kept)",
     lina_experts_bwd_boxed},
    {"combine_fwd", "combine_fwd(Tensor y, Tensor? weight, Tensor pair_row) -> Tensor",
     lina_combine_fwd_boxed},
    {"combine_bwd",
     "combine_bwd(Tensor dout, Tensor y, Tensor? weight, Tensor pair_row, "
     "Tensor row_pair) -> (Tensor dy, Tensor dweight)",
     lina_combine_bwd_boxed},
};
enum { OPS = sizeof ops / sizeof ops[0] };

#define REGISTER(call)                                                                \
  do {                                                                                \
    if (lina_torch.call != 0) return lina_error(LINA_ETORCH, "torch refused " #call); \
  } while (0)

/* One function serves both devices: it reads the device off its tensors, and a
 * build without CUDA says so instead of leaving the CUDA key empty. The library
 * handles live as long as the process: deleting one would unregister its ops. */
int lina_register(void) {
  static bool registered;
  if (registered) return LINA_OK;
  int rc = lina_torch_load();
  if (rc != LINA_OK) return rc;
  void *def, *cpu, *cuda;
  REGISTER(aoti_torch_library_init_fragment("lina", __FILE__, __LINE__, &def));
  REGISTER(aoti_torch_library_init_impl("lina", "CPU", __FILE__, __LINE__, &cpu));
  REGISTER(aoti_torch_library_init_impl("lina", "CUDA", __FILE__, __LINE__, &cuda));
  for (int i = 0; i < OPS; i++) {
    REGISTER(aoti_torch_library_def(def, ops[i].schema));
    REGISTER(aoti_torch_library_impl(cpu, ops[i].name, ops[i].function));
    REGISTER(aoti_torch_library_impl(cuda, ops[i].name, ops[i].function));
  }
  registered = true;
  return LINA_OK;
}
