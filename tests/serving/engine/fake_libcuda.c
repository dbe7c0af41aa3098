// A CUDA driver of host memory, as libcuda.so.1: enough of it to run CudaDevice without a GPU.
// Work on a stream runs at once; while a graph is recorded it is kept, and a launch repeats it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, TOTAL = 1 << 20, WORK_MAX = 16 };

typedef struct {
  void *target;
  const void *source;  // Null: fill with zeros.
  size_t bytes;
} Work;

typedef struct {
  Work work[WORK_MAX];
  int count;
} Graph;

static int has_context, retained;
static size_t used;
static Graph *recording;

static int give(Work work) {
  if (!has_context) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  if (recording) {
    recording->work[recording->count++] = work;
    return OK;
  }
  if (work.source) memcpy(work.target, work.source, work.bytes);
  else memset(work.target, 0, work.bytes);
  return OK;
}

int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuDeviceGetName(char *name, int length, int device) {
  strncpy(name, "Fake GPU", length);
  return device;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
  return device;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  retained++;
  *context = &retained;
  return device;
}
int cuDevicePrimaryCtxRelease(int device) { return --retained == 0 ? device : INVALID_VALUE; }
int cuCtxSetCurrent(void *context) {
  has_context = context == &retained;
  return has_context ? OK : INVALID_VALUE;
}
int cuMemGetInfo(size_t *left, size_t *total) {
  *left = TOTAL - used;
  *total = TOTAL;
  return OK;
}
int cuMemAlloc(void **address, size_t bytes) {
  if (used + bytes > TOTAL) return OUT_OF_MEMORY;
  size_t *held = aligned_alloc(256, (bytes + 511) / 256 * 256);
  held[0] = bytes;
  used += bytes;
  *address = (char *)held + 256;
  return OK;
}
int cuMemFree(void *address) {
  size_t *held = (size_t *)((char *)address - 256);
  used -= held[0];
  free(held);
  return OK;
}
int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
  *address = malloc(bytes);
  return flags;
}
int cuMemFreeHost(void *address) { free(address); return OK; }
int cuStreamCreate(void **stream, unsigned flags) {
  *stream = malloc(1);
  return flags == 1 ? OK : INVALID_VALUE;  // CU_STREAM_NON_BLOCKING
}
int cuStreamDestroy(void *stream) { free(stream); return OK; }
int cuStreamSynchronize(void *stream) { return stream && !recording ? OK : INVALID_VALUE; }
int cuMemsetD8Async(void *target, unsigned char value, size_t count, void *stream) {
  return stream && value == 0 ? give((Work){target, 0, count}) : INVALID_VALUE;
}
int cuMemcpyHtoDAsync(void *target, const void *source, size_t bytes, void *stream) {
  return stream ? give((Work){target, source, bytes}) : INVALID_VALUE;
}
int cuMemcpyDtoHAsync(void *target, void *source, size_t bytes, void *stream) {
  return stream ? give((Work){target, source, bytes}) : INVALID_VALUE;
}
int cuStreamBeginCapture(void *stream, int mode) {
  if (!stream || mode != 1 || recording) return INVALID_VALUE;  // THREAD_LOCAL
  recording = calloc(1, sizeof(Graph));
  return OK;
}
int cuStreamEndCapture(void *stream, void **graph) {
  *graph = recording;
  recording = 0;
  return stream && *graph ? OK : INVALID_VALUE;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags) {
  *executable = malloc(sizeof(Graph));
  memcpy(*executable, graph, sizeof(Graph));
  return (int)flags;
}
int cuGraphDestroy(void *graph) { free(graph); return OK; }
int cuGraphExecDestroy(void *executable) { free(executable); return OK; }
int cuGraphLaunch(void *executable, void *stream) {
  Graph *graph = executable;
  for (int i = 0; i < graph->count; i++) give(graph->work[i]);
  return stream ? OK : INVALID_VALUE;
}

int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
  Dl_info here;
  dladdr((void *)cuGetProcAddress_v2, &here);
  *found = dlsym(dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD), name);
  if (status) *status = *found ? 0 : 1;
  return OK;
}
int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags, int *status) {
  return cuGetProcAddress_v2(name, found, version, flags, status);
}
