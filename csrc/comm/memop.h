/* memop.h - a stream that writes or waits for a word of memory: the driver's
 * cuStreamWriteValue32 and cuStreamWaitValue32, found at run time (the module links
 * the static runtime alone). Errors: LINA_ECUDA. */
#ifndef LINA_COMM_MEMOP_H
#define LINA_COMM_MEMOP_H

#include <stdint.h>

/* Any thread may call it, at any time. */
int lina_memop_load(void);

/* After everything before it on the stream, *device_word = value. */
int lina_memop_write(void *stream, uint32_t *device_word, uint32_t value);

/* What follows on the stream waits until *device_word is 0. */
int lina_memop_wait_zero(void *stream, uint32_t *device_word);

/* A zeroed word of its own cache line in pinned host memory, mapped for `device`. */
int lina_memop_word(int device, _Atomic uint32_t **host, uint32_t **on_device);

#endif
