// The planned allocator for a GPU, behind torch's CUDAPluggableAllocator: what `planned.cpp` is for the CPU.
//
// Memory comes from two functions with the signatures of cudaMalloc and cudaFree, which are given. Nothing else of
// CUDA is used. A step belongs to the process, for backward runs in a thread of its own, and to the device and stream
// of its first request: places are handed on in the order of that stream. What other streams ask for gets memory of
// its own; a block that another stream has used keeps its place until somebody has synchronised (`settle`).
//
// Both functions may wait for the GPU, and are called without the lock: other threads get their places meanwhile.

#include <cerrno>
#include <cstdint>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "plan_core.h"

namespace {

using namespace memtrain;

using Take = int (*)(void**, size_t);  // cudaMalloc
using Give = int (*)(void*);           // cudaFree

struct Region : Places {
  bool retired = false;
};

struct Arena {
  size_t smallest;
  Region* region = nullptr;
  Steps steps;
  bool has_stream = false;
  int device = 0;
  void* stream = nullptr;
};

// Never destroyed: tensors may die after this library's statics.
auto& lock = *new std::mutex;  // guards all below
auto& regions = *new std::vector<Region*>;
auto& foreign = *new std::unordered_set<void*>;  // blocks in regions that another stream has used
auto& lingering = *new std::vector<void*>;       // those of them that were freed since
Take take = nullptr;
Give give = nullptr;
Arena* current = nullptr;

// The lock, held; memory that is to be given back goes when it is released.
class Locked {
 public:
  ~Locked() {
    const Give release = give;
    held_.unlock();
    for (void* pointer : later_) release(pointer);
  }
  void give_later(void* pointer) { later_.push_back(pointer); }

 private:
  std::unique_lock<std::mutex> held_{lock};
  std::vector<void*> later_;
};

// Without the lock.
void* fresh(size_t bytes) {
  Take take_now;
  {
    Locked locked;
    take_now = take;
  }
  void* pointer = nullptr;
  return take_now != nullptr && take_now(&pointer, bytes) == 0 ? pointer : nullptr;
}

Region* region_of(const void* pointer) {
  const uintptr_t address = number(pointer);
  for (Region* region : regions)
    if (region->base != nullptr && address >= number(region->base) && address < number(region->base) + region->bytes) return region;
  return nullptr;
}

void remove(Region* region, Locked& locked) {
  if (region->base != nullptr) locked.give_later(region->base);
  regions.erase(std::find(regions.begin(), regions.end(), region));
  delete region;
}

void retire(Region* region, Locked& locked) {
  if (region == nullptr) return;
  region->retired = true;
  if (region->blocks.empty()) remove(region, locked);
}

void free_place(Region* region, void* pointer, Locked& locked) {
  auto block = region->blocks.find(number(pointer));
  if (block == region->blocks.end()) return;
  region->give(block);
  if (region->retired && region->blocks.empty()) remove(region, locked);
}

bool in_step(Arena& arena, int device, void* stream) {
  if (!arena.has_stream) {
    arena.has_stream = true;
    arena.device = device;
    arena.stream = stream;
  }
  return arena.device == device && arena.stream == stream;
}

int open(Arena* arena) {
  if (current != nullptr) return EBUSY;
  arena->has_stream = false;
  current = arena;
  return 0;
}

}  // namespace

extern "C" {

// CUDAPluggableAllocator's three.

void* memtrain_device_alloc(intptr_t size, int device, void* stream) {
  const auto bytes = static_cast<size_t>(size);
  if (bytes == 0) return nullptr;
  Arena* arena;
  uint64_t recorded = 0;  // the number of the arena's step that is to know of it
  {
    Locked locked;
    arena = current;
    if (arena != nullptr && bytes >= arena->smallest && in_step(*arena, device, stream)) {
      if (arena->steps.mode() == Mode::kReplaying)
        if (void* pointer = arena->steps.place(arena->region, bytes)) return pointer;
      if (arena->steps.mode() == Mode::kRecording) recorded = arena->steps.number();
    }
  }
  void* pointer = fresh(bytes);
  if (recorded == 0 || pointer == nullptr) return pointer;
  Locked locked;  // What other threads recorded meanwhile came first: its order is that of these lines.
  if (current == arena && arena->steps.mode() == Mode::kRecording && arena->steps.number() == recorded)
    arena->steps.born(pointer, bytes);
  return pointer;
}

void memtrain_device_free(void* pointer, intptr_t, int, void*) {
  if (pointer == nullptr) return;
  Locked locked;
  if (Region* region = region_of(pointer)) {
    if (foreign.erase(pointer) == 0) {
      free_place(region, pointer, locked);
    } else {
      lingering.push_back(pointer);
      auto block = region->blocks.find(number(pointer));
      if (block != region->blocks.end()) block->second.step = 0;  // It has not outlived its step.
    }
    return;
  }
  if (current != nullptr && current->steps.mode() == Mode::kRecording) current->steps.died(pointer);
  locked.give_later(pointer);  // cudaFree waits for whoever uses it.
}

void memtrain_device_record_stream(void* pointer, void* stream) {
  Locked locked;
  if (region_of(pointer) != nullptr && (current == nullptr || current->stream != stream)) foreign.insert(pointer);
}

// Blocks that wait for `settle`.
uint64_t memtrain_device_lingering() {
  Locked locked;
  return lingering.size();
}

// Everything that was queued on any stream before their end is done.
void memtrain_device_settle() {
  Locked locked;
  for (void* pointer : lingering)
    if (Region* region = region_of(pointer)) free_place(region, pointer, locked);
  lingering.clear();
}

// Where memory comes from: cudaMalloc and cudaFree, or what stands in for them.
void memtrain_device_use(Take malloc, Give free) {
  Locked locked;
  take = malloc;
  give = free;
}

// As those of planned.cpp; a step is the process's.

Arena* memtrain_arena_new(uint64_t smallest, uint64_t, int) {
  auto* arena = new Arena;
  arena->smallest = smallest;
  return arena;
}

void memtrain_arena_delete(Arena* arena) {
  Locked locked;
  retire(arena->region, locked);
  delete arena;
}

int memtrain_arena_map(Arena* arena, uint64_t bytes) {
  {
    Locked locked;  // What the old one had is given back before the new one is asked for.
    retire(arena->region, locked);
    arena->region = nullptr;
  }
  if (bytes == 0) return 0;
  auto* base = static_cast<char*>(fresh(bytes));
  if (base == nullptr) return ENOMEM;
  auto* region = new Region;
  region->bytes = bytes;
  region->base = base;
  Locked locked;
  regions.push_back(region);
  arena->region = region;
  return 0;
}

// Device memory has no pages to give back: all of it is, where nothing lives in it.
void memtrain_arena_vacate(Arena* arena) {
  Locked locked;
  Region* region = arena->region;
  if (region == nullptr || region->base == nullptr || !region->blocks.empty()) return;
  locked.give_later(region->base);
  region->base = nullptr;
}

uint64_t memtrain_arena_vacant(const Arena* arena) {
  Locked locked;
  const Region* region = arena->region;
  return region != nullptr && region->base != nullptr ? region->bytes - region->alive_bytes : 0;
}

int memtrain_arena_follows(const Arena* arena) {
  Locked locked;
  return arena->steps.follows();
}

uint64_t memtrain_arena_requests(const Arena* arena) {
  Locked locked;
  return arena->steps.requests();
}

int memtrain_arena_record(Arena* arena) {
  memtrain_arena_vacate(arena);
  Locked locked;
  if (int error = open(arena)) return error;
  arena->steps.record();
  return 0;
}

int memtrain_arena_replay(Arena* arena, const Request* plan, uint64_t count) {
  Region* region;
  size_t missing = 0;
  {
    Locked locked;
    if (current != nullptr) return EBUSY;
    region = arena->region;
    if (region != nullptr && region->base == nullptr) missing = region->bytes;
  }
  char* base = missing != 0 ? static_cast<char*>(fresh(missing)) : nullptr;
  if (missing != 0 && base == nullptr) return ENOMEM;
  Locked locked;
  if (current != nullptr) {  // Another thread's step was quicker.
    if (base != nullptr) locked.give_later(base);
    return EBUSY;
  }
  if (base != nullptr) region->base = base;
  arena->steps.replay(plan, count);
  return open(arena);
}

uint64_t memtrain_arena_end_record(Arena* arena) {
  Locked locked;
  current = nullptr;
  return arena->steps.end_record();
}

void memtrain_arena_recorded(Arena* arena, uint64_t* sizes, int64_t* deaths) {
  Locked locked;
  arena->steps.recorded(sizes, deaths);
}

void memtrain_arena_end_replay(Arena* arena, Outcome* outcome) {
  Locked locked;
  current = nullptr;
  *outcome = arena->steps.end_replay(arena->region);
}

}  // extern "C"
