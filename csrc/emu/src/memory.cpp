// What each byte has seen: whether it was ever written, and who touched it last without being known to come before.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

bool before(const Clock& clock, const Epoch& epoch) { return epoch.thread < 0 || epoch.clock <= clock[epoch.thread]; }

// Only the copying pipes may overtake themselves; the compiler orders vector after vector.
bool overtakes(pipe_t pipe) { return pipe == PIPE_MTE1 || pipe == PIPE_MTE2 || pipe == PIPE_MTE3 || pipe == PIPE_FIX; }

void check_cells(Core& core, const Call& call, pipe_t pipe, const Access& access, bool write, bool settles) {
  Store& store = core.stores[int(access.memory)];
  const Clock& clock = core.clocks[pipe];
  const int base = core.index * kPipes;
  const uint32_t now = clock[base + pipe];
  for (uint64_t cell_index = access.begin / 32; cell_index * 32 < access.end; ++cell_index) {
    Cell& cell = store.cells[cell_index];
    const auto clash = [&](int other, const char* how) {
      fail(core, call, pipe, "race",
           stretch_text(access.memory, std::max(access.begin, cell_index * 32), access.end) +
               (write ? " written" : " read") + " while " + how + " by pipe " + kPipeNames[other] +
               " with no flag or barrier between");
    };
    const bool own = cell.writer == pipe && (overtakes(pipe) || settles);
    const uint32_t known_done = own ? core.settled[pipe] : clock[base + cell.writer];
    if (cell.written > known_done) clash(cell.writer, "written");
    if (write) {
      for (int other = 0; other < kPipes; ++other) {
        if (other != pipe && cell.read[other] > clock[base + other]) clash(other, "read");
      }
      cell.written = now;
      cell.writer = pipe;
      cell.read.fill(0);
    } else {
      cell.read[pipe] = now;
    }
  }
  if (!write && access.must_be_known) {
    const auto first = store.known.begin() + access.begin, last = store.known.begin() + access.end;
    const auto unknown = std::find(first, last, uint8_t{0});
    if (unknown != last) {
      const uint64_t at = access.begin + (unknown - first);
      for (int other = 0; other < kPipes; ++other) {
        for (const Operation& waiting : core.pipes[other]) {
          for (const Access& write : waiting.writes) {
            if (write.memory != access.memory || at < write.begin || at >= write.end) continue;
            fail(core, call, pipe, "race",
                 stretch_text(access.memory, access.begin, access.end) + " read before pipe " + kPipeNames[other] +
                     " wrote it at " + call_text(waiting.call) + ", with no flag or barrier between");
          }
        }
      }
      fail(core, call, pipe, "uninitialised",
           "read " + stretch_text(access.memory, access.begin, access.end) + ", of which byte " + std::to_string(at) +
               " was never written");
    }
  }
}

// Cuts so that a stretch starts at `at`.
void cut(Region& region, uint64_t at) {
  auto next = region.stretches.upper_bound(at);
  if (next == region.stretches.begin()) return;
  auto it = std::prev(next);
  if (it->first == at || it->second.end <= at) return;
  Stretch tail = it->second;
  it->second.end = at;
  region.stretches.emplace(at, std::move(tail));
}

void check_stretches(Core& core, const Call& call, pipe_t pipe, const Access& access, bool write) {
  Region* region = region_at(access.begin);
  if (write && region->read_only) {
    fail(core, call, pipe, "read-only",
         "wrote " + stretch_text(Memory::kNone, access.begin, access.end) + ", an input");
  }
  cut(*region, access.begin);
  cut(*region, access.end);
  const int thread = core.index * kPipes + pipe;
  const Clock& clock = core.clocks[pipe];
  for (auto it = region->stretches.lower_bound(access.begin); it != region->stretches.end() && it->first < access.end;
       ++it) {
    Stretch& stretch = it->second;
    const auto clash = [&](const Epoch& epoch, const char* how) {
      const int other = epoch.thread / kPipes;
      const bool conflict = write && std::strcmp(how, "written") == 0 && other != core.index;
      fail(core, call, pipe, conflict ? "write-conflict" : "race",
           stretch_text(Memory::kNone, it->first, stretch.end) + (write ? " written" : " read") + " while " + how +
               " by core " + std::to_string(other) + ", pipe " + kPipeNames[epoch.thread % kPipes] +
               " with no flag or barrier between");
    };
    const bool own = stretch.written.thread == thread && overtakes(pipe);
    const bool done = own ? stretch.written.clock <= core.settled[pipe] : before(clock, stretch.written);
    if (!done && !(write && access.atomic && stretch.atomic)) clash(stretch.written, "written");
    if (write) {
      for (const Epoch& epoch : stretch.read) {
        if (epoch.thread != thread && !before(clock, epoch)) clash(epoch, "read");
      }
      if (access.atomic && !stretch.known) {
        fail(core, call, pipe, "uninitialised",
             "added to " + stretch_text(Memory::kNone, it->first, stretch.end) + ", which was never written");
      }
      stretch.written = {thread, clock[thread]};
      stretch.atomic = access.atomic;
      stretch.known = true;
      stretch.time = machine.time;
      stretch.read.clear();
    } else {
      if (access.must_be_known && !stretch.known) {
        fail(core, call, pipe, "uninitialised",
             "read " + stretch_text(Memory::kNone, it->first, stretch.end) + ", which was never written");
      }
      auto mine =
          std::find_if(stretch.read.begin(), stretch.read.end(), [&](const Epoch& e) { return e.thread == thread; });
      if (mine == stretch.read.end())
        stretch.read.push_back({thread, clock[thread]});
      else
        mine->clock = clock[thread];
    }
  }
}

}  // namespace

Memory memory_of(TPosition position) {
  switch (position) {
    case TPosition::VECIN:
    case TPosition::VECOUT:
    case TPosition::VECCALC:
      return Memory::kUnified;
    case TPosition::A1:
    case TPosition::B1:
    case TPosition::C1:
    case TPosition::TSCM:
      return Memory::kL1;
    case TPosition::A2:
      return Memory::kL0A;
    case TPosition::B2:
      return Memory::kL0B;
    case TPosition::CO1:
      return Memory::kL0C;
    default:
      return Memory::kNone;
  }
}

int size_of(Dtype type) {
  switch (type) {
    case Dtype::kInt8:
    case Dtype::kUInt8:
      return 1;
    case Dtype::kHalf:
    case Dtype::kBFloat16:
    case Dtype::kInt16:
    case Dtype::kUInt16:
      return 2;
    case Dtype::kInt64:
    case Dtype::kUInt64:
      return 8;
    default:
      return 4;
  }
}

// NaN in every floating-point type.
void poison(uint8_t* bytes, uint64_t size) { std::memset(bytes, 0xFF, size); }

Region* region_at(uint64_t address) {
  auto next = machine.regions.upper_bound(address);
  if (next == machine.regions.begin()) return nullptr;
  Region& region = std::prev(next)->second;
  return address < region.end ? &region : nullptr;
}

void check_access(Core& core, const Call& call, pipe_t pipe, const Access& access, bool write, bool settles) {
  ++machine.time;
  if (access.begin == access.end) return;
  if (access.memory == Memory::kNone)
    check_stretches(core, call, pipe, access, write);
  else
    check_cells(core, call, pipe, access, write, settles);
}

void mark_written(Core& core, const Access& access) {
  if (access.memory == Memory::kNone) return;
  Store& store = core.stores[int(access.memory)];
  std::fill(store.known.begin() + access.begin, store.known.begin() + access.end, uint8_t{1});
}

void mark_known(Core& core, const Local& at, uint64_t offset, uint64_t bytes, bool known) {
  Store& store = core.stores[int(memory_of(at.position))];
  const auto first = store.known.begin() + at.address + offset;
  std::fill(first, first + bytes, uint8_t{known});
}

// Of what was just written to global memory: bytes that nobody ever gave a value.
void mark_global_unknown(uint64_t begin, uint64_t end) {
  Region& region = *region_at(begin);
  cut(region, begin);
  cut(region, end);
  for (auto it = region.stretches.lower_bound(begin); it != region.stretches.end() && it->first < end; ++it) {
    it->second.known = false;
  }
}

uint8_t* bytes_of(Core& core, Memory memory, uint64_t address) {
  if (memory == Memory::kNone) return reinterpret_cast<uint8_t*>(address);
  return core.stores[int(memory)].bytes.data() + address;
}

// Whether the tensor may be used at all: alive, on this kind of core, and where the instruction wants it to start.
Memory check_local(const Call& call, pipe_t pipe, const Local& tensor, uint32_t alignment) {
  Core& core = *current;
  const Memory memory = memory_of(tensor.position);
  if (memory == Memory::kNone || core.stores[int(memory)].bytes.empty()) {
    fail(core, call, pipe, "position", "the tensor is in a memory that this core does not have");
  }
  if (tensor.block >= 0) {
    const Block& block = core.blocks[tensor.block];
    if (block.generation != tensor.generation) {
      fail(core, call, pipe, "use-after-free",
           "the tensor at " + stretch_text(memory, tensor.address, tensor.address + tensor.bytes) + " was given back");
    }
    if (block.queue >= 0 && !block.in_and_out) {
      if (pipe == PIPE_MTE2 && block.position == TPosition::VECOUT) {
        fail(core, call, pipe, "position", "copied into a tensor of a VECOUT queue: its events order V before MTE3");
      }
      if (pipe == PIPE_MTE3 && block.position == TPosition::VECIN) {
        fail(core, call, pipe, "position", "copied out of a tensor of a VECIN queue: its events order MTE2 before V");
      }
    }
  }
  if (tensor.address % alignment != 0) {
    fail(core, call, pipe, "misaligned",
         std::string(kMemoryNames[int(memory)]) + " address " + std::to_string(tensor.address) + " is no multiple of " +
             std::to_string(alignment));
  }
  return memory;
}

Access local_access(const Call& call, pipe_t pipe, const Local& tensor, uint64_t offset, uint64_t bytes, bool known) {
  const Memory memory = memory_of(tensor.position);
  if (offset + bytes > tensor.bytes) {
    fail(*current, call, pipe, "out-of-bounds",
         stretch_text(memory, tensor.address + offset, tensor.address + offset + bytes) +
             " goes past the tensor's end at " + std::to_string(tensor.address + tensor.bytes));
  }
  return {memory, tensor.address + offset, tensor.address + offset + bytes, known};
}

Access global_access(const Call& call, pipe_t pipe, const Global& tensor, uint64_t offset, uint64_t bytes, bool known) {
  const uint64_t begin = reinterpret_cast<uint64_t>(tensor.address) + offset, end = begin + bytes;
  const Region* region = region_at(begin);
  if (bytes > 0 && (region == nullptr || end > region->end)) {
    fail(*current, call, pipe, "out-of-bounds", stretch_text(Memory::kNone, begin, end) + " is not inside a tensor");
  }
  if (tensor.bytes != ~uint64_t{0} && offset + bytes > tensor.bytes) {
    fail(*current, call, pipe, "out-of-bounds",
         stretch_text(Memory::kNone, begin, end) + " goes past the size given to SetGlobalBuffer, by " +
             std::to_string(offset + bytes - tensor.bytes) + " bytes");
  }
  return {Memory::kNone, begin, end, known};
}

// ---- the scalar pipe: at once, in the order of the program; global memory through the core's data cache

void scalar_read(Call call, const Local& at, void* value, uint32_t bytes) {
  check_local(call, PIPE_S, at, bytes);
  const Access access = local_access(call, PIPE_S, at, 0, bytes);
  if (machine.recording) {
    std::memset(value, 0, bytes);
    return record_scalar(*current, call, 0);
  }
  tick(*current, PIPE_S);
  check_access(*current, call, PIPE_S, access, false);
  std::memcpy(value, bytes_of(*current, access.memory, access.begin), bytes);
}

void scalar_write(Call call, const Local& at, const void* value, uint32_t bytes) {
  check_local(call, PIPE_S, at, bytes);
  const Access access = local_access(call, PIPE_S, at, 0, bytes);
  if (machine.recording) return record_scalar(*current, call, 0);
  tick(*current, PIPE_S);
  check_access(*current, call, PIPE_S, access, true);
  std::memcpy(bytes_of(*current, access.memory, access.begin), value, bytes);
  mark_written(*current, access);
}

void scalar_read(Call call, const Global& at, void* value, uint32_t bytes) {
  Core& core = *current;
  const Access access = global_access(call, PIPE_S, at, 0, bytes);
  if (machine.recording) {
    std::memcpy(value, reinterpret_cast<void*>(access.begin), bytes);
    return record_scalar(core, call, access.begin);
  }
  const uint64_t line = access.begin / 64 * 64;
  if (auto dirty = core.dirty.find(line); dirty != core.dirty.end()) {
    std::memcpy(value, dirty->second.data() + (access.begin - line), bytes);
    return;
  }
  tick(core, PIPE_S);
  check_access(core, call, PIPE_S, access, false);
  Region& region = *region_at(access.begin);
  const auto it = std::prev(region.stretches.upper_bound(access.begin));
  const auto cleaned = core.cleaned.find(line);
  if (it->second.time > (cleaned == core.cleaned.end() ? 0 : cleaned->second)) {
    fail(core, call, PIPE_S, "scalar-cache",
         stretch_text(Memory::kNone, access.begin, access.end) +
             " was written in this launch; clean its cache line before reading it");
  }
  std::memcpy(value, reinterpret_cast<void*>(access.begin), bytes);
}

void scalar_write(Call call, const Global& at, const void* value, uint32_t bytes) {
  Core& core = *current;
  const Access access = global_access(call, PIPE_S, at, 0, bytes);
  if (machine.recording) return record_scalar(core, call, access.begin);
  tick(core, PIPE_S);
  check_access(core, call, PIPE_S, access, true);
  const uint64_t line = access.begin / 64 * 64;
  auto& content = core.dirty[line];
  if (content.empty()) {
    content.resize(64);
    const Region& region = *region_at(access.begin);
    const uint64_t from = std::max(line, region.begin), to = std::min(line + 64, region.end);
    std::memcpy(content.data() + (from - line), reinterpret_cast<void*>(from), to - from);
  }
  std::memcpy(content.data() + (access.begin - line), value, bytes);
  core.dirty_calls[line] = call;
}

void clean_cache(Call call, const Global& at, bool whole) {
  Core& core = *current;
  const uint64_t address = reinterpret_cast<uint64_t>(at.address);
  if (region_at(address) == nullptr) fail(core, call, PIPE_S, "out-of-bounds", "the address is not inside a tensor");
  if (machine.recording) return record_scalar(core, call, address);
  ++machine.time;
  for (auto it = core.dirty.begin(); it != core.dirty.end();) {
    if (!whole && it->first != address / 64 * 64) {
      ++it;
      continue;
    }
    const Region& region = *region_at(std::max(it->first, region_at(address)->begin));
    const uint64_t from = std::max(it->first, region.begin), to = std::min(it->first + 64, region.end);
    std::memcpy(reinterpret_cast<void*>(from), it->second.data() + (from - it->first), to - from);
    core.cleaned[it->first] = machine.time;
    it = core.dirty.erase(it);
  }
  if (!whole) core.cleaned[address / 64 * 64] = machine.time;
}

}  // namespace emu
