/* dtype.h - the element types lina knows; kernels see nothing else of torch. */
#ifndef LINA_DTYPE_H
#define LINA_DTYPE_H

enum lina_dtype { LINA_F32, LINA_BF16, LINA_F16, LINA_F64, LINA_I32, LINA_I64, LINA_DTYPE_OTHER };

#endif
