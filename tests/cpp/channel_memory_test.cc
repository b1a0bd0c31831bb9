// The engine channel and memory: how little a message may take, and what happens when it runs out.
#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <fstream>

#include "channel/front_end.h"
#include "channel_fixture.h"
#include "counting_allocator.h"
#include "random_requests.h"

namespace fastpage {
namespace {

template <typename Message>
int64_t bytes_to_read(const std::string& bytes) {
  const int64_t before = num_allocated_bytes;
  {
    Message message;
    try {
      read_message({bytes.data(), bytes.size()}, &message);
    } catch (const InvalidArgument&) {
    }
  }
  return num_allocated_bytes - before;
}

// A byte can be an empty list within a list, which is 24 bytes; a list that grows has been of half
// the size before, and becomes twice as large as it has to be. And the error has a text.
constexpr int64_t kMostBytesPerByte = 4 * 24;
constexpr int64_t kMostBytesBeside = 4096;

TEST(ChannelMemory, ALengthAloneTakesNone) {
  SeededChoices choices(1);
  for (int i = 0; i < 20000; ++i) {
    std::string bytes(1 + choices.below(200), 0);
    // Varints as long as they get, everywhere.
    for (char& byte : bytes) byte = static_cast<char>(choices.of({0xff, 0xff, 0x7f, 0, 1}));
    bytes[0] = static_cast<char>(choices.below(5));
    const auto size = static_cast<int64_t>(bytes.size());
    ASSERT_LE(bytes_to_read<FrontEndMessage>(bytes), kMostBytesBeside + kMostBytesPerByte * size);
    ASSERT_LE(bytes_to_read<EngineNews>(bytes), kMostBytesBeside + kMostBytesPerByte * size);
  }
}

// What takes the most for what it is.
TEST(ChannelMemory, ALongMessageTakesASmallMultiple) {
  FrontEndMessage message;
  message.kind = FrontEndMessage::Kind::kAddRequest;
  message.request.params.bad_words.resize((1 << 16) + 1);
  ArchiveWriter writer;
  writer(message);
  const auto size = static_cast<int64_t>(writer.bytes().size());
  EXPECT_LE(bytes_to_read<FrontEndMessage>(writer.bytes()), kMostBytesPerByte * size);
}

// Memory runs out, once, wherever the I/O thread wants some: one request is refused, or the front
// end is cut off, and the next one is served. Also where the request is the first.
class OutOfMemory : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(, OutOfMemory, testing::Values(false, true),
                         [](const auto& info) { return info.param ? "First" : "Later"; });

TEST_P(OutOfMemory, InTheIoThreadCostsARequestAtMost) {
  is_exempt = true;
  int64_t i = 0;
  int num_refused = 0;
  int num_cut_off = 0;
  for (bool failed = true; failed; ++i) {
    SCOPED_TRACE("allocation " + std::to_string(i));
    ServerFixture f(small_config(), 2);
    f.thread = std::thread([&] {
      is_exempt = true;
      f.server->run();
    });
    // The thread is there, and waits.
    if (GetParam()) {
      f.front_end(0).ping();
    } else {
      const RequestId before = f.front_end(0).add(request({1, 2}));
      f.front_end(0).receive_all();
      EXPECT_EQ(f.front_end(0).end_of(before), FinishReason::kLength);
    }

    num_until_failure_of_others = i;
    Request r = request(std::vector<TokenId>(40, 3), 5);
    r.params.n = 2;
    r.params.bad_words = {{1, 2}, {3}};
    const std::string name = "a name that is no small string";
    const RequestId id = f.front_end(0).add(r, name);
    while (!f.front_end(0).left.empty() && !f.front_end(0).client.closed()) {
      f.front_end(0).receive();
    }
    failed = num_until_failure_of_others < 0;
    num_until_failure_of_others = -1;
    num_refused += static_cast<int>(f.front_end(0).refused.count(id));
    num_cut_off += f.front_end(0).client.closed();
    if (f.front_end(0).refused.count(id)) {
      EXPECT_EQ(f.front_end(0).refused[id].refusal, EngineNews::Refusal::kResourceExhausted);
      EXPECT_NE(f.front_end(0).refused[id].error.find("memory"), std::string::npos);
    }
    const RequestId after = f.front_end(1).add(request({1, 2, 3}, 5), name);
    f.front_end(1).receive_all();
    ASSERT_EQ(f.front_end(1).end_of(after), FinishReason::kLength);
  }
  EXPECT_GT(num_refused, 5);
  EXPECT_EQ(num_cut_off, 0);
}

bool sleeps(pid_t thread) {
  std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/stat");
  std::string stat;
  std::getline(file, stat);
  return stat.compare(stat.rfind(')') + 2, 1, "S") == 0;
}

// Else a request that the engine has would be refused when its acceptance cannot be sent.
TEST(ChannelMemory, RoomForAFrameIsNotTakenByOthers) {
  const auto [ours, theirs] = socket_pair();
  FrontEnd front_end;
  front_end.socket = Descriptor(ours);
  const Descriptor other_end(theirs);
  const std::string frame(1 << 10, 'x');
  while (front_end.send(frame) == 0) {
  }
  while (front_end.out.size() < (64 << 10)) front_end.send(frame);

  std::atomic<pid_t> other{0};
  std::atomic<bool> has_sent{false};
  std::thread sender;
  const auto send_much = [&] {
    other = static_cast<pid_t>(syscall(SYS_gettid));
    front_end.send(std::string(size_t{1} << 18, 'y'));
    has_sent = true;
  };
  {
    FrontEnd::Room room(&front_end, frame.size());
    sender = std::thread(send_much);
    while (!has_sent && (other == 0 || !sleeps(other))) std::this_thread::yield();
    const int64_t before = num_allocations;
    room.send(frame);
    EXPECT_EQ(num_allocations, before);
  }
  sender.join();
}

// The same where several messages lie in the socket: none is taken for the rest of another.
TEST(ChannelMemory, RunningOutOfItLeavesTheMessagesBehindWhole) {
  is_exempt = true;
  int64_t i = 0;
  for (bool failed = true; failed; ++i) {
    SCOPED_TRACE("allocation " + std::to_string(i));
    ServerFixture f;
    FrontEndOfTest& front_end = f.front_end();
    const RequestId first = front_end.add(request({1, 2, 3}, 8));
    front_end.client.abort(first);
    const RequestId second = front_end.add(request({1, 2}));
    front_end.client.abort(second + 1000);
    const RequestId third = front_end.add(request({2, 1}));
    num_until_failure_of_others = i;
    f.thread = std::thread([&] {
      is_exempt = true;
      f.server->run();
    });
    while (!front_end.left.empty() && !front_end.client.closed()) front_end.receive();
    failed = num_until_failure_of_others < 0;
    num_until_failure_of_others = -1;
    if (front_end.client.closed()) continue;
    for (const RequestId id : {second, third}) {
      if (front_end.refused.count(id) > 0) continue;
      EXPECT_EQ(front_end.end_of(id), FinishReason::kLength);
    }
  }
}

}  // namespace
}  // namespace fastpage
