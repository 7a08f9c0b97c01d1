//! One client's stream: tokens become text that may be shown.

use super::Lease;
use crate::core::schedule::{Event, FinishReason};
use crate::request::{Generated, RequestError};
use exo_engines::sampler::Sampled;
use exo_engines::tokenizer::{StopStream, Stopped, Tokenizer, Utf8Stream};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Whether a stream takes more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Open,
    Over,
}

impl Stream {
    pub(super) fn is_over(self) -> bool {
        self == Self::Over
    }
}

#[derive(Debug)]
pub(super) struct Client {
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Stream,
    stop: StopStream,
    reused_tokens: usize,
    events: mpsc::Sender<Result<Generated, RequestError>>,
    _lease: Lease,
}

impl Client {
    pub(super) fn new(
        tokenizer: Arc<Tokenizer>,
        stop: &[String],
        events: mpsc::Sender<Result<Generated, RequestError>>,
        lease: Lease,
    ) -> Self {
        Self {
            tokenizer,
            utf8: Utf8Stream::default(),
            stop: StopStream::new(stop),
            reused_tokens: 0,
            events,
            _lease: lease,
        }
    }

    /// Passes an event of the schedule on.
    pub(super) fn tell(&mut self, event: Event) -> Stream {
        match event {
            Event::TakenUp { reused_tokens, .. } => {
                self.reused_tokens = reused_tokens;
                Stream::Open
            }
            Event::Token { sampled, .. } => self.token(sampled),
            Event::Finished { reason, .. } => {
                let rest = self.utf8.finish();
                let (text, reason) = match self.stop.push(&rest) {
                    Stopped::Here(text) => (text, FinishReason::Stop),
                    Stopped::Not(text) => (text + &self.stop.finish(), reason),
                };
                self.finish(reason, text);
                Stream::Over
            }
            Event::Failed { error, .. } => {
                let what = error.to_string();
                self.fail(RequestError::Engine {
                    what,
                    remedy: "the model's weights may be damaged: download it again",
                });
                Stream::Over
            }
        }
    }

    fn token(&mut self, sampled: Sampled) -> Stream {
        let text = self.utf8.push(self.tokenizer.bytes(sampled.token));
        let ids = std::iter::once(sampled.token).chain(sampled.top_logprobs.iter().map(|&(id, _)| id));
        let names = ids.map(|id| self.tokenizer.name(id)).collect();
        match self.stop.push(&text) {
            Stopped::Not(text) => self.send(Generated::Token { sampled, names, text }),
            Stopped::Here(text) => {
                self.send(Generated::Token { sampled, names, text });
                self.finish(FinishReason::Stop, String::new());
                Stream::Over
            }
        }
    }

    fn finish(&mut self, reason: FinishReason, text: String) {
        self.send(Generated::Finished { reason, text, reused_tokens: self.reused_tokens });
    }

    /// Sends an event. The channel has room for all that a request can give; it is closed where the client has gone.
    pub(super) fn send(&mut self, event: Generated) -> Stream {
        match self.events.try_send(Ok(event)) {
            Ok(()) => Stream::Open,
            Err(_) => Stream::Over,
        }
    }

    pub(super) fn fail(&mut self, error: RequestError) {
        // A client that has gone needs no reason.
        let _ = self.events.try_send(Err(error));
    }
}
