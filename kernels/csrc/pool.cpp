// Who works in parallel. In a process with PyTorch: the threads of its OpenMP runtime, because those keep looking for work
// for a while after every operation, and a second set of threads would compete with them for the same processors.
// Otherwise a persistent pool of our own. Workers inherit the affinity of the thread that starts them; they look for work for some
// microseconds after a call and then sleep, so that an idle pool costs nothing. One call at a time: others wait.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "mc_cpu.h"

namespace {

constexpr int MOST = 256;
constexpr int LOOKS = 4000;  // about 20 to 50 microseconds

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

int allowed_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  unsigned found = std::thread::hardware_concurrency();
  return found ? int(found) : 1;
}

struct Pool {
  std::mutex busy, lock;
  std::condition_variable wake;
  std::atomic<uint64_t> round{0};
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0};  // workers still in this round
  int threads = 1;             // of this round, the caller included
  int64_t tasks = 0;
  Task task = nullptr;
  void* context = nullptr;
  int started = 0;
  long process = 0;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
  }

  void serve(int thread, uint64_t seen) {
    for (;;) {
      for (int look = 0; look < LOOKS && round.load(std::memory_order_acquire) == seen; ++look) pause_briefly();
      if (round.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> held(lock);
        wake.wait(held, [&] { return round.load(std::memory_order_acquire) != seen; });
      }
      seen = round.load(std::memory_order_acquire);
      if (thread < threads) work();
      inside.fetch_sub(1, std::memory_order_release);
    }
  }

  void run(int wanted, int64_t count, Task what, void* with) {
    while (started < wanted - 1) {
      uint64_t now = round.load();
      int number = started + 1;
      try {
        std::thread([this, number, now] { serve(number, now); }).detach();
      } catch (const std::system_error&) {  // the system has no more threads: do with what there is
        wanted = started + 1;
        break;
      }
      ++started;
    }
    threads = wanted, tasks = count, task = what, context = with;
    next.store(0, std::memory_order_relaxed);
    inside.store(started, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> held(lock);
      round.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    work();
    for (int look = 0; inside.load(std::memory_order_acquire) > 0; ++look) {
      if (look < LOOKS) pause_briefly();
      else std::this_thread::yield();
    }
  }
};

// libgomp's entry point: runs a function once on each of so many threads, the caller included, and waits for all.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> openmp{nullptr};
std::atomic<long> openmp_process{0};  // libgomp waits forever for its threads in a child that was forked after their start

long this_process() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 0;
#endif
}

struct Shared {
  std::atomic<int64_t> next;
  int64_t tasks;
  Task task;
  void* context;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
  }
};

Pool* pool() {
  // Never destroyed: detached workers may outlive static destructors. A forked child has no workers and starts anew.
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load();
  long process = this_process();
  if (!found || found->process != process) {
    Pool* made = new Pool;
    made->process = process;
    if (current.compare_exchange_strong(found, made)) return made;
    delete made;
    return current.load();
  }
  return found;
}

}  // namespace

int pool_threads(int wanted) {
  int most = allowed_cpus();
  if (most > MOST) most = MOST;
  return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

void pool_use_openmp(void* gomp_parallel) {
  openmp = reinterpret_cast<Parallel>(gomp_parallel);
  openmp_process = this_process();
}

void pool_run(int threads, int64_t tasks, Task task, void* context) {
  if (threads > tasks) threads = int(tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
    return;
  }
  if (Parallel run = openmp; run && openmp_process == this_process()) {
    Shared shared = {{0}, tasks, task, context};
    run([](void* with) { static_cast<Shared*>(with)->work(); }, &shared, unsigned(threads), 0);
    return;
  }
  Pool* p = pool();
  std::lock_guard<std::mutex> held(p->busy);
  p->run(threads, tasks, task, context);
}
