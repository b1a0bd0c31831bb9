// Beam groups: the search says which beams go on, fork and free make them so.
#include <algorithm>

#include "core/scheduler_state.h"

namespace fastpage {

void Scheduler::State::start_beams(SequenceGroup* group, Sequence* leader) {
  BeamSearch search(group->params, config.eos_token_ids, leader->num_prompt_tokens,
                    leader->final_length);
  const int32_t num_candidates = search.num_candidates();
  leader->is_beam = true;
  group->params.logprobs = num_candidates;
  group->params.temperature = 0;
  group->beams.reset(new BeamGroup{std::move(search), {leader}, {}});
  group->beams->candidates.resize(group->params.beam_width);
}

void Scheduler::State::take_candidates(Sequence* seq, const TokenLogprobs& candidates,
                                       int32_t entry) {
  SequenceGroup* group = seq->group;
  BeamGroup& beams = *group->beams;
  const auto at = std::find(beams.beams.begin(), beams.beams.end(), seq);
  beams.candidates[at - beams.beams.begin()] = candidates;
  seq->awaits_result = false;
  seq->paused = true;
  if (++beams.num_ready == beams.beams.size()) advance_beams(group, entry);
}

void Scheduler::State::advance_beams(SequenceGroup* group, int32_t entry) {
  BeamGroup& beams = *group->beams;
  std::vector<Span<const TokenId>> outputs;
  for (const Sequence* beam : beams.beams) outputs.push_back(beam->output());
  const auto& next = beams.search.step(outputs, {beams.candidates.data(), beams.beams.size()});
  beams.num_ready = 0;
  if (next.empty()) {
    finish_beams(group, entry);
  } else {
    replace_beams(group, next);
  }
}

// A beam that goes on in several ways is forked for all but the last of them; one that does not
// go on is freed before that, so that its row is there for a fork.
void Scheduler::State::replace_beams(SequenceGroup* group,
                                     const std::vector<BeamContinuation>& next) {
  BeamGroup& beams = *group->beams;
  const std::vector<Sequence*> parents = beams.beams;
  std::vector<int32_t> num_uses(parents.size(), 0);
  for (const BeamContinuation& each : next) ++num_uses[each.parent];
  // At any time `beams.beams` are those alive, should memory run out.
  for (size_t i = 0; i < parents.size(); ++i) {
    if (num_uses[i] > 0) continue;
    beams.beams.erase(std::find(beams.beams.begin(), beams.beams.end(), parents[i]));
    leave_queues(parents[i]);
    bury(parents[i]);
  }
  std::vector<Sequence*> children;
  children.reserve(next.size());
  beams.beams.reserve(parents.size() + next.size());
  for (const BeamContinuation& each : next) {
    Sequence* seq = parents[each.parent];
    if (--num_uses[each.parent] > 0) {
      seq = fork(seq, beams.next_index++);
      beams.beams.push_back(seq);
    }
    children.push_back(seq);
  }
  for (size_t i = 0; i < children.size(); ++i) {
    Sequence* seq = children[i];
    seq->paused = false;
    seq->tokens.push_back(next[i].token);
    ++seq->num_tokens;
  }
  beams.beams = std::move(children);
}

void Scheduler::State::finish_beams(SequenceGroup* group, int32_t entry) {
  BeamGroup& beams = *group->beams;
  const Sequence& leader = *beams.beams[0];
  std::vector<BeamHypothesis> best = beams.search.best(group->params.n);
  for (size_t rank = 0; rank < best.size(); ++rank) {
    finished_hypotheses.push_back(std::make_unique<BeamHypothesis>(std::move(best[rank])));
    const BeamHypothesis& each = *finished_hypotheses.back();
    updates.push_back({group->id, leader.tag, static_cast<int32_t>(rank), entry, each.token_ids, -1,
                       each.finish_reason, each.stop_token_id, leader.num_prompt_tokens,
                       static_cast<int32_t>(each.token_ids.size()), group->num_cached_tokens,
                       each.score});
  }
  end_beams(group);
}

void Scheduler::State::end_beams(SequenceGroup* group) {
  for (Sequence* beam : group->beams->beams) {
    leave_queues(beam);
    bury(beam);
  }
  if (group->num_cached_tokens == kNeverAdmitted) num_never_admitted -= group->num_alive;
  group->num_alive = 1;
  count_down(group);
}

}  // namespace fastpage
