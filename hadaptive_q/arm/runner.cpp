// Runs a .pte on an ARM64 core, one thread, with the stock ExecuTorch runtime.
//
//   runner run PTE INPUTS OUTPUTS     every sample in INPUTS -> one float32 output after another in OUTPUTS
//   runner count PTE N [INPUTS]       N inferences of the first sample, the last one between the marks
//   runner operators PTE N [INPUTS]   the same with marks around every operator, and the operators' names
//
// INPUTS holds raw samples, each the bytes of all inputs of `forward` one after the other. Without INPUTS a sample is
// made up (see `pseudo_random`). Standard output says what the method takes, `input TYPE SIZE...`.
// A refusal is one line on standard error that starts with "runner: ", and exit code 1.

#include "tracer.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::extension::TensorPtr;
using executorch::extension::module::Module;
using executorch::runtime::Error;
using executorch::runtime::Method;
using executorch::runtime::Program;

namespace {

[[noreturn]] void refuse(const std::string& line) {
  std::fprintf(stderr, "runner: %s\n", line.c_str());
  std::exit(1);
}

void check(Error error, const std::string& what) {
  if (error != Error::Ok) refuse(what + ": " + executorch::runtime::to_string(error));
}

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(std::string("cannot read ") + path);
  return std::vector<char>(std::istreambuf_iterator<char>(file), {});
}

// state = 1664525 state + 1013904223 (mod 2^32), from 1. A float is (state >> 8) / 2^23 - 1, in [-1, 1); a byte is
// state >> 24; other types are 0, because a random integer may be an index out of range.
void pseudo_random(ScalarType type, char* data, size_t bytes, uint32_t& state) {
  const size_t width = type == ScalarType::Float ? sizeof(float) : 1;
  const bool drawn = width > 1 || type == ScalarType::Byte;
  for (size_t at = 0; drawn && at + width <= bytes; at += width) {
    state = 1664525u * state + 1013904223u;
    const float real = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    const uint8_t byte = static_cast<uint8_t>(state >> 24);
    std::memcpy(data + at, width > 1 ? static_cast<const void*>(&real) : &byte, width);
  }
}

struct Input {
  std::vector<char> memory;
  TensorPtr tensor;
};

// The tensors of `forward`, each over memory of its own with pseudo-random contents; prints their types and sizes.
std::vector<Input> prepare_inputs(const Method& method) {
  std::vector<Input> inputs;
  uint32_t state = 1;
  const auto meta = method.method_meta();
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    const auto info = meta.input_tensor_meta(i);
    if (!info.ok()) refuse("input " + std::to_string(i) + " of forward is no tensor");
    const std::vector<executorch::aten::SizesType> sizes(info->sizes().begin(), info->sizes().end());
    const std::vector<executorch::aten::DimOrderType> order(info->dim_order().begin(), info->dim_order().end());
    std::printf("input %s", executorch::runtime::toString(info->scalar_type()));
    for (const auto size : sizes) std::printf(" %d", static_cast<int>(size));
    std::printf("\n");
    Input input{std::vector<char>(info->nbytes()), nullptr};
    pseudo_random(info->scalar_type(), input.memory.data(), info->nbytes(), state);
    void* data = input.memory.data();
    input.tensor = executorch::extension::make_tensor_ptr(sizes, data, order, {}, info->scalar_type());
    inputs.push_back(std::move(input));
  }
  return inputs;
}

void write_outputs(const Method& method, std::ofstream& file) {
  for (size_t i = 0; i < method.outputs_size(); ++i) {
    const auto& value = method.get_output(i);
    const bool fits = value.isTensor() && value.toTensor().scalar_type() == ScalarType::Float;
    if (!fits) refuse("output " + std::to_string(i) + " is no float32 tensor");
    file.write(static_cast<const char*>(value.toTensor().const_data_ptr()), value.toTensor().nbytes());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool run = mode == "run", operators = mode == "operators";
  const bool complete = run ? argc == 5 : (operators || mode == "count") && (argc == 4 || argc == 5);
  if (!complete) refuse("usage: run PTE INPUTS OUTPUTS | count PTE N [INPUTS] | operators PTE N [INPUTS]");
  const char* input_path = run ? argv[3] : argc == 5 ? argv[4] : nullptr;

  executorch::runtime::runtime_init();
  executorch::extension::threadpool::NoThreadPoolGuard single_thread;
  Module module(argv[2]);
  Tracer tracer;
  check(module.load(Program::Verification::InternalConsistency), "the runtime cannot load the file");
  const Error loaded = module.load_method("forward", nullptr, operators ? &tracer : nullptr);
  check(loaded, "the runtime cannot load method forward");
  Method& method = *module.method("forward").get();

  std::vector<Input> inputs = prepare_inputs(method);
  size_t bytes = 0;
  for (const Input& input : inputs) bytes += input.memory.size();
  const std::vector<char> samples = input_path != nullptr ? read(input_path) : std::vector<char>();
  if (input_path != nullptr && (bytes == 0 || samples.empty() || samples.size() % bytes != 0)) {
    const std::string got = std::to_string(samples.size()), one = std::to_string(bytes);
    refuse("the inputs hold " + got + " bytes, not a multiple of the " + one + " bytes of one sample");
  }

  const size_t inferences = run ? samples.size() / bytes : std::strtoul(argv[3], nullptr, 10);
  if (inferences == 0) refuse("N must be a positive number");
  std::ofstream outputs(run ? argv[4] : "/dev/null", std::ios::binary);
  for (size_t n = 0; n < inferences; ++n) {
    const char* sample = samples.data() + (run ? n * bytes : 0);
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!samples.empty()) std::memcpy(inputs[i].memory.data(), sample, inputs[i].memory.size());
      sample += samples.empty() ? 0 : inputs[i].memory.size();
      check(method.set_input(inputs[i].tensor, i), "the runtime refuses input " + std::to_string(i));
    }
    const bool marked = !run && n + 1 == inferences;
    tracer.clear();
    if (marked) mark(kBegin);
    const Error error = method.execute();
    if (marked) mark(kEnd);
    check(error, "the runtime fails in execute()");
    if (run) write_outputs(method, outputs);
  }
  tracer.print();
  outputs.flush();
  if (!outputs) refuse("cannot write the outputs");
  return 0;
}
