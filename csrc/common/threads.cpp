#include "common/threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace meditok {

namespace {

constexpr int kMaxThreads = 256;

// torch.set_flush_denormal and fast-math libraries change how a thread treats subnormals; scores must not
// notice.
class DefaultFloatEnvironment {
  public:
#if defined(__x86_64__)
    DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    DefaultFloatEnvironment() {}
#endif
};

struct Job {
    ItemFunction function;
    void* context;
    int64_t items;
    std::atomic<int64_t> next{0};

    void run(int participant) {
        DefaultFloatEnvironment environment;
        for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) {
            function(context, participant, item);
        }
    }
};

class Pool {
  public:
    // False if the pool already works for somebody else.
    bool run(Job& job, int threads) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(threads - 1);
            job_ = &job;
            open_places_ = threads - 1 < workers_ ? threads - 1 : workers_;
            last_participant_ = 0;
        }
        work_.notify_all();
        job.run(0);
        std::unique_lock<std::mutex> lock(mutex_);
        open_places_ = 0;  // whoever wakes up later finds nothing to do
        finished_.wait(lock, [this] { return active_ == 0; });
        job_ = nullptr;
        return true;
    }

  private:
    void grow(int workers) {
        for (; workers_ < workers; ++workers_) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // the system gives no more threads: go on with those there are
            }
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [this] { return open_places_ > 0; });
            --open_places_;
            ++active_;
            const int participant = ++last_participant_;
            Job* job = job_;
            lock.unlock();
            job->run(participant);
            lock.lock();
            if (--active_ == 0) finished_.notify_one();
        }
    }

    std::mutex owner_;  // held by the caller whose job runs
    std::mutex mutex_;  // guards everything below
    std::condition_variable work_, finished_;
    Job* job_ = nullptr;
    int workers_ = 0, open_places_ = 0, active_ = 0, last_participant_ = 0;
};

// Never destroyed: workers sleep in it until the process ends.
std::atomic<Pool*> pool{nullptr};

Pool* get_pool() {
    Pool* current = pool.load();
    if (current != nullptr) return current;
    // After a fork only the calling thread lives on: the child drops the parent's pool, whose threads it does
    // not have.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return fresh;
    delete fresh;
    return current;
}

}  // namespace

int participants(int64_t items, int threads) {
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (items < threads) threads = static_cast<int>(items);
    return threads < 1 ? 1 : threads;
}

void parallel_for_raw(int64_t items, int threads, ItemFunction function, void* context) {
    Job job;
    job.function = function;
    job.context = context;
    job.items = items;
    threads = participants(items, threads);
    if (threads > 1 && get_pool()->run(job, threads)) return;
    job.run(0);
}

}  // namespace meditok
