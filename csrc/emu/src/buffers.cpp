// TPipe's book-keeping: pieces of memory, who holds each, and the events that queues set and wait for.
#include <exception>

#include "machine.h"

namespace emu {
namespace {

constexpr uint32_t kCapacity[kMemories] = {kHandedOut, 512 * 1024 - 256, 64 * 1024, 64 * 1024, 128 * 1024};
constexpr size_t kMostBuffers = 64, kMostHeld = 8;

int new_block(const Call& call, TPosition position, int64_t bytes, bool in_and_out, int queue) {
  Core& core = *current;
  const Memory memory = memory_of(position);
  if (core.open_pipes == 0) fail(core, call, PIPE_S, "queue", "no TPipe is alive");
  if (memory == Memory::kNone || core.stores[int(memory)].bytes.empty()) {
    fail(core, call, PIPE_S, "position", "a buffer in a memory that this core does not have");
  }
  if (bytes <= 0) fault_argument(call, "len", bytes, 1, kCapacity[int(memory)]);
  const int64_t rounded = (bytes + 31) / 32 * 32;
  uint32_t& used = core.used[int(memory)];
  if (used + rounded > kCapacity[int(memory)]) {
    fail(core, call, PIPE_S, "memory-limit",
         std::string(kMemoryNames[int(memory)]) + ": " + std::to_string(rounded) + " bytes asked for with " +
             std::to_string(used) + " handed out, of " + std::to_string(kCapacity[int(memory)]));
  }
  if (core.blocks.size() >= kMostBuffers) fail(core, call, PIPE_S, "memory-limit", "more than 64 buffers");
  Block block;
  block.position = position;
  block.in_and_out = in_and_out;
  block.address = used;
  block.bytes = static_cast<uint32_t>(rounded);
  block.queue = queue;
  block.last = call;
  used += static_cast<uint32_t>(rounded);
  core.blocks.push_back(block);
  return int(core.blocks.size()) - 1;
}

Local tensor_of(int index) {
  const Block& block = current->blocks[index];
  return {block.position, block.address, block.bytes, index, block.generation};
}

EventPipes ways_of(TPosition source, TPosition target) {
  const auto is = [&](TPosition a, TPosition b) { return source == a && target == b; };
  if (is(TPosition::GM, TPosition::VECIN)) return {PIPE_MTE2, PIPE_V};
  if (is(TPosition::VECOUT, TPosition::GM)) return {PIPE_V, PIPE_MTE3};
  if (is(TPosition::VECIN, TPosition::VECOUT)) return {PIPE_MTE2, PIPE_MTE3};
  if (is(TPosition::GM, TPosition::A1) || is(TPosition::GM, TPosition::B1)) return {PIPE_MTE2, PIPE_MTE1};
  if (is(TPosition::A2, TPosition::A2) || is(TPosition::B2, TPosition::B2)) return {PIPE_MTE1, PIPE_M};
  if (is(TPosition::CO1, TPosition::CO1)) return {PIPE_M, PIPE_FIX};
  return {PIPE_V, PIPE_V};
}

HardEvent event_from(pipe_t source, pipe_t target) {
  for (int event = 0; event < int(HardEvent::MAX); ++event) {
    const EventPipes pipes = pipes_of(HardEvent(event));
    if (pipes.source == source && pipes.target == target) return HardEvent(event);
  }
  return HardEvent::MAX;
}

int set_new(const Call& call, pipe_t source, pipe_t target) {
  if (source == target) return -1;
  const HardEvent event = event_from(source, target);
  const int id = allocate_event(call, event);
  set_flag(call, event, id, true);
  return id;
}

void wait_old(const Call& call, pipe_t source, pipe_t target, int id) {
  if (id < 0) return;
  const HardEvent event = event_from(source, target);
  wait_flag(call, event, id, true);
  release_event(call, event, id);
}

Queue& queue_of(const Call& call, int32_t number) {
  if (number < 0 || number >= int32_t(current->queues.size()))
    fail(*current, call, PIPE_S, "queue", "InitBuffer was not called");
  return current->queues[number];
}

Block& held_block(const Call& call, int32_t number, const Local& tensor) {
  Core& core = *current;
  if (tensor.block < 0 || core.blocks[tensor.block].queue != number) {
    fail(core, call, PIPE_S, "queue", "the tensor is not of this queue");
  }
  Block& block = core.blocks[tensor.block];
  if (block.generation != tensor.generation)
    fail(core, call, PIPE_S, "use-after-free", "the tensor was given back before");
  if (block.state != Block::kHeld) fail(core, call, PIPE_S, "queue", "the tensor is in the queue");
  return block;
}

void forget_buffers() {
  Core& core = *current;
  core.used.fill(0);
  for (Block& block : core.blocks) ++block.generation;
}

}  // namespace

void pipe_opened(Call call) {
  if (current->open_pipes++ > 0) fail(*current, call, PIPE_S, "queue", "a second TPipe on this core");
  take_events_of_pipe(*current, true);
}

// Waits, as the destructor does, for buffers that are still being emptied.
void pipe_closed(Call call) {
  Core& core = *current;
  --core.open_pipes;
  take_events_of_pipe(core, false);
  if (std::uncaught_exceptions() > 0) return;
  for (const Block& block : core.blocks) {
    if (block.queue >= 0 && block.event >= 0) {
      const Queue& queue = core.queues[block.queue];
      wait_old(call, queue.consumer, queue.producer, block.event);
    }
    if (block.queue >= 0 && block.state != Block::kIdle) {
      fail(core, block.last, PIPE_S, "leaked-buffer",
           std::string("a tensor was ") +
               (block.state == Block::kHeld ? "taken and never given back" : "enqueued and never taken out"));
    }
  }
  forget_buffers();
  core.blocks.clear();
  core.queues.clear();
}

void pipe_reset(Call call) {
  pipe_closed(call);
  pipe_opened(call);
}

int32_t new_queue(Call call, TPosition source, TPosition target, int depth, int64_t blocks, int64_t bytes) {
  Core& core = *current;
  if (blocks < 1) fault_argument(call, "num", blocks, 1, 255);
  const EventPipes ways = ways_of(source, target);
  const int number = int(core.queues.size());
  core.queues.push_back({ways.source, ways.target, depth, {}, 0, {}});
  const bool both = source == TPosition::VECIN && target == TPosition::VECOUT;
  const TPosition position = source == TPosition::GM ? target : source;
  for (int64_t i = 0; i < blocks; ++i) {
    const int block = new_block(call, position, bytes, both, number);
    core.queues[number].blocks.push_back(block);
  }
  return number;
}

Local new_buffer(Call call, TPosition position, int64_t bytes) {
  return tensor_of(new_block(call, position, bytes, true, -1));
}

Local queue_allocate(Call call, int32_t number) {
  Core& core = *current;
  Queue& queue = queue_of(call, number);
  size_t held = 0;
  for (const Block& block : core.blocks) {
    held += block.queue >= 0 && block.state != Block::kIdle && block.position == core.blocks[queue.blocks[0]].position;
  }
  if (held >= kMostHeld) fail(core, call, PIPE_S, "queue", "more than 8 tensors of one position held at once");
  for (size_t tried = 0; tried < queue.blocks.size(); ++tried) {
    const int index = queue.blocks[queue.next];
    queue.next = (queue.next + 1) % queue.blocks.size();
    Block& block = core.blocks[index];
    if (block.state != Block::kIdle) continue;
    block.state = Block::kHeld;
    block.last = call;
    const int event = block.event;
    block.event = -1;
    wait_old(call, queue.consumer, queue.producer, event);
    return tensor_of(index);
  }
  fail(core, call, PIPE_S, "queue",
       "all " + std::to_string(queue.blocks.size()) + " buffers are taken: this would hang");
}

void queue_free(Call call, int32_t number, const Local& tensor) {
  const Queue& queue = queue_of(call, number);
  Block& block = held_block(call, number, tensor);
  block.event = set_new(call, queue.consumer, queue.producer);
  block.state = Block::kIdle;
  ++block.generation;
}

void queue_push(Call call, int32_t number, const Local& tensor) {
  Queue& queue = queue_of(call, number);
  Block& block = held_block(call, number, tensor);
  if (int(queue.waiting.size()) >= queue.depth)
    fail(*current, call, PIPE_S, "queue", "the queue is full, its depth is " + std::to_string(queue.depth));
  block.state = Block::kQueued;
  block.last = call;
  queue.waiting.push_back({tensor.block, set_new(call, queue.producer, queue.consumer)});
}

Local queue_pop(Call call, int32_t number) {
  Queue& queue = queue_of(call, number);
  if (queue.waiting.empty()) fail(*current, call, PIPE_S, "queue", "nothing is in the queue");
  const auto [index, event] = queue.waiting.front();
  queue.waiting.pop_front();
  current->blocks[index].state = Block::kHeld;
  wait_old(call, queue.producer, queue.consumer, event);
  return tensor_of(index);
}

int queue_idle(int32_t number) {
  int idle = 0;
  for (const int block : current->queues[number].blocks) idle += current->blocks[block].state == Block::kIdle;
  return idle;
}
int queue_length(int32_t number) { return int(current->queues[number].waiting.size()); }
int queue_depth(int32_t number) { return current->queues[number].depth; }

void check_buffers_at_exit(Core& core) {
  if (!core.dirty.empty()) {
    const uint64_t line = core.dirty.begin()->first;
    fail(core, core.dirty_calls[line], PIPE_S, "scalar-cache",
         stretch_text(Memory::kNone, line, line + 64) +
             " was written by the scalar pipe and its cache line never cleaned");
  }
}

}  // namespace emu
