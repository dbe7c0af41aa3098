// An NCCL of one process, as libnccl.so.2: it notes what it is asked for in a line of text.
#include <stdio.h>
#include <string.h>

typedef struct { char internal[128]; } Id;

static char log_[4096];
static int communicator;

#define SAY(...) snprintf(log_ + strlen(log_), sizeof log_ - strlen(log_), __VA_ARGS__)

const char *said(void) { return log_; }
const char *ncclGetErrorString(int status) { return status == 2 ? "unhandled system error" : "?"; }
int ncclGetUniqueId(Id *id) {
  memset(id->internal, 'x', sizeof id->internal);
  return 0;
}
int ncclCommInitRank(void **made, int ranks, Id id, int rank) {
  SAY("join %d/%d %.3s;", rank, ranks, id.internal);
  *made = &communicator;
  return rank < ranks ? 0 : 2;
}
int ncclCommDestroy(void *which) { return which == &communicator ? SAY("leave;"), 0 : 4; }
int ncclSend(const void *at, size_t count, int type, int peer, void *which, void *stream) {
  if (which != &communicator) return 4;
  SAY("send %zu x%d at %p to %d on %p;", count, type, at, peer, stream);
  return 0;
}
int ncclRecv(void *at, size_t count, int type, int peer, void *which, void *stream) {
  if (which != &communicator) return 4;
  SAY("receive %zu x%d at %p from %d on %p;", count, type, at, peer, stream);
  return 0;
}
