// torch's CPU allocator with a plan: requests of a step in an arena, at addresses that were computed beforehand.
//
// Only the thread that has opened a step is served from an arena; everything else, and whatever the plan does not
// foresee, goes to the allocator that was there before, large requests to mappings of their own. From the moment that
// a step leaves its plan the arena gives back whatever nothing lives in, so both together take what is alive.
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
#include <mutex>
#include <unordered_map>
#include <vector>

#include "plan_core.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace {

constexpr uintptr_t kPage = 4096;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr size_t kRegions = 64;  // mapped at a time in one process: one for each arena, and those that drain

using namespace memtrain;

uintptr_t round_down(uintptr_t value, uintptr_t unit) { return value / unit * unit; }
uintptr_t round_up(uintptr_t value, uintptr_t unit) { return round_down(value + unit - 1, unit); }

// An anonymous mapping. Unmapped when it is retired and empty.
struct Region : Places {
  size_t slot = 0;
  bool retired = false;
  bool poisons = false;
  bool resident = false;  // all of it; otherwise what is alive, and what was not given back
};

// Where a region lies, to be read without the lock. A block's owner sees its region here, for the region was there
// before the block; of all other addresses a reader may be told what is stale, and then looks again under the lock.
struct Slot {
  std::atomic<uintptr_t> begin{0}, end{0};
  Region* region = nullptr;
};

struct Arena {
  size_t smallest;         // bytes; requests below are nobody's business
  size_t mapped_smallest;  // larger ones outside of the arena get mappings of their own
  bool poisons;            // blocks as they die
  Region* region = nullptr;
  std::atomic<uint64_t> open{0};  // the number of the step that is open
  bool remembered = false;        // by a thread whose step another one has ended
  Steps steps;
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
thread_local bool records = false;        // the step that is open, rather than follow a plan
thread_local uint64_t current_step = 0;  // of `current`, which may have been closed by another thread

void unmap(Region* region) {
  if (region->bytes != 0) munmap(region->base, region->bytes);
  Slot& slot = slots[region->slot];
  if (slot.region == region) slot.begin = slot.end = 0, slot.region = nullptr;
  delete region;
}

void give_back(uintptr_t begin, uintptr_t end) {
  begin = round_up(begin, kPage);
  end = round_down(end, kPage);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

// Keep the pages of blocks that are alive, until they die.
void vacate(Region* region) {
  if (region == nullptr || !region->resident) return;
  region->resident = false;
  uintptr_t free = number(region->base);
  for (const auto& [begin, block] : region->blocks) {
    give_back(free, begin);
    free = begin + block.bytes;
  }
  give_back(free, number(region->base) + region->bytes);
}

// What still lives in it keeps its own pages, and no others.
void retire(Region* region) {
  if (region == nullptr) return;
  region->retired = true;
  if (region->blocks.empty())
    unmap(region);
  else
    vacate(region);
}

// A block has died in a region that is not resident: its pages, but for those that it shared.
void vacate_around(const Region& region, uintptr_t begin, uint64_t size) {
  uintptr_t low = round_down(begin, kPage), high = round_up(begin + size, kPage);
  auto next = region.blocks.lower_bound(begin);
  if (next != region.blocks.end()) high = std::min(high, next->first);
  if (next != region.blocks.begin()) --next, low = std::max(low, next->first + next->second.bytes);
  give_back(low, high);
}

bool populate(char* base, size_t bytes) {
  if (madvise(base, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno != EINVAL) return false;
  for (size_t at = 0; at < bytes; at += kPage) __atomic_fetch_or(base + at, 0, __ATOMIC_RELAXED);  // before Linux 5.14
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
    const uint64_t size = block->second.bytes;
    if (region->poisons) std::memset(pointer, 0xFF, size);
    region->give(block);
    if (region->retired && region->blocks.empty())
      unmap(region);
    else if (!region->resident)
      vacate_around(*region, number(pointer), size);
    return true;
  }
  for (Arena* arena : recording) arena->steps.died(pointer);
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

// Outside of the arena, without leaving anything behind in the heap.
void* apart(const Arena& arena, size_t bytes) {
  void* pointer = bytes >= arena.mapped_smallest ? map_block(bytes) : nullptr;
  return pointer != nullptr ? pointer : ordinary(bytes);
}

void* record(Arena& arena, size_t bytes) {
  void* pointer = apart(arena, bytes);
  std::lock_guard<std::mutex> guard(lock);
  if (arena.open == current_step) arena.steps.born(pointer, bytes);
  return pointer;
}

void* replay(Arena& arena, size_t bytes) {
  bool planned;
  {
    std::lock_guard<std::mutex> guard(lock);
    if (arena.open != current_step) return ordinary(bytes);
    const bool followed = !arena.steps.left_plan();
    const uint64_t occupied = arena.steps.occupied();
    if (void* pointer = arena.steps.place(arena.region, bytes)) {
      c10::profiledCPUMemoryReporter().New(pointer, bytes);
      return pointer;
    }
    if (followed && arena.steps.left_plan()) vacate(arena.region);
    planned = !arena.steps.left_plan() && occupied == arena.steps.occupied();
  }
  return planned ? ordinary(bytes) : apart(arena, bytes);  // What outlives its step, steps and the arena outlive too.
}

struct PlannedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Arena* arena = current;
    void* pointer;
    if (arena == nullptr || bytes < arena->smallest || arena->open != current_step)
      pointer = ordinary(bytes);
    else
      pointer = records ? record(*arena, bytes) : replay(*arena, bytes);
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
  for (Arena* arena : recording) arena->steps.close(), arena->open = 0;
  recording.clear();
  recording_count = 0;
  current = nullptr;
  lock.unlock();
}

// In any thread.
void closed(Arena* arena) {
  auto found = std::find(recording.begin(), recording.end(), arena);
  if (found != recording.end()) recording.erase(found);
  recording_count = recording.size();
  arena->open = 0;
  if (current == arena)
    current = nullptr;
  else
    arena->remembered = true;
}

// What a step of `arena` in this thread needs; 0, or an errno.
int may_open(const Arena* arena) {
  if (c10::GetAllocator(c10::DeviceType::CPU) != installed) return ENODEV;
  const bool busy = current != nullptr && current->open == current_step;
  return busy || arena->open != 0 ? EBUSY : 0;
}

void opened(Arena* arena, bool recorded) {
  current = arena;
  current_step = arena->open = arena->steps.number();
  records = recorded;
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
  arena->region = nullptr;
  if (!arena->remembered) delete arena;
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
  region->poisons = arena->poisons;
  region->resident = true;
  slots[index].region = region;
  slots[index].begin = begin;
  slots[index].end = begin + whole;
  if (slots_used <= index) slots_used = index + 1;
  arena->region = region;
  return 0;
}

// Give back what nothing lives in, until a step follows a plan again.
void memtrain_arena_vacate(Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  vacate(arena->region);
}

// Bytes that are resident and nothing lives in.
uint64_t memtrain_arena_vacant(const Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  const Region* region = arena->region;
  return region != nullptr && region->resident ? region->bytes - region->alive_bytes : 0;
}

// Whether a step is open that follows its plan.
int memtrain_arena_follows(const Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  return arena->steps.follows();
}

// Requests of the open step so far.
uint64_t memtrain_arena_requests(const Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  return arena->steps.requests();
}

// Open a step of this thread that is recorded; the arena is vacated. 0, or EBUSY (a step is open, of this thread or
// of this arena), ENODEV (another allocator has taken the place).
int memtrain_arena_record(Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  if (int error = may_open(arena)) return error;
  vacate(arena->region);
  arena->steps.record();
  recording.push_back(arena);
  recording_count = recording.size();
  opened(arena, true);
  return 0;
}

// Open a step of this thread that follows `plan`, which must live until it ends and fit what is mapped. As above.
int memtrain_arena_replay(Arena* arena, const Request* plan, uint64_t count) {
  std::lock_guard<std::mutex> guard(lock);
  if (int error = may_open(arena)) return error;
  Region* region = arena->region;
  if (region != nullptr && !region->resident) {
    if (!populate(region->base, region->bytes)) return errno;
    region->resident = true;
  }
  arena->steps.replay(plan, count);
  opened(arena, false);
  return 0;
}

// End the recorded step, in any thread; the number of its requests.
uint64_t memtrain_arena_end_record(Arena* arena) {
  std::lock_guard<std::mutex> guard(lock);
  closed(arena);
  return arena->steps.end_record();
}

// `Steps::recorded`.
void memtrain_arena_recorded(Arena* arena, uint64_t* sizes, int64_t* deaths) {
  std::lock_guard<std::mutex> guard(lock);
  arena->steps.recorded(sizes, deaths);
}

// End the step that followed a plan, in any thread.
void memtrain_arena_end_replay(Arena* arena, Outcome* outcome) {
  std::lock_guard<std::mutex> guard(lock);
  closed(arena);
  *outcome = arena->steps.end_replay(arena->region);
}

}  // extern "C"
