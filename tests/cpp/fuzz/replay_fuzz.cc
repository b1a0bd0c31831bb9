// libFuzzer over replay(): logs of a scheduler's calls that nobody has written. The header is a
// good one, or hardly any input would get beyond its checksum.
#include <sstream>

#include "core/call_log.h"
#include "fastpage/replay.h"
#include "fuzz/fuzz.h"

namespace fastpage {
namespace {

void run(Bytes* bytes) {
  const SchedulerConfig config = random_config(bytes);
  LogWriter writer;
  writer.raw(kLogMagic, sizeof kLogMagic - 1);
  writer.fixed32(kLogVersion);
  writer(config, check_of(config));
  std::string calls;
  while (!bytes->empty()) calls.push_back(static_cast<char>(bytes->below(256)));
  std::istringstream log(writer.bytes() + calls);
  try {
    replay(log);
  } catch (const InvalidArgument&) {
  }
}

}  // namespace
}  // namespace fastpage

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fastpage::fuzz(data, size, fastpage::run);
}
