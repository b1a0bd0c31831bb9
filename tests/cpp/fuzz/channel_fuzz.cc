// libFuzzer over both ends of the engine channel: the messages, their frames, a client of a hostile
// engine, and a server with hostile front ends beside a good one. See channel_driver.h.
#include "channel_driver.h"
#include "fuzz/fuzz.h"

namespace fastpage {
namespace {

// Any bytes as they are, too: what the generators do not think of.
void read_as_it_is(Bytes* bytes) {
  std::string message;
  while (!bytes->empty()) message.push_back(static_cast<char>(bytes->below(256)));
  check_reading<FrontEndMessage>(message);
  check_reading<EngineNews>(message);
}

void run(Bytes* bytes) {
  switch (bytes->below(8)) {
    case 0:
    case 1:
      return read_as_it_is(bytes);
    case 2:
      return drive_messages(bytes);
    case 3:
      return drive<BuffersDriver>(bytes, 100);
    case 4:
    case 5:
      return drive<ClientDriver>(bytes, 100);
    default:
      return drive<ServerDriver>(bytes, 100);
  }
}

}  // namespace
}  // namespace fastpage

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fastpage::fuzz(data, size, fastpage::run);
}
