// Tells the counting plugin where an operator begins and ends, and remembers the names the runtime has for them.
#pragma once

#include <executorch/runtime/core/event_tracer.h>

#include <cstdio>
#include <string>
#include <vector>

// The plugin starts, stops and cuts its sums at these system calls.
enum Mark : long { kBegin = 1, kEnd = 2, kEnter = 3, kLeave = 4, kClock = 5 };

// No Linux system call has this number: the kernel refuses it, and the plugin sees it pass. Inline, so that no library
// code is counted.
inline void mark(Mark which) {
  register long number asm("x8") = 0x4851;
  register long argument asm("x0") = which;
  asm volatile("svc #0" : "+r"(argument) : "r"(number) : "memory");
}

// Portable operators run between `start_profiling` and `end_profiling`. XNNPACK reports its operators after it has run
// them all, with times by the clock of clock.cpp.
class Tracer final : public executorch::runtime::EventTracer {
  using Entry = executorch::runtime::EventTracerEntry;
  using Tensor = executorch::aten::Tensor;
  using Logged = executorch::runtime::Result<bool>;
  using Id = executorch::runtime::DelegateDebugIntId;
  using Time = et_timestamp_t;

 public:
  // One line per event, in order: `enter NAME`, `leave`, `delegated STEPS NAME`.
  void print() const {
    for (const std::string& event : events_) std::printf("%s\n", event.c_str());
  }
  void clear() { events_.clear(); }

  Entry start_profiling(const char* name, executorch::runtime::ChainID, executorch::runtime::DebugHandle) override {
    events_.push_back(std::string("enter ") + name);
    mark(kEnter);
    return {};
  }
  void end_profiling(Entry) override {
    mark(kLeave);
    events_.push_back("leave");
  }
  void log_profiling_delegate(const char* name, Id, Time start, Time end, const void*, size_t) override {
    const std::string steps = std::to_string((end - start) / 1000000000);
    events_.push_back("delegated " + steps + " " + (name != nullptr ? name : "unnamed"));
  }

  // Nothing else is of interest here.
  void create_event_block(const char*) override {}
  Entry start_profiling_delegate(const char*, Id) override { return {}; }
  void end_profiling_delegate(Entry, const void*, size_t) override {}
  void track_allocation(executorch::runtime::AllocatorID, size_t) override {}
  executorch::runtime::AllocatorID track_allocator(const char*) override { return 0; }
  Logged log_evalue(const executorch::runtime::EValue&, executorch::runtime::LoggedEValueType) override { return true; }
  Logged log_intermediate_output_delegate(const char*, Id, const Tensor&) override { return true; }
  Logged log_intermediate_output_delegate(const char*, Id, const executorch::runtime::ArrayRef<Tensor>) override {
    return true;
  }
  Logged log_intermediate_output_delegate(const char*, Id, const int&) override { return true; }
  Logged log_intermediate_output_delegate(const char*, Id, const bool&) override { return true; }
  Logged log_intermediate_output_delegate(const char*, Id, const double&) override { return true; }
  void set_delegation_intermediate_output_filter(executorch::runtime::EventTracerFilterBase*) override {}

 private:
  std::vector<std::string> events_;
};
