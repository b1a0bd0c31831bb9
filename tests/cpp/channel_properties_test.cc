// What must always hold of the engine channel (see channel_driver.h), with random peers.
#include <gtest/gtest.h>

#include "channel_driver.h"

namespace fastpage {
namespace {

// A failure names its seed.
template <typename Drive>
void run_random(int num_seeds, Drive drive_once) {
  for (int seed = 0; seed < num_seeds; ++seed) {
    SeededChoices choices(seed);
    try {
      drive_once(&choices);
    } catch (const std::exception& e) {
      FAIL() << "seed " << seed << ": " << e.what();
    }
  }
}

TEST(ChannelProperties, AMessageIsReadAsItIsOrRefused) { run_random(20000, drive_messages); }

TEST(ChannelProperties, FramesArriveInWhateverPieces) {
  run_random(500, [](Choices* choices) { drive<BuffersDriver>(choices, 100); });
}

TEST(ChannelProperties, AClientTakesInWhatIsSoundAndClosesAtTheRest) {
  run_random(1000, [](Choices* choices) { drive<ClientDriver>(choices, 100); });
}

TEST(ChannelProperties, AFrontEndIsNoneTheWiserWhateverOthersDo) {
  run_random(200, [](Choices* choices) { drive<ServerDriver>(choices, 100); });
}

}  // namespace
}  // namespace fastpage
