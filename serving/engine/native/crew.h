// A crew of threads that runs a job of many short phases, one after the other.
//
// A phase is a number of independent units. Units are handed out, threads are not waited for: a
// phase ends when its last unit is done, whoever did it. So a worker that is late (just woken, or
// preempted by another process on a shared machine) holds up no more than the unit in its hands,
// and the caller alone can finish a whole job.
//
// Each thread has its own shard of a phase's units, one contiguous range, and helps the others
// when its own is exhausted: what a thread works through is contiguous in memory, and two threads
// touch one counter only near a phase's end.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace headrace {

class Job {
 public:
  virtual ~Job() = default;
  // Number of phases; and of the units of one, called when all phases before it are done.
  virtual int phases() const = 0;
  virtual int units(int phase) const = 0;
  virtual void execute(int phase, int unit, int thread) noexcept = 0;
};

class Crew {
 public:
  // `threads` counts the caller of run().
  explicit Crew(int threads);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  int threads() const { return static_cast<int>(shards_.size()); }
  // Runs all phases; returns when the last unit is done. One caller at a time.
  void run(Job& job);

 private:
  struct alignas(64) Shard {
    // phase (24 bits) | end (20 bits) | next (20 bits): a fetch_add hands out a unit together
    // with the phase it belongs to, so that a late thread cannot take it for another phase's.
    std::atomic<uint64_t> ticket{0};
  };

  bool take(int thread, int* phase, int* unit);
  void complete();
  bool open_next();
  void work(int thread);
  void serve(int thread);
  void wait(uint32_t word);
  void announce(uint32_t word);

  std::vector<Shard> shards_;
  std::vector<std::thread> workers_;
  // Below: written by whoever opens a phase, read by those who hold one of its units.
  Job* job_ = nullptr;
  int phase_ = -1;
  int total_ = 0;
  uint32_t serial_ = 0;
  uint32_t base_ = 0;
  alignas(64) std::atomic<int> done_{0};
  // Changes with every phase; the lowest bit says that a job is running.
  alignas(64) std::atomic<uint32_t> word_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace headrace
