//! The choice of a sequence's next draft: by prompt lookup, else by a draft model.
//!
//! ```text
//! undecided ─┬─ the tokens occurred before ──────────► ready ─► rows of a step ─► accepted or rejected: pacing
//!            └─ asked of the draft model ─► answer ──► ready
//! ```
//! A sequence waits while its draft is asked for. A draft is for the tokens that the sequence had when it was chosen,
//! and void once it has others.

use super::pacing::Pacing;
use super::prompt_lookup;

/// Drafts by lookup cost nothing but their rows.
const LOOKUP_PACING: Pacing = Pacing::new(3, 15);
/// The most tokens of a draft model's answer: each costs a step of that model.
pub(super) const MODEL_DRAFT_MAX: usize = 8;
const MODEL_PACING: Pacing = Pacing::new(3, MODEL_DRAFT_MAX);

/// What drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Lookup,
    Model,
}

/// The sources of drafts that an instance has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sources {
    pub(super) lookup: bool,
    pub(super) model: bool,
}

#[derive(Debug)]
enum Next {
    Undecided,
    Asked,
    Ready(Source, Vec<u32>),
}

/// What a sequence does before its next row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// The sequence sends its row, with a draft if there is one.
    Go,
    /// The sequence waits for its draft.
    Wait,
    /// The sequence waits for a draft of this many tokens, which the draft model is to be asked for.
    Ask(usize),
}

/// The drafting of one sequence.
#[derive(Debug)]
pub(super) struct Drafting {
    lookup: Pacing,
    model: Pacing,
    next: Next,
    /// The sequence's length when the next draft was chosen, in tokens.
    length: usize,
    /// The source of the draft in flight.
    sent: Source,
}

impl Default for Drafting {
    fn default() -> Self {
        let (lookup, model) = (LOOKUP_PACING, MODEL_PACING);
        Self { lookup, model, next: Next::Undecided, length: 0, sent: Source::Lookup }
    }
}

impl Drafting {
    /// Chooses a draft of at most `most` tokens to follow `tokens`, unless one is chosen already.
    pub(super) fn decide(&mut self, tokens: &[u32], most: usize, sources: Sources) -> Decision {
        if self.length != tokens.len() {
            (self.next, self.length) = (Next::Undecided, tokens.len());
        }
        match self.next {
            Next::Asked => return Decision::Wait,
            Next::Ready(..) => return Decision::Go,
            Next::Undecided => {}
        }
        if most > 0
            && sources.lookup
            && let Some(start) = prompt_lookup::continuation(tokens)
            && let Some(count) = self.lookup.next(most)
        {
            self.next = Next::Ready(Source::Lookup, prompt_lookup::draft(tokens, start, count));
            return Decision::Go;
        }
        if sources.model
            && let Some(count) = self.model.next(most)
        {
            self.next = Next::Asked;
            return Decision::Ask(count);
        }
        self.next = Next::Ready(Source::Lookup, Vec::new());
        Decision::Go
    }

    /// Takes the draft model's answer about the first `length` tokens; an empty one means that it has none in time.
    pub(super) fn answer(&mut self, length: usize, draft: Vec<u32>) {
        if !matches!(self.next, Next::Asked) || self.length != length {
            return;
        }
        if draft.is_empty() {
            self.model.reject();
        }
        self.next = Next::Ready(Source::Model, draft);
    }

    /// Takes the chosen draft for a sequence of `length` tokens.
    pub(super) fn take(&mut self, length: usize) -> Vec<u32> {
        match std::mem::replace(&mut self.next, Next::Undecided) {
            Next::Ready(source, draft) if self.length == length => {
                self.sent = source;
                draft
            }
            _ => Vec::new(),
        }
    }

    /// Adapts to the fate of the draft in flight.
    pub(super) fn learn(&mut self, drafted: usize, accepted: usize) {
        match self.sent {
            Source::Lookup => self.lookup.learn(drafted, accepted),
            Source::Model => self.model.learn(drafted, accepted),
        }
    }
}
