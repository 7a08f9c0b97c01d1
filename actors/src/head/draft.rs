//! Drafts of a draft model, which is another instance: the head asks, and the answer arrives as a message.

use super::HeadState;
use crate::core::scheduler::DraftAsk;
use crate::core::spec::ModelSpec;
use crate::transport::callback::EventCallback;
use exo_engines::engine::SeqId;

/// A question for the draft model of an instance: how might these tokens go on?
#[derive(Debug)]
pub(crate) struct DraftOrder {
    pub model: ModelSpec,
    pub tokens: Vec<u32>,
    /// The most tokens of the answer.
    pub count: usize,
    pub reply: DraftReply,
}

/// The draft model's answer.
#[derive(Debug)]
pub(crate) struct Drafted {
    pub seq: SeqId,
    /// The tokens of the question.
    pub length: usize,
    /// Empty if there is no draft, or none in time.
    pub draft: Vec<u32>,
}

/// The way back of an answer. Dropping it answers that there is no draft, since the sequence waits.
#[derive(Debug)]
pub(crate) struct DraftReply {
    seq: SeqId,
    length: usize,
    head: Option<EventCallback<Drafted>>,
}

impl DraftReply {
    pub(crate) fn send(mut self, draft: Vec<u32>) {
        self.answer(draft);
    }

    fn answer(&mut self, draft: Vec<u32>) {
        if let Some(head) = self.head.take() {
            head.tell(Drafted { seq: self.seq, length: self.length, draft });
        }
    }
}

impl Drop for DraftReply {
    fn drop(&mut self) {
        self.answer(Vec::new());
    }
}

impl HeadState {
    /// Passes the scheduler's questions on.
    pub(super) fn ask_for_drafts(&mut self) {
        while let Some(DraftAsk { seq, tokens, count }) = self.scheduler.poll_draft() {
            let reply = DraftReply { seq, length: tokens.len(), head: Some(self.drafted.clone()) };
            // Without a model, dropping the reply answers.
            if let Some(model) = self.pipeline.deployment().spec.draft_model() {
                self.args.drafter.tell(DraftOrder { model, tokens, count, reply });
            }
        }
    }

    pub(super) fn on_drafted(&mut self, Drafted { seq, length, draft }: Drafted) {
        self.scheduler.handle_draft(seq, length, draft);
    }
}
