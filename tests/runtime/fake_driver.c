/* A fake CUDA driver: the part of libcuda.so.1 that `runtime/cuda.py` calls, in host memory.

   Called through the real cuda-bindings, it shows that all arguments are valid. Work is done at
   once, so a stream is a number and a graph is empty. `fake_live` counts allocations that were not
   freed, `fake_launched` counts launches. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, OUT_OF_MEMORY = 2, NOT_BOUND = 201, NOT_FOUND = 500 };
enum { HOST = 1 };
#define CONTEXT ((void *)0x1234)
#define MOST ((size_t)1 << 40)

typedef uint64_t Place;

/* CUDA_MEMCPY3D, of the driver's interface. */
typedef struct {
  size_t x, y, z, lod;
  int type;
  void *host;
  Place device;
  void *array, *reserved;
  size_t pitch, height;
} Side;
typedef struct {
  Side source, target;
  size_t width, height, depth;
} Copy;

static int live, launched, bound;

int fake_live(void) { return live; }
int fake_launched(void) { return launched; }

static void *make(size_t size) {
  live++;
  return memset(malloc(size ? size : 1), 0xff, size);
}
static int drop(void *what) {
  live--;
  free(what);
  return OK;
}

int cuInit(unsigned flags) { return flags ? NOT_FOUND : OK; }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuDeviceGetCount(int *count) { return *count = 1, OK; }
int cuDeviceGet(int *device, int index) { return *device = index, OK; }
int cuDeviceGetName(char *name, int size, int device) {
  return strncpy(name, "fake GPU", (size_t)size), OK;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1; /* compute capability */
  return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = CONTEXT, OK; }
int cuCtxSetCurrent(void *context) { return bound = context == CONTEXT, OK; }
int cuCtxPushCurrent(void *context) { return context == CONTEXT ? OK : NOT_BOUND; }
int cuCtxPopCurrent(void **context) { return *context = CONTEXT, OK; }

int cuStreamCreate(void **stream, unsigned flags) {
  return *stream = make(1), flags == 1 && bound ? OK : NOT_BOUND;
}
int cuStreamDestroy(void *stream) { return drop(stream); }
int cuStreamSynchronize(void *stream) { return stream ? OK : NOT_FOUND; }
int cuMemAlloc(Place *place, size_t size) {
  if (size > MOST) return OUT_OF_MEMORY;
  return *place = (Place)make(size), bound ? OK : NOT_BOUND;
}
int cuMemFree(Place place) { return drop((void *)place); }
int cuMemHostAlloc(void **place, size_t size, unsigned flags) { return *place = make(size), OK; }
int cuMemFreeHost(void *place) { return drop(place); }

int cuMemcpyHtoDAsync(Place to, const void *from, size_t size, void *stream) {
  return memcpy((void *)to, from, size), OK;
}
int cuMemcpyDtoHAsync(void *to, Place from, size_t size, void *stream) {
  return memcpy(to, (void *)from, size), OK;
}
int cuMemsetD8Async(Place place, unsigned char value, size_t size, void *stream) {
  return memset((void *)place, value, size), stream ? OK : NOT_FOUND;
}
int cuMemsetD2D8Async(
    Place place, size_t pitch, unsigned char value, size_t width, size_t height, void *stream) {
  if (pitch < width || !stream) return NOT_FOUND;
  for (size_t y = 0; y < height; y++) memset((char *)place + y * pitch, value, width);
  return OK;
}
static char *begin(const Side *side) {
  return side->type == HOST ? side->host : (char *)side->device;
}
int cuMemcpy3DAsync(const Copy *copy, void *stream) {
  const Side *a = &copy->source, *b = &copy->target;
  if (copy->width > a->pitch || copy->width > b->pitch) return NOT_FOUND;
  if (copy->height > a->height || copy->height > b->height || !stream) return NOT_FOUND;
  for (size_t z = 0; z < copy->depth; z++)
    for (size_t y = 0; y < copy->height; y++)
      memcpy(begin(b) + (z * b->height + y) * b->pitch,
             begin(a) + (z * a->height + y) * a->pitch, copy->width);
  return OK;
}

int cuStreamBeginCapture(void *stream, int mode) { return mode == 2 ? OK : NOT_FOUND; }
int cuStreamEndCapture(void *stream, void **graph) { return *graph = make(1), OK; }
int cuGraphInstantiate(void **made, void *graph, unsigned long long flags) {
  return *made = make(1), flags ? NOT_FOUND : OK;
}
int cuGraphLaunch(void *graph, void *stream) { return launched++, OK; }
int cuGraphDestroy(void *graph) { return drop(graph); }
int cuGraphExecDestroy(void *graph) { return drop(graph); }

#define ENTRY(name) {#name, (void *)name}
static const struct {
  const char *name;
  void *function;
} functions[] = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetName),
    ENTRY(cuDeviceGetAttribute), ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuCtxSetCurrent),
    ENTRY(cuCtxPushCurrent), ENTRY(cuCtxPopCurrent), ENTRY(cuStreamCreate),
    ENTRY(cuStreamDestroy), ENTRY(cuStreamSynchronize), ENTRY(cuMemAlloc), ENTRY(cuMemFree),
    ENTRY(cuMemHostAlloc), ENTRY(cuMemFreeHost), ENTRY(cuMemcpyHtoDAsync),
    ENTRY(cuMemcpyDtoHAsync), ENTRY(cuMemsetD8Async), ENTRY(cuMemsetD2D8Async), ENTRY(cuMemcpy3DAsync),
    ENTRY(cuStreamBeginCapture), ENTRY(cuStreamEndCapture), ENTRY(cuGraphInstantiate),
    ENTRY(cuGraphLaunch), ENTRY(cuGraphDestroy), ENTRY(cuGraphExecDestroy),
    {"cuGraphInstantiateWithFlags", (void *)cuGraphInstantiate},
};

/* cuda-bindings looks up every function by this call. */
int cuGetProcAddress_v2(
    const char *name, void **function, int version, uint64_t flags, int *status) {
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
    if (!strcmp(functions[i].name, name)) {
      if (status) *status = 0;
      return *function = functions[i].function, OK;
    }
  if (status) *status = 1;
  return *function = NULL, OK;
}
