/* fibers.h - CUDA threads on one CPU thread.
 *
 * Every thread of a block is a fiber with a stack of its own. It gives the CPU away at
 * barriers and wherever it touches memory that others write, and which fiber goes on is drawn:
 * so blocks and ranks meet in many orders. What memory is, others say: plain.h for
 * peers_reduce.cu, races.h for dispatch and collect.
 *
 * For x86-64: a switch by six pushes is ten times faster than swapcontext, which asks the
 * kernel.
 */
#ifndef LINA_TESTS_FIBERS_H
#define LINA_TESTS_FIBERS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "words.h"

Index blockIdx, gridDim, threadIdx;
using std::min;

/* ---- chance, time, and what was found ---- */

static std::mt19937_64 chance;
static uint64_t ticks, moved; /* the clock; when something last went on */
static const char *scene = "";

static inline uint32_t draw(uint32_t n) { return (uint32_t)(((chance() >> 32) * n) >> 32); }

[[noreturn]] static void found(const char *what) {
  printf("FOUND: %s (%s)\n", what, scene);
  fflush(stdout);
  _Exit(3);
}

/* ---- fibers ---- */

extern "C" void fibers_switch(void **from, void *to);
asm(".text\n"
    ".globl fibers_switch\n"
    "fibers_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

enum State { READY, AT_BARRIER, AT_WARP, ENDED };
struct Block;
struct Fiber {
  Block *block;
  unsigned thread;
  State state = READY;
  std::unique_ptr<char[]> stack;
  void *sp;
};
struct Shared; /* the block's __shared__ variables, by the kernel's text */
struct Kernel {
  std::function<void()> body;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned ended = 0;
};
struct Block {
  Kernel *kernel;
  unsigned index;
  std::unique_ptr<Shared> shared;
  std::vector<Fiber> fibers;
  unsigned waiting = 0, alive = 0;
  bool started = false;
};

static void *scheduler;
static Fiber *current;

static void others() { fibers_switch(&current->sp, scheduler); }
/* Where only now and then another should come between. */
static void perhaps() {
  if (current && draw(8) == 0) others();
}

static void __syncwarp() {}
static void __syncthreads() {
  current->state = AT_BARRIER;
  current->block->waiting++;
  others();
}

static void fiber_begins() {
  Fiber *self = current;
  self->block->kernel->body();
  self->state = ENDED;
  self->block->alive--;
  for (;;) others();
}

static void start(Block *b, unsigned threads) {
  enum { STACK = 16384 };
  b->started = true, b->alive = threads, moved = ticks;
  b->fibers.resize(threads);
  for (unsigned t = 0; t < threads; t++) {
    Fiber &f = b->fibers[t];
    f.block = b, f.thread = t, f.stack.reset(new char[STACK]);
    void **sp = (void **)((uintptr_t)(f.stack.get() + STACK - 64) & ~(uintptr_t)15);
    *--sp = nullptr; /* aligned as behind a call */
    *--sp = (void *)fiber_begins;
    for (int saved = 0; saved < 6; saved++) *--sp = nullptr;
    f.sp = sp;
  }
}

static void run(Fiber *f) {
  current = f;
  threadIdx.x = f->thread, blockIdx.x = f->block->index;
  gridDim.x = (unsigned)f->block->kernel->blocks.size();
  fibers_switch(&scheduler, f->sp);
  current = nullptr, ticks++;
}

/* Some threads of a block go on, some steps; true once all have ended. */
static bool goes_on(Block *b, unsigned threads, int passes) {
  if (!b->started) start(b, threads);
  while (passes-- && b->alive) {
    if (b->waiting == b->alive) {
      if (b->alive != threads) found("threads ended before a barrier that others reached");
      for (Fiber &f : b->fibers) f.state = READY;
      b->waiting = 0;
    }
    const unsigned first = draw(threads);
    for (unsigned i = 0; i < threads; i++) {
      Fiber *f = &b->fibers[(first + i) % threads];
      if (f->state == READY && draw(4)) run(f); /* a quarter stays behind */
    }
  }
  if (b->alive) return false;
  b->fibers.clear();
  b->kernel->ended++, moved = ticks;
  return true;
}

/* ---- the program ---- */

/* FIRST COUNT FAULT: draws `one` run by each of COUNT numbers; `names` of faults, the first is none. */
static int runs(int argc, char **argv, const std::vector<const char *> &names,
                void (*one)(int fault)) {
  if (argc != 4) return 2;
  size_t fault = 0;
  while (fault < names.size() && strcmp(argv[3], names[fault])) fault++;
  if (fault == names.size()) return 2;
  const uint64_t first = strtoull(argv[1], NULL, 10), count = strtoull(argv[2], NULL, 10);
  for (uint64_t n = first; n < first + count; n++) {
    char text[64];
    snprintf(text, sizeof text, "number %llu, fault %s", (unsigned long long)n, names[fault]);
    scene = text;
    chance.seed(n * 77 + 5);
    one((int)fault);
  }
  printf("%llu runs, fault %s: ok\n", (unsigned long long)count, names[fault]);
  return 0;
}

#endif
