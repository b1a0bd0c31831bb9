#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <iterator>
#include <new>
#include <system_error>
#include <thread>
#include <tuple>
#include <unordered_set>

#include "channel/cached_blocks.h"
#include "channel/front_end.h"

namespace fastpage {

namespace {

using Refusal = EngineNews::Refusal;

constexpr double kForever = 1e9;  // seconds: wake() ends it
constexpr int kRetryMilliseconds = 100;
constexpr int kMostTries = 100;

// Where poll() waits, for other threads and signal handlers to end it.
class WakePipe {
 public:
  WakePipe() {
    int fds[2];
    if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) != 0) {
      throw ResourceExhausted(std::string("a pipe could not be made: ") + std::strerror(errno));
    }
    read_ = Descriptor(fds[0]);
    write_ = Descriptor(fds[1]);
  }
  int fd() const { return read_.get(); }
  void wake() const noexcept {
    const int saved_errno = errno;
    // A pipe that is full wakes, too.
    [[maybe_unused]] const ssize_t written = write(write_.get(), "", 1);
    errno = saved_errno;
  }
  void drain() const {
    char bytes[256];
    while (read(read_.get(), bytes, sizeof bytes) > 0) {
    }
  }

 private:
  Descriptor read_;
  Descriptor write_;
};

using FrontEnds = std::vector<std::shared_ptr<FrontEnd>>;

void append(FrontEnds* to, FrontEnds* from) {
  to->insert(to->end(), from->begin(), from->end());
  from->clear();
}

struct Owner {
  FrontEnd* front_end = nullptr;
  RequestId client_id = 0;
  int32_t num_unfinished = 0;         // of its n samples
  const std::string* name = nullptr;  // none, or no longer: see State::names
};

EngineNews refusal(RequestId client_id, std::string error, EngineNews::Refusal kind) {
  EngineNews news;
  news.kind = EngineNews::Kind::kRefused;
  news.request_id = client_id;
  news.error = std::move(error);
  news.refusal = kind;
  return news;
}

// For one more node, which can be inserted without any more memory then.
template <typename Nodes>
void make_room(Nodes* nodes) {
  // >=: the one bucket that an empty container may have is not its own.
  if (nodes->size() + 1 >= nodes->bucket_count()) nodes->rehash(2 * nodes->bucket_count() + 8);
}

// As poll() takes it: whoever waits for more may look again in between.
int milliseconds_until(FrontEnd::Clock::time_point when) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(when - FrontEnd::Clock::now());
  return static_cast<int>(std::clamp<int64_t>(left.count(), 0, 60'000));
}

FrontEnd::Clock::duration to_duration(double seconds) {
  const std::chrono::duration<double> at_most = std::chrono::hours(24 * 365);
  return std::chrono::duration_cast<FrontEnd::Clock::duration>(
      std::min(std::chrono::duration<double>(seconds), at_most));
}

constexpr char kOutOfMemory[] = "memory ran out for this request: send a smaller one, or try later";

}  // namespace

// Two threads. The one that called run() steps the engine and sends what comes of it, as far as the
// sockets take it. The I/O thread reads, answers, and sends the rest; it alone ends a front end.
// Each has a list of the front ends of its own. `mutex` comes before a front end's own.
struct EngineServer::State {
  State(Engine* e, const std::vector<int>& sockets, EngineServerConfig c);

  void run();
  void stop() noexcept {
    stopping = true;
    pipe.wake();
  }
  void add_front_end(int socket);

  // ---- of the calling thread
  void serve();
  void welcome();
  void answer_resets();
  void step();
  void step_failed(const char* error);
  void distribute(StepOutput* step);
  void tell_all_concerned();
  void tell_all();
  void tell(FrontEnd* front_end, const EngineStats& stats);
  void say(FrontEnd* front_end, const EngineNews& news);
  void end();

  // ---- of the I/O thread
  void do_io();
  bool poll_all();
  bool let_go();
  void read(FrontEnd* front_end);
  void take(FrontEnd* front_end, Span<const char> frame);
  void take_no_memory(FrontEnd* front_end);
  void add_request(FrontEnd* front_end, FrontEndMessage* order, bool may_postpone = true);
  void add_to_engine(FrontEnd* front_end, FrontEndMessage* order);
  void add_postponed();
  void abort(FrontEnd* front_end, const FrontEndMessage& message);
  void say_how_far(FrontEnd* front_end);
  void answer(FrontEnd* front_end, const EngineNews& news);
  bool abort_requests_of(FrontEnd* front_end);

  void release_name(Owner* owner);  // of either thread, with `mutex` held

  Engine* const engine;
  const EngineServerConfig config;
  const FrontEnd::Clock::duration held_at_most;
  WakePipe pipe;
  FrontEnds listeners;         // of the calling thread
  FrontEnds front_ends;        // of the I/O thread; those that have left something behind, too
  std::vector<pollfd> polled;  // of the I/O thread: the pipe, then the front ends
  // Of the I/O thread: requests whose names are in use, until all sockets have been read. What ends
  // the other request, or its front end, may lie in one of them, and have come before.
  std::vector<std::pair<FrontEnd*, FrontEndMessage>> postponed;
  CachedBlocks cached;  // of the calling thread; with takes_more
  std::atomic<bool> stopping{false};
  std::atomic<bool> io_ended{false};
  std::atomic<int64_t> num_turns{0};  // of the calling thread, with a step or without

  ArchiveWriter step_writer;  // of the calling thread
  ArchiveWriter io_writer;    // of the I/O thread

  std::mutex mutex;
  std::unordered_map<RequestId, Owner> owners;  // by the engine's ids
  std::unordered_set<std::string> names;        // in use; only the I/O thread adds some
  FrontEnds new_listeners;
  FrontEnds new_front_ends;
  bool takes_more;
};

EngineServer::State::State(Engine* e, const std::vector<int>& sockets, EngineServerConfig c)
    : engine(e),
      config(c),
      held_at_most(to_duration(config.max_delay_seconds)),
      takes_more(c.takes_more) {
  if (engine == nullptr) throw InvalidArgument("EngineServer: the engine is null");
  for (const int fd : sockets) check_stream_socket(fd);
  FrontEnds made;
  for (size_t i = 0; i < sockets.size(); ++i) made.push_back(std::make_shared<FrontEnd>());
  listeners = made;
  front_ends.reserve(made.size());
  polled.reserve(1 + made.size());
  for (size_t i = 0; i < sockets.size(); ++i) made[i]->socket = Descriptor(sockets[i]);
  append(&front_ends, &made);
}

void EngineServer::State::add_front_end(int socket) {
  check_stream_socket(socket);
  auto made = std::make_shared<FrontEnd>();
  {
    std::lock_guard<std::mutex> lock(mutex);
    new_listeners.reserve(new_listeners.size() + 1);
    new_front_ends.reserve(new_front_ends.size() + 1);
    made->socket = Descriptor(socket);
    if (!takes_more) return;
    new_listeners.push_back(made);
    new_front_ends.push_back(std::move(made));
  }
  pipe.wake();
  engine->wake();
}

// ---------------------------------------------------------------- stepping

void EngineServer::State::run() {
  std::thread io;
  try {
    io = std::thread([this] { do_io(); });
  } catch (const std::system_error& e) {
    throw ResourceExhausted(std::string("the thread of the sockets could not be started: ") +
                            e.what());
  }
  std::exception_ptr error;
  try {
    serve();
  } catch (...) {  // no memory to tell what came of a step
    error = std::current_exception();
    stop();
  }
  io.join();
  end();
  if (error != nullptr) std::rethrow_exception(error);
}

void EngineServer::State::serve() {
  while (!io_ended) {
    ++num_turns;
    welcome();
    answer_resets();
    if (!engine->has_unfinished()) tell_all();
    if (engine->wait_for_work(kForever) && !io_ended) step();
  }
}

// Those that are new: they hear what is cached, and the statistics. Forgets those that have gone.
void EngineServer::State::welcome() {
  FrontEnds arrived;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (new_listeners.empty()) return;
    arrived.swap(new_listeners);
  }
  const auto has_gone = [](const auto& front_end) { return front_end->has_gone(); };
  listeners.erase(std::remove_if(listeners.begin(), listeners.end(), has_gone), listeners.end());
  const EngineStats stats = engine->stats();
  for (const auto& front_end : arrived) {
    listeners.push_back(front_end);
    for (std::vector<KvEvent>& part : cached.parts()) {
      front_end->news.kv_events = std::move(part);
      tell(front_end.get(), stats);
      front_end->has_news = true;
    }
  }
}

void EngineServer::State::answer_resets() {
  for (const auto& front_end : listeners) {
    size_t num_asked;
    {
      std::lock_guard<std::mutex> lock(mutex);
      num_asked = front_end->num_resets_asked;
      front_end->num_resets_asked = 0;
    }
    for (; num_asked > 0; --num_asked) {
      EngineNews news;
      news.kind = EngineNews::Kind::kReset;
      news.done = engine->reset_prefix_cache();
      say(front_end.get(), news);
      if (news.done) step();  // for its KV event
    }
  }
}

void EngineServer::State::step() {
  StepOutput out;
  try {
    out = engine->step();
  } catch (const std::exception& error) {
    return step_failed(error.what());
  }
  distribute(&out);
  tell_all_concerned();
}

void EngineServer::State::step_failed(const char* error) {
  EngineNews news;
  news.kind = EngineNews::Kind::kStepFailed;
  news.error = error;
  for (const auto& front_end : listeners) say(front_end.get(), news);
  // If it goes on like this there is no hurry.
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
}

void EngineServer::State::distribute(StepOutput* step) {
  if (config.takes_more) cached.take_in(step->kv_events);
  for (const auto& front_end : listeners) {
    StepOutput& news = front_end->news;
    news.step_id = std::max(news.step_id, step->step_id);
    news.num_tokens += step->num_tokens;
    news.kv_events.insert(news.kv_events.end(), step->kv_events.begin(), step->kv_events.end());
    front_end->has_news = true;
  }
  std::lock_guard<std::mutex> lock(mutex);
  for (RequestOutput& output : step->outputs) {
    const auto place = owners.find(output.request_id);
    if (place == owners.end()) continue;  // its front end has gone
    Owner& owner = place->second;
    output.request_id = owner.client_id;
    const bool is_last = output.finish_reason != FinishReason::kNone && --owner.num_unfinished == 0;
    owner.front_end->news.outputs.push_back(std::move(output));
    if (!is_last) continue;
    owner.front_end->engine_ids.erase(owner.client_id);
    release_name(&owner);
    owners.erase(place);
  }
}

void EngineServer::State::tell_all_concerned() {
  const EngineStats stats = engine->stats();
  const FrontEnd::Clock::time_point now = FrontEnd::Clock::now();
  const auto has_outputs = [](const auto& front_end) { return !front_end->news.outputs.empty(); };
  const bool was_for_some = std::any_of(listeners.begin(), listeners.end(), has_outputs);
  for (const auto& front_end : listeners) {
    const std::chrono::duration<double> silence = now - front_end->told_at;
    const bool may_wait = was_for_some && silence.count() < config.max_delay_seconds;
    if (may_wait && !has_outputs(front_end)) continue;
    tell(front_end.get(), stats);
    front_end->told_at = now;
  }
}

void EngineServer::State::tell_all() {
  const EngineStats stats = engine->stats();
  for (const auto& front_end : listeners) {
    if (front_end->has_news) tell(front_end.get(), stats);
  }
}

void EngineServer::State::tell(FrontEnd* front_end, const EngineStats& stats) {
  EngineNews news;
  news.kind = EngineNews::Kind::kStep;
  news.step = std::move(front_end->news);
  news.stats = stats;
  say(front_end, news);
  front_end->news = std::move(news.step);  // for its memory
  front_end->news.step_id = -1;
  front_end->news.num_tokens = 0;
  front_end->news.outputs.clear();
  front_end->news.kv_events.clear();
  front_end->has_news = false;
}

void EngineServer::State::say(FrontEnd* front_end, const EngineNews& news) {
  try {
    if (front_end->send(make_frame(&step_writer, news)) > 0) pipe.wake();
  } catch (const std::exception&) {
    return front_end->give_up();  // some of its news are lost: it cannot go on
  }
  front_end->wait_until_read(config.max_unsent_bytes, [this] { return stopping.load(); });
}

// Nobody is served any more, and nobody reads.
void EngineServer::State::end() {
  for (const auto& front_end : front_ends) {
    front_end->close();
    for (int i = 0; i < kMostTries && !abort_requests_of(front_end.get()); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
  for (int num_failed = 0; num_failed < kMostTries && engine->has_unfinished();) {
    try {
      engine->step();
    } catch (const std::exception&) {
      ++num_failed;
    }
  }
}

// ---------------------------------------------------------------- I/O

void EngineServer::State::do_io() {
  while (!stopping && poll_all()) {
    if (polled[0].revents != 0) pipe.drain();
    for (size_t i = 0; i < front_ends.size(); ++i) {
      const short events = polled[1 + i].revents;
      FrontEnd* const front_end = front_ends[i].get();
      // Hung up, it cannot be answered: what it still said does not matter.
      if (events & (POLLHUP | POLLERR | POLLNVAL)) {
        front_end->close();
      } else if (events != 0) {
        if (events & POLLOUT) front_end->flush();
        if (events & POLLIN) read(front_end);
      }
    }
    add_postponed();
  }
  stopping = true;
  {
    std::lock_guard<std::mutex> lock(mutex);
    takes_more = false;
    append(&front_ends, &new_front_ends);
  }
  for (const auto& front_end : front_ends) front_end->notify();
  io_ended = true;
  engine->wake();
}

// Waits for something to do. False if all front ends have gone, and left nothing behind.
bool EngineServer::State::poll_all() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    append(&front_ends, &new_front_ends);
  }
  int timeout = let_go() ? -1 : kRetryMilliseconds;
  if (front_ends.empty()) return false;
  polled.resize(1 + front_ends.size());
  polled.front() = {pipe.fd(), POLLIN, 0};
  for (size_t i = 0; i < front_ends.size(); ++i) {
    FrontEnd* const front_end = front_ends[i].get();
    const int fd = front_end->socket.get();  // -1, which poll() passes over, if it has gone
    FrontEnd::Unsent unsent = front_end->unsent();
    if (unsent.held_until.has_value()) {
      const int held_for = milliseconds_until(*unsent.held_until);
      if (held_for > 0) {
        timeout = timeout < 0 ? held_for : std::min(timeout, held_for);
        unsent.num_bytes = 0;
      }
    }
    short events = 0;
    if (unsent.num_bytes > 0) events |= POLLOUT;
    if (unsent.num_bytes <= config.max_unsent_bytes) events |= POLLIN;
    polled[1 + i] = {fd, events, 0};
  }
  if (poll(polled.data(), polled.size(), timeout) < 0) {  // EINTR
    for (pollfd& each : polled) each.revents = 0;
  }
  return true;
}

// Of front ends that have gone. False if one of them has left something behind.
bool EngineServer::State::let_go() {
  bool all = true;
  const auto is_over = [this, &all](const auto& front_end) {
    if (front_end->socket.get() >= 0) return false;
    const bool nothing_left = abort_requests_of(front_end.get());
    all &= nothing_left;
    return nothing_left;
  };
  front_ends.erase(std::remove_if(front_ends.begin(), front_ends.end(), is_over), front_ends.end());
  return all;
}

void EngineServer::State::read(FrontEnd* front_end) {
  ReceiveBuffer::Result result;
  try {
    result = front_end->in.receive(front_end->socket.get());
  } catch (const std::bad_alloc&) {
    return take_no_memory(front_end);
  }
  if (result == ReceiveBuffer::Result::kEnd) return front_end->close();
  try {
    while (const auto frame = front_end->in.next_frame()) take(front_end, *frame);
  } catch (const std::exception&) {  // garbage, or no memory to answer
    front_end->close();
  }
}

// The rest of a long request cannot be received.
void EngineServer::State::take_no_memory(FrontEnd* front_end) {
  const Span<const char> head = front_end->in.give_up_frame();
  try {
    const FrontEndMessage message = read_message_head(head);
    if (message.kind != FrontEndMessage::Kind::kAddRequest) return front_end->close();
    answer(front_end, refusal(message.id, kOutOfMemory, Refusal::kResourceExhausted));
  } catch (const std::exception&) {
    front_end->close();
  }
}

void EngineServer::State::take(FrontEnd* front_end, Span<const char> frame) {
  FrontEndMessage message;
  try {
    read_message(frame, &message);
  } catch (const std::bad_alloc&) {
    if (message.kind != FrontEndMessage::Kind::kAddRequest) throw;
    message.request = {};
    return answer(front_end, refusal(message.id, kOutOfMemory, Refusal::kResourceExhausted));
  }
  switch (message.kind) {
    case FrontEndMessage::Kind::kAddRequest:
      return add_request(front_end, &message);
    case FrontEndMessage::Kind::kAbort:
    case FrontEndMessage::Kind::kAbortSample:
      return abort(front_end, message);
    case FrontEndMessage::Kind::kResetPrefixCache: {
      std::lock_guard<std::mutex> lock(mutex);
      ++front_end->num_resets_asked;
      return engine->wake();  // the scheduler is the calling thread's, while it steps
    }
    case FrontEndMessage::Kind::kPing:
      return say_how_far(front_end);
  }
}

void EngineServer::State::add_request(FrontEnd* front_end, FrontEndMessage* order,
                                      bool may_postpone) {
  const RequestId client_id = order->id;
  bool name_in_use;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (front_end->engine_ids.count(client_id) > 0) BytesSource::damaged("an id is in use");
    name_in_use = !order->name.empty() && names.count(order->name) > 0;
  }
  try {
    if (!name_in_use) {
      add_to_engine(front_end, order);
    } else if (may_postpone) {
      postponed.emplace_back(front_end, std::move(*order));
    } else {
      answer(front_end, refusal(client_id, std::move(order->name), Refusal::kNameInUse));
    }
  } catch (const InvalidArgument& error) {
    answer(front_end, refusal(client_id, error.what(), Refusal::kInvalidArgument));
  } catch (const std::bad_alloc&) {
    answer(front_end, refusal(client_id, kOutOfMemory, Refusal::kResourceExhausted));
  } catch (const Error& error) {
    answer(front_end, refusal(client_id, error.what(), Refusal::kResourceExhausted));
  }
}

void EngineServer::State::add_postponed() {
  if (postponed.empty()) return;
  for (const auto& front_end : front_ends) {
    if (front_end->socket.get() < 0) abort_requests_of(front_end.get());
  }
  for (auto& [front_end, order] : postponed) {
    try {
      add_request(front_end, &order, false);
    } catch (const std::exception&) {  // garbage, or no memory to answer
      front_end->close();
    }
  }
  postponed.clear();
}

// kAccepted goes out, or is held, before `mutex` is given up: distribute() needs it for any output.
// A first request's is held: woken for it, the front end would take a core from the step that
// computes the first token, which is all that it waits for.
void EngineServer::State::add_to_engine(FrontEnd* front_end, FrontEndMessage* order) {
  EngineNews accepted;
  accepted.kind = EngineNews::Kind::kAccepted;
  accepted.request_id = order->id;
  const Owner owner{front_end, order->id, order->request.params.n};

  std::lock_guard<std::mutex> lock(mutex);
  const auto place = front_end->engine_ids.emplace(order->id, 0).first;
  try {
    // All that needs memory, so that nothing fails once the engine has the request.
    std::unordered_map<RequestId, Owner> made = {{0, owner}};
    auto node = made.extract(0);
    make_room(&owners);
    std::unordered_set<std::string> its_name;
    if (!order->name.empty()) {
      node.mapped().name = &*its_name.insert(std::move(order->name)).first;
      make_room(&names);
    }
    const std::string& frame = make_frame(&io_writer, accepted);
    FrontEnd::Room room(front_end, frame.size());
    const bool was_idle = owners.empty();
    const RequestId id = engine->add_request(std::move(order->request));
    place->second = id;
    node.key() = id;
    owners.insert(std::move(node));
    names.merge(its_name);
    if (was_idle) {
      room.hold(frame, FrontEnd::Clock::now() + held_at_most);
    } else {
      room.send(frame);
    }
  } catch (...) {
    front_end->engine_ids.erase(place);
    throw;
  }
}

// Of a request that has ended meanwhile, most likely, there is nothing to be found.
void EngineServer::State::abort(FrontEnd* front_end, const FrontEndMessage& message) {
  const auto is_meant = [&](const auto& each) {
    return each.first == front_end && each.second.id == message.id;
  };
  const auto waiting = std::find_if(postponed.begin(), postponed.end(), is_meant);
  if (waiting != postponed.end()) {
    FrontEndMessage order = std::move(waiting->second);
    postponed.erase(waiting);
    add_request(front_end, &order, false);
  }
  RequestId id;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto place = front_end->engine_ids.find(message.id);
    if (place == front_end->engine_ids.end()) return;
    id = place->second;
    if (message.kind == FrontEndMessage::Kind::kAbort) release_name(&owners.at(id));
  }
  if (message.kind == FrontEndMessage::Kind::kAbort) {
    engine->abort(id);
  } else {
    engine->abort(id, message.index);
  }
}

void EngineServer::State::say_how_far(FrontEnd* front_end) {
  EngineNews news;
  news.kind = EngineNews::Kind::kAlive;
  news.progress = num_turns + engine->progress();
  answer(front_end, news);
  engine->wake();  // a turn: if there is nothing to do, the next answer is another one all the same
}

void EngineServer::State::answer(FrontEnd* front_end, const EngineNews& news) {
  front_end->send(make_frame(&io_writer, news));
}

// Of a front end that has gone. False: no memory for it, now.
bool EngineServer::State::abort_requests_of(FrontEnd* front_end) {
  while (true) {
    RequestId client_id;
    RequestId id;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (front_end->engine_ids.empty()) return true;
      std::tie(client_id, id) = *front_end->engine_ids.begin();
    }
    try {
      engine->abort(id);
    } catch (const std::bad_alloc&) {
      return false;
    }
    std::lock_guard<std::mutex> lock(mutex);
    front_end->engine_ids.erase(client_id);
    const auto owner = owners.find(id);
    if (owner == owners.end()) continue;
    release_name(&owner->second);
    owners.erase(owner);
  }
}

void EngineServer::State::release_name(Owner* owner) {
  if (owner->name != nullptr) names.erase(names.find(*owner->name));
  owner->name = nullptr;
}

// ---------------------------------------------------------------- EngineServer

EngineServer::EngineServer(Engine* engine, const std::vector<int>& sockets,
                           EngineServerConfig config)
    : s_(std::make_unique<State>(engine, sockets, config)) {}
EngineServer::~EngineServer() = default;

void EngineServer::run() { s_->run(); }

void EngineServer::stop() { s_->stop(); }
void EngineServer::add_front_end(int socket) { s_->add_front_end(socket); }

}  // namespace fastpage
