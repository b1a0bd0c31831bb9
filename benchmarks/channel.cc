// What the news of one step cost on their way from the engine to a front end, for 64 sequences:
// made into a frame, sent, received, and made into EngineNews again. Prints microseconds, name and
// value.
//
//   channel_bench [REPEATS]
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "channel/messages.h"
#include "channel/socket_io.h"

namespace {

using namespace fastpage;
using Clock = std::chrono::steady_clock;

constexpr int32_t kNumSequences = 64;

EngineNews make_news(int32_t num_logprobs) {
  EngineNews news;
  news.kind = EngineNews::Kind::kStep;
  for (int32_t i = 0; i < kNumSequences; ++i) {
    RequestOutput output{};
    output.request_id = static_cast<RequestId>(1000 + i);
    output.new_token_ids = {10000 + 300 * i};
    output.num_prompt_tokens = 512;
    output.num_output_tokens = 100 + i;
    output.queue_seconds = 0.01;
    if (num_logprobs > 0) {
      TokenLogprobs row;
      row.token_ids.assign(1 + num_logprobs, 20000);
      row.logprobs.assign(1 + num_logprobs, -1.25f);
      row.rank = 1;
      output.logprobs.push_back(row);
    }
    news.step.outputs.push_back(output);
  }
  news.stats.num_steps = 100000;
  return news;
}

class Timer {
 public:
  explicit Timer(int repeats) { times_.reserve(repeats); }
  template <typename F>
  void time(F f) {
    const Clock::time_point start = Clock::now();
    f();
    times_.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  double median() {
    std::nth_element(times_.begin(), times_.begin() + times_.size() / 2, times_.end());
    return times_[times_.size() / 2];
  }

 private:
  std::vector<double> times_;
};

void measure(const std::string& name, const EngineNews& news, int repeats) {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) std::exit(1);
  ArchiveWriter writer;
  SendBuffer out;
  ReceiveBuffer in(UINT32_MAX);
  Timer encode(repeats), send(repeats), receive(repeats), decode(repeats);
  for (int i = 0; i < repeats; ++i) {
    const std::string* frame = nullptr;
    encode.time([&] { frame = &make_frame(&writer, news); });
    send.time([&] { out.send(fds[0], {frame->data(), frame->size()}); });
    std::optional<Span<const char>> bytes;
    receive.time([&] {
      do {
        out.flush(fds[0]);
        in.receive(fds[1]);
        bytes = in.next_frame();
      } while (!bytes);
    });
    EngineNews received;
    decode.time([&] { read_message(*bytes, &received); });
  }
  std::printf("%s.bytes %zu\n", name.c_str(), writer.bytes().size());
  std::printf("%s.encode_us %.2f\n", name.c_str(), encode.median());
  std::printf("%s.send_us %.2f\n", name.c_str(), send.median());
  std::printf("%s.receive_us %.2f\n", name.c_str(), receive.median());
  std::printf("%s.decode_us %.2f\n", name.c_str(), decode.median());
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 20000;
  measure("tokens", make_news(0), repeats);
  measure("logprobs_5", make_news(5), repeats);
}
