/* fuzz_draw.h - random arguments for an operator.
 *
 * A third are valid. Of the others some are replaced: by a tensor of any shape,
 * stride, dtype and device, by one that is wrong in one thing only, by None or
 * null, by any number.
 *
 * Index tensors hold valid indices, zeros or -1 (those of sort anything): what
 * they may hold is the contract's business, not that of the geometry checks.
 */
#ifndef LINA_FUZZ_DRAW_H
#define LINA_FUZZ_DRAW_H

#include <stdint.h>

enum { FUZZ_MAX_ARGS = 24 };

void fuzz_seed(uint64_t seed);
uint64_t fuzz_random(void);
/* Fills the cells of a boxed call, which then owns them; their number. */
int fuzz_draw(const char *op_name, uint64_t *stack);

#endif
