//! One answer: tokens become text that may be shown, and are written down, so that another head can go on from them.

use crate::core::schedule::FinishReason;
use crate::protocol::HeadEvent;
use crate::request::{Generated, RequestError};
use exo_engines::sampler::Sampled;
use exo_engines::tokenizer::{StopStream, Stopped, Tokenizer, Utf8Stream};
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) type Events = mpsc::Sender<Result<Generated, RequestError>>;

/// Whether a stream takes more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Open,
    Over,
}

#[derive(Debug)]
pub(super) struct Answer {
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Stream,
    stop: StopStream,
    prompt: Vec<u32>,
    /// All tokens that the client has been given.
    journal: Vec<u32>,
    /// What the first head found computed; later ones compute what the client never asked for.
    reused_tokens: Option<usize>,
    is_started: bool,
    events: Events,
}

impl Answer {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, stop: &[String], prompt: Vec<u32>, events: Events) -> Self {
        Self {
            tokenizer,
            utf8: Utf8Stream::default(),
            stop: StopStream::new(stop),
            prompt,
            journal: Vec::new(),
            reused_tokens: None,
            is_started: false,
            events,
        }
    }

    /// The tokens given so far.
    pub(super) fn journal(&self) -> &[u32] {
        &self.journal
    }

    pub(super) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Passes an event of a head on.
    pub(super) fn tell(&mut self, event: HeadEvent) -> Stream {
        match event {
            HeadEvent::Accepted if self.is_started => Stream::Open,
            HeadEvent::Accepted => {
                self.is_started = true;
                self.send(Generated::Started { prompt_tokens: self.prompt.clone() })
            }
            HeadEvent::TakenUp { reused_tokens } => {
                self.reused_tokens.get_or_insert(reused_tokens);
                Stream::Open
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
            // Failures are judged by whoever asks heads.
            HeadEvent::Failed(_) => Stream::Over,
        }
    }

    fn token(&mut self, sampled: Sampled) -> Stream {
        self.journal.push(sampled.token);
        let text = self.utf8.push(self.tokenizer.bytes(sampled.token));
        let ids = std::iter::once(sampled.token).chain(sampled.top_logprobs.iter().map(|&(id, _)| id));
        let names = ids.map(|id| self.tokenizer.name(id)).collect();
        match self.stop.push(&text) {
            Stopped::Not(text) => self.send(Generated::Token { sampled, names, text }),
            Stopped::Here(text) => {
                self.send(Generated::Token { sampled, names, text });
                self.finish(FinishReason::Stop, String::new())
            }
        }
    }

    fn finish(&mut self, reason: FinishReason, text: String) -> Stream {
        self.send(Generated::Finished { reason, text, reused_tokens: self.reused_tokens.unwrap_or(0) });
        Stream::Over
    }

    /// Sends an event. The channel has room for all that a request can give; it is closed where the client has gone.
    fn send(&mut self, event: Generated) -> Stream {
        match self.events.try_send(Ok(event)) {
            Ok(()) => Stream::Open,
            Err(_) => Stream::Over,
        }
    }
}
