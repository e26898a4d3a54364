// The machine behind the headers: global memory, cores with their memories, and pipes as queues of operations.
//
// A launch runs each core's kernel on a stack of its own (scalar pipe). Every other pipe is a queue. An operation says
// which bytes it reads and writes; when it runs, vector clocks tell whether whatever touched those bytes before is
// known, through flags, to have come before (Lamport 1978; one clock per pipe and core).
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emu/core.h"
#include "program.h"

namespace emu {

inline constexpr int kPipes = 7;
inline constexpr uint32_t kUnified = 192 * 1024, kHandedOut = 184 * 1024;

struct Fault {
  std::string text;
};

using Clock = std::vector<uint32_t>;  // a count for each pipe of each core: core * kPipes + pipe

enum class Memory : uint8_t { kUnified, kL1, kL0A, kL0B, kL0C, kNone };
inline constexpr int kMemories = 5;
extern const char* const kMemoryNames[];
extern const char* const kPipeNames[];
Memory memory_of(TPosition position);

// The last accesses of 32 bytes of a core's memory: clocks of this core's pipes.
struct Cell {
  uint32_t written = 0;
  uint8_t writer = 0;
  std::array<uint32_t, kPipes> read{};
};
struct Store {
  std::vector<uint8_t> bytes, known;  // known: written since the launch began
  std::vector<Cell> cells;
};

// A stretch of a core's memory or of global memory that an operation touches.
struct Access {
  Memory memory;  // kNone: global
  uint64_t begin, end;
  bool must_be_known = true;
  bool atomic = false;
};

struct Operation {
  enum Kind { kWork, kSet, kWait, kBarrier, kCrossSet } kind = kWork;
  Call call{};
  std::vector<Access> reads, writes;
  std::function<void()> run;
  bool marks_itself = false;  // run() says itself which bytes are known after it
  bool settles = false;  // of a pipe that keeps its order: here what it reads must be known to be done all the same
  std::shared_ptr<const Clock> issued;
  HardEvent event{};
  int id = 0, mode = 0;
  double cycles = 0;  // of the vector and the cube pipe, as published
};

struct Event {
  int outstanding = 0;  // sets less waits, in the order of the program
  std::deque<std::shared_ptr<const Clock>> set;
};

struct Block {
  TPosition position = TPosition::VECCALC;
  bool in_and_out = false;
  uint32_t address = 0, bytes = 0, generation = 0;
  enum State { kIdle, kHeld, kQueued } state = kIdle;
  int event = -1;  // set when it was given back
  int queue = -1;
  Call last{};
};
struct Queue {
  pipe_t producer, consumer;
  int depth;
  std::vector<int> blocks;
  size_t next = 0;
  std::deque<std::pair<int, int>> waiting;  // block, event
};

struct Core {
  int index = 0, block_index = 0, sub_block = 0, group = 0;
  bool vector = true;
  std::array<Store, kMemories> stores;
  std::array<std::deque<Operation>, kPipes> pipes;
  std::array<Clock, kPipes> clocks;
  std::array<uint32_t, kPipes> settled{};  // a pipe's own operations up to here are known to it to be done
  std::shared_ptr<const Clock> snapshot;   // of the scalar pipe; empty after a change
  std::array<const Clock*, kPipes> seen{};
  std::map<std::pair<int, int>, Event> events;
  std::array<uint8_t, 64> event_ids{};
  std::array<int, 16> cross{};
  std::array<std::deque<Clock>, 16> cross_clocks;
  std::vector<Block> blocks;
  std::vector<Queue> queues;
  std::array<uint32_t, kMemories> used{};
  int open_pipes = 0;
  std::map<uint64_t, uint64_t> cleaned;            // cache line -> time of its last clean
  std::map<uint64_t, std::vector<uint8_t>> dirty;  // cache line -> content
  std::map<uint64_t, Call> dirty_calls;
  bool atomic = false;
  Dtype atomic_type = Dtype::kFloat;
  // registers of the vector pipe
  bool count_mode = false;
  uint64_t mask_low = ~uint64_t{0}, mask_high = ~uint64_t{0};
  std::array<uint8_t, 16> compare{};
  float dequantization = 1;
  // the stack on which its kernel runs
  ucontext_t context{};
  std::vector<char> stack;
  bool finished = false;
  Call blocked{};  // where the scalar pipe waits
  std::string fault;
  Program program;  // while recording
};

// Who touched a stretch of global memory last.
struct Epoch {
  int thread = -1;  // core * kPipes + pipe
  uint32_t clock = 0;
};
struct Stretch {
  uint64_t end;
  Epoch written;
  bool atomic = false, known = false;
  uint64_t time = 0;
  std::vector<Epoch> read;
};
struct Region {
  std::string name;
  uint64_t begin, end;
  bool read_only;
  std::map<uint64_t, Stretch> stretches;
};

struct Launch {
  AscendC::KernelType type = AscendC::KERNEL_TYPE_AIV_ONLY;
  int blocks = 1;
  uint64_t seed = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Core>> cores;
  std::map<uint64_t, Region> regions;  // by their first address
  Launch launch;
  std::string kernel;
  std::mt19937_64 random;
  std::array<int, kPipes> order{};  // of preference among pipes
  bool eager = false, shuffled = false;
  bool recording = false;  // programs for the timeline: nothing is moved or computed
  uint64_t time = 0;
  // of cross-core flags: mode, kind of core, group, id -> core -> what it knew when it arrived
  std::map<std::tuple<int, int, int, int>, std::map<int, std::deque<std::shared_ptr<const Clock>>>> arrivals;
  ucontext_t main{};
};

extern Machine machine;
extern Core* current;

// ---- faults: [[noreturn]] ones throw Fault
[[noreturn]] void fail(const Core& core, const Call& call, pipe_t pipe, const char* name, const std::string& what);
std::string stretch_text(Memory memory, uint64_t begin, uint64_t end);
std::string call_text(const Call& call);

// ---- memory.cpp
void check_access(Core& core, const Call& call, pipe_t pipe, const Access& access, bool write, bool settles = false);
void mark_written(Core& core, const Access& access);
void mark_known(Core& core, const Local& at, uint64_t offset, uint64_t bytes, bool known);
void mark_global_unknown(uint64_t begin, uint64_t end);
void poison(uint8_t* bytes, uint64_t size);
Region* region_at(uint64_t address);

// ---- arguments, at the time of issue
Memory check_local(const Call& call, pipe_t pipe, const Local& tensor, uint32_t alignment);
Access local_access(const Call& call, pipe_t pipe, const Local& tensor, uint64_t offset, uint64_t bytes,
                    bool known = true);
Access global_access(const Call& call, pipe_t pipe, const Global& tensor, uint64_t offset, uint64_t bytes,
                     bool known = true);
uint8_t* bytes_of(Core& core, Memory memory, uint64_t address);

// ---- queues
void issue(pipe_t pipe, Operation operation);
bool step(Core& core);
void drain(Core& core);
void wait_until(const Call& call, const std::function<bool()>& ready);
std::shared_ptr<const Clock> scalar_clock(Core& core);
void tick(Core& core, pipe_t pipe);
void join(Core& core, pipe_t pipe, const Clock& other);
void check_flags_at_exit(Core& core);
void take_events_of_pipe(Core& core, bool taken);
void check_buffers_at_exit(Core& core);
void cross_arrive(Core& core, const Operation& operation, std::shared_ptr<const Clock> clock);

// Runs `kernel` on all cores of a launch; the text of its fault, or "".
std::string run_launch(const std::string& name, const Launch& launch, const std::function<void()>& kernel);

int size_of(Dtype type);

// ---- record.cpp: in place of running, while recording
void record(Core& core, pipe_t pipe, const Operation& operation);
void record_flag(Core& core, Step::Kind kind, pipe_t pipe, const Call& call, int id);
void record_scalar(Core& core, const Call& call, uint64_t address);
// Cycles of an instruction of the vector pipe on `repeats` times 256 bytes of elements of `size`.
double vector_cycles(const char* api, int64_t repeats, int size);

}  // namespace emu
