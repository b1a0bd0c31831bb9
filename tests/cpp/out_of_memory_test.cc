// Memory runs out, once, wherever it can: the engine goes on, and nothing is lost but requests.
#include <gtest/gtest.h>

#include "counting_allocator.h"
#include "engine_fixture.h"

namespace fastpage {
namespace {

// One of each kind, some of them preempted, some aborted.
void use(Engine* engine) {
  engine->add_request(request({1, 2, 3, 4, 5, 6}, 12));
  Request samples = request({1, 2, 3, 4, 9, 9}, 9);
  samples.params.n = 3;
  const RequestId id = engine->add_request(samples);
  engine->step();
  Request beams = request({4, 5, 6, 7, 8});
  beams.params.beam_width = 2;
  engine->add_request(beams);
  Request best = request({4, 5, 6, 7, 8});
  best.params.temperature = 1;
  best.params.best_of = 2;
  best.params.prompt_logprobs = 1;
  engine->add_request(best);
  for (int i = 0; i < 20; ++i) {
    engine->step();
    if (i == 5) engine->abort(id, 1);
    if (i == 6) engine->abort(id);
  }
}

TEST(OutOfMemory, CostsRequestsAndNothingElse) {
  EngineConfig config = small_config();
  config.scheduler.num_blocks = 12;
  bool failed = true;
  for (int64_t i = 0; failed; ++i) {
    SCOPED_TRACE("allocation " + std::to_string(i));
    Fixture f(config);
    num_until_failure = i;
    try {
      use(&f.engine);
    } catch (const std::bad_alloc&) {
    } catch (const Error&) {  // the runner's
    }
    failed = num_until_failure < 0;
    num_until_failure = -1;
    f.engine.check_integrity();
    f.drain();
    const Request after = request({7, 7, 7}, 5);
    const RequestId id = f.engine.add_request(after);
    ASSERT_EQ(tokens_of(f.drain()[{id, 0}]),
              fake_completion(after.prompt_token_ids, after.params, 0, {}, 64, kVocabSize).tokens);
    ASSERT_FALSE(testing::Test::HasFailure());
  }
}

}  // namespace
}  // namespace fastpage
