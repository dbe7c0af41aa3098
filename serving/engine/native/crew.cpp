#include "crew.h"

#include <chrono>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headrace {
namespace {

constexpr uint64_t kUnitBits = 20;
constexpr uint64_t kUnitMask = (1u << kUnitBits) - 1;
constexpr uint32_t kSerialMask = (1u << 24) - 1;
constexpr uint32_t kRunning = 1;
// How long a thread spins inside a job before it sleeps. Phases are 1 to 100 us long; beyond that
// the core belongs to the processes beside us.
constexpr auto kSpin = std::chrono::microseconds(40);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr,
          nullptr, 0);
#else
  if (word.load(std::memory_order_acquire) == value) std::this_thread::yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr,
          nullptr, 0);
#else
  (void)word;
#endif
}

}  // namespace

Crew::Crew(int threads) : shards_(threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Crew::~Crew() {
  stop_.store(true);
  announce((word_.load() + 2) & ~kRunning);
  for (auto& worker : workers_) worker.join();
}

void Crew::run(Job& job) {
  job_ = &job;
  phase_ = -1;
  base_ = serial_;
  if (open_next()) work(0);
}

bool Crew::take(int thread, int* phase, int* unit) {
  const int count = threads();
  for (int i = 0; i < count; ++i) {
    auto& ticket = shards_[(thread + i) % count].ticket;
    uint64_t seen = ticket.load(std::memory_order_relaxed);
    if ((seen & kUnitMask) >= (seen >> kUnitBits & kUnitMask)) continue;
    seen = ticket.fetch_add(1, std::memory_order_acq_rel);
    if ((seen & kUnitMask) >= (seen >> kUnitBits & kUnitMask)) continue;
    // A valid unit keeps its phase open: job_ and base_ belong to it.
    *phase = static_cast<int>(((seen >> 2 * kUnitBits) - base_) & kSerialMask);
    *unit = static_cast<int>(seen & kUnitMask);
    return true;
  }
  return false;
}

// Opens the next phase that has units; false at the job's end. Only the one who completed the
// phase before (or run() itself) comes here, so that nobody else writes these fields.
bool Crew::open_next() {
  for (;;) {
    ++phase_;
    if (phase_ >= job_->phases()) {
      serial_ = (base_ + static_cast<uint32_t>(phase_)) & kSerialMask;
      announce((word_.load(std::memory_order_relaxed) + 2) & ~kRunning);
      return false;
    }
    const int units = job_->units(phase_);
    if (units == 0) continue;
    // One more than the units: the phase cannot end before its last ticket is written.
    total_ = units + 1;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t serial = (base_ + static_cast<uint32_t>(phase_)) & kSerialMask;
    const uint64_t count = shards_.size();
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t begin = units * i / count;
      const uint64_t end = units * (i + 1) / count;
      shards_[i].ticket.store(serial << 2 * kUnitBits | end << kUnitBits | begin,
                              std::memory_order_release);
    }
    announce((word_.load(std::memory_order_relaxed) + 2) | kRunning);
    if (done_.fetch_add(1, std::memory_order_acq_rel) != units) return true;
  }
}

void Crew::complete() {
  // Read before the unit is given back: after that, the fields may already be the next phase's.
  const int total = total_;
  if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total) open_next();
}

void Crew::announce(uint32_t word) {
  word_.store(word, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all(word_);
}

// Works until the job is over.
void Crew::work(int thread) {
  for (;;) {
    const uint32_t word = word_.load(std::memory_order_acquire);
    if (!(word & kRunning)) return;
    int phase = 0;
    int unit = 0;
    while (take(thread, &phase, &unit)) {
      job_->execute(phase, unit, thread);
      complete();
    }
    wait(word);
  }
}

void Crew::wait(uint32_t word) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (word_.load(std::memory_order_acquire) != word) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  if (word_.load(std::memory_order_seq_cst) == word) sleep_while(word_, word);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void Crew::serve(int thread) {
  while (!stop_.load(std::memory_order_acquire)) {
    const uint32_t word = word_.load(std::memory_order_acquire);
    if (word & kRunning) {
      work(thread);
      continue;
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    if (word_.load(std::memory_order_seq_cst) == word && !stop_.load()) sleep_while(word_, word);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace headrace
