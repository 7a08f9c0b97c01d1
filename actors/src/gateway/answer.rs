//! One answer: turns tokens into text for the client, and keeps a journal from which another head can continue.

use super::Events;
use crate::core::request::{Answerer, Generated};
use crate::core::scheduler::FinishReason;
use crate::planner::RunningModel;
use crate::transport::protocol::HeadEvent;
use exo_engines::sampler::Sampled;
use exo_engines::tokenizer::{StopStream, Stopped, Tokenizer, Utf8Stream};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The tag that opens a reasoning model's thoughts.
const THINK_TAG: &str = "<think>";
/// Tokens at a prompt's end that are searched: enough for the tag and the blanks behind it.
const THINK_TAG_TOKENS: usize = 8;

/// Whether a client's stream accepts more events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamState {
    Open,
    Closed,
}

#[derive(Debug)]
pub(super) struct Answer {
    /// The instance whose head accepted the request first.
    by: Answerer,
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Stream,
    stop: StopStream,
    /// Control tokens whose names are stop strings: they have no text.
    stop_tokens: BTreeSet<u32>,
    prompt: Vec<u32>,
    /// All tokens that were sent to the client.
    journal: Vec<u32>,
    /// Tokens that the first head found in its prefix cache. The counts of later heads are ignored.
    cached_tokens: Option<usize>,
    is_started: bool,
    events: Events,
}

impl Answer {
    pub(super) fn new(running: &RunningModel, stop: &[String], prompt: Vec<u32>, events: Events) -> Self {
        Self {
            by: running.answerer(),
            tokenizer: Arc::clone(&running.tokenizer),
            utf8: Utf8Stream::default(),
            stop: StopStream::new(stop),
            stop_tokens: stop.iter().filter_map(|name| running.tokenizer.control_token(name)).collect(),
            prompt,
            journal: Vec::new(),
            cached_tokens: None,
            is_started: false,
            events,
        }
    }

    /// Names the instance whose head is asked next.
    pub(super) fn ask(&mut self, running: &RunningModel) {
        if !self.is_started {
            self.by = running.answerer();
        }
    }

    /// The tokens that were sent to the client.
    pub(super) fn journal(&self) -> &[u32] {
        &self.journal
    }

    pub(super) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Passes an event of a head on to the client.
    pub(super) fn on_head_event(&mut self, event: HeadEvent) -> StreamState {
        match event {
            HeadEvent::Accepted if self.is_started => StreamState::Open,
            HeadEvent::Accepted => {
                self.is_started = true;
                let (by, prompt_tokens) = (Box::new(self.by.clone()), self.prompt.clone());
                self.send(Generated::Started { by, prompt_tokens, opens_thought: self.opens_thought() })
            }
            HeadEvent::Admitted { cached_tokens } => {
                self.cached_tokens.get_or_insert(cached_tokens);
                StreamState::Open
            }
            HeadEvent::Token(sampled) => self.token(sampled),
            HeadEvent::Finished(reason) => {
                let rest = self.utf8.finish();
                let (text, reason) = match self.stop.push(&rest) {
                    Stopped::Here(text) => (text, FinishReason::Stop),
                    Stopped::Not(text) => (text + &self.stop.finish(), reason),
                };
                self.finish(reason, text)
            }
            // The task of the request handles failures.
            HeadEvent::Failed(_) => StreamState::Closed,
        }
    }

    /// Whether the prompt ends with the tag that opens a thought, as some chat templates do.
    fn opens_thought(&self) -> bool {
        let last = &self.prompt[self.prompt.len().saturating_sub(THINK_TAG_TOKENS)..];
        let bytes: Vec<u8> = last.iter().flat_map(|&id| self.tokenizer.bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).trim_end().ends_with(THINK_TAG)
    }

    fn token(&mut self, sampled: Sampled) -> StreamState {
        self.journal.push(sampled.token);
        let text = self.utf8.push(self.tokenizer.bytes(sampled.token));
        let ids = std::iter::once(sampled.token).chain(sampled.top_logprobs.iter().map(|&(id, _)| id));
        let names = ids.map(|id| self.tokenizer.name(id)).collect();
        if self.stop_tokens.contains(&sampled.token) {
            let text = text + &self.utf8.finish();
            let text = match self.stop.push(&text) {
                Stopped::Here(text) => text,
                Stopped::Not(text) => text + &self.stop.finish(),
            };
            self.send(Generated::Token { sampled, names, text });
            return self.finish(FinishReason::Stop, String::new());
        }
        match self.stop.push(&text) {
            Stopped::Not(text) => self.send(Generated::Token { sampled, names, text }),
            Stopped::Here(text) => {
                self.send(Generated::Token { sampled, names, text });
                self.finish(FinishReason::Stop, String::new())
            }
        }
    }

    fn finish(&mut self, reason: FinishReason, text: String) -> StreamState {
        self.send(Generated::Finished { reason, text, cached_tokens: self.cached_tokens.unwrap_or(0) });
        StreamState::Closed
    }

    /// Sends an event. The channel has capacity for all events of a request, and closes when the client drops the
    /// stream.
    fn send(&mut self, event: Generated) -> StreamState {
        match self.events.try_send(Ok(event)) {
            Ok(()) => StreamState::Open,
            Err(_) => StreamState::Closed,
        }
    }
}
