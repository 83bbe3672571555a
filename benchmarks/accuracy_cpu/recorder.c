/* Records what torch's CPU allocator asks of the C library, in every thread: posix_memalign called from libc10 (the only
 * way in which it takes memory, c10/core/impl/alloc_cpu.cpp) and free. Preloaded into a rank; see recorder.py.
 *
 * One record: nanoseconds of CLOCK_MONOTONIC, address, bytes (0 for a free). Records stand in a file mapped at the
 * path in MEMFIT_RECORDER, whose first word counts them. Nothing is recorded before recorder_switch(1). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define ALIGNED 64 /* c10's gAlignment: what is not aligned so is not torch's */

struct record {
  int64_t time;
  uint64_t address;
  uint64_t size;
};

static struct record *records;
static _Atomic uint64_t *count;
static uint64_t room;
static _Atomic int on;
static uintptr_t c10_first, c10_last;
static void (*real_free)(void *);
static int (*real_memalign)(void **, size_t, size_t);

static void note(void *address, size_t size) {
  uint64_t place = atomic_fetch_add(count, 1);
  if (place >= room) return;
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  records[place].time = now.tv_sec * 1000000000LL + now.tv_nsec;
  records[place].address = (uint64_t)address;
  records[place].size = size;
}

static int find_c10(struct dl_phdr_info *info, size_t size, void *data) {
  (void)size, (void)data;
  if (!strstr(info->dlpi_name, "libc10.so")) return 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) *part = &info->dlpi_phdr[i];
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    c10_first = info->dlpi_addr + part->p_vaddr;
    c10_last = c10_first + part->p_memsz;
  }
  return 1;
}

/* 1: record from here on; returns 0 where libc10 is not loaded. */
int recorder_switch(int value) {
  if (value && !dl_iterate_phdr(find_c10, NULL)) return 0;
  atomic_store(&on, value);
  return 1;
}

__attribute__((constructor)) static void begin(void) {
  real_free = dlsym(RTLD_NEXT, "free");
  real_memalign = dlsym(RTLD_NEXT, "posix_memalign");
  const char *path = getenv("MEMFIT_RECORDER");
  if (!path) return;
  int file = open(path, O_RDWR);
  if (file < 0) return;
  off_t size = lseek(file, 0, SEEK_END);
  void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (map == MAP_FAILED) return;
  count = map;
  room = (size - sizeof(uint64_t)) / sizeof(struct record);
  records = (struct record *)((char *)map + sizeof(uint64_t));
  unsetenv("MEMFIT_RECORDER"); /* compilers and other children write no records */
  unsetenv("LD_PRELOAD");
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  if (!real_memalign) real_memalign = dlsym(RTLD_NEXT, "posix_memalign");
  int problem = real_memalign(out, alignment, size);
  uintptr_t caller = (uintptr_t)__builtin_return_address(0);
  if (!problem && on && alignment == ALIGNED && caller >= c10_first && caller < c10_last) note(*out, size);
  return problem;
}

void free(void *address) {
  if (!real_free) real_free = dlsym(RTLD_NEXT, "free");
  if (on && address && (uintptr_t)address % ALIGNED == 0) note(address, 0);
  real_free(address);
}
