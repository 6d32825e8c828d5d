/* nccl_abi.h - the NCCL functions that lina calls, found in the libnccl.so.2
 * that torch has loaded into this process. lina never loads a second one.
 *
 * NCCL's C interface is stable within version 2; the declarations are lina's own
 * (no nccl.h is needed to build) and tests/test_abi.py compares them with NCCL's
 * header where there is one.
 */
#ifndef LINA_NCCL_ABI_H
#define LINA_NCCL_ABI_H

#include <limits.h>
#include <stddef.h>

#define LINA_NCCL_NEEDED         "2.18" /* the first with all that lina_nccl_config holds */
#define LINA_NCCL_VERSION_NEEDED 21800

typedef struct lina_nccl_handle *lina_nccl_comm; /* ncclComm_t */
typedef void *lina_nccl_stream; /* cudaStream_t */
typedef struct { char internal[128]; } lina_nccl_id; /* ncclUniqueId */

enum { LINA_NCCL_SUCCESS = 0, LINA_NCCL_UNHANDLED_CUDA = 1, LINA_NCCL_IN_PROGRESS = 7 };
enum { LINA_NCCL_SUM = 0, LINA_NCCL_AVG = 4 };
enum {
  LINA_NCCL_UINT8 = 1,
  LINA_NCCL_F16 = 6,
  LINA_NCCL_F32 = 7,
  LINA_NCCL_F64 = 8,
  LINA_NCCL_BF16 = 9
};

/* ncclConfig_t as of 2.18. Later versions read a shorter one by its `version`. */
typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char *net_name;
  int split_share;
} lina_nccl_config;
#define LINA_NCCL_MAGIC 0xcafebeef
#define LINA_NCCL_CONFIG     \
  {sizeof(lina_nccl_config), \
   LINA_NCCL_MAGIC,          \
   LINA_NCCL_VERSION_NEEDED, \
   INT_MIN,                  \
   INT_MIN,                  \
   INT_MIN,                  \
   INT_MIN,                  \
   NULL,                     \
   INT_MIN}

#define LINA_NCCL_FUNCTIONS(X)                                                                   \
  X(int, ncclGetVersion, (int *version))                                                         \
  X(int, ncclGetUniqueId, (lina_nccl_id * id))                                                   \
  X(int, ncclCommInitRankConfig,                                                                 \
    (lina_nccl_comm * comm, int ranks, lina_nccl_id id, int rank, lina_nccl_config *))           \
  X(int, ncclCommGetAsyncError, (lina_nccl_comm comm, int *state))                               \
  X(int, ncclCommAbort, (lina_nccl_comm comm))                                                   \
  X(int, ncclGroupStart, (void))                                                                 \
  X(int, ncclGroupEnd, (void))                                                                   \
  X(int, ncclSend,                                                                               \
    (const void *from, size_t count, int dtype, int peer, lina_nccl_comm comm,                   \
     lina_nccl_stream stream))                                                                   \
  X(int, ncclRecv,                                                                               \
    (void *to, size_t count, int dtype, int peer, lina_nccl_comm comm, lina_nccl_stream stream)) \
  X(int, ncclAllReduce,                                                                          \
    (const void *from, void *to, size_t count, int dtype, int op, lina_nccl_comm comm,           \
     lina_nccl_stream stream))                                                                   \
  X(int, ncclReduceScatter,                                                                      \
    (const void *from, void *to, size_t count, int dtype, int op, lina_nccl_comm comm,           \
     lina_nccl_stream stream))                                                                   \
  X(const char *, ncclGetErrorString, (int code))                                                \
  X(const char *, ncclGetLastError, (lina_nccl_comm comm))

typedef struct {
#define X(type, name, arguments) type(*name) arguments;
  LINA_NCCL_FUNCTIONS(X)
#undef X
} lina_nccl_functions;

/* Valid after lina_nccl_load has returned LINA_OK. */
extern lina_nccl_functions lina_nccl;

/* Finds the functions at the first call; later calls return the same again.
 * LINA_ENCCL: no NCCL in this process, or one older than LINA_NCCL_NEEDED. */
int lina_nccl_load(void);

#endif
