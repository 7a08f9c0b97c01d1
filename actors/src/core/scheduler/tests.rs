//! Single decisions of the scheduler. Whole interleavings are simulated in `core/tests/head.rs`.

use super::*;
use crate::core::context::{Context, ContextLimit};
use exo_engines::engine::Row;

fn request(seq: u64, prompt: usize, max_tokens: u32) -> Request {
    let sampler = SamplerSpec { params: SamplingParams::greedy(), prompt: vec![1; prompt], generated: Vec::new() };
    Request { seq: SeqId(seq), sampler, max_tokens, ends: BTreeSet::new() }
}

fn limits() -> Limits {
    Limits {
        pages: 64,
        context: Context::largest(Some(1024), 1024, None),
        vocabulary: 1000,
        steps_in_flight: 1,
        running: 8,
        rows_alone: 256,
        rows_shared: 64,
        draft_rows: 0,
        has_lookup: true,
        has_draft_model: false,
    }
}

fn draw(scheduler: &mut Scheduler, plan: &StepPlan) {
    let drawn = plan.rows.iter().filter(|row| row.wants_logits);
    let sampled = Sampled { token: 5, logprob: 0.0, top_logprobs: Vec::new() };
    scheduler.handle_step_done(drawn.map(|row| (row.seq, Ok(sampled.clone()))).collect());
}

/// A long prompt does not stall a running stream: while it is computed, every step has the stream's row and at most 64
/// rows.
#[test]
fn a_long_prompt_leaves_room_for_running_streams() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.handle_request(request(1, 4, 100)).expect("it fits");
    let plan = scheduler.poll_step().expect("a step");
    draw(&mut scheduler, &plan);
    scheduler.handle_request(request(2, 900, 100)).expect("it fits");
    for _ in 0..14 {
        let plan = scheduler.poll_step().expect("a step");
        assert!(plan.rows.iter().any(|row| row.seq == SeqId(1)), "the stream continues");
        assert!(plan.rows.len() <= 64);
        draw(&mut scheduler, &plan);
    }
}

/// A cancelled request computes nothing more, and another request can use its pages.
#[test]
fn a_cancelled_request_gives_its_pages_to_the_next() {
    let mut scheduler = Scheduler::new(Limits { pages: 12, ..limits() });
    scheduler.handle_request(request(1, 300, 100)).expect("it fits");
    let plan = scheduler.poll_step().expect("a step");
    scheduler.handle_cancel(SeqId(1));
    draw(&mut scheduler, &plan);
    assert_eq!(scheduler.poll_step(), None);
    let mut other = request(2, 350, 1);
    other.sampler.prompt.fill(2);
    scheduler.handle_request(other).expect("it fits");
    let plan = scheduler.poll_step().expect("a step");
    assert_eq!(plan.operations, [Operation::Release { seq: SeqId(1) }]);
    assert!(plan.rows.iter().all(|row| row.seq == SeqId(2)));
}

fn events(scheduler: &mut Scheduler) -> Vec<Event> {
    std::iter::from_fn(|| scheduler.poll_event()).collect()
}

/// R6.1–R6.5: a prefix computed for a finished request is not computed again for a later request.
#[test]
fn a_prompt_continues_from_a_cached_prefix() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.handle_request(request(1, 200, 1)).expect("it fits");
    let plan = scheduler.poll_step().expect("a step");
    draw(&mut scheduler, &plan);
    let mut longer = request(2, 210, 1);
    longer.sampler.prompt[200..].fill(9);
    scheduler.handle_request(longer).expect("it fits");
    let plan = scheduler.poll_step().expect("a step");
    assert_eq!(plan.operations, [Operation::Fork { from: SeqId(1), to: SeqId(2), length_tokens: 200 }]);
    assert_eq!(plan.rows.len(), 10);
    assert!(events(&mut scheduler).contains(&Event::Admitted { seq: SeqId(2), cached_tokens: 200 }));
}

/// Requests with equal prompts, as n > 1 makes them, wait for the first request, and then compute one row each.
#[test]
fn equal_prompts_are_computed_once() {
    let mut scheduler = Scheduler::new(limits());
    for seq in 1..=4 {
        scheduler.handle_request(request(seq, 400, 10)).expect("it fits");
    }
    let mut rows = Vec::new();
    for _ in 0..3 {
        let plan = scheduler.poll_step().expect("a step");
        rows.push(plan.rows.len());
        draw(&mut scheduler, &plan);
    }
    assert_eq!(rows, [256, 144, 4], "the prompt in two chunks, then one row for each of the four requests");
}

#[test]
fn a_prompt_that_can_never_run_is_refused() {
    let mut scheduler = Scheduler::new(limits());
    assert!(scheduler.handle_request(request(1, 0, 1)).is_err());
    assert!(scheduler.handle_request(request(1, 1024, 1)).is_err());
    assert!(scheduler.handle_request(request(1, 1023, 1)).is_ok());
}

/// Decoding streams are divided evenly among the steps in flight: four streams over two stages form pairs, whenever
/// they began.
#[test]
fn streams_are_divided_evenly_over_the_stages() {
    let mut scheduler = Scheduler::new(Limits { steps_in_flight: 2, ..limits() });
    let mut in_flight: VecDeque<StepPlan> = VecDeque::new();
    let mut sizes = Vec::new();
    for round in 0..40_u32 {
        if round % 3 == 0 && round < 12 {
            let mut own = request(u64::from(round / 3), 10, 100);
            own.sampler.prompt.fill(round);
            scheduler.handle_request(own).expect("it fits");
        }
        while let Some(plan) = scheduler.poll_step() {
            sizes.push(plan.rows.len());
            in_flight.push_back(plan);
        }
        let oldest = in_flight.pop_front().expect("a step is in flight");
        draw(&mut scheduler, &oldest);
    }
    assert!(sizes[20..].iter().all(|&rows| rows == 2), "{sizes:?}");
}

/// The chunks of a prompt are sent without waiting for results: as many are in flight as there are stages.
#[test]
fn the_chunks_of_a_prompt_overlap_over_the_stages() {
    let mut scheduler = Scheduler::new(Limits { steps_in_flight: 3, ..limits() });
    scheduler.handle_request(request(1, 700, 10)).expect("it fits");
    let chunks: Vec<StepPlan> = std::iter::from_fn(|| scheduler.poll_step()).collect();
    assert_eq!(chunks.iter().map(|plan| plan.rows.len()).collect::<Vec<_>>(), [256, 256, 188]);
    chunks.iter().for_each(|plan| draw(&mut scheduler, plan));
    assert_eq!(scheduler.poll_step().map(|plan| plan.rows.len()), Some(1), "then the sequence decodes");
}

/// A token outside the vocabulary never reaches the shards, whether it comes from a request or from a sampler.
#[test]
fn tokens_outside_the_vocabulary_are_refused() {
    let mut scheduler = Scheduler::new(limits());
    let mut strange = request(1, 4, 10);
    strange.sampler.generated = vec![7, 1000];
    let refused = scheduler.handle_request(strange);
    assert_eq!(refused, Err(AdmitError::NoSuchToken { token: 1000, vocabulary: 1000 }));
    for seq in [2, 3] {
        let mut own = request(seq, 4, 10);
        own.sampler.prompt.fill(seq as u32);
        scheduler.handle_request(own).expect("it fits");
    }
    let plan = scheduler.poll_step().expect("a step");
    let drawn = |row: &Row| {
        let token = if row.seq == SeqId(2) { u32::MAX } else { 5 };
        (row.seq, Ok(Sampled { token, logprob: 0.0, top_logprobs: Vec::new() }))
    };
    scheduler.handle_step_done(plan.rows.iter().filter(|row| row.wants_logits).map(drawn).collect());
    let told = events(&mut scheduler);
    assert!(told.iter().any(|event| matches!(event, Event::Failed { seq: SeqId(2), .. })), "{told:?}");
    let plan = scheduler.poll_step().expect("the other sequence continues");
    assert!(plan.rows.iter().all(|row| row.seq == SeqId(3)) && plan.tokens == [5]);
}

/// A pipeline with a shorter context takes over: a prompt that it cannot hold is refused, an answer beyond it ends, and
/// a shorter one goes on to the new end.
#[test]
fn a_shorter_context_ends_what_it_cannot_hold() {
    let mut scheduler = Scheduler::new(limits());
    for (seq, prompt_tokens) in [(1, 10), (2, 60), (3, 100), (4, 63)] {
        scheduler.handle_request(request(seq, prompt_tokens, 500)).expect("the long context holds each");
    }
    for _ in 0..6 {
        let plan = scheduler.poll_step().expect("there is work");
        draw(&mut scheduler, &plan);
    }
    let shorter = Context { tokens: 64, model_tokens: 1024, limit: ContextLimit::Memory };
    scheduler.handle_request(request(5, 100, 500)).expect("the long context holds it");
    scheduler.handle_pipeline_replaced(Limits { pages: 8, context: shorter, ..limits() });
    let mut ends = BTreeMap::new();
    for _ in 0..200 {
        if let Some(plan) = scheduler.poll_step() {
            draw(&mut scheduler, &plan);
        }
        ends.extend(events(&mut scheduler).into_iter().filter_map(|event| match event {
            Event::Finished { seq, reason } => Some((seq.0, Ok(reason))),
            Event::Refused { seq, error } => Some((seq.0, Err(error))),
            _ => None,
        }));
    }
    let too_long = AdmitError::TooLong { prompt_tokens: 100, context: shorter };
    let length = Ok(FinishReason::Length);
    assert_eq!(ends, [(1, length), (2, length), (3, length), (4, length), (5, Err(too_long))].into());
}

/// The results of a step in which sequence 1 draws `tokens`.
fn results(tokens: &[u32]) -> Vec<(SeqId, Result<Sampled, SampleError>)> {
    let sampled = |&token: &u32| Sampled { token, logprob: 0.0, top_logprobs: Vec::new() };
    tokens.iter().map(|token| (SeqId(1), Ok(sampled(token)))).collect()
}

/// Accepted drafts stay in the caches. What follows the first other token is dropped, and a shard that draws more
/// tokens than that is not trusted: they are computed.
#[test]
fn only_drafted_tokens_stay_in_the_caches() {
    let mut scheduler = Scheduler::new(Limits { draft_rows: 16, ..limits() });
    scheduler.handle_request(request(1, 40, 100)).expect("it fits");
    scheduler.poll_step().expect("the prompt");
    scheduler.handle_step_done(results(&[1]));
    let plan = scheduler.poll_step().expect("a step");
    assert_eq!(plan.tokens, [1; 4], "a token and a draft of three");
    scheduler.handle_step_done(results(&[1, 1, 9]));
    let plan = scheduler.poll_step().expect("a step");
    assert_eq!(plan.operations, [Operation::Truncate { seq: SeqId(1), length_tokens: 43 }]);
    assert_eq!((plan.tokens, plan.rows[0].position), (vec![9], 43));
    scheduler.handle_step_done(results(&[1]));
    for token in [1, 1] {
        scheduler.poll_step().expect("a step");
        scheduler.handle_step_done(results(&[token]));
    }
    let plan = scheduler.poll_step().expect("a step");
    assert_eq!(plan.tokens, [1, 9, 1, 1], "what followed three ones the last time");
    scheduler.handle_step_done(results(&[7, 7, 7, 7]));
    let plan = scheduler.poll_step().expect("a step");
    assert_eq!(plan.operations, [Operation::Truncate { seq: SeqId(1), length_tokens: 47 }]);
    assert_eq!(plan.tokens, [7; 4], "the tokens that the client has");
    assert_eq!(plan.rows.iter().filter(|row| row.wants_logits).count(), 1);
    assert_eq!(scheduler.draft_counts(), DraftCounts { drafted: 6, accepted: 2 });
}

/// The scheduler of an instance with a draft model, with two sequences of other tokens that have drawn their first one.
fn with_draft_model() -> Scheduler {
    let draft_rows = 16;
    let mut scheduler = Scheduler::new(Limits { draft_rows, has_draft_model: true, ..limits() });
    for seq in [1, 2] {
        let mut own = request(seq, 8, 100);
        own.sampler.prompt = (10 * seq as u32..).take(8).collect();
        scheduler.handle_request(own).expect("it fits");
    }
    scheduler.poll_step().expect("the prompts");
    let first = |seq| (SeqId(seq), Ok(Sampled { token: 1, logprob: 0.0, top_logprobs: Vec::new() }));
    scheduler.handle_step_done([1, 2].map(first).into());
    scheduler
}

/// Drafts of the draft model are sent with the next row of their sequences. A step serves all sequences, so it waits
/// for the drafts of all; a new prompt does not wait.
#[test]
fn a_step_waits_for_the_draft_model() {
    let mut scheduler = with_draft_model();
    assert_eq!(scheduler.poll_step(), None, "the sequences wait");
    let asks: Vec<DraftAsk> = std::iter::from_fn(|| scheduler.poll_draft()).collect();
    let asked: Vec<_> = asks.iter().map(|ask| (ask.seq.0, ask.tokens.len(), ask.count)).collect();
    assert_eq!(asked, [(1, 9, 3), (2, 9, 3)]);
    scheduler.handle_draft(SeqId(1), 8, vec![77]);
    scheduler.handle_draft(SeqId(1), 9, vec![2, 3, 1_000_000, 4]);
    assert_eq!(scheduler.poll_step(), None, "the other sequence waits");
    scheduler.handle_draft(SeqId(2), 9, vec![5]);
    let plan = scheduler.poll_step().expect("a step");
    assert_eq!(plan.tokens, [1, 2, 3, 1, 5], "the drafts, up to a token that the model does not have");
}

/// An accepted draft grows. Where there is none in time, the sequence goes on without, and does not ask again at once.
#[test]
fn drafts_of_a_model_grow_and_pause() {
    let mut scheduler = with_draft_model();
    scheduler.handle_cancel(SeqId(2));
    scheduler.poll_step();
    scheduler.handle_step_done(Vec::new());
    assert_eq!(scheduler.poll_step(), None);
    scheduler.handle_draft(SeqId(1), 9, vec![2, 3]);
    assert_eq!(scheduler.poll_step().map(|plan| plan.tokens), Some(vec![1, 2, 3]));
    scheduler.handle_step_done(results(&[2, 3, 4]));
    assert_eq!(scheduler.draft_counts(), DraftCounts { drafted: 2, accepted: 2 });
    assert_eq!(scheduler.poll_step(), None);
    let ask = std::iter::from_fn(|| scheduler.poll_draft()).last().expect("the next question");
    assert_eq!((ask.tokens.len(), ask.count), (12, 6), "an accepted draft grows");
    scheduler.handle_draft(SeqId(1), 12, Vec::new());
    assert_eq!(scheduler.poll_step().map(|plan| plan.tokens), Some(vec![4]), "no draft in time");
    scheduler.handle_step_done(results(&[5]));
    assert_eq!(scheduler.poll_step().map(|plan| plan.tokens), Some(vec![5]), "then a pause");
}

/// Neither the first token nor a short answer waits for the draft model: a short answer may be a draft itself.
#[test]
fn short_answers_and_first_tokens_do_not_wait_for_drafts() {
    for max_tokens in [8, 9] {
        let mut scheduler = Scheduler::new(Limits { draft_rows: 16, has_draft_model: true, ..limits() });
        let mut own = request(1, 1, max_tokens);
        own.sampler.prompt = vec![10];
        scheduler.handle_request(own).expect("it fits");
        scheduler.poll_step().expect("the first token does not wait");
        scheduler.handle_step_done(results(&[1]));
        assert_eq!(scheduler.poll_step().is_some(), max_tokens == 8, "{max_tokens}");
    }
}
