// A core's program as it is issued: what each pipe does, for how long, and which rows of global memory it touches.
#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "machine.h"

namespace emu {
namespace {

constexpr size_t kScalarLines = 256;  // 16 KB of cache

// Rows that follow each other at one distance become one span.
void add_spans(Program& program, Step& step, const std::vector<Access>& accesses) {
  step.first_span = static_cast<uint32_t>(program.spans.size());
  for (const Access& access : accesses) {
    if (access.memory != Memory::kNone) continue;
    const auto bytes = static_cast<uint32_t>(access.end - access.begin);
    step.bytes += bytes;
    if (program.spans.size() > step.first_span) {
      Span& last = program.spans.back();
      const int64_t pitch = int64_t(access.begin - last.begin) - int64_t(last.count - 1) * last.pitch;
      if (last.bytes == bytes && (last.count == 1 || pitch == last.pitch)) {
        last.pitch = last.count == 1 ? int64_t(access.begin - last.begin) : last.pitch;
        ++last.count;
        continue;
      }
    }
    program.spans.push_back({access.begin, bytes, 1, 0});
  }
  step.num_spans = static_cast<uint32_t>(program.spans.size()) - step.first_span;
}

uint64_t local_bytes(const std::vector<Access>& accesses, Memory memory) {
  uint64_t bytes = 0;
  for (const Access& access : accesses) bytes += access.memory == memory ? access.end - access.begin : 0;
  return bytes;
}

bool one_of(const char* api, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [api](const char* name) { return std::strcmp(api, name) == 0; });
}

}  // namespace

// Published elements a cycle: 256 bytes in one, but for these.
double vector_cycles(const char* api, int64_t repeats, int size) {
  const double elements = 256.0 / size;
  double one = 1;
  if (one_of(api, {"Exp", "Ln", "Sqrt", "Div"})) one = elements / 32;
  if (one_of(api, {"MulAddDst"})) one = 2;
  if (one_of(api, {"Gather"})) one = elements / 5;
  const bool whole = std::strstr(api, "WholeReduce") != nullptr || one_of(api, {"ReduceSum", "ReduceMax", "ReduceMin"});
  if (whole || (size == 2 && std::strstr(api, "BlockReduce") != nullptr)) one = 7;
  return one * double(repeats);
}

void record(Core& core, pipe_t pipe, const Operation& operation) {
  Program& program = core.program;
  Step step{};
  step.pipe = uint8_t(pipe);
  step.call = operation.call;
  switch (operation.kind) {
    case Operation::kSet:
    case Operation::kWait:
      return;  // recorded where they are told
    case Operation::kBarrier:
      step.kind = Step::kBarrier;
      break;
    case Operation::kCrossSet:
      step.kind = Step::kCrossSet;
      step.mode = uint8_t(operation.mode);
      step.id = int16_t(operation.id);
      break;
    case Operation::kWork:
      step.kind = Step::kWork;
      step.cycles = float(operation.cycles);
      if (pipe == PIPE_M) program.products += operation.cycles;
      if (pipe == PIPE_MTE1) {  // 256 bytes a cycle into L0A, 128 into L0B
        step.cycles = float(local_bytes(operation.writes, Memory::kL0A)) / 256 +
                      float(local_bytes(operation.writes, Memory::kL0B)) / 128;
      }
      if (pipe == PIPE_MTE2) add_spans(program, step, operation.reads);
      if (pipe == PIPE_MTE3 || pipe == PIPE_FIX) {
        add_spans(program, step, operation.writes);
        // L0C holds fp32, whatever leaves it.
        if (pipe == PIPE_FIX) step.bytes = std::max(step.bytes, uint32_t(local_bytes(operation.reads, Memory::kL0C)));
      }
  }
  program.steps.push_back(step);
}

void record_flag(Core& core, Step::Kind kind, pipe_t pipe, const Call& call, int id) {
  Step step{};
  step.kind = kind;
  step.pipe = uint8_t(pipe);
  step.id = int16_t(id);
  step.call = call;
  core.program.steps.push_back(step);
}

// Scalar access, to global memory at `address` or, 0, to the core's own: a cache line costs once, until 256 others
// came.
void record_scalar(Core& core, const Call& call, uint64_t address) {
  std::vector<uint64_t>& lines = core.program.lines;
  const uint64_t line = address / 64;
  const bool hit = address == 0 || std::find(lines.begin(), lines.end(), line) != lines.end();
  Step step{};
  step.kind = Step::kScalar;
  step.pipe = PIPE_S;
  step.cycles = hit ? 0 : 1;  // times what a miss costs
  step.call = call;
  core.program.steps.push_back(step);
  if (hit) return;
  if (lines.size() >= kScalarLines) lines.erase(lines.begin());
  lines.push_back(line);
}

}  // namespace emu
