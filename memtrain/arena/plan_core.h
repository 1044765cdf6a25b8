// What every front end shares: the requests of a step, recorded or served at places that were planned.
//
// A front end gives memory, takes it back, and says in which thread or stream a step is open; it holds a lock around
// every call here. The plan is never believed: a place is handed out only if no block that is still alive lies in it,
// so a plan that does not fit costs speed and never bytes.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

namespace memtrain {

constexpr int64_t kElsewhere = -1;  // of a request's offset: it is not planned; of a death: it outlives the step

inline uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

struct Block {
  uint64_t bytes;
  uint64_t request;
  uint64_t step;
};

// A range of addresses and the blocks alive in it.
struct Places {
  char* base = nullptr;
  size_t bytes = 0;
  uint64_t alive_bytes = 0;
  std::map<uintptr_t, Block> blocks;

  bool is_free(uintptr_t begin, uint64_t size) const {
    auto next = blocks.lower_bound(begin);
    if (next != blocks.end() && next->first < begin + size) return false;
    return next == blocks.begin() || (--next)->first + next->second.bytes <= begin;
  }
  void take(uintptr_t begin, const Block& block) {
    blocks.emplace(begin, block);
    alive_bytes += block.bytes;
  }
  void give(std::map<uintptr_t, Block>::iterator block) {
    alive_bytes -= block->second.bytes;
    blocks.erase(block);
  }
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

// The requests of one step at a time.
class Steps {
 public:
  Mode mode() const { return mode_; }
  uint64_t number() const { return number_; }
  bool follows() const { return mode_ == Mode::kReplaying && !left_plan(); }
  bool left_plan() const { return outcome_.kind != Outcome::kAsPlanned; }
  uint64_t occupied() const { return outcome_.occupied; }
  uint64_t requests() const { return mode_ == Mode::kReplaying ? next_ : sizes_.size(); }

  void record() {
    sizes_.clear();
    deaths_.clear();
    open(Mode::kRecording);
  }

  // `plan` must live until the step is closed.
  void replay(const Request* plan, uint64_t count) {
    plan_ = plan;
    planned_ = count;
    next_ = 0;
    outcome_ = Outcome{};
    open(Mode::kReplaying);
  }

  // A recorded step was given `pointer`.
  void born(void* pointer, uint64_t bytes) {
    alive_[pointer] = sizes_.size();
    sizes_.push_back(bytes);
    deaths_.push_back(kElsewhere);
  }

  void died(void* pointer) {
    auto found = alive_.find(pointer);
    if (found == alive_.end()) return;
    deaths_[found->second] = static_cast<int64_t>(sizes_.size());
    alive_.erase(found);
  }

  // The place of the next request, or nullptr where it belongs elsewhere.
  void* place(Places* places, uint64_t bytes) {
    if (left_plan()) return nullptr;
    if (next_ == planned_) return leave(Outcome::kExtra, planned_, bytes);
    const Request& request = plan_[next_];
    if (request.bytes != bytes) return leave(Outcome::kSize, request.bytes, bytes);
    const uint64_t index = next_++;
    if (request.offset == kElsewhere || places == nullptr) return nullptr;
    const uintptr_t begin = memtrain::number(places->base) + static_cast<uintptr_t>(request.offset);
    if (!places->is_free(begin, bytes)) {
      if (outcome_.occupied++ == 0) outcome_.occupied_request = index;
      return nullptr;
    }
    places->take(begin, Block{bytes, index, number_});
    return reinterpret_cast<void*>(begin);
  }

  // The number of requests. What has not died by now outlives the step.
  uint64_t end_record() {
    close();
    return sizes_.size();
  }

  // What was recorded: bytes of each request, and the number of requests that had been made when it died.
  void recorded(uint64_t* sizes, int64_t* deaths) {
    std::copy(sizes_.begin(), sizes_.end(), sizes);
    std::copy(deaths_.begin(), deaths_.end(), deaths);
    sizes_ = {};
    deaths_ = {};
  }

  Outcome end_replay(const Places* places) {
    if (!left_plan() && next_ < planned_) leave(Outcome::kMissing, planned_, next_);
    if (places != nullptr)
      for (const auto& [address, block] : places->blocks)
        if (block.step == number_ && outcome_.outliving++ == 0) outcome_.outliving_request = block.request;
    plan_ = nullptr;
    close();
    return outcome_;
  }

  void close() {
    mode_ = Mode::kClosed;
    alive_.clear();
  }

 private:
  void open(Mode mode) {
    mode_ = mode;
    number_ += 1;
  }

  void* leave(Outcome::Kind kind, uint64_t planned, uint64_t actual) {
    outcome_.kind = kind;
    outcome_.request = next_;
    outcome_.planned = planned;
    outcome_.actual = actual;
    return nullptr;
  }

  Mode mode_ = Mode::kClosed;
  uint64_t number_ = 0;
  const Request* plan_ = nullptr;
  uint64_t planned_ = 0, next_ = 0;
  Outcome outcome_{};
  std::vector<uint64_t> sizes_;
  std::vector<int64_t> deaths_;
  std::unordered_map<void*, uint64_t> alive_;
};

}  // namespace memtrain
