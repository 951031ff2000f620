#include "submissions.h"

#include <unistd.h>

#include <atomic>
#include <set>
#include <vector>

namespace emulator {
namespace {

struct Inside {
  int depth = 0;
  bool overlapped = false;
};

std::mutex mutex;
std::set<Inside*> threads_inside;
std::vector<std::string> log_lines;
uint64_t next_sequence = 0;
std::atomic<unsigned> linger_us{0};
std::atomic<bool> recording{false};
thread_local Inside inside;

}  // namespace

Submission enter_submission() {
  if (inside.depth++ > 0) return {next_sequence, false};
  uint64_t sequence;
  {
    std::lock_guard<std::mutex> guard(mutex);
    sequence = next_sequence++;
    threads_inside.insert(&inside);
    inside.overlapped = threads_inside.size() > 1;
    if (inside.overlapped)
      for (Inside* other : threads_inside) other->overlapped = true;
  }
  // Staying inside for a moment turns a race that is merely possible into one that is seen.
  if (unsigned pause = linger_us.load()) usleep(pause);
  return {sequence, true};
}

void leave_submission() {
  if (--inside.depth > 0) return;
  std::lock_guard<std::mutex> guard(mutex);
  threads_inside.erase(&inside);
}

bool overlapped() {
  std::lock_guard<std::mutex> guard(mutex);
  return inside.overlapped;
}

void record(const std::string& json) {
  if (!recording.load()) return;
  std::lock_guard<std::mutex> guard(mutex);
  log_lines.push_back(json);
}

}  // namespace emulator

// The interface Python reaches through ctypes.
extern "C" {

uint64_t mps_emulator_enter() { return emulator::enter_submission().sequence; }

int mps_emulator_leave() {
  const bool overlap = emulator::overlapped();
  emulator::leave_submission();
  return overlap ? 1 : 0;
}

// The sequence number that the next submission will have.
uint64_t mps_emulator_sequence() {
  std::lock_guard<std::mutex> guard(emulator::mutex);
  return emulator::next_sequence;
}

void mps_emulator_record(int on) { emulator::recording.store(on != 0); }

void mps_emulator_linger(unsigned microseconds) { emulator::linger_us.store(microseconds); }

// One JSON object a line; the text stays valid until this thread drains again. Clears the log.
const char* mps_emulator_drain() {
  static thread_local std::string text;
  std::lock_guard<std::mutex> guard(emulator::mutex);
  text.clear();
  for (const auto& line : emulator::log_lines) text += line + "\n";
  emulator::log_lines.clear();
  return text.c_str();
}
}
