// Flags between the pipes of a core, barriers, and flags between cores.
#include <algorithm>

#include "machine.h"

namespace emu {
namespace {

constexpr int kUserIds = 6;        // 6 and 7 are the system's
constexpr int kPipeIds = 3;        // of M_MTE1, a cube core's TPipe takes the first, and sets them
constexpr int kUserCrossIds = 11;  // 11 to 14 are SyncAll's

std::string event_text(HardEvent event, int id) {
  const EventPipes pipes = pipes_of(event);
  return std::string("flag ") + kPipeNames[pipes.source] + "_" + kPipeNames[pipes.target] + " " + std::to_string(id);
}

bool mixed() {
  return machine.launch.type != AscendC::KERNEL_TYPE_AIV_ONLY && machine.launch.type != AscendC::KERNEL_TYPE_AIC_ONLY;
}

void issue_cross_set(const Call& call, int mode, pipe_t pipe, int id) {
  Operation operation;
  operation.kind = Operation::kCrossSet;
  operation.call = call;
  operation.mode = mode;
  operation.id = id;
  issue(pipe, std::move(operation));
}

void take_cross_flag(const Call& call, int id) {
  Core& core = *current;
  if (machine.recording) return record_flag(core, Step::kCrossWait, PIPE_S, call, id);
  wait_until(call, [&core, id] { return core.cross[id] > 0; });
  ++machine.time;
  --core.cross[id];
  join(core, PIPE_S, core.cross_clocks[id].front());
  core.cross_clocks[id].pop_front();
}

void check_cross(const Call& call, int mode, int64_t id) {
  if (!mixed()) fail(*current, call, PIPE_S, "flag", "flags between cores need a MIX kernel type");
  if (mode != 0 && machine.launch.type != AscendC::KERNEL_TYPE_MIX_AIC_1_1 &&
      machine.launch.type != AscendC::KERNEL_TYPE_MIX_AIC_1_2) {
    fail(*current, call, PIPE_S, "flag", "modes 1 and 2 need cube and vector cores in one launch");
  }
  if (id < 0 || id >= kUserCrossIds) fault_argument(call, "flag id", id, 0, kUserCrossIds - 1);
}

void check_event_id(const Core& core, const Call& call, HardEvent event, int32_t id, bool of_queue) {
  const int first = event == HardEvent::M_MTE1 && !core.vector && core.open_pipes > 0 ? kPipeIds : 0;
  if (!of_queue && (id < first || id >= kUserIds)) fault_argument(call, "event id", id, first, kUserIds - 1);
}

}  // namespace

EventPipes pipes_of(HardEvent event) {
  static constexpr EventPipes table[] = {
      {PIPE_MTE2, PIPE_V},    {PIPE_V, PIPE_MTE2},    {PIPE_V, PIPE_MTE3},    {PIPE_MTE3, PIPE_V},
      {PIPE_MTE3, PIPE_MTE2}, {PIPE_MTE2, PIPE_MTE3}, {PIPE_V, PIPE_S},       {PIPE_S, PIPE_V},
      {PIPE_MTE2, PIPE_S},    {PIPE_S, PIPE_MTE2},    {PIPE_S, PIPE_MTE3},    {PIPE_MTE3, PIPE_S},
      {PIPE_MTE2, PIPE_MTE1}, {PIPE_MTE1, PIPE_MTE2}, {PIPE_MTE1, PIPE_M},    {PIPE_M, PIPE_MTE1},
      {PIPE_M, PIPE_FIX},     {PIPE_FIX, PIPE_M},     {PIPE_FIX, PIPE_MTE2},  {PIPE_MTE2, PIPE_FIX},
      {PIPE_FIX, PIPE_S},     {PIPE_MTE3, PIPE_MTE1}, {PIPE_MTE1, PIPE_MTE3}, {PIPE_M, PIPE_S},
      {PIPE_FIX, PIPE_MTE3}};
  static_assert(sizeof(table) / sizeof(table[0]) == size_t(HardEvent::MAX), "one pair of pipes for each event");
  return table[int(event)];
}

void take_events_of_pipe(Core& core, bool taken) {
  if (core.vector) return;
  uint8_t& ids = core.event_ids[int(HardEvent::M_MTE1)];
  const uint8_t those = (1 << kPipeIds) - 1;
  ids = taken ? ids | those : ids & ~those;
}

void set_flag(Call call, HardEvent event, int32_t id, bool of_queue) {
  Core& core = *current;
  const pipe_t pipe = pipes_of(event).source;
  check_event_id(core, call, event, id, of_queue);
  Event& state = core.events[{int(event), id}];
  if (state.outstanding > 0)
    fail(core, call, pipe, "flag-set-twice", event_text(event, id) + " was set and not waited for");
  ++state.outstanding;
  if (machine.recording) return record_flag(core, Step::kSet, pipe, call, int(event) * 8 + id);
  if (pipe == PIPE_S) {
    tick(core, PIPE_S);
    state.set.push_back(scalar_clock(core));
    return;
  }
  Operation operation;
  operation.kind = Operation::kSet;
  operation.call = call;
  operation.event = event;
  operation.id = id;
  issue(pipe, std::move(operation));
}

void wait_flag(Call call, HardEvent event, int32_t id, bool of_queue) {
  Core& core = *current;
  const pipe_t pipe = pipes_of(event).target;
  check_event_id(core, call, event, id, of_queue);
  Event& state = core.events[{int(event), id}];
  if (state.outstanding == 0)
    fail(core, call, pipe, "flag-unpaired", event_text(event, id) + " is waited for and was not set");
  --state.outstanding;
  if (machine.recording) return record_flag(core, Step::kWait, pipe, call, int(event) * 8 + id);
  if (pipe == PIPE_S) {
    wait_until(call, [&state] { return !state.set.empty(); });
    ++machine.time;
    join(core, PIPE_S, *state.set.front());
    state.set.pop_front();
    return;
  }
  Operation operation;
  operation.kind = Operation::kWait;
  operation.call = call;
  operation.event = event;
  operation.id = id;
  issue(pipe, std::move(operation));
}

void pipe_barrier(Call call, pipe_t pipe) {
  Core& core = *current;
  if (pipe != PIPE_ALL) {
    Operation operation;
    operation.kind = Operation::kBarrier;
    operation.call = call;
    return issue(pipe, std::move(operation));
  }
  if (machine.recording) return record_flag(core, Step::kBarrier, PIPE_S, call, 0);
  for (int each = 1; each < kPipes; ++each) {
    wait_until(call, [&core, each] { return core.pipes[each].empty(); });
  }
  for (int each = 1; each < kPipes; ++each) join(core, PIPE_S, core.clocks[each]);
}

// A flag that is set when the kernel ends is found set by the next kernel.
void check_flags_at_exit(Core& core) {
  for (const auto& [key, state] : core.events) {
    if (state.outstanding > 0) {
      fail(core, {"SetFlag", {machine.kernel.c_str(), 0}}, pipes_of(HardEvent(key.first)).source, "flag-left-set",
           event_text(HardEvent(key.first), key.second) + " was set and never waited for");
    }
  }
}

int8_t free_event(Call call, HardEvent event) {
  const uint8_t taken = current->event_ids[int(event)];
  for (int id = 0; id < kUserIds; ++id) {
    if (!(taken >> id & 1)) return static_cast<int8_t>(id);
  }
  fail(*current, call, PIPE_S, "event-ids", "all ids of this event are taken");
}

int8_t allocate_event(Call call, HardEvent event) {
  const int8_t id = free_event(call, event);
  current->event_ids[int(event)] |= uint8_t(1 << id);
  return id;
}

void release_event(Call call, HardEvent event, int32_t id) {
  uint8_t& taken = current->event_ids[int(event)];
  if (id < 0 || id >= kUserIds || !(taken >> id & 1))
    fail(*current, call, PIPE_S, "event-ids", "the id was not allocated");
  taken &= uint8_t(~(1 << id));
}

void cross_core_set(Call call, int mode, pipe_t pipe, int64_t id) {
  check_cross(call, mode, id);
  issue_cross_set(call, mode, pipe, int(id));
}

void cross_core_wait(Call call, int mode, int64_t id) {
  check_cross(call, mode, id);
  take_cross_flag(call, int(id));
}

// When all that take part have arrived, the counter of each core that waits goes up.
void cross_arrive(Core& core, const Operation& operation, std::shared_ptr<const Clock> clock) {
  const int mode = operation.mode, id = operation.id;
  auto& arrived = machine.arrivals[{mode, core.vector, mode == 0 ? 0 : core.group, id}];
  arrived[core.index].push_back(std::move(clock));
  std::vector<Core*> from, to;
  for (auto& other : machine.cores) {
    if (mode != 0 && other->group != core.group) continue;
    if (other->vector == core.vector) from.push_back(other.get());
    if ((other->vector == core.vector) == (mode != 2)) to.push_back(other.get());
  }
  for (Core* other : from) {
    if (arrived[other->index].empty()) return;
  }
  Clock known(core.clocks[0].size(), 0);
  for (Core* other : from) {
    const Clock& its = *arrived[other->index].front();
    for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], its[i]);
    arrived[other->index].pop_front();
  }
  for (Core* other : to) {
    if (++other->cross[id] > 15)
      fail(core, operation.call, PIPE_S, "flag-counter",
           "the counter of flag " + std::to_string(id) + " on core " + std::to_string(other->index) + " goes past 15");
    other->cross_clocks[id].push_back(known);
  }
}

// All cores wait for each other: vector cores among themselves, then through their cube cores.
void sync_all(Call call, bool vector_only) {
  if (!mixed()) fail(*current, call, PIPE_S, "flag", "SyncAll needs a MIX kernel type");
  pipe_barrier(call, PIPE_ALL);
  const bool vector = current->vector;
  if (vector_only && !vector) fail(*current, call, PIPE_S, "flag", "SyncAll<true> is for vector cores");
  if (vector) {
    issue_cross_set(call, 0, PIPE_MTE3, 14);
    take_cross_flag(call, 14);
    if (vector_only) return;
    issue_cross_set(call, 2, PIPE_MTE3, 12);
    take_cross_flag(call, 13);
  } else {
    take_cross_flag(call, 12);
    issue_cross_set(call, 0, PIPE_FIX, 11);
    take_cross_flag(call, 11);
    issue_cross_set(call, 2, PIPE_FIX, 13);
  }
}

}  // namespace emu
