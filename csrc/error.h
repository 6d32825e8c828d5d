/* error.h - error codes, their texts, and the two macros that return them.
 *
 * Every lina function that can fail returns LINA_OK or a negative code and
 * leaves a text naming operator, argument, value and limit in a thread-local
 * buffer. The text stays until the thread's next error.
 */
#ifndef LINA_ERROR_H
#define LINA_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

#define LINA_ERRORS(X)                            \
  X(EINVAL, -1, "argument outside its limits")    \
  X(ENOTSUP, -2, "dtype or device not supported") \
  X(ECUDA, -3, "CUDA call failed")                \
  X(ETORCH, -4, "libtorch call failed")           \
  X(ENOMEM, -5, "out of memory")                  \
  X(ENCCL, -6, "NCCL failed")                     \
  X(EPEER, -7, "another rank failed")

enum lina_code {
  LINA_OK = 0,
#define X(name, value, text) LINA_##name = value,
  LINA_ERRORS(X)
#undef X
};

/* Records printf-style text behind the code's own and returns `code`. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int lina_error(int code, const char *format, ...);

/* The calling thread's last error text; "" before the first. */
const char *lina_error_text(void);

/* For functions with `int rc` and a label `done` that releases everything. */
#define LINA_TRY(call)                       \
  do {                                       \
    if ((rc = (call)) != LINA_OK) goto done; \
  } while (0)
#define LINA_FAIL(code, ...)              \
  do {                                    \
    rc = lina_error((code), __VA_ARGS__); \
    goto done;                            \
  } while (0)

#ifdef __cplusplus
}
#endif
#endif
