// Playing recorded programs: queues in order, flags, and bandwidth that all cores share.
#include "timeline.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <queue>
#include <unordered_map>

namespace emu {
namespace {

constexpr uint64_t kLine = 128;
constexpr double kNever = std::numeric_limits<double>::infinity();

// What of a copy comes out of L2: lines used within the last `capacity` bytes that were brought in.
class L2 {
 public:
  explicit L2(double capacity) : capacity_(capacity) {}
  // The bytes that have to move between L2 and HBM.
  double missed(const Span* spans, uint32_t count) {
    double bytes = 0;
    for (uint32_t i = 0; i < count; ++i) {
      for (uint32_t row = 0; row < spans[i].count; ++row) {
        const uint64_t begin = spans[i].begin + uint64_t(int64_t(row) * spans[i].pitch);
        for (uint64_t line = begin / kLine; line * kLine < begin + spans[i].bytes; ++line) {
          double& seen = seen_at(line);
          if (brought_ - seen >= capacity_) {
            brought_ += kLine;
            bytes += kLine;
          }
          seen = brought_;
        }
      }
    }
    return bytes;
  }

 private:
  using Page = std::array<double, 512>;
  double& seen_at(uint64_t line) {
    if (line / 512 != last_ || page_ == nullptr) {
      const auto [at, fresh] = pages_.try_emplace(line / 512);
      if (fresh) at->second.fill(-kNever);
      last_ = line / 512;
      page_ = &at->second;
    }
    return (*page_)[line % 512];
  }

  double capacity_, brought_ = 0;
  std::unordered_map<uint64_t, Page> pages_;
  uint64_t last_ = 0;
  Page* page_ = nullptr;
};

// Copies under way, in four classes: by the path of their core, and by whether HBM has to take part. In a class all
// move at one rate, so that a copy ends when the class has moved on by its bytes.
class Traffic {
 public:
  explicit Traffic(const Rates& rates) : rates_(rates) {}

  void join(double now, int owner, bool cube, double bytes, double missed) {
    advance(now);
    const int index = 2 * cube + (missed > 0.5 * bytes);
    Class& to = classes_[index];
    to.ends.push({to.moved + bytes, owner, missed / bytes});
    to.weight += missed / bytes;
    share();
  }
  double next() const {
    double soonest = kNever;
    for (const Class& each : classes_) {
      if (!each.ends.empty()) soonest = std::min(soonest, now_ + (each.ends.top().at - each.moved) / each.rate);
    }
    return soonest;
  }
  // The owner of the copy that ends at next().
  int finish() {
    const double at = next();
    Class* first = nullptr;
    double soonest = kNever;
    for (Class& each : classes_) {
      if (each.ends.empty()) continue;
      const double end = now_ + (each.ends.top().at - each.moved) / each.rate;
      if (end < soonest) soonest = end, first = &each;
    }
    advance(at);
    const End done = first->ends.top();
    first->ends.pop();
    first->weight = first->ends.empty() ? 0 : first->weight - done.weight;
    share();
    return done.owner;
  }

 private:
  struct End {
    double at;
    int owner;
    double weight;
    bool operator<(const End& other) const { return at > other.at; }
  };
  struct Class {
    std::priority_queue<End> ends;
    double moved = 0, rate = 1, weight = 0;
  };

  void advance(double now) {
    for (Class& each : classes_) each.moved += each.rate * std::max(0.0, now - now_);
    now_ = std::max(now, now_);
  }
  // The rate r at which min(cap, r) of all classes, weighted, sums up to the limit.
  static double fair(double limit, const double* weights, const double* caps) {
    const int low = caps[0] <= caps[1] ? 0 : 1, high = 1 - low;
    const double all = weights[0] + weights[1];
    if (all <= 0) return kNever;
    if (limit / all <= caps[low]) return limit / all;
    return weights[high] > 0 ? std::max(caps[low], (limit - caps[low] * weights[low]) / weights[high]) : kNever;
  }
  void share() {
    const double caps[] = {rates_.vector_path, rates_.cube_path};
    const double misses[] = {classes_[1].weight, classes_[3].weight};
    const double all[] = {double(classes_[0].ends.size() + classes_[1].ends.size()),
                          double(classes_[2].ends.size() + classes_[3].ends.size())};
    const double of_l2 = fair(rates_.l2, all, caps), of_hbm = fair(rates_.hbm, misses, caps);
    for (int i = 0; i < 4; ++i) {
      classes_[i].rate = std::min({caps[i / 2], of_l2, i % 2 ? of_hbm : kNever});
    }
  }

  const Rates& rates_;
  std::array<Class, 4> classes_;
  double now_ = 0;
};

struct Lane {  // a pipe of a core
  std::vector<uint32_t> steps;
  size_t next = 0, issued = 0;
  double free = 0, started = 0;  // when it can start; when the present copy started
  // When what it did is known: to this core, and to others. What leaves a core has left its place there sooner than it
  // arrives in global memory.
  double done = 0, arrived = 0;
  bool copying = false;
};

struct Player {
  struct At {
    double time;
    int owner;
    bool operator<(const At& other) const { return time > other.time; }
  };
  struct State {
    const Program* program;
    std::vector<double> issued;
    std::array<Lane, kPipes> lanes;
    std::unordered_map<int, std::deque<double>> flags;
    std::array<std::deque<double>, 16> cross;
    size_t next = 0;
    double clock = 0;
  };

  explicit Player(const Rates& r) : rates(r), l2(r.l2_capacity), traffic(r) {
    for (auto& core : machine.cores) {
      State state;
      state.program = &core->program;
      state.issued.resize(core->program.steps.size());
      for (uint32_t i = 0; i < core->program.steps.size(); ++i) {
        const Step& step = core->program.steps[i];
        if (step.pipe != PIPE_S) state.lanes[step.pipe].steps.push_back(i);
      }
      states.push_back(std::move(state));
      result.busy.push_back({});
    }
  }

  Played play() {
    for (size_t core = 0; core < states.size(); ++core) wake(int(core), PIPE_S);
    work();
    for (;;) {
      const double copy = traffic.next(), start = starts.empty() ? kNever : starts.top().time;
      if (copy == kNever && start == kNever) break;
      if (start <= copy) {
        const int owner = starts.top().owner;
        starts.pop();
        begin_copy(start, owner / kPipes, owner % kPipes);
      } else {
        const int owner = traffic.finish();
        end_copy(copy, owner / kPipes, owner % kPipes);
      }
      work();
    }
    for (size_t i = 0; i < states.size(); ++i) {
      State& state = states[i];
      double end = state.clock;
      for (const Lane& lane : state.lanes) end = std::max({end, lane.free, lane.arrived});
      if (state.next < state.program->steps.size())
        fail(*machine.cores[i], state.program->steps[state.next].call, PIPE_S, "deadlock", "the timeline stands still");
      result.ends.push_back(end);
      result.makespan = std::max(result.makespan, end);
    }
    return std::move(result);
  }

  void wake(int core, int pipe) { woken.push_back(core * kPipes + pipe); }
  void work() {
    while (!woken.empty()) {
      const int owner = woken.front();
      woken.pop_front();
      if (owner % kPipes == PIPE_S)
        run_scalar(owner / kPipes);
      else
        run_lane(owner / kPipes, owner % kPipes);
    }
  }

  // The scalar pipe goes on until it has to wait; what it issues may start from then on.
  void run_scalar(int core) {
    State& state = states[core];
    const auto spend = [&](double cycles) {
      state.clock += cycles;
      result.busy[core][PIPE_S] += cycles;
    };
    while (state.next < state.program->steps.size()) {
      const Step& step = state.program->steps[state.next];
      if (step.pipe != PIPE_S) {
        spend(rates.issue);
        state.issued[state.next] = state.clock;
        ++state.lanes[step.pipe].issued;
        wake(core, step.pipe);
      } else if (step.kind == Step::kSet) {
        state.flags[step.id].push_back(state.clock);
        wake(core, pipes_of(HardEvent(step.id / 8)).target);
      } else if (step.kind == Step::kWait || step.kind == Step::kCrossWait) {
        auto& set = step.kind == Step::kWait ? state.flags[step.id] : state.cross[step.id];
        if (set.empty()) break;
        state.clock = std::max(state.clock, set.front());
        set.pop_front();
        spend(rates.issue);
      } else if (step.kind == Step::kBarrier) {
        bool idle = true;
        double last = state.clock;
        for (int pipe = 1; pipe < kPipes; ++pipe) {
          const Lane& lane = state.lanes[pipe];
          idle = idle && !lane.copying && lane.next == lane.issued;
          last = std::max({last, lane.free, lane.arrived});
        }
        if (!idle) break;
        state.clock = last;
      } else {
        spend(rates.issue + step.cycles * rates.scalar_miss);
      }
      ++state.next;
    }
  }

  void run_lane(int core, int pipe) {
    State& state = states[core];
    Lane& lane = state.lanes[pipe];
    while (!lane.copying && lane.next < lane.issued) {
      const uint32_t index = lane.steps[lane.next];
      const Step& step = state.program->steps[index];
      const double ready = std::max(lane.free, state.issued[index]);
      if (step.kind == Step::kWait) {
        auto& set = state.flags[step.id];
        if (set.empty()) return;
        lane.free = std::max(ready, set.front());
        set.pop_front();
      } else if (step.kind == Step::kSet) {
        lane.free = ready;
        state.flags[step.id].push_back(std::max(ready, lane.done));
        wake(core, pipes_of(HardEvent(step.id / 8)).target);
      } else if (step.kind == Step::kBarrier) {
        lane.free = std::max(ready, lane.arrived);
      } else if (step.kind == Step::kCrossSet) {
        lane.free = ready;
        arrive(core, step, std::max(ready, lane.arrived));
      } else if (step.num_spans > 0) {
        lane.copying = true;
        lane.started = ready;
        starts.push({ready + rates.copy_start, core * kPipes + pipe});
        return;
      } else {
        const double start = pipe == PIPE_V ? rates.vector_start : rates.cube_start;
        log(core, pipe, ready, ready + start + step.cycles, step.call);
        lane.free = lane.done = lane.arrived = ready + start + step.cycles;
      }
      ++lane.next;
    }
    if (!lane.copying && lane.next == lane.issued) wake_barrier(core);
  }

  // A barrier of the scalar pipe may be waiting for this pipe to be empty.
  void wake_barrier(int core) {
    const State& state = states[core];
    if (state.next >= state.program->steps.size()) return;
    const Step& step = state.program->steps[state.next];
    if (step.pipe == PIPE_S && step.kind == Step::kBarrier) wake(core, PIPE_S);
  }

  void begin_copy(double now, int core, int pipe) {
    const State& state = states[core];
    const Lane& lane = state.lanes[pipe];
    const Step& step = state.program->steps[lane.steps[lane.next]];
    const double missed =
        std::min<double>(step.bytes, l2.missed(&state.program->spans[step.first_span], step.num_spans));
    result.hbm_bytes += missed;
    result.l2_bytes += step.bytes;
    traffic.join(now, core * kPipes + pipe, !machine.cores[core]->vector, step.bytes, missed);
  }

  void end_copy(double now, int core, int pipe) {
    Lane& lane = states[core].lanes[pipe];
    log(core, pipe, lane.started, now, states[core].program->steps[lane.steps[lane.next]].call);
    lane.copying = false;
    lane.free = now;
    lane.arrived = now + rates.copy_latency;
    lane.done = pipe == PIPE_MTE2 ? lane.arrived : now;
    ++lane.next;
    wake(core, pipe);
  }

  // As in flags.cpp: when all that take part have arrived, the flag goes up where it is waited for.
  void arrive(int index, const Step& step, double time) {
    const Core& core = *machine.cores[index];
    auto& arrived = arrivals[{step.mode, core.vector, step.mode == 0 ? 0 : core.group, step.id}];
    arrived[index].push_back(time);
    std::vector<int> from, to;
    for (const auto& other : machine.cores) {
      if (step.mode != 0 && other->group != core.group) continue;
      if (other->vector == core.vector) from.push_back(other->index);
      if ((other->vector == core.vector) == (step.mode != 2)) to.push_back(other->index);
    }
    for (const int other : from) {
      if (arrived[other].empty()) return;
    }
    double last = 0;
    for (const int other : from) {
      last = std::max(last, arrived[other].front());
      arrived[other].pop_front();
    }
    for (const int other : to) {
      states[other].cross[step.id].push_back(last);
      wake(other, PIPE_S);
    }
  }

  void log(int core, int pipe, double start, double end, const Call& call) {
    result.busy[core][pipe] += end - start;
    result.log.push_back({start, end, core, pipe, call});
  }

  const Rates& rates;
  L2 l2;
  Traffic traffic;
  std::vector<State> states;
  std::deque<int> woken;
  std::priority_queue<At> starts;
  std::map<std::tuple<int, int, int, int>, std::map<int, std::deque<double>>> arrivals;
  Played result;
};

}  // namespace

Played play(const Rates& rates) { return Player(rates).play(); }

}  // namespace emu
