// Who submits work to the device, in which order, and whether two threads ever do so at once.
#pragma once
#include <cstdint>
#include <mutex>
#include <string>

namespace emulator {

// One submission is a Metal launch or an ATen call on the MPS key. Calls nested in a submission belong to it.
struct Submission {
  uint64_t sequence;
  bool outermost;
};

Submission enter_submission();
void leave_submission();

// True when another thread was inside a submission at any moment of this thread's current one.
bool overlapped();

// Appends one JSON object to the log that mps_emulator_drain returns.
void record(const std::string& json);

class ScopedSubmission {
 public:
  ScopedSubmission() : submission_(enter_submission()) {}
  ~ScopedSubmission() { leave_submission(); }
  ScopedSubmission(const ScopedSubmission&) = delete;
  ScopedSubmission& operator=(const ScopedSubmission&) = delete;
  const Submission& operator*() const { return submission_; }

 private:
  Submission submission_;
};

}  // namespace emulator
