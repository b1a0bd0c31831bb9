// An Engine in a process of its own: EngineServer beside the engine, EngineClient in a front end,
// and a connected local stream socket (socketpair) between them. Both ends are of one build: the
// format of the messages is no interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastpage/engine.h"

namespace fastpage {

// One message from the engine to a front end.
struct EngineNews {
  enum class Kind : uint8_t {
    kAccepted,    // the request is in the queue; comes before any output of it
    kRefused,     // it never was: `error`
    kStep,        // `step`, `stats`
    kStepFailed,  // `error` is what the model said; the requests that it cost end with kAbort in
                  // the next kStep
    kReset,       // the answer to reset_prefix_cache(): `done`
    kAlive,       // the answer to ping(): `progress`
  };
  enum class Refusal : uint8_t { kInvalidArgument, kResourceExhausted, kNameInUse };
  Kind kind;
  RequestId request_id = 0;  // kAccepted, kRefused: the client's
  std::string error;         // of kNameInUse, the name
  Refusal refusal = Refusal::kInvalidArgument;
  bool done = false;
  // Another value in each answer, unless the engine is stuck: in a step of which no part was done
  // meanwhile (see ModelRunner::progress), or between steps. From an engine with nothing to do it
  // is another one, too.
  int64_t progress = 0;
  // The outputs of this front end's requests, under the ids that its client gave out; all of the
  // KV events. A step without either is told too: its `stats` are news. It may be several steps in
  // one: num_tokens is that of all of them then, step_id that of the last.
  StepOutput step;
  EngineStats stats;  // after that step
};

// Of what goes through the channel, and of the hello before it. Whoever changes either raises it:
// of two processes, each says its own, and refuses another one.
inline constexpr int32_t kChannelVersion = 2;

// Longest message that a front end may send: a prompt and its parameters.
inline constexpr size_t kMaxRequestBytes = size_t{64} << 20;

struct EngineServerConfig {
  // What is kept for a front end that does not read. Beyond it the engine waits for it, and none of
  // its requests is read: a front end reads whatever its clients do, so that it cannot be far
  // behind but for a moment.
  size_t max_unsent_bytes = size_t{64} << 20;
  // A front end that nothing in a step is for, while there is something for others, hears of it at
  // most that much later (together with later ones), unless the engine has nothing else to do: it
  // is not to be woken by each step. Nor by the acceptance of a request that finds the engine idle:
  // that comes with what the first step brings, if the step takes no longer.
  double max_delay_seconds = 0.05;
  // Front ends may come later, too (add_front_end()): what the prefix cache holds is kept for them,
  // as far as the engine tells it (enable_kv_events). It is the first that they hear.
  bool takes_more = false;
};

// Steps an engine for the front ends at the other ends of some sockets.
class EngineServer {
 public:
  // Takes the sockets over, unless it throws: InvalidArgument for what is no stream socket.
  // `engine` must outlive the server; nobody else steps it.
  EngineServer(Engine* engine, const std::vector<int>& sockets, EngineServerConfig config = {});
  ~EngineServer();

  // Steps the engine while there is work, and sleeps while there is none, until every front end has
  // closed its socket or stop() is called. What a front end that has gone left behind is aborted. A
  // front end that sends what no EngineClient sends is cut off. At the end nothing is left in the
  // engine, and the sockets are closed. Once only. Throws ResourceExhausted if there is no thread
  // to be had for the sockets.
  void run();
  void stop();  // from any thread, or a signal handler
  // Another front end, from any thread, if config.takes_more; takes its socket over, unless it
  // throws InvalidArgument. Once run() has returned, or is about to, the socket is closed.
  void add_front_end(int socket);

 private:
  struct State;
  std::unique_ptr<State> s_;
};

// An engine behind a socket. One thread at a time; no call waits: what the socket does not take is
// kept for flush().
class EngineClient {
 public:
  explicit EngineClient(int socket);  // takes it over, unless it throws InvalidArgument
  ~EngineClient();

  int fileno() const;  // readable: call receive(); writable, while has_unsent(): call flush()

  // The ids are not those of the engine; no two clients of a process give out the same. kAccepted
  // or kRefused will follow. Throws InvalidArgument for more than kMaxRequestBytes. `name`, if it
  // is not empty, is refused while another request of any front end has it: until that has ended,
  // or was aborted.
  RequestId add_request(Request request, std::string name = {});
  // Nothing happens if it has ended. kAbort comes as the last output of what had not.
  void abort(RequestId id);
  void abort(RequestId id, int32_t index);
  void reset_prefix_cache();  // kReset will follow
  void ping();                // kAlive will follow, also amid a step

  bool has_unsent() const;
  size_t num_unsent_bytes() const;
  void flush();

  // What has come, about 1 MiB at most: the socket stays readable if there is more. Once the
  // engine's process has gone: what it still said, and from then on nothing, with closed() true.
  // Calls of the others do nothing then. Throws Error, with closed() true from then on, for what no
  // EngineServer of this build sends.
  std::vector<EngineNews> receive();
  bool closed() const;

 private:
  struct State;
  std::unique_ptr<State> s_;
};

}  // namespace fastpage
