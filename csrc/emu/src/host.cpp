// The C interface: tensors between guard pages, and launches by a kernel's name.
#include "emu/host.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "timeline.h"

namespace emu {
namespace {

constexpr uint64_t kGuard = uint64_t{64} << 20;

struct Known {
  Entry entry;
  int num_words;
};
std::map<std::string, Known>& kernels() {
  static std::map<std::string, Known> all;
  return all;
}

uint64_t pages(uint64_t bytes) {
  const uint64_t page = uint64_t(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

Registration::Registration(const char* name, Entry entry, int num_words) { kernels()[name] = {entry, num_words}; }

extern "C" {

// Forgets all tensors.
void emu_reset() {
  for (auto& [begin, region] : machine.regions) {
    munmap(reinterpret_cast<void*>(begin - kGuard), pages(region.end - region.begin) + 2 * kGuard);
  }
  machine.regions.clear();
}

// A tensor of global memory; its address. Without `data` it was never written; with `input` a kernel may not write it.
uint64_t emu_tensor(const char* name, const void* data, uint64_t bytes, int input) {
  const uint64_t size = pages(bytes);
  void* reserved = mmap(nullptr, size + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return 0;
  uint8_t* const address = static_cast<uint8_t*>(reserved) + kGuard;
  mprotect(address, size, PROT_READ | PROT_WRITE);
  if (data != nullptr)
    std::memcpy(address, data, bytes);
  else
    poison(address, bytes);
  const uint64_t begin = reinterpret_cast<uint64_t>(address);
  Region region{name, begin, begin + bytes, input != 0, {}};
  if (bytes > 0) {
    Stretch stretch{};
    stretch.end = begin + bytes;
    stretch.known = data != nullptr;
    region.stretches.emplace(begin, stretch);
  }
  machine.regions.emplace(begin, std::move(region));
  return begin;
}

void emu_read(uint64_t address, void* target, uint64_t bytes) {
  std::memcpy(target, reinterpret_cast<void*>(address), bytes);
}

// How many bytes of a tensor were never written.
uint64_t emu_unwritten(uint64_t address) {
  uint64_t count = 0;
  for (const auto& [begin, stretch] : machine.regions.at(address).stretches) {
    if (!stretch.known) count += stretch.end - begin;
  }
  return count;
}

// Runs a kernel; 0, or 1 with its fault in `text`.
int emu_launch(const char* name, int type, int blocks, uint64_t seed, const uint64_t* words, int num_words, char* text,
               uint64_t size) {
  const auto found = kernels().find(name);
  std::string fault;
  if (found == kernels().end())
    fault = std::string("unknown kernel ") + name;
  else if (found->second.num_words != num_words)
    fault = std::string(name) + " takes " + std::to_string(found->second.num_words) + " arguments, got " +
            std::to_string(num_words);
  else
    fault =
        run_launch(name, {static_cast<AscendC::KernelType>(type), blocks, seed}, [&] { found->second.entry(words); });
  std::snprintf(text, size, "%s", fault.c_str());
  return !fault.empty();
}

// A tensor that only the timeline reads the place of: its pages stay untouched, and read as zeros.
uint64_t emu_reserve(const char* name, uint64_t bytes) {
  void* memory =
      mmap(nullptr, pages(bytes) + 2 * kGuard, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 0;
  const uint64_t begin = reinterpret_cast<uint64_t>(memory) + kGuard;
  machine.regions.emplace(begin, Region{name, begin, begin + bytes, false, {}});
  return begin;
}

// Records a kernel and plays it; 0, or 1 with its fault in `text`. summary: makespan, bytes of HBM, bytes of L2,
// products of 16 x 16 x 16, cores; then for each core whether it is a vector core, when it ended and how long each pipe
// was busy.
static Played played;
int emu_model(const char* name, int type, int blocks, const uint64_t* words, int num_words, const double* rates,
              double* summary, char* text, uint64_t size) {
  machine.recording = true;
  int failed = emu_launch(name, type, blocks, 0, words, num_words, text, size);
  machine.recording = false;
  if (failed) return failed;
  Rates given;
  std::memcpy(&given, rates, sizeof(given));
  try {
    played = play(given);
  } catch (const Fault& fault) {
    std::snprintf(text, size, "%s", fault.text.c_str());
    return 1;
  }
  double products = 0;
  for (const auto& core : machine.cores) products += core->program.products;
  double* out = summary;
  for (const double value :
       {played.makespan, played.hbm_bytes, played.l2_bytes, products, double(machine.cores.size())})
    *out++ = value;
  for (size_t i = 0; i < machine.cores.size(); ++i) {
    *out++ = machine.cores[i]->vector;
    *out++ = played.ends[i];
    for (const double busy : played.busy[i]) *out++ = busy;
  }
  return 0;
}

// What was played on one core: start and end of each entry, its pipe, its line and its call; how many there are.
uint64_t emu_log(int core, uint64_t capacity, double* times, int32_t* places, const char** calls) {
  uint64_t count = 0;
  for (const Played::Entry& entry : played.log) {
    if (entry.core != core) continue;
    if (count < capacity) {
      times[2 * count] = entry.start;
      times[2 * count + 1] = entry.end;
      places[2 * count] = entry.pipe;
      places[2 * count + 1] = entry.call.where.line;
      calls[count] = entry.call.api;
    }
    ++count;
  }
  return count;
}

// For checks of single calls: the memory of the core that runs, as if it had been written.
void emu_fill(int memory, uint32_t address, const void* data, uint64_t bytes) {
  Store& store = current->stores[memory];
  std::memcpy(store.bytes.data() + address, data, bytes);
  std::fill(store.known.begin() + address, store.known.begin() + address + bytes, uint8_t{1});
}
void emu_peek(int memory, uint32_t address, void* data, uint64_t bytes) {
  std::memcpy(data, machine.cores[0]->stores[memory].bytes.data() + address, bytes);
}

}  // extern "C"

}  // namespace emu
