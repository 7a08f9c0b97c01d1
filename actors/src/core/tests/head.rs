//! A head's scheduler over a simulated pipeline, whose only state comes from the steps that it receives.
//!
//! The simulated model's next token is a function of all tokens before it, so a token that is lost, doubled or
//! computed on a wrong cache changes every later one.

use super::{Random, seeds};
use crate::core::context::Context;
use crate::core::scheduler::{DraftAsk, Event, FinishReason, Limits, Request, SamplerOperation, Scheduler, StepPlan};
use exo_engines::decoder::PageTable;
use exo_engines::engine::{Operation, SeqId};
use exo_engines::sampler::{SampleError, Sampled, SamplerSpec, SamplingParams};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The token that ends an answer.
const END: u32 = 0;
const VOCABULARY: u64 = 23;

/// About half of all tokens depend on the one before alone. So texts repeat, and drafts are accepted at times.
fn next_token(prefix: &[u32]) -> u32 {
    let hash = |tokens: &[u32]| {
        let seed = 0xcbf2_9ce4_8422_2325_u64;
        tokens.iter().fold(seed, |hash, &token| (hash ^ u64::from(token)).wrapping_mul(0x100_0000_01b3)) >> 20
    };
    let last = &prefix[prefix.len().saturating_sub(1)..];
    let context = if hash(&prefix[..prefix.len() / 2]) % 2 == 0 { last } else { prefix };
    (hash(context) % VOCABULARY) as u32
}

/// The tokens and the finish reason of a run without failures.
fn answer(prompt: &[u32], max_tokens: u32) -> (Vec<u32>, FinishReason) {
    let mut tokens = prompt.to_vec();
    for _ in 0..max_tokens {
        match next_token(&tokens) {
            END => return (tokens.split_off(prompt.len()), FinishReason::Stop),
            token => tokens.push(token),
        }
    }
    (tokens.split_off(prompt.len()), FinishReason::Length)
}

/// A shard's caches and samplers, as the steps change them.
struct Pipeline {
    pages: PageTable,
    caches: BTreeMap<SeqId, Vec<u32>>,
    samplers: BTreeMap<SeqId, SamplerSpec>,
    sent: VecDeque<StepPlan>,
    /// Drafted tokens that the model drew.
    accepted: usize,
}

fn drawn_token((_, drawn): &(SeqId, Result<Sampled, SampleError>)) -> u32 {
    drawn.as_ref().map_or(END, |sampled| sampled.token)
}

impl Pipeline {
    fn new(pages: u32) -> Self {
        Self {
            pages: PageTable::new(pages),
            caches: BTreeMap::new(),
            samplers: BTreeMap::new(),
            sent: VecDeque::new(),
            accepted: 0,
        }
    }

    fn run(&mut self, plan: StepPlan) -> Vec<(SeqId, Result<Sampled, SampleError>)> {
        for operation in &plan.operations {
            self.pages.apply(*operation).expect("the scheduler sends valid operations");
            match operation {
                Operation::Release { seq } => drop(self.caches.remove(seq)),
                Operation::Truncate { seq, length_tokens } => {
                    self.caches.entry(*seq).or_default().truncate(*length_tokens as usize);
                }
                Operation::Fork { from, to, length_tokens } => {
                    let beginning = self.caches[from][..*length_tokens as usize].to_vec();
                    self.caches.insert(*to, beginning);
                }
            }
        }
        let mut drafts: BTreeMap<SeqId, Vec<u32>> = BTreeMap::new();
        for operation in plan.samplers {
            match operation {
                SamplerOperation::Open { seq, spec } => drop(self.samplers.insert(seq, spec)),
                SamplerOperation::Close { seq } => drop(self.samplers.remove(&seq)),
                SamplerOperation::Draft { seq, tokens } => drop(drafts.insert(seq, tokens)),
            }
        }
        let mut results: Vec<(SeqId, Result<Sampled, SampleError>)> = Vec::new();
        for (row, token) in plan.rows.iter().zip(plan.tokens) {
            self.pages.extend(row.seq, 1).expect("the scheduler counts the pages");
            let cache = self.caches.entry(row.seq).or_default();
            assert_eq!(cache.len(), row.position as usize, "a row continues where the cache ends");
            cache.push(token);
            if row.wants_logits {
                let spec = &self.samplers[&row.seq];
                assert_eq!(cache[..spec.prompt.len()], spec.prompt, "the sampler has the prompt");
                let sampled = Sampled { token: next_token(cache), logprob: 0.0, top_logprobs: Vec::new() };
                let drawn: Vec<u32> = results.iter().filter(|(seq, _)| *seq == row.seq).map(drawn_token).collect();
                let draft = drafts.get(&row.seq).map_or(&[][..], Vec::as_slice);
                if draft.starts_with(&drawn) {
                    self.accepted += usize::from(!drawn.is_empty());
                    results.push((row.seq, Ok(sampled)));
                }
            }
        }
        results
    }
}

struct Client {
    prompt: Vec<u32>,
    max_tokens: u32,
    got: Vec<u32>,
    finished: Option<FinishReason>,
}

struct World {
    random: Random,
    scheduler: Scheduler,
    pipeline: Pipeline,
    limits: Limits,
    clients: BTreeMap<SeqId, Client>,
    next: u64,
    /// Questions that the draft model has not answered yet.
    asks: VecDeque<DraftAsk>,
    cached_tokens: usize,
    accepted_tokens: usize,
    /// Of those, in worlds where only the draft model drafts.
    accepted_from_model: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::of(seed);
        let limits = Limits {
            pages: 4 + random.below(8) as u32,
            context: Context::largest(Some(100), 100, None),
            vocabulary: VOCABULARY as u32,
            steps_in_flight: 1 + random.below(3) as usize,
            running: 1 + random.below(6) as usize,
            rows_alone: 1 + random.below(40) as usize,
            rows_shared: 1 + random.below(20) as usize,
            draft_rows: random.below(3) as usize * 8,
            has_lookup: random.below(4) > 0,
            has_draft_model: random.below(2) == 0,
        };
        Self {
            random,
            scheduler: Scheduler::new(limits.clone()),
            pipeline: Pipeline::new(limits.pages),
            limits,
            clients: BTreeMap::new(),
            next: 0,
            asks: VecDeque::new(),
            cached_tokens: 0,
            accepted_tokens: 0,
            accepted_from_model: 0,
        }
    }

    fn act(&mut self) {
        match self.random.below(100) {
            0..10 => self.request(),
            10..12 => self.cancel(),
            12..13 => {
                self.scheduler.handle_pipeline_lost();
                self.pipeline = Pipeline::new(self.limits.pages);
            }
            13 => self.lose_head(),
            14..54 => self.send(),
            54..60 => self.answer_draft(),
            _ => self.finish_step(),
        }
        self.deliver();
    }

    fn request(&mut self) {
        self.next += 1;
        let seq = SeqId(self.next);
        let length = 1 + self.random.below(80);
        let mut prompt: Vec<u32> = (0..length).map(|_| self.random.below(VOCABULARY) as u32).collect();
        // Most prompts begin with one of three system prompts.
        let system = self.random.below(5) as u32;
        if system < 3 {
            let shared = (length as usize).min(20 + 20 * system as usize);
            (0..shared).for_each(|at| prompt[at] = (at as u32 * (system + 2)) % VOCABULARY as u32);
        }
        let max_tokens = 1 + self.random.below(30) as u32;
        self.submit(seq, prompt.clone(), Vec::new(), max_tokens);
        let room = self.limits.context.tokens.min(self.limits.pages * 32) - length as u32;
        let client = Client { prompt, max_tokens: max_tokens.min(room), got: Vec::new(), finished: None };
        self.clients.insert(seq, client);
    }

    fn submit(&mut self, seq: SeqId, prompt: Vec<u32>, generated: Vec<u32>, max_tokens: u32) {
        let sampler = SamplerSpec { params: SamplingParams::greedy(), prompt, generated };
        let request = Request { seq, sampler, max_tokens, ends: BTreeSet::from([END]) };
        self.scheduler.handle_request(request).expect("the request fits the context");
    }

    /// The head dies with its pipeline. The clients submit their prompts and received tokens to the next head.
    fn lose_head(&mut self) {
        self.scheduler = Scheduler::new(self.limits.clone());
        self.pipeline = Pipeline::new(self.limits.pages);
        let clients = self
            .clients
            .iter()
            .map(|(&seq, client)| (seq, client.prompt.clone(), client.got.clone(), client.max_tokens));
        for (seq, prompt, got, max_tokens) in clients.collect::<Vec<_>>() {
            self.submit(seq, prompt, got, max_tokens);
        }
    }

    fn cancel(&mut self) {
        let running: Vec<SeqId> = self.clients.keys().copied().collect();
        if !running.is_empty() {
            let seq = running[self.random.below(running.len() as u64) as usize];
            self.scheduler.handle_cancel(seq);
            self.clients.remove(&seq);
        }
    }

    fn send(&mut self) {
        if let Some(plan) = self.scheduler.poll_step() {
            self.pipeline.sent.push_back(plan);
            assert!(self.pipeline.sent.len() <= self.limits.steps_in_flight);
        }
        self.asks.extend(std::iter::from_fn(|| self.scheduler.poll_draft()));
    }

    /// The draft model answers a question, also one of a lost head or a cancelled request: with the model's own tokens,
    /// with others, or with none.
    fn answer_draft(&mut self) {
        let Some(DraftAsk { seq, tokens, count }) = self.asks.pop_front() else { return };
        let mut all = tokens.clone();
        let kind = self.random.below(4);
        for _ in 0..if kind == 0 { 0 } else { count } {
            let wrong = kind == 1 && self.random.below(3) == 0;
            all.push(if wrong { self.random.below(VOCABULARY + 3) as u32 } else { next_token(&all) });
        }
        self.scheduler.handle_draft(seq, tokens.len(), all.split_off(tokens.len()));
    }

    fn finish_step(&mut self) {
        if let Some(plan) = self.pipeline.sent.pop_front() {
            let before = self.pipeline.accepted;
            let results = self.pipeline.run(plan);
            let accepted = self.pipeline.accepted - before;
            self.accepted_tokens += accepted;
            self.accepted_from_model += if self.limits.has_lookup { 0 } else { accepted };
            if self.pipeline.sent.is_empty() {
                assert_eq!(self.scheduler.pages_used(), self.pipeline.pages.used(), "the page counts are equal");
            }
            self.scheduler.handle_step_done(results);
        }
    }

    fn deliver(&mut self) {
        while let Some(event) = self.scheduler.poll_event() {
            match event {
                Event::Token { seq, sampled } => {
                    let client = self.clients.get_mut(&seq).expect("a cancelled request gets no tokens");
                    assert_eq!(client.finished, None);
                    client.got.push(sampled.token);
                }
                Event::Finished { seq, reason } => {
                    let client = self.clients.remove(&seq).expect("a request ends once");
                    let expected = answer(&client.prompt, client.max_tokens);
                    assert_eq!((client.got, reason), expected, "no token is lost or doubled");
                }
                Event::Admitted { seq, cached_tokens } => {
                    let client = &self.clients[&seq];
                    let tokens = client.prompt.len() + client.got.len();
                    assert!(cached_tokens < tokens, "at least one token is left to compute");
                    self.cached_tokens += cached_tokens;
                }
                Event::Refused { seq, error } => panic!("{seq:?} was refused: {error}"),
                Event::Failed { seq, error } => panic!("{seq:?} failed: {error}"),
            }
        }
    }

    /// Runs until every request has finished, then checks that nothing leaks.
    fn settle(&mut self) {
        for _ in 0..100_000 {
            self.send();
            if self.clients.is_empty() && self.pipeline.sent.is_empty() {
                break;
            }
            self.finish_step();
            self.answer_draft();
            self.deliver();
        }
        assert!(self.clients.is_empty(), "{} requests hang", self.clients.len());
        // Cached prefixes are dropped for a request that needs all pages; after it nothing may be left.
        let length = self.limits.context.tokens.min(self.limits.pages * 32) as usize - 1;
        self.submit(SeqId(u64::MAX), vec![1; length], Vec::new(), 1);
        while let Some(plan) = self.scheduler.poll_step() {
            self.pipeline.sent.push_back(plan);
            self.finish_step();
        }
        assert!(self.pipeline.samplers.len() <= 1, "samplers leak");
        assert_eq!(self.scheduler.running() + self.scheduler.waiting(), 0);
    }
}

/// R7.1–R7.5, R8.1–R8.5: under any interleaving of requests, cancellations, losses of the pipeline and of the head, and
/// shortages of pages, each answer equals that of an undisturbed run, no request hangs and no page leaks.
/// `EXO_SIM_SEED` replays one seed.
#[test]
fn every_answer_equals_that_of_an_undisturbed_run() {
    let (mut cached_tokens, mut accepted_tokens, mut accepted_from_model) = (0, 0, 0);
    for seed in seeds(400) {
        println!("seed {seed}");
        let mut world = World::new(seed);
        for _ in 0..1_000 {
            world.act();
        }
        world.settle();
        cached_tokens += world.cached_tokens;
        accepted_tokens += world.accepted_tokens;
        accepted_from_model += world.accepted_from_model;
    }
    println!(
        "{cached_tokens} prompt tokens came from the prefix cache, {accepted_tokens} drafted tokens were accepted"
    );
    assert!(cached_tokens > 0 && accepted_tokens > 0 && accepted_from_model > 0);
}
