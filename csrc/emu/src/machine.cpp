// Launching: cores on stacks of their own, and which pipe's operation runs next.
#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>

namespace emu {

Machine machine;
Core* current = nullptr;
const char* const kMemoryNames[] = {"UB", "L1", "L0A", "L0B", "L0C", "GM"};
const char* const kPipeNames[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX", "ALL"};

namespace {

constexpr uint32_t kSizes[kMemories] = {kUnified, 512 * 1024, 64 * 1024, 64 * 1024, 128 * 1024};
constexpr size_t kStack = 256 * 1024, kMostWaiting = 1000000;

const char* file_of(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

const std::function<void()>* entry = nullptr;

void run_core() {
  try {
    (*entry)();
    drain(*current);
    for (int pipe = 1; pipe < kPipes; ++pipe) {
      wait_until({"the end of the kernel", {machine.kernel.c_str(), 0}},
                 [pipe] { return current->pipes[pipe].empty(); });
    }
    check_flags_at_exit(*current);
    check_buffers_at_exit(*current);
  } catch (const Fault& fault) {
    current->fault = fault.text;
  }
  current->finished = true;
  swapcontext(&current->context, &machine.main);
}

void make_core(int index, int block, int sub_block, bool vector, int threads) {
  auto core = std::make_unique<Core>();
  core->index = index;
  core->block_index = block;
  core->sub_block = sub_block;
  core->vector = vector;
  for (int memory = 0; memory < kMemories; ++memory) {
    if (vector != (memory == int(Memory::kUnified))) continue;
    Store& store = core->stores[memory];
    store.bytes.resize(kSizes[memory]);
    poison(store.bytes.data(), kSizes[memory]);
    store.known.assign(kSizes[memory], 0);
    store.cells.resize(kSizes[memory] / 32);
  }
  for (Clock& clock : core->clocks) clock.assign(threads, 0);
  machine.cores.push_back(std::move(core));
}

void make_cores(const Launch& launch) {
  using namespace AscendC;
  const int cubes = launch.type == KERNEL_TYPE_AIV_ONLY || launch.type == KERNEL_TYPE_MIX_AIV_1_0 ? 0 : 1;
  const int vectors = launch.type == KERNEL_TYPE_AIC_ONLY || launch.type == KERNEL_TYPE_MIX_AIC_1_0 ? 0
                      : launch.type == KERNEL_TYPE_MIX_AIC_1_2                                      ? 2
                                                                                                    : 1;
  const int threads = launch.blocks * (cubes + vectors) * kPipes;
  machine.cores.clear();
  for (int block = 0; block < launch.blocks; ++block) {
    if (cubes) make_core(int(machine.cores.size()), block, 0, false, threads);
    for (int sub = 0; sub < vectors; ++sub) {
      make_core(int(machine.cores.size()), cubes ? block * vectors + sub : block, sub, true, threads);
    }
    for (auto& core : machine.cores) {
      if (int(core->index) >= block * (cubes + vectors)) core->group = block;
    }
  }
}

// Seed 0 runs each operation as soon as its flags allow; 1 to 6, and 20 to 25 for the pipes of cube cores, let one pipe
// always come last, or first; others draw lots.
void set_order(uint64_t seed) {
  machine.random.seed(seed);
  machine.eager = seed == 0;
  const bool cube = seed >= 20 && seed <= 25;
  machine.shuffled = seed > 6 && !cube;
  machine.order = {PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX};
  const auto move = [](pipe_t pipe, bool front) {
    auto at = std::find(machine.order.begin(), machine.order.end(), pipe);
    if (front)
      std::rotate(machine.order.begin(), at, at + 1);
    else
      std::rotate(at, at + 1, machine.order.end());
  };
  if (seed == 1) move(PIPE_MTE2, false);
  if (seed == 2) move(PIPE_MTE2, true);
  if (seed == 3) move(PIPE_MTE3, false);
  if (seed == 4) move(PIPE_MTE3, true);
  if (seed == 5) move(PIPE_V, false);
  if (seed == 6) move(PIPE_V, true);
  if (cube) move(std::array{PIPE_M, PIPE_MTE1, PIPE_FIX}[(seed - 20) / 2], seed % 2 == 1);
}

bool ready(Core& core, const Operation& operation) {
  if (operation.kind != Operation::kWait) return true;
  return !core.events[{int(operation.event), operation.id}].set.empty();
}

void run_operation(Core& core, pipe_t pipe, Operation& operation) {
  if (operation.issued && operation.issued.get() != core.seen[pipe]) {
    join(core, pipe, *operation.issued);
    core.seen[pipe] = operation.issued.get();
  }
  tick(core, pipe);
  ++machine.time;
  switch (operation.kind) {
    case Operation::kBarrier:
      core.settled[pipe] = core.clocks[pipe][core.index * kPipes + pipe];
      break;
    case Operation::kSet:
      core.events[{int(operation.event), operation.id}].set.push_back(std::make_shared<const Clock>(core.clocks[pipe]));
      break;
    case Operation::kWait: {
      auto& set = core.events[{int(operation.event), operation.id}].set;
      join(core, pipe, *set.front());
      set.pop_front();
      break;
    }
    case Operation::kCrossSet:
      cross_arrive(core, operation, std::make_shared<const Clock>(core.clocks[pipe]));
      break;
    case Operation::kWork:
      for (const Access& access : operation.reads)
        check_access(core, operation.call, pipe, access, false, operation.settles);
      for (const Access& access : operation.writes) check_access(core, operation.call, pipe, access, true);
      Core* const before = current;
      current = &core;
      operation.run();
      current = before;
      if (!operation.marks_itself) {
        for (const Access& access : operation.writes) mark_written(core, access);
      }
  }
}

std::string blocked_text() {
  std::string text;
  int shown = 0;
  for (const auto& core : machine.cores) {
    const auto add = [&](int pipe, const Call& call) {
      if (shown++ < 6) {
        text += std::string("; core ") + std::to_string(core->index) + " pipe " + kPipeNames[pipe] + " at " +
                call_text(call);
      }
    };
    if (!core->finished) add(PIPE_S, core->blocked);
    for (int pipe = 1; pipe < kPipes; ++pipe) {
      if (!core->pipes[pipe].empty()) add(pipe, core->pipes[pipe].front().call);
    }
  }
  return text;
}

}  // namespace

std::string call_text(const Call& call) {
  return std::string(file_of(call.where.file)) + ":" + std::to_string(call.where.line) + " " + call.api;
}

std::string stretch_text(Memory memory, uint64_t begin, uint64_t end) {
  char text[160];
  if (memory == Memory::kNone) {
    const Region* region = region_at(begin);
    std::snprintf(text, sizeof(text), "GM %s[%llu, %llu)", region ? region->name.c_str() : "?",
                  static_cast<unsigned long long>(begin - (region ? region->begin : 0)),
                  static_cast<unsigned long long>(end - (region ? region->begin : 0)));
  } else {
    std::snprintf(text, sizeof(text), "%s[%llu, %llu)", kMemoryNames[int(memory)],
                  static_cast<unsigned long long>(begin), static_cast<unsigned long long>(end));
  }
  return text;
}

void fail(const Core& core, const Call& call, pipe_t pipe, const char* name, const std::string& what) {
  throw Fault{std::string(name) + ": " + file_of(call.where.file) + ":" + std::to_string(call.where.line) + ": " +
              call.api + " on core " + std::to_string(core.index) + " (" + (core.vector ? "AIV" : "AIC") + "), pipe " +
              kPipeNames[pipe] + ": " + what};
}

void fault_argument(Call call, const char* what, int64_t value, int64_t low, int64_t high) {
  fail(*current, call, PIPE_S, "argument",
       std::string(what) + " " + std::to_string(value) + ", expected " + std::to_string(low) + " to " +
           std::to_string(high));
}

void assertion_failed(const char* what, Where where) {
  fail(*current, {"ASSERT", where}, PIPE_S, "assertion", std::string(what) + " does not hold");
}

bool is_aiv() { return current->vector; }
int64_t block_index() { return current->block_index; }
int64_t block_count() { return machine.launch.blocks; }
int64_t sub_block_index() { return current->sub_block; }
int64_t sub_block_count() { return machine.launch.type == AscendC::KERNEL_TYPE_MIX_AIC_1_2 ? 2 : 1; }

void declare_kernel_type(AscendC::KernelType type, Where where) {
  if (type != machine.launch.type) {
    fail(*current, {"KERNEL_TASK_TYPE_DEFAULT", where}, PIPE_S, "kernel-type", "the launch is of another type");
  }
}

void tick(Core& core, pipe_t pipe) {
  ++core.clocks[pipe][core.index * kPipes + pipe];
  if (pipe == PIPE_S) core.snapshot.reset();
}

// Whoever waits for a flag knows all that its setter knew.
void join(Core& core, pipe_t pipe, const Clock& other) {
  Clock& clock = core.clocks[pipe];
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
  core.settled[pipe] = std::max(core.settled[pipe], other[core.index * kPipes + pipe]);
  if (pipe == PIPE_S) core.snapshot.reset();
}

std::shared_ptr<const Clock> scalar_clock(Core& core) {
  if (!core.snapshot) core.snapshot = std::make_shared<const Clock>(core.clocks[PIPE_S]);
  return core.snapshot;
}

void issue(pipe_t pipe, Operation operation) {
  Core& core = *current;
  if (machine.recording) return record(core, pipe, operation);
  operation.issued = scalar_clock(core);
  if (core.pipes[pipe].size() > kMostWaiting)
    fail(core, operation.call, pipe, "runaway", "a million operations wait: a loop without an end");
  core.pipes[pipe].push_back(std::move(operation));
  if (machine.eager) {
    drain(core);
  } else if (machine.shuffled && machine.random() % 4 == 0) {
    step(core);
  }
}

// Runs one operation of `core`, if any pipe's next one may run.
bool step(Core& core) {
  std::array<int, kPipes> order = machine.order;
  if (machine.shuffled) std::shuffle(order.begin(), order.end(), machine.random);
  for (const int pipe : order) {
    auto& queue = core.pipes[pipe];
    if (queue.empty() || !ready(core, queue.front())) continue;
    Operation operation = std::move(queue.front());
    queue.pop_front();
    run_operation(core, static_cast<pipe_t>(pipe), operation);
    // The clock that was joined may be freed with its last operation, and its address come again.
    if (queue.empty()) core.seen[pipe] = nullptr;
    return true;
  }
  return false;
}

void drain(Core& core) {
  while (step(core)) {
  }
}

// The scalar pipe stands until `ready`; meanwhile this core's pipes run, then others' turn comes.
void wait_until(const Call& call, const std::function<bool()>& ready) {
  Core& core = *current;
  core.blocked = call;
  while (!ready()) {
    if (!step(core)) {
      swapcontext(&core.context, &machine.main);
      if (!core.fault.empty()) throw Fault{core.fault};
    }
  }
}

std::string run_launch(const std::string& name, const Launch& launch, const std::function<void()>& kernel) {
  machine.launch = launch;
  machine.kernel = name;
  machine.arrivals.clear();
  set_order(launch.seed);
  make_cores(launch);
  for (auto& [begin, region] : machine.regions) {
    for (auto& [at, stretch] : region.stretches) {  // a launch is a barrier: what came before it is done
      stretch.written = {};
      stretch.read.clear();
      stretch.time = 0;
      stretch.atomic = false;
    }
  }
  entry = &kernel;
  std::vector<Core*> order;
  for (auto& core : machine.cores) {
    order.push_back(core.get());
    core->stack.resize(kStack);
    getcontext(&core->context);
    core->context.uc_stack.ss_sp = core->stack.data();
    core->context.uc_stack.ss_size = kStack;
    core->context.uc_link = nullptr;
    makecontext(&core->context, run_core, 0);
  }
  if (launch.seed % 2 == 1) std::reverse(order.begin(), order.end());
  std::string fault;
  const auto stop = [&](const std::string& text) {
    fault = text;
    for (auto& core : machine.cores) {  // unwind what still stands on a stack
      if (core->finished || core->stack.empty() || core->blocked.api == nullptr) continue;
      core->fault = text;
      current = core.get();
      swapcontext(&machine.main, &core->context);
    }
  };
  size_t unfinished = order.size();
  while (unfinished > 0 && fault.empty()) {
    if (machine.shuffled) std::shuffle(order.begin(), order.end(), machine.random);
    const uint64_t before = machine.time;
    const size_t unfinished_before = unfinished;
    for (Core* core : order) {
      if (core->finished) continue;
      current = core;
      swapcontext(&machine.main, &core->context);
      if (!core->fault.empty()) {
        stop(core->fault);
        break;
      }
      if (core->finished) --unfinished;
    }
    if (fault.empty() && unfinished == unfinished_before && machine.time == before) {
      stop("deadlock: nothing can go on" + blocked_text());
    }
  }
  if (fault.empty()) {
    for (const auto& core : machine.cores) {
      for (int id = 0; id < 16; ++id) {
        if (core->cross[id] != 0) {
          try {
            fail(*core, {"CrossCoreSetFlag", {name.c_str(), 0}}, PIPE_S, "flag-left-set",
                 "flag " + std::to_string(id) + " still counts " + std::to_string(core->cross[id]) + " at the end");
          } catch (const Fault& left) {
            fault = left.text;
          }
        }
      }
    }
  }
  current = nullptr;
  return fault;
}

}  // namespace emu
