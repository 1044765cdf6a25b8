// torch's CPU allocator with a plan: requests of a step in an arena, at addresses that were computed beforehand.
//
// Only the thread that has opened a step is served from an arena; everything else, and whatever the plan does not
// foresee, goes to the allocator that was there before. The plan is never believed: a place is handed out only if
// no block that is still alive lies in it, so a plan that does not fit costs speed and never bytes.
//
// Once installed it stays: oneDNN frees by asking for the allocator of that moment, and a storage keeps the
// pointer to its allocator for as long as it lives.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace {

constexpr uintptr_t kPage = 4096;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr size_t kRegions = 64;  // mapped at a time in one process: one for each arena, and those that drain
constexpr int64_t kElsewhere = -1;  // of a request's offset: it is not planned; of a death: it outlives the step

uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
uintptr_t round_up(uintptr_t value, uintptr_t unit) { return (value + unit - 1) / unit * unit; }

struct Block {
  uint64_t bytes;
  uint64_t request;
  uint64_t step;
  bool poisoned;  // when it is released
};

// An anonymous mapping and the blocks alive in it. Unmapped when it is retired and empty.
struct Region {
  char* base = nullptr;
  size_t bytes = 0;
  size_t slot = 0;
  bool retired = false;
  bool resident = false;
  std::map<uintptr_t, Block> blocks;

  bool is_free(uintptr_t begin, uint64_t size) const {
    auto next = blocks.lower_bound(begin);
    if (next != blocks.end() && next->first < begin + size) return false;
    return next == blocks.begin() || (--next)->first + next->second.bytes <= begin;
  }
};

// Where a region lies, to be read without the lock. A block's owner sees its region here, for the region was there
// before the block; of all other addresses a reader may be told what is stale, and then looks again under the lock.
struct Slot {
  std::atomic<uintptr_t> begin{0}, end{0};
  Region* region = nullptr;
};

// How a step went that was to follow a plan. Layout known to library.py.
struct Outcome {
  enum Kind : int64_t { kAsPlanned = 0, kSize = 1, kExtra = 2, kMissing = 3 };
  int64_t kind;       // the first deviation
  uint64_t request;   // its index
  uint64_t planned;   // bytes of the plan's request, or requests of the plan
  uint64_t actual;    // bytes asked for, or requests that came
  uint64_t occupied;  // requests whose place still held a living block
  uint64_t occupied_request;
  uint64_t outliving;  // blocks alive at the end of the step though the plan has them die in it
  uint64_t outliving_request;
};

// One request of a plan. Layout known to library.py.
struct Request {
  uint64_t bytes;
  int64_t offset;
};

enum class Mode { kClosed, kRecording, kReplaying };

struct Arena {
  size_t smallest;         // bytes; requests below are nobody's business
  size_t mapped_smallest;  // while recording, requests from here on get mappings of their own
  bool poisons;
  Mode mode = Mode::kClosed;
  Region* region = nullptr;
  uint64_t step = 0;
  // Replaying
  const Request* plan = nullptr;
  uint64_t planned = 0, next = 0;
  Outcome outcome{};
  // Recording
  std::vector<uint64_t> sizes;
  std::vector<int64_t> deaths;
  std::unordered_map<void*, uint64_t> alive;
};

std::mutex lock;  // guards all below, and every region and arena
std::array<Slot, kRegions> slots;
// These two are never destroyed: tensors of other libraries and threads die after this library's statics.
auto& mapped = *new std::unordered_map<void*, size_t>;  // blocks with mappings of their own, and their bytes
auto& recording = *new std::vector<Arena*>;
// Read without the lock: is there anything at all to look for?
std::atomic<size_t> mapped_count{0}, recording_count{0}, slots_used{0};

c10::Allocator* previous = nullptr;
c10::DeleterFnPtr previous_release = nullptr;
thread_local Arena* current = nullptr;

void unmap(Region* region) {
  if (region->bytes != 0) munmap(region->base, region->bytes);
  Slot& slot = slots[region->slot];
  if (slot.region == region) slot.begin = slot.end = 0, slot.region = nullptr;
  delete region;
}

void retire(Region* region) {
  if (region == nullptr) return;
  region->retired = true;
  if (region->blocks.empty()) unmap(region);
}

bool populate(char* base, size_t bytes) {
  if (madvise(base, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno != EINVAL) return false;
  for (size_t at = 0; at < bytes; at += kPage) static_cast<volatile char*>(base)[at] = 0;  // Linux before 5.14
  return true;
}

bool may_be_ours(void* pointer) {
  if (recording_count.load(std::memory_order_acquire) != 0) return true;
  const uintptr_t address = number(pointer);
  if (address % kPage == 0 && mapped_count.load(std::memory_order_acquire) != 0) return true;
  const size_t used = slots_used.load(std::memory_order_acquire);
  for (size_t i = 0; i < used; ++i)
    if (address >= slots[i].begin.load(std::memory_order_acquire) &&
        address < slots[i].end.load(std::memory_order_acquire))
      return true;
  return false;
}

Slot* slot_of(uintptr_t address) {
  for (Slot& slot : slots)
    if (slot.region != nullptr && address >= slot.begin && address < slot.end) return &slot;
  return nullptr;
}

// Whether the block was in an arena or had a mapping of its own; it is then gone.
bool release_ours(void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  if (Slot* slot = slot_of(number(pointer))) {
    Region* region = slot->region;
    auto block = region->blocks.find(number(pointer));
    if (block == region->blocks.end()) {
      std::fprintf(stderr, "memtrain: %p lies in an arena and is no block of it: freed twice?\n", pointer);
      std::abort();
    }
    c10::profiledCPUMemoryReporter().Delete(pointer);
    // All bits set is a NaN in every floating type: whoever reads on after the end of a life sees it.
    if (block->second.poisoned) std::memset(pointer, 0xFF, block->second.bytes);
    region->blocks.erase(block);
    if (region->retired && region->blocks.empty()) unmap(region);
    return true;
  }
  for (Arena* arena : recording) {
    auto found = arena->alive.find(pointer);
    if (found == arena->alive.end()) continue;
    arena->deaths[found->second] = static_cast<int64_t>(arena->sizes.size());
    arena->alive.erase(found);
  }
  auto found = mapped.find(pointer);
  if (found == mapped.end()) return false;
  c10::profiledCPUMemoryReporter().Delete(pointer);
  munmap(pointer, found->second);
  mapped.erase(found);
  mapped_count = mapped.size();
  return true;
}

void release(void* pointer) {
  if (pointer == nullptr || (may_be_ours(pointer) && release_ours(pointer))) return;
  previous_release(pointer);
}

void* ordinary(size_t bytes) { return previous->allocate(bytes).release_context(); }

void* map_block(size_t bytes) {
  const size_t whole = round_up(bytes, kPage);
  void* pointer = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pointer == MAP_FAILED) return nullptr;
  madvise(pointer, whole, MADV_HUGEPAGE);
  std::lock_guard<std::mutex> guard(lock);
  mapped.emplace(pointer, whole);
  mapped_count = mapped.size();
  c10::profiledCPUMemoryReporter().New(pointer, bytes);
  return pointer;
}

void* record(Arena& arena, size_t bytes) {
  void* pointer = bytes >= arena.mapped_smallest ? map_block(bytes) : nullptr;
  if (pointer == nullptr) pointer = ordinary(bytes);
  std::lock_guard<std::mutex> guard(lock);
  arena.alive[pointer] = arena.sizes.size();
  arena.sizes.push_back(bytes);
  arena.deaths.push_back(kElsewhere);
  return pointer;
}

void deviate(Arena& arena, Outcome::Kind kind, uint64_t planned, uint64_t actual) {
  arena.outcome.kind = kind;
  arena.outcome.request = arena.next;
  arena.outcome.planned = planned;
  arena.outcome.actual = actual;
}

// The place of the next request, or nullptr where it belongs elsewhere.
void* replay(Arena& arena, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  if (arena.outcome.kind != Outcome::kAsPlanned) return nullptr;
  if (arena.next == arena.planned) {
    deviate(arena, Outcome::kExtra, arena.planned, bytes);
    return nullptr;
  }
  const Request& request = arena.plan[arena.next];
  if (request.bytes != bytes) {
    deviate(arena, Outcome::kSize, request.bytes, bytes);
    return nullptr;
  }
  const uint64_t index = arena.next++;
  if (request.offset == kElsewhere) return nullptr;
  const uintptr_t begin = number(arena.region->base) + static_cast<uintptr_t>(request.offset);
  if (!arena.region->is_free(begin, bytes)) {
    if (arena.outcome.occupied++ == 0) arena.outcome.occupied_request = index;
    return nullptr;
  }
  arena.region->blocks.emplace(begin, Block{bytes, index, arena.step, arena.poisons});
  void* pointer = reinterpret_cast<void*>(begin);
  c10::profiledCPUMemoryReporter().New(pointer, bytes);
  return pointer;
}

struct PlannedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Arena* arena = current;
    void* pointer = nullptr;
    if (arena == nullptr || bytes < arena->smallest) {
      pointer = ordinary(bytes);
    } else if (arena->mode == Mode::kRecording) {
      pointer = record(*arena, bytes);
    } else if ((pointer = replay(*arena, bytes)) == nullptr) {
      pointer = ordinary(bytes);
    }
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

PlannedAllocator* installed = nullptr;

// A forked child inherits what lives in an arena and not the rest, of which the parent's next step would copy every
// page. Steps that were open are not open in the child.
void before_fork() {
  lock.lock();
  for (Slot& slot : slots)
    if (Region* region = slot.region)
      madvise(region->base, region->bytes, region->blocks.empty() ? MADV_DONTFORK : MADV_DOFORK);
}

void after_fork_in_child() {
  for (Slot& slot : slots)
    if (slot.region != nullptr && slot.region->blocks.empty()) {
      slot.region->bytes = 0;
      slot.begin = slot.end = 0, slot.region = nullptr;
    }
  for (Arena* arena : recording) arena->mode = Mode::kClosed, arena->alive.clear();
  recording.clear();
  recording_count = 0;
  current = nullptr;
  lock.unlock();
}

void close_step(Arena* arena) {
  arena->mode = Mode::kClosed;
  current = nullptr;
}

}  // namespace

extern "C" {

// Put the allocator into its place; again is harmless. 0, or an errno.
int memtrain_arena_install() {
  std::lock_guard<std::mutex> guard(lock);
  c10::Allocator* present = c10::GetAllocator(c10::DeviceType::CPU);
  if (installed != nullptr) return present == installed ? 0 : EBUSY;
  if (present->raw_deleter() == nullptr) return ENOTSUP;
  if (int error = pthread_atfork(&before_fork, [] { lock.unlock(); }, &after_fork_in_child)) return error;
  previous = present;
  previous_release = present->raw_deleter();
  installed = new PlannedAllocator;  // for as long as the process lives
  c10::SetAllocator(c10::DeviceType::CPU, installed, 255);
  return 0;
}

Arena* memtrain_arena_new(uint64_t smallest, uint64_t mapped_smallest, int poisons) {
  auto* arena = new Arena;
  arena->smallest = smallest;
  arena->mapped_smallest = mapped_smallest;
  arena->poisons = poisons != 0;
  return arena;
}

// Of an arena without an open step. Blocks that are still alive keep their memory.
void memtrain_arena_delete(Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  retire(arena->region);
  delete arena;
}

// Give the arena `bytes` of resident memory, or none, in place of what it has. 0, or an errno.
int memtrain_arena_map(Arena* arena, uint64_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  retire(arena->region);
  arena->region = nullptr;
  if (bytes == 0) return 0;
  size_t index = 0;
  while (index < kRegions && slots[index].region != nullptr) ++index;
  if (index == kRegions) return EMFILE;
  const size_t whole = round_up(bytes, kPage), reserved = whole + kHugePage;
  void* pointer = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pointer == MAP_FAILED) return errno;
  const uintptr_t begin = round_up(number(pointer), kHugePage), end = number(pointer) + reserved;
  if (begin > number(pointer)) munmap(pointer, begin - number(pointer));
  if (end > begin + whole) munmap(reinterpret_cast<void*>(begin + whole), end - begin - whole);
  auto* base = reinterpret_cast<char*>(begin);
  madvise(base, whole, MADV_HUGEPAGE);
  if (!populate(base, whole)) {
    const int error = errno;
    munmap(base, whole);
    return error;
  }
  auto* region = new Region;
  region->base = base;
  region->bytes = whole;
  region->slot = index;
  region->resident = true;
  slots[index].region = region;
  slots[index].begin = begin;
  slots[index].end = begin + whole;
  if (slots_used <= index) slots_used = index + 1;
  arena->region = region;
  return 0;
}

// Open a step of this thread that is recorded. An arena that nothing lives in gives its pages back meanwhile.
// 0, or EBUSY (a step is open, of this thread or of this arena), ENODEV (another allocator has taken the place).
int memtrain_arena_record(Arena* arena) {
  if (c10::GetAllocator(c10::DeviceType::CPU) != installed) return ENODEV;
  std::lock_guard<std::mutex> guard(lock);
  if (current != nullptr || arena->mode != Mode::kClosed) return EBUSY;
  if (Region* region = arena->region; region != nullptr && region->blocks.empty() && region->resident) {
    madvise(region->base, region->bytes, MADV_DONTNEED);
    region->resident = false;
  }
  arena->sizes.clear();
  arena->deaths.clear();
  arena->mode = Mode::kRecording;
  recording.push_back(arena);
  recording_count = recording.size();
  current = arena;
  return 0;
}

// Open a step of this thread that follows `plan`, which must live until it ends and fit what is mapped. As above.
int memtrain_arena_replay(Arena* arena, const Request* plan, uint64_t count) {
  if (c10::GetAllocator(c10::DeviceType::CPU) != installed) return ENODEV;
  std::lock_guard<std::mutex> guard(lock);
  if (current != nullptr || arena->mode != Mode::kClosed) return EBUSY;
  Region* region = arena->region;
  if (region != nullptr && !region->resident) {
    if (!populate(region->base, region->bytes)) return errno;
    region->resident = true;
  }
  arena->plan = plan;
  arena->planned = count;
  arena->next = 0;
  arena->outcome = Outcome{};
  arena->step += 1;
  arena->mode = Mode::kReplaying;
  current = arena;
  return 0;
}

// End the recorded step; the number of its requests.
uint64_t memtrain_arena_end_record(Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  for (auto it = recording.begin(); it != recording.end(); ++it)
    if (*it == arena) {
      recording.erase(it);
      break;
    }
  recording_count = recording.size();
  arena->alive.clear();  // What has not died by now outlives the step.
  close_step(arena);
  return arena->sizes.size();
}

// What was recorded: bytes of each request, and the number of requests that had been made when it died.
void memtrain_arena_recorded(Arena* arena, uint64_t* sizes, int64_t* deaths) {
  std::copy(arena->sizes.begin(), arena->sizes.end(), sizes);
  std::copy(arena->deaths.begin(), arena->deaths.end(), deaths);
  arena->sizes = {};
  arena->deaths = {};
}

// End the step that followed a plan.
void memtrain_arena_end_replay(Arena* arena, Outcome* outcome) {
  std::lock_guard<std::mutex> guard(lock);
  if (arena->outcome.kind == Outcome::kAsPlanned && arena->next < arena->planned)
    deviate(*arena, Outcome::kMissing, arena->planned, arena->next);
  if (arena->region != nullptr)
    for (const auto& [address, block] : arena->region->blocks)
      if (block.step == arena->step && arena->outcome.outliving++ == 0)
        arena->outcome.outliving_request = block.request;
  *outcome = arena->outcome;
  arena->plan = nullptr;
  close_step(arena);
}

}  // extern "C"
